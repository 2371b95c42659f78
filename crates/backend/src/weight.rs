//! Weights on their way from a checkpoint to a backend: one canonical host form per scheme.
//!
//! `spark-weights` brings every on-disk layout into these forms (for example AWQ's interleaved columns and
//! compressed-tensors' packed rows both become [`MatrixData::Int4`]); a backend repacks them for its device.
//! All matrices are `[n, k]`: `n` output features, `k` input features, `y = x W^T`. Numbers are little endian.

use bytes::Bytes;

/// Element type of plain tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// One matrix of a linear layer.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// The values.
    pub data: MatrixData,
}

/// Values of a matrix, by scheme.
#[derive(Debug, Clone)]
pub enum MatrixData {
    /// Row-major values.
    Dense {
        /// Element type.
        dtype: Dtype,
        /// `[n, k]`.
        values: Bytes,
    },
    /// Integer codes with one scale (and zero point) per group of `group_size` inputs: `w = (code - zero) * scale`.
    Int4 {
        /// `[n, k / 2]`, the low nibble is the even column.
        codes: Bytes,
        /// `[n, k / group_size]` u8, 0 to 15; `None` means 8 everywhere (symmetric).
        zeros: Option<Bytes>,
        /// `[n, k / group_size]`, of `scale_dtype`.
        scales: Bytes,
        /// Type of `scales`.
        scale_dtype: Dtype,
        /// Inputs that share a scale.
        group_size: usize,
    },
    /// E2M1 codes, an E4M3 scale per 16 inputs, one factor: `w = e2m1(code) * e4m3(scale) * alpha`.
    Nvfp4 {
        /// `[n, k / 2]`, the low nibble is the even column.
        codes: Bytes,
        /// `[n, k / 16]` E4M3.
        scales: Bytes,
        /// The per-tensor factor, always to be multiplied.
        alpha: f32,
    },
    /// E4M3 values with a scale per block: `w = e4m3(value) * scale`.
    Fp8 {
        /// `[n, k]` E4M3.
        values: Bytes,
        /// `[ceil(n / block[0]), ceil(k / block[1])]`, f32.
        scales: Vec<f32>,
        /// Rows and columns that share a scale (`[1, k]` is per channel, `[n, k]` per tensor).
        block: [usize; 2],
    },
}

impl Matrix {
    /// Bytes that the host form takes.
    pub fn num_bytes(&self) -> usize {
        match &self.data {
            MatrixData::Dense { values, .. } => values.len(),
            MatrixData::Int4 { codes, zeros, scales, .. } => {
                codes.len() + zeros.as_ref().map_or(0, Bytes::len) + scales.len()
            }
            MatrixData::Nvfp4 { codes, scales, .. } => codes.len() + scales.len(),
            MatrixData::Fp8 { values, scales, .. } => values.len() + 4 * scales.len(),
        }
    }
}

/// A linear layer: matrices over the same input whose outputs are concatenated (`q`, `k`, `v`; `gate`, `up`). Parts
/// may differ in scheme.
#[derive(Debug, Clone)]
pub struct LinearWeight {
    /// The parts, in output order; all with the same `k`.
    pub parts: Vec<Matrix>,
    /// `[n]` of all parts together.
    pub bias: Option<Vec<f32>>,
}

impl LinearWeight {
    /// Output features of all parts.
    pub fn n(&self) -> usize {
        self.parts.iter().map(|part| part.n).sum()
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.parts.first().map_or(0, |part| part.k)
    }
}

/// The routed experts of one layer.
#[derive(Debug, Clone)]
pub struct ExpertsWeight {
    /// Per expert: `gate` and `up` (two parts, `[2 * intermediate, hidden]`), then `down` (`[hidden, intermediate]`).
    pub experts: Vec<(LinearWeight, LinearWeight)>,
}

/// A small dense tensor (norm weight, position table), always float32 on the host.
#[derive(Debug, Clone)]
pub struct VectorWeight {
    /// Values, row-major.
    pub values: Vec<f32>,
    /// Rows and columns; a vector has one row.
    pub shape: [usize; 2],
}
