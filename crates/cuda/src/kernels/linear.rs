//! Linear layers: the choice between the kernels for few rows and those for many, and the wrapper of the former
//! (`kernels/linear_*.cu`). Those for many rows are in `gemm.rs`, experts in `moe.rs`.

use spark_backend::Dtype;

use super::pack::{Scheme, padded_k, padded_n};
use super::{Kernels, Linear, LoadedModule, PackedWeight, disjoint, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{DeviceSlice, Error, Pool, Result, Stream, Tensor};

const OP: &str = "linear";
/// Most rows that the kernels of decode take.
pub const MAX_DECODE_ROWS: usize = 128;
/// Most rows for which every block reads all rows of x by itself.
const MAX_FEW_ROWS: usize = 16;
/// Most rows that they take of wide layers (the head): there the blocks for many rows, which read x less often, fill the device.
const MAX_WIDE_ROWS: usize = 32;
/// Rows of W of a layer, for each multiprocessor, from which on k is not cut.
const PARTS_ROWS: usize = 128;
/// Most rows that the kernels of decode take of such a layer.
const MAX_ROWS_AT_ONCE: usize = 64;
/// Rows of W, for each multiprocessor, of a wide layer: two of those blocks.
const WIDE: usize = 256;
/// Rows of x that a tensor core takes at a time, and most such tiles of a block.
const TOKEN_TILE: usize = 8;
const MAX_TOKEN_TILES: usize = 4;
/// Rows of W of a tile, and threads of a block: constants of the kernel.
const TILE_ROWS: usize = 16;
const NUM_THREADS: u32 = 256;

/// `LinearParams` of `kernels/linear.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct LinearParams {
    codes: u64,
    scales: u64,
    row_scales: u64,
    bias: u64,
    x: u64,
    out: u64,
    partial: u64,
    n: u32,
    k: u32,
    x_columns: u32,
    rows: u32,
    out_columns: u32,
    out_is_f32: u32,
    token_blocks: u32,
    padding: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 7 * 8 + 8 * 4 bytes, no padding.
unsafe impl Params for LinearParams {
    const NAME: &'static str = "LinearParams";
}

impl LinearParams {
    /// The same product with k in parts, whose sums go to `partial`.
    pub(super) fn in_parts(self, partial: u64, token_blocks: u32) -> Self {
        Self { partial, token_blocks, ..self }
    }
}

/// What a block computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    /// Tiles of 16 rows of W: 1 or 2.
    row_tiles: usize,
    /// Tiles of 8 rows of x: 1, 2 or 4.
    token_tiles: usize,
}

impl Block {
    const ALL: [Self; 5] = [
        Self { row_tiles: 1, token_tiles: 1 },
        Self { row_tiles: 2, token_tiles: 1 },
        Self { row_tiles: 1, token_tiles: 2 },
        Self { row_tiles: 2, token_tiles: 2 },
        Self { row_tiles: 2, token_tiles: 4 },
    ];

    /// For `rows` rows of x and `n` of W: small blocks where there would be fewer than multiprocessors.
    fn new(rows: usize, n: usize, multiprocessors: usize) -> Self {
        let token_tiles = rows.div_ceil(TOKEN_TILE).clamp(1, MAX_TOKEN_TILES).next_power_of_two();
        let is_small = padded_n(n) / (2 * TILE_ROWS) < multiprocessors;
        Self { row_tiles: if is_small && token_tiles < MAX_TOKEN_TILES { 1 } else { 2 }, token_tiles }
    }

    fn index(self) -> usize {
        // `new` makes no other.
        Self::ALL.iter().position(|&block| block == self).unwrap_or(Self::ALL.len() - 1)
    }
}

/// Whether `rows` rows of x, which the kernels of decode take, are for those that cut k: more than a few, unless rows of W alone
/// make a block for each multiprocessor.
fn is_in_parts(rows: usize, n: usize, multiprocessors: usize) -> bool {
    rows > MAX_FEW_ROWS && n < PARTS_ROWS * multiprocessors
}

/// Most rows of x that the kernels of decode take of `n` rows of W.
fn most_decode_rows(n: usize, multiprocessors: usize) -> usize {
    if n < PARTS_ROWS * multiprocessors {
        MAX_DECODE_ROWS
    } else if n < WIDE * multiprocessors {
        MAX_ROWS_AT_ONCE
    } else {
        MAX_WIDE_ROWS
    }
}

/// 0, 1, 2 for group sizes 32, 64, 128; there are no others after packing.
pub(super) fn group_index(group_size: usize) -> usize {
    (group_size / 32).ilog2() as usize
}

/// The kernels of one scheme, in the order of [`Block::ALL`].
type ByBlock = [Kernel<LinearParams>; Block::ALL.len()];

#[derive(Debug)]
pub(super) struct DecodeLinear {
    bf16: ByBlock,
    fp8: ByBlock,
    /// By group size: 32, 64, 128.
    int4: [ByBlock; 3],
    nvfp4: ByBlock,
}

