//! Layers of experts for few rows against the CPU backend. Many rows are in `moe_gemm.rs`, the router in `router.rs`.

use spark_backend::{Backend, Bytes, Dtype, ExpertsWeight, LinearWeight, Matrix, MatrixData, RouterSpec};
use spark_cpu::{CpuBackend, CpuLinear, CpuTensor, Routing};
use spark_cuda::{Choice, Experts, ExpertsHost, Pool};
use spark_testing::{Random, tolerance};

use super::gemm::{SCHEMES, Scheme, assert_close, matrix};
use super::{Bed, cpu, cpu_tensor};

/// A router of the CPU backend whose `num_experts` experts are all held.
pub(crate) fn all_of(
    router: &CpuLinear,
    num_experts: usize,
    top_k: usize,
    renormalize: bool,
) -> RouterSpec<'_, CpuBackend> {
    RouterSpec { router, top_k, renormalize, experts: 0..num_experts }
}

/// A layer and its sizes.
pub(crate) struct Layer {
    pub(crate) weight: ExpertsWeight,
    pub(crate) hidden: usize,
}

/// Rows, their experts and the layer's result, on the CPU.
type Routed = (CpuTensor, Routing, CpuTensor);

impl Layer {
    pub(crate) fn new(
        random: &mut Random,
        num_experts: usize,
        [hidden, intermediate]: [usize; 2],
        scheme: Scheme,
    ) -> Self {
        let experts = (0..num_experts)
            .map(|_| {
                let part = |random: &mut Random| matrix(random, intermediate, hidden, scheme);
                let gate_up = LinearWeight { parts: vec![part(random), part(random)], bias: None };
                let down = vec![matrix(random, hidden, intermediate, scheme)];
                (gate_up, LinearWeight { parts: down, bias: None })
            })
            .collect();
        Self { weight: ExpertsWeight { experts }, hidden }
    }

    pub(crate) fn upload(&self, bed: &Bed) -> Experts {
        let host = ExpertsHost::pack(&self.weight).unwrap();
        Experts::upload(&bed.stream, &bed.bytes(host.num_bytes()), &host).unwrap()
    }

    /// Random rows, routed by a random router, through this layer on the CPU.
    pub(crate) fn routed_on_cpu(
        self,
        backend: &CpuBackend,
        random: &mut Random,
        rows: usize,
        top_k: usize,
    ) -> Routed {
        let Self { weight, hidden } = self;
        let num_experts = weight.experts.len();
        let on_cpu = backend.experts_weight(weight).unwrap();
        let router: Vec<u8> =
            random.normals(num_experts * hidden, 1.0).iter().flat_map(|v| v.to_le_bytes()).collect();
        let data = MatrixData::Dense { dtype: Dtype::F32, values: Bytes::from(router) };
        let parts = vec![Matrix { n: num_experts, k: hidden, data }];
        let router = backend.linear_weight(LinearWeight { parts, bias: None }).unwrap();
        let mut residual = cpu_tensor(backend, &random.normals(rows * hidden, 1.0), [rows, hidden]);
        let norm = cpu_tensor(backend, &vec![0.1; hidden], [1, hidden]);
        let (x, routing) = backend
            .reduce_norm_route(None, &mut residual, &norm, 1e-6, &all_of(&router, num_experts, top_k, true))
            .unwrap();
        let out = backend.moe_mlp(&x, &routing, &on_cpu).unwrap();
        (x, routing, out)
    }
}

fn run(bed: &Bed, experts: &Experts, x: &[f32], chosen: &[u32], weights: &[f32]) -> Vec<f32> {
    let shape = [x.len() / experts.hidden(), experts.hidden()];
    let top_k = chosen.len() / shape[0];
    let choice = Choice::new(bed.upload(chosen), bed.upload(weights), top_k);
    let pool = Pool::new(&bed.bytes(16 << 20));
    let (x, out) = (bed.tensor(x, shape, Dtype::Bf16), bed.empty(shape, Dtype::Bf16));
    bed.kernels.moe_mlp(&bed.stream, &pool, &x, &choice, experts, &out).unwrap();
    bed.values(&out)
}

