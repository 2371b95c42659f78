//! Raw segments to canonical host forms, one item at a time. Where the stored bytes already are the canonical form
//! they are kept without a copy. Formats: AutoAWQ 0.2 (gemm), compressed-tensors 0.20, ModelOpt 0.47, FP8 block of
//! transformers.

use bytes::Bytes;
use spark_backend::{Dtype, Matrix, MatrixData};

use crate::bits::{awq_codes, awq_zeros, count_non_finite, packed_zeros, to_f32, transpose};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::header::DiskType;
use crate::plan::{Item, Recipe};
use crate::scheme::{Layout, NVFP4_GROUP, Scheme};

/// What an item becomes.
#[derive(Debug)]
pub(crate) enum Output {
    Floats(Vec<f32>),
    Matrices(Vec<Matrix>),
}

/// The segments of one item, in the order of its scheme.
struct Raw<'a> {
    checkpoint: &'a Checkpoint,
    item: &'a Item,
    segments: Vec<Bytes>,
}

/// Converts an item whose segments have been read.
pub(crate) fn convert(checkpoint: &Checkpoint, item: &Item, segments: Vec<Bytes>) -> Result<Output> {
    let raw = Raw { checkpoint, item, segments };
    match &item.recipe {
        Recipe::Floats { .. } => raw.floats(0).map(Output::Floats),
        Recipe::Matrix(layout) => raw.matrix(layout).map(Output::Matrices),
    }
}