impl DecodeLinear {
    /// The kernels of the modules that `module` loads.
    pub(super) fn new(module: impl Fn(&'static str) -> Result<LoadedModule>) -> Result<Self> {
        let kernels = |module: &LoadedModule, scheme: &str| {
            let kernel = |block: Block| {
                let name = format!("linear_{scheme}_r{}_t{}", block.row_tiles, block.token_tiles);
                // Beyond one tile of rows, x is read through the first-level cache more than weights are.
                if block.token_tiles == 1 {
                    Kernel::overlapping(module, &name, 0)
                } else {
                    Kernel::new(module, &name, 0)
                }
            };
            let [a, b, c, d, e] = Block::ALL.map(kernel);
            Ok::<_, Error>([a?, b?, c?, d?, e?])
        };
        let int4 = module("linear_int4")?;
        Ok(Self {
            bf16: kernels(&module("linear_bf16")?, "bf16")?,
            fp8: kernels(&module("linear_fp8")?, "fp8")?,
            int4: [kernels(&int4, "g32")?, kernels(&int4, "g64")?, kernels(&int4, "g128")?],
            nvfp4: kernels(&module("linear_nvfp4")?, "nvfp4")?,
        })
    }

    fn kernel(&self, scheme: Scheme, block: Block) -> &Kernel<LinearParams> {
        let by_block = match scheme {
            Scheme::Bf16 => &self.bf16,
            Scheme::Fp8 => &self.fp8,
            Scheme::Int4 { group_size } => &self.int4[group_index(group_size)],
            Scheme::Nvfp4 => &self.nvfp4,
        };
        &by_block[block.index()]
    }
}

impl Kernels {
    /// `x W^T + bias` for any number of rows: `x` `[rows, k]` bf16 to `out` `[rows, n]`, bf16 or f32 (logits). Up to
    /// [`MAX_DECODE_ROWS`] rows, or 64 or 32 of layers as wide as a head, a row has the same bits alone and beside others.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Driver`]; [`Error::Memory`] when `pool` has no room for what many rows need.
    pub fn linear(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &Linear,
        out: &Tensor,
    ) -> Result<()> {
        let rows = x.rows();
        x.expect(OP, [rows, weight.k], Dtype::Bf16)?;
        let out_dtype = if out.dtype() == Dtype::F32 { Dtype::F32 } else { Dtype::Bf16 };
        out.expect(OP, [rows, weight.n], out_dtype)?;
        let multiprocessors = stream.num_sms() as usize;
        let mut first_column = 0;
        for part in &weight.parts {
            if rows > most_decode_rows(part.n, multiprocessors) {
                self.gemm(stream, pool, x, part, out, first_column)?;
            } else {
                self.decode_linear(stream, pool, x, part, out, first_column)?;
            }
            first_column += part.n;
        }
        Ok(())
    }

    /// One part of [`Kernels::linear`] for few rows, to the columns of `out` from `first_column` on. The caller has checked the
    /// types of `x` and `out`, the shape of `x`, and that the part fits in `out`.
    fn decode_linear(
        &self,
        stream: &Stream,
        pool: &Pool,
        x: &Tensor,
        weight: &PackedWeight,
        out: &Tensor,
        first_column: usize,
    ) -> Result<()> {
        let read: Vec<&DeviceSlice> = std::iter::once(x.slice()).chain(weight.slices()).collect();
        stream.uses(OP, &[&read[..], &[out.slice()]].concat())?;
        disjoint(OP, out.slice(), &read)?;
        let (rows, n) = (x.rows(), padded_n(weight.n));
        let block = Block::new(rows, weight.n, stream.num_sms() as usize);
        let token_blocks = rows.div_ceil(block.token_tiles * TOKEN_TILE);
        let address = |slice: &Option<DeviceSlice>| slice.as_ref().map_or(0, DeviceSlice::address);
        let params = LinearParams {
            codes: weight.codes.address(),
            scales: weight.scales.address(),
            row_scales: address(&weight.row_scales),
            bias: address(&weight.bias),
            x: x.address(),
            out: out.address() + (first_column * out.dtype().size()) as u64,
            partial: 0,
            n: to_u32(OP, weight.n)?,
            k: to_u32(OP, padded_k(weight.k))?,
            x_columns: to_u32(OP, weight.k)?,
            rows: to_u32(OP, rows)?,
            out_columns: to_u32(OP, out.columns())?,
            out_is_f32: (out.dtype() == Dtype::F32).into(),
            token_blocks: to_u32(OP, token_blocks)?,
            padding: 0,
        };
        if is_in_parts(rows, weight.n, stream.num_sms() as usize) {
            // SAFETY: as below.
            return unsafe { self.linear_many.launch(stream, pool, weight, [x, out], params) };
        }
        let num_blocks = to_u32(OP, n / (TILE_ROWS * block.row_tiles) * token_blocks)?;
        // SAFETY: codes, scales, row scales and bias were made for n, k and the scheme; x and out have the shapes that the
        // parameters say (the caller's word); out overlaps with nothing that is read; tensors and the parts of a weight are
        // aligned to 16 bytes, and so are rows of x, because k is a multiple of 16.
        unsafe {
            let kernel = self.linear.kernel(weight.scheme, block);
            kernel.launch(stream, Launch::blocks(num_blocks, NUM_THREADS), &params)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_rounded_up_to_what_is_compiled() {
        let tiles: Vec<usize> =
            [0, 1, 8, 9, 16, 17, 32, 33, 64].map(|rows| Block::new(rows, 1 << 20, 132).token_tiles).to_vec();
        assert_eq!(tiles, [1, 1, 1, 2, 2, 4, 4, 4, 4]);
        for (rows, n) in [(1, 16), (8, 1 << 20), (16, 2048), (16, 8192), (64, 16)] {
            let block = Block::new(rows, n, 132);
            assert_eq!(Block::ALL[block.index()], block);
        }
    }

    #[test]
    fn heads_with_many_rows_are_for_the_other_kernels() {
        let most = [151_936, 75_968, 5120, 32_768].map(|n| most_decode_rows(n, 132));
        assert_eq!(most, [32, 32, 128, 64]);
    }

    #[test]
    fn narrow_layers_have_small_blocks() {
        let row_tiles = |rows, n| Block::new(rows, n, 132).row_tiles;
        assert_eq!(
            [row_tiles(1, 2048), row_tiles(1, 5120), row_tiles(16, 2048), row_tiles(32, 2048)],
            [1, 2, 1, 2]
        );
    }
}
