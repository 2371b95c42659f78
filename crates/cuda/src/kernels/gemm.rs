//! Wrapper of `kernels/gemm_*.cu`: products with packed weights of any scheme for many rows of x, on tensor cores. Few rows are in
//! `linear.rs`, experts in `moe_gemm.rs`.

use std::fmt;

use spark_backend::{Activation, Dtype};

use super::pack::{Scheme, padded_k, padded_n};
use super::prefill::Quantised;
use super::{Kernels, Linear, LoadedModule, MAX_DECODE_ROWS, PackedWeight, disjoint, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{Arch, DeviceSlice, Error, Pool, Result, Stream, Tensor};

const OP: &str = "gemm";
/// Rows of W of a block, inputs of a stage: constants of the kernel.
pub(super) const BLOCK_ROWS: usize = 128;
const STEP: usize = 64;
/// The kernels of a scheme, in the order of [`Block`]: the end of the name.
const KERNELS: [(Block, &str); 5] = [
    (Block::Tokens16, "t16"),
    (Block::Tokens32, "t32"),
    (Block::Tokens64, "t64"),
    (Block::Wide64, "t64_wide"),
    (Block::Tokens128, "t128"),
];
/// Most shared memory that the stages of a block may have: with the kernel's own, GB10's limit.
const MAX_SHARED: usize = 100_352;
/// The same where two or three blocks are to share a multiprocessor.
const HALF_SHARED: usize = 49_152;
const THIRD_SHARED: usize = 32_256;
/// Bytes of W that blocks which run at the same time go over again and again: they should stay in the second-level cache.
const PANEL_BYTES: usize = 8 << 20;
/// Up to so many rows k may be split over blocks: the sums that then go through memory grow with the rows.
const MAX_SPLIT_ROWS: usize = 256;
/// Fewest inputs of a split, and what splits start at: whole groups.
const SPLIT_K: usize = 256;
/// Columns of out that a thread stores at once, and goes on with.
const AFTER_COLUMNS: usize = 8;
/// Threads of a block that adds, and columns of a thread.
const ADD_THREADS: u32 = 128;
const ADD_COLUMNS: u32 = 4;

/// A block of threads: how many rows of x it takes, with two warps along 128 rows of W, or four ([`Block::Wide64`]): the faster
/// one where there are few blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Block {
    Tokens16,
    Tokens32,
    Tokens64,
    Wide64,
    Tokens128,
}

impl Block {
    /// Rows of x.
    pub(crate) fn tokens(self) -> usize {
        match self {
            Self::Tokens16 => 16,
            Self::Tokens32 => 32,
            Self::Tokens64 | Self::Wide64 => 64,
            Self::Tokens128 => 128,
        }
    }

    fn num_threads(self) -> u32 {
        match self {
            Self::Tokens16 | Self::Tokens32 | Self::Tokens64 => 64,
            Self::Wide64 | Self::Tokens128 => 128,
        }
    }
}

/// What a launch does: the kernel's enum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum What {
    StoreBf16 = 0,
    StoreF32 = 1,
    StoreSplits = 2,
    GateUp = 3,
    Down = 4,
}

/// What becomes of the rounded results of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The activation of them, rounded.
    Activate(Activation),
    /// They are added to what the result holds, and rounded.
    Add,
}

impl fmt::Display for After {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Activate(Activation::GeluTanh | Activation::GeluErf) => "gelu",
            Self::Activate(Activation::Silu) => "silu",
            Self::Add => "add",
        })
    }
}

impl After {
    /// The kernel's number for it; the kernel has no SiLU.
    fn number(self) -> Option<u32> {
        match self {
            Self::Activate(Activation::GeluTanh) => Some(1),
            Self::Activate(Activation::GeluErf) => Some(2),
            Self::Add => Some(3),
            Self::Activate(Activation::Silu) => None,
        }
    }
}

