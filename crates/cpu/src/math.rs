//! Scalar functions written without branches, so that loops over them vectorise. No slices, no threads.

/// `e^x` in float32 with a relative error under 3e-7; 0 below -87 and the value of 88 above 88.
///
/// `x = n ln 2 + r` with integer `n` and `|r| <= ln 2 / 2`; `e^r` is its Taylor polynomial of degree 7 (whose remainder,
/// `r^8 / 8!`, is under 6e-9); `2^n` is added to the exponent bits. Cody and Waite's two-part `ln 2` keeps `r` exact.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const LN2_HIGH: f32 = 0.693_359_4; // 355 / 512
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let bounded = x.clamp(-87.0, 88.0);
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, bounded));
    let mut p = 1.0f32 / 5040.0;
    p = p.mul_add(r, 1.0 / 720.0);
    p = p.mul_add(r, 1.0 / 120.0);
    p = p.mul_add(r, 1.0 / 24.0);
    p = p.mul_add(r, 1.0 / 6.0);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    let scaled = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < -87.0 { 0.0 } else { scaled }
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// GELU with the tanh approximation: `x / 2 * (1 + tanh(u))` is `x * sigmoid(2 u)`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let u = SQRT_2_OVER_PI * (x * x * x).mul_add(0.044_715, x);
    x / (1.0 + exp(-2.0 * u))
}

/// GELU with the error function.
pub(crate) fn gelu_erf(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(low: f64, high: f64, check: impl Fn(f32)) {
        for i in 0..=20_000 {
            check((low + (high - low) * f64::from(i) / 20_000.0) as f32);
        }
    }

    #[test]
    fn exp_is_accurate_and_bounded() {
        sweep(-86.9, 87.9, |x| {
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) / want - 1.0).abs() < 3e-7, "exp({x}) = {} not {want}", exp(x));
        });
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert!(exp(1000.0).is_finite());
    }

    #[test]
    fn activations_match_their_definitions() {
        sweep(-20.0, 20.0, |x| {
            let d = f64::from(x);
            let silu_want = d / (1.0 + (-d).exp());
            let u = (2.0 / std::f64::consts::PI).sqrt() * (d + 0.044_715 * d * d * d);
            let tanh_want = d / (1.0 + (-2.0 * u).exp());
            assert!((f64::from(silu(x)) - silu_want).abs() <= 1e-6 * silu_want.abs() + 1e-12);
            assert!((f64::from(gelu_tanh(x)) - tanh_want).abs() <= 2e-5 * tanh_want.abs() + 1e-7);
        });
        // Values of the normal distribution function at 1 and -2.
        assert!((gelu_erf(1.0) - 0.841_344_8).abs() < 1e-6);
        assert!((gelu_erf(-2.0) - -0.045_500_26).abs() < 1e-7);
        assert_eq!(gelu_erf(0.0), 0.0);
    }
}
