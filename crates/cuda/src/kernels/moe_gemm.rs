//! Wrapper of `kernels/moe_gemm.cu`: a layer of experts for many rows, with the products of `gemm.rs`. Few rows are in `moe.rs`.

use spark_backend::Dtype;

use super::fp8x::{self, Fp8Rows};
use super::gemm::{BLOCK_ROWS, Block, GemmParams, What};
use super::nvfp4_mma::Nvfp4Rows;
use super::pack::Scheme;
use super::prefill::Quantised;
use super::{Choice, Experts, Kernels, LoadedModule, PackedWeight, disjoint, to_u32, words};
use crate::launch::{Kernel, Launch, Params};
use crate::{DeviceSlice, Error, Pool, Result, Stream, Tensor};

const OP: &str = "moe_gemm";
/// Threads of a block that sorts, and its pairs: constants of the kernel.
const SORT_THREADS: u32 = 256;
const SORT_PAIRS: usize = 2048;
/// Most pairs: the kernels' numbers are 32 bits wide, and grids must hold the tiles.
const MAX_PAIRS: usize = 1 << 20;
/// Most rows: blocks along the second axis of a grid.
const MAX_ROWS: usize = 65_535;
/// Bytes of `Tile` of `kernels/gemm_stage.cuh`.
const TILE_BYTES: usize = 16;
/// Bytes of the results of `down` at a time: there is one for each pair, so columns are done in turn.
pub(crate) const PARTIAL_BYTES: usize = 128 << 20;
/// Threads of a block that adds, and columns of a thread.
const ADD_THREADS: usize = 256;
const ADD_COLUMNS: usize = 8;

/// `MoeSortParams` of `kernels/moe_gemm.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MoeSortParams {
    experts: u64,
    counts: u64,
    tiles: u64,
    pairs: u64,
    num_pairs: u32,
    num_experts: u32,
    tile_pairs: u32,
    max_tiles: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 4 * 8 + 4 * 4 bytes, no padding.
unsafe impl Params for MoeSortParams {
    const NAME: &'static str = "MoeSortParams";
}

/// `MoeAddParams` of `kernels/moe_gemm.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MoeAddParams {
    partial: u64,
    factors: u64,
    experts: u64,
    weights: u64,
    out: u64,
    top_k: u32,
    num_experts: u32,
    columns: u32,
    stride: u32,
    out_columns: u32,
    first_column: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 5 * 8 + 6 * 4 bytes, no padding.
unsafe impl Params for MoeAddParams {
    const NAME: &'static str = "MoeAddParams";
}

#[derive(Debug)]
pub(super) struct MoeGemm {
    count: Kernel<MoeSortParams>,
    place: Kernel<MoeSortParams>,
    add: Kernel<MoeAddParams>,
}

impl MoeGemm {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        Ok(Self {
            count: Kernel::new(module, "moe_count", 0)?,
            place: Kernel::new(module, "moe_place", 0)?,
            add: Kernel::new(module, "moe_add", 0)?,
        })
    }
}

/// How a layer is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    num_pairs: usize,
    /// What multiplies a tile: it has up to as many pairs.
    block: Block,
    /// Most tiles that there can be.
    max_tiles: usize,
    /// Columns of the result at a time.
    columns: usize,
}

impl Cut {
    /// `[num_experts, num_routed]`: experts that are held, and all that pairs may have. `is_bf16`: weights of experts are, which
    /// the largest blocks are not for.
    fn new(num_pairs: usize, [num_experts, num_routed]: [usize; 2], hidden: usize, is_bf16: bool) -> Self {
        // Measured (docs/kernels/gemm.md): tiles that the mean expert about fills.
        let block = match num_pairs / num_pairs.min(num_routed).max(1) {
            0..=22 => Block::Tokens16,
            23..=64 => Block::Tokens32,
            128.. if !is_bf16 => Block::Tokens128,
            _ => Block::Tokens64,
        };
        let columns = PARTIAL_BYTES / (2 * num_pairs.max(1)) / BLOCK_ROWS * BLOCK_ROWS;
        let columns = columns.clamp(BLOCK_ROWS, hidden.max(BLOCK_ROWS)).min(hidden);
        Self { num_pairs, block, max_tiles: 0, columns }.with_block(block, num_experts)
    }

    fn with_block(self, block: Block, num_experts: usize) -> Self {
        let max_tiles = self.num_pairs / block.tokens() + self.num_pairs.min(num_experts);
        Self { block, max_tiles, ..self }
    }
}