/// `GemmParams` of `kernels/gemm_stage.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct GemmParams {
    pub(super) codes: u64,
    pub(super) scales: u64,
    pub(super) row_scales: u64,
    pub(super) bias: u64,
    pub(super) x: u64,
    pub(super) out: u64,
    pub(super) tiles: u64,
    pub(super) pairs: u64,
    pub(super) factors: u64,
    pub(super) n: u32,
    pub(super) padded_n: u32,
    pub(super) k: u32,
    pub(super) x_columns: u32,
    pub(super) rows: u32,
    pub(super) out_columns: u32,
    pub(super) first_column: u32,
    pub(super) first_row: u32,
    pub(super) num_rows: u32,
    pub(super) what: u32,
    pub(super) top_k: u32,
    pub(super) panel: u32,
    pub(super) steps_per_split: u32,
    pub(super) after: u32,
    pub(super) x_sums: u64,
    pub(super) x_scales: u64,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 9 * 8 + 14 * 4 + 2 * 8 bytes, no padding.
unsafe impl Params for GemmParams {
    const NAME: &'static str = "GemmParams";
}

impl GemmParams {
    /// All of `weight` (of one expert), times bf16 rows at address `x`; where results go is still to be said.
    pub(super) fn of(weight: &PackedWeight, x: u64, what: What) -> Result<Self> {
        let n = to_u32(OP, weight.n)?;
        // The kernel counts pieces of 16 bytes.
        to_u32(OP, (weight.codes.num_bytes() / 16) as usize)?;
        Ok(Self {
            codes: weight.codes.address(),
            scales: weight.scales.address(),
            row_scales: weight.row_scales.as_ref().map_or(0, DeviceSlice::address),
            bias: weight.bias.as_ref().map_or(0, DeviceSlice::address),
            x,
            out: 0,
            tiles: 0,
            pairs: 0,
            factors: 0,
            n,
            padded_n: to_u32(OP, padded_n(weight.n))?,
            k: to_u32(OP, padded_k(weight.k))?,
            x_columns: to_u32(OP, weight.k)?,
            rows: 0,
            out_columns: n,
            first_column: 0,
            first_row: 0,
            num_rows: n,
            what: what as u32,
            top_k: 1,
            panel: 1,
            steps_per_split: 0,
            after: 0,
            x_sums: 0,
            x_scales: 0,
        })
    }
}

/// `GemmAddParams` of `kernels/gemm_add.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct GemmAddParams {
    partial: u64,
    row_scales: u64,
    bias: u64,
    out: u64,
    n: u32,
    stride: u32,
    rows: u32,
    splits: u32,
    out_columns: u32,
    first_column: u32,
    out_is_f32: u32,
    padding: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 4 * 8 + 8 * 4 bytes, no padding.
unsafe impl Params for GemmAddParams {
    const NAME: &'static str = "GemmAddParams";
}

/// The kernels of one scheme, as [`KERNELS`].
type ByBlock = [Kernel<GemmParams>; KERNELS.len()];

/// Loads the kernels `gemm_{name}_t*` of a scheme.
fn by_block(arch: Arch, module: &LoadedModule, name: &str, scheme: Scheme) -> Result<ByBlock> {
    let kernel = |i: usize| {
        let (block, end) = KERNELS[i];
        let shared_bytes = to_u32(OP, shared_bytes(arch, scheme, block.tokens()))?;
        Kernel::new(module, &format!("gemm_{name}_{end}"), shared_bytes)
    };
    Ok([kernel(0)?, kernel(1)?, kernel(2)?, kernel(3)?, kernel(4)?])
}

