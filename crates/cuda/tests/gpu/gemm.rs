//! Products for many rows against the CPU backend, with weights of every scheme. Few rows are in `linear.rs`, experts in
//! `moe_gemm.rs`.

use half::{bf16, f16};
use spark_backend::{Activation, Backend, Dtype, LinearWeight, Matrix, MatrixData};
use spark_cuda::{After, Linear, PackedHost, PackedWeight, Pool, Tensor};
use spark_testing::{Random, rel_err, tolerance};

use super::{Bed, cpu, cpu_tensor};

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Scheme {
    Bf16,
    Fp8,
    Int4(usize),
    Nvfp4,
}

pub(crate) const SCHEMES: [Scheme; 6] =
    [Scheme::Bf16, Scheme::Fp8, Scheme::Int4(32), Scheme::Int4(64), Scheme::Int4(128), Scheme::Nvfp4];

/// Weights are exact in bf16 up to a float32 scale. Tensor cores cut sums off: at most 2^-22 for each 16 of the 4304 inputs, all in
/// one direction, is 6.5e-5. A wrong weight costs 1e-2.
const FLOAT_SUMS: f64 = 1e-4;

/// Random weights. One group of 16 has a scale of zero.
pub(crate) fn matrix(random: &mut Random, n: usize, k: usize, scheme: Scheme) -> Matrix {
    let scale = |random: &mut Random| if random.below(16) == 0 { 0.0 } else { random.uniform(0.002, 0.02) };
    let data = match scheme {
        Scheme::Bf16 => {
            let values: Vec<u8> =
                random.bf16s(n * k, 0.05).into_iter().flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
            MatrixData::Dense { dtype: Dtype::Bf16, values: values.into() }
        }
        Scheme::Fp8 => {
            // Both signs, no NaN, subnormal numbers too.
            let values: Vec<u8> =
                random.bytes(n * k).into_iter().map(|byte| (byte & 0x80) | ((byte & 0x7f) % 0x60)).collect();
            let scales = (0..n.div_ceil(128) * k.div_ceil(128)).map(|_| scale(random)).collect();
            MatrixData::Fp8 { values: values.into(), scales, block: [128, 128] }
        }
        Scheme::Int4(group_size) => {
            let groups = n * k.div_ceil(group_size);
            let scales: Vec<u8> =
                (0..groups).flat_map(|_| f16::from_f32(scale(random)).to_le_bytes()).collect();
            let zeros: Vec<u8> = (0..groups).map(|_| random.below(16) as u8).collect();
            MatrixData::Int4 {
                codes: random.bytes(n * k / 2).into(),
                zeros: Some(zeros.into()),
                scales: scales.into(),
                scale_dtype: Dtype::F16,
                group_size,
            }
        }
        Scheme::Nvfp4 => {
            // Scales without sign and NaN, up to 14.
            let scales: Vec<u8> = random.bytes(n * k / 16).into_iter().map(|byte| byte % 0x58).collect();
            let alpha = random.uniform(0.001, 0.01);
            MatrixData::Nvfp4 { codes: random.bytes(n * k / 2).into(), scales: scales.into(), alpha }
        }
    };
    Matrix { n, k, data }
}

/// Fails with the first values that are far off, and says how many are.
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], columns: usize, limit: f64) {
    let error = rel_err(got, want);
    if error < limit {
        return;
    }
    let scale = (want.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / want.len() as f64).sqrt();
    let is_off = |(a, b): (&f32, &f32)| (a - b).is_nan() || f64::from((a - b).abs()) > 20.0 * limit * scale;
    let off: Vec<usize> = (0..want.len().min(got.len())).filter(|&i| is_off((&got[i], &want[i]))).collect();
    let first: Vec<String> = off
        .iter()
        .take(12)
        .map(|&i| format!("[{}, {}] {} instead of {}", i / columns, i % columns, got[i], want[i]))
        .collect();
    panic!(
        "{what}: error {error:e}, limit {limit:e}; {} of {} values are far off: {}",
        off.len(),
        want.len(),
        first.join("; ")
    );
}

struct Layer<'a> {
    bed: &'a Bed,
    pool: Pool,
    weight: PackedWeight,
}

impl<'a> Layer<'a> {
    fn new(bed: &'a Bed, weight: &LinearWeight) -> Self {
        let host = PackedHost::pack(weight).unwrap();
        let slice = bed.bytes(PackedWeight::num_bytes(&host));
        let weight = PackedWeight::upload(&bed.stream, &slice, &host).unwrap();
        Self { bed, pool: Pool::new(&bed.bytes(64 << 20)), weight }
    }

    fn run(&self, x: &Tensor, out: &Tensor, first_column: usize) -> spark_cuda::Result<()> {
        self.bed.kernels.gemm(&self.bed.stream, &self.pool, x, &self.weight, out, first_column)
    }

    fn values(&self, x: &[f32], dtype: Dtype) -> Vec<f32> {
        let rows = x.len() / self.weight.k();
        let x = self.bed.tensor(x, [rows, self.weight.k()], Dtype::Bf16);
        let out = self.bed.empty([rows, self.weight.n()], dtype);
        self.run(&x, &out, 0).unwrap();
        self.bed.values(&out)
    }
}