#[test]
fn experts_are_the_cpu_backends() {
    let (bed, mut random, backend) = (Bed::new(), Random::new(21), cpu(Dtype::Bf16));
    // (experts, hidden, intermediate, rows, top_k): the smallest, tails everywhere, more than 8, 16 and 32 rows of an expert, half a
    // tile of intermediate, more experts of a row than a block has warps, the 30B's and the 235B's shapes with few experts.
    for (num_experts, hidden, intermediate, rows, top_k) in [
        (1, 16, 16, 1, 1),
        (5, 80, 48, 1, 3),
        (5, 80, 48, 3, 2),
        (3, 272, 160, 40, 3),
        (4, 144, 16, 60, 2),
        (12, 64, 32, 1, 10),
        (16, 2048, 768, 1, 8),
        (16, 2048, 768, 2, 8),
        (16, 2048, 768, 9, 8),
        (9, 4096, 768, 1, 8),
        (9, 4096, 384, 12, 8),
    ] {
        for scheme in SCHEMES {
            let layer = Layer::new(&mut random, num_experts, [hidden, intermediate], scheme);
            let experts = layer.upload(&bed);
            let (x, routing, want) = layer.routed_on_cpu(&backend, &mut random, rows, top_k);
            let got = run(&bed, &experts, x.values(), routing.experts(), routing.weights());
            let what =
                format!("{num_experts} x {hidden} x {intermediate} {scheme:?}, {rows} rows of {top_k}");
            assert_close(&what, &got, want.values(), hidden, tolerance::KERNEL_BF16);
        }
    }
}

/// Experts of each row in any order, without repetition.
fn shuffled(random: &mut Random, num_experts: usize, rows: usize, top_k: usize) -> Vec<u32> {
    let mut chosen = Vec::new();
    for _ in 0..rows {
        let mut order: Vec<u32> = (0..num_experts as u32).collect();
        random.shuffle(&mut order);
        chosen.extend_from_slice(&order[..top_k]);
    }
    chosen
}

#[test]
fn a_row_has_the_same_bits_alone_in_a_batch_and_in_any_order_of_its_experts() {
    let (bed, mut random) = (Bed::new(), Random::new(22));
    for scheme in SCHEMES {
        // So many rows that experts have more than 8 and 16 pairs, so few that they have not.
        for rows in [2, 24, 60] {
            let (num_experts, top_k) = (6, 4);
            let layer = Layer::new(&mut random, num_experts, [272, 96], scheme);
            let (experts, hidden) = (layer.upload(&bed), layer.hidden);
            let x = random.bf16s(rows * hidden, 0.2);
            let chosen = shuffled(&mut random, num_experts, rows, top_k);
            let weights: Vec<f32> = (0..rows * top_k).map(|_| random.unit()).collect();
            let all = run(&bed, &experts, &x, &chosen, &weights);
            for row in [0, rows / 2, rows - 1] {
                let range = row * top_k..(row + 1) * top_k;
                let x = &x[row * hidden..][..hidden];
                let alone = run(&bed, &experts, x, &chosen[range.clone()], &weights[range.clone()]);
                assert_eq!(alone, all[row * hidden..][..hidden], "{scheme:?}, row {row} of {rows}");
                let reversed: Vec<u32> = chosen[range.clone()].iter().rev().copied().collect();
                let reversed_weights: Vec<f32> = weights[range].iter().rev().copied().collect();
                assert_eq!(
                    run(&bed, &experts, x, &reversed, &reversed_weights),
                    alone,
                    "{scheme:?}, row {row}"
                );
            }
        }
    }
}

