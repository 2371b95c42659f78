//! A row of numbers as NVFP4 on the host: what `kernels/nvfp4_quantize.cuh` does, number for number. For the test at the start and for
//! the tests here; no model is computed with it.

use super::pack::NVFP4_GROUP as GROUP;

/// The largest E2M1 and E4M3 numbers.
const E2M1_MAX: f32 = 6.0;
const E4M3_MAX: f32 = 448.0;
/// 2^-90: rows below are zero, because the numbers that follow from the factor would not all be normal.
const LEAST_AMAX: f32 = f32::from_bits((127 - 90) << 23);
/// The E2M1 numbers without sign.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// A quantised row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HostRow {
    /// A code for each number.
    pub(super) codes: Vec<u8>,
    /// E4M3, for each [`GROUP`] numbers.
    pub(super) scales: Vec<u8>,
    /// NaN where a number is not finite.
    pub(super) factor: f32,
}

impl HostRow {
    /// Quantises `x`, whole groups; `given`: the factor, else what the largest number asks for.
    pub(super) fn new(x: &[f32], given: Option<f32>) -> Self {
        let factor = given.unwrap_or_else(|| factor_of(x));
        let (mut codes, mut scales) = (Vec::with_capacity(x.len()), Vec::with_capacity(x.len() / GROUP));
        for group in x.chunks(GROUP) {
            let scale = if factor > 0.0 { e4m3_bits(amax(group) / (E2M1_MAX * factor)) } else { 0 };
            let inverse = 1.0 / (e4m3_value(scale) * factor);
            scales.push(scale);
            codes.extend(group.iter().map(|value| if scale > 0 { e2m1_code(value * inverse) } else { 0 }));
        }
        Self { codes, scales, factor }
    }

    /// The numbers that the codes stand for.
    pub(super) fn values(&self) -> Vec<f64> {
        let value = |(i, &code): (usize, &u8)| {
            let size = f64::from(E2M1[usize::from(code & 7)]);
            let value = if code & 8 == 0 { size } else { -size };
            value * f64::from(e4m3_value(self.scales[i / GROUP])) * f64::from(self.factor)
        };
        self.codes.iter().enumerate().map(value).collect()
    }
}

fn amax(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most, value| value.abs().max(most))
}

fn factor_of(x: &[f32]) -> f32 {
    if x.iter().any(|value| !value.is_finite()) {
        return f32::NAN;
    }
    let amax = amax(x);
    if amax < LEAST_AMAX { 0.0 } else { amax / (E2M1_MAX * E4M3_MAX) }
}

/// The nearest E4M3 number, ties to even, of `value`, which is not negative.
fn e4m3_bits(value: f32) -> u8 {
    // Steps of the result: 2^-9 below 2^-6, then three bits behind the first.
    let value = value.min(E4M3_MAX);
    let exponent = i32::try_from(value.to_bits() >> 23).unwrap_or(0) - 127;
    let step = 2f32.powi((exponent - 3).max(-9));
    let rounded = (value / step).round_ties_even() * step;
    // The number as a float, with the exponent that E4M3 counts from; numbers under 2^-6 have none.
    if rounded < 2f32.powi(-6) {
        return (rounded * 512.0) as u8;
    }
    ((rounded.to_bits() >> 20) - (120 << 3)) as u8
}

fn e4m3_value(bits: u8) -> f32 {
    let mantissa = f32::from(bits & 7);
    match i32::from(bits >> 3) {
        0 => mantissa * 2f32.powi(-9),
        exponent => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    }
}

/// The nearest E2M1 number, ties to the even code.
fn e2m1_code(value: f32) -> u8 {
    let size = value.abs().min(E2M1_MAX);
    let distance = |code: &usize| (size - E2M1[*code]).abs();
    // Of two that are as near, the even one comes first.
    let by_evenness = (0..8).step_by(2).chain((1..8).step_by(2));
    let nearest = by_evenness.min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0);
    nearest as u8 | if value.is_sign_negative() { 8 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spark_testing::Random;

    #[test]
    fn narrow_numbers_are_those_of_the_cpu_backend() {
        for bits in 0..0x7f {
            assert_eq!(e4m3_value(bits), spark_cpu::e4m3_value(bits));
        }
        let mut random = Random::new(1);
        for i in 0..20_000 {
            let value = random.uniform(0.0, 1.0) * 2f32.powi(i % 24 - 13);
            assert_eq!(e4m3_bits(value), spark_cpu::e4m3_bits(value), "{value}");
        }
        // Ties, and what is too large.
        let codes = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 9.0, -0.1, -1.75].map(e2m1_code);
        assert_eq!(codes, [0, 2, 2, 4, 4, 6, 6, 7, 7, 8, 12]);
    }

    #[test]
    fn rows_are_those_of_the_cpu_backend() {
        let mut random = Random::new(2);
        for k in [16, 80, 1040] {
            let x = random.bf16s(k, 3.0);
            let mut want = x.clone();
            spark_cpu::round_nvfp4(&mut want);
            for (got, want) in HostRow::new(&x, None).values().into_iter().zip(want) {
                // Theirs is rounded to float32 twice.
                assert!((got - f64::from(want)).abs() <= got.abs() * 2f64.powi(-22), "{got} {want}");
            }
        }
    }

    #[test]
    fn rows_that_have_no_factor_are_zero_or_not_a_number() {
        let zero = HostRow::new(&[0.0; 32], None);
        assert_eq!((zero.factor, &zero.scales[..], zero.codes.iter().max()), (0.0, &[0, 0][..], Some(&0)));
        let mut x = [1.0; 32];
        x[20] = f32::INFINITY;
        let row = HostRow::new(&x, None);
        assert!(row.factor.is_nan() && row.scales == [0, 0] && row.values()[0].is_nan());
        x[20] = f32::NAN;
        assert!(HostRow::new(&x, None).factor.is_nan());
    }

    #[test]
    fn numbers_of_the_format_stay_as_they_are() {
        // The largest is 6 * 448 and every group has one that is 6 times a scale.
        let x: Vec<f32> = (0..32)
            .map(|i| E2M1[i % 8] * if i < 16 { 448.0 } else { 1.5 } * if i % 3 == 0 { -1.0 } else { 1.0 })
            .collect();
        let row = HostRow::new(&x, None);
        assert_eq!(row.factor, 1.0);
        assert!(row.values().iter().zip(&x).all(|(got, want)| *got == f64::from(*want)));
    }
}
