//! A layer of experts: the choice between the kernels for few rows and those for many, and the wrapper of the former
//! (`kernels/moe.cu`, `kernels/moe_*.cu`). Those for many rows are in `moe_gemm.rs`, the router in `router.rs`.

use std::ops::Range;

use spark_backend::Dtype;

use super::linear::group_index;
use super::pack::{Scheme, padded_k, padded_n};
use super::{Experts, Kernels, LoadedModule, PackedWeight, disjoint, to_u32, words};
use crate::launch::{Kernel, Launch, Params};
use crate::{DeviceSlice, Error, Pool, Result, Stream, Tensor};

const OP: &str = "moe_mlp";
/// Most pairs (row, chosen expert) that the kernels for few rows take.
pub const MAX_PAIRS: usize = 1024;
/// Most experts of a row.
pub(super) const MAX_TOP_K: usize = 32;
/// Rows of a tile of weights.
const TILE_ROWS: usize = 16;
/// Threads of a block: of the products, of those of a single row, of the sort, and of one that combines.
const NUM_THREADS: usize = 128;
const ROW_THREADS: usize = 256;
const SORT_THREADS: usize = 256;
const COMBINE_THREADS: usize = 256;
/// Columns of a thread that combines.
const COMBINE_COLUMNS: usize = 4;
/// Rows of W that a block of `down` computes: 4 warps with two tiles each; those of `gate_up_many` are half gate, half up.
const MANY_ROWS: usize = 128;
/// Blocks of these that a multiprocessor has at a time.
const MANY_BLOCKS: usize = 4;
/// Most experts of a single row whose results are added where they are made: warps of a block.
pub(super) const ROW_EXPERTS: usize = 8;
/// Most pairs for which `gate_up` has small blocks, so that there are enough of them.
const FEW_PAIRS: usize = 16;
/// Bytes of `Group` of `kernels/pairs.cuh`.
pub(super) const GROUP_BYTES: usize = 16;

/// `MoeParams` of `kernels/moe.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct MoeParams {
    pub(super) codes: u64,
    pub(super) scales: u64,
    pub(super) row_scales: u64,
    pub(super) x: u64,
    pub(super) out: u64,
    pub(super) partial: u64,
    pub(super) experts: u64,
    pub(super) weights: u64,
    pub(super) groups: u64,
    pub(super) pairs: u64,
    pub(super) logits: u64,
    pub(super) router_bias: u64,
    pub(super) counts: u64,
    pub(super) n: u32,
    pub(super) padded_n: u32,
    pub(super) k: u32,
    pub(super) x_columns: u32,
    pub(super) rows: u32,
    pub(super) top_k: u32,
    pub(super) num_experts: u32,
    pub(super) max_groups: u32,
    pub(super) splits: u32,
    pub(super) logits_stride: u32,
    pub(super) renormalize: u32,
    pub(super) num_routed: u32,
    pub(super) first_held: u32,
    pub(super) padding: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 13 * 8 + 14 * 4 bytes, no padding.
unsafe impl Params for MoeParams {
    const NAME: &'static str = "MoeParams";
}

/// The router's choice, on the device. Its numbers cannot be checked before the launch: an expert that does not exist counts
/// nothing, one that is repeated in a row gives wrong values in that row; nothing outside the given memory is touched.
#[derive(Debug, Clone)]
pub struct Choice {
    /// `[rows, top_k]` u32, each row without repetition; `u32::MAX` for none, or any other number that is not below that of the
    /// experts. Nothing where [`Kernels::route_for_experts`] has left the choice to the experts.
    pub experts: DeviceSlice,
    /// `[rows, top_k]` f32, or nothing, too.
    pub weights: DeviceSlice,
    /// Experts of a row.
    pub top_k: usize,
    /// Among which experts, if the router has made it.
    pub(super) routed: Option<Routed>,
    /// Where the router has made them.
    pub(super) lists: Option<Lists>,
    /// What the choice of a single row is made from, where it is not made yet.
    pub(super) logits: Option<RowLogits>,
}

