//! Layers of experts with many rows against the CPU backend. Few rows are in `moe.rs`.

use spark_backend::{Backend, Bytes, Dtype, ExpertsWeight, LinearWeight, Matrix, MatrixData};
use spark_cuda::{Choice, Experts, ExpertsHost, Pool};
use spark_testing::{Random, tolerance};

use super::gemm::{SCHEMES, Scheme, assert_close, matrix};
use super::{Bed, cpu, cpu_tensor};

fn layer(
    random: &mut Random,
    num_experts: usize,
    [hidden, intermediate]: [usize; 2],
    scheme: Scheme,
) -> ExpertsWeight {
    let experts = (0..num_experts)
        .map(|_| {
            let part = |random: &mut Random| matrix(random, intermediate, hidden, scheme);
            let gate_up = LinearWeight { parts: vec![part(random), part(random)], bias: None };
            let down = vec![matrix(random, hidden, intermediate, scheme)];
            (gate_up, LinearWeight { parts: down, bias: None })
        })
        .collect();
    ExpertsWeight { experts }
}

fn upload(bed: &Bed, weight: &ExpertsWeight) -> Experts {
    let host = ExpertsHost::pack(weight).unwrap();
    Experts::upload(&bed.stream, &bed.bytes(host.num_bytes()), &host).unwrap()
}

struct Run<'a> {
    bed: &'a Bed,
    pool: Pool,
    experts: Experts,
}

impl<'a> Run<'a> {
    fn new(bed: &'a Bed, weight: &ExpertsWeight) -> Self {
        Self { bed, pool: Pool::new(&bed.bytes(192 << 20)), experts: upload(bed, weight) }
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
            let weight = layer(&mut random, num_experts, [hidden, intermediate], scheme);
            let run = Run::new(&bed, &weight);
            let on_cpu = backend.experts_weight(weight).unwrap();
            let router: Vec<u8> =
                random.normals(num_experts * hidden, 1.0).iter().flat_map(|v| v.to_le_bytes()).collect();
            let data = MatrixData::Dense { dtype: Dtype::F32, values: Bytes::from(router) };
            let parts = vec![Matrix { n: num_experts, k: hidden, data }];
            let router = backend.linear_weight(LinearWeight { parts, bias: None }).unwrap();
            let mut residual = cpu_tensor(&backend, &random.normals(rows * hidden, 1.0), [rows, hidden]);
            let norm = cpu_tensor(&backend, &vec![0.1; hidden], [1, hidden]);
            let (x, routing) =
                backend.reduce_norm_route(None, &mut residual, &norm, 1e-6, &router, top_k, true).unwrap();
            let mut want = backend.moe_mlp(&x, &routing, &on_cpu).unwrap().values().to_vec();
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
    let run = Run::new(&bed, &layer(&mut random, num_experts, [hidden, 96], Scheme::Int4(32)));
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
    let run = Run::new(&bed, &layer(&mut random, 2, [64, 32], Scheme::Nvfp4));
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