/// Rows of padding have no experts, and a wrong number must not be followed: both count nothing.
#[test]
fn experts_that_do_not_exist_count_nothing() {
    let (bed, mut random) = (Bed::new(), Random::new(24));
    let (num_experts, top_k) = (5, 3);
    let layer = Layer::new(&mut random, num_experts, [128, 64], Scheme::Int4(64));
    let (experts, hidden) = (layer.upload(&bed), layer.hidden);
    for rows in [1, 7] {
        let x = random.bf16s(rows * hidden, 0.2);
        let mut chosen = shuffled(&mut random, num_experts, rows, top_k);
        let mut weights: Vec<f32> = (0..rows * top_k).map(|_| random.unit()).collect();
        let all = run(&bed, &experts, &x, &chosen, &weights);
        // The last row has none.
        chosen[(rows - 1) * top_k..].fill(u32::MAX);
        let got = run(&bed, &experts, &x, &chosen, &weights);
        assert_eq!(got[..(rows - 1) * hidden], all[..(rows - 1) * hidden]);
        assert!(got[(rows - 1) * hidden..].iter().all(|&v| v == 0.0), "{:?}", &got[(rows - 1) * hidden..]);
        // One of three is wrong: as if its weight were zero.
        chosen = shuffled(&mut random, num_experts, rows, top_k);
        let right = chosen.clone();
        for row in 0..rows {
            chosen[row * top_k + 1] = if row % 2 == 0 { num_experts as u32 } else { 0x8000_0001 };
            weights[row * top_k + 1] = 0.0;
        }
        let want = run(&bed, &experts, &x, &right, &weights);
        assert_eq!(run(&bed, &experts, &x, &chosen, &weights), want);
    }
}

#[test]
fn as_many_pairs_as_there_may_be() {
    let (bed, mut random, backend) = (Bed::new(), Random::new(25), cpu(Dtype::Bf16));
    // 1024 pairs, over more experts than threads sort, and all on two.
    for (num_experts, rows, top_k) in [(300, 128, 8), (2, 512, 2)] {
        let layer = Layer::new(&mut random, num_experts, [64, 32], Scheme::Nvfp4);
        let (experts, hidden) = (layer.upload(&bed), layer.hidden);
        let (x, routing, want) = layer.routed_on_cpu(&backend, &mut random, rows, top_k);
        let got = run(&bed, &experts, x.values(), routing.experts(), routing.weights());
        let what = format!("{num_experts} experts, {rows} rows of {top_k}");
        assert_close(&what, &got, want.values(), hidden, tolerance::KERNEL_BF16);
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let (bed, mut random) = (Bed::new(), Random::new(23));
    let experts = Layer::new(&mut random, 2, [64, 32], Scheme::Nvfp4).upload(&bed);
    let (x, out) = (bed.empty([2, 64], Dtype::Bf16), bed.empty([2, 64], Dtype::Bf16));
    let pool = Pool::new(&bed.bytes(1 << 20));
    let choice = |len: usize, top_k: usize| {
        Choice::new(bed.upload(&vec![0u32; len]), bed.upload(&vec![0f32; len]), top_k)
    };
    let moe =
        |choice: &Choice, pool: &Pool| bed.kernels.moe_mlp(&bed.stream, pool, &x, choice, &experts, &out);
    assert!(moe(&choice(2, 1), &pool).is_ok());
    assert!(moe(&choice(3, 2), &pool).is_err());
    assert!(moe(&choice(6, 3), &pool).is_err());
    assert!(moe(&choice(4, 2), &Pool::new(&bed.bytes(256))).is_err());
    let mut unaligned = choice(4, 2);
    unaligned.weights = bed.bytes(18).slice(2, 16).unwrap();
    let error = moe(&unaligned, &pool).unwrap_err().to_string();
    assert!(error.contains("start at a multiple of 4"), "{error}");
    let same = bed.kernels.moe_mlp(&bed.stream, &pool, &x, &choice(4, 2), &experts, &x);
    assert!(same.is_err());
    bed.stream.synchronize().unwrap();
}