/// The experts of a router.
#[derive(Debug, Clone)]
pub(super) struct Routed {
    /// All of them.
    pub(super) num_experts: usize,
    /// Those whose products follow; a choice has their numbers, from 0.
    pub(super) held: Range<usize>,
}

/// The logits of a single row, in parts, and the rule of its choice.
#[derive(Debug, Clone)]
pub(super) struct RowLogits {
    /// `[splits, stride]` f32.
    pub(super) partial: DeviceSlice,
    /// `[num_experts]` f32.
    pub(super) bias: Option<DeviceSlice>,
    /// Whether the row is real: a u32, not 0.
    pub(super) counts: Option<DeviceSlice>,
    pub(super) splits: usize,
    pub(super) stride: usize,
    pub(super) renormalize: bool,
}

impl Choice {
    /// A choice that did not come from [`Kernels::route`].
    pub fn new(experts: DeviceSlice, weights: DeviceSlice, top_k: usize) -> Self {
        Self { experts, weights, top_k, routed: None, lists: None, logits: None }
    }

    /// `[rows, top_k]` u32, [`u32::MAX`] for none; not written for a single row whose experts choose for themselves.
    pub fn experts(&self) -> &DeviceSlice {
        &self.experts
    }

    /// How many experts it was made among, where `experts` are the held ones of them.
    ///
    /// # Errors
    /// [`Error::Shape`] when as many are not held.
    pub(super) fn num_routed(&self, op: &'static str, experts: &Experts) -> Result<usize> {
        let num_experts = experts.num_experts();
        match &self.routed {
            None => Ok(num_experts),
            Some(routed) if routed.held.len() == num_experts => Ok(routed.num_experts),
            Some(routed) => Err(Error::shape(op, format!("{} experts", routed.held.len()), num_experts)),
        }
    }
}

/// The pairs (row, chosen expert) by expert.
#[derive(Debug, Clone)]
pub(super) struct Lists {
    /// `[min(pairs, experts)]` groups, [`GROUP_BYTES`] each.
    pub(super) groups: DeviceSlice,
    /// `[rows * top_k]` u32.
    pub(super) pairs: DeviceSlice,
}

/// The kernels of one scheme.
#[derive(Debug)]
struct ByScheme {
    /// For up to [`FEW_PAIRS`] pairs, and for more.
    gate_up_few: Kernel<MoeParams>,
    gate_up_many: Kernel<MoeParams>,
    /// For a single row that has only logits.
    gate_up_row: Kernel<MoeParams>,
    down_many: Kernel<MoeParams>,
    down_row: Kernel<MoeParams>,
}

/// Dynamic shared memory of `gate_up_many` and `down_many`: rounds of weights of 128 rows with their scale words, and of 16 rows of x;
/// as many as `ManyShared` of `kernels/moe_many.cuh` has.
fn many_bytes(scheme: Scheme) -> usize {
    const ROUND_K: usize = 128;
    let rounds = if scheme.bits() == 16 { 2 } else { 3 };
    let words = match scheme {
        Scheme::Fp8 => 2,
        _ => scheme.k_per_word().map_or(0, |k| ROUND_K / k),
    };
    rounds * (MANY_ROWS * (ROUND_K * scheme.bits() / 8 + 4 * words) + 2 * 16 * ROUND_K)
}

/// Dynamic shared memory of `down_row`: for each warp as many spans of a row tile as `EXPERTS` says in `kernels/moe_*.cu`, all of 768
/// inputs with 4-bit weights.
fn row_ring_bytes(scheme: Scheme) -> usize {
    let (span, stages) = match scheme {
        Scheme::Bf16 => (32, 8),
        Scheme::Fp8 => (64, 8),
        Scheme::Int4 { group_size: 32 } => (64, 12),
        Scheme::Int4 { .. } | Scheme::Nvfp4 => (128, 6),
    };
    let words = scheme.k_per_word().map_or(0, |k| usize::max(span / k, 1));
    ROW_EXPERTS * stages * TILE_ROWS * (span * scheme.bits() / 8 + 4 * words)
}

