//! Layers of which only some experts are held, as on ranks with whole experts, against the CPU backend: the router's choice in their
//! numbers, the products of few rows and of many. Layers that are held as a whole are in `moe.rs` and `moe_gemm.rs`.

use std::ops::Range;

use spark_backend::{Backend, Dtype, ExpertsWeight, LinearWeight, RouterSpec};
use spark_cpu::{CpuBackend, CpuTensor, Routing};
use spark_cuda::{Choice, Experts, Linear, MAX_PAIRS, Pool, RouterRule, Tensor};
use spark_testing::{Random, tolerance};

use super::gemm::{SCHEMES, Scheme, assert_close};
use super::moe::Layer;
use super::router::{alone, dense, downloaded, upload};
use super::{Bed, cpu, cpu_tensor};

/// A layer of experts behind its router.
struct Behind<'a> {
    bed: &'a Bed,
    backend: CpuBackend,
    pool: Pool,
    weight: LinearWeight,
    router: Linear,
    layer: Layer,
    top_k: usize,
}

/// Rows, and what they have chosen.
struct Rows {
    count: usize,
    values: Vec<f32>,
    x: Tensor,
    /// The GPU's choice among all experts.
    ids: Vec<u32>,
    weights: Vec<f32>,
    /// Rows for which the CPU backend has chosen the same, with the same weights.
    alike: Vec<usize>,
}

impl<'a> Behind<'a> {
    /// `sizes`: experts, hidden and intermediate size.
    fn new(
        bed: &'a Bed,
        random: &mut Random,
        sizes: [usize; 3],
        top_k: usize,
        scheme: Scheme,
        bias: Option<Vec<f32>>,
    ) -> Self {
        let [num_experts, hidden, intermediate] = sizes;
        let weight =
            LinearWeight { bias, ..dense(&random.bf16s(num_experts * hidden, 0.1), num_experts, hidden) };
        Self {
            bed,
            backend: cpu(Dtype::Bf16),
            pool: Pool::new(&bed.bytes(192 << 20)),
            router: upload(bed, &weight),
            weight,
            layer: Layer::new(random, num_experts, [hidden, intermediate], scheme),
            top_k,
        }
    }

    fn num_experts(&self) -> usize {
        self.layer.weight.experts.len()
    }

    /// Normalised rows and the CPU backend's choice.
    fn routed_on_cpu(&self, values: &[f32], held: Range<usize>) -> (CpuTensor, Routing) {
        let (b, hidden) = (&self.backend, self.layer.hidden);
        let router = b.linear_weight(self.weight.clone()).unwrap();
        let mut residual = cpu_tensor(b, values, [values.len() / hidden, hidden]);
        let norm = cpu_tensor(b, &vec![1.0; hidden], [1, hidden]);
        let spec = RouterSpec { router: &router, top_k: self.top_k, renormalize: true, experts: held };
        b.reduce_norm_route(None, &mut residual, &norm, 1e-6, &spec).unwrap()
    }

