//! NVFP4 as compressed-tensors stores it (`nvfp4-pack-quantized`): E2M1 codes, an E4M3 scale per 16 inputs, one divisor.
//! `w = e2m1(code) * (e4m3(scale) / global)`.

use rayon::prelude::*;
use spark_cpu::{E2M1, E4M3_MAX, e4m3_bits, e4m3_value};

use crate::matrix::{Inputs, Weight};
use crate::numbers::{E2M1_MAX, e2m1_code};
use crate::writer::{Dtype, Tensor};

/// Inputs that share a scale.
pub(crate) const GROUP: usize = 16;

/// Scales that are tried: from this many E4M3 steps under the one that maps the largest magnitude to 6, up to beyond
/// the one that maps it to 4, where E2M1 is finer relative to its value.
const STEPS_DOWN: u8 = 3;
const STEPS_UP: u8 = 5;

/// A quantised weight.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Nvfp4 {
    n: usize,
    k: usize,
    /// `[n, k / 2]`, the low nibble is the even column.
    codes: Vec<u8>,
    /// `[n, k / 16]` E4M3.
    scales: Vec<u8>,
    global: f32,
}

/// The divisor for weights whose largest magnitude is `largest`: the largest block scale becomes 448.
pub(crate) fn global_scale(largest: f32) -> f32 {
    let global = E4M3_MAX * E2M1_MAX / largest;
    if global.is_finite() { global } else { 1.0 }
}

impl Nvfp4 {
    /// Quantises `weight`, whose `k` is a multiple of 16. With `search`, each block gets the scale with the least
    /// squared error, channels counting as loud as they are in `inputs`.
    pub(crate) fn new(weight: &Weight, global: f32, search: bool, inputs: Option<&Inputs>) -> Self {
        let &Weight { n, k, .. } = weight;
        let (mut codes, mut scales) = (vec![0; n * k / 2], vec![0; n * k / GROUP]);
        let loudness = match inputs {
            Some(inputs) => mean_squares(inputs),
            None => vec![1.0; k],
        };
        codes
            .par_chunks_mut(k / 2)
            .zip(scales.par_chunks_mut(k / GROUP))
            .zip(weight.values.par_chunks(k))
            .for_each(|((codes, scales), row)| {
                let blocks = row.chunks_exact(GROUP).zip(loudness.chunks_exact(GROUP));
                for (((w, loudness), codes), scale) in
                    blocks.zip(codes.chunks_exact_mut(GROUP / 2)).zip(scales)
                {
                    *scale = block_scale(w, loudness, global, search);
                    let step = e4m3_value(*scale) / global;
                    for (byte, pair) in codes.iter_mut().zip(w.chunks_exact(2)) {
                        *byte = code(pair[0], step) | code(pair[1], step) << 4;
                    }
                }
            });
        Self { n, k, codes, scales, global }
    }

    /// Row `row`, dequantised.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let codes = &self.codes[row * self.k / 2..][..self.k / 2];
        let scales = &self.scales[row * self.k / GROUP..][..self.k / GROUP];
        let blocks = codes.chunks_exact(GROUP / 2).zip(scales);
        for (out, (codes, &scale)) in out.chunks_exact_mut(GROUP).zip(blocks) {
            let step = e4m3_value(scale) / self.global;
            for (out, byte) in out.chunks_exact_mut(2).zip(codes) {
                out[0] = E2M1[usize::from(byte & 15)] * step;
                out[1] = E2M1[usize::from(byte >> 4)] * step;
            }
        }
    }

    /// `weight_packed` U8 `[n, k / 2]`, `weight_scale` F8_E4M3 `[n, k / 16]`, `weight_global_scale` F32 `[1]`.
    pub(crate) fn tensors(self, module: &str) -> Vec<Tensor> {
        let (n, k) = (self.n, self.k);
        let name = |kind: &str| format!("{module}.{kind}");
        vec![
            Tensor::new(name("weight_packed"), Dtype::U8, &[n, k / 2], self.codes),
            Tensor::new(name("weight_scale"), Dtype::F8_E4M3, &[n, k / GROUP], self.scales),
            Tensor::new(name("weight_global_scale"), Dtype::F32, &[1], self.global.to_le_bytes().to_vec()),
        ]
    }
}

