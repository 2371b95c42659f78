//! The choice of experts of which only some are held, run on the CPU (`emulation`): what `kernels/router.cu` writes, and what a single
//! row whose experts choose for themselves adds up (`kernels/moe_bf16.cu`). Against choices by definition, in float64.

use std::ops::Range;
use std::sync::LazyLock;

use half::bf16;
use spark_backend::{Bytes, Dtype, LinearWeight, Matrix, MatrixData};
use spark_testing::Random;

use super::moe::{GROUP_BYTES, MoeParams};
use super::pack::{PackedHost, padded_k, padded_n};
use super::router::RouterParams;
use crate::emulation::{Emulated, Work};

const NONE: u32 = u32::MAX;
/// Of the kernels.
const NUM_THREADS: u32 = 256;

static ROUTER: LazyLock<Emulated> = LazyLock::new(|| {
    let names = ["router_128", "router_256", "router_choose"];
    Emulated::new("router", &names.map(|name| (name, "RouterParams")))
});
static EXPERTS: LazyLock<Emulated> =
    LazyLock::new(|| Emulated::new("moe_bf16", &[("down_row_bf16", "MoeParams")]));

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
}

fn dense(values: &[f32], [n, k]: [usize; 2]) -> PackedHost {
    let data = MatrixData::Dense { dtype: Dtype::Bf16, values: Bytes::from(bf16_bytes(values)) };
    PackedHost::pack(&LinearWeight { parts: vec![Matrix { n, k, data }], bias: None }).unwrap()
}

/// The experts of a row by falling logit, which is as bf16 holds it, ties to the lower expert; and their share of the sum.
fn choose(logits: &[f64], top_k: usize) -> (Vec<u32>, Vec<f64>) {
    let logits: Vec<f64> = logits.iter().map(|&logit| bf16::from_f64(logit).to_f64()).collect();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(top_k);
    let sizes: Vec<f64> = order.iter().map(|&expert| (logits[expert] - logits[order[0]]).exp()).collect();
    let sum: f64 = sizes.iter().sum();
    (order.iter().map(|&expert| expert as u32).collect(), sizes.iter().map(|size| size / sum).collect())
}

/// Rows that choose, and the parameters that all their launches share.
struct Rows {
    count: usize,
    num_real: usize,
    num_experts: usize,
    top_k: usize,
    /// `[count, top_k]` among all experts; none for rows of padding.
    chosen: Vec<u32>,
    shares: Vec<f64>,
}

impl Rows {
    fn new(logits: &[f64], num_experts: usize, top_k: usize, num_real: usize) -> Self {
        let (mut chosen, mut shares) = (Vec::new(), Vec::new());
        let count = logits.len() / num_experts;
        for (row, logits) in logits.chunks_exact(num_experts).enumerate() {
            let (ids, weights) = choose(logits, top_k);
            chosen.extend(ids.iter().map(|&id| if row < num_real { id } else { NONE }));
            shares.extend(weights);
        }
        Self { count, num_real, num_experts, top_k, chosen, shares }
    }

    fn params(&self, work: &mut Work, held: &Range<usize>) -> RouterParams {
        let pairs = self.count * self.top_k;
        RouterParams {
            experts: work.room(4 * pairs),
            weights: work.room(4 * pairs),
            counts: work.words([self.num_real as u32]),
            n: self.num_experts as u32,
            rows: self.count as u32,
            top_k: self.top_k as u32,
            renormalize: 1,
            first_held: held.start as u32,
            num_held: held.len() as u32,
            ..RouterParams::default()
        }
    }

    /// In numbers of the held experts.
    fn check(&self, ids: &[u32], weights: &[f32], held: &Range<usize>, what: &str) {
        let want: Vec<u32> = self.chosen.iter().map(|id| id.wrapping_sub(held.start as u32)).collect();
        assert_eq!(ids, want, "{what}");
        for (i, (&got, want)) in weights.iter().zip(&self.shares).enumerate() {
            if i / self.top_k < self.num_real {
                assert!((f64::from(got) - want).abs() <= want / 128.0, "{what}: {got} for {want}");
            }
        }
    }