impl Raw<'_> {
    fn dtype(&self, segment: usize) -> DiskType {
        self.checkpoint.tensors[self.item.segments[segment].tensor].info.dtype
    }

    fn mismatch(&self, segment: usize, reason: String) -> Error {
        let tensor = self.item.segments[segment].tensor;
        Error::Mismatch {
            path: self.checkpoint.path_of(tensor).to_owned(),
            tensor: self.checkpoint.tensors[tensor].info.name.clone(),
            reason,
        }
    }

    /// Fails when a segment of scales has NaN or infinite values.
    fn check_finite(&self, segment: usize) -> Result<()> {
        let (bytes, dtype) = (&self.segments[segment], self.dtype(segment));
        let count = count_non_finite(bytes, dtype);
        if count == 0 {
            return Ok(());
        }
        let tensor = self.item.segments[segment].tensor;
        Err(Error::NonFinite {
            path: self.checkpoint.path_of(tensor).to_owned(),
            tensor: self.checkpoint.tensors[tensor].info.name.clone(),
            count,
            total: bytes.len() / dtype.size(),
        })
    }

    fn floats(&self, segment: usize) -> Result<Vec<f32>> {
        self.check_finite(segment)?;
        to_f32(&self.segments[segment], self.dtype(segment))
            .ok_or_else(|| self.mismatch(segment, "is not a float tensor".to_owned()))
    }

    /// A segment as `[rows, columns]` elements of `size` bytes, whichever way it is stored.
    fn rows(&self, segment: usize, [rows, columns]: [usize; 2], size: usize, transposed: bool) -> Bytes {
        let bytes = &self.segments[segment];
        if transposed { transpose(bytes, columns, rows, size).into() } else { bytes.clone() }
    }

    fn matrix(&self, layout: &Layout) -> Result<Vec<Matrix>> {
        let &Layout { n, k, outputs, transposed, .. } = layout;
        let rows = n / outputs;
        // Equal parts of a row-major buffer, without a copy.
        let part = |bytes: &Bytes, index: usize| {
            let len = bytes.len() / outputs;
            bytes.slice(index * len..(index + 1) * len)
        };
        let build = |data: &dyn Fn(usize) -> MatrixData| {
            (0..outputs).map(|index| Matrix { n: rows, k, data: data(index) }).collect()
        };
        Ok(match layout.scheme {
            Scheme::Dense { dtype } => {
                let values = self.rows(0, [n, k], dtype.size(), transposed);
                build(&|index| MatrixData::Dense { dtype, values: part(&values, index) })
            }
            Scheme::Awq { group, scale_dtype } => {
                let (codes, zeros, scales) = self.awq(n, k, group, scale_dtype)?;
                build(&|index| MatrixData::Int4 {
                    codes: part(&codes, index),
                    zeros: Some(part(&zeros, index)),
                    scales: part(&scales, index),
                    scale_dtype,
                    group_size: group,
                })
            }
            Scheme::PackedInt4 { group, scale_dtype, zeros, shape } => {
                let zeros = self.packed_int4(n, k, group, zeros, shape)?;
                build(&|index| MatrixData::Int4 {
                    codes: part(&self.segments[0], index),
                    zeros: zeros.as_ref().map(|zeros| part(zeros, index)),
                    scales: part(&self.segments[1], index),
                    scale_dtype,
                    group_size: group,
                })
            }
            Scheme::Nvfp4 { divide } => {
                self.check_finite(1)?;
                let codes = self.rows(0, [n, k / 2], 1, transposed);
                let scales = self.rows(1, [n, k / NVFP4_GROUP], 1, transposed);
                let alphas = self.alphas(divide)?;
                build(&|index| MatrixData::Nvfp4 {
                    codes: part(&codes, index),
                    scales: part(&scales, index),
                    alpha: alphas[index.min(alphas.len() - 1)],
                })
            }
            Scheme::Fp8 { block, .. } => {
                let values = self.rows(0, [n, k], 1, transposed);
                let mut scales = self.floats(1)?;
                let grid = [n.div_ceil(block[0]), k.div_ceil(block[1])];
                if transposed {
                    scales = transpose_f32(&scales, grid);
                }
                let parts = split_fp8_scales(&scales, grid, block, rows, outputs);
                build(&|index| MatrixData::Fp8 {
                    values: part(&values, index),
                    scales: parts.1[index].clone(),
                    block: parts.0,
                })
            }
        })
    }

    fn awq(&self, n: usize, k: usize, group: usize, scale_dtype: Dtype) -> Result<(Bytes, Bytes, Bytes)> {
        self.check_finite(2)?;
        let groups = k / group;
        let codes = awq_codes(&self.segments[0], k, n);
        let zeros = awq_zeros(&self.segments[1], groups, n);
        let scales = transpose(&self.segments[2], groups, n, scale_dtype.size());
        Ok((codes.into(), zeros.into(), scales.into()))
    }

    /// Checks the scales and the stored shape; the zero points, where there are any. Both codes and zero points are
    /// stored with 8 added, which cancels.
    fn packed_int4(
        &self,
        n: usize,
        k: usize,
        group: usize,
        zeros: bool,
        shape: Option<[usize; 2]>,
    ) -> Result<Option<Bytes>> {
        self.check_finite(1)?;
        if let Some([whole_n, whole_k]) = shape {
            let at = 2 + usize::from(zeros);
            let dims: Vec<i64> = self.segments[at]
                .chunks_exact(8)
                .map(|dim| {
                    i64::from_le_bytes([dim[0], dim[1], dim[2], dim[3], dim[4], dim[5], dim[6], dim[7]])
                })
                .collect();
            let wanted = [i64::try_from(whole_n).ok(), i64::try_from(whole_k).ok()];
            if !dims.iter().map(|&dim| Some(dim)).eq(wanted) {
                let expected = format!("says the weight is {dims:?}, expected [{whole_n}, {whole_k}]");
                return Err(self.mismatch(at, expected));
            }
        }
        Ok(zeros.then(|| packed_zeros(&self.segments[2], n, k / group).into()))
    }

    /// The factors of NVFP4, to be multiplied.
    fn alphas(&self, divide: bool) -> Result<Vec<f32>> {
        let mut alphas = self.floats(2)?;
        for alpha in &mut alphas {
            let stored = *alpha;
            if divide {
                *alpha = 1.0 / stored;
            }
            if !alpha.is_finite() {
                return Err(self.mismatch(2, format!("is {stored}; a divisor has to be other than zero")));
            }
        }
        Ok(alphas)
    }
}

/// A grid of scales stored `[grid[1], grid[0]]` -> `[grid[0], grid[1]]`.
fn transpose_f32(stored: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..rows).flat_map(|row| (0..columns).map(move |column| stored[column * rows + row])).collect()
}

/// Splits the scales of `outputs` stacked matrices of `rows` rows each. When the seam cuts a block, blocks become
/// smaller, so that it no longer does, and their scales are repeated. Returns the block and each matrix's scales.
pub(crate) fn split_fp8_scales(
    scales: &[f32],
    [_, columns]: [usize; 2],
    block: [usize; 2],
    rows: usize,
    outputs: usize,
) -> ([usize; 2], Vec<Vec<f32>>) {
    let height = if outputs == 1 { block[0] } else { gcd(block[0], rows) };
    let matrix = |index: usize| {
        (0..rows.div_ceil(height))
            .flat_map(|row| {
                let stored = (index * rows + row * height) / block[0];
                scales[stored * columns..(stored + 1) * columns].iter().copied()
            })
            .collect()
    };
    ([height, block[1]], (0..outputs).map(matrix).collect())
}

/// Greatest common divisor.
pub(crate) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
