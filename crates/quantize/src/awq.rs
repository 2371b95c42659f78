//! AWQ's numbers: 4-bit codes with a scale and a zero point per group of inputs, and AutoAWQ's layout of them (version
//! "gemm"). Which scales the weight was multiplied by before, and where it is clipped, is decided in `search`.

use half::f16;
use rayon::prelude::*;

use crate::matrix::Weight;
use crate::writer::{Dtype, Tensor};

/// Largest code.
const MAX_CODE: f32 = 15.0;

/// AutoAWQ's order: nibble `i` of a word holds output `ORDER[i]` of its eight.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// A quantised weight: `w = (code - zero) * scale`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Int4 {
    n: usize,
    k: usize,
    group_size: usize,
    /// `[n, k]`, 0 to 15.
    codes: Vec<u8>,
    /// `[n, k / group_size]`, 0 to 15.
    zeros: Vec<u8>,
    /// `[n, k / group_size]`.
    scales: Vec<f16>,
}

/// Scale and zero point of a group.
#[derive(Debug, Clone, Copy)]
struct Grid {
    scale: f32,
    zero: f32,
}

impl Grid {
    /// The grid over the range of `group`, which is cut at `limit` in magnitude. Zero is always in the range, so that
    /// the zero point is a code.
    #[inline(always)]
    fn of(group: &[f32], limit: f32) -> Self {
        // In lanes, so that the comparisons do not wait for each other. Group sizes are multiples of them.
        const LANES: usize = 16;
        let (mut lows, mut highs) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (whole, rest) = group.as_chunks::<LANES>();
        for values in whole {
            for lane in 0..LANES {
                let value = values[lane];
                lows[lane] = if value < lows[lane] { value } else { lows[lane] };
                highs[lane] = if value > highs[lane] { value } else { highs[lane] };
            }
        }
        let low = lows.iter().chain(rest).fold(0.0f32, |low, &value| low.min(value));
        let high = highs.iter().chain(rest).fold(0.0f32, |high, &value| high.max(value));
        let (low, high) = (low.max(-limit), high.min(limit));
        // As stored: codes are chosen for the scale that will be read.
        let scale = f16::from_f32(((high - low) / MAX_CODE).min(f16::MAX.to_f32())).to_f32();
        let zero = if scale > 0.0 { (-low / scale).round_ties_even().clamp(0.0, MAX_CODE) } else { 0.0 };
        Self { scale, zero }
    }

    /// The code of a value. A group whose scale rounds to zero has the code of zero everywhere.
    #[inline(always)]
    fn code(self, value: f32) -> f32 {
        let steps = if self.scale > 0.0 { (value / self.scale).round_ties_even() } else { 0.0 };
        (steps + self.zero).clamp(0.0, MAX_CODE)
    }

    #[inline(always)]
    fn value(self, code: f32) -> f32 {
        (code - self.zero) * self.scale
    }
}

/// What `group` becomes when it is cut at `limit` and rounded.
#[inline(always)]
pub(crate) fn round_group(group: &[f32], limit: f32, out: &mut [f32]) {
    let grid = Grid::of(group, limit);
    out.iter_mut().zip(group).for_each(|(out, &value)| *out = grid.value(grid.code(value)));
}

impl Int4 {
    /// Quantises `weight`, whose `k` is a multiple of `group_size`. `limits` `[n, k / group_size]` cut the groups.
    pub(crate) fn new(weight: &Weight, group_size: usize, limits: Option<&[f32]>) -> Self {
        let &Weight { n, k, .. } = weight;
        let groups = k / group_size;
        let (mut codes, mut zeros, mut scales) =
            (vec![0; n * k], vec![0; n * groups], vec![f16::ZERO; n * groups]);
        codes
            .par_chunks_mut(group_size)
            .zip(&mut zeros)
            .zip(&mut scales)
            .zip(weight.values.par_chunks(group_size))
            .enumerate()
            .for_each(|(at, (((codes, zero), scale), group))| {
                let grid = Grid::of(group, limits.map_or(f32::INFINITY, |limits| limits[at]));
                *zero = grid.zero as u8;
                *scale = f16::from_f32(grid.scale);
                codes.iter_mut().zip(group).for_each(|(code, &value)| *code = grid.code(value) as u8);
            });
        Self { n, k, group_size, codes, zeros, scales }
    }

