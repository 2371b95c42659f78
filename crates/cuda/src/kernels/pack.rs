//! The packed layout of weights, made on the host: the definition of the layout, which the kernels of
//! `kernels/repack.cu` are tested against. `kernels/decode_linear.cuh`, `kernels/int4.cuh` and `kernels/nvfp4.cuh` say
//! what the words of 4-bit weights mean, `docs/kernels/weights.md` all schemes.

use half::{bf16, f16};
use spark_backend::{Dtype, LinearWeight, Matrix, MatrixData};

use crate::{Error, Result};

const OP: &str = "packed weight";
/// Rows of a tile, and rows that a block of threads computes.
pub(super) const TILE_ROWS: usize = 16;
pub(super) const BLOCK_ROWS: usize = 32;
/// Inputs of a tile of 4-bit codes, and of a tile of 8 or 16 bits.
const TILE_K: usize = 64;
const WIDE_TILE_K: usize = 32;
/// Inputs that a warp takes at a time.
const SPAN_K: usize = 128;
const NUM_LANES: usize = 32;
/// Inputs of a lane in one go: they lie side by side.
pub(super) const RUN: usize = 8;
/// The lowest bits of a scale word, which hold the zero point.
const ZERO_BITS: u32 = 31;
/// The highest zero point that they hold.
pub(super) const MAX_ZERO: u8 = ZERO_BITS as u8;
/// Inputs that share a scale of NVFP4.
pub(super) const NVFP4_GROUP: usize = 16;
/// What the NVFP4 kernel's weights are multiplied with at the end: they are computed as 2^-8 of their value.
pub(super) const NVFP4_FACTOR: f32 = 256.0;
/// Zero point of symmetric weights.
const SYMMETRIC_ZERO: u8 = 8;
/// Inputs that share a packed scale of FP8.
pub(super) const FP8_BLOCK: usize = 128;

/// How codes become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// bfloat16 values.
    Bf16,
    /// E4M3 values with a float32 scale per row and 128 inputs.
    Fp8,
    /// Integers with scale and zero point per group.
    Int4 {
        /// 32, 64 or 128.
        group_size: usize,
    },
    /// E2M1 with an E4M3 scale per 16.
    Nvfp4,
}

impl Scheme {
    /// Bits of a code.
    pub(super) fn bits(self) -> usize {
        match self {
            Self::Bf16 => 16,
            Self::Fp8 => 8,
            Self::Int4 { .. } | Self::Nvfp4 => 4,
        }
    }

    /// Inputs that share a word of scales, `None` where there are no scales.
    pub(super) fn k_per_word(self) -> Option<usize> {
        match self {
            Self::Bf16 => None,
            Self::Fp8 => Some(FP8_BLOCK),
            Self::Int4 { group_size } => Some(group_size),
            Self::Nvfp4 => Some(4 * NVFP4_GROUP),
        }
    }