#[derive(Debug)]
pub(super) struct Moe {
    sort: Kernel<MoeParams>,
    combine: Kernel<MoeParams>,
    bf16: ByScheme,
    fp8: ByScheme,
    /// By group size: 32, 64, 128.
    int4: [ByScheme; 3],
    nvfp4: ByScheme,
}

impl Moe {
    /// The kernels of the modules that `module` loads.
    pub(super) fn new(module: impl Fn(&'static str) -> Result<LoadedModule>) -> Result<Self> {
        let kernels = |module: &LoadedModule, name: &str, scheme: Scheme| {
            let name = |op: &str| format!("{op}_{name}");
            let few = |op| Kernel::overlapping(module, &name(op), 0);
            let many_bytes = to_u32(OP, many_bytes(scheme))?;
            let many = |op| Kernel::new(module, &name(op), many_bytes);
            Ok::<_, Error>(ByScheme {
                gate_up_few: few("gate_up_few")?,
                gate_up_many: many("gate_up_many")?,
                gate_up_row: few("gate_up_row")?,
                down_many: many("down_many")?,
                down_row: Kernel::overlapping(
                    module,
                    &name("down_row"),
                    to_u32(OP, row_ring_bytes(scheme))?,
                )?,
            })
        };
        let (around, int4) = (module("moe")?, module("moe_int4")?);
        let group = |group_size| kernels(&int4, &format!("g{group_size}"), Scheme::Int4 { group_size });
        Ok(Self {
            sort: Kernel::new(&around, "moe_sort", 0)?,
            combine: Kernel::new(&around, "moe_combine", 0)?,
            bf16: kernels(&module("moe_bf16")?, "bf16", Scheme::Bf16)?,
            fp8: kernels(&module("moe_fp8")?, "fp8", Scheme::Fp8)?,
            int4: [group(32)?, group(64)?, group(128)?],
            nvfp4: kernels(&module("moe_nvfp4")?, "nvfp4", Scheme::Nvfp4)?,
        })
    }

    fn kernels(&self, scheme: Scheme) -> &ByScheme {
        match scheme {
            Scheme::Bf16 => &self.bf16,
            Scheme::Fp8 => &self.fp8,
            Scheme::Int4 { group_size } => &self.int4[group_index(group_size)],
            Scheme::Nvfp4 => &self.nvfp4,
        }
    }
}

impl Kernels {
    /// `sum over a row's experts, ascending, of weight * down(silu(gate(x)) * up(x))`: `x` and `out` `[rows, hidden]` bf16. Rounds
    /// where the CPU backend does. Up to [`MAX_PAIRS`] pairs, a row has the same bits alone and beside others.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Driver`]; [`Error::Memory`] when the pool is too small: it gives, for each pair, a result of each
    /// of the two products.
    pub fn moe_mlp(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        choice: &Choice,
        experts: &Experts,
        out: &Tensor,
    ) -> Result<()> {
        let call = Call::new(stream, pool, [x, out], choice, experts)?;
        if call.num_pairs > MAX_PAIRS {
            return self.moe_gemm(stream, pool, x, choice, experts, out);
        }
        if call.num_pairs == 0 {
            return Ok(());
        }
        let base = call.params()?;
        if choice.lists.is_none() && choice.logits.is_none() {
            // SAFETY: lists and choice have the sizes that the parameters say; the sort leaves out experts that do not exist.
            unsafe { self.moe.sort.launch(stream, blocks([1, 1], SORT_THREADS)?, &base)? };
        }
        self.gate_up(&call, &base)?;
        if x.rows() == 1 && choice.top_k <= ROW_EXPERTS {
            return self.down_row(&call, &base);
        }
        self.down_and_combine(&call, &base)
    }

