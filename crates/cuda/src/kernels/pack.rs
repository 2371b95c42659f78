//! The packed layout of 4-bit weights, made on the host. `kernels/decode_linear.cuh`, `kernels/int4.cuh` and
//! `kernels/nvfp4.cuh` say what the words mean.

use half::{bf16, f16};
use spark_backend::{Dtype, LinearWeight, Matrix, MatrixData};

use crate::{Error, Result};

const OP: &str = "4-bit weight";
/// Rows of a tile, and rows that a block of threads computes.
const TILE_ROWS: usize = 16;
const BLOCK_ROWS: usize = 32;
/// Inputs of a tile, and inputs that a warp takes at a time.
const TILE_K: usize = 64;
const SPAN_K: usize = 128;
const NUM_LANES: usize = 32;
/// The lowest bits of a scale word, which hold the zero point.
const ZERO_BITS: u32 = 31;
/// The highest zero point that they hold.
const MAX_ZERO: u8 = ZERO_BITS as u8;
/// Inputs that share a scale of NVFP4, and scales in a word.
const NVFP4_GROUP: usize = 16;
/// What the NVFP4 kernel's weights are multiplied with at the end: they are computed as 2^-8 of their value.
const NVFP4_FACTOR: f32 = 256.0;
/// Zero point of symmetric weights.
const SYMMETRIC_ZERO: u8 = 8;

/// How codes become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Integers with scale and zero point per group.
    Int4 {
        /// 32, 64 or 128.
        group_size: usize,
    },
    /// E2M1 with an E4M3 scale per 16.
    Nvfp4,
}

impl Scheme {
    /// Inputs that share a word of scales.
    fn k_per_word(self) -> usize {
        match self {
            Self::Int4 { group_size } => group_size,
            Self::Nvfp4 => 4 * NVFP4_GROUP,
        }
    }
}

/// Weights in the device's layout, still on the host: a matrix, or several of the same shape one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedHost {
    /// How many matrices.
    pub(super) count: usize,
    /// `[n / 16, k / 64, 32 lanes, 4]`, padded.
    pub(super) codes: Vec<u32>,
    /// `[n / 16, k / k_per_word, 16]`, padded.
    pub(super) scales: Vec<u32>,
    /// NVFP4: `[n]`, else empty.
    pub(super) row_scales: Vec<f32>,
    /// `[n]` or empty.
    pub(super) bias: Vec<f32>,
    /// Output features.
    pub(super) n: usize,
    /// Input features.
    pub(super) k: usize,
    pub(super) scheme: Scheme,
}

/// Output features with padding.
pub(super) fn padded_n(n: usize) -> usize {
    n.next_multiple_of(BLOCK_ROWS)
}

/// Input features with padding.
pub(super) fn padded_k(k: usize) -> usize {
    k.next_multiple_of(SPAN_K)
}

impl PackedHost {
    /// Packs a linear layer whose parts all are 4-bit integers with one group size (32, 64 or 128), or all NVFP4; `k` a
    /// multiple of 16.
    ///
    /// # Errors
    /// [`Error::Shape`] for any other layer.
    pub fn pack(weight: &LinearWeight) -> Result<Self> {
        let (n, k) = (weight.n(), weight.k());
        let first = weight.parts.first().ok_or_else(|| Error::shape(OP, "at least one part", "none"))?;
        let scheme = checked_scheme(first, k)?;
        if n == 0 || k == 0 || !k.is_multiple_of(16) {
            return Err(Error::shape(OP, "n above 0, k a multiple of 16 above 0", (n, k)));
        }
        if weight.bias.as_ref().is_some_and(|bias| bias.len() != n) {
            return Err(Error::shape(OP, format!("a bias of {n}"), weight.bias.as_ref().map(Vec::len)));
        }
        let (rows, columns) = (padded_n(n), padded_k(k));
        let mut packed = Self {
            count: 1,
            codes: vec![0; rows * columns / 8],
            scales: vec![0; rows * columns / scheme.k_per_word()],
            row_scales: Vec::new(),
            bias: weight.bias.clone().unwrap_or_default(),
            n,
            k,
            scheme,
        };
        let mut row = 0;
        for part in &weight.parts {
            let part_scheme = checked_scheme(part, k)?;
            if part_scheme != scheme {
                return Err(Error::shape(OP, format!("one scheme for all parts, {scheme:?}"), part_scheme));
            }
            for part_row in 0..part.n {
                packed.put_row(row, part, part_row);
                row += 1;
            }
        }
        Ok(packed)
    }