/// Bytes of the stages of a block: x, weights and scale words of 64 inputs. As many as the kernel has: up to four; where a
/// multiprocessor has 100 KiB, two or more in a third of that, so that it has several blocks, and as many as fit where two
/// do not fit its half.
fn shared_bytes(arch: Arch, scheme: Scheme, tokens: usize) -> usize {
    let words = scheme.k_per_word().map_or(0, |k| STEP.div_ceil(k));
    let stage = tokens * STEP * 2 + BLOCK_ROWS * STEP * scheme.bits() / 8 + BLOCK_ROWS * 4 * words;
    if arch == Arch::Sm90 || 2 * stage > HALF_SHARED {
        stage * (MAX_SHARED / stage).min(4)
    } else {
        stage * (THIRD_SHARED / stage).clamp(2, 4)
    }
}

#[derive(Debug)]
pub(super) struct Gemm {
    arch: Arch,
    bf16: ByBlock,
    fp8: ByBlock,
    /// By group size: 32, 64, 128.
    int4: [ByBlock; 3],
    nvfp4: ByBlock,
    add: Kernel<GemmAddParams>,
}

impl Gemm {
    /// The modules by the name of their file.
    pub(super) fn new(arch: Arch, module: impl Fn(&'static str) -> Result<LoadedModule>) -> Result<Self> {
        let group = |group_size, name| {
            by_block(arch, &module(name)?, &format!("g{group_size}"), Scheme::Int4 { group_size })
        };
        Ok(Self {
            arch,
            bf16: by_block(arch, &module("gemm_bf16")?, "bf16", Scheme::Bf16)?,
            fp8: by_block(arch, &module("gemm_fp8")?, "fp8", Scheme::Fp8)?,
            int4: [group(32, "gemm_g32")?, group(64, "gemm_g64")?, group(128, "gemm_g128")?],
            nvfp4: by_block(arch, &module("gemm_nvfp4")?, "nvfp4", Scheme::Nvfp4)?,
            add: Kernel::new(&module("gemm_add")?, "gemm_add", 0)?,
        })
    }

    pub(super) fn arch(&self) -> Arch {
        self.arch
    }

    /// Puts the kernel for `scheme` and `block` into `stream`.
    ///
    /// # Safety
    /// As for [`Kernel::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        (scheme, block): (Scheme, Block),
        grid: [usize; 2],
        params: &GemmParams,
    ) -> Result<()> {
        let by_block = match scheme {
            Scheme::Bf16 => &self.bf16,
            Scheme::Fp8 => &self.fp8,
            Scheme::Int4 { group_size } => &self.int4[super::linear::group_index(group_size)],
            Scheme::Nvfp4 => &self.nvfp4,
        };
        let shared_bytes = shared_bytes(self.arch, scheme, block.tokens());
        let launch = launch_of(OP, grid, block.num_threads(), shared_bytes)?;
        // `KERNELS` has one for each block, in their order.
        let kernel = &by_block[block as usize];
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(stream, launch, params) }
    }
}

/// Most blocks along the second axis of a grid.
const MAX_GRID_Y: usize = 65_535;

/// The launch of a product over `grid` blocks.
pub(super) fn launch_of(
    op: &'static str,
    grid: [usize; 2],
    num_threads: u32,
    shared_bytes: usize,
) -> Result<Launch> {
    if grid[1] > MAX_GRID_Y {
        return Err(Error::shape(op, format!("at most {MAX_GRID_Y} tiles"), grid[1]));
    }
    let grid = [to_u32(op, grid[0])?, to_u32(op, grid[1])?, 1];
    Ok(Launch { grid, num_threads, shared_bytes: to_u32(op, shared_bytes)? })
}

/// How a dense product is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GemmCut {
    pub(crate) block: Block,
    /// Parts of k.
    pub(crate) splits: usize,
    /// Stages of a part.
    pub(super) steps_per_split: usize,
}