/// The pieces of scratch memory of a call.
struct Scratch {
    counts: DeviceSlice,
    tiles: DeviceSlice,
    pairs: DeviceSlice,
    /// `[pairs, intermediate]` bf16, in the order of the list.
    inner: DeviceSlice,
    /// `[pairs, columns]` f16.
    partial: DeviceSlice,
    /// `[pairs, columns / 128]` f32.
    factors: DeviceSlice,
}

impl Scratch {
    fn take(pool: &Pool, cut: &Cut, experts: &Experts) -> Result<Self> {
        let take = |what, num_bytes: usize| pool.take(what, num_bytes as u64);
        let blocks = cut.num_pairs.div_ceil(SORT_PAIRS);
        Ok(Self {
            counts: take("counts of experts", 4 * blocks * experts.num_experts())?,
            tiles: take("tiles of experts", TILE_BYTES * cut.max_tiles)?,
            pairs: take("pairs of experts", 4 * cut.num_pairs)?,
            inner: take("inner values of experts", 2 * cut.num_pairs * experts.intermediate())?,
            partial: take("results of experts", 2 * cut.num_pairs * cut.columns)?,
            factors: take("factors of experts", 4 * cut.num_pairs * cut.columns.div_ceil(BLOCK_ROWS))?,
        })
    }

    fn slices(&self) -> [&DeviceSlice; 6] {
        [&self.counts, &self.tiles, &self.pairs, &self.inner, &self.partial, &self.factors]
    }
}

impl Kernels {
    /// [`Kernels::moe_mlp`] for many rows: `x` and `out` `[rows, hidden]` bf16. Rounds where the CPU backend does; choices of experts
    /// that do not exist count nothing. Equal inputs give equal bits; the size of tiles depends on the number of rows.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Driver`]; [`Error::Memory`] when the pool has no room for what lies between the products.
    pub fn moe_gemm(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        choice: &Choice,
        experts: &Experts,
        out: &Tensor,
    ) -> Result<()> {
        self.moe_gemm_blocks(stream, pool, [x, out], choice, experts, None)
    }

    /// [`Kernels::moe_gemm`] with given blocks instead of the best.
    pub(crate) fn moe_gemm_blocks(
        &self,
        stream: &Stream,
        pool: &Pool,
        [x, out]: [&Tensor; 2],
        choice: &Choice,
        experts: &Experts,
        block: Option<Block>,
    ) -> Result<()> {
        let cut = checked(stream, [x, out], choice, experts)?;
        let cut = block.map_or(cut, |block| cut.with_block(block, experts.num_experts()));
        if cut.num_pairs == 0 {
            return Ok(());
        }
        let has_fp8x = [&experts.gate_up, &experts.down]
            .iter()
            .any(|weight| self.quantised_experts(weight.scheme, cut.block) == Some(Quantised::Fp8));
        let cut = if has_fp8x { cut.with_block(fp8x::TILE, experts.num_experts()) } else { cut };
        let scratch = Scratch::take(pool, &cut, experts)?;
        let slices = scratch.slices();
        stream.uses(OP, &slices)?;
        for slice in slices {
            disjoint(OP, slice, &[x.slice(), out.slice(), &choice.experts, &choice.weights])?;
        }
        let call = Call { kernels: self, stream, pool, choice, experts, cut, scratch };
        call.sort()?;
        call.gate_up(x)?;
        let inner = call.operand((&call.scratch.inner, cut.num_pairs), &experts.down)?;
        let hidden = experts.hidden();
        for first in (0..hidden).step_by(cut.columns) {
            let columns = cut.columns.min(hidden - first);
            call.down(&inner, first, columns)?;
            call.add(first, columns, out)?;
        }
        Ok(())
    }
}

/// The rows of x of a product, as tensor cores are given them.
enum Operand {
    /// As the parameters say.
    Bf16,
    Fp8(Fp8Rows),
    Nvfp4(Nvfp4Rows),
}

/// One call: what its launches share.
struct Call<'a> {
    kernels: &'a Kernels,
    stream: &'a Stream,
    pool: &'a Pool,
    choice: &'a Choice,
    experts: &'a Experts,
    cut: Cut,
    scratch: Scratch,
}