    /// Matrices of one shape and scheme, without bias, one after the other.
    ///
    /// # Errors
    /// [`Error::Shape`] when they differ, or when there is none.
    pub(super) fn stack(matrices: impl IntoIterator<Item = Self>) -> Result<Self> {
        let mut matrices = matrices.into_iter();
        let mut all = matrices.next().ok_or_else(|| Error::shape(OP, "at least one expert", "none"))?;
        let shape = |packed: &Self| (packed.n, packed.k, packed.scheme, packed.bias.len());
        let want = (all.n, all.k, all.scheme, 0);
        if shape(&all) != want {
            return Err(Error::shape(OP, format!("experts alike without bias: {want:?}"), shape(&all)));
        }
        for matrix in matrices {
            if shape(&matrix) != want {
                return Err(Error::shape(
                    OP,
                    format!("experts alike without bias: {want:?}"),
                    shape(&matrix),
                ));
            }
            all.count += matrix.count;
            all.codes.extend(matrix.codes);
            all.scales.extend(matrix.scales);
            all.row_scales.extend(matrix.row_scales);
        }
        Ok(all)
    }

    /// Puts row `part_row` of `part`, which is checked, into row `row`.
    fn put_row(&mut self, row: usize, part: &Matrix, part_row: usize) {
        match &part.data {
            MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
                self.put_codes(row, &codes[part_row * self.k / 2..][..self.k / 2]);
                let num_groups = self.k.div_ceil(*group_size);
                for group in 0..num_groups {
                    let index = part_row * num_groups + group;
                    let zero = zeros.as_ref().map_or(SYMMETRIC_ZERO, |zeros| zeros[index]);
                    let at = self.scale_index(row, group);
                    self.scales[at] = scale_word(scale(scales, index, *scale_dtype), zero);
                }
            }
            MatrixData::Nvfp4 { codes, scales, alpha } => {
                self.put_codes(row, &codes[part_row * self.k / 2..][..self.k / 2]);
                let num_groups = self.k / NVFP4_GROUP;
                for (group, &scale) in scales[part_row * num_groups..][..num_groups].iter().enumerate() {
                    let at = self.scale_index(row, group / 4);
                    self.scales[at] |= u32::from(scale) << (8 * (group % 4));
                }
                self.row_scales.push(alpha * NVFP4_FACTOR);
            }
            MatrixData::Dense { .. } | MatrixData::Fp8 { .. } => {}
        }
    }

    /// Puts the codes of a row, `[k / 2]` bytes.
    fn put_codes(&mut self, row: usize, codes: &[u8]) {
        let (tile, in_tile) = (row / TILE_ROWS, row % TILE_ROWS);
        let columns = padded_k(self.k);
        for (i, word) in codes.chunks_exact(4).enumerate() {
            let k = 8 * i;
            // Lane 4 g + t has rows g and g + 8; its words: both rows of the first 32 inputs, then of the last.
            let lane = in_tile % 8 * 4 + k % 32 / 8;
            let place = in_tile / 8 + 2 * (k % TILE_K / 32);
            let at = ((tile * (columns / TILE_K) + k / TILE_K) * NUM_LANES + lane) * 4 + place;
            // The even column is the low nibble, so column k + j is nibble j.
            self.codes[at] = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        }
    }

    /// Where the scales of word `word` of a row are.
    fn scale_index(&self, row: usize, word: usize) -> usize {
        let words = padded_k(self.k) / self.scheme.k_per_word();
        (row / TILE_ROWS * words + word) * TILE_ROWS + row % TILE_ROWS
    }

    /// The weights `[n, k]` that the kernel computes with.
    #[cfg(test)]
    fn dequantize(&self) -> Vec<f32> {
        let columns = padded_k(self.k);
        let value = |row: usize, k: usize| {
            let (tile, in_tile) = (row / TILE_ROWS, row % TILE_ROWS);
            let lane = in_tile % 8 * 4 + k % 32 / 8;
            let place = in_tile / 8 + 2 * (k % TILE_K / 32);
            let word = self.codes[((tile * (columns / TILE_K) + k / TILE_K) * NUM_LANES + lane) * 4 + place];
            let code = word >> (4 * (k % 8)) & 15;
            let word = self.scales[self.scale_index(row, k / self.scheme.k_per_word())];
            match self.scheme {
                Scheme::Int4 { .. } => {
                    (code as f32 - (word & ZERO_BITS) as f32) * f32::from_bits(word & !ZERO_BITS)
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
        (0..self.n).flat_map(|row| (0..self.k).map(move |k| (row, k))).map(|(row, k)| value(row, k)).collect()
    }
}

/// The scale with the zero point (at most [`MAX_ZERO`]) in its lowest bits, which are zero for f16 and bf16 scales; an f32 scale
/// is rounded to 18 bits behind the point.
fn scale_word(scale: f32, zero: u8) -> u32 {
    let half = ZERO_BITS.div_ceil(2);
    (scale.to_bits().saturating_add(half) & !ZERO_BITS) | (u32::from(zero) & ZERO_BITS)
}

fn scale(scales: &[u8], index: usize, dtype: Dtype) -> f32 {
    let at = index * dtype.size();
    match dtype {
        Dtype::F16 => f16::from_le_bytes([scales[at], scales[at + 1]]).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes([scales[at], scales[at + 1]]).to_f32(),
        Dtype::F32 => f32::from_le_bytes([scales[at], scales[at + 1], scales[at + 2], scales[at + 3]]),
    }
}

/// The scheme of a part whose buffers have the sizes of its shape and whose zero points fit a scale word.
fn checked_scheme(part: &Matrix, k: usize) -> Result<Scheme> {
    let num_codes = part.n.checked_mul(k).map(|size| size / 2);
    let (scheme, expected, got) = match &part.data {
        MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
            if ![32, 64, 128].contains(group_size) {
                return Err(Error::shape(OP, "a group size of 32, 64 or 128", group_size));
            }
            if let Some(&zero) = zeros.iter().flat_map(|zeros| zeros.iter()).find(|&&zero| zero > MAX_ZERO) {
                return Err(Error::shape(OP, format!("zero points of at most {MAX_ZERO}"), zero));
            }
            let groups = part.n.checked_mul(k.div_ceil(*group_size));
            let num_scales = groups.and_then(|groups| groups.checked_mul(scale_dtype.size()));
            let num_zeros = zeros.as_ref().map_or(groups, |zeros| Some(zeros.len()));
            let scheme = Scheme::Int4 { group_size: *group_size };
            (scheme, [num_codes, num_scales, groups], [Some(codes.len()), Some(scales.len()), num_zeros])
        }
        MatrixData::Nvfp4 { codes, scales, .. } => {
            let groups = part.n.checked_mul(k.div_ceil(NVFP4_GROUP));
            (Scheme::Nvfp4, [num_codes, groups, None], [Some(codes.len()), Some(scales.len()), None])
        }
        MatrixData::Dense { .. } | MatrixData::Fp8 { .. } => {
            return Err(Error::shape(OP, "4-bit integers or NVFP4", "another scheme"));
        }
    };
    if part.k != k || expected != got || num_codes.is_none() {
        let expected = format!("k {k}, codes, scales and zeros of {expected:?} bytes");
        return Err(Error::shape(OP, expected, (part.k, got)));
    }
    Ok(scheme)
}

#[cfg(test)]
mod tests {
    use super::*;
    use spark_backend::Bytes;
    use spark_testing::Random;

    fn matrix(random: &mut Random, [n, k]: [usize; 2], group_size: usize, dtype: Dtype) -> Matrix {
        let groups = n * k.div_ceil(group_size);
        let values: Vec<f32> = (0..groups).map(|_| random.uniform(0.002, 0.02)).collect();
        let scales: Vec<u8> = match dtype {
            Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let zeros: Vec<u8> = (0..groups).map(|_| random.below(16) as u8).collect();
        let data = MatrixData::Int4 {
            codes: random.bytes(n * k / 2).into(),
            zeros: (dtype != Dtype::Bf16).then(|| zeros.into()),
            scales: scales.into(),
            scale_dtype: dtype,
            group_size,
        };
        Matrix { n, k, data }
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
    fn packing_keeps_every_nvfp4_weight() {
        let mut random = Random::new(6);
        for [n, k] in [[16, 64], [1, 16], [33, 208]] {
            let mut part = |alpha| {
                // Scales without sign and NaN.
                let scales: Vec<u8> = random.bytes(n * k / 16).into_iter().map(|byte| byte % 127).collect();
                let data =
                    MatrixData::Nvfp4 { codes: random.bytes(n * k / 2).into(), scales: scales.into(), alpha };
                Matrix { n, k, data }
            };
            let parts = vec![part(0.01), part(0.37)];
            let want: Vec<f32> = parts.iter().flat_map(|part| spark_cpu::dequantize(part).unwrap()).collect();
            let packed = PackedHost::pack(&LinearWeight { parts, bias: None }).unwrap();
            assert_eq!(packed.dequantize(), want, "{n} x {k}");
        }
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
        assert_eq!((both.count, both.codes.len()), (2, 2 * a.codes.len()));
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
        assert_eq!((words.as_slice(), packed.codes[5 * 4 + 3]), (&[5 * 4 + 3][..], 0x8765_4321));
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
