//! Conversions between float32 and the narrow number formats: bfloat16, FP8 E4M3, FP4 E2M1. No matrix layout here.

/// Largest finite E4M3 value.
pub const E4M3_MAX: f32 = 448.0;

/// `x` rounded to the nearest bfloat16 (ties to even), as a float32.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    // Adding just under half of the dropped unit, one more when the kept part is odd, is nearest-even.
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    f32::from_bits(if x.is_nan() { (bits | 0x0040_0000) & 0xffff_0000 } else { rounded })
}

/// The bits of `x` rounded to bfloat16.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    (round_bf16(x).to_bits() >> 16) as u16
}

/// The value of bfloat16 bits.
#[inline(always)]
pub(crate) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The value of an E4M3 byte (OCP FP8 "fn": no infinities, 0x7f and 0xff are NaN). Branch-free so that loops vectorise.
#[inline(always)]
pub fn e4m3_value(byte: u8) -> f32 {
    let magnitude = u32::from(byte & 0x7f);
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    let subnormal = magnitude as f32 * (1.0 / 512.0);
    let value = if magnitude < 8 { subnormal } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | (u32::from(byte & 0x80) << 24))
}

/// `x` rounded to the nearest E4M3 (ties to even), saturating at ±448; NaN stays NaN.
#[inline(always)]
pub fn e4m3_bits(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    if magnitude >= E4M3_MAX {
        return sign | 0x7e;
    }
    if magnitude < 1.0 / 64.0 {
        // Subnormals are multiples of 2^-9; the eighth of them is the smallest normal number, with the right bits.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = (bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20;
    sign | (rounded - (120 << 3)) as u8
}

/// The values of the E2M1 codes 0 to 15 (OCP MX FP4): bit 3 is the sign.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The two values of a byte of E2M1 codes, the low nibble first. One lookup for both: compilers do not vectorise the
/// arithmetic on nibbles well.
pub(crate) static E2M1_PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [E2M1[byte & 15], E2M1[byte >> 4]];
        byte += 1;
    }
    pairs
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        // 1 + 2^-8 lies between 1 and 1 + 2^-7: the even one is 1. 1 + 3 * 2^-8 goes up.
        assert_eq!(round_bf16(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(round_bf16(1.0 + 3.0 / 256.0), 1.0 + 1.0 / 64.0);
        assert_eq!(round_bf16(-0.0).to_bits(), (-0.0f32).to_bits());
        assert_eq!(round_bf16(f32::MAX), f32::INFINITY);
        assert!(round_bf16(f32::NAN).is_nan());
        assert!(round_bf16(f32::from_bits(0x7f80_0001)).is_nan());
        for bits in 0..=u16::MAX {
            let want = half::bf16::from_bits(bits).to_f32();
            assert!(bf16_value(bits).to_bits() == want.to_bits() || want.is_nan());
        }
        let mut x = 1e-30f32;
        while x < 1e30 {
            assert_eq!(bf16_bits(x), half::bf16::from_f32(x).to_bits(), "{x}");
            x *= 1.000_37;
        }
    }

    #[test]
    fn e4m3_round_trips_and_rounds_to_nearest() {
        assert_eq!(e4m3_value(0x7e), 448.0);
        assert_eq!(e4m3_value(0x01), 1.0 / 512.0);
        assert_eq!(e4m3_value(0x38), 1.0);
        assert_eq!(e4m3_value(0xb8), -1.0);
        assert!(e4m3_value(0x7f).is_nan());
        assert_eq!(e4m3_bits(1e9), 0x7e);
        assert_eq!(e4m3_bits(-1e9), 0xfe);
        assert_eq!(e4m3_bits(f32::NAN) & 0x7f, 0x7f);
        let values: Vec<f32> = (0..0x7f).map(e4m3_value).collect();
        assert!(values.windows(2).all(|pair| pair[0] < pair[1]), "codes must be ascending");
        for (code, &value) in values.iter().enumerate() {
            assert_eq!(usize::from(e4m3_bits(value)), code);
        }
        for (code, pair) in values.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0; // exact: the values have four significant bits
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(usize::from(e4m3_bits(middle)), even, "tie at {middle}");
            assert_eq!(usize::from(e4m3_bits(middle * 0.9999)), code);
            assert_eq!(usize::from(e4m3_bits(middle * 1.0001)), code + 1);
        }
    }

    #[test]
    fn e2m1_has_the_published_values() {
        // Sign, two exponent bits with bias 1, one mantissa bit.
        for code in 0..16u8 {
            let (exponent, mantissa) = (i32::from(code >> 1 & 3), f32::from(code & 1));
            let magnitude =
                if exponent == 0 { mantissa / 2.0 } else { (1.0 + mantissa / 2.0) * 2f32.powi(exponent - 1) };
            let want = if code & 8 == 0 { magnitude } else { -magnitude };
            assert_eq!(E2M1_PAIRS[usize::from(code)], [want, 0.0]);
            assert_eq!(E2M1_PAIRS[usize::from(code) << 4], [0.0, want]);
        }
    }
}
