//! Random weights in every canonical form, for tests of the wrappers. Not part of the program.

use half::{bf16, f16};
use spark_backend::{Dtype, Matrix, MatrixData};
use spark_testing::Random;

/// Random values in the form of `form`, whose own buffers do not matter.
pub(super) fn matrix_of(random: &mut Random, [n, k]: [usize; 2], form: &MatrixData) -> Matrix {
    let floats = |random: &mut Random, len: usize, dtype: Dtype| -> Vec<u8> {
        let values: Vec<f32> = (0..len).map(|_| random.uniform(0.002, 0.02)).collect();
        match dtype {
            Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    };
    let data = match form {
        MatrixData::Dense { dtype, .. } => {
            let mut values = floats(random, n * k, *dtype);
            // Signs as well.
            values.iter_mut().skip(dtype.size() - 1).step_by(dtype.size()).for_each(|byte| {
                *byte ^= if random.below(2) == 0 { 0 } else { 0x80 };
            });
            MatrixData::Dense { dtype: *dtype, values: values.into() }
        }
        MatrixData::Fp8 { block, .. } => {
            let len = n.div_ceil(block[0]) * k.div_ceil(block[1]);
            // No NaN.
            let mut values = random.bytes(n * k);
            values.iter_mut().filter(|value| **value & 0x7f == 0x7f).for_each(|value| *value = 0x80);
            let scales = (0..len).map(|_| random.uniform(0.002, 0.02)).collect();
            MatrixData::Fp8 { values: values.into(), scales, block: *block }
        }
        MatrixData::Int4 { zeros, scale_dtype, group_size, .. } => {
            let len = n * k.div_ceil(*group_size);
            MatrixData::Int4 {
                codes: random.bytes(n * k / 2).into(),
                zeros: zeros
                    .is_some()
                    .then(|| (0..len).map(|_| random.below(16) as u8).collect::<Vec<_>>().into()),
                scales: floats(random, len, *scale_dtype).into(),
                scale_dtype: *scale_dtype,
                group_size: *group_size,
            }
        }
        // Scales without sign and NaN.
        MatrixData::Nvfp4 { .. } => MatrixData::Nvfp4 {
            codes: random.bytes(n * k / 2).into(),
            scales: random.bytes(n * k / 16).into_iter().map(|byte| byte % 127).collect::<Vec<_>>().into(),
            alpha: random.uniform(0.01, 0.4),
        },
    };
    Matrix { n, k, data }
}
