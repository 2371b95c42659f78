//! Wrapper of `kernels/norm.cu`.

use spark_backend::Dtype;

use super::{Kernels, LoadedModule, disjoint, to_u32, vector_length};
use crate::launch::{Kernel, Launch, Params};
use crate::{Error, Mailboxes, Result, Stream, Tensor};

const OP: &str = "reduce_norm";
/// Threads of the largest block, and vectors of 16 bytes that each may hold.
const MAX_THREADS: usize = 1024;
const MAX_VECTORS: usize = 4;

/// `NormParams` of `kernels/norm.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct NormParams {
    partial: u64,
    residual: u64,
    weight: u64,
    out: u64,
    columns: u32,
    eps: f32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 4 * 8 + 2 * 4 bytes, no padding.
unsafe impl Params for NormParams {
    const NAME: &'static str = "NormParams";
}

/// `RanksNormParams` of `kernels/norm.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct RanksNormParams {
    partial: u64,
    residual: u64,
    weight: u64,
    out: u64,
    epochs: u64,
    given_up: u64,
    mailboxes: [u64; Mailboxes::MAX_WORLD],
    columns: u32,
    eps: f32,
    rank: u32,
    world: u32,
    max_rows: u32,
    unused: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 14 * 8 + 6 * 4 bytes, no padding.
unsafe impl Params for RanksNormParams {
    const NAME: &'static str = "RanksNormParams";
}

/// `LayerNormParams` of `kernels/norm.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct LayerNormParams {
    x: u64,
    weight: u64,
    bias: u64,
    out: u64,
    columns: u32,
    eps: f32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 4 * 8 + 2 * 4 bytes, no padding.
unsafe impl Params for LayerNormParams {
    const NAME: &'static str = "LayerNormParams";
}

#[derive(Debug)]
pub(super) struct Norm {
    /// By dtype (bf16, f32), then one or four vectors a thread.
    kernels: [[Kernel<NormParams>; 2]; 2],
    ranks: Kernel<RanksNormParams>,
    /// One or four vectors a thread.
    layer_norm: [Kernel<LayerNormParams>; 2],
}

impl Norm {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        let kernel = |name| Kernel::overlapping(module, name, 0);
        Ok(Self {
            kernels: [
                [kernel("norm_bf16_v1")?, kernel("norm_bf16_v4")?],
                [kernel("norm_f32_v1")?, kernel("norm_f32_v4")?],
            ],
            ranks: Kernel::overlapping(module, "norm_ranks", 0)?,
            layer_norm: [Kernel::new(module, "layer_norm_v1", 0)?, Kernel::new(module, "layer_norm_v4", 0)?],
        })
    }
}

/// What [`Kernels::reduce_norm`] reads.
#[derive(Debug, Clone, Copy)]
pub struct ReduceNorm<'a> {
    /// Added to the residual first: `[rows, columns]`.
    pub partial: Option<&'a Tensor>,
    /// `[rows, columns]`; takes the sum.
    pub residual: &'a Tensor,
    /// `[1, columns]`.
    pub weight: &'a Tensor,
    /// Added to the mean square.
    pub eps: f32,
}

impl Kernels {
    /// `residual += partial`, then `out = RMSNorm(residual) * weight`, rounded as the CPU backend does.
    ///
    /// # Errors
    /// [`Error::Shape`], also for columns that are not a multiple of 16 bytes or more than 64 KiB; [`Error::Driver`].
    pub fn reduce_norm(&self, stream: &Stream, args: ReduceNorm<'_>, out: &Tensor) -> Result<()> {
        let ReduceNorm { partial, residual, weight, eps } = args;
        let ([rows, columns], dtype) = (residual.shape(), residual.dtype());
        let row_vectors = row_vectors(OP, columns, dtype)?;
        weight.expect(OP, [1, columns], dtype)?;
        out.expect(OP, [rows, columns], dtype)?;
        if let Some(partial) = partial {
            partial.expect(OP, [rows, columns], dtype)?;
            disjoint(OP, residual.slice(), &[partial.slice()])?;
            disjoint(OP, out.slice(), &[partial.slice()])?;
            stream.uses(OP, &[partial.slice()])?;
        }
        stream.uses(OP, &[residual.slice(), weight.slice(), out.slice()])?;
        disjoint(OP, out.slice(), &[residual.slice(), weight.slice()])?;
        disjoint(OP, residual.slice(), &[weight.slice()])?;
        let params = NormParams {
            partial: partial.map_or(0, Tensor::address),
            residual: residual.address(),
            weight: weight.address(),
            out: out.address(),
            columns: to_u32(OP, columns)?,
            eps,
        };
        let num_threads = row_vectors.next_multiple_of(32).min(MAX_THREADS);
        let by_dtype = &self.norm.kernels[usize::from(dtype == Dtype::F32)];
        let kernel = &by_dtype[usize::from(row_vectors > MAX_THREADS)];
        let launch = Launch::blocks(to_u32(OP, rows)?, to_u32(OP, num_threads)?);
        // SAFETY: all tensors have the shape and dtype of the residual (the weight one row of it), are aligned to 16
        // bytes, and what is written overlaps with nothing else.
        unsafe { kernel.launch(stream, launch, &params) }
    }