fn mean_squares(inputs: &Inputs) -> Vec<f32> {
    let mut sums = vec![0.0f32; inputs.k];
    for row in inputs.values.chunks_exact(inputs.k) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
    }
    // A silent channel still counts a little: other prompts may use it.
    let mean = sums.iter().sum::<f32>() / inputs.k as f32;
    sums.iter().map(|sum| sum + 0.01 * mean + f32::MIN_POSITIVE).collect()
}

#[inline(always)]
fn code(value: f32, step: f32) -> u8 {
    if step > 0.0 { e2m1_code(value / step) } else { 0 }
}

/// The E4M3 scale of a block.
fn block_scale(block: &[f32], loudness: &[f32], global: f32, search: bool) -> u8 {
    let largest = block.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let plain = e4m3_bits(largest / E2M1_MAX * global);
    if largest == 0.0 {
        return 0;
    }
    // Not to zero: the block would vanish.
    let plain = plain.max(1);
    if !search {
        return plain;
    }
    let error = |scale: u8| {
        let step = e4m3_value(scale) / global;
        let one = |(&w, &loud): (&f32, &f32)| {
            let d = w - E2M1[usize::from(code(w, step))] * step;
            d * d * loud
        };
        block.iter().zip(loudness).map(one).sum::<f32>()
    };
    let mut best = (error(plain), plain);
    let last = (plain + STEPS_UP).min(e4m3_bits(E4M3_MAX));
    for scale in plain.saturating_sub(STEPS_DOWN).max(1)..=last {
        let error = error(scale);
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use spark_backend::{Matrix, MatrixData};
    use spark_testing::Random;

    use super::*;

    fn values(quantised: &Nvfp4) -> Vec<f32> {
        let mut out = vec![0.0; quantised.n * quantised.k];
        out.chunks_exact_mut(quantised.k).enumerate().for_each(|(row, out)| quantised.row(row, out));
        out
    }

    #[test]
    fn values_are_those_of_the_cpu_backend_and_the_search_helps() {
        let (n, k) = (12, 96);
        let mut weight = Weight { n, k, values: Random::new(3).normals(n * k, 0.1) };
        weight.values[5 * GROUP..6 * GROUP].fill(0.0);
        let largest = weight.values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let global = global_scale(largest);
        let mut errors = Vec::new();
        for search in [false, true] {
            let quantised = Nvfp4::new(&weight, global, search, None);
            let ours = values(&quantised);
            let data = MatrixData::Nvfp4 {
                codes: quantised.codes.clone().into(),
                scales: quantised.scales.clone().into(),
                alpha: 1.0 / global,
            };
            let theirs = spark_cpu::dequantize(&Matrix { n, k, data }).unwrap();
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} {b}");
            }
            errors.push(ours.iter().zip(&weight.values).map(|(a, b)| (a - b) * (a - b)).sum::<f32>());
        }
        assert!(errors[1] < 0.95 * errors[0], "{errors:?}");
    }

    #[test]
    fn loud_channels_count_more() {
        let k = 64;
        let weight = Weight { n: 32, k, values: Random::new(6).normals(32 * k, 0.1) };
        let loud = |j: usize| if j.is_multiple_of(8) { 20.0 } else { 1.0 };
        let x = Random::new(8).normals(50 * k, 1.0);
        let inputs =
            Inputs::new(k, x.iter().enumerate().map(|(i, x)| x * loud(i % k)).collect(), vec![1.0; k]);
        let error = |calibrated| {
            let quantised = values(&Nvfp4::new(&weight, global_scale(0.5), true, calibrated));
            let pairs = quantised.iter().zip(&weight.values).enumerate();
            pairs.map(|(i, (a, b))| ((a - b) * loud(i % k)).powi(2)).sum::<f32>()
        };
        let (blind, calibrated) = (error(None), error(Some(&inputs)));
        assert!(calibrated < 0.9 * blind, "{calibrated} {blind}");
    }

    #[test]
    fn zero_weights_stay_zero() {
        let weight = Weight { n: 1, k: 16, values: vec![0.0; 16] };
        let quantised = Nvfp4::new(&weight, global_scale(0.0), true, None);
        assert_eq!(values(&quantised), weight.values);
    }
}
