//! The router against the CPU backend, alone and in front of the experts.

use std::sync::{Mutex, MutexGuard, PoisonError};

use half::bf16;
use spark_backend::{Backend, Dtype, LinearWeight, Matrix, MatrixData};
use spark_cuda::{Choice, Linear, PackedHost, Pool, RouterRule};
use spark_testing::{Random, tolerance};

use super::gemm::{Scheme, assert_close, matrix};
use super::moe::{Layer, all_of};
use super::{Bed, cpu, cpu_tensor};

/// A `Kernels` routes on one stream at a time, and the tests share one.
static ROUTING: Mutex<()> = Mutex::new(());

pub(crate) fn alone() -> MutexGuard<'static, ()> {
    ROUTING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Small whole numbers over a power of two: sums are exact in any order, and equal logits are frequent.
fn coarse(random: &mut Random, len: usize, divisor: f32) -> Vec<f32> {
    (0..len).map(|_| (random.below(9) as f32 - 4.0) / divisor).collect()
}

pub(crate) fn dense(values: &[f32], n: usize, k: usize) -> LinearWeight {
    let bytes: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    let data = MatrixData::Dense { dtype: Dtype::Bf16, values: bytes.into() };
    LinearWeight { parts: vec![Matrix { n, k, data }], bias: None }
}

pub(crate) fn upload(bed: &Bed, weight: &LinearWeight) -> Linear {
    let host = PackedHost::pack_parts(weight).unwrap();
    Linear::upload(&bed.stream, &bed.bytes(Linear::num_bytes(&host)), &host).unwrap()
}

/// Experts and weights of a choice.
pub(crate) fn downloaded(bed: &Bed, choice: &Choice, rows: usize) -> (Vec<u32>, Vec<f32>) {
    let len = rows * choice.top_k;
    (bed.stream.download(&choice.experts, len).unwrap(), bed.stream.download(&choice.weights, len).unwrap())
}

#[test]
fn choices_are_the_cpu_backends() {
    let (bed, mut random, backend) = (Bed::new(), Random::new(71), cpu(Dtype::Bf16));
    let _alone = alone();
    let pool = Pool::new(&bed.bytes(64 << 20));
    // (experts, width, rows, top_k): the smallest, tails, the 30B, the 235B, the most experts; few rows, and many for the slow path.
    for (n, k, rows, top_k) in [
        (1, 16, 1, 1),
        (5, 48, 3, 5),
        (40, 208, 9, 3),
        (128, 2048, 1, 8),
        (128, 2048, 8, 8),
        (128, 4096, 33, 8),
        (128, 2048, 128, 8),
        (128, 2048, 129, 8),
        (256, 528, 20, 32),
        (256, 64, 700, 10),
    ] {
        for renormalize in [true, false] {
            let mut weight = dense(&coarse(&mut random, n * k, 64.0), n, k);
            weight.bias = (n % 2 == 0).then(|| coarse(&mut random, n, 8.0));
            let x = coarse(&mut random, rows * k, 8.0);
            let router = backend.linear_weight(weight.clone()).unwrap();
            // x goes through the norm of the CPU backend, whose call this is: take what comes out of it.
            let mut residual = cpu_tensor(&backend, &x, [rows, k]);
            let norm = cpu_tensor(&backend, &vec![1.0; k], [1, k]);
            let (x, want) = backend
                .reduce_norm_route(None, &mut residual, &norm, 1e-6, &all_of(&router, n, top_k, renormalize))
                .unwrap();
            let router = upload(&bed, &weight);
            let x = bed.tensor(x.values(), [rows, k], Dtype::Bf16);
            let choice = bed
                .kernels
                .route(&bed.stream, &pool, &x, &RouterRule::new(&router, top_k, renormalize))
                .unwrap();
            let (experts, weights) = downloaded(&bed, &choice, rows);
            // The norm makes x inexact, so a sum in another order may round a logit to its neighbour, which moves a choice.
            let differ: Vec<usize> = (0..rows)
                .filter(|&row| {
                    let range = row * top_k..(row + 1) * top_k;
                    experts[range.clone()] != want.experts()[range]
                })
                .collect();
            assert!(
                differ.len() <= rows / 8,
                "{n} x {k}, {rows} rows of {top_k}: rows {differ:?}, e.g. {:?} instead of {:?}",
                &experts[differ[0] * top_k..][..top_k],
                &want.experts()[differ[0] * top_k..][..top_k]
            );
            for row in (0..rows).filter(|row| !differ.contains(row)) {
                let range = row * top_k..(row + 1) * top_k;
                let (got, want) = (&weights[range.clone()], &want.weights()[range]);
                for (got, want) in got.iter().zip(want) {
                    assert!(
                        (got - want).abs() <= want.abs() * 0.02 + 1e-30,
                        "{n} x {k}: {got} for {want}, row {row}"
                    );
                }
            }
        }
    }
}

