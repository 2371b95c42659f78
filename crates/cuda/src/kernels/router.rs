//! Wrapper of `kernels/router.cu`: from rows to the experts that compute them. The experts are in `moe.rs`.

use std::ops::Range;

use spark_backend::Dtype;

use super::moe::{GROUP_BYTES, Lists, MAX_PAIRS, MAX_TOP_K, ROW_EXPERTS, Routed, RowLogits};
use super::pack::{Scheme, padded_k, padded_n};
use super::{Choice, Kernels, Linear, LoadedModule, PackedWeight, disjoint, to_u32, words};
use crate::launch::{Kernel, Launch, Params};
use crate::{Arena, ArenaPlan, Device, DeviceSlice, Error, Pool, Result, Stream, Tensor};

const OP: &str = "route";
/// Most experts that a row is routed among: what a warp holds.
pub const MAX_ROUTED_EXPERTS: usize = 256;
/// Constants of the kernel: threads of a block, rows and experts of a block, inputs of a block.
const NUM_THREADS: u32 = 256;
const ROWS: usize = 8;
const EXPERTS: usize = 16;
const BLOCK_K: usize = 1024;

/// `RouterParams` of `kernels/router.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct RouterParams {
    pub(super) codes: u64,
    pub(super) bias: u64,
    pub(super) x: u64,
    pub(super) partial: u64,
    pub(super) counters: u64,
    pub(super) counts: u64,
    pub(super) experts: u64,
    pub(super) weights: u64,
    pub(super) groups: u64,
    pub(super) pairs: u64,
    pub(super) n: u32,
    pub(super) padded_n: u32,
    pub(super) k: u32,
    pub(super) x_columns: u32,
    pub(super) rows: u32,
    pub(super) top_k: u32,
    pub(super) renormalize: u32,
    pub(super) max_groups: u32,
    pub(super) first_held: u32,
    pub(super) num_held: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 10 * 8 + 10 * 4 bytes, no padding.
unsafe impl Params for RouterParams {
    const NAME: &'static str = "RouterParams";
}

#[derive(Debug)]
pub(super) struct Router {
    /// For up to 128 experts, and for up to 256.
    router: [Kernel<RouterParams>; 2],
    row: Kernel<RouterParams>,
    choose: Kernel<RouterParams>,
    /// One for all rows and one for each [`ROWS`] of the [`MAX_PAIRS`] that a launch may have: zeros between launches.
    counters: DeviceSlice,
}

impl Router {
    pub(super) fn new(device: &Device, module: &LoadedModule) -> Result<Self> {
        let mut plan = ArenaPlan::default();
        let region = plan.add("counters of the router", 4 * (1 + MAX_PAIRS / ROWS) as u64)?;
        let counters = Arena::new(device, plan)?.region(region)?;
        let stream = Stream::new(device)?;
        stream.fill(&counters, 0)?;
        stream.synchronize()?;
        Ok(Self {
            router: [
                Kernel::overlapping(module, "router_128", 0)?,
                Kernel::overlapping(module, "router_256", 0)?,
            ],
            row: Kernel::overlapping(module, "router_row", 0)?,
            choose: Kernel::new(module, "router_choose", 0)?,
            counters,
        })
    }
}

/// What rows are routed with.
#[derive(Debug, Clone)]
pub struct RouterRule<'a> {
    /// `[experts, k]`.
    pub router: &'a Linear,
    /// Experts of a row.
    pub top_k: usize,
    /// Whether their weights are made to sum to 1.
    pub renormalize: bool,
    /// The experts that are held here: the choice is in their numbers, from 0. All, but for ranks that hold whole experts.
    pub held: Range<usize>,
    /// How many rows are real (u32, on the device), where not all are.
    pub counts: Option<&'a DeviceSlice>,
}

impl<'a> RouterRule<'a> {
    /// Among all experts of `router`, for rows that are all real.
    pub fn new(router: &'a Linear, top_k: usize, renormalize: bool) -> Self {
        Self { router, top_k, renormalize, held: 0..router.n, counts: None }
    }
}