impl Call<'_> {
    /// The lists of pairs and tiles.
    fn sort(&self) -> Result<()> {
        let Self { cut, scratch, .. } = self;
        let params = MoeSortParams {
            experts: self.choice.experts.address(),
            counts: scratch.counts.address(),
            tiles: scratch.tiles.address(),
            pairs: scratch.pairs.address(),
            num_pairs: to_u32(OP, cut.num_pairs)?,
            num_experts: to_u32(OP, self.experts.num_experts())?,
            tile_pairs: to_u32(OP, cut.block.tokens())?,
            max_tiles: to_u32(OP, cut.max_tiles)?,
        };
        let launch = Launch::blocks(to_u32(OP, cut.num_pairs.div_ceil(SORT_PAIRS))?, SORT_THREADS);
        // SAFETY: the choice has `num_pairs` words; the pieces of scratch memory have the sizes that the parameters say; there
        // are at most 1024 experts (`Experts`), and at most `max_tiles` tiles whatever the choice.
        unsafe {
            self.kernels.moe_gemm.count.launch(self.stream, launch, &params)?;
            self.kernels.moe_gemm.place.launch(self.stream, launch, &params)
        }
    }

    /// inner = silu(gate x) * up x.
    fn gate_up(&self, x: &Tensor) -> Result<()> {
        let (weight, intermediate) = (&self.experts.gate_up, self.experts.intermediate());
        let params = GemmParams {
            out: self.scratch.inner.address(),
            tiles: self.scratch.tiles.address(),
            pairs: self.scratch.pairs.address(),
            out_columns: to_u32(OP, intermediate)?,
            num_rows: to_u32(OP, intermediate)?,
            top_k: to_u32(OP, self.choice.top_k)?,
            ..GemmParams::of(weight, x.address(), What::GateUp)?
        };
        // A block has as many rows of gate as of up.
        let grid = [intermediate.div_ceil(BLOCK_ROWS / 2), self.cut.max_tiles];
        // SAFETY: the tiles name existing experts and places in the list of pairs, which has numbers below `num_pairs`; weights are
        // those of `PackedHost`; x has a row for each `top_k` pairs and inner one for each pair, all aligned to 16 bytes, because
        // hidden and intermediate size are multiples of 16.
        unsafe { self.product(&self.operand((x.slice(), x.rows()), weight)?, weight, grid, &params) }
    }

    /// partial = `columns` columns of down inner, from `first` on.
    fn down(&self, inner: &Operand, first: usize, columns: usize) -> Result<()> {
        let weight = &self.experts.down;
        let params = GemmParams {
            out: self.scratch.partial.address(),
            tiles: self.scratch.tiles.address(),
            pairs: self.scratch.pairs.address(),
            factors: self.scratch.factors.address(),
            out_columns: to_u32(OP, columns)?,
            first_row: to_u32(OP, first)?,
            num_rows: to_u32(OP, columns)?,
            ..GemmParams::of(weight, self.scratch.inner.address(), What::Down)?
        };
        let grid = [columns.div_ceil(BLOCK_ROWS), self.cut.max_tiles];
        // SAFETY: as for `gate_up`; `first` is a multiple of 128, and partial has `columns` for each pair.
        unsafe { self.product(inner, weight, grid, &params) }
    }

    /// What `rows` rows of bf16, as wide as `weight`, become for their product with it.
    fn operand(&self, (x, rows): (&DeviceSlice, usize), weight: &PackedWeight) -> Result<Operand> {
        let Self { kernels, stream, pool, cut, .. } = self;
        Ok(match kernels.quantised_experts(weight.scheme, cut.block) {
            None => Operand::Bf16,
            Some(Quantised::Fp8) => Operand::Fp8(kernels.fp8x.quantise(stream, pool, (x, rows), weight)?),
            Some(Quantised::Nvfp4) => {
                let nvfp4 = kernels.nvfp4_mma(weight)?;
                Operand::Nvfp4(nvfp4.quantize(stream, pool, x, [rows, weight.k], None)?)
            }
        })
    }

    /// A product over the rows of bf16 that `params` call x.
    ///
    /// # Safety
    /// As for `Gemm::launch`; `x` was made of these rows for `weight`.
    unsafe fn product(
        &self,
        x: &Operand,
        weight: &PackedWeight,
        grid: [usize; 2],
        params: &GemmParams,
    ) -> Result<()> {
        let Self { kernels, stream, cut, .. } = self;
        match x {
            // SAFETY: the caller's promise; `cut.block` has tiles of its size.
            Operand::Fp8(rows) => unsafe { kernels.fp8x.launch(stream, rows, grid, params) },
            // SAFETY: the caller's promise.
            Operand::Nvfp4(rows) => unsafe {
                kernels.nvfp4_mma(weight)?.launch(stream, rows, cut.block, grid, params)
            },
            // SAFETY: the caller's promise.
            Operand::Bf16 => unsafe { kernels.gemm.launch(stream, (weight.scheme, cut.block), grid, params) },
        }
    }

    /// The same columns of `out`.
    fn add(&self, first: usize, columns: usize, out: &Tensor) -> Result<()> {
        let params = MoeAddParams {
            partial: self.scratch.partial.address(),
            factors: self.scratch.factors.address(),
            experts: self.choice.experts.address(),
            weights: self.choice.weights.address(),
            out: out.address(),
            top_k: to_u32(OP, self.choice.top_k)?,
            num_experts: to_u32(OP, self.experts.num_experts())?,
            columns: to_u32(OP, columns)?,
            stride: to_u32(OP, columns)?,
            out_columns: to_u32(OP, out.columns())?,
            first_column: to_u32(OP, first)?,
        };
        let threads = columns.div_ceil(ADD_COLUMNS).next_multiple_of(32).min(ADD_THREADS);
        let blocks = columns.div_ceil(ADD_COLUMNS * threads);
        let launch = Launch {
            grid: [to_u32(OP, blocks)?, to_u32(OP, out.rows())?, 1],
            num_threads: to_u32(OP, threads)?,
            shared_bytes: 0,
        };
        // SAFETY: choice, partial and out have the sizes that the parameters say; columns are multiples of 16, so whole groups of
        // 8 are aligned; a row has at most 1024 choices.
        unsafe { self.kernels.moe_gemm.add.launch(self.stream, launch, &params) }
    }
}