    /// Scheme of a part whose buffers have the sizes of its shape `[n, k]` and whose numbers fit the packed layout.
    pub(super) fn of(part: &Matrix, k: usize) -> Result<Self> {
        // Codes, scales (in bytes; of FP8 in values), zero points: expected and there.
        let bytes = |per_row: Option<usize>| per_row.and_then(|per_row| part.n.checked_mul(per_row));
        let groups = |size: usize| bytes(Some(k.div_ceil(size)));
        let (scheme, expected, got) = match &part.data {
            MatrixData::Dense { dtype, values } => (
                Self::Bf16,
                [bytes(k.checked_mul(dtype.size())), None, None],
                [Some(values.len()), None, None],
            ),
            MatrixData::Fp8 { values, scales, block } => {
                if block.contains(&0) || !(block[1].is_multiple_of(FP8_BLOCK) || block[1] >= k) {
                    let rule = format!("FP8 blocks of a multiple of {FP8_BLOCK} inputs, or of all");
                    return Err(Error::shape(OP, rule, block));
                }
                let num_scales = part.n.div_ceil(block[0]).checked_mul(k.div_ceil(block[1]));
                (
                    Self::Fp8,
                    [bytes(Some(k)), num_scales, None],
                    [Some(values.len()), Some(scales.len()), None],
                )
            }
            MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
                if ![32, 64, 128].contains(group_size) {
                    return Err(Error::shape(OP, "a group size of 32, 64 or 128", group_size));
                }
                // The largest of all, not the first that is too large: that is a loop over many at a time.
                let zero = zeros.as_ref().map_or(0, |zeros| zeros.iter().fold(0, |max, &zero| max.max(zero)));
                if zero > MAX_ZERO {
                    return Err(Error::shape(OP, format!("zero points of at most {MAX_ZERO}"), zero));
                }
                let groups = groups(*group_size);
                let num_scales = groups.and_then(|groups| groups.checked_mul(scale_dtype.size()));
                let num_zeros = zeros.as_ref().map_or(groups, |zeros| Some(zeros.len()));
                let scheme = Self::Int4 { group_size: *group_size };
                let expected = [bytes(Some(k / 2)), num_scales, groups];
                (scheme, expected, [Some(codes.len()), Some(scales.len()), num_zeros])
            }
            MatrixData::Nvfp4 { codes, scales, .. } => {
                let expected = [bytes(Some(k / 2)), groups(NVFP4_GROUP), None];
                (Self::Nvfp4, expected, [Some(codes.len()), Some(scales.len()), None])
            }
        };
        if part.k != k || expected != got || expected[0].is_none() {
            let expected = format!("k {k}, codes, scales and zeros of {expected:?} bytes");
            return Err(Error::shape(OP, expected, (part.k, got)));
        }
        Ok(scheme)
    }
}

/// What packed weights are, without their numbers: a matrix, or several of the same shape one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// How many matrices.
    pub(super) count: usize,
    /// Output features.
    pub(super) n: usize,
    /// Input features.
    pub(super) k: usize,
    pub(super) scheme: Scheme,
    pub(super) has_bias: bool,
}

impl Layout {
    /// Output features with padding.
    pub(super) fn rows(&self) -> usize {
        padded_n(self.n)
    }

    /// Input features with padding.
    pub(super) fn columns(&self) -> usize {
        padded_k(self.k)
    }

    /// Words of codes of one matrix.
    pub(super) fn code_words(&self) -> usize {
        self.rows() * self.columns() * self.scheme.bits() / 32
    }

    /// Words of scales of a row.
    pub(super) fn scale_words_per_row(&self) -> usize {
        self.scheme.k_per_word().map_or(0, |k| self.columns() / k)
    }

    /// Words of scales of one matrix.
    pub(super) fn scale_words(&self) -> usize {
        self.rows() * self.scale_words_per_row()
    }

    /// Row scales of one matrix.
    pub(super) fn row_scales(&self) -> usize {
        if self.scheme == Scheme::Nvfp4 { self.n } else { 0 }
    }

    /// Bytes of all codes, scales, row scales and biases: what lies on the device, before alignment.
    pub(super) fn num_bytes(&self) -> [u64; 4] {
        let bias = if self.has_bias { self.n } else { 0 };
        [self.code_words(), self.scale_words(), self.row_scales(), bias]
            .map(|words| 4 * words as u64 * self.count as u64)
    }

    /// Words of a run of [`RUN`] inputs: where the first is and how many they are.
    fn run(&self, row: usize, k: usize) -> (usize, usize) {
        let (tile_row, in_tile) = (row / TILE_ROWS, row % TILE_ROWS);
        // Lane 4 g + t has rows g and g + 8, and of 32 inputs those from 8 t on.
        let (lane, half) = (in_tile % 8 * 4 + k % 32 / RUN, in_tile / 8);
        let tile = |tile_k: usize| (tile_row * (self.columns() / tile_k) + k / tile_k) * NUM_LANES;
        match self.scheme.bits() {
            // Both rows of the first 32 inputs, then of the last.
            4 => ((tile(TILE_K) + lane) * 4 + half + 2 * (k % TILE_K / 32), 1),
            8 => ((tile(WIDE_TILE_K) + lane) * 4 + 2 * half, 2),
            // All lanes' runs of the upper rows, then of the lower ones.
            _ => ((2 * tile(WIDE_TILE_K) + NUM_LANES * half + lane) * 4, 4),
        }
    }