fn over_sizes(shapes: &[[usize; 2]], all_rows: &[usize], schemes: &[Scheme]) {
    let (bed, mut random) = (Bed::new(), Random::new(31));
    let (exact_backend, backend) = (cpu(Dtype::F32), cpu(Dtype::Bf16));
    for &[n, k] in shapes {
        for &scheme in schemes {
            let bias = (n % 2 == 0).then(|| random.normals(n, 1.0));
            let weight = LinearWeight { parts: vec![matrix(&mut random, n, k, scheme)], bias };
            let layer = Layer::new(&bed, &weight);
            let most = all_rows.iter().copied().max().unwrap_or(1);
            let x = random.bf16s(most * k, 1.0);
            let exact = exact_backend.linear_weight(weight.clone()).unwrap();
            let exact = exact_backend.linear(&cpu_tensor(&exact_backend, &x, [most, k]), &exact).unwrap();
            let rounded = backend.linear_weight(weight).unwrap();
            let rounded = backend.linear(&cpu_tensor(&backend, &x, [most, k]), &rounded).unwrap();
            for &rows in all_rows {
                let (what, x) = (format!("{n} x {k} {scheme:?}, {rows} rows"), &x[..rows * k]);
                let got = layer.values(x, Dtype::F32);
                assert_close(&what, &got, &exact.values()[..rows * n], n, FLOAT_SUMS);
                let got = layer.values(x, Dtype::Bf16);
                assert_close(&what, &got, &rounded.values()[..rows * n], n, tolerance::KERNEL_BF16);
            }
        }
    }
}

#[test]
fn gemm_bf16_and_int4_over_odd_and_real_sizes() {
    let shapes = [[1, 16], [16, 64], [33, 96], [48, 208], [32, 128], [100, 384], [130, 1040], [2048, 768]];
    over_sizes(&shapes, &[1, 17, 33, 64, 65, 128, 200, 300], &[Scheme::Bf16, Scheme::Int4(128)]);
}

#[test]
fn gemm_of_the_other_schemes_over_odd_and_real_sizes() {
    let shapes = [[1, 16], [16, 64], [33, 96], [48, 208], [100, 384], [130, 1040], [768, 2048]];
    let schemes = [Scheme::Fp8, Scheme::Int4(32), Scheme::Int4(64), Scheme::Nvfp4];
    over_sizes(&shapes, &[5, 32, 33, 65, 150, 300], &schemes);
}

#[test]
fn gemm_at_the_sizes_of_the_models() {
    over_sizes(&[[5120, 2048], [2048, 4096]], &[40, 700], &[Scheme::Int4(128), Scheme::Nvfp4]);
    over_sizes(&[[1152, 4304], [4304, 1152], [128, 2048]], &[96, 260, 1024], &[Scheme::Bf16]);
}

#[test]
fn parts_lie_side_by_side() {
    let (bed, mut random, backend) = (Bed::new(), Random::new(32), cpu(Dtype::Bf16));
    for (dtype, first, columns, rows) in [
        (Dtype::Bf16, 24, 100, 150),
        (Dtype::Bf16, 3, 71, 40),
        (Dtype::F32, 5, 90, 300),
        (Dtype::F32, 8, 72, 70),
    ] {
        let n = 61;
        let weight = LinearWeight { parts: vec![matrix(&mut random, n, 320, Scheme::Int4(64))], bias: None };
        let layer = Layer::new(&bed, &weight);
        let x = random.bf16s(rows * 320, 1.0);
        let out = bed.tensor(&vec![7.0; rows * columns], [rows, columns], dtype);
        layer.run(&bed.tensor(&x, [rows, 320], Dtype::Bf16), &out, first).unwrap();
        let on_cpu = backend.linear_weight(weight).unwrap();
        let want = backend.linear(&cpu_tensor(&backend, &x, [rows, 320]), &on_cpu).unwrap();
        let mut expected = vec![7.0; rows * columns];
        for (row, want) in expected.chunks_exact_mut(columns).zip(want.values().chunks_exact(n)) {
            row[first..first + n].copy_from_slice(want);
        }
        let what = format!("{dtype:?} from column {first} of {columns}");
        assert_close(&what, &bed.values(&out), &expected, columns, tolerance::KERNEL_BF16);
    }
}

#[test]
fn equal_inputs_give_equal_bits() {
    let (bed, mut random) = (Bed::new(), Random::new(33));
    for (scheme, rows) in [(Scheme::Int4(32), 40), (Scheme::Bf16, 130), (Scheme::Fp8, 520)] {
        let weight = LinearWeight { parts: vec![matrix(&mut random, 512, 1024, scheme)], bias: None };
        let layer = Layer::new(&bed, &weight);
        // The last row is the first.
        let mut x = random.bf16s(rows * 1024, 1.0);
        let first = x[..1024].to_vec();
        x[(rows - 1) * 1024..].copy_from_slice(&first);
        let got = layer.values(&x, Dtype::F32);
        assert!(got.iter().all(|v| v.is_finite()), "{scheme:?}");
        assert_eq!(got[..512], got[(rows - 1) * 512..], "{scheme:?}");
        assert_eq!(got, layer.values(&x, Dtype::F32), "{scheme:?}");
    }
}