    /// [`reduce_norm`](Self::reduce_norm) where the partial is the sum over the ranks of `mailboxes`, all of which must call this with
    /// as many rows: bf16, all tensors of the shape that [`Mailboxes::takes`].
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn reduce_norm_ranks(
        &self,
        stream: &Stream,
        mailboxes: &Mailboxes,
        args: ReduceNorm<'_>,
        out: &Tensor,
    ) -> Result<()> {
        let ReduceNorm { partial, residual, weight, eps } = args;
        let ([rows, columns], dtype) = (residual.shape(), Dtype::Bf16);
        let Some(partial) = partial.filter(|partial| mailboxes.takes(partial)) else {
            return Err(Error::shape(OP, "a partial that fits the mailboxes", partial.map(Tensor::shape)));
        };
        for tensor in [partial, residual, out] {
            tensor.expect(OP, [rows, columns], dtype)?;
        }
        weight.expect(OP, [1, columns], dtype)?;
        stream.uses(OP, &[partial.slice(), residual.slice(), weight.slice(), out.slice()])?;
        stream.uses(OP, &[mailboxes.memory()])?;
        disjoint(OP, out.slice(), &[partial.slice(), residual.slice(), weight.slice()])?;
        disjoint(OP, residual.slice(), &[partial.slice(), weight.slice()])?;
        let rank = mailboxes.rank();
        let params = RanksNormParams {
            partial: partial.address(),
            residual: residual.address(),
            weight: weight.address(),
            out: out.address(),
            epochs: mailboxes.epochs(),
            given_up: mailboxes.given_up(),
            mailboxes: mailboxes.addresses(),
            columns: to_u32(OP, columns)?,
            eps,
            rank: to_u32(OP, rank.index())?,
            world: to_u32(OP, rank.world())?,
            max_rows: to_u32(OP, Mailboxes::MAX_ROWS)?,
            unused: 0,
        };
        let num_threads = (columns / Mailboxes::VECTOR).next_multiple_of(32);
        let launch = Launch::blocks(to_u32(OP, rows)?, to_u32(OP, num_threads)?);
        // SAFETY: all tensors have the shape of the residual (the weight one row of it) in aligned vectors of bf16, what is written
        // overlaps with nothing else, and the mailboxes of all ranks hold as many rows and columns (`takes`).
        unsafe { self.norm.ranks.launch(stream, launch, &params) }
    }

    /// LayerNorm of the rows of `x`: `out` `[rows, columns]`, `weight` and `bias` `[1, columns]`, all bf16. `out` may be `x`.
    ///
    /// # Errors
    /// [`Error::Shape`], also for columns that are not a multiple of 8 or more than 32768; [`Error::Driver`].
    pub fn layer_norm(
        &self,
        stream: &Stream,
        x: &Tensor,
        [weight, bias]: [&Tensor; 2],
        eps: f32,
        out: &Tensor,
    ) -> Result<()> {
        const OP: &str = "layer_norm";
        let ([rows, columns], dtype) = (x.shape(), Dtype::Bf16);
        let row_vectors = row_vectors(OP, columns, dtype)?;
        x.expect(OP, [rows, columns], dtype)?;
        out.expect(OP, [rows, columns], dtype)?;
        weight.expect(OP, [1, columns], dtype)?;
        bias.expect(OP, [1, columns], dtype)?;
        stream.uses(OP, &[x.slice(), weight.slice(), bias.slice(), out.slice()])?;
        disjoint(OP, out.slice(), &[weight.slice(), bias.slice()])?;
        if out.address() != x.address() {
            disjoint(OP, out.slice(), &[x.slice()])?;
        }
        let params = LayerNormParams {
            x: x.address(),
            weight: weight.address(),
            bias: bias.address(),
            out: out.address(),
            columns: to_u32(OP, columns)?,
            eps,
        };
        let num_threads = row_vectors.next_multiple_of(32).min(MAX_THREADS);
        let kernel = &self.norm.layer_norm[usize::from(row_vectors > MAX_THREADS)];
        let launch = Launch::blocks(to_u32(OP, rows)?, to_u32(OP, num_threads)?);
        // SAFETY: all tensors have the shape of `x` or one row of it in aligned vectors of bf16; a block reads its row of
        // `x` before it writes that of `out`.
        unsafe { kernel.launch(stream, launch, &params) }
    }
}

/// Vectors of 16 bytes in a row.
fn row_vectors(op: &'static str, columns: usize, dtype: Dtype) -> Result<usize> {
    let length = vector_length(op, dtype)?;
    let most = MAX_THREADS * MAX_VECTORS * length;
    if columns == 0 || !columns.is_multiple_of(length) || columns > most {
        let expected = format!("columns: a multiple of {length} up to {most}");
        return Err(Error::shape(op, expected, columns));
    }
    Ok(columns / length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_whole_vectors_within_the_registers() {
        assert_eq!(row_vectors(OP, 4096, Dtype::Bf16).unwrap(), 512);
        assert_eq!(row_vectors(OP, 4, Dtype::F32).unwrap(), 1);
        assert_eq!(row_vectors(OP, 32_768, Dtype::Bf16).unwrap(), 4096);
        for (columns, dtype) in [
            (0, Dtype::F32),
            (12, Dtype::Bf16),
            (32_776, Dtype::Bf16),
            (16_388, Dtype::F32),
            (16, Dtype::F16),
        ] {
            assert!(row_vectors(OP, columns, dtype).is_err(), "{columns} {dtype:?}");
        }
        let error = row_vectors(OP, 12, Dtype::Bf16).unwrap_err().to_string();
        assert_eq!(error, "reduce_norm: expected columns: a multiple of 8 up to 32768, got 12");
    }
}
