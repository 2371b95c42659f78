//! `cargo bench --bench kernels`: products of the CPU backend with weights of every scheme, next to what the machine
//! can do: bytes a second that a plain loop reads, multiply-adds a second without memory. Both are measured in the
//! same run.
#![expect(clippy::print_stdout, reason = "a benchmark prints its results")]

#[path = "support/measure.rs"]
mod measure;

use std::{hint::black_box, thread, time::Instant};

use anyhow::Result;
use measure::{head, median, row, sorted};
use pulp::{Simd, WithSimd};
use spark_backend::{
    Backend, Bytes, Dtype, ExpertsWeight, LinearWeight, Matrix, MatrixData, Result as BackendResult,
    RouterSpec, VectorWeight,
};
use spark_cpu::CpuBackend;
use spark_testing::Random;

/// Output and input features: the qkv projection of a model of hidden size 2048.
const N: usize = 4096;
const K: usize = 2048;
/// Weights are taken in turn from copies of this size together, so that no cache holds them: a model reads each of
/// its weights once a step.
const WORKING_SET: usize = 768 << 20;

fn main() -> Result<()> {
    let threads = thread::available_parallelism()?.get();
    let (memory, compute) = (read_ceiling(threads), compute_ceiling(threads));
    println!(
        "{threads} threads; medians; ceilings: {memory:.1} GB/s read, {compute:.0} GFLOP/s of f32 multiply-adds"
    );
    let backend = CpuBackend::new(Dtype::Bf16, Some(threads))?;
    head(&["scheme", "M", "us", "GB/s of weights", "of read", "GFLOP/s", "of compute"]);
    for (name, data) in schemes(&mut Random::new(1), N, K) {
        let matrix = Matrix { n: N, k: K, data };
        let bytes = matrix.num_bytes();
        let weights = (0..WORKING_SET.div_ceil(bytes))
            .map(|_| backend.linear_weight(LinearWeight { parts: vec![copy(&matrix)], bias: None }))
            .collect::<BackendResult<Vec<_>>>()?;
        for m in [1, 4, 16, 256] {
            let x = activations(&backend, m, K)?;
            let mut next = weights.iter().cycle();
            let repeats = if m > 64 { 15 } else { weights.len().max(60) };
            let times = seconds(repeats, || {
                if let Some(weight) = next.next() {
                    black_box(backend.linear(&x, weight).expect("the shapes fit"));
                }
            });
            let (time, flops) = (median(&times), 2.0 * (m * N * K) as f64);
            let (speed, work) = (bytes as f64 / time / 1e9, flops / time / 1e9);
            row(&[
                name.into(),
                m.to_string(),
                format!("{:.0}", 1e6 * time),
                format!("{speed:.2}"),
                format!("{:.0} %", 100.0 * speed / memory),
                format!("{work:.1}"),
                format!("{:.0} %", 100.0 * work / compute),
            ]);
        }
    }
    experts(&backend, memory)
}

/// A layer's experts at the shapes of Qwen3-VL-30B-A3B, 8 of 128 a token.
fn experts(backend: &CpuBackend, memory: f64) -> Result<()> {
    const EXPERTS: usize = 128;
    const TOP_K: usize = 8;
    const INTERMEDIATE: usize = 768;
    let mut random = Random::new(2);
    let bf16 = |random: &mut Random, n, k| Matrix { n, k, data: bf16(random, n * k) };
    let plain = |matrix| LinearWeight { parts: vec![matrix], bias: None };
    let router = backend.linear_weight(plain(bf16(&mut random, EXPERTS, K)))?;
    let norm = backend.vector(VectorWeight { values: vec![1.0; K], shape: [1, K] })?;
    head(&["experts", "M", "us", "GB/s of weights touched", "of read"]);
    for (name, up) in schemes(&mut random, INTERMEDIATE, K) {
        let Some((_, down)) = schemes(&mut random, K, INTERMEDIATE).into_iter().find(|other| other.0 == name)
        else {
            continue;
        };
        let up = Matrix { n: INTERMEDIATE, k: K, data: up };
        let down = Matrix { n: K, k: INTERMEDIATE, data: down };
        let expert_bytes = 2 * up.num_bytes() + down.num_bytes();
        let expert = |_| (LinearWeight { parts: vec![copy(&up), copy(&up)], bias: None }, plain(copy(&down)));
        let experts =
            backend.experts_weight(ExpertsWeight { experts: (0..EXPERTS).map(expert).collect() })?;
        for m in [1, 16] {
            // Other rows each time choose other experts, so the caches help as little as in a model.
            let inputs = (0..32)
                .map(|_| {
                    let mut x =
                        backend.vector(VectorWeight { values: random.normals(m * K, 1.0), shape: [m, K] })?;
                    let router =
                        RouterSpec { router: &router, top_k: TOP_K, renormalize: true, experts: 0..EXPERTS };
                    backend.reduce_norm_route(None, &mut x, &norm, 1e-6, &router)
                })
                .collect::<BackendResult<Vec<_>>>()?;
            let touched = inputs.iter().map(|(_, routing)| {
                let mut chosen = routing.experts().to_vec();
                chosen.sort_unstable();
                chosen.dedup();
                chosen.len()
            });
            let bytes = (touched.sum::<usize>() * expert_bytes) as f64 / inputs.len() as f64;
            let mut next = inputs.iter().cycle();
            let times = seconds(3 * inputs.len(), || {
                if let Some((x, routing)) = next.next() {
                    black_box(backend.moe_mlp(x, routing, &experts).expect("the shapes fit"));
                }
            });
            let time = median(&times);
            let speed = bytes / time / 1e9;
            row(&[
                name.into(),
                m.to_string(),
                format!("{:.0}", 1e6 * time),
                format!("{speed:.2}"),
                format!("{:.0} %", 100.0 * speed / memory),
            ]);
        }
    }
    Ok(())
}