    /// Row `row`, dequantised.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let groups = self.k / self.group_size;
        let codes = self.codes[row * self.k..][..self.k].chunks_exact(self.group_size);
        for (g, (codes, out)) in codes.zip(out.chunks_exact_mut(self.group_size)).enumerate() {
            let at = row * groups + g;
            let grid = Grid { scale: self.scales[at].to_f32(), zero: f32::from(self.zeros[at]) };
            out.iter_mut().zip(codes).for_each(|(out, &code)| *out = grid.value(f32::from(code)));
        }
    }

    /// `qweight` I32 `[k, n / 8]`, `qzeros` I32 `[k / group_size, n / 8]`, `scales` F16 `[k / group_size, n]`.
    pub(crate) fn tensors(&self, module: &str) -> Vec<Tensor> {
        let groups = self.k / self.group_size;
        let mut scales = Vec::with_capacity(2 * self.n * groups);
        for g in 0..groups {
            scales.extend((0..self.n).flat_map(|row| self.scales[row * groups + g].to_le_bytes()));
        }
        let packed = |rows: usize, values: &[u8]| pack(values, self.n, rows);
        let name = |kind: &str| format!("{module}.{kind}");
        vec![
            Tensor::new(name("qweight"), Dtype::I32, &[self.k, self.n / 8], packed(self.k, &self.codes)),
            Tensor::new(name("qzeros"), Dtype::I32, &[groups, self.n / 8], packed(groups, &self.zeros)),
            Tensor::new(name("scales"), Dtype::F16, &[groups, self.n], scales),
        ]
    }
}

/// Nibbles `[n, columns]` -> words `[columns, n / 8]`, interleaved along `n`.
fn pack(values: &[u8], n: usize, columns: usize) -> Vec<u8> {
    let mut bytes = vec![0; columns * n / 2];
    bytes.par_chunks_mut(n / 2).enumerate().for_each(|(column, bytes)| {
        for (word, bytes) in bytes.chunks_exact_mut(4).enumerate() {
            let nibble = |i: usize| u32::from(values[(8 * word + ORDER[i]) * columns + column]) << (4 * i);
            bytes.copy_from_slice(&(0..8).map(nibble).fold(0, |word, nibble| word | nibble).to_le_bytes());
        }
    });
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_by_hand() {
        // Range -2 to 5.5: scale 0.5, zero 4.
        let group = [-2.0, 5.5, 0.0, 0.24, 0.26, -0.76, 1.0, 3.1];
        let grid = Grid::of(&group, f32::INFINITY);
        assert_eq!((grid.scale, grid.zero), (0.5, 4.0));
        let codes: Vec<f32> = group.iter().map(|&value| grid.code(value)).collect();
        assert_eq!(codes, [0.0, 15.0, 4.0, 4.0, 5.0, 2.0, 6.0, 10.0]);
        let mut out = [0.0; 8];
        round_group(&group, 4.0, &mut out);
        // Cut at 4: range -2 to 4 in steps of 0.4 (as half precision), and 5.5 is what 4 is.
        assert!((out[1] - 4.0).abs() < 2e-3 && (out[0] + 2.0).abs() < 2e-3, "{out:?}");
    }

    #[test]
    fn one_sided_and_empty_groups_hold_zero() {
        let positive = Grid::of(&[3.0, 7.5], f32::INFINITY);
        assert_eq!((positive.zero, positive.value(positive.code(7.5))), (0.0, 7.5));
        let negative = Grid::of(&[-3.0, -7.5], f32::INFINITY);
        assert_eq!((negative.zero, negative.value(negative.code(-7.5))), (15.0, -7.5));
        for tiny in [0.0, 1e-9] {
            let grid = Grid::of(&[tiny, -tiny], f32::INFINITY);
            assert_eq!(grid.value(grid.code(tiny)), 0.0);
        }
    }

    #[test]
    fn words_are_interleaved() {
        // One input, eight outputs with codes 0 to 7: nibble i is output ORDER[i].
        let bytes = pack(&[0, 1, 2, 3, 4, 5, 6, 7], 8, 1);
        assert_eq!(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]), 0x7531_6420);
    }
}