    /// Groups by rising expert, and the pairs that each has.
    fn groups(&self, held: &Range<usize>) -> Vec<(u32, Vec<u32>)> {
        let of = |expert: usize| -> Vec<u32> {
            let pairs = self.chosen.iter().enumerate().filter(|&(_, &id)| id as usize == expert);
            pairs.map(|(pair, _)| pair as u32).collect()
        };
        let all = held.clone().map(|expert| ((expert - held.start) as u32, of(expert)));
        all.filter(|(_, pairs)| !pairs.is_empty()).collect()
    }
}

/// All, halves, few, one; of the last also such that most rows have chosen none of them.
fn parts(num_experts: usize) -> Vec<Range<usize>> {
    let half = num_experts / 2;
    vec![0..num_experts, 0..half, half..num_experts, half - 1..half + 1, num_experts - 1..num_experts]
}

#[test]
fn emulated_routers_list_held_experts() {
    let mut random = Random::new(51);
    // One row and several, with padding and without, more experts of a row than are held, both kernels, several parts of k.
    for (num_experts, k, count, num_real, top_k) in [
        (8, 32, 1, 1, 2),
        (24, 64, 1, 1, 8),
        (24, 64, 1, 0, 8),
        (24, 64, 5, 5, 8),
        (40, 1056, 8, 6, 3),
        (200, 32, 1, 1, 5),
        (200, 32, 3, 3, 5),
    ] {
        let (weight, x) = (random.bf16s(num_experts * k, 0.2), random.bf16s(count * k, 1.0));
        let logit = |i: usize| -> f64 {
            let (row, expert) = (i / num_experts, i % num_experts);
            let pairs = x[row * k..][..k].iter().zip(&weight[expert * k..][..k]);
            pairs.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
        };
        let logits: Vec<f64> = (0..count * num_experts).map(logit).collect();
        let rows = Rows::new(&logits, num_experts, top_k, num_real);
        let packed = dense(&weight, [num_experts, k]);
        let kernel = if num_experts > 128 { "router_256" } else { "router_128" };
        let grid = [padded_n(num_experts) / 16, padded_k(k).div_ceil(1024)];
        for held in parts(num_experts) {
            let what = format!("{num_experts} experts, {num_real} of {count} rows, {held:?}");
            let mut work = Work::default();
            let max_groups = (count * top_k).min(held.len());
            let params = RouterParams {
                codes: work.words(packed.codes.iter().copied()),
                x: work.buffer(bf16_bytes(&x)),
                partial: work.room(4 * grid[1] * 8 * padded_n(num_experts)),
                counters: work.words([0, 0]),
                // More than there are groups, to see that no more are written.
                groups: work.room(GROUP_BYTES * count * top_k),
                pairs: work.room(4 * count * top_k),
                padded_n: padded_n(num_experts) as u32,
                k: padded_k(k) as u32,
                x_columns: k as u32,
                max_groups: max_groups as u32,
                ..rows.params(&mut work, &held)
            };
            work.launch(kernel, grid, NUM_THREADS, &params);
            let done = ROUTER.run(&work);
            rows.check(&done.words(params.experts), &done.floats(params.weights), &held, &what);
            assert_eq!(done.words(params.counters), [0, 0], "{what}");
            let (all_groups, pairs) = (done.words(params.groups), done.words(params.pairs));
            let (groups, behind) = all_groups.split_at(GROUP_BYTES / 4 * max_groups);
            assert!(behind.iter().all(|&word| word == 0x7f7f_7f7f), "{what}");
            let mut listed = Vec::new();
            for group in groups.chunks_exact(GROUP_BYTES / 4) {
                let &[expert, first, len, _] = group else { unreachable!("four words") };
                if len > 0 {
                    listed.push((expert, pairs[first as usize..][..len as usize].to_vec()));
                }
            }
            let want = rows.groups(&held);
            assert_eq!(listed, want, "{what}");
            let used = groups.chunks_exact(4).take_while(|group| group[2] > 0).count();
            assert_eq!(used, want.len(), "{what}: unused groups are the last");
        }
    }
}

