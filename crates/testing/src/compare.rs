//! Measures of difference, and the rule for when two greedy runs count as equal. No thresholds (see `tolerance`).
//!
//! Every measure answers infinity for different lengths or a value that is not finite, so that a comparison with any
//! tolerance fails.

/// `|a - b| / |b|` in the Euclidean norm; `b` is the reference. 0 for two zero vectors, infinity when only `b` is zero.
#[must_use]
pub fn rel_err(a: &[f32], b: &[f32]) -> f64 {
    let Some(pairs) = finite_pairs(a, b) else { return f64::INFINITY };
    let (mut diff, mut norm) = (0.0, 0.0);
    for (x, y) in pairs {
        diff += (x - y) * (x - y);
        norm += y * y;
    }
    if diff == 0.0 { 0.0 } else { (diff / norm).sqrt() }
}

/// Largest `|a - b|`.
#[must_use]
pub fn max_abs_diff(a: &[f32], b: &[f32]) -> f64 {
    let Some(pairs) = finite_pairs(a, b) else { return f64::INFINITY };
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

/// `1 - 2<a, b> / (<a, a> + <b, b>)`: about half the squared relative error, without a preferred side. 0 when equal.
/// The measure of the DeepGEMM tests.
#[must_use]
pub fn calc_diff(a: &[f32], b: &[f32]) -> f64 {
    let Some(pairs) = finite_pairs(a, b) else { return f64::INFINITY };
    let (mut product, mut squares) = (0.0, 0.0);
    for (x, y) in pairs {
        product += x * y;
        squares += x * x + y * y;
    }
    if squares == 0.0 { 0.0 } else { 1.0 - 2.0 * product / squares }
}

/// Kullback-Leibler divergence in nats of `softmax(logits)` from `softmax(reference)`: what the token distribution lost.
/// Says more than the largest difference of logits, which single rounding flips of the router dominate.
#[must_use]
pub fn kl_divergence(logits: &[f32], reference: &[f32]) -> f64 {
    if finite_pairs(logits, reference).is_none() {
        return f64::INFINITY;
    }
    let (p, q) = (log_softmax(reference), log_softmax(logits));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0)
}

/// Two greedy runs differ where they must not.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "step {step}: expected token {expected}, got {got:?}; the margin {margin} is not under twice the tolerance \
     {tolerance}, so this is no tie"
)]
pub struct Divergence {
    /// First step that differs.
    pub step: usize,
    /// What the oracle chose.
    pub expected: u32,
    /// What the run chose; `None` when it ended before.
    pub got: Option<u32>,
    /// Top-two margin of the oracle at this step.
    pub margin: f32,
    /// Tolerance on a log-probability.
    pub tolerance: f32,
}

/// The equality rule: ids must be equal up to the first step whose top-two margin is under twice `tolerance`. There
/// each of the two log-probabilities may be off by the tolerance, so either token is right and what follows is another
/// text. Answers how many steps were compared; a caller asserts that it is enough.
///
/// `expected` and `margins` are per step; `ids` may be longer.
///
/// # Errors
/// The first step that differs although its margin is clear, or at which `ids` ended.
pub fn first_divergence(
    ids: &[u32],
    expected: &[u32],
    margins: &[f32],
    tolerance: f32,
) -> Result<usize, Divergence> {
    for (step, (&expected, &margin)) in expected.iter().zip(margins).enumerate() {
        if margin < 2.0 * tolerance {
            return Ok(step);
        }
        let got = ids.get(step).copied();
        if got != Some(expected) {
            return Err(Divergence { step, expected, got, margin, tolerance });
        }
    }
    Ok(expected.len().min(margins.len()))
}

fn finite_pairs<'a>(a: &'a [f32], b: &'a [f32]) -> Option<impl Iterator<Item = (f64, f64)> + 'a> {
    let usable = a.len() == b.len() && a.iter().chain(b).all(|v| v.is_finite());
    usable.then(|| a.iter().zip(b).map(|(&x, &y)| (f64::from(x), f64::from(y))))
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let shifted: Vec<f64> = logits.iter().map(|&v| f64::from(v) - max).collect();
    let log_sum = shifted.iter().map(|v| v.exp()).sum::<f64>().ln();
    shifted.iter().map(|v| v - log_sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_error() {
        assert!((rel_err(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
        assert_eq!(rel_err(&[0.0], &[0.0]), 0.0);
        assert_eq!(rel_err(&[1.0], &[0.0]), f64::INFINITY);
    }

    #[test]
    fn diff_is_half_the_squared_relative_error() {
        let b: Vec<f32> = (0..64).map(|i| (i as f32).sin()).collect();
        let a: Vec<f32> = b.iter().enumerate().map(|(i, v)| v + 1e-2 * (3.0 * i as f32).cos()).collect();
        let rel = rel_err(&a, &b);
        assert!((calc_diff(&a, &b) / (0.5 * rel * rel) - 1.0).abs() < 0.05);
        assert_eq!(calc_diff(&b, &b), 0.0);
        assert_eq!(calc_diff(&[0.0], &[0.0]), 0.0);
    }

    #[test]
    fn nothing_hides_in_a_nan_or_a_short_vector() {
        for measure in [rel_err, max_abs_diff, calc_diff, kl_divergence] {
            assert_eq!(measure(&[1.0, f32::NAN], &[1.0, 2.0]), f64::INFINITY);
            assert_eq!(measure(&[1.0], &[1.0, 2.0]), f64::INFINITY);
            assert!(measure(&[1.0, 2.0], &[1.0, 2.0]).abs() < 1e-12);
        }
        assert_eq!(max_abs_diff(&[1.0, -2.0], &[1.5, -2.25]), 0.5);
    }

    #[test]
    fn divergence_of_distributions() {
        assert!(kl_divergence(&[1.0, 2.0, 3.0], &[11.0, 12.0, 13.0]) < 1e-12, "a constant changes nothing");
        let halves = kl_divergence(&[0.0, 0.0], &[30.0, 0.0]);
        assert!((halves - std::f64::consts::LN_2).abs() < 1e-6, "{halves}");
    }

    #[test]
    fn equal_up_to_the_first_tie() {
        let (expected, margins) = ([5, 6, 7, 8], [1.0, 0.5, 0.01, 1.0]);
        assert_eq!(first_divergence(&[5, 6, 7, 8], &expected, &margins, 1e-4), Ok(4));
        assert_eq!(first_divergence(&[5, 6, 9, 9], &expected, &margins, 0.1), Ok(2));
        let wrong = first_divergence(&[5, 6, 9, 9], &expected, &margins, 1e-4).unwrap_err();
        assert_eq!((wrong.step, wrong.expected, wrong.got), (2, 7, Some(9)));
        let short = first_divergence(&[5], &expected, &margins, 0.1).unwrap_err();
        assert_eq!((short.step, short.got), (1, None));
    }
}
