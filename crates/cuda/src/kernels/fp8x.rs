//! Wrapper of `kernels/fp8_rows.cu` and `kernels/gemm_fp8x_g*.cu`: products of 4-bit integer weights and rows of x that are quantised to
//! E4M3 (W4A8), for many rows. Which products are done so is `prefill.rs`'s word.

use super::gemm::{BLOCK_ROWS, Block, GemmCut, GemmParams, launch_of};
use super::pack::{Scheme, padded_k};
use super::prefill::take_rows;
use super::{Kernels, LoadedModule, PackedWeight, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{Arch, DeviceSlice, Error, Pool, Result, Stream, Tensor};

const OP: &str = "fp8x";
/// A block of layers: 64 rows of x.
const BLOCK: Block = Block::Wide64;
/// The same of experts, whose other products have blocks of as many rows.
pub(super) const TILE: Block = Block::Tokens64;
/// Threads of a block of the product.
const THREADS: u32 = 256;
/// Inputs of a stage.
const STEP: usize = 128;
/// Threads and rows of a block that quantises.
const ROWS_THREADS: u32 = 128;
const ROWS_OF_BLOCK: usize = 4;
/// Most shared memory of the stages of a block; where a multiprocessor has 100 KiB, of each of two blocks.
const MAX_SHARED: usize = 100_352;
const THIRD_SHARED: usize = 32_256;

/// `Fp8RowsParams` of `kernels/fp8_rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Fp8RowsParams {
    x: u64,
    codes: u64,
    sums: u64,
    scales: u64,
    rows: u32,
    columns: u32,
    padded: u32,
    padding: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 4 * 8 + 4 * 4 bytes, no padding.
unsafe impl Params for Fp8RowsParams {
    const NAME: &'static str = "Fp8RowsParams";
}

/// Rows of x as E4M3 on the device.
#[derive(Debug)]
pub(super) struct Fp8Rows {
    /// Of the weights that they are for.
    group_size: usize,
    /// `[rows, padded k]`, in the order of the kernels.
    codes: DeviceSlice,
    /// `[rows, padded k / group]` f32: the sums of the codes' numbers.
    sums: DeviceSlice,
    /// `[rows]` f32.
    scales: DeviceSlice,
}

/// The kernels by group size: 32, 64, 128.
#[derive(Debug)]
pub(super) struct Fp8x {
    arch: Arch,
    rows: [Kernel<Fp8RowsParams>; 3],
    products: [Kernel<GemmParams>; 3],
}

/// Bytes of the stages of a block: x, weights, scale words and sums of x of 128 inputs.
fn shared_bytes(arch: Arch, group_size: usize) -> usize {
    let (tokens, words) = (BLOCK.tokens(), STEP / group_size);
    let stage = tokens * STEP + BLOCK_ROWS * STEP / 2 + (BLOCK_ROWS + tokens) * 4 * words;
    let stages = match arch {
        Arch::Sm90 => (MAX_SHARED / stage).min(4),
        _ => (THIRD_SHARED / stage).clamp(2, 4),
    };
    stages * stage
}

impl Fp8x {
    /// The modules by the name of their file.
    pub(super) fn new(arch: Arch, module: impl Fn(&'static str) -> Result<LoadedModule>) -> Result<Self> {
        let product =
            |name, group_size| Kernel::new(&module(name)?, name, to_u32(OP, shared_bytes(arch, group_size))?);
        let rows = module("fp8_rows")?;
        let rows = |name| Kernel::new(&rows, name, 0);
        Ok(Self {
            arch,
            rows: [rows("fp8_rows_g32")?, rows("fp8_rows_g64")?, rows("fp8_rows_g128")?],
            products: [
                product("gemm_fp8x_g32", 32)?,
                product("gemm_fp8x_g64", 64)?,
                product("gemm_fp8x_g128", 128)?,
            ],
        })
    }

    /// Quantises `rows` rows of bf16 numbers, as wide as `weight`, for a product with it.
    pub(super) fn quantise(
        &self,
        stream: &Stream,
        pool: &Pool,
        (x, rows): (&DeviceSlice, usize),
        weight: &PackedWeight,
    ) -> Result<Fp8Rows> {
        let (group_size, k) = (group_size(weight)?, weight.k);
        let padded = padded_k(k);
        let pieces = [
            ("codes of rows", rows * padded),
            ("sums of rows", 4 * rows * (padded / group_size)),
            ("scales of rows", 4 * rows),
        ];
        let [codes, sums, scales] = take_rows(OP, stream, pool, (x, rows), (k, 8), pieces)?;
        let params = Fp8RowsParams {
            x: x.address(),
            codes: codes.address(),
            sums: sums.address(),
            scales: scales.address(),
            rows: to_u32(OP, rows)?,
            columns: to_u32(OP, k)?,
            padded: to_u32(OP, padded)?,
            padding: 0,
        };
        let launch = Launch::blocks(to_u32(OP, rows.div_ceil(ROWS_OF_BLOCK))?, ROWS_THREADS);
        // SAFETY: x holds the rows, which start at multiples of 16 bytes because k is a multiple of 8; the results have the sizes that
        // the parameters say, and overlap with nothing.
        unsafe { self.rows[super::linear::group_index(group_size)].launch(stream, launch, &params)? };
        Ok(Fp8Rows { group_size, codes, sums, scales })
    }

    /// Puts a product over `x` into `stream`; `params` as for the kernels of `gemm.rs`, whose x is replaced.
    ///
    /// # Safety
    /// As for [`Kernel::launch`]; `x` has the rows and inputs that `params` say, quantised for the weights that they name.
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        x: &Fp8Rows,
        grid: [usize; 2],
        params: &GemmParams,
    ) -> Result<()> {
        let params = GemmParams {
            x: x.codes.address(),
            x_sums: x.sums.address(),
            x_scales: x.scales.address(),
            // Two numbers of x count as one: the kernel's unit is two bytes.
            k: params.k / 2,
            x_columns: params.k / 2,
            ..*params
        };
        let launch = launch_of(OP, grid, THREADS, shared_bytes(self.arch, x.group_size))?;
        // SAFETY: the caller's promise.
        unsafe { self.products[super::linear::group_index(x.group_size)].launch(stream, launch, &params) }
    }
}

/// The group size of `weight`.
fn group_size(weight: &PackedWeight) -> Result<usize> {
    match weight.scheme {
        Scheme::Int4 { group_size } => Ok(group_size),
        other => Err(Error::shape(OP, "weights of 4-bit integers", format_args!("{other:?}"))),
    }
}

impl Kernels {
    /// [`Kernels::gemm`] with x quantised to E4M3, a scale for each row: 4-bit integer weights alone.
    pub(super) fn gemm_fp8x(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        out: &Tensor,
        first_column: usize,
    ) -> Result<()> {
        let rows = self.fp8x.quantise(stream, pool, (x.slice(), x.rows()), weight)?;
        let cut = GemmCut::of(weight.k, BLOCK, 1);
        self.put_gemm(
            stream,
            pool,
            x,
            weight,
            (out, first_column),
            (cut, 0, |_, grid, params: &GemmParams| {
                // SAFETY: `put_gemm` has checked x, weights and result; `rows` are x.
                unsafe { self.fp8x.launch(stream, &rows, grid, params) }
            }),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_blocks_fit_a_multiprocessor() {
        for group_size in [32, 64, 128] {
            for (arch, memory) in
                [(Arch::Sm90, 227 << 10), (Arch::Sm120a, 100 << 10), (Arch::Sm121a, 100 << 10)]
            {
                let bytes = shared_bytes(arch, group_size);
                // The kernel's own: three words for each row of x; and what each block takes besides.
                assert!(2 * (bytes + 12 * BLOCK.tokens() + 1024) <= memory, "{arch} {group_size}: {bytes}");
                // Results leave in parts of 32 rows at least.
                assert!(bytes >= 32 * (BLOCK_ROWS + 4) * 4, "{arch} {group_size}: {bytes}");
            }
        }
    }
}
