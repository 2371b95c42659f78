//! AWQ's searches: the scale of each input channel and the limit of each group that make the outputs on calibration
//! inputs wrong by least. Knows weights and inputs, no model.
//!
//! Both searches only ever keep what is better than plain rounding on the inputs they see, so that their result never
//! is worse there.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::awq::round_group;
use crate::matrix::{BLOCK, Inputs, Weight, squares, total_squares};

/// Exponents that are tried for the scale: 0, 1/20, ... 19/20.
const NUM_EXPONENTS: usize = 20;
/// Limits that are tried for a group, each 1/20 of the largest magnitude under the one before.
const NUM_LIMITS: usize = 10;
const LIMIT_STEP: f32 = 1.0 / 20.0;

/// A linear layer in a search for a scale that it may share with others.
pub(crate) struct Scaled<'a> {
    pub(crate) weight: &'a Weight,
    pub(crate) inputs: &'a Inputs,
}

/// The scale of the input channels that is best for all `layers` together. `mean_abs` is the mean magnitude of each
/// channel; `settle` brings a scale to one that can be folded exactly.
pub(crate) fn channel_scale(
    layers: &[Scaled<'_>],
    mean_abs: &[f32],
    group_size: usize,
    settle: impl Fn(Vec<f32>) -> Vec<f32>,
) -> Vec<f32> {
    let mut importance = vec![0.0f32; mean_abs.len()];
    for layer in layers {
        let columns = layer.weight.column_weight(group_size);
        importance.iter_mut().zip(columns).for_each(|(sum, column)| *sum += column / layers.len() as f32);
    }
    let mut best = vec![1.0; mean_abs.len()];
    let mut least = scale_error(layers, &best, group_size);
    for exponent in 0..NUM_EXPONENTS {
        let exponent = exponent as f32 / NUM_EXPONENTS as f32;
        for divide in [false, true] {
            let power = |(&x, &w): (&f32, &f32)| {
                let scale = x.max(1e-6).powf(exponent);
                if divide { scale / (w + 1e-4).powf(1.0 - exponent) } else { scale }
            };
            let scale = settle(centred(mean_abs.iter().zip(&importance).map(power).collect()));
            let error = scale_error(layers, &scale, group_size);
            if error < least {
                (best, least) = (scale, error);
            }
        }
    }
    best
}

/// Divides by the geometric mean of the extremes, and keeps the result in a range that 16-bit norms and scales hold.
fn centred(mut scale: Vec<f32>) -> Vec<f32> {
    let (low, high) = scale.iter().fold((f32::INFINITY, 0.0f32), |(low, high), &s| (low.min(s), high.max(s)));
    let centre = (low * high).sqrt();
    scale.iter_mut().for_each(|s| *s = (*s / centre).clamp(1e-3, 1e3));
    scale
}

/// Squared error of the outputs of all layers when their weights are rounded after multiplication with `scale`.
fn scale_error(layers: &[Scaled<'_>], scale: &[f32], group_size: usize) -> f64 {
    let arch = Arch::new();
    let one = |layer: &Scaled<'_>| {
        total_squares(layer.weight, Some(layer.inputs), |row, out| {
            arch.dispatch(ScaledDifference { row: layer.weight.row(row), scale, group_size, out });
        })
    };
    layers.iter().map(one).sum()
}

/// What rounding takes from a row that is multiplied by `scale` for it.
struct ScaledDifference<'a> {
    row: &'a [f32],
    scale: &'a [f32],
    group_size: usize,
    out: &'a mut [f32],
}

impl WithSimd for ScaledDifference<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let size = self.group_size;
        let (mut scaled, mut rounded) = ([0.0; MAX_GROUP], [0.0; MAX_GROUP]);
        let (scaled, rounded) = (&mut scaled[..size], &mut rounded[..size]);
        let groups = self.row.chunks_exact(size).zip(self.scale.chunks_exact(size));
        for ((w, s), out) in groups.zip(self.out.chunks_exact_mut(size)) {
            for i in 0..size {
                scaled[i] = w[i] * s[i];
            }
            round_group(scaled, f32::INFINITY, rounded);
            for i in 0..size {
                out[i] = w[i] - rounded[i] / s[i];
            }
        }
    }
}

/// Largest group size.
pub(crate) const MAX_GROUP: usize = 128;

/// The limits `[n, k / group_size]` of the groups of `weight`, which has been multiplied by `scale`; `inputs` are those
/// of the weight without it. Infinity where no limit helps the group, or where the limits of a row together do not
/// help the row.
pub(crate) fn group_limits(weight: &Weight, scale: &[f32], inputs: &Inputs, group_size: usize) -> Vec<f32> {
    let groups = weight.k / group_size;
    let arch = Arch::new();
    let grams = inputs.grams(group_size);
    let mut limits = vec![f32::INFINITY; weight.n * groups];
    limits.par_chunks_mut(groups).enumerate().for_each_init(
        || vec![0.0; BLOCK * weight.k],
        |rows, (row, limits)| {
            arch.dispatch(GroupLimits { row: weight.row(row), scale, grams: &grams, limits });
            // Two of the rows that are multiplied together: without and with the limits. The others stay zero.
            let none = [f32::INFINITY];
            for (out, limits) in rows.chunks_exact_mut(weight.k).zip([&none[..], limits]) {
                row_difference(weight.row(row), scale, limits, group_size, out);
            }
            let [plain, limited, ..] = squares(arch, rows, Some(inputs));
            if limited >= plain {
                limits.fill(f32::INFINITY);
            }
        },
    );
    limits
}

