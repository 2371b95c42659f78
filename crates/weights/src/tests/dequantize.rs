//! The canonical host forms as float32, one number at a time, straight from their definitions. For tests only: slow,
//! and independent of the backends' code.

use half::{bf16, f16};
use spark_backend::{Dtype, Matrix, MatrixData};

const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// E4M3: bias 7, no infinity, NaN where all seven bits are set.
pub(crate) fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2.0_f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

fn float(bytes: &[u8], at: usize, dtype: Dtype) -> f32 {
    let bytes = &bytes[at * dtype.size()..(at + 1) * dtype.size()];
    match dtype {
        Dtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        Dtype::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    }
}

/// Row-major values of a matrix, `[n, k]`.
pub(crate) fn dequantize(matrix: &Matrix) -> Vec<f32> {
    let k = matrix.k;
    let nibble = |codes: &[u8], row: usize, column: usize| {
        codes[row * (k / 2) + column / 2] >> (4 * (column % 2)) & 15
    };
    let value = |row: usize, column: usize| match &matrix.data {
        MatrixData::Dense { dtype, values } => float(values, row * k + column, *dtype),
        MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
            let group = row * (k / group_size) + column / group_size;
            let zero = zeros.as_ref().map_or(8.0, |zeros| f32::from(zeros[group]));
            (f32::from(nibble(codes, row, column)) - zero) * float(scales, group, *scale_dtype)
        }
        MatrixData::Nvfp4 { codes, scales, alpha } => {
            let code = nibble(codes, row, column);
            let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
            sign * E2M1[usize::from(code & 7)] * e4m3(scales[row * (k / 16) + column / 16]) * alpha
        }
        MatrixData::Fp8 { values, scales, block } => {
            e4m3(values[row * k + column]) * scales[row / block[0] * k.div_ceil(block[1]) + column / block[1]]
        }
    };
    (0..matrix.n)
        .flat_map(|row| (0..k).map(move |column| (row, column)))
        .map(|(row, column)| value(row, column))
        .collect()
}