    /// `silu(gate(x)) * up(x)` of every pair; of a single row with logits, of the experts that are chosen there.
    fn gate_up(&self, call: &Call<'_>, base: &MoeParams) -> Result<()> {
        let params = MoeParams {
            out: call.inner.address(),
            ..of_weight(base, &call.experts.gate_up, call.x.address())?
        };
        let scheme = call.experts.gate_up.scheme;
        let kernels = self.moe.kernels(scheme);
        let multiprocessors = call.stream.num_sms() as usize;
        let (kernel, rows, shared_bytes) = if call.choice.logits.is_some() {
            (&kernels.gate_up_row, TILE_ROWS, 0)
        } else if is_few(call, multiprocessors) {
            (&kernels.gate_up_few, TILE_ROWS, 0)
        } else {
            (&kernels.gate_up_many, MANY_ROWS / 2, many_bytes(scheme))
        };
        let grid = [call.experts.intermediate().div_ceil(rows), call.max_groups];
        let launch = Launch { shared_bytes: to_u32(OP, shared_bytes)?, ..blocks(grid, NUM_THREADS)? };
        // SAFETY: the weights were made for these sizes; x, inner, lists and choice have the sizes that the parameters say and do
        // not overlap (`Call::new`); everything is aligned to 16 bytes, rows of x too, because hidden is a multiple of 16. Groups
        // name experts that exist, at most `max_groups` of them, which is the number of experts of a single row.
        unsafe { kernel.launch(call.stream, launch, &params) }
    }

    /// The second product and the sum, of a single row.
    fn down_row(&self, call: &Call<'_>, base: &MoeParams) -> Result<()> {
        let params = of_weight(base, &call.experts.down, call.inner.address())?;
        let scheme = call.experts.down.scheme;
        let launch = Launch {
            grid: [to_u32(OP, call.experts.hidden().div_ceil(TILE_ROWS))?, 1, 1],
            num_threads: to_u32(OP, ROW_THREADS)?,
            shared_bytes: to_u32(OP, row_ring_bytes(scheme))?,
        };
        // SAFETY: as `gate_up`; there are at most `ROW_EXPERTS` groups, of one pair each.
        unsafe { self.moe.kernels(scheme).down_row.launch(call.stream, launch, &params) }
    }

    /// The second product, and the sums of the rows in a launch of their own.
    fn down_and_combine(&self, call: &Call<'_>, base: &MoeParams) -> Result<()> {
        let (rows, hidden) = (call.x.rows(), call.experts.hidden());
        let partial = call.pool.take("results of experts", 4 * (call.num_pairs * hidden) as u64)?;
        call.stream.uses(OP, &[&partial])?;
        disjoint(OP, &partial, &[call.x.slice(), call.out.slice(), &call.inner])?;
        let params = of_weight(base, &call.experts.down, call.inner.address())?;
        let down = MoeParams { out: partial.address(), ..params };
        let combine = MoeParams { partial: partial.address(), ..params };
        let down_grid = [padded_n(hidden).div_ceil(MANY_ROWS), call.max_groups];
        let combine_grid = [hidden.div_ceil(COMBINE_COLUMNS * COMBINE_THREADS), rows];
        let scheme = call.experts.down.scheme;
        let down_launch =
            Launch { shared_bytes: to_u32(OP, many_bytes(scheme))?, ..blocks(down_grid, NUM_THREADS)? };
        // SAFETY: as `gate_up`; partial holds a row of hidden columns for each pair; a row has at most `MAX_TOP_K` experts.
        unsafe {
            self.moe.kernels(scheme).down_many.launch(call.stream, down_launch, &down)?;
            self.moe.combine.launch(call.stream, blocks(combine_grid, COMBINE_THREADS)?, &combine)
        }
    }
}

/// Whether a call is for the small blocks: up to [`FEW_PAIRS`] pairs, or where there would be a few more large ones than can run at once.
fn is_few(call: &Call<'_>, multiprocessors: usize) -> bool {
    // Of the experts that are chosen, as many are held here in the mean.
    let groups = call.num_pairs.min(call.num_routed) * call.experts.num_experts() / call.num_routed;
    let blocks = call.experts.intermediate().div_ceil(MANY_ROWS / 2) * groups;
    call.num_pairs <= FEW_PAIRS || is_a_little_more(blocks, MANY_BLOCKS * multiprocessors)
}

/// More than `places`, by up to a half.
fn is_a_little_more(blocks: usize, places: usize) -> bool {
    (places + 1..=places + places / 2).contains(&blocks)
}

fn blocks([x, y]: [usize; 2], num_threads: usize) -> Result<Launch> {
    let grid = [to_u32(OP, x)?, to_u32(OP, y)?, 1];
    Ok(Launch { grid, num_threads: to_u32(OP, num_threads)?, shared_bytes: 0 })
}

/// `base` for a product of `x` with `weight`.
fn of_weight(base: &MoeParams, weight: &PackedWeight, x: u64) -> Result<MoeParams> {
    Ok(MoeParams {
        codes: weight.codes.address(),
        scales: weight.scales.address(),
        row_scales: weight.row_scales.as_ref().map_or(0, DeviceSlice::address),
        x,
        n: to_u32(OP, weight.n)?,
        padded_n: to_u32(OP, padded_n(weight.n))?,
        k: to_u32(OP, padded_k(weight.k))?,
        x_columns: to_u32(OP, weight.k)?,
        ..*base
    })
}

/// A checked call for few rows and the memory that it works in.
struct Call<'a> {
    stream: &'a Stream,
    pool: &'a Pool,
    x: &'a Tensor,
    out: &'a Tensor,
    choice: &'a Choice,
    experts: &'a Experts,
    num_pairs: usize,
    num_routed: usize,
    max_groups: usize,
    lists: Lists,
    /// `[pairs, intermediate]` bf16.
    inner: DeviceSlice,
}