impl Kernels {
    /// The experts of each row of `x` `[rows, k]` bf16: logits of the router, rounded to bf16, softmax over all in float32, the most
    /// probable ones by falling probability (ties to the lower expert), weights renormalised if asked and rounded to bf16. Rows from
    /// the number in `counts` on get no experts: their result is 0 and costs no weights. So do experts that are not held.
    ///
    /// A `Kernels` may route on one stream at a time.
    ///
    /// # Errors
    /// [`Error::Shape`], also for more than [`MAX_ROUTED_EXPERTS`] experts or more than 32 of a row; [`Error::Driver`];
    /// [`Error::Memory`] when the pool is too small.
    pub fn route(&self, stream: &Stream, pool: &Pool, x: &Tensor, rule: &RouterRule<'_>) -> Result<Choice> {
        self.route_by(stream, pool, x, rule, false)
    }

    /// [`Kernels::route`] for [`Kernels::moe_mlp`] and nothing else: of a single row only the logits may be computed, because each block
    /// of the experts' kernels can choose for itself sooner than it could be told. The result's `experts` and `weights` then hold
    /// nothing.
    ///
    /// # Errors
    /// As [`Kernels::route`].
    pub fn route_for_experts(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        rule: &RouterRule<'_>,
    ) -> Result<Choice> {
        self.route_by(stream, pool, x, rule, true)
    }

    /// Both of the above; `may_leave`: the choice may be left to the experts.
    fn route_by(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        rule: &RouterRule<'_>,
        may_leave: bool,
    ) -> Result<Choice> {
        let (rows, n, top_k) = (x.rows(), rule.router.n, rule.top_k);
        x.expect(OP, [rows, rule.router.k], Dtype::Bf16)?;
        if n > MAX_ROUTED_EXPERTS || top_k == 0 || top_k > n.min(MAX_TOP_K) {
            let rule = format!("1 to {MAX_TOP_K} of at most {MAX_ROUTED_EXPERTS} experts");
            return Err(Error::shape(OP, rule, (top_k, n)));
        }
        if let Some(counts) = rule.counts {
            words(OP, counts, 1)?;
        }
        let num_pairs = rows
            .checked_mul(top_k)
            .ok_or_else(|| Error::shape(OP, "a number of choices that fits 64 bits", (rows, top_k)))?;
        let held = &rule.held;
        if held.is_empty() || held.end > n {
            return Err(Error::shape(OP, format!("some of the experts 0..{n}"), held));
        }
        let ids = pool.take("chosen experts", 4 * num_pairs as u64)?;
        let mut choice = Choice::new(ids, pool.take("weights of experts", 4 * num_pairs as u64)?, top_k);
        choice.routed = Some(Routed { num_experts: n, held: held.clone() });
        match &rule.router.parts[..] {
            [part] if part.scheme == Scheme::Bf16 && rows == 1 && top_k <= ROW_EXPERTS && may_leave => {
                choice.logits = Some(self.route_row(stream, pool, x, part, rule, &choice)?);
            }
            [part] if part.scheme == Scheme::Bf16 && num_pairs <= MAX_PAIRS && rows > 0 => {
                choice.lists = Some(self.route_few(stream, pool, x, part, rule, &choice)?);
            }
            _ => self.route_many(stream, pool, x, rule, &choice)?,
        }
        Ok(choice)
    }

    /// The logits of a single row, in parts.
    fn route_row(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        rule: &RouterRule<'_>,
        choice: &Choice,
    ) -> Result<RowLogits> {
        let stride = padded_n(weight.n);
        let splits = padded_k(weight.k).div_ceil(BLOCK_K);
        let partial = pool.take("parts of logits", (4 * splits * stride) as u64)?;
        let read: Vec<&DeviceSlice> = std::iter::once(x.slice()).chain(weight.slices()).collect();
        disjoint(OP, &partial, &read)?;
        stream.uses(OP, &[&read[..], &[&partial]].concat())?;
        let params = RouterParams {
            codes: weight.codes.address(),
            partial: partial.address(),
            padded_n: to_u32(OP, stride)?,
            k: to_u32(OP, padded_k(weight.k))?,
            ..params(x, weight.k, rule, choice)?
        };
        let grid = [to_u32(OP, stride / EXPERTS)?, to_u32(OP, splits)?, 1];
        let launch = Launch { grid, num_threads: NUM_THREADS, shared_bytes: 0 };
        // SAFETY: the weights are bf16 [n, k] in the packed layout; x is a row of k, partial holds [splits, padded n].
        unsafe { self.router.row.launch(stream, launch, &params)? };
        Ok(RowLogits {
            partial,
            bias: weight.bias.clone(),
            counts: rule.counts.cloned(),
            splits,
            stride,
            renormalize: rule.renormalize,
        })
    }

