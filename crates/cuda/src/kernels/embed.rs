//! Wrapper of `kernels/embed.cu`.

use super::{Kernels, LoadedModule, disjoint, to_u32, words};
use crate::launch::{Kernel, Launch, Params};
use crate::{DeviceSlice, Error, Result, Stream, Tensor};

const OP: &str = "embed";

/// `EmbedParams` of `kernels/embed.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct EmbedParams {
    tokens: u64,
    table: u64,
    out: u64,
    row_vectors: u32,
    vocab_start: u32,
    vocab_rows: u32,
    num_tokens: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 3 * 8 + 4 * 4 bytes, no padding.
unsafe impl Params for EmbedParams {
    const NAME: &'static str = "EmbedParams";
}

#[derive(Debug)]
pub(super) struct Embed {
    kernel: Kernel<EmbedParams>,
}

impl Embed {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        Ok(Self { kernel: Kernel::new(module, "embed", 0)? })
    }
}

impl Kernels {
    /// Rows of `table` (`[vocab_rows, hidden]`, the vocabulary from `vocab_start` on) for `tokens` (`[rows of out]` u32):
    /// `out` `[num_tokens, hidden]`. Zeros for tokens outside the table, which other ranks hold.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn embed(
        &self,
        stream: &Stream,
        tokens: &DeviceSlice,
        table: &Tensor,
        vocab_start: u32,
        out: &Tensor,
    ) -> Result<()> {
        out.expect(OP, [out.rows(), table.columns()], table.dtype())?;
        let row_bytes = table.columns() * table.dtype().size();
        if !row_bytes.is_multiple_of(16) {
            return Err(Error::shape(OP, "rows of a multiple of 16 bytes", row_bytes));
        }
        words(OP, tokens, out.rows())?;
        stream.uses(OP, &[tokens, table.slice(), out.slice()])?;
        disjoint(OP, out.slice(), &[tokens, table.slice()])?;
        let params = EmbedParams {
            tokens: tokens.address(),
            table: table.address(),
            out: out.address(),
            row_vectors: to_u32(OP, row_bytes / 16)?,
            vocab_start,
            vocab_rows: to_u32(OP, table.rows())?,
            num_tokens: to_u32(OP, out.rows())?,
        };
        let num_threads = params.row_vectors.next_multiple_of(32).clamp(32, 256);
        // SAFETY: tokens, table and result have the sizes that the parameters say; tensors are aligned to 16 bytes and
        // tokens to 4 (`words`); the kernel checks every token against the table.
        unsafe { self.embed.kernel.launch(stream, Launch::blocks(params.num_tokens, num_threads), &params) }
    }
}