impl<'a> Call<'a> {
    /// Checks sizes, devices and overlaps of all that a call touches. Takes no memory for more than [`MAX_PAIRS`] pairs.
    fn new(
        stream: &'a Stream,
        pool: &'a Pool,
        [x, out]: [&'a Tensor; 2],
        choice: &'a Choice,
        experts: &'a Experts,
    ) -> Result<Self> {
        let shape = [x.rows(), experts.hidden()];
        x.expect(OP, shape, Dtype::Bf16)?;
        out.expect(OP, shape, Dtype::Bf16)?;
        let num_routed = choice.num_routed(OP, experts)?;
        let num_pairs = checked_pairs(x.rows(), choice.top_k, num_routed)?;
        for slice in [&choice.experts, &choice.weights] {
            words(OP, slice, num_pairs)?;
        }
        if choice.logits.is_some() && (x.rows() != 1 || choice.top_k > ROW_EXPERTS) {
            let rule = format!("one row with logits, and at most {ROW_EXPERTS} experts of it");
            return Err(Error::shape(OP, rule, (x.rows(), choice.top_k)));
        }
        let few = if num_pairs > MAX_PAIRS { 0 } else { num_pairs };
        let max_groups = few.min(experts.num_experts());
        let lists = match &choice.lists {
            Some(lists) if few > 0 => lists.clone(),
            _ => Lists {
                groups: pool.take("groups of pairs", (GROUP_BYTES * max_groups) as u64)?,
                pairs: pool.take("pairs by expert", 4 * few as u64)?,
            },
        };
        words(OP, &lists.groups, GROUP_BYTES / 4 * max_groups)?;
        words(OP, &lists.pairs, few)?;
        let inner = pool.take("inner activations of experts", 2 * (few * experts.intermediate()) as u64)?;
        let mut read: Vec<&DeviceSlice> = vec![x.slice(), &choice.experts, &choice.weights];
        read.extend(experts.gate_up.slices().chain(experts.down.slices()));
        disjoint(OP, out.slice(), &read)?;
        disjoint(OP, &inner, &read)?;
        disjoint(OP, &inner, &[out.slice()])?;
        if let Some(logits) = &choice.logits {
            read.extend([&logits.partial].into_iter().chain(&logits.bias).chain(&logits.counts));
            disjoint(OP, out.slice(), &read)?;
        }
        read.extend([out.slice(), &lists.groups, &lists.pairs, &inner]);
        stream.uses(OP, &read)?;
        Ok(Self { stream, pool, x, out, choice, experts, num_pairs, num_routed, max_groups, lists, inner })
    }

    /// What all launches have in common.
    fn params(&self) -> Result<MoeParams> {
        let (logits, routed) = (self.choice.logits.as_ref(), self.choice.routed.as_ref());
        let address = |slice: Option<&DeviceSlice>| slice.map_or(0, DeviceSlice::address);
        Ok(MoeParams {
            out: self.out.address(),
            experts: self.choice.experts.address(),
            weights: self.choice.weights.address(),
            groups: self.lists.groups.address(),
            pairs: self.lists.pairs.address(),
            logits: address(logits.map(|logits| &logits.partial)),
            router_bias: address(logits.and_then(|logits| logits.bias.as_ref())),
            counts: address(logits.and_then(|logits| logits.counts.as_ref())),
            rows: to_u32(OP, self.x.rows())?,
            top_k: to_u32(OP, self.choice.top_k)?,
            num_experts: to_u32(OP, self.experts.num_experts())?,
            max_groups: to_u32(OP, self.max_groups)?,
            splits: to_u32(OP, logits.map_or(0, |logits| logits.splits))?,
            logits_stride: to_u32(OP, logits.map_or(0, |logits| logits.stride))?,
            renormalize: logits.is_some_and(|logits| logits.renormalize).into(),
            num_routed: to_u32(OP, routed.map_or(0, |routed| routed.num_experts))?,
            first_held: to_u32(OP, routed.map_or(0, |routed| routed.held.start))?,
            ..MoeParams::default()
        })
    }
}

/// Pairs of `rows` rows.
fn checked_pairs(rows: usize, top_k: usize, num_experts: usize) -> Result<usize> {
    let most = num_experts.min(MAX_TOP_K);
    if top_k == 0 || top_k > most {
        return Err(Error::shape(OP, format!("1 to {most} experts of a row"), top_k));
    }
    rows.checked_mul(top_k)
        .filter(|&pairs| u32::try_from(pairs).is_ok())
        .ok_or_else(|| Error::shape(OP, "at most 4294967295 chosen experts of all rows", (rows, top_k)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit_the_smallest_device() {
        let int4 = [32, 64, 128].map(|group_size| Scheme::Int4 { group_size });
        for scheme in [Scheme::Bf16, Scheme::Fp8, Scheme::Nvfp4].into_iter().chain(int4) {
            // With what the kernels have besides.
            for bytes in [many_bytes(scheme), row_ring_bytes(scheme) + 608] {
                assert!(bytes <= 101_376, "{scheme:?}: {bytes}");
            }
        }
        // Two blocks on a multiprocessor of GB10, with what each takes besides.
        let g128 = Scheme::Int4 { group_size: 128 };
        assert!(2 * (many_bytes(g128) + 1024) <= 100 << 10);
        assert_eq!(row_ring_bytes(g128), 8 * 6 * (16 * 64 + 64));
    }

    #[test]
    fn small_blocks_are_for_few_pairs_and_for_a_bad_number_of_large_ones() {
        // 4, 8 and 16 rows of the 30B on 132 multiprocessors.
        assert_eq!([32, 64, 128].map(|groups| is_a_little_more(12 * groups, 528)), [false, true, false]);
    }

    #[test]
    fn pairs_are_bounded() {
        assert_eq!(checked_pairs(128, 8, 128).unwrap(), MAX_PAIRS);
        assert_eq!(checked_pairs(0, 8, 128).unwrap(), 0);
        for (rows, top_k, num_experts) in
            [(1, 0, 8), (1, 9, 8), (1, 33, 64), (usize::MAX, 2, 8), (1 << 30, 4, 8)]
        {
            assert!(checked_pairs(rows, top_k, num_experts).is_err(), "{rows} {top_k}");
        }
    }
}