impl GemmCut {
    /// Large blocks do more with what they load; there should be one for each multiprocessor. With few rows the parts of k
    /// make up for it.
    fn new(rows: usize, n: usize, k: usize, multiprocessors: usize) -> Self {
        let num_blocks = |block: Block| n.div_ceil(BLOCK_ROWS) * rows.div_ceil(block.tokens());
        let block = match rows {
            0..=16 => Block::Tokens16,
            17..=32 => Block::Tokens32,
            65.. if num_blocks(Block::Tokens128) >= multiprocessors => Block::Tokens128,
            _ => Block::Wide64,
        };
        let wanted = 2 * multiprocessors / num_blocks(block).max(1);
        let most = padded_k(k) / SPLIT_K;
        Self::of(k, block, if rows <= MAX_SPLIT_ROWS { wanted.min(most).max(1) } else { 1 })
    }

    /// About `splits` parts of k.
    pub(crate) fn of(k: usize, block: Block, splits: usize) -> Self {
        let steps = padded_k(k) / STEP;
        // A part starts at a multiple of 128 inputs.
        let steps_per_split = steps.div_ceil(splits).next_multiple_of(2);
        Self { block, splits: steps.div_ceil(steps_per_split), steps_per_split }
    }
}

/// Blocks of rows of W that share the second-level cache.
fn panel(weight: &PackedWeight) -> usize {
    let block_bytes = BLOCK_ROWS * padded_k(weight.k) * weight.scheme.bits() / 8;
    (PANEL_BYTES / block_bytes.max(1)).clamp(4, 16)
}

impl Kernels {
    /// `x W^T + bias` for any number of rows: `x` `[rows, k]` bf16, to the columns of `out` `[rows, first_column + n or more]` from
    /// `first_column` on, bf16 or f32. Equal inputs give equal bits; how sums are cut depends on the number of rows.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Driver`]; [`Error::Memory`] when the pool has no room for the partial sums of few rows.
    pub fn gemm(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        out: &Tensor,
        first_column: usize,
    ) -> Result<()> {
        match self.quantised(weight.scheme, x.rows()) {
            Some(Quantised::Fp8) => self.gemm_fp8x(stream, pool, x, weight, out, first_column),
            Some(Quantised::Nvfp4) => self.gemm_nvfp4x(stream, pool, x, weight, out, first_column),
            None => {
                let cut = GemmCut::new(x.rows(), weight.n, weight.k, stream.num_sms() as usize);
                self.gemm_cut(stream, pool, x, weight, (out, first_column), cut)
            }
        }
    }

    /// [`Kernels::linear`], then `after` with its results: `x` `[rows, k]` bf16, `out` `[rows, n]` bf16. One launch for many rows and
    /// bf16 weights, else the layer and a launch of its own; the results are the same.
    ///
    /// # Errors
    /// As for [`Kernels::linear`]; [`Error::Shape`] also when `out` is not a multiple of 8 elements.
    pub fn linear_then(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &Linear,
        after: After,
        out: &Tensor,
    ) -> Result<()> {
        let rows = x.rows();
        if let ([part], Some(number)) = (&weight.parts[..], after.number()) {
            let cut = GemmCut::new(rows, part.n, part.k, stream.num_sms() as usize);
            let is_fused = part.scheme == Scheme::Bf16 && rows > MAX_DECODE_ROWS && cut.splits == 1;
            if is_fused && out.shape() == [rows, part.n] && part.n.is_multiple_of(AFTER_COLUMNS) {
                out.expect(OP, out.shape(), Dtype::Bf16)?;
                return self.put_bf16(stream, pool, x, part, (out, 0), (cut, number));
            }
        }
        match after {
            After::Activate(activation) => {
                self.linear(stream, pool, x, weight, out)?;
                self.activate(stream, out, activation)
            }
            After::Add => {
                let summand = pool.tensor("a layer's result", out.shape(), Dtype::Bf16)?;
                self.linear(stream, pool, x, weight, &summand)?;
                self.add(stream, out, &summand)
            }
        }
    }

