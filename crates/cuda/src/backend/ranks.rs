//! What operations do together with the other ranks of a group: sums, logits of all shares, sampling from shares. The
//! transport is in `team.rs`.

use spark_backend::{Backend as _, Dtype, Error, Result};

use super::{CudaBackend, CudaTensor};
use crate::kernels::CANDIDATE_WORDS;
use crate::{Linear, Team, Tensor};

impl CudaBackend {
    /// The first of this rank's rows of `vocab_rows`, of which `weight` holds its share.
    pub(super) fn first_row(&self, op: &'static str, weight: &Linear, vocab_rows: usize) -> Result<usize> {
        let share = self.rank().range(vocab_rows);
        match share.len() == weight.n() {
            true => Ok(share.start),
            false => Err(Error::shape(op, format_args!("rows {share:?} of {vocab_rows}"), weight.n())),
        }
    }

    /// `x` becomes the sum over the ranks, if there are any.
    pub(super) fn sum_over_ranks(&self, x: &Tensor) -> Result<()> {
        match &self.team {
            Some(team) => self.measured(|| "all_reduce".to_owned(), || team.all_reduce(&self.stream, x)),
            None => Ok(()),
        }
    }

    /// Logits of `rows` from the shares of all ranks. A rank's share lies as it computes it, `[rows, share]`, in its part of the
    /// gathered memory; parts are as long as the longest.
    pub(super) fn gathered_logits(
        &self,
        team: &Team,
        rows: &Tensor,
        head: &Linear,
        vocab_rows: usize,
    ) -> Result<Tensor> {
        const OP: &str = "logits";
        let (rank, pool) = (team.rank(), &self.state(OP)?.pool);
        let (world, count) = (rank.world(), rows.rows());
        // Parts start where tensors may.
        let part_length = (count * vocab_rows.div_ceil(world)).next_multiple_of(4);
        let part_bytes = 4 * part_length as u64;
        let parts = pool.take(OP, part_bytes * world as u64)?;
        let mine = parts.slice(part_bytes * rank.index() as u64, part_bytes)?;
        let mine = Tensor::new(&mine, [count, head.n()], Dtype::F32)?;
        self.put_linear(OP, rows, head, &mine)?;
        self.measured(|| "all_gather".to_owned(), || team.all_gather(&self.stream, &parts, part_length))?;
        let out = pool.tensor(OP, [count, vocab_rows], Dtype::F32)?;
        self.measured(
            || "join_columns".to_owned(),
            || self.kernels.join_columns(&self.stream, &parts, part_length, world, &out),
        )?;
        Ok(out)
    }

    pub(super) fn op_broadcast(
        &self,
        x: Option<CudaTensor>,
        shape: [usize; 2],
        root: usize,
    ) -> Result<CudaTensor> {
        const OP: &str = "broadcast";
        let x = match (x, &self.team) {
            (Some(x), _) => x,
            (None, Some(team)) if team.rank().index() != root => self.result(OP, shape)?.into(),
            (None, _) => return Err(Error::shape(OP, "the root's tensor", "none")),
        };
        let values = x.tensor()?;
        values.expect(OP, shape, Dtype::Bf16)?;
        if let Some(team) = &self.team {
            self.measured(|| OP.to_owned(), || team.broadcast(&self.stream, &values, root))?;
        }
        Ok(x)
    }

    /// Samples where each rank has the logits of its share: only the best candidates are exchanged.
    pub(super) fn sample_shares(&self, team: &Team, logits: &Tensor) -> Result<()> {
        const OP: &str = "sample";
        let (state, rank) = (self.state(OP)?, team.rank());
        let (step, share) = (state.view(OP)?, rank.range(state.vocab_rows));
        if logits.columns() != share.len() {
            return Err(Error::shape(OP, format_args!("logits of tokens {share:?}"), logits.columns()));
        }
        let part_length = step.num_logit_rows * CANDIDATE_WORDS;
        let part_bytes = 4 * part_length as u64;
        let parts = state.pool.take(OP, part_bytes * rank.world() as u64)?;
        let mine = parts.slice(part_bytes * rank.index() as u64, part_bytes)?;
        let (stream, sampler) = (&self.stream, &state.sampler);
        self.measured(
            || "sample_share".to_owned(),
            || self.kernels.sample_share(stream, logits, share.start, &step, sampler, &mine),
        )?;
        self.measured(|| "all_gather".to_owned(), || team.all_gather(stream, &parts, part_length))?;
        self.measured(
            || "sample_choose".to_owned(),
            || self.kernels.sample_choose(stream, &parts, rank.world(), &step, sampler, &state.sample_out),
        )
    }
}
