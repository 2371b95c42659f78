//! Weights as they lie in memory (packed), their checks, and the dequantisation of one row. No products.

use crate::dtype::{E2M1_PAIRS, bf16_value, e4m3_value};
use half::f16;
use spark_backend::{Dtype, Error, LinearWeight, Matrix, MatrixData, Result};

/// A linear layer's weights: the parts stay packed and are dequantised row by row inside the product.
pub struct CpuLinear {
    parts: Vec<Matrix>,
    pub(crate) bias: Option<Vec<f32>>,
    /// Output features of all parts.
    pub(crate) n: usize,
    /// Input features.
    pub(crate) k: usize,
}

impl CpuLinear {
    /// Checks all sizes, so that later indexing cannot fail.
    pub(crate) fn new(weight: LinearWeight) -> Result<Self> {
        let (n, k) = (weight.n(), weight.k());
        if weight.parts.is_empty() {
            return Err(Error::shape("linear_weight", "at least one part", "none"));
        }
        for part in &weight.parts {
            if part.k != k {
                return Err(Error::shape("linear_weight", format!("parts with k {k}"), part.k));
            }
            check(part)?;
        }
        if let Some(bias) = &weight.bias
            && bias.len() != n
        {
            return Err(Error::shape("linear_weight bias", [n], [bias.len()]));
        }
        Ok(Self { parts: weight.parts, bias: weight.bias, n, k })
    }

    /// Whether all of it is NVFP4.
    pub(crate) fn is_nvfp4(&self) -> bool {
        self.parts.iter().all(|part| matches!(part.data, MatrixData::Nvfp4 { .. }))
    }

    /// Row `row` (`< n`) in float32 into `out`, `[k]`.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let mut first = 0;
        for part in &self.parts {
            if row < first + part.n {
                return dequantize_row(part, row - first, out);
            }
            first += part.n;
        }
    }
}

/// All values of a matrix, `[n, k]` row-major, in float32: the definition of every scheme, which tests of kernels and
/// loaders compare with.
///
/// # Errors
/// When a buffer of the matrix has the wrong size.
pub fn dequantize(matrix: &Matrix) -> Result<Vec<f32>> {
    check(matrix)?;
    let mut out = vec![0.0; matrix.n * matrix.k];
    if matrix.k > 0 {
        out.chunks_exact_mut(matrix.k).enumerate().for_each(|(row, out)| dequantize_row(matrix, row, out));
    }
    Ok(out)
}

fn expect(what: &'static str, want: usize, got: usize) -> Result<()> {
    if want == got { Ok(()) } else { Err(Error::shape(what, want, got)) }
}

/// Refuses a matrix whose buffers do not have the sizes that its scheme and shape ask for.
fn check(matrix: &Matrix) -> Result<()> {
    let (n, k) = (matrix.n, matrix.k);
    let even = |op| if k % 2 == 0 { Ok(()) } else { Err(Error::shape(op, "even k", k)) };
    match &matrix.data {
        MatrixData::Dense { dtype, values } => expect("dense bytes", n * k * dtype.size(), values.len()),
        MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
            even("int4")?;
            if *group_size == 0 || group_size % 2 != 0 {
                return Err(Error::shape("int4 group_size", "an even number above 0", group_size));
            }
            let groups = n * k.div_ceil(*group_size);
            expect("int4 codes", n * k / 2, codes.len())?;
            expect("int4 scale bytes", groups * scale_dtype.size(), scales.len())?;
            zeros.as_ref().map_or(Ok(()), |zeros| expect("int4 zeros", groups, zeros.len()))
        }
        MatrixData::Nvfp4 { codes, scales, .. } => {
            even("nvfp4")?;
            expect("nvfp4 codes", n * k / 2, codes.len())?;
            expect("nvfp4 scales", n * k.div_ceil(NVFP4_GROUP), scales.len())
        }
        MatrixData::Fp8 { values, scales, block } => {
            if block.contains(&0) {
                return Err(Error::shape("fp8 block", "sizes above 0", block));
            }
            expect("fp8 values", n * k, values.len())?;
            expect("fp8 scales", n.div_ceil(block[0]) * k.div_ceil(block[1]), scales.len())
        }
    }
}

/// Inputs that share an NVFP4 scale.
const NVFP4_GROUP: usize = 16;

#[inline(always)]
fn dequantize_row(matrix: &Matrix, row: usize, out: &mut [f32]) {
    let k = matrix.k;
    match &matrix.data {
        MatrixData::Dense { dtype, values } => {
            let size = dtype.size();
            dense_row(*dtype, &values[row * k * size..][..k * size], out);
        }
        MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
            let groups = k.div_ceil(*group_size);
            let codes = codes[row * k / 2..][..k / 2].chunks(group_size / 2);
            for (g, (codes, out)) in codes.zip(out.chunks_mut(*group_size)).enumerate() {
                let index = row * groups + g;
                let zero = zeros.as_ref().map_or(8, |zeros| i32::from(zeros[index]));
                int4_group(codes, zero, element(scales, index, *scale_dtype), out);
            }
        }
        MatrixData::Nvfp4 { codes, scales, alpha } => {
            let groups = k.div_ceil(NVFP4_GROUP);
            let codes = &codes[row * k / 2..][..k / 2];
            for (out, &byte) in out.chunks_exact_mut(2).zip(codes) {
                out.copy_from_slice(&E2M1_PAIRS[usize::from(byte)]);
            }
            // Scale times alpha first, then the product, as the formats define it. Groups are arrays, so that their
            // length is known; the last one may be short.
            let scales = &scales[row * groups..][..groups];
            let (whole, rest) = out.as_chunks_mut::<NVFP4_GROUP>();
            for (out, &scale) in whole.iter_mut().zip(scales) {
                let scale = e4m3_value(scale) * alpha;
                out.iter_mut().for_each(|value| *value *= scale);
            }
            let last = scales.last().map_or(0.0, |&scale| e4m3_value(scale) * alpha);
            rest.iter_mut().for_each(|value| *value *= last);
        }
        MatrixData::Fp8 { values, scales, block } => {
            let blocks = k.div_ceil(block[1]);
            let values = values[row * k..][..k].chunks(block[1]);
            let scales = &scales[row / block[0] * blocks..][..blocks];
            for ((values, &scale), out) in values.zip(scales).zip(out.chunks_mut(block[1])) {
                for (out, &value) in out.iter_mut().zip(values) {
                    *out = e4m3_value(value) * scale;
                }
            }
        }
    }
}