    /// [`Kernels::gemm`], cut in a given way.
    pub(crate) fn gemm_cut(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        out: (&Tensor, usize),
        cut: GemmCut,
    ) -> Result<()> {
        self.put_bf16(stream, pool, x, weight, out, (cut, 0))
    }

    /// The same, and what comes after it, by its number: for one part of k, and whole rows of [`AFTER_COLUMNS`] of bf16.
    fn put_bf16(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        out: (&Tensor, usize),
        (cut, after): (GemmCut, u32),
    ) -> Result<()> {
        self.put_gemm(
            stream,
            pool,
            x,
            weight,
            out,
            (cut, after, |block, grid, params: &GemmParams| {
                // SAFETY: `put_gemm` has checked what the parameters say.
                unsafe { self.gemm.launch(stream, (weight.scheme, block), grid, params) }
            }),
        )
    }

    /// Checks a product and brings its parts together, whichever kernel `launch` puts into the stream for a grid of blocks and
    /// parameters that speak of x as it is.
    pub(super) fn put_gemm(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        (out, first_column): (&Tensor, usize),
        (cut, after, launch): (GemmCut, u32, impl Fn(Block, [usize; 2], &GemmParams) -> Result<()>),
    ) -> Result<()> {
        let rows = x.rows();
        let is_f32 = check(stream, x, weight, out, first_column)?;
        if rows == 0 {
            return Ok(());
        }
        let what = match (cut.splits > 1, is_f32) {
            (true, _) => What::StoreSplits,
            (false, true) => What::StoreF32,
            (false, false) => What::StoreBf16,
        };
        let mut params = GemmParams {
            out: out.address(),
            rows: to_u32(OP, rows)?,
            out_columns: to_u32(OP, out.columns())?,
            first_column: to_u32(OP, first_column)?,
            panel: to_u32(OP, panel(weight))?,
            steps_per_split: to_u32(OP, cut.steps_per_split)?,
            after,
            ..GemmParams::of(weight, x.address(), what)?
        };
        let grid = [weight.n.div_ceil(BLOCK_ROWS) * rows.div_ceil(cut.block.tokens()), cut.splits];
        // Codes, scales, row scales and bias were made by `PackedHost` for n, k and the scheme; x and out have the shapes that the
        // parameters say; out overlaps with nothing that is read; everything is aligned to 16 bytes, rows of x too, because k is a
        // multiple of 8.
        if cut.splits == 1 {
            return launch(cut.block, grid, &params);
        }
        let stride = padded_n(weight.n);
        let partial = pool.take("sums of a product in parts", (4 * cut.splits * rows * stride) as u64)?;
        stream.uses(OP, &[&partial])?;
        disjoint(OP, &partial, &[x.slice(), out.slice()])?;
        let add = GemmAddParams {
            partial: partial.address(),
            row_scales: params.row_scales,
            bias: params.bias,
            out: out.address(),
            n: params.n,
            stride: to_u32(OP, stride)?,
            rows: params.rows,
            splits: to_u32(OP, cut.splits)?,
            out_columns: params.out_columns,
            first_column: params.first_column,
            out_is_f32: is_f32.into(),
            padding: 0,
        };
        (params.out, params.out_columns, params.first_column) = (partial.address(), add.stride, 0);
        let add_launch = Launch {
            grid: [params.n.div_ceil(ADD_COLUMNS * ADD_THREADS), params.rows, 1],
            num_threads: ADD_THREADS,
            shared_bytes: 0,
        };
        launch(cut.block, grid, &params)?;
        // SAFETY: as above; `partial` holds a matrix [rows, stride] for each part, and `MAX_SPLIT_ROWS` is a possible grid.
        unsafe { self.gemm.add.launch(stream, add_launch, &add) }
    }
}

