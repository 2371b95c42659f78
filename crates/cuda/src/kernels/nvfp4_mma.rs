//! Wrapper of `kernels/nvfp4_mma.cu`: products of NVFP4 weights and rows of x that are quantised to NVFP4, for many rows, on tensor
//! cores that multiply both as they are. Which products are done so is `prefill.rs`'s word, whether a device's are right
//! `nvfp4_self_test.rs`'s.

use super::gemm::{BLOCK_ROWS, Block, GemmCut, GemmParams, launch_of};
use super::pack::{NVFP4_GROUP, Scheme, padded_k};
use super::prefill::take_rows;
use super::{Kernels, LoadedModule, PackedWeight, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{DeviceSlice, Error, Pool, Result, Stream, Tensor};

const OP: &str = "nvfp4_mma";
/// Threads of a block that quantises a row: a constant of the kernel.
const QUANTIZE_THREADS: u32 = 128;
/// Stages of a block and their inputs: constants of the kernel.
const STAGES: usize = 2;
const STEP: usize = 128;
/// Up to so many rows k may be split over blocks, in parts of at least so many inputs.
const MAX_SPLIT_ROWS: usize = 256;
const SPLIT_K: usize = 512;

/// `QuantizeParams` of `kernels/nvfp4_quantize.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct QuantizeParams {
    pub(super) x: u64,
    pub(super) codes: u64,
    pub(super) scales: u64,
    pub(super) factors: u64,
    pub(super) columns: u32,
    pub(super) padded: u32,
    /// The factor of every row, or 0: its own.
    pub(super) given: f32,
    pub(super) padding: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 4 * 8 + 4 * 4 bytes, no padding.
unsafe impl Params for QuantizeParams {
    const NAME: &'static str = "QuantizeParams";
}

/// `Nvfp4MmaParams` of `kernels/nvfp4_mma.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Nvfp4MmaParams {
    pub(super) gemm: GemmParams,
    pub(super) x_scales: u64,
    pub(super) x_factors: u64,
}

// SAFETY: the fields are those of the kernel's struct in the same order; `GemmParams` has no padding and a multiple of 8 bytes.
unsafe impl Params for Nvfp4MmaParams {
    const NAME: &'static str = "Nvfp4MmaParams";
}

/// Rows of x as NVFP4 on the device.
#[derive(Debug)]
pub(super) struct Nvfp4Rows {
    /// `[rows, padded k / 8]` words of 8 codes, in the order of `kernels/nvfp4_quantize.cuh`.
    pub(super) codes: DeviceSlice,
    /// `[rows, padded k / 16]` E4M3.
    pub(super) scales: DeviceSlice,
    /// `[rows]` f32.
    pub(super) factors: DeviceSlice,
}

/// Bytes of the stages of a block: x, weights and the scales of both, of 128 inputs.
pub(super) fn shared_bytes(block: Block) -> usize {
    STAGES * (BLOCK_ROWS + block.tokens()) * (STEP / 2 + STEP / NVFP4_GROUP)
}

/// The kernels, on a device that has FP4.
#[derive(Debug)]
pub(super) struct Nvfp4Mma {
    quantize: Kernel<QuantizeParams>,
    tokens64: Kernel<Nvfp4MmaParams>,
    tokens128: Kernel<Nvfp4MmaParams>,
}

impl Nvfp4Mma {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        let product = |name, block| Kernel::new(module, name, to_u32(OP, shared_bytes(block))?);
        Ok(Self {
            quantize: Kernel::new(module, "nvfp4_quantize", 0)?,
            tokens64: product("nvfp4_mma_t64", Block::Tokens64)?,
            tokens128: product("nvfp4_mma_t128", Block::Tokens128)?,
        })
    }

    /// Quantises `rows` rows of `k` bf16 numbers; `given`: their factor, else each has its own.
    pub(super) fn quantize(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &DeviceSlice,
        [rows, k]: [usize; 2],
        given: Option<f32>,
    ) -> Result<Nvfp4Rows> {
        let padded = padded_k(k);
        let pieces = [
            ("codes of rows", rows * padded / 2),
            ("scales of rows", rows * padded / NVFP4_GROUP),
            ("factors of rows", 4 * rows),
        ];
        let [codes, scales, factors] = take_rows(OP, stream, pool, (x, rows), (k, NVFP4_GROUP), pieces)?;
        let params = QuantizeParams {
            x: x.address(),
            codes: codes.address(),
            scales: scales.address(),
            factors: factors.address(),
            columns: to_u32(OP, k)?,
            padded: to_u32(OP, padded)?,
            given: given.unwrap_or(0.0),
            padding: 0,
        };
        let launch = Launch::blocks(to_u32(OP, rows)?, QUANTIZE_THREADS);
        // SAFETY: x holds the rows, which start at multiples of 32 bytes because k is a multiple of 16; the results have the sizes that
        // the parameters say, and overlap with nothing.
        unsafe { self.quantize.launch(stream, launch, &params)? };
        Ok(Nvfp4Rows { codes, scales, factors })
    }

    /// Puts a product over `rows` into `stream`; `params` as for the kernels of `gemm.rs`, whose `x` is replaced.
    ///
    /// # Safety
    /// As for [`Kernel::launch`]; `rows` has the rows and inputs that `params` say.
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        rows: &Nvfp4Rows,
        block: Block,
        grid: [usize; 2],
        params: &GemmParams,
    ) -> Result<()> {
        let kernel = match block {
            Block::Tokens64 => &self.tokens64,
            Block::Tokens128 => &self.tokens128,
            _ => return Err(Error::shape(OP, "a block of 64 or 128 rows", format_args!("{block:?}"))),
        };
        let params = Nvfp4MmaParams {
            gemm: GemmParams { x: rows.codes.address(), ..*params },
            x_scales: rows.scales.address(),
            x_factors: rows.factors.address(),
        };
        // A thread for each row of x.
        let launch = launch_of(OP, grid, to_u32(OP, block.tokens())?, shared_bytes(block))?;
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(stream, launch, &params) }
    }
}