#[inline(always)]
fn dense_row(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Dtype::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Dtype::Bf16 => {
            for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = bf16_value(u16::from_le_bytes([b[0], b[1]]));
            }
        }
    }
}

/// Element `index` of a little-endian buffer.
#[inline(always)]
fn element(bytes: &[u8], index: usize, dtype: Dtype) -> f32 {
    let mut value = [0.0];
    dense_row(dtype, &bytes[index * dtype.size()..][..dtype.size()], &mut value);
    value[0]
}

#[inline(always)]
fn int4_group(codes: &[u8], zero: i32, scale: f32, out: &mut [f32]) {
    for (out, &byte) in out.chunks_exact_mut(2).zip(codes) {
        out[0] = (i32::from(byte & 15) - zero) as f32 * scale;
        out[1] = (i32::from(byte >> 4) - zero) as f32 * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spark_backend::Bytes;

    fn int4(zeros: Option<Vec<u8>>, scale_dtype: Dtype, scales: Vec<u8>) -> Matrix {
        // Two rows of eight columns: codes 0..7 and 15..8, groups of four.
        let codes = vec![0x10, 0x32, 0x54, 0x76, 0xef, 0xcd, 0xab, 0x89];
        let zeros = zeros.map(Bytes::from);
        let data = MatrixData::Int4 {
            codes: codes.into(),
            zeros,
            scales: scales.into(),
            scale_dtype,
            group_size: 4,
        };
        Matrix { n: 2, k: 8, data }
    }

    #[test]
    fn int4_by_hand() {
        let scales: Vec<u8> =
            [0.5f32, 2.0, 1.0, 0.25].iter().flat_map(|&s| f16::from_f32(s).to_le_bytes()).collect();
        let got = dequantize(&int4(Some(vec![1, 4, 15, 0]), Dtype::F16, scales.clone())).unwrap();
        let want = [-0.5, 0.0, 0.5, 1.0, 0.0, 2.0, 4.0, 6.0, 0.0, -1.0, -2.0, -3.0, 2.75, 2.5, 2.25, 2.0];
        assert_eq!(got, want);
        let symmetric = dequantize(&int4(None, Dtype::F16, scales.clone())).unwrap();
        assert_eq!(symmetric[..4], [-4.0, -3.5, -3.0, -2.5]);
        assert!(dequantize(&int4(Some(vec![1, 4, 15]), Dtype::F16, scales.clone())).is_err());
        assert!(dequantize(&int4(None, Dtype::F32, scales)).is_err());
    }

    #[test]
    fn nvfp4_by_hand() {
        // Codes 0..15 in one group with scale 1.5 (0x3c) and alpha 0.5; a ragged second group of two.
        let mut codes: Vec<u8> = (0..8u8).map(|i| (2 * i) | ((2 * i + 1) << 4)).collect();
        codes.push(0xf2);
        let data = MatrixData::Nvfp4 { codes: codes.into(), scales: vec![0x3c, 0x38].into(), alpha: 0.5 };
        let got = dequantize(&Matrix { n: 1, k: 18, data }).unwrap();
        let unit = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for i in 0..8 {
            assert_eq!(got[i], unit[i] * 0.75);
            assert_eq!(got[i + 8], -unit[i] * 0.75);
        }
        assert_eq!(got[16..], [0.5, -3.0]);
    }

    #[test]
    fn fp8_blocks_by_hand() {
        // 3x3 in blocks of 2x2: every value is 1 (0x38), so the scales show.
        let data =
            MatrixData::Fp8 { values: vec![0x38; 9].into(), scales: vec![1.0, 2.0, 3.0, 4.0], block: [2, 2] };
        let got = dequantize(&Matrix { n: 3, k: 3, data }).unwrap();
        assert_eq!(got, [1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 3.0, 3.0, 4.0]);
        let data = MatrixData::Fp8 { values: vec![0x38; 9].into(), scales: vec![1.0], block: [2, 2] };
        assert!(dequantize(&Matrix { n: 3, k: 3, data }).is_err());
        let data = MatrixData::Fp8 { values: vec![0x38; 9].into(), scales: vec![1.0], block: [0, 2] };
        assert!(dequantize(&Matrix { n: 3, k: 3, data }).is_err());
    }

    #[test]
    fn dense_types() {
        let bf16 = MatrixData::Dense { dtype: Dtype::Bf16, values: vec![0x80, 0x3f, 0x00, 0xc0].into() };
        assert_eq!(dequantize(&Matrix { n: 1, k: 2, data: bf16 }).unwrap(), [1.0, -2.0]);
        let f16 = MatrixData::Dense { dtype: Dtype::F16, values: vec![0x00, 0x3c].into() };
        assert_eq!(dequantize(&Matrix { n: 1, k: 1, data: f16 }).unwrap(), [1.0]);
        let short = MatrixData::Dense { dtype: Dtype::F32, values: vec![0; 7].into() };
        assert!(dequantize(&Matrix { n: 1, k: 2, data: short }).is_err());
    }
}