    /// Where the scales of word `word` of a row are.
    fn scale_index(&self, row: usize, word: usize) -> usize {
        (row / TILE_ROWS * self.scale_words_per_row() + word) * TILE_ROWS + row % TILE_ROWS
    }
}

/// Weights in the device's layout, still on the host: a matrix, or several of the same shape one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedHost {
    pub(super) layout: Layout,
    /// 4 bits: `[n / 16, k / 64, 32 lanes, 4]`; 8 bits: `[n / 16, k / 32, 32 lanes, 4]`; 16 bits:
    /// `[n / 16, k / 32, 2 rows, 32 lanes, 4]`, padded.
    pub(super) codes: Vec<u32>,
    /// `[n / 16, k / k_per_word, 16]`, padded; of FP8 the bits of float32 numbers.
    pub(super) scales: Vec<u32>,
    /// NVFP4: `[n]`, else empty.
    pub(super) row_scales: Vec<f32>,
    /// `[n]` or empty.
    pub(super) bias: Vec<f32>,
}

/// Output features with padding.
pub(super) fn padded_n(n: usize) -> usize {
    n.next_multiple_of(BLOCK_ROWS)
}

/// Input features with padding.
pub(super) fn padded_k(k: usize) -> usize {
    k.next_multiple_of(SPAN_K)
}

/// The layouts of a linear layer, one for each run of neighbouring parts of one scheme, with the parts of each.
///
/// # Errors
/// [`Error::Shape`] for what the packed layout does not take.
pub(super) fn layouts(weight: &LinearWeight) -> Result<Vec<(Layout, &[Matrix])>> {
    let (n, k) = (weight.n(), weight.k());
    let is_dense = weight.parts.iter().all(|part| matches!(part.data, MatrixData::Dense { .. }));
    let multiple = if is_dense { 8 } else { NVFP4_GROUP };
    if n == 0 || k == 0 || !k.is_multiple_of(multiple) {
        return Err(Error::shape(OP, format!("n above 0, k a multiple of {multiple} above 0"), (n, k)));
    }
    if weight.bias.as_ref().is_some_and(|bias| bias.len() != n) {
        return Err(Error::shape(OP, format!("a bias of {n}"), weight.bias.as_ref().map(Vec::len)));
    }
    let schemes = weight.parts.iter().map(|part| Scheme::of(part, k)).collect::<Result<Vec<_>>>()?;
    let mut found = Vec::new();
    let mut first = 0;
    for run in schemes.chunk_by(|a, b| a == b) {
        let parts = &weight.parts[first..first + run.len()];
        first += run.len();
        let n = parts.iter().map(|part| part.n).sum();
        found.push((Layout { count: 1, n, k, scheme: run[0], has_bias: weight.bias.is_some() }, parts));
    }
    Ok(found)
}

impl PackedHost {
    /// Packs a linear layer: one for each run of neighbouring parts of one scheme (4-bit integers of one group size 32, 64 or
    /// 128; NVFP4; FP8; dense), in output order. `k` is a multiple of 16, of a dense layer of 8.
    ///
    /// # Errors
    /// [`Error::Shape`] for any other layer.
    pub fn pack_parts(weight: &LinearWeight) -> Result<Vec<Self>> {
        let mut first = 0;
        let pack = |(layout, parts): (Layout, &[Matrix])| {
            let bias = weight.bias.as_ref().map_or(Vec::new(), |bias| bias[first..first + layout.n].to_vec());
            first += layout.n;
            let mut packed = Self {
                layout,
                codes: vec![0; layout.code_words()],
                scales: vec![0; layout.scale_words()],
                row_scales: Vec::new(),
                bias,
            };
            let rows = parts.iter().flat_map(|part| (0..part.n).map(move |row| (part, row)));
            rows.enumerate().for_each(|(row, (part, part_row))| packed.put_row(row, part, part_row));
            packed
        };
        Ok(layouts(weight)?.into_iter().map(pack).collect())
    }

    /// Packs a layer that has one scheme.
    ///
    /// # Errors
    /// [`Error::Shape`] as for [`pack_parts`](Self::pack_parts), and for several schemes.
    pub fn pack(weight: &LinearWeight) -> Result<Self> {
        let mut all = Self::pack_parts(weight)?;
        match (all.pop(), all.len()) {
            (Some(one), 0) => Ok(one),
            _ => Err(Error::shape(OP, "one scheme for all parts", "several")),
        }
    }