/// What follows a layer inside its kernel has the bits of the two operations, and the CPU backend's values.
#[test]
fn what_follows_a_layer_is_the_same_in_one_launch() {
    let (bed, mut random, backend) = (Bed::new(), Random::new(35), cpu(Dtype::Bf16));
    let (kernels, pool) = (&bed.kernels, Pool::new(&bed.bytes(64 << 20)));
    // One launch; parts of k; few rows; columns that are no vectors; another scheme.
    for (n, k, rows, scheme) in [
        (1152, 432, 700, Scheme::Bf16),
        (200, 128, 5000, Scheme::Bf16),
        (128, 1152, 100, Scheme::Bf16),
        (64, 96, 9, Scheme::Bf16),
        (36, 64, 600, Scheme::Bf16),
        (512, 256, 300, Scheme::Int4(64)),
    ] {
        let weight = LinearWeight {
            parts: vec![matrix(&mut random, n, k, scheme)],
            bias: Some(random.normals(n, 1.0)),
        };
        let host = PackedHost::pack_parts(&weight).unwrap();
        let layer = Linear::upload(&bed.stream, &bed.bytes(Linear::num_bytes(&host)), &host).unwrap();
        let (x, sum) = (random.bf16s(rows * k, 1.0), random.bf16s(rows * n, 2.0));
        let on_cpu = backend.linear_weight(weight).unwrap();
        let x_on_cpu = cpu_tensor(&backend, &x, [rows, k]);
        let x = bed.tensor(&x, [rows, k], Dtype::Bf16);
        let plain = bed.empty([rows, n], Dtype::Bf16);
        kernels.linear(&bed.stream, &pool, &x, &layer, &plain).unwrap();
        let activations = [Activation::GeluTanh, Activation::GeluErf, Activation::Silu].map(After::Activate);
        for after in [activations[0], activations[1], activations[2], After::Add] {
            let what = format!("{rows} rows of {n} x {k} {scheme:?}, {after:?}");
            let (got, want) = (bed.tensor(&sum, [rows, n], Dtype::Bf16), bed.empty([rows, n], Dtype::Bf16));
            kernels.linear_then(&bed.stream, &pool, &x, &layer, after, &got).unwrap();
            let mut cpu_want = cpu_tensor(&backend, &sum, [rows, n]);
            match after {
                After::Activate(activation) => {
                    bed.stream.copy(want.slice(), plain.slice()).unwrap();
                    kernels.activate(&bed.stream, &want, activation).unwrap();
                    cpu_want = backend.linear_activate(&x_on_cpu, &on_cpu, activation).unwrap();
                }
                After::Add => {
                    bed.stream.copy(want.slice(), bed.tensor(&sum, [rows, n], Dtype::Bf16).slice()).unwrap();
                    kernels.add(&bed.stream, &want, &plain).unwrap();
                    backend.linear_add(&mut cpu_want, &x_on_cpu, &on_cpu).unwrap();
                }
            }
            let got = bed.values(&got);
            assert_close(&what, &got, cpu_want.values(), n, tolerance::KERNEL_BF16);
            assert_close(&format!("{what}, bits"), &got, &bed.values(&want), n, f64::MIN_POSITIVE);
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let (bed, mut random) = (Bed::new(), Random::new(34));
    let weight = LinearWeight { parts: vec![matrix(&mut random, 32, 128, Scheme::Bf16)], bias: None };
    let layer = Layer::new(&bed, &weight);
    let empty = |rows, columns, dtype| bed.empty([rows, columns], dtype);
    let (x, out) = (empty(70, 128, Dtype::Bf16), empty(70, 40, Dtype::Bf16));
    assert!(layer.run(&x, &out, 8).is_ok());
    let error = layer.run(&x, &out, 9).unwrap_err().to_string();
    assert_eq!(error, "gemm: expected 32 columns from 9 on, got 40");
    assert!(layer.run(&x, &out, usize::MAX).is_err());
    assert!(layer.run(&empty(70, 128, Dtype::F32), &out, 0).is_err());
    assert!(layer.run(&empty(70, 64, Dtype::Bf16), &out, 0).is_err());
    assert!(layer.run(&empty(69, 128, Dtype::Bf16), &out, 0).is_err());
    bed.stream.synchronize().unwrap();
}

#[test]
fn measurements_of_products_with_many_rows() {
    let gpu = super::gpu();
    println!("{}", spark_cuda::bench_gemm::run(&gpu.device, &gpu.kernels).unwrap());
}

#[test]
fn measurements_of_ways_to_cut_products() {
    let gpu = super::gpu();
    for (what, micros) in spark_cuda::bench_gemm::cuts(&gpu.device, &gpu.kernels).unwrap() {
        println!("{what:70} {micros:9.2} us");
    }
}