#[test]
fn emulated_choices_of_many_rows_are_in_numbers_of_held_experts() {
    let mut random = Random::new(52);
    let (num_experts, count, num_real, top_k) = (40, 11, 9, 8);
    let logits = random.bf16s(count * num_experts, 1.0);
    let exact: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    let rows = Rows::new(&exact, num_experts, top_k, num_real);
    for held in parts(num_experts) {
        let mut work = Work::default();
        let x = work.buffer(bf16_bytes(&logits));
        let params = RouterParams { x, ..rows.params(&mut work, &held) };
        work.launch("router_choose", [count.div_ceil(8), 1], NUM_THREADS, &params);
        let done = ROUTER.run(&work);
        rows.check(&done.words(params.experts), &done.floats(params.weights), &held, &format!("{held:?}"));
    }
}

/// down and the sum of a single row that has only logits, in one part that every warp adds up, or in more that one does.
#[test]
fn emulated_rows_that_choose_late_add_held_experts() {
    let mut random = Random::new(53);
    for (num_experts, top_k, splits, is_real) in
        [(8, 2, 1, true), (24, 8, 1, true), (24, 8, 3, true), (24, 8, 3, false), (200, 5, 2, true)]
    {
        let [hidden, intermediate] = [48, 32];
        let stride = padded_n(num_experts);
        let partial: Vec<f32> = (0..splits * stride).map(|_| random.uniform(-2.0, 2.0)).collect();
        // Float32 sums, in the kernel's order.
        let logit = |expert: usize| (0..splits).fold(0.0, |sum, part| sum + partial[part * stride + expert]);
        let logits: Vec<f64> = (0..num_experts).map(|expert| f64::from(logit(expert))).collect();
        let (chosen, shares) = choose(&logits, top_k);
        let down = random.bf16s(num_experts * hidden * intermediate, 0.3);
        for held in parts(num_experts) {
            let what = format!("{num_experts} experts in {splits} parts, {held:?}");
            let mut own: Vec<usize> = (0..top_k).filter(|&i| held.contains(&(chosen[i] as usize))).collect();
            own.sort_by_key(|&i| chosen[i]);
            // What lies beyond the places of held experts must not be read: no number.
            let mut inner = random.bf16s(own.len() * intermediate, 1.0);
            let mut want = vec![(0.0f64, 0.0f64); hidden];
            for (place, &i) in own.iter().enumerate() {
                let matrix = &down[chosen[i] as usize * hidden * intermediate..];
                for (row, (sum, size)) in want.iter_mut().enumerate() {
                    let weights = &matrix[row * intermediate..][..intermediate];
                    let pairs = inner[place * intermediate..].iter().zip(weights);
                    let value: f64 = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    *sum += value * shares[i];
                    *size += value.abs() * shares[i];
                }
            }
            inner.resize(top_k * intermediate, f32::NAN);
            let experts: Vec<PackedHost> = held
                .clone()
                .map(|expert| &down[expert * hidden * intermediate..][..hidden * intermediate])
                .map(|values| dense(values, [hidden, intermediate]))
                .collect();
            let packed = PackedHost::stack(experts).unwrap();
            let mut work = Work::default();
            let params = MoeParams {
                codes: work.words(packed.codes.iter().copied()),
                x: work.buffer(bf16_bytes(&inner)),
                out: work.room(2 * hidden),
                logits: work.words(partial.iter().map(|value| value.to_bits())),
                counts: work.words([u32::from(is_real)]),
                n: hidden as u32,
                padded_n: padded_n(hidden) as u32,
                k: padded_k(intermediate) as u32,
                x_columns: intermediate as u32,
                rows: 1,
                top_k: top_k as u32,
                num_experts: held.len() as u32,
                max_groups: top_k.min(held.len()) as u32,
                splits: splits as u32,
                logits_stride: stride as u32,
                renormalize: 1,
                num_routed: num_experts as u32,
                first_held: held.start as u32,
                ..MoeParams::default()
            };
            work.launch("down_row_bf16", [hidden / 16, 1], NUM_THREADS, &params);
            let got = EXPERTS.run(&work).bf16s(params.out);
            let is_empty = own.is_empty() || !is_real;
            assert_eq!(got.iter().all(|value| value.to_bits() == 0), is_empty, "{what}");
            for (got, (want, size)) in got.iter().zip(want).filter(|_| !is_empty) {
                assert!((f64::from(*got) - want).abs() <= size / 64.0, "{what}: {got} for {want} of {size}");
            }
        }
    }
}