    /// Logits, choice and lists of pairs in one launch.
    fn route_few(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        rule: &RouterRule<'_>,
        choice: &Choice,
    ) -> Result<Lists> {
        let (rows, n) = (x.rows(), padded_n(weight.n));
        let max_groups = (rows * rule.top_k).min(rule.held.len());
        let lists = Lists {
            groups: pool.take("groups of pairs", (GROUP_BYTES * max_groups) as u64)?,
            pairs: pool.take("pairs by expert", 4 * (rows * rule.top_k) as u64)?,
        };
        let grid = [n / EXPERTS, padded_k(weight.k).div_ceil(BLOCK_K), rows.div_ceil(ROWS)];
        let partial = pool.take("parts of logits", (4 * grid[1] * grid[2] * ROWS * n) as u64)?;
        let params = RouterParams {
            codes: weight.codes.address(),
            bias: weight.bias.as_ref().map_or(0, DeviceSlice::address),
            partial: partial.address(),
            counters: self.router.counters.address(),
            groups: lists.groups.address(),
            pairs: lists.pairs.address(),
            padded_n: to_u32(OP, n)?,
            k: to_u32(OP, padded_k(weight.k))?,
            max_groups: to_u32(OP, max_groups)?,
            ..params(x, weight.k, rule, choice)?
        };
        let mut read: Vec<&DeviceSlice> = vec![x.slice()];
        read.extend(weight.slices().chain(rule.counts));
        let written = [&choice.experts, &choice.weights, &lists.groups, &lists.pairs, &partial];
        for written in written {
            disjoint(OP, written, &read)?;
        }
        read.extend(written);
        read.push(&self.router.counters);
        stream.uses(OP, &read)?;
        let [tiles, splits, row_blocks] = grid;
        let grid = [to_u32(OP, tiles)?, to_u32(OP, splits)?, to_u32(OP, row_blocks)?];
        let launch = Launch { grid, num_threads: NUM_THREADS, shared_bytes: 0 };
        // SAFETY: the weights are bf16 [n, k] in the packed layout; x, counts, choice, lists and partial have the sizes that the
        // parameters and the grid say, apart from each other (pieces of the pool); n is at most 256 and pairs at most 1024; the
        // counters are enough for 1024 rows and zero.
        unsafe { self.router.router[usize::from(weight.n > 128)].launch(stream, launch, &params)? };
        Ok(lists)
    }

    /// Logits as any linear layer, then the choice.
    fn route_many(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        rule: &RouterRule<'_>,
        choice: &Choice,
    ) -> Result<()> {
        let rows = x.rows();
        let logits = pool.tensor("logits of a router", [rows, rule.router.n], Dtype::Bf16)?;
        self.linear(stream, pool, x, rule.router, &logits)?;
        let params = params(&logits, rule.router.n, rule, choice)?;
        let mut used = vec![logits.slice(), &choice.experts, &choice.weights];
        used.extend(rule.counts);
        stream.uses(OP, &used)?;
        let num_blocks = to_u32(OP, rows.div_ceil(ROWS))?;
        // SAFETY: logits, counts and choice have the sizes that the parameters say, apart from each other; a row has at most 256
        // logits.
        unsafe { self.router.choose.launch(stream, Launch::blocks(num_blocks, NUM_THREADS), &params) }
    }
}

/// What both kernels need; the rest is 0.
fn params(x: &Tensor, x_columns: usize, rule: &RouterRule<'_>, choice: &Choice) -> Result<RouterParams> {
    Ok(RouterParams {
        x: x.address(),
        counts: rule.counts.map_or(0, DeviceSlice::address),
        experts: choice.experts.address(),
        weights: choice.weights.address(),
        n: to_u32(OP, rule.router.n)?,
        x_columns: to_u32(OP, x_columns)?,
        rows: to_u32(OP, x.rows())?,
        top_k: to_u32(OP, rule.top_k)?,
        renormalize: rule.renormalize.into(),
        first_held: to_u32(OP, rule.held.start)?,
        num_held: to_u32(OP, rule.held.len())?,
        ..RouterParams::default()
    })
}
