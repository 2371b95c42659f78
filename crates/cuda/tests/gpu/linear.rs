//! Linear layers with 4-bit weights against float64 sums and the CPU backend. Experts are in `moe.rs`.

use half::f16;
use spark_backend::{Backend, Dtype, LinearWeight, Matrix, MatrixData};
use spark_cuda::{PackedHost, PackedWeight, Tensor};
use spark_testing::{Random, rel_err, tolerance};

use super::{Bed, cpu, cpu_tensor};

/// A scheme: 4-bit integers with a group size, or NVFP4.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scheme {
    Int4(usize),
    Nvfp4,
}

/// Codes and scales are exact, sums are float32, and tensor cores cut them off instead of rounding: 128 + code is twenty times
/// as large as what is left after the zero point, so 8 additions of 2^-23 each may cost 2e-5. A wrong weight costs 1e-2.
const FLOAT_SUMS: f64 = 3e-5;

pub(crate) const SCHEMES: [Scheme; 4] =
    [Scheme::Int4(32), Scheme::Int4(64), Scheme::Int4(128), Scheme::Nvfp4];

pub(crate) fn matrix(random: &mut Random, n: usize, k: usize, scheme: Scheme) -> Matrix {
    let Scheme::Int4(group_size) = scheme else {
        // Scales without sign and NaN, up to 14: with codes up to 6, sums of thousands.
        let scales: Vec<u8> = random.bytes(n * k / 16).into_iter().map(|byte| byte % 0x58).collect();
        let codes = random.bytes(n * k / 2).into();
        return Matrix {
            n,
            k,
            data: MatrixData::Nvfp4 { codes, scales: scales.into(), alpha: random.uniform(0.001, 0.01) },
        };
    };
    let groups = n * k.div_ceil(group_size);
    let scales: Vec<u8> =
        (0..groups).flat_map(|_| f16::from_f32(random.uniform(0.002, 0.02)).to_le_bytes()).collect();
    let zeros: Vec<u8> = (0..groups).map(|_| random.below(16) as u8).collect();
    let data = MatrixData::Int4 {
        codes: random.bytes(n * k / 2).into(),
        zeros: Some(zeros.into()),
        scales: scales.into(),
        scale_dtype: Dtype::F16,
        group_size,
    };
    Matrix { n, k, data }
}

/// `x W^T + bias` in float64.
fn reference(x: &[f32], weight: &LinearWeight) -> Vec<f32> {
    let (n, k) = (weight.n(), weight.k());
    let w: Vec<f32> = weight.parts.iter().flat_map(|part| spark_cpu::dequantize(part).unwrap()).collect();
    let mut out = Vec::with_capacity(x.len() / k * n);
    for row in x.chunks_exact(k) {
        for (i, w) in w.chunks_exact(k).enumerate() {
            let sum: f64 = row.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            out.push((sum + weight.bias.as_ref().map_or(0.0, |bias| f64::from(bias[i]))) as f32);
        }
    }
    out
}

struct Layer<'a> {
    bed: &'a Bed,
    weight: PackedWeight,
}

impl<'a> Layer<'a> {
    fn new(bed: &'a Bed, weight: &LinearWeight) -> Self {
        let host = PackedHost::pack(weight).unwrap();
        let slice = bed.bytes(PackedWeight::num_bytes(&host));
        Self { bed, weight: PackedWeight::upload(&bed.stream, &slice, &host).unwrap() }
    }

    fn run(&self, x: &Tensor, out: &Tensor) -> spark_cuda::Result<()> {
        self.bed.kernels.linear(&self.bed.stream, x, &self.weight, out)
    }

    fn values(&self, x: &[f32], dtype: Dtype) -> Vec<f32> {
        let rows = x.len() / self.weight.k();
        let x = self.bed.tensor(x, [rows, self.weight.k()], Dtype::Bf16);
        let out = self.bed.empty([rows, self.weight.n()], dtype);
        self.run(&x, &out).unwrap();
        self.bed.values(&out)
    }
}