/// Checks what the kernels take for granted.
fn checked(stream: &Stream, [x, out]: [&Tensor; 2], choice: &Choice, experts: &Experts) -> Result<Cut> {
    let (rows, hidden, num_routed) = (x.rows(), experts.hidden(), choice.num_routed(OP, experts)?);
    x.expect(OP, [rows, hidden], Dtype::Bf16)?;
    out.expect(OP, [rows, hidden], Dtype::Bf16)?;
    if choice.top_k == 0 || choice.top_k > num_routed {
        return Err(Error::shape(OP, format!("1 to {num_routed} experts of a row"), choice.top_k));
    }
    let num_pairs = rows.checked_mul(choice.top_k).filter(|&pairs| pairs <= MAX_PAIRS && rows <= MAX_ROWS);
    let num_pairs = num_pairs.ok_or_else(|| {
        let expected = format!("at most {MAX_ROWS} rows and {MAX_PAIRS} chosen experts");
        Error::shape(OP, expected, (rows, choice.top_k))
    })?;
    // The kernel counts pieces of 16 bytes.
    to_u32(OP, num_pairs * hidden.max(experts.intermediate()) / 8)?;
    for slice in [&choice.experts, &choice.weights] {
        words(OP, slice, num_pairs)?;
    }
    let mut read: Vec<&DeviceSlice> = vec![x.slice(), &choice.experts, &choice.weights];
    read.extend(experts.gate_up.slices().chain(experts.down.slices()));
    disjoint(OP, out.slice(), &read)?;
    read.push(out.slice());
    stream.uses(OP, &read)?;
    let is_bf16 = [&experts.gate_up, &experts.down].iter().any(|weight| weight.scheme == Scheme::Bf16);
    Ok(Cut::new(num_pairs, [experts.num_experts(), num_routed], hidden, is_bf16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_as_large_as_experts_fill_and_always_enough() {
        let tile = |rows: usize| Cut::new(8 * rows, [128; 2], 2048, false).block.tokens();
        assert_eq!([129, 160, 512, 1100, 2048, 8192].map(tile), [16, 16, 32, 64, 128, 128]);
        assert_eq!(Cut::new(65_536, [128; 2], 2048, true).block, Block::Tokens64);
        let half = Cut::new(65_536, [64, 128], 2048, false);
        assert_eq!(
            (half.block, half.max_tiles),
            (Block::Tokens128, 512 + 64),
            "half of the experts, perhaps all pairs"
        );
        for (num_pairs, num_experts) in [(1, 1), (5, 7), (1032, 128), (4096, 16), (65_536, 128)] {
            let cut = Cut::new(num_pairs, [num_experts; 2], 2048, false);
            // The worst choice: all experts but one have one pair more than whole tiles.
            let mut left = num_pairs;
            let mut tiles = 0;
            for _ in 1..num_experts {
                let pairs = left.min(1);
                (left, tiles) = (left - pairs, tiles + pairs);
            }
            tiles += left.div_ceil(cut.block.tokens());
            assert!(tiles <= cut.max_tiles, "{cut:?}");
        }
    }

    #[test]
    fn results_of_many_pairs_come_in_columns() {
        assert_eq!(Cut::new(1032, [128; 2], 2048, false).columns, 2048);
        assert_eq!(Cut::new(65_536, [128; 2], 2048, false).columns, 1024);
        assert_eq!(Cut::new(MAX_PAIRS, [128; 2], 2048, false).columns, BLOCK_ROWS);
        assert_eq!(Cut::new(2000, [4; 2], 80, false).columns, 80);
    }
}