    /// Matrices of one shape and scheme, without bias, one after the other.
    ///
    /// # Errors
    /// [`Error::Shape`] when they differ, or when there is none.
    pub(super) fn stack(matrices: impl IntoIterator<Item = Self>) -> Result<Self> {
        let mut matrices = matrices.into_iter();
        let mut all = matrices.next().ok_or_else(|| Error::shape(OP, "at least one expert", "none"))?;
        let want = Layout { has_bias: false, ..all.layout };
        let alike = |packed: &Self| match packed.layout == want {
            true => Ok(()),
            false => Err(Error::shape(OP, format!("experts alike: {want:?}"), packed.layout)),
        };
        alike(&all)?;
        for matrix in matrices {
            alike(&matrix)?;
            all.layout.count += 1;
            all.codes.extend(matrix.codes);
            all.scales.extend(matrix.scales);
            all.row_scales.extend(matrix.row_scales);
        }
        Ok(all)
    }

    /// Puts row `part_row` of `part`, which is checked, into row `row`.
    fn put_row(&mut self, row: usize, part: &Matrix, part_row: usize) {
        let k = self.layout.k;
        match &part.data {
            MatrixData::Dense { dtype: Dtype::Bf16, values } => {
                self.put_codes(row, &values[2 * part_row * k..][..2 * k]);
            }
            MatrixData::Dense { dtype, values } => {
                let values = &values[part_row * k * dtype.size()..][..k * dtype.size()];
                let bits = |i| bf16::from_f32(element(values, i, *dtype)).to_bits().to_le_bytes();
                let values: Vec<u8> = (0..k).flat_map(bits).collect();
                self.put_codes(row, &values);
            }
            MatrixData::Fp8 { values, scales, block } => {
                self.put_codes(row, &values[part_row * k..][..k]);
                let scales = &scales[part_row / block[0] * k.div_ceil(block[1])..];
                for word in 0..self.layout.scale_words_per_row() {
                    let at = self.layout.scale_index(row, word);
                    self.scales[at] = scales[word * FP8_BLOCK / block[1]].to_bits();
                }
            }
            MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
                self.put_codes(row, &codes[part_row * k / 2..][..k / 2]);
                let num_groups = k.div_ceil(*group_size);
                for group in 0..num_groups {
                    let index = part_row * num_groups + group;
                    let zero = zeros.as_ref().map_or(SYMMETRIC_ZERO, |zeros| zeros[index]);
                    let at = self.layout.scale_index(row, group);
                    self.scales[at] = scale_word(element(scales, index, *scale_dtype), zero);
                }
            }
            MatrixData::Nvfp4 { codes, scales, alpha } => {
                self.put_codes(row, &codes[part_row * k / 2..][..k / 2]);
                let num_groups = k / NVFP4_GROUP;
                for (group, &scale) in scales[part_row * num_groups..][..num_groups].iter().enumerate() {
                    let at = self.layout.scale_index(row, group / 4);
                    self.scales[at] |= u32::from(scale) << (8 * (group % 4));
                }
                self.row_scales.push(alpha * NVFP4_FACTOR);
            }
        }
    }

    /// Puts the codes of a row. The even one of two 4-bit codes is the low nibble of a byte.
    fn put_codes(&mut self, row: usize, codes: &[u8]) {
        for (i, run) in codes.chunks_exact(self.layout.scheme.bits()).enumerate() {
            let (at, len) = self.layout.run(row, RUN * i);
            for (word, bytes) in self.codes[at..at + len].iter_mut().zip(run.chunks_exact(4)) {
                let natural = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                *word = if self.layout.scheme.bits() == 4 { by_halves(natural) } else { natural };
            }
        }
    }

    /// The weights `[n, k]` that the kernel computes with.
    #[cfg(test)]
    fn dequantize(&self) -> Vec<f32> {
        let layout = self.layout;
        let scale_bits = |row: usize, k: usize| {
            layout
                .scheme
                .k_per_word()
                .map_or(0, |per_word| self.scales[layout.scale_index(row, k / per_word)])
        };
        let value = |row: usize, k: usize| {
            let (at, _) = layout.run(row, k / RUN * RUN);
            let bit = match layout.scheme.bits() {
                4 => 4 * (k % RUN / 2 + 4 * (k % 2)),
                bits => k % RUN * bits,
            };
            let code = self.codes[at + bit / 32] >> (bit % 32);
            let word = scale_bits(row, k);
            match layout.scheme {
                Scheme::Bf16 => f32::from_bits(code << 16),
                // As 2^-120 of its value; subnormal numbers work alike.
                Scheme::Fp8 => {
                    let value = f32::from_bits((code & 0x7f) << 20 | (code & 0x80) << 24) * 2f32.powi(120);
                    value * f32::from_bits(word)
                }
                Scheme::Int4 { .. } => {
                    ((code & 15) as f32 - (word & ZERO_BITS) as f32) * f32::from_bits(word & !ZERO_BITS)
                }
                Scheme::Nvfp4 => {
                    let scale = word >> (8 * (k % TILE_K / NVFP4_GROUP)) & 0x7f;
                    // As in the kernel: bits moved to where a float of the same value, but for a power of two, has them.
                    let scale = f32::from_bits(scale << 20) * 2f32.powi(120);
                    let code = f32::from_bits((code & 7) << 22 | (code & 8) << 28) * 2f32.powi(126);
                    // Scale times factor first, as the format defines it.
                    code * (scale * (self.row_scales[row] / NVFP4_FACTOR))
                }
            }
        };
        let all = (0..layout.n).flat_map(|row| (0..layout.k).map(move |k| (row, k)));
        all.map(|(row, k)| value(row, k)).collect()
    }
}