fn activations(backend: &CpuBackend, rows: usize, k: usize) -> Result<<CpuBackend as Backend>::Tensor> {
    let values = Random::new(3).bf16s(rows * k, 1.0);
    Ok(backend.vector(VectorWeight { values, shape: [rows, k] })?)
}

/// Random weights `[n, k]` in every scheme.
fn schemes(random: &mut Random, n: usize, k: usize) -> Vec<(&'static str, MatrixData)> {
    let groups = n * k / 128;
    let bytes = |values: Vec<f32>| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let scales = |groups: usize| half::f16::from_f32(0.01).to_le_bytes().repeat(groups).into();
    vec![
        ("f32", MatrixData::Dense { dtype: Dtype::F32, values: bytes(random.normals(n * k, 0.02)).into() }),
        ("bf16", bf16(random, n * k)),
        (
            "int4 (AWQ)",
            MatrixData::Int4 {
                codes: random.bytes(n * k / 2).into(),
                zeros: Some(random.bytes(groups).iter().map(|byte| byte & 15).collect::<Vec<u8>>().into()),
                scales: scales(groups),
                scale_dtype: Dtype::F16,
                group_size: 128,
            },
        ),
        (
            "nvfp4",
            MatrixData::Nvfp4 {
                codes: random.bytes(n * k / 2).into(),
                // E4M3 1.0
                scales: vec![0x38; n * k / 16].into(),
                alpha: 0.01,
            },
        ),
        (
            "fp8 (128 x 128)",
            MatrixData::Fp8 {
                // Never the NaN codes.
                values: random.bytes(n * k).into_iter().map(|byte| byte & 0xbf).collect::<Vec<u8>>().into(),
                scales: vec![0.01; n / 128 * (k / 128)],
                block: [128, 128],
            },
        ),
    ]
}

fn bf16(random: &mut Random, len: usize) -> MatrixData {
    let bits = |value: f32| half::bf16::from_f32(value).to_le_bytes();
    let values = random.normals(len, 0.02).into_iter().flat_map(bits).collect::<Vec<u8>>();
    MatrixData::Dense { dtype: Dtype::Bf16, values: values.into() }
}

/// The same matrix in memory of its own.
fn copy(matrix: &Matrix) -> Matrix {
    let copied = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
    let data = match &matrix.data {
        MatrixData::Dense { dtype, values } => MatrixData::Dense { dtype: *dtype, values: copied(values) },
        MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => MatrixData::Int4 {
            codes: copied(codes),
            zeros: zeros.as_ref().map(copied),
            scales: copied(scales),
            scale_dtype: *scale_dtype,
            group_size: *group_size,
        },
        MatrixData::Nvfp4 { codes, scales, alpha } => {
            MatrixData::Nvfp4 { codes: copied(codes), scales: copied(scales), alpha: *alpha }
        }
        MatrixData::Fp8 { values, scales, block } => {
            MatrixData::Fp8 { values: copied(values), scales: scales.clone(), block: *block }
        }
    };
    Matrix { n: matrix.n, k: matrix.k, data }
}

/// Seconds of `repeats` calls of `work`, sorted.
fn seconds(repeats: usize, mut work: impl FnMut()) -> Vec<f64> {
    sorted((0..repeats.max(1)).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    }))
}

/// GB/s that all threads together read from memory.
fn read_ceiling(threads: usize) -> f64 {
    let values = vec![1.5f32; WORKING_SET / 4];
    let times = seconds(9, || {
        thread::scope(|scope| {
            for part in values.chunks(values.len().div_ceil(threads)) {
                scope.spawn(move || black_box(pulp::Arch::new().dispatch(Sum(part))));
            }
        });
    });
    WORKING_SET as f64 / times[0] / 1e9
}

/// Adds what it reads, in eight independent sums.
struct Sum<'a>(&'a [f32]);

impl WithSimd for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.splat_f32s(0.0); 8];
        for chunk in S::as_simd_f32s(self.0).0.chunks_exact(8) {
            for (sum, &value) in sums.iter_mut().zip(chunk) {
                *sum = simd.add_f32s(*sum, value);
            }
        }
        sums.into_iter().map(|sum| simd.reduce_sum_f32s(sum)).sum()
    }
}

/// GFLOP/s of all threads together, numbers in registers.
fn compute_ceiling(threads: usize) -> f64 {
    const ROUNDS: usize = 4_000_000;
    let times = seconds(5, || {
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    black_box(pulp::Arch::new().dispatch(MultiplyAdd { rounds: black_box(ROUNDS) }))
                });
            }
        });
    });
    let lanes = pulp::Arch::new().dispatch(Lanes);
    (2 * ACCUMULATORS * lanes * ROUNDS * threads) as f64 / times[0] / 1e9
}

/// Enough to hide the latency of a multiply-add, few enough for the registers.
const ACCUMULATORS: usize = 12;

struct MultiplyAdd {
    rounds: usize,
}

impl WithSimd for MultiplyAdd {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (factor, offset) = (simd.splat_f32s(0.999), simd.splat_f32s(0.001));
        // Values that the compiler does not know, so that it has to do the work.
        let mut sums: [S::f32s; ACCUMULATORS] = std::array::from_fn(|i| simd.splat_f32s(black_box(i as f32)));
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, factor, offset);
            }
        }
        sums.into_iter().map(|sum| simd.reduce_sum_f32s(sum)).sum()
    }
}

/// Floats in a vector.
struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}