    fn rule(&self, held: &Range<usize>) -> RouterRule<'_> {
        RouterRule { held: held.clone(), ..RouterRule::new(&self.router, self.top_k, true) }
    }

    fn route(&self, x: &Tensor, rule: &RouterRule<'_>) -> Choice {
        self.bed.kernels.route(&self.bed.stream, &self.pool, x, rule).unwrap()
    }

    fn output(&self, x: &Tensor, choice: &Choice, experts: &Experts) -> Vec<f32> {
        let out = self.bed.empty(x.shape(), Dtype::Bf16);
        self.bed.kernels.moe_mlp(&self.bed.stream, &self.pool, x, choice, experts, &out).unwrap();
        self.bed.values(&out)
    }

    fn held(&self, held: &Range<usize>) -> Layer {
        let experts = self.layer.weight.experts[held.clone()].to_vec();
        Layer { weight: ExpertsWeight { experts }, hidden: self.layer.hidden }
    }

    /// Random rows, routed among all experts.
    fn rows(&self, random: &mut Random, count: usize) -> Rows {
        let values = random.bf16s(count * self.layer.hidden, 0.5);
        let (normed, routing) = self.routed_on_cpu(&values, 0..self.num_experts());
        let x = self.bed.tensor(normed.values(), [count, self.layer.hidden], Dtype::Bf16);
        let choice = self.route(&x, &self.rule(&(0..self.num_experts())));
        let (ids, weights) = downloaded(self.bed, &choice, count);
        let is_alike = |&row: &usize| {
            let row = row * self.top_k..(row + 1) * self.top_k;
            ids[row.clone()] == routing.experts()[row.clone()]
                && weights[row.clone()] == routing.weights()[row]
        };
        let alike = (0..count).filter(is_alike).collect();
        Rows { count, values, x, ids, weights, alike }
    }

    /// Checks what `held` experts add to `rows`; returns that, and how many rows have chosen any of them.
    fn check(&self, rows: &Rows, held: &Range<usize>, what: &str) -> (Vec<f32>, usize) {
        let (hidden, top_k, part) = (self.layer.hidden, self.top_k, self.held(held));
        let what = format!("{what}, {} rows, experts {held:?}", rows.count);
        let experts = part.upload(self.bed);
        let rule = self.rule(held);
        let choice = self.route(&rows.x, &rule);
        let (ids, weights) = downloaded(self.bed, &choice, rows.count);
        let want: Vec<u32> = rows.ids.iter().map(|id| id.wrapping_sub(held.start as u32)).collect();
        assert!(ids == want && weights == rows.weights, "{what}: the choice is the same in other numbers");
        let got = self.output(&rows.x, &choice, &experts);

        // Chosen by the kernels of the experts, and listed before them.
        let late = self.bed.kernels.route_for_experts(&self.bed.stream, &self.pool, &rows.x, &rule).unwrap();
        assert!(got == self.output(&rows.x, &late, &experts), "{what}: chosen late");
        if top_k <= held.len() && rows.count * top_k <= MAX_PAIRS {
            let plain = Choice::new(choice.experts.clone(), choice.weights.clone(), top_k);
            assert!(got == self.output(&rows.x, &plain, &experts), "{what}: listed late");
        }

        let chosen = |row: usize| rows.ids[row * top_k..][..top_k].iter();
        let has_any = |row: &usize| chosen(*row).any(|&id| held.contains(&(id as usize)));
        let empty = (0..rows.count).filter(|row| !has_any(row));
        for row in empty {
            let zeros = got[row * hidden..][..hidden].iter().all(|value| value.to_bits() == 0);
            assert!(zeros, "{what}: row {row} has chosen none of them");
        }
        let compared: Vec<usize> = rows.alike.iter().copied().filter(has_any).collect();
        if !compared.is_empty() {
            let (normed, routing) = self.routed_on_cpu(&rows.values, held.clone());
            let on_cpu = self.backend.experts_weight(part.weight).unwrap();
            let want = self.backend.moe_mlp(&normed, &routing, &on_cpu).unwrap();
            let of = |values: &[f32]| -> Vec<f32> {
                compared.iter().flat_map(|row| values[row * hidden..][..hidden].to_vec()).collect()
            };
            assert_close(&what, &of(&got), &of(want.values()), hidden, tolerance::KERNEL_BF16);
        }
        let num_used = (0..rows.count).filter(has_any).count();
        (got, num_used)
    }
}

/// Most rows have to be comparable, or the tests say nothing.
fn check_alike(num_alike: usize, num_rows: usize) {
    println!("{num_alike} of {num_rows} rows are routed as on the CPU");
    assert!(num_alike * 4 >= num_rows * 3, "{num_alike} of {num_rows}");
}

/// Every scheme, 1 to 16 rows of decode, and as many as prompts have; a half, a quarter and a single one of the experts.
#[test]
fn held_experts_are_the_cpu_backends() {
    let (bed, mut random) = (Bed::new(), Random::new(91));
    let _alone = alone();
    let (mut num_alike, mut num_rows) = (0, 0);
    for scheme in SCHEMES {
        let behind = Behind::new(&bed, &mut random, [24, 256, 96], 8, scheme, None);
        for count in (1..=16).chain([40, 128, 129, 300]) {
            let rows = behind.rows(&mut random, count);
            num_alike += rows.alike.len();
            num_rows += count;
            for held in [0..12, 12..24, 6..12, 23..24] {
                behind.check(&rows, &held, &format!("{scheme:?}"));
            }
        }
    }
    check_alike(num_alike, num_rows);
}

