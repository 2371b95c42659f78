//! Norms, embedding and SwiGLU against the CPU backend.

use half::bf16;
use spark_backend::{Backend, Bytes, Dtype, LinearWeight, Matrix, MatrixData};
use spark_cuda::{DeviceSlice, Linear, PackedHost, ReduceNorm, Tensor};
use spark_testing::{Random, rel_err, tolerance};

use super::{Bed, cpu, cpu_tensor};

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F32];

fn tolerance(dtype: Dtype) -> f64 {
    if dtype == Dtype::F32 { tolerance::KERNEL_F32 } else { tolerance::KERNEL_BF16 }
}

#[test]
fn reduce_norm_is_the_cpu_backends() {
    let (bed, mut random) = (Bed::new(), Random::new(1));
    for dtype in DTYPES {
        let backend = cpu(dtype);
        // One vector, odd numbers of vectors, the real sizes, more than one vector a thread.
        for (rows, columns) in
            [(1, 8), (3, 24), (5, 1032), (1, 2048), (33, 2048), (7, 4096), (2, 8200), (3, 16_384)]
        {
            for has_partial in [false, true] {
                let shape = [rows, columns];
                let [x, y] = [(); 2].map(|()| random.normals(rows * columns, 1.5));
                let w = random.normals(columns, 1.0);
                let mut want_residual = cpu_tensor(&backend, &x, shape);
                let partial = has_partial.then(|| cpu_tensor(&backend, &y, shape));
                let weight = cpu_tensor(&backend, &w, [1, columns]);
                let want = backend.reduce_norm(partial, &mut want_residual, &weight, 1e-6).unwrap();

                let residual = bed.tensor(&x, shape, dtype);
                let (partial, weight) = (bed.tensor(&y, shape, dtype), bed.tensor(&w, [1, columns], dtype));
                let out = bed.empty(shape, dtype);
                let partial = has_partial.then_some(&partial);
                let args = ReduceNorm { partial, residual: &residual, weight: &weight, eps: 1e-6 };
                bed.kernels.reduce_norm(&bed.stream, args, &out).unwrap();
                // Additions of two numbers are exact on both sides.
                assert_eq!(bed.values(&residual), want_residual.values(), "{shape:?} {dtype:?}");
                let error = rel_err(&bed.values(&out), want.values());
                assert!(error < tolerance(dtype), "{shape:?} {dtype:?}: {error}");
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_a_batch() {
    let (bed, mut random) = (Bed::new(), Random::new(2));
    let x = random.normals(64 * 2048, 1.0);
    let weight = bed.tensor(&random.normals(2048, 1.0), [1, 2048], Dtype::Bf16);
    let norm = |values: &[f32]| {
        let shape = [values.len() / 2048, 2048];
        let (residual, out) = (bed.tensor(values, shape, Dtype::Bf16), bed.empty(shape, Dtype::Bf16));
        let args = ReduceNorm { partial: None, residual: &residual, weight: &weight, eps: 1e-6 };
        bed.kernels.reduce_norm(&bed.stream, args, &out).unwrap();
        bed.values(&out)
    };
    let all = norm(&x);
    for row in [0, 17, 63] {
        assert_eq!(norm(&x[row * 2048..][..2048]), all[row * 2048..][..2048]);
    }
}

/// A table of bf16 values in the packed layout.
fn table(bed: &Bed, values: &[f32], [n, k]: [usize; 2]) -> Linear {
    let bytes: Bytes = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    let parts = vec![Matrix { n, k, data: MatrixData::Dense { dtype: Dtype::Bf16, values: bytes } }];
    let host = [PackedHost::pack(&LinearWeight { parts, bias: None }).unwrap()];
    Linear::upload(&bed.stream, &bed.bytes(Linear::num_bytes(&host)), &host).unwrap()
}

#[test]
fn embed_takes_rows_of_the_packed_table() {
    let (bed, mut random) = (Bed::new(), Random::new(3));
    let none: DeviceSlice = bed.bytes(0);
    for (rows, hidden, num_tokens) in
        [(1, 16, 1), (300, 80, 7), (37, 144, 40), (1000, 2048, 33), (50, 4096, 1000)]
    {
        let values = random.bf16s(rows * hidden, 1.0);
        let table = table(&bed, &values, [rows, hidden]);
        // Some tokens lie behind the table.
        let tokens: Vec<u32> = random.token_ids(num_tokens, rows + 20);
        let (ids, out) = (bed.upload(&tokens), bed.empty([num_tokens, hidden], Dtype::Bf16));
        bed.kernels.embed(&bed.stream, &ids, &none, &table, 0, &out).unwrap();
        let zeros = vec![0.0; hidden];
        let row = |token: u32| values.get(token as usize * hidden..).and_then(|rest| rest.get(..hidden));
        let want: Vec<f32> = tokens.iter().flat_map(|&token| row(token).unwrap_or(&zeros)).copied().collect();
        assert_eq!(bed.values(&out), want, "{rows} {hidden} {num_tokens}");
    }
}

/// The table of a rank: rows of other ranks' tokens are zero, also those of tokens that are still on the device.
#[test]
fn embed_takes_the_rows_of_its_share() {
    let (bed, mut random) = (Bed::new(), Random::new(6));
    for (rows, first, hidden, num_tokens) in [(50, 37, 80, 40), (1, 0, 16, 3), (150, 150, 256, 300)] {
        let values = random.bf16s(rows * hidden, 1.0);
        let table = table(&bed, &values, [rows, hidden]);
        let mut tokens: Vec<u32> = random.token_ids(num_tokens, first + rows + 20);
        let last: Vec<u32> = random.token_ids(8, first + rows + 20);
        let mut want_tokens = tokens.clone();
        for (i, token) in tokens.iter_mut().enumerate().step_by(3) {
            // Slots beyond the last have no token.
            let slot = i % 10;
            *token = spark_cuda::PENDING | slot as u32;
            want_tokens[i] = last.get(slot).copied().unwrap_or(u32::MAX);
        }
        let out = bed.empty([num_tokens, hidden], Dtype::Bf16);
        let (ids, last) = (bed.upload(&tokens), bed.upload(&last));
        bed.kernels.embed(&bed.stream, &ids, &last, &table, first, &out).unwrap();
        let zeros = vec![0.0; hidden];
        let row = |token: u32| {
            let row = (token as usize).checked_sub(first)?;
            values.get(row.checked_mul(hidden)?..)?.get(..hidden)
        };
        let want: Vec<f32> =
            want_tokens.iter().flat_map(|&token| row(token).unwrap_or(&zeros)).copied().collect();
        assert_eq!(bed.values(&out), want, "{rows} rows from {first}");
    }
}

#[test]
fn layer_norm_is_the_cpu_backends() {
    let (bed, mut random) = (Bed::new(), Random::new(5));
    let backend = cpu(Dtype::Bf16);
    for (rows, columns) in [(1, 8), (3, 24), (65, 1152), (5, 4304), (33, 4608), (2, 8200), (3, 16_384)] {
        let mut x = random.normals(rows * columns, 1.5);
        x.iter_mut().for_each(|x| *x += 2.0);
        let [w, b] = [(); 2].map(|()| random.normals(columns, 1.0));
        let [weight, bias] = [&w, &b].map(|v| cpu_tensor(&backend, v, [1, columns]));
        let want = backend.layer_norm(&cpu_tensor(&backend, &x, [rows, columns]), &weight, &bias, 1e-6);
        let [weight, bias] = [&w, &b].map(|v| bed.tensor(v, [1, columns], Dtype::Bf16));
        let (x, out) =
            (bed.tensor(&x, [rows, columns], Dtype::Bf16), bed.empty([rows, columns], Dtype::Bf16));
        bed.kernels.layer_norm(&bed.stream, &x, [&weight, &bias], 1e-6, &out).unwrap();
        let error = rel_err(&bed.values(&out), want.unwrap().values());
        assert!(error < tolerance(Dtype::Bf16), "{rows} x {columns}: {error}");
        // In place.
        bed.kernels.layer_norm(&bed.stream, &x, [&weight, &bias], 1e-6, &x).unwrap();
        assert_eq!(bed.values(&x), bed.values(&out));
    }
}

#[test]
fn swiglu_is_the_cpu_backends() {
    let (bed, mut random) = (Bed::new(), Random::new(4));
    for dtype in DTYPES {
        let backend = cpu(dtype);
        for (rows, columns) in [(1, 8), (3, 24), (65, 768), (2, 1544), (129, 1536), (3, 25_600)] {
            let x = random.normals(rows * 2 * columns, 3.0);
            let want = backend.swiglu(&cpu_tensor(&backend, &x, [rows, 2 * columns])).unwrap();
            let (gate_up, out) =
                (bed.tensor(&x, [rows, 2 * columns], dtype), bed.empty([rows, columns], dtype));
            bed.kernels.swiglu(&bed.stream, &gate_up, &out).unwrap();
            let error = rel_err(&bed.values(&out), want.values());
            assert!(error < tolerance(dtype), "{rows} x {columns} {dtype:?}: {error}");
        }
    }
}

#[test]
fn swiglu_of_extreme_gates() {
    let bed = Bed::new();
    let gate_up = bed.tensor(&[200.0, -200.0, 0.0, -1e30, 2.0, 2.0, 2.0, 2.0], [1, 8], Dtype::F32);
    let out = bed.empty([1, 4], Dtype::F32);
    bed.kernels.swiglu(&bed.stream, &gate_up, &out).unwrap();
    assert_eq!(bed.values(&out), [400.0, 0.0, 0.0, 0.0]);
}

#[test]
fn wrong_shapes_are_refused_before_the_launch() {
    let bed = Bed::new();
    let tensor = |shape, dtype| bed.empty(shape, dtype);
    let (x, w) = (tensor([2, 64], Dtype::Bf16), tensor([1, 64], Dtype::Bf16));
    let out = tensor([2, 64], Dtype::Bf16);
    let norm = |residual: &Tensor, weight: &Tensor, out: &Tensor| {
        let args = ReduceNorm { partial: None, residual, weight, eps: 1e-6 };
        bed.kernels.reduce_norm(&bed.stream, args, out)
    };
    assert!(norm(&x, &w, &out).is_ok());
    assert!(norm(&x, &tensor([1, 32], Dtype::Bf16), &out).is_err());
    assert!(norm(&x, &tensor([1, 64], Dtype::F32), &out).is_err());
    assert!(norm(&x, &w, &tensor([1, 64], Dtype::Bf16)).is_err());
    let message = norm(&x, &w, &x).unwrap_err().to_string();
    assert!(message.contains("overlapping memory"), "{message}");
    assert!(bed.kernels.swiglu(&bed.stream, &x, &out).is_err());
    assert!(bed.kernels.layer_norm(&bed.stream, &x, [&w, &x], 1e-6, &out).is_err());
    assert!(bed.kernels.layer_norm(&bed.stream, &x, [&w, &out], 1e-6, &w).is_err());
    let table = table(&bed, &[0.0; 128], [2, 64]);
    let short = bed.upload(&[1u32]);
    assert!(bed.kernels.embed(&bed.stream, &short, &short, &table, 0, &out).is_err());
    let unaligned = bed.bytes(10).slice(2, 8).unwrap();
    let error = bed.kernels.embed(&bed.stream, &unaligned, &short, &table, 0, &out).unwrap_err().to_string();
    assert!(error.contains("start at a multiple of 4"), "{error}");
    bed.stream.synchronize().unwrap();
}
