//! Layers of experts with many rows against the CPU backend. Few rows are in `moe.rs`.

use spark_backend::Dtype;
use spark_cuda::{Choice, Experts, Pool};
use spark_testing::{Random, tolerance};

use super::gemm::{SCHEMES, Scheme, assert_close};
use super::moe::Layer;
use super::{Bed, cpu};

struct Run<'a> {
    bed: &'a Bed,
    pool: Pool,
    experts: Experts,
}

impl<'a> Run<'a> {
    fn new(bed: &'a Bed, layer: &Layer) -> Self {
        Self { bed, pool: Pool::new(&bed.bytes(192 << 20)), experts: layer.upload(bed) }
    }

    fn values(&self, x: &[f32], chosen: &[u32], weights: &[f32]) -> Vec<f32> {
        let (bed, hidden) = (self.bed, self.experts.hidden());
        let shape = [x.len() / hidden, hidden];
        let top_k = chosen.len() / shape[0];
        let choice = Choice::new(bed.upload(chosen), bed.upload(weights), top_k);
        let (x, out) = (bed.tensor(x, shape, Dtype::Bf16), bed.empty(shape, Dtype::Bf16));
        bed.kernels.moe_gemm(&bed.stream, &self.pool, &x, &choice, &self.experts, &out).unwrap();
        bed.values(&out)
    }
}

/// (experts, hidden, intermediate, rows, top_k)
fn over_sizes(cases: &[(usize, usize, usize, usize, usize)], schemes: &[Scheme]) {
    let (bed, mut random, backend) = (Bed::new(), Random::new(41), cpu(Dtype::Bf16));
    for &(num_experts, hidden, intermediate, rows, top_k) in cases {
        for &scheme in schemes {
            let layer = Layer::new(&mut random, num_experts, [hidden, intermediate], scheme);
            let run = Run::new(&bed, &layer);
            let (x, routing, want) = layer.routed_on_cpu(&backend, &mut random, rows, top_k);
            let mut want = want.values().to_vec();
            let mut chosen = routing.experts().to_vec();
            // Rows that only fill up a step.
            let num_real = rows - rows / 7;
            chosen[num_real * top_k..].fill(u32::MAX);
            want[num_real * hidden..].fill(0.0);
            let got = run.values(x.values(), &chosen, routing.weights());
            let what = format!("{num_experts} x {hidden} x {intermediate} {scheme:?}, {rows} rows");
            assert_close(&what, &got, &want, hidden, tolerance::KERNEL_BF16);
        }
    }
}

#[test]
fn experts_for_many_rows_are_the_cpu_backends() {
    // The smallest, tails everywhere, several tiles of an expert, each size of tiles.
    let cases = [
        (1, 16, 16, 1, 1),
        (5, 80, 48, 3, 2),
        (3, 272, 160, 400, 3),
        (16, 144, 96, 130, 8),
        (64, 128, 64, 200, 8),
        (16, 256, 112, 90, 8),
        (12, 192, 208, 1100, 5),
    ];
    over_sizes(&cases, &SCHEMES);
}

#[test]
fn experts_of_the_model_for_many_rows() {
    over_sizes(
        &[(16, 2048, 768, 129, 8), (8, 2048, 768, 600, 4)],
        &[Scheme::Int4(128), Scheme::Nvfp4, Scheme::Bf16],
    );
}

/// So many pairs that the sort has several blocks, and that results come a few columns at a time.
#[test]
fn many_pairs_come_in_several_pieces() {
    over_sizes(&[(128, 2048, 32, 3000, 8)], &[Scheme::Int4(128)]);
}

#[test]
fn equal_inputs_give_equal_bits_in_any_order_of_a_rows_experts() {
    let (bed, mut random) = (Bed::new(), Random::new(42));
    let (num_experts, rows, top_k, hidden) = (6, 300, 4, 256);
    let run = Run::new(&bed, &Layer::new(&mut random, num_experts, [hidden, 96], Scheme::Int4(32)));
    let x = random.bf16s(rows * hidden, 0.2);
    let mut chosen = Vec::new();
    for _ in 0..rows {
        let mut order: Vec<u32> = (0..num_experts as u32).collect();
        random.shuffle(&mut order);
        chosen.extend_from_slice(&order[..top_k]);
    }
    let weights: Vec<f32> = (0..rows * top_k).map(|_| random.unit()).collect();
    let got = run.values(&x, &chosen, &weights);
    assert!(got.iter().all(|v| v.is_finite()));
    assert_eq!(got, run.values(&x, &chosen, &weights));
    let reversed: Vec<u32> = chosen.chunks(top_k).flat_map(|row| row.iter().rev().copied()).collect();
    let reversed_weights: Vec<f32> =
        weights.chunks(top_k).flat_map(|row| row.iter().rev().copied()).collect();
    assert_eq!(got, run.values(&x, &reversed, &reversed_weights));
}

#[test]
fn wrong_shapes_are_refused() {
    let (bed, mut random) = (Bed::new(), Random::new(43));
    let run = Run::new(&bed, &Layer::new(&mut random, 2, [64, 32], Scheme::Nvfp4));
    let (x, out) = (bed.empty([200, 64], Dtype::Bf16), bed.empty([200, 64], Dtype::Bf16));
    let choice = |len: usize, top_k: usize| {
        Choice::new(bed.upload(&vec![0u32; len]), bed.upload(&vec![0f32; len]), top_k)
    };
    let moe = |choice: &Choice, pool: &Pool| {
        bed.kernels.moe_gemm(&bed.stream, pool, &x, choice, &run.experts, &out)
    };
    assert!(moe(&choice(400, 2), &run.pool).is_ok());
    assert!(moe(&choice(399, 2), &run.pool).is_err());
    assert!(moe(&choice(600, 3), &run.pool).is_err());
    assert!(moe(&choice(400, 0), &run.pool).is_err());
    assert!(moe(&choice(400, 2), &Pool::new(&bed.bytes(4096))).is_err());
    bed.stream.synchronize().unwrap();
}