#[test]
fn linear_over_odd_and_real_sizes() {
    let (bed, mut random) = (Bed::new(), Random::new(11));
    // The smallest, tails in every dimension, one whole tile, a half and a quarter of an expert, real projections.
    for [n, k] in [
        [1, 16],
        [16, 64],
        [33, 96],
        [48, 208],
        [32, 128],
        [100, 384],
        [2048, 768],
        [512, 2048],
        [1536, 4096],
    ] {
        for scheme in SCHEMES {
            let bias = (n % 2 == 0).then(|| random.normals(n, 1.0));
            let weight = LinearWeight { parts: vec![matrix(&mut random, n, k, scheme)], bias };
            let (layer, backend) = (Layer::new(&bed, &weight), cpu(Dtype::Bf16));
            let on_cpu = backend.linear_weight(weight.clone()).unwrap();
            let x = random.bf16s(32 * k, 1.0);
            let exact = reference(&x, &weight);
            let rounded = backend.linear(&cpu_tensor(&backend, &x, [32, k]), &on_cpu).unwrap();
            for rows in [1, 3, 8, 9, 16, 17, 32] {
                let x = &x[..rows * k];
                let error = rel_err(&layer.values(x, Dtype::F32), &exact[..rows * n]);
                assert!(error < FLOAT_SUMS, "{n} x {k} {scheme:?}, {rows} rows: {error}");
                let error = rel_err(&layer.values(x, Dtype::Bf16), &rounded.values()[..rows * n]);
                assert!(error < tolerance::KERNEL_BF16, "{n} x {k} {scheme:?}, {rows} rows: {error}");
            }
        }
    }
}

#[test]
fn parts_with_outputs_side_by_side() {
    let (bed, mut random) = (Bed::new(), Random::new(12));
    for scheme in [Scheme::Int4(128), Scheme::Nvfp4] {
        // NVFP4 parts differ in their factors.
        let parts = [40, 7, 16].map(|n| matrix(&mut random, n, 256, scheme)).to_vec();
        let weight = LinearWeight { parts, bias: None };
        let x = random.bf16s(5 * 256, 1.0);
        let error = rel_err(&Layer::new(&bed, &weight).values(&x, Dtype::F32), &reference(&x, &weight));
        assert!(error < FLOAT_SUMS, "{scheme:?}: {error}");
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_a_batch() {
    let (bed, mut random) = (Bed::new(), Random::new(13));
    let (n, k) = (768, 2048);
    for scheme in SCHEMES {
        let weight = LinearWeight { parts: vec![matrix(&mut random, n, k, scheme)], bias: None };
        let layer = Layer::new(&bed, &weight);
        let x = random.bf16s(32 * k, 1.0);
        let all = layer.values(&x, Dtype::F32);
        for rows in [1, 7, 8, 12, 20] {
            assert_eq!(layer.values(&x[..rows * k], Dtype::F32), all[..rows * n], "{scheme:?}, {rows} rows");
        }
        assert_eq!(layer.values(&x[31 * k..], Dtype::F32), all[31 * n..], "{scheme:?}");
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let (bed, mut random) = (Bed::new(), Random::new(14));
    let weight = LinearWeight { parts: vec![matrix(&mut random, 32, 128, Scheme::Int4(128))], bias: None };
    let layer = Layer::new(&bed, &weight);
    let empty = |rows, columns, dtype| bed.empty([rows, columns], dtype);
    let out = empty(2, 32, Dtype::Bf16);
    assert!(layer.run(&empty(2, 128, Dtype::Bf16), &out).is_ok());
    assert!(layer.run(&empty(2, 128, Dtype::F32), &out).is_err());
    assert!(layer.run(&empty(2, 64, Dtype::Bf16), &out).is_err());
    assert!(layer.run(&empty(3, 128, Dtype::Bf16), &out).is_err());
    let error = layer.run(&empty(33, 128, Dtype::Bf16), &empty(33, 32, Dtype::Bf16)).unwrap_err();
    assert_eq!(error.to_string(), "linear: expected at most 32 rows, got 33");
    bed.stream.synchronize().unwrap();
}