/// Inputs whose sums are exact, and so are the choices: ties go to the lower expert, by falling probability.
#[test]
fn exact_logits_give_exact_choices() {
    let (bed, mut random) = (Bed::new(), Random::new(72));
    let _alone = alone();
    let pool = Pool::new(&bed.bytes(64 << 20));
    for (n, k, rows, top_k) in [(7, 16, 5, 7), (128, 64, 40, 8), (200, 32, 100, 10), (128, 64, 300, 8)] {
        let weight = coarse(&mut random, n * k, 4.0);
        let x = coarse(&mut random, rows * k, 4.0);
        let router = upload(&bed, &dense(&weight, n, k));
        let x_tensor = bed.tensor(&x, [rows, k], Dtype::Bf16);
        let choice =
            bed.kernels.route(&bed.stream, &pool, &x_tensor, &RouterRule::new(&router, top_k, true)).unwrap();
        let (experts, weights) = downloaded(&bed, &choice, rows);
        for row in 0..rows {
            let logit = |e: usize| {
                let sum: f32 = (0..k).map(|i| x[row * k + i] * weight[e * k + i]).sum();
                bf16::from_f32(sum).to_f32()
            };
            let logits: Vec<f32> = (0..n).map(logit).collect();
            let mut order: Vec<u32> = (0..n as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            let got = &experts[row * top_k..][..top_k];
            assert_eq!(got, &order[..top_k], "{n} x {k}, row {row}: logits {logits:?}");
            let total: f32 = weights[row * top_k..][..top_k].iter().sum();
            assert!((total - 1.0).abs() < 0.03, "{total}");
        }
    }
}

#[test]
fn rows_of_padding_have_no_experts() {
    let (bed, mut random) = (Bed::new(), Random::new(73));
    let _alone = alone();
    let pool = Pool::new(&bed.bytes(64 << 20));
    let (n, k, top_k) = (16, 128, 4);
    let router = upload(&bed, &dense(&random.bf16s(n * k, 0.1), n, k));
    let layer = Layer::new(&mut random, n, [k, 64], Scheme::Int4(64));
    let experts = layer.upload(&bed);
    for (rows, real) in [(1, 1), (1, 0), (8, 5), (32, 9), (300, 299)] {
        let x = bed.tensor(&random.bf16s(rows * k, 1.0), [rows, k], Dtype::Bf16);
        let counts = bed.upload(&[real as u32, 7, 7, 0]);
        let route = |counts| {
            let rule = RouterRule { counts, ..RouterRule::new(&router, top_k, true) };
            bed.kernels.route(&bed.stream, &pool, &x, &rule).unwrap()
        };
        let (all, padded) = (route(None), route(Some(&counts)));
        let ((all_ids, all_weights), (ids, weights)) =
            (downloaded(&bed, &all, rows), downloaded(&bed, &padded, rows));
        assert_eq!(ids[..real * top_k], all_ids[..real * top_k]);
        assert_eq!(weights[..real * top_k], all_weights[..real * top_k]);
        assert!(ids[real * top_k..].iter().all(|&id| id == u32::MAX), "{ids:?}");
        let out = bed.empty([rows, k], Dtype::Bf16);
        bed.kernels.moe_mlp(&bed.stream, &pool, &x, &padded, &experts, &out).unwrap();
        let values = bed.values(&out);
        assert!(values[real * k..].iter().all(|&v| v == 0.0) && !values.iter().any(|v| v.is_nan()));
        assert!(real == 0 || values[..real * k].iter().any(|&v| v != 0.0));
    }
}

/// The lists that the router makes lead to the same bits as those made from its choice, and its counters are right again and
/// again.
#[test]
fn experts_behind_the_router() {
    let (bed, mut random, backend) = (Bed::new(), Random::new(74), cpu(Dtype::Bf16));
    let _alone = alone();
    let pool = Pool::new(&bed.bytes(64 << 20));
    let (n, k, top_k) = (24, 256, 8);
    let weight = dense(&random.bf16s(n * k, 0.1), n, k);
    let router = upload(&bed, &weight);
    let layer = Layer::new(&mut random, n, [k, 96], Scheme::Int4(128));
    let experts = layer.upload(&bed);
    let on_cpu = backend.experts_weight(layer.weight).unwrap();
    for rows in [1, 1, 2, 8, 9, 30, 64, 128, 1] {
        let values = random.bf16s(rows * k, 0.5);
        let x = bed.tensor(&values, [rows, k], Dtype::Bf16);
        let choice =
            bed.kernels.route(&bed.stream, &pool, &x, &RouterRule::new(&router, top_k, true)).unwrap();
        let plain = Choice::new(choice.experts.clone(), choice.weights.clone(), top_k);
        let outs = [&choice, &plain].map(|choice| {
            let out = bed.empty([rows, k], Dtype::Bf16);
            bed.kernels.moe_mlp(&bed.stream, &pool, &x, choice, &experts, &out).unwrap();
            bed.values(&out)
        });
        assert_eq!(outs[0], outs[1], "{rows} rows");
        // Against the CPU backend where both choose alike.
        let cpu_router = backend.linear_weight(weight.clone()).unwrap();
        let mut residual = cpu_tensor(&backend, &values, [rows, k]);
        let norm = cpu_tensor(&backend, &vec![1.0; k], [1, k]);
        let (normed, routing) = backend
            .reduce_norm_route(None, &mut residual, &norm, 1e-6, &all_of(&cpu_router, n, top_k, true))
            .unwrap();
        let x = bed.tensor(normed.values(), [rows, k], Dtype::Bf16);
        let want = backend.moe_mlp(&normed, &routing, &on_cpu).unwrap();
        let choice =
            bed.kernels.route(&bed.stream, &pool, &x, &RouterRule::new(&router, top_k, true)).unwrap();
        let (ids, _) = downloaded(&bed, &choice, rows);
        let out = bed.empty([rows, k], Dtype::Bf16);
        bed.kernels.moe_mlp(&bed.stream, &pool, &x, &choice, &experts, &out).unwrap();
        let got = bed.values(&out);
        let alike: Vec<usize> = (0..rows)
            .filter(|row| ids[row * top_k..][..top_k] == routing.experts()[row * top_k..][..top_k])
            .collect();
        assert!(alike.len() * 8 >= rows * 7, "{} of {rows} rows are routed alike", alike.len());
        let of = |values: &[f32]| -> Vec<f32> {
            alike.iter().flat_map(|row| values[row * k..][..k].to_vec()).collect()
        };
        assert_close(&format!("{rows} rows"), &of(&got), &of(want.values()), k, tolerance::KERNEL_BF16);
    }
}

#[test]
fn a_row_is_routed_alike_alone_and_in_a_batch() {
    let (bed, mut random) = (Bed::new(), Random::new(75));
    let _alone = alone();
    let pool = Pool::new(&bed.bytes(64 << 20));
    let (n, k, top_k, rows) = (128, 2048, 8, 40);
    let router = upload(&bed, &dense(&random.bf16s(n * k, 0.05), n, k));
    let values = random.bf16s(rows * k, 1.0);
    let routed = |values: &[f32]| {
        let rows = values.len() / k;
        let x = bed.tensor(values, [rows, k], Dtype::Bf16);
        let choice =
            bed.kernels.route(&bed.stream, &pool, &x, &RouterRule::new(&router, top_k, true)).unwrap();
        downloaded(&bed, &choice, rows)
    };
    let (experts, weights) = routed(&values);
    for row in [0, 7, 8, 39] {
        let (alone_experts, alone_weights) = routed(&values[row * k..][..k]);
        assert_eq!(alone_experts, experts[row * top_k..][..top_k]);
        assert_eq!(alone_weights, weights[row * top_k..][..top_k]);
    }
}

/// A single row whose choice is left to the experts' kernels has the bits that it has with a choice.
#[test]
fn a_single_row_may_choose_late() {
    let (bed, mut random) = (Bed::new(), Random::new(78));
    let _alone = alone();
    let pool = Pool::new(&bed.bytes(64 << 20));
    let schemes =
        [Scheme::Bf16, Scheme::Fp8, Scheme::Nvfp4, Scheme::Int4(32), Scheme::Int4(64), Scheme::Int4(128)];
    for (n, k, intermediate, top_k) in
        [(24, 256, 96, 8), (200, 128, 64, 5), (128, 2048, 768, 8), (16, 80, 48, 1)]
    {
        let mut weight = dense(&random.bf16s(n * k, 0.1), n, k);
        weight.bias = (n % 3 == 0).then(|| random.bf16s(n, 1.0));
        let router = upload(&bed, &weight);
        for scheme in schemes {
            // Large layers once: they are many bytes.
            if n == 128 && scheme != Scheme::Int4(128) {
                continue;
            }
            let experts = Layer::new(&mut random, n, [k, intermediate], scheme).upload(&bed);
            for real in [Some(1u8), Some(0), None] {
                let x = bed.tensor(&random.bf16s(k, 1.0), [1, k], Dtype::Bf16);
                let counts = real.map(|real| bed.upload(&[u32::from(real), 7, 7, 0]));
                let rule = RouterRule::new(&router, top_k, real.is_none());
                let rule = RouterRule { counts: counts.as_ref(), ..rule };
                let choices = [
                    bed.kernels.route(&bed.stream, &pool, &x, &rule).unwrap(),
                    bed.kernels.route_for_experts(&bed.stream, &pool, &x, &rule).unwrap(),
                ];
                let outs = choices.map(|choice| {
                    let out = bed.empty([1, k], Dtype::Bf16);
                    bed.kernels.moe_mlp(&bed.stream, &pool, &x, &choice, &experts, &out).unwrap();
                    bed.values(&out)
                });
                assert_eq!(outs[0], outs[1], "{n} experts, {k} x {intermediate}, {scheme:?}, {real:?}");
                assert_eq!(outs[0].iter().any(|&v| v != 0.0), real != Some(0), "{scheme:?}");
            }
        }
    }
}

/// Inputs that are no numbers may choose anything that exists, each expert once.
#[test]
fn no_numbers_choose_experts_that_exist() {
    let (bed, mut random) = (Bed::new(), Random::new(76));
    let _alone = alone();
    let pool = Pool::new(&bed.bytes(64 << 20));
    let (n, k, top_k) = (20, 64, 8);
    let router = upload(&bed, &dense(&random.bf16s(n * k, 1.0), n, k));
    for rows in [3, 200] {
        let mut x = random.bf16s(rows * k, 1.0);
        x[5] = f32::NAN;
        x[k + 1] = f32::INFINITY;
        x[2 * k] = f32::NEG_INFINITY;
        let x = bed.tensor(&x, [rows, k], Dtype::Bf16);
        let choice =
            bed.kernels.route(&bed.stream, &pool, &x, &RouterRule::new(&router, top_k, true)).unwrap();
        let (experts, _) = downloaded(&bed, &choice, rows);
        for row in experts.chunks(top_k) {
            let distinct: std::collections::HashSet<_> = row.iter().filter(|&&id| id < n as u32).collect();
            assert_eq!(distinct.len(), top_k, "{row:?}");
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let (bed, mut random) = (Bed::new(), Random::new(77));
    let _alone = alone();
    let pool = Pool::new(&bed.bytes(1 << 20));
    let router = upload(&bed, &dense(&random.bf16s(16 * 64, 1.0), 16, 64));
    let wide =
        upload(&bed, &LinearWeight { parts: vec![matrix(&mut random, 257, 64, Scheme::Bf16)], bias: None });
    let route = |columns: usize, router: &Linear, top_k: usize| {
        let x = bed.empty([2, columns], Dtype::Bf16);
        bed.kernels.route(&bed.stream, &pool, &x, &RouterRule::new(router, top_k, true))
    };
    assert!(route(64, &router, 4).is_ok());
    assert!(route(48, &router, 4).is_err());
    assert!(
        route(64, &router, 0).is_err() && route(64, &router, 17).is_err() && route(64, &wide, 33).is_err()
    );
    assert!(route(64, &wide, 4).unwrap_err().to_string().contains("at most 256 experts"));
    bed.stream.synchronize().unwrap();
}
