//! Linear layers for few rows against float64 sums and the CPU backend, and the choice of kernels. Many rows are in `gemm.rs`,
//! experts in `moe.rs`.

use spark_backend::{Backend, Dtype, LinearWeight};
use spark_cuda::{Linear, MAX_DECODE_ROWS, PackedHost, Pool, Tensor};
use spark_testing::{Random, tolerance};

use super::gemm::{SCHEMES, Scheme, assert_close, matrix};
use super::{Bed, cpu, cpu_tensor};

/// Weights are exact in bf16 up to a float32 scale, sums are float32, and tensor cores cut them off instead of rounding: as in
/// `gemm.rs`. A wrong weight costs 1e-2.
const FLOAT_SUMS: f64 = 3e-5;

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
    pool: Pool,
    weight: Linear,
}

impl<'a> Layer<'a> {
    fn new(bed: &'a Bed, weight: &LinearWeight) -> Self {
        let host = PackedHost::pack_parts(weight).unwrap();
        let slice = bed.bytes(Linear::num_bytes(&host));
        let weight = Linear::upload(&bed.stream, &slice, &host).unwrap();
        Self { bed, pool: Pool::new(&bed.bytes(32 << 20)), weight }
    }

    fn run(&self, x: &Tensor, out: &Tensor) -> spark_cuda::Result<()> {
        self.bed.kernels.linear(&self.bed.stream, &self.pool, x, &self.weight, out)
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
    // The smallest, tails in every dimension, one whole tile, a half and a quarter of an expert, real projections; one with more
    // tiles of 32 rows than a GPU has multiprocessors.
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
        [5136, 272],
    ] {
        for scheme in SCHEMES {
            let bias = (n % 2 == 0).then(|| random.normals(n, 1.0));
            let weight = LinearWeight { parts: vec![matrix(&mut random, n, k, scheme)], bias };
            let (layer, backend) = (Layer::new(&bed, &weight), cpu(Dtype::Bf16));
            let on_cpu = backend.linear_weight(weight.clone()).unwrap();
            let x = random.bf16s(MAX_DECODE_ROWS * k, 1.0);
            let exact = reference(&x, &weight);
            let on_cpu_x = cpu_tensor(&backend, &x, [MAX_DECODE_ROWS, k]);
            let rounded = backend.linear(&on_cpu_x, &on_cpu).unwrap();
            for rows in [1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 128] {
                let x = &x[..rows * k];
                let what = format!("{n} x {k} {scheme:?}, {rows} rows");
                assert_close(&what, &layer.values(x, Dtype::F32), &exact[..rows * n], n, FLOAT_SUMS);
                let want = &rounded.values()[..rows * n];
                assert_close(&what, &layer.values(x, Dtype::Bf16), want, n, tolerance::KERNEL_BF16);
            }
        }
    }
}

/// A wide k: every warp goes round its ring of stages, many times with the schemes that have short spans.
#[test]
fn linear_over_many_inputs() {
    let (bed, mut random) = (Bed::new(), Random::new(15));
    let (n, k) = (40, 12_304);
    for scheme in SCHEMES {
        let weight = LinearWeight { parts: vec![matrix(&mut random, n, k, scheme)], bias: None };
        let layer = Layer::new(&bed, &weight);
        let x = random.bf16s(40 * k, 1.0);
        let exact = reference(&x, &weight);
        for rows in [1, 12, 20, 40] {
            let got = layer.values(&x[..rows * k], Dtype::F32);
            assert_close(&format!("{scheme:?}, {rows} rows"), &got, &exact[..rows * n], n, 2e-4);
        }
    }
}

#[test]
fn parts_with_outputs_side_by_side() {
    let (bed, mut random) = (Bed::new(), Random::new(12));
    // NVFP4 parts differ in their factors; mixed schemes are parts of their own.
    let mixed = [(40, Scheme::Bf16), (7, Scheme::Int4(128)), (9, Scheme::Int4(128)), (16, Scheme::Fp8)];
    for parts in [
        [40, 7, 16].map(|n| (n, Scheme::Int4(128))).to_vec(),
        [40, 7, 16].map(|n| (n, Scheme::Nvfp4)).to_vec(),
        mixed.to_vec(),
    ] {
        let n: usize = parts.iter().map(|&(n, _)| n).sum();
        let matrices = parts.iter().map(|&(n, scheme)| matrix(&mut random, n, 256, scheme)).collect();
        let weight = LinearWeight { parts: matrices, bias: Some(random.normals(n, 1.0)) };
        let layer = Layer::new(&bed, &weight);
        // With many rows too: the columns are the same.
        for rows in [5, MAX_DECODE_ROWS, MAX_DECODE_ROWS + 1] {
            let x = random.bf16s(rows * 256, 1.0);
            let what = format!("{parts:?}, {rows} rows");
            assert_close(&what, &layer.values(&x, Dtype::F32), &reference(&x, &weight), n, 1e-4);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_a_batch() {
    let (bed, mut random) = (Bed::new(), Random::new(13));
    // With few and with many blocks.
    for [n, k] in [[768, 2048], [5120, 384], [2080, 4304]] {
        for scheme in SCHEMES {
            let weight = LinearWeight { parts: vec![matrix(&mut random, n, k, scheme)], bias: None };
            let layer = Layer::new(&bed, &weight);
            let x = random.bf16s(MAX_DECODE_ROWS * k, 1.0);
            let all = layer.values(&x, Dtype::F32);
            for rows in [1, 7, 8, 12, 20, 33, 64, 65] {
                let got = layer.values(&x[..rows * k], Dtype::F32);
                assert_eq!(got, all[..rows * n], "{n} x {k} {scheme:?}, {rows} rows");
            }
            assert_eq!(layer.values(&x[127 * k..], Dtype::F32), all[127 * n..], "{scheme:?}");
        }
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
    let none = |columns| Tensor::new(out.slice(), [0, columns], Dtype::Bf16).unwrap();
    assert!(layer.run(&none(128), &none(32)).is_ok());
    assert!(layer.run(&empty(2, 128, Dtype::F32), &out).is_err());
    assert!(layer.run(&empty(2, 64, Dtype::Bf16), &out).is_err());
    assert!(layer.run(&empty(3, 128, Dtype::Bf16), &out).is_err());
    assert!(layer.run(&empty(2, 128, Dtype::Bf16), &empty(2, 64, Dtype::Bf16)).is_err());
    bed.stream.synchronize().unwrap();
}