/// Checks what `gemm` takes for granted; whether `out` is f32.
fn check(
    stream: &Stream,
    x: &Tensor,
    weight: &PackedWeight,
    out: &Tensor,
    first_column: usize,
) -> Result<bool> {
    let rows = x.rows();
    x.expect(OP, [rows, weight.k], Dtype::Bf16)?;
    // Logits stay in float32; everything else is bf16.
    let is_f32 = out.dtype() == Dtype::F32;
    // The kernel counts pieces of 16 bytes.
    to_u32(OP, x.rows() * weight.k / 8)?;
    out.expect(OP, [rows, out.columns()], if is_f32 { Dtype::F32 } else { Dtype::Bf16 })?;
    if first_column.checked_add(weight.n).is_none_or(|end| end > out.columns()) {
        let expected = format!("{} columns from {first_column} on", weight.n);
        return Err(Error::shape(OP, expected, out.columns()));
    }
    if weight.count != 1 {
        return Err(Error::shape(OP, "one matrix", weight.count));
    }
    let read: Vec<&DeviceSlice> = std::iter::once(x.slice()).chain(weight.slices()).collect();
    disjoint(OP, out.slice(), &read)?;
    stream.uses(OP, &[&read[..], &[out.slice()]].concat())?;
    Ok(is_f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_fit_the_smallest_device_and_hold_the_results() {
        let int4 = [32, 64, 128].map(|group_size| Scheme::Int4 { group_size });
        for scheme in [Scheme::Bf16, Scheme::Fp8, Scheme::Nvfp4].into_iter().chain(int4) {
            for (tokens, arch) in
                KERNELS.iter().flat_map(|(block, _)| Arch::ALL.map(|arch| (block.tokens(), arch)))
            {
                let bytes = shared_bytes(arch, scheme, tokens);
                // The kernel's own: two words for each row of x.
                assert!(bytes + 8 * tokens <= 101_376, "{arch} {scheme:?} {tokens}: {bytes}");
                // Results leave in parts of up to 32 rows at least.
                assert!(
                    bytes >= tokens.min(32) * (BLOCK_ROWS + 4) * 4,
                    "{arch} {scheme:?} {tokens}: {bytes}"
                );
            }
        }
        // Two blocks on a multiprocessor of GB10, with what each takes besides.
        let bytes = shared_bytes(Arch::Sm121a, Scheme::Int4 { group_size: 32 }, 128);
        assert!(2 * (bytes + 8 * 128 + 1024) <= 100 << 10, "{bytes}");
    }

    #[test]
    fn every_block_has_its_kernel() {
        for (i, (block, name)) in KERNELS.into_iter().enumerate() {
            assert_eq!(block as usize, i);
            assert!(name.starts_with(&format!("t{}", block.tokens())), "{name}");
        }
    }

    #[test]
    fn products_are_cut_so_that_multiprocessors_have_work() {
        let cut = |rows, n, k| {
            let cut = GemmCut::new(rows, n, k, 132);
            (cut.block, cut.splits)
        };
        assert_eq!(cut(8192, 5120, 2048), (Block::Tokens128, 1));
        assert_eq!(cut(1024, 1152, 1152), (Block::Wide64, 1));
        assert_eq!(cut(33, 2048, 4096), (Block::Wide64, 16));
        assert_eq!(cut(128, 5120, 2048), (Block::Wide64, 3));
        assert_eq!(cut(20, 151_936, 2048), (Block::Tokens32, 1));
        assert_eq!(cut(1, 16, 16), (Block::Tokens16, 1));
        for (rows, n, k) in [(40, 128, 4304), (64, 100, 16), (200, 2048, 768), (256, 512, 1152)] {
            let cut = GemmCut::new(rows, n, k, 132);
            let steps = padded_k(k) / STEP;
            assert!(cut.steps_per_split.is_multiple_of(2) && cut.splits > 0);
            // Every part has work, and together they have all.
            assert!((cut.splits - 1) * cut.steps_per_split < steps, "{cut:?}");
            assert!(cut.splits * cut.steps_per_split >= steps, "{cut:?}");
        }
    }
}
