//! Rounding to E2M1. The values of codes, and E4M3, are the CPU backend's; here is the direction that it does not need.

/// Largest E2M1 value.
pub(crate) const E2M1_MAX: f32 = 6.0;

/// `x` rounded to the nearest E2M1 code, ties to the even code, saturating at 6 in magnitude. `x` is not NaN.
#[inline(always)]
pub(crate) fn e2m1_code(x: f32) -> u8 {
    let magnitude = x.abs();
    // One comparison per boundary between neighbours; an even neighbour above takes the tie.
    let code = u8::from(magnitude > 0.25)
        + u8::from(magnitude >= 0.75)
        + u8::from(magnitude > 1.25)
        + u8::from(magnitude >= 1.75)
        + u8::from(magnitude > 2.5)
        + u8::from(magnitude >= 3.5)
        + u8::from(magnitude > 5.0);
    code | if x.is_sign_negative() { 8 } else { 0 }
}

#[cfg(test)]
mod tests {
    use spark_backend::{Matrix, MatrixData};
    use spark_cpu::{E2M1, e4m3_bits, e4m3_value};

    use super::*;

    #[test]
    fn e4m3_is_that_of_the_cpu_backend() {
        let bytes: Vec<u8> = (0..=255).filter(|byte| byte & 0x7f != 0x7f).collect();
        let n = bytes.len();
        let data = MatrixData::Fp8 { values: bytes.clone().into(), scales: vec![1.0], block: [1, n] };
        let values = spark_cpu::dequantize(&Matrix { n: 1, k: n, data }).unwrap();
        for (&byte, &value) in bytes.iter().zip(&values) {
            assert_eq!(e4m3_value(byte).to_bits(), value.to_bits(), "{byte:#x}");
            assert_eq!(e4m3_bits(value), byte);
        }
        let positive: Vec<f32> = (0..0x7f).map(e4m3_value).collect();
        for (code, pair) in positive.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            assert_eq!(usize::from(e4m3_bits(middle)), code + code % 2);
            assert_eq!(usize::from(e4m3_bits(middle * 0.999)), code);
        }
        assert_eq!(e4m3_bits(1e9), 0x7e);
        assert_eq!(e4m3_bits(-1e9), 0xfe);
    }

    #[test]
    fn e2m1_is_that_of_the_cpu_backend() {
        let codes: Vec<u8> = (0..8u8).map(|i| (2 * i) | ((2 * i + 1) << 4)).collect();
        let data = MatrixData::Nvfp4 { codes: codes.into(), scales: vec![0x38].into(), alpha: 1.0 };
        let values = spark_cpu::dequantize(&Matrix { n: 1, k: 16, data }).unwrap();
        for (code, &value) in values.iter().enumerate() {
            assert_eq!(E2M1[code].to_bits(), value.to_bits());
            assert_eq!(usize::from(e2m1_code(value)), code);
        }
        for code in 0..7u8 {
            let middle = f32::midpoint(E2M1[usize::from(code)], E2M1[usize::from(code) + 1]);
            assert_eq!(e2m1_code(middle), code + code % 2, "tie at {middle}");
            assert_eq!(e2m1_code(-middle), (code + code % 2) | 8);
        }
        assert_eq!(e2m1_code(100.0), 7);
    }
}
