//! Wrapper of `kernels/embed.cu`.

use spark_backend::Dtype;

use super::pack::{Scheme, padded_k};
use super::{Kernels, Linear, LoadedModule, disjoint, to_u32, words};
use crate::launch::{Kernel, Launch, Params};
use crate::{DeviceSlice, Error, Result, Stream, Tensor};

const OP: &str = "embed";
/// Inputs of a tile of bfloat16 weights.
const TILE_K: usize = 32;
/// Elements of 16 bytes.
const VECTOR: usize = 8;

/// `EmbedParams` of `kernels/embed.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct EmbedParams {
    tokens: u64,
    last_tokens: u64,
    table: u64,
    out: u64,
    row_vectors: u32,
    row_tiles: u32,
    first_row: u32,
    vocab_rows: u32,
    num_slots: u32,
    unused: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 4 * 8 + 6 * 4 bytes, no padding.
unsafe impl Params for EmbedParams {
    const NAME: &'static str = "EmbedParams";
}

#[derive(Debug)]
pub(super) struct Embed {
    kernel: Kernel<EmbedParams>,
}

impl Embed {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        Ok(Self { kernel: Kernel::overlapping(module, "embed", 0)? })
    }
}

impl Kernels {
    /// Rows of `table` (`[_, hidden]`, one part in bfloat16, its first row that of token `first_row`) for `tokens`
    /// (`[num_tokens]` u32): `out` `[num_tokens, hidden]`. A token with bit 31 set ([`crate::PENDING`]) is the one in `last_tokens` (`[num_slots]`
    /// u32) of the slot in its other bits. Zeros for tokens outside the table.
    ///
    /// # Errors
    /// [`Error::Shape`], also for a hidden size that is not a multiple of 8; [`Error::Driver`].
    pub fn embed(
        &self,
        stream: &Stream,
        tokens: &DeviceSlice,
        last_tokens: &DeviceSlice,
        table: &Linear,
        first_row: usize,
        out: &Tensor,
    ) -> Result<()> {
        let [table] = table.parts.as_slice() else {
            return Err(Error::shape(OP, "a table in one part", table.parts.len()));
        };
        if table.scheme != Scheme::Bf16 || !table.k.is_multiple_of(VECTOR) {
            let expected = format!("a bfloat16 table with a multiple of {VECTOR} columns");
            return Err(Error::shape(OP, expected, (table.scheme, table.k)));
        }
        out.expect(OP, [out.rows(), table.k], Dtype::Bf16)?;
        words(OP, tokens, out.rows())?;
        words(OP, last_tokens, 0)?;
        stream.uses(OP, &[tokens, last_tokens, &table.codes, out.slice()])?;
        disjoint(OP, out.slice(), &[tokens, last_tokens, &table.codes])?;
        let params = EmbedParams {
            tokens: tokens.address(),
            last_tokens: last_tokens.address(),
            table: table.codes.address(),
            out: out.address(),
            row_vectors: to_u32(OP, table.k / VECTOR)?,
            row_tiles: to_u32(OP, padded_k(table.k) / TILE_K)?,
            first_row: to_u32(OP, first_row)?,
            vocab_rows: to_u32(OP, table.n)?,
            num_slots: u32::try_from(last_tokens.num_bytes() / 4).unwrap_or(u32::MAX),
            unused: 0,
        };
        let num_threads = params.row_vectors.next_multiple_of(32).clamp(32, 256);
        let launch = Launch::blocks(to_u32(OP, out.rows())?, num_threads);
        // SAFETY: tokens, table and result have the sizes that the parameters say; tensors and weights are aligned to 16
        // bytes and tokens to 4 (`words`); the kernel checks every token and slot.
        unsafe { self.embed.kernel.launch(stream, launch, &params) }
    }
}