/// The eight codes of a word: the even ones to its lower half, the odd ones to the upper half, so that neighbours lie 16 bits apart.
pub(super) fn by_halves(natural: u32) -> u32 {
    let half = |bytes: u32| {
        let pairs = (bytes | bytes >> 4) & 0x00ff_00ff;
        (pairs | pairs >> 8) & 0xffff
    };
    half(natural & 0x0f0f_0f0f) | half(natural >> 4 & 0x0f0f_0f0f) << 16
}

/// The scale with the zero point (at most [`MAX_ZERO`]) in its lowest bits, which are zero for f16 and bf16 scales; an f32 scale
/// is rounded to 18 bits behind the point.
fn scale_word(scale: f32, zero: u8) -> u32 {
    let half = ZERO_BITS.div_ceil(2);
    (scale.to_bits().saturating_add(half) & !ZERO_BITS) | (u32::from(zero) & ZERO_BITS)
}

fn element(values: &[u8], index: usize, dtype: Dtype) -> f32 {
    let at = index * dtype.size();
    match dtype {
        Dtype::F16 => f16::from_le_bytes([values[at], values[at + 1]]).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes([values[at], values[at + 1]]).to_f32(),
        Dtype::F32 => f32::from_le_bytes([values[at], values[at + 1], values[at + 2], values[at + 3]]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::matrix_of;
    use super::*;
    use spark_backend::Bytes;
    use spark_testing::Random;

    fn matrix(random: &mut Random, shape: [usize; 2], group_size: usize, scale_dtype: Dtype) -> Matrix {
        let zeros = (scale_dtype != Dtype::Bf16).then(Bytes::new);
        let empty =
            MatrixData::Int4 { codes: Bytes::new(), zeros, scales: Bytes::new(), scale_dtype, group_size };
        matrix_of(random, shape, &empty)
    }

    #[test]
    fn packing_keeps_every_weight() {
        let mut random = Random::new(3);
        for (shape, group, dtype) in [
            ([16, 64], 64, Dtype::F16),
            ([1, 16], 32, Dtype::F16),
            ([33, 208], 128, Dtype::Bf16),
            ([48, 96], 32, Dtype::F16),
        ] {
            let parts =
                vec![matrix(&mut random, shape, group, dtype), matrix(&mut random, shape, group, dtype)];
            let want: Vec<f32> = parts.iter().flat_map(|part| spark_cpu::dequantize(part).unwrap()).collect();
            let packed = PackedHost::pack(&LinearWeight { parts, bias: None }).unwrap();
            assert_eq!(packed.dequantize(), want, "{shape:?}");
        }
    }

    #[test]
    fn packing_keeps_every_weight_of_the_other_schemes() {
        let mut random = Random::new(6);
        for [n, k] in [[16, 64], [1, 16], [33, 208], [40, 384]] {
            let dense = |dtype| MatrixData::Dense { dtype, values: Bytes::new() };
            let fp8 = |block| MatrixData::Fp8 { values: Bytes::new(), scales: Vec::new(), block };
            let nvfp4 = MatrixData::Nvfp4 { codes: Bytes::new(), scales: Bytes::new(), alpha: 0.0 };
            let forms =
                [nvfp4, fp8([1, k]), fp8([n, k]), fp8([128, 128]), fp8([24, 256]), dense(Dtype::Bf16)];
            for form in &forms {
                let parts = vec![matrix_of(&mut random, [n, k], form), matrix_of(&mut random, [n, k], form)];
                let want: Vec<f32> =
                    parts.iter().flat_map(|part| spark_cpu::dequantize(part).unwrap()).collect();
                let packed = PackedHost::pack(&LinearWeight { parts, bias: None }).unwrap();
                assert_eq!(packed.dequantize(), want, "{n} x {k} {form:?}");
            }
            for dtype in [Dtype::F16, Dtype::F32] {
                let part = matrix_of(&mut random, [n, k], &dense(dtype));
                let want = spark_cpu::dequantize(&part).unwrap();
                let want: Vec<f32> = want.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect();
                let packed = PackedHost::pack(&LinearWeight { parts: vec![part], bias: None }).unwrap();
                assert_eq!(packed.dequantize(), want, "{n} x {k} {dtype:?}");
            }
        }
    }

    #[test]
    fn schemes_side_by_side_are_parts_of_their_own() {
        let mut random = Random::new(8);
        let dense = MatrixData::Dense { dtype: Dtype::Bf16, values: Bytes::new() };
        let other = MatrixData::Dense { dtype: Dtype::F32, values: Bytes::new() };
        let fp8 = MatrixData::Fp8 { values: Bytes::new(), scales: Vec::new(), block: [128, 128] };
        let parts = [(3, &dense), (5, &other), (40, &fp8), (2, &dense)];
        let parts = parts.map(|(n, form)| matrix_of(&mut random, [n, 32], form)).to_vec();
        let want: Vec<f32> = parts.iter().flat_map(|part| spark_cpu::dequantize(part).unwrap()).collect();
        let bias: Vec<f32> = (0..50).map(|i| i as f32).collect();
        let layer = LinearWeight { parts, bias: Some(bias.clone()) };
        let packed = PackedHost::pack_parts(&layer).unwrap();
        let shapes: Vec<_> = packed.iter().map(|part| (part.layout.scheme, part.layout.n)).collect();
        assert_eq!(shapes, [(Scheme::Bf16, 8), (Scheme::Fp8, 40), (Scheme::Bf16, 2)]);
        assert_eq!(packed.iter().flat_map(|part| part.bias.clone()).collect::<Vec<_>>(), bias);
        let got: Vec<f32> = packed.iter().flat_map(PackedHost::dequantize).collect();
        let rounded: Vec<f32> = want.iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
        assert_eq!((&got[8 * 32..48 * 32], &got[..8 * 32]), (&want[8 * 32..48 * 32], &rounded[..8 * 32]));
        assert!(PackedHost::pack(&layer).is_err());
    }

    #[test]
    fn experts_are_alike() {
        let mut random = Random::new(7);
        let mut pack = |n, bias| {
            let parts = vec![matrix(&mut random, [n, 64], 64, Dtype::F16)];
            PackedHost::pack(&LinearWeight { parts, bias }).unwrap()
        };
        let (a, b, other, biased) =
            (pack(16, None), pack(16, None), pack(32, None), pack(16, Some(vec![0.0; 16])));
        let both = PackedHost::stack([a.clone(), b.clone()]).unwrap();
        assert_eq!((both.layout.count, both.codes.len()), (2, 2 * a.codes.len()));
        assert_eq!(both.codes[a.codes.len()..], b.codes);
        assert!(PackedHost::stack([a.clone(), other]).is_err());
        assert!(PackedHost::stack([a, biased.clone()]).is_err());
        assert!(PackedHost::stack([biased]).is_err() && PackedHost::stack([]).is_err());
    }

    #[test]
    fn f32_scales_keep_eighteen_bits() {
        let mut random = Random::new(4);
        for _ in 0..1000 {
            let (scale, zero) = (random.uniform(1e-6, 1.0), random.below(16) as u8);
            let word = scale_word(scale, zero);
            let got = f32::from_bits(word & !ZERO_BITS);
            assert!((got / scale - 1.0).abs() <= 2f32.powi(-19) && word & ZERO_BITS == u32::from(zero));
        }
        assert_eq!(scale_word(0.5, 15), 0.5f32.to_bits() | 15);
    }

    /// One word by hand: row 9, inputs 40 to 47 are lane 4 * 1 + 1, word 1 + 2 of the tile.
    #[test]
    fn a_word_lies_where_the_kernel_reads_it() {
        let mut codes = vec![0u8; 16 * 32];
        codes[9 * 32 + 20..][..4].copy_from_slice(&[0x21, 0x43, 0x65, 0x87]);
        let scales: Vec<u8> = (0..16).flat_map(|_| f16::ONE.to_le_bytes()).collect();
        let data = MatrixData::Int4 {
            codes: codes.into(),
            zeros: None,
            scales: scales.into(),
            scale_dtype: Dtype::F16,
            group_size: 64,
        };
        let parts = vec![Matrix { n: 16, k: 64, data }];
        let packed = PackedHost::pack(&LinearWeight { parts, bias: None }).unwrap();
        let words: Vec<usize> = (0..packed.codes.len()).filter(|&i| packed.codes[i] != 0).collect();
        assert_eq!((words.as_slice(), packed.codes[5 * 4 + 3]), (&[5 * 4 + 3][..], 0x8642_7531));
    }

    #[test]
    fn other_layers_are_refused() {
        let mut random = Random::new(5);
        let pack = |parts: Vec<Matrix>| PackedHost::pack(&LinearWeight { parts, bias: None });
        assert!(pack(Vec::new()).is_err());
        let odd = matrix(&mut random, [16, 256], 256, Dtype::F16);
        assert!(pack(vec![odd]).unwrap_err().to_string().contains("group size of 32, 64 or 128, got 256"));
        let (a, b) =
            (matrix(&mut random, [16, 128], 64, Dtype::F16), matrix(&mut random, [16, 128], 128, Dtype::F16));
        assert!(pack(vec![a.clone(), b]).is_err());
        let mut short = a.clone();
        if let MatrixData::Int4 { codes, .. } = &mut short.data {
            *codes = Bytes::from_static(&[0]);
        }
        assert!(pack(vec![short]).is_err());
        assert!(PackedHost::pack(&LinearWeight { parts: vec![a.clone()], bias: Some(vec![0.0]) }).is_err());
        let nvfp4 =
            MatrixData::Nvfp4 { codes: vec![0; 1024].into(), scales: vec![0; 128].into(), alpha: 1.0 };
        let error = pack(vec![a.clone(), Matrix { n: 16, k: 128, data: nvfp4 }]).unwrap_err().to_string();
        assert!(error.contains("one scheme for all parts"), "{error}");
        for (block, is_taken) in [([1, 128], true), ([1, 64], false), ([1, 0], false), ([7, 1000], true)] {
            let fp8 = MatrixData::Fp8 { values: Bytes::new(), scales: Vec::new(), block };
            let part = Matrix { n: 16, k: 256, data: fp8 };
            let fp8 = match block.contains(&0) {
                true => part,
                false => matrix_of(&mut random, [16, 256], &part.data),
            };
            assert_eq!(pack(vec![fp8]).is_ok(), is_taken, "{block:?}");
        }
        for (zero, is_taken) in [(MAX_ZERO, true), (MAX_ZERO + 1, false)] {
            let mut part = a.clone();
            if let MatrixData::Int4 { zeros, .. } = &mut part.data {
                *zeros = Some([vec![8; 31], vec![zero]].concat().into());
            }
            assert_eq!(pack(vec![part]).is_ok(), is_taken, "{zero}");
        }
        let narrow = matrix(&mut random, [16, 8], 32, Dtype::F16);
        assert!(pack(vec![narrow]).is_err());
    }
}
