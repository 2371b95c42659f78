//! FP8 with a scale per block of 128 x 128, as in Qwen's published checkpoints: `w = e4m3(value) * scale_inv`.

use half::bf16;
use rayon::prelude::*;
use spark_cpu::{E4M3_MAX, e4m3_bits, e4m3_value};

use crate::matrix::Weight;

/// Rows and columns that share a scale; blocks at the edges may be smaller.
pub(crate) const BLOCK: usize = 128;

/// A quantised weight.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fp8 {
    k: usize,
    /// `[n, k]` E4M3.
    pub(crate) values: Vec<u8>,
    /// `[ceil(n / 128), ceil(k / 128)]`, bfloat16 as in the published files.
    pub(crate) scales: Vec<bf16>,
}

impl Fp8 {
    /// Quantises `weight`.
    pub(crate) fn new(weight: &Weight) -> Self {
        let &Weight { n, k, .. } = weight;
        let columns = k.div_ceil(BLOCK);
        let mut values = vec![0; n * k];
        let mut scales = vec![bf16::ZERO; n.div_ceil(BLOCK) * columns];
        values
            .par_chunks_mut(BLOCK * k)
            .zip(scales.par_chunks_mut(columns))
            .zip(weight.values.par_chunks(BLOCK * k))
            .for_each(|((values, scales), rows)| {
                let mut largest = vec![0.0f32; columns];
                for row in rows.chunks_exact(k) {
                    for (largest, block) in largest.iter_mut().zip(row.chunks(BLOCK)) {
                        *largest = block.iter().fold(*largest, |m, v| m.max(v.abs()));
                    }
                }
                scales.iter_mut().zip(&largest).for_each(|(scale, largest)| *scale = scale_of(*largest));
                for (values, row) in values.chunks_exact_mut(k).zip(rows.chunks_exact(k)) {
                    let blocks = values.chunks_mut(BLOCK).zip(row.chunks(BLOCK));
                    for ((values, row), scale) in blocks.zip(scales.iter()) {
                        let scale = scale.to_f32();
                        values.iter_mut().zip(row).for_each(|(out, value)| *out = e4m3_bits(value / scale));
                    }
                }
            });
        Self { k, values, scales }
    }

    /// Row `row`, dequantised.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let columns = self.k.div_ceil(BLOCK);
        let scales = &self.scales[row / BLOCK * columns..][..columns];
        let values = self.values[row * self.k..][..self.k].chunks(BLOCK);
        for ((out, values), scale) in out.chunks_mut(BLOCK).zip(values).zip(scales) {
            let scale = scale.to_f32();
            out.iter_mut().zip(values).for_each(|(out, &value)| *out = e4m3_value(value) * scale);
        }
    }

    /// The scales' bytes.
    pub(crate) fn scale_bytes(&self) -> Vec<u8> {
        self.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect()
    }
}

/// A block of zeros gets the scale 1, so that nothing is divided by zero.
fn scale_of(largest: f32) -> bf16 {
    let scale = bf16::from_f32(largest / E4M3_MAX);
    if scale.to_f32() > 0.0 && scale.is_finite() { scale } else { bf16::ONE }
}

#[cfg(test)]
mod tests {
    use spark_backend::{Matrix, MatrixData};
    use spark_testing::Random;

    use super::*;

    #[test]
    fn ragged_blocks_are_those_of_the_cpu_backend() {
        for (n, k) in [(130, 300), (64, 64), (128, 256)] {
            let weight = Weight { n, k, values: Random::new(4).normals(n * k, 0.3) };
            let fp8 = Fp8::new(&weight);
            let scales: Vec<f32> = fp8.scales.iter().map(|scale| scale.to_f32()).collect();
            let data = MatrixData::Fp8 { values: fp8.values.clone().into(), scales, block: [BLOCK, BLOCK] };
            let theirs = spark_cpu::dequantize(&Matrix { n, k, data }).unwrap();
            let mut ours = vec![0.0; n * k];
            ours.chunks_exact_mut(k).enumerate().for_each(|(row, out)| fp8.row(row, out));
            assert_eq!(ours, theirs);
            for (a, b) in ours.iter().zip(&weight.values) {
                // Half a step of three bits, or of the smallest number of the block; and the rounding of its scale.
                assert!((a - b).abs() <= b.abs() * 0.0665 + 1e-5, "{a} {b}");
            }
        }
    }
}