/// What rounding takes from a row, in terms of the weight without `scale`. One limit for all groups, or one each.
fn row_difference(row: &[f32], scale: &[f32], limits: &[f32], group_size: usize, out: &mut [f32]) {
    let groups = row.chunks_exact(group_size).zip(scale.chunks_exact(group_size));
    for (g, ((w, s), out)) in groups.zip(out.chunks_exact_mut(group_size)).enumerate() {
        round_group(w, limits[g.min(limits.len() - 1)], out);
        for i in 0..w.len() {
            out[i] = (w[i] - out[i]) / s[i];
        }
    }
}

/// Finds the limit of each group of a row.
struct GroupLimits<'a> {
    row: &'a [f32],
    scale: &'a [f32],
    grams: &'a [Vec<f32>],
    limits: &'a mut [f32],
}

impl WithSimd for GroupLimits<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let size = self.row.len() / self.limits.len();
        let groups = self.row.chunks_exact(size).zip(self.scale.chunks_exact(size)).zip(self.grams);
        for (limit, ((w, s), gram)) in self.limits.iter_mut().zip(groups) {
            *limit = group_limit(w, s, gram);
        }
    }
}

/// The best limit of one group by its own part of the error, `d G d` with the inner products `G` of the inputs.
#[inline(always)]
fn group_limit(group: &[f32], scale: &[f32], gram: &[f32]) -> f32 {
    let size = group.len();
    let largest = group.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let mut best = (f32::INFINITY, f32::INFINITY);
    let mut rounded = [0.0; MAX_GROUP];
    for step in 0..NUM_LIMITS {
        let limit = if step == 0 { f32::INFINITY } else { largest * (1.0 - step as f32 * LIMIT_STEP) };
        let d = &mut rounded[..size];
        round_group(group, limit, d);
        for i in 0..size {
            d[i] = (group[i] - d[i]) / scale[i];
        }
        let mut error = 0.0f32;
        for (line, &value) in gram.chunks_exact(size).zip(d.iter()) {
            let mut lanes = [0.0f32; 16];
            for (g, d) in line.chunks_exact(16).zip(d.chunks_exact(16)) {
                for lane in 0..16 {
                    lanes[lane] = g[lane].mul_add(d[lane], lanes[lane]);
                }
            }
            error += value * lanes.iter().sum::<f32>();
        }
        if error < best.0 {
            best = (error, limit);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use spark_testing::Random;

    use super::*;
    use crate::awq::Int4;

    fn inputs(random: &mut Random, rows: usize, k: usize) -> Inputs {
        // A few loud channels, as real activations have.
        let loud = |j: usize| if j.is_multiple_of(37) { 30.0 } else { 1.0 };
        let values: Vec<f32> =
            random.normals(rows * k, 1.0).iter().enumerate().map(|(i, v)| v * loud(i % k)).collect();
        let mean = |j: usize| (0..rows).map(|r| values[r * k + j].abs()).sum::<f32>() / rows as f32;
        let mean_abs = (0..k).map(mean).collect();
        Inputs::new(k, values, mean_abs)
    }

    fn error(weight: &Weight, inputs: &Inputs, scale: &[f32], limits: Option<&[f32]>) -> f64 {
        let mut folded = weight.clone();
        folded.scale_columns(scale);
        let int4 = Int4::new(&folded, 64, limits);
        total_squares(weight, Some(inputs), |row, out| {
            int4.row(row, out);
            for ((out, w), s) in out.iter_mut().zip(weight.row(row)).zip(scale) {
                *out = w - *out / s;
            }
        })
    }

    #[test]
    fn each_search_lowers_the_error_of_what_is_stored() {
        let mut random = Random::new(7);
        let (n, k) = (24, 192);
        let mut values = random.normals(n * k, 0.05);
        values.iter_mut().step_by(53).for_each(|value| *value *= 4.0);
        let weight = Weight { n, k, values };
        let inputs = inputs(&mut random, 100, k);
        let layers = [Scaled { weight: &weight, inputs: &inputs }];
        let ones = vec![1.0; k];
        let scale = channel_scale(&layers, &inputs.mean_abs, 64, |scale| scale);
        let plain = error(&weight, &inputs, &ones, None);
        let scaled = error(&weight, &inputs, &scale, None);
        assert!(scaled < 0.5 * plain, "{scaled} of {plain}");
        assert!(
            (scale_error(&layers, &scale, 64) / scaled - 1.0).abs() < 1e-6,
            "the search measures what is stored"
        );
        let mut folded = weight.clone();
        folded.scale_columns(&scale);
        let limits = group_limits(&folded, &scale, &inputs, 64);
        let limited = error(&weight, &inputs, &scale, Some(&limits));
        assert!(limited < scaled, "{limited} of {scaled}");
        assert!(limits.iter().any(|limit| limit.is_finite()));
    }

    #[test]
    fn a_scale_stays_in_range() {
        let scale = centred(vec![1e-30, 1.0, 1e30]);
        assert!(scale.iter().all(|s| (1e-3..=1e3).contains(s)), "{scale:?}");
    }
}
