//! Layers of experts against the CPU backend.

use spark_backend::{Backend, Bytes, Dtype, ExpertsWeight, LinearWeight, Matrix, MatrixData};
use spark_cuda::{Choice, DeviceSlice, Experts, ExpertsHost, MAX_PAIRS};
use spark_testing::{Random, rel_err, tolerance};

use super::linear::{SCHEMES, Scheme, matrix};
use super::{Bed, cpu, cpu_tensor};

/// A layer and its sizes.
struct Layer {
    weight: ExpertsWeight,
    hidden: usize,
}

impl Layer {
    fn new(
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

    fn upload(&self, bed: &Bed) -> Experts {
        let host = ExpertsHost::pack(&self.weight).unwrap();
        Experts::upload(&bed.stream, &bed.bytes(host.num_bytes()), &host).unwrap()
    }
}

fn run(bed: &Bed, experts: &Experts, x: &[f32], chosen: &[u32], weights: &[f32]) -> Vec<f32> {
    let shape = [x.len() / experts.hidden(), experts.hidden()];
    let top_k = chosen.len() / shape[0];
    let choice = Choice { experts: bed.upload(chosen), weights: bed.upload(weights), top_k };
    let scratch = bed.bytes(experts.scratch_bytes(shape[0], top_k).unwrap());
    let (x, out) = (bed.tensor(x, shape, Dtype::Bf16), bed.empty(shape, Dtype::Bf16));
    bed.kernels.moe_mlp(&bed.stream, &x, &choice, experts, &scratch, &out).unwrap();
    bed.values(&out)
}

#[test]
fn experts_are_the_cpu_backends() {
    let (bed, mut random, backend) = (Bed::new(), Random::new(21), cpu(Dtype::Bf16));
    // (experts, hidden, intermediate, rows, top_k): the smallest, tails everywhere, more than 8 rows of an expert, the 30B's
    // shape with few experts.
    for (num_experts, hidden, intermediate, rows, top_k) in [
        (1, 16, 16, 1, 1),
        (5, 80, 48, 3, 2),
        (3, 272, 160, 40, 3),
        (16, 2048, 768, 1, 8),
        (16, 2048, 768, 9, 8),
    ] {
        for scheme in SCHEMES {
            let layer = Layer::new(&mut random, num_experts, [hidden, intermediate], scheme);
            let experts = layer.upload(&bed);
            let on_cpu = backend.experts_weight(layer.weight).unwrap();
            let router: Vec<u8> =
                random.normals(num_experts * hidden, 1.0).iter().flat_map(|v| v.to_le_bytes()).collect();
            let data = MatrixData::Dense { dtype: Dtype::F32, values: Bytes::from(router) };
            let parts = vec![Matrix { n: num_experts, k: hidden, data }];
            let router = backend.linear_weight(LinearWeight { parts, bias: None }).unwrap();

            let mut residual = cpu_tensor(&backend, &random.normals(rows * hidden, 1.0), [rows, hidden]);
            let norm = cpu_tensor(&backend, &vec![0.1; hidden], [1, hidden]);
            let (x, routing) =
                backend.reduce_norm_route(None, &mut residual, &norm, 1e-6, &router, top_k, true).unwrap();
            let want = backend.moe_mlp(&x, &routing, &on_cpu).unwrap();
            let got = run(&bed, &experts, x.values(), routing.experts(), routing.weights());
            let error = rel_err(&got, want.values());
            assert!(
                error < tolerance::KERNEL_BF16,
                "{num_experts} x {hidden} x {intermediate} {scheme:?}, {rows} rows: {error}"
            );
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_in_a_batch_and_in_any_order_of_its_experts() {
    let (bed, mut random) = (Bed::new(), Random::new(22));
    let (num_experts, rows, top_k) = (6, 24, 4);
    let layer = Layer::new(&mut random, num_experts, [256, 96], Scheme::Int4(32));
    let (experts, hidden) = (layer.upload(&bed), layer.hidden);
    let x = random.bf16s(rows * hidden, 0.2);
    let mut chosen = Vec::new();
    for _ in 0..rows {
        let mut order: Vec<u32> = (0..num_experts as u32).collect();
        random.shuffle(&mut order);
        chosen.extend_from_slice(&order[..top_k]);
    }
    let weights: Vec<f32> = (0..rows * top_k).map(|_| random.unit()).collect();
    let all = run(&bed, &experts, &x, &chosen, &weights);
    for row in [0, 11, 23] {
        let range = row * top_k..(row + 1) * top_k;
        let x = &x[row * hidden..][..hidden];
        let alone = run(&bed, &experts, x, &chosen[range.clone()], &weights[range.clone()]);
        assert_eq!(alone, all[row * hidden..][..hidden], "row {row}");
        let reversed: Vec<u32> = chosen[range.clone()].iter().rev().copied().collect();
        let reversed_weights: Vec<f32> = weights[range].iter().rev().copied().collect();
        assert_eq!(run(&bed, &experts, x, &reversed, &reversed_weights), alone, "row {row}");
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let (bed, mut random) = (Bed::new(), Random::new(23));
    let experts = Layer::new(&mut random, 2, [64, 32], Scheme::Nvfp4).upload(&bed);
    let (x, out) = (bed.empty([2, 64], Dtype::Bf16), bed.empty([2, 64], Dtype::Bf16));
    let scratch = bed.bytes(experts.scratch_bytes(2, 2).unwrap());
    let choice = |len: usize, top_k: usize| Choice {
        experts: bed.upload(&vec![0u32; len]),
        weights: bed.upload(&vec![0f32; len]),
        top_k,
    };
    let moe = |choice: &Choice, scratch: &DeviceSlice| {
        bed.kernels.moe_mlp(&bed.stream, &x, choice, &experts, scratch, &out)
    };
    assert!(moe(&choice(2, 1), &scratch).is_ok());
    assert!(moe(&choice(3, 2), &scratch).is_err());
    assert!(moe(&choice(6, 3), &scratch).is_err());
    assert!(moe(&choice(4, 2), &bed.bytes(256)).is_err());
    assert!(moe(&choice(4, 2), x.slice()).is_err());
    assert!(experts.scratch_bytes(usize::MAX, 2).is_err());
    let mut unaligned = choice(4, 2);
    unaligned.weights = bed.bytes(18).slice(2, 16).unwrap();
    let error = moe(&unaligned, &scratch).unwrap_err().to_string();
    assert!(error.contains("start at a multiple of 4"), "{error}");
    let rows = MAX_PAIRS + 1;
    let many = [bed.empty([rows, 64], Dtype::Bf16), bed.empty([rows, 64], Dtype::Bf16)];
    let error = bed
        .kernels
        .moe_mlp(&bed.stream, &many[0], &choice(rows, 1), &experts, &scratch, &many[1])
        .unwrap_err();
    assert!(error.to_string().contains("at most 1024 chosen experts"), "{error}");
    bed.stream.synchronize().unwrap();
}