/// Fewer experts held than a row has; widths that no rank could have a part of; more experts than lanes of a warp choose at once; more
/// experts of a row than a block has warps; the 30B's width.
#[test]
fn held_experts_of_many_shapes() {
    let (bed, mut random) = (Bed::new(), Random::new(92));
    let _alone = alone();
    let (mut num_alike, mut num_rows) = (0, 0);
    let int4 = Scheme::Int4(128);
    for (sizes, top_k, scheme, counts, parts) in [
        ([6, 80, 48], 2, Scheme::Bf16, vec![1, 2, 9, 600], vec![0..1, 5..6, 0..3, 3..6]),
        ([200, 128, 64], 5, Scheme::Nvfp4, vec![1, 3, 16, 250], vec![0..100, 100..200, 199..200]),
        ([12, 64, 32], 10, Scheme::Int4(32), vec![1, 4, 110], vec![0..6, 6..12, 11..12]),
        ([16, 2048, 768], 8, int4, vec![1, 2, 9, 200], vec![0..8, 8..16]),
    ] {
        let behind = Behind::new(&bed, &mut random, sizes, top_k, scheme, None);
        for count in counts {
            let rows = behind.rows(&mut random, count);
            num_alike += rows.alike.len();
            num_rows += count;
            for held in &parts {
                behind.check(&rows, held, &format!("{sizes:?} {scheme:?}"));
            }
        }
    }
    check_alike(num_alike, num_rows);
}

/// All pairs on one rank and none on the other: the one has what a rank with all experts has, bit by bit.
#[test]
fn one_rank_may_have_all_pairs_and_another_none() {
    let (bed, mut random) = (Bed::new(), Random::new(93));
    let _alone = alone();
    for scheme in SCHEMES {
        let bias = (0..16).map(|expert| if expert < 8 { 60.0 } else { -60.0 }).collect();
        let behind = Behind::new(&bed, &mut random, [16, 256, 96], 4, scheme, Some(bias));
        let whole = behind.layer.upload(&bed);
        for count in [1, 2, 7, 16, 300] {
            let rows = behind.rows(&mut random, count);
            let (got, num_used) = behind.check(&rows, &(0..8), &format!("{scheme:?}"));
            assert_eq!(num_used, count, "{scheme:?}");
            let choice = behind.route(&rows.x, &behind.rule(&(0..16)));
            assert!(got == behind.output(&rows.x, &choice, &whole), "{scheme:?}, {count} rows");
            assert_eq!(behind.check(&rows, &(8..16), &format!("{scheme:?}")).1, 0);
        }
    }
}

#[test]
fn rows_of_padding_have_no_held_experts() {
    let (bed, mut random) = (Bed::new(), Random::new(94));
    let _alone = alone();
    let behind = Behind::new(&bed, &mut random, [16, 128, 64], 4, Scheme::Int4(64), None);
    let held = 4..12;
    let experts = behind.held(&held).upload(&bed);
    for (count, real) in [(1, 1), (1, 0), (8, 5), (32, 9), (300, 299)] {
        let rows = behind.rows(&mut random, count);
        let counts = bed.upload(&[real as u32, 7, 7, 0]);
        let padded = RouterRule { counts: Some(&counts), ..behind.rule(&held) };
        let late = bed.kernels.route_for_experts(&bed.stream, &behind.pool, &rows.x, &padded).unwrap();
        let all = behind.output(&rows.x, &behind.route(&rows.x, &behind.rule(&held)), &experts);
        for choice in [behind.route(&rows.x, &padded), late] {
            let got = behind.output(&rows.x, &choice, &experts);
            assert!(got[..real * 128] == all[..real * 128], "{real} of {count} rows");
            assert!(got[real * 128..].iter().all(|&value| value == 0.0), "{real} of {count} rows");
        }
    }
}

#[test]
fn experts_that_are_not_those_of_the_choice_are_refused() {
    let (bed, mut random) = (Bed::new(), Random::new(95));
    let _alone = alone();
    let behind = Behind::new(&bed, &mut random, [16, 128, 64], 4, Scheme::Int4(64), None);
    let rows = behind.rows(&mut random, 2);
    let choice = behind.route(&rows.x, &behind.rule(&(0..8)));
    let out = bed.empty([2, 128], Dtype::Bf16);
    let half = behind.held(&(0..8)).upload(&bed);
    let moe =
        |experts: &Experts| bed.kernels.moe_mlp(&bed.stream, &behind.pool, &rows.x, &choice, experts, &out);
    assert!(moe(&half).is_ok());
    assert!(moe(&behind.layer.upload(&bed)).unwrap_err().to_string().contains("8 experts"));
    for held in [8..17, 3..3] {
        let routed = bed.kernels.route(&bed.stream, &behind.pool, &rows.x, &behind.rule(&held));
        assert!(routed.unwrap_err().to_string().contains("0..16"));
    }
    bed.stream.synchronize().unwrap();
}
