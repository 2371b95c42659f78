//! The narrow number formats as a writer needs them: rounding to E4M3 and E2M1. Values of codes are checked against the
//! CPU backend's in tests.

/// Largest finite E4M3 value.
pub(crate) const E4M3_MAX: f32 = 448.0;

/// Largest E2M1 value.
pub(crate) const E2M1_MAX: f32 = 6.0;

/// The magnitudes of the E2M1 codes 0 to 7; bit 3 is the sign.
pub(crate) const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The value of an E4M3 byte that is not NaN.
#[inline(always)]
pub(crate) fn e4m3_value(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = if exponent == 0 {
        mantissa / 512.0
    } else {
        // 2^(exponent - 7) as bits: the biased exponent of float32 is 127 - 7 above E4M3's.
        (1.0 + mantissa / 8.0) * f32::from_bits(((exponent + 120) as u32) << 23)
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// `x` rounded to the nearest E4M3 byte, ties to even, saturating at 448 in magnitude. `x` is not NaN.
#[inline(always)]
pub(crate) fn e4m3_bits(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let magnitude = x.abs().min(E4M3_MAX);
    if magnitude < 1.0 / 64.0 {
        // Subnormals are multiples of 2^-9; eight of them have the bits of the smallest normal number.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = (bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20;
    sign | (rounded - (120 << 3)) as u8
}

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

/// The value of an E2M1 code below 16.
#[inline(always)]
pub(crate) fn e2m1_value(code: u8) -> f32 {
    let magnitude = E2M1[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use spark_backend::{Matrix, MatrixData};

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
            assert_eq!(e2m1_value(code as u8).to_bits(), value.to_bits());
            assert_eq!(usize::from(e2m1_code(value)), code);
        }
        for code in 0..7u8 {
            let middle = (e2m1_value(code) + e2m1_value(code + 1)) / 2.0;
            assert_eq!(e2m1_code(middle), code + code % 2, "tie at {middle}");
            assert_eq!(e2m1_code(-middle), (code + code % 2) | 8);
        }
        assert_eq!(e2m1_code(100.0), 7);
    }
}