/// Blocks of 128 rows of x where they give every multiprocessor one, else of 64; few rows have k in parts.
fn cut(rows: usize, n: usize, k: usize, multiprocessors: usize) -> GemmCut {
    let num_blocks = |block: Block| n.div_ceil(BLOCK_ROWS) * rows.div_ceil(block.tokens());
    let is_large = num_blocks(Block::Tokens128) >= multiprocessors;
    let block = if is_large { Block::Tokens128 } else { Block::Tokens64 };
    let wanted = multiprocessors / num_blocks(block).max(1);
    let most = if rows <= MAX_SPLIT_ROWS { padded_k(k) / SPLIT_K } else { 1 };
    GemmCut::of(k, block, wanted.min(most).max(1))
}

impl Kernels {
    /// [`Kernels::gemm`] of NVFP4 weights with x quantised to NVFP4, each row for itself: a row's bits do not depend on the others.
    ///
    /// # Errors
    /// As for [`Kernels::gemm`]; [`Error::NoInstructions`] where tensor cores have no FP4.
    pub(super) fn gemm_nvfp4x(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        out: &Tensor,
        first_column: usize,
    ) -> Result<()> {
        let cut = cut(x.rows(), weight.n, weight.k, stream.num_sms() as usize);
        self.gemm_nvfp4x_cut(stream, pool, x, weight, (out, first_column), (cut, None))
    }

    /// The same, cut in a given way; `given`: the factor of all rows.
    pub(super) fn gemm_nvfp4x_cut(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        out: (&Tensor, usize),
        (cut, given): (GemmCut, Option<f32>),
    ) -> Result<()> {
        let nvfp4 = self.nvfp4_mma(weight)?;
        let rows = nvfp4.quantize(stream, pool, x.slice(), x.shape(), given)?;
        self.put_gemm(
            stream,
            pool,
            x,
            weight,
            out,
            (cut, 0, |block, grid, params: &GemmParams| {
                // SAFETY: `put_gemm` has checked what the parameters say; x is quantised in its own shape.
                unsafe { nvfp4.launch(stream, &rows, block, grid, params) }
            }),
        )
    }

    /// The kernels, for weights that they multiply.
    pub(super) fn nvfp4_mma(&self, weight: &PackedWeight) -> Result<&Nvfp4Mma> {
        if weight.scheme != Scheme::Nvfp4 {
            return Err(Error::shape(OP, "NVFP4 weights", format_args!("{:?}", weight.scheme)));
        }
        let lacking = || Error::NoInstructions { kind: "NVFP4", arch: self.gemm.arch().name() };
        self.nvfp4_mma.as_ref().ok_or_else(lacking)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_cut_so_that_a_gb10_has_work() {
        let cut = |rows, n, k| {
            let cut = cut(rows, n, k, 48);
            (cut.block, cut.splits)
        };
        assert_eq!(cut(8192, 5120, 2048), (Block::Tokens128, 1));
        assert_eq!(cut(130, 5120, 2048), (Block::Tokens128, 1));
        assert_eq!(cut(128, 2048, 4096), (Block::Tokens64, 1));
        assert_eq!(cut(64, 2048, 4096), (Block::Tokens64, 3));
        assert_eq!(cut(300, 128, 4096), (Block::Tokens64, 1));
        assert_eq!(cut(33, 16, 16), (Block::Tokens64, 1));
    }
}
