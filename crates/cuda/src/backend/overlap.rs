//! Sums of ranks beside other work. In long steps of prompts, what is computed row by row is computed in two halves: the sum of
//! one half runs on a stream of its own while the other half is computed. Which numbers are summed is in `ranks.rs`.
//!
//! `reduce_norm` begins both sums and normalises the first half when its sum is there. The operation that takes the result computes
//! the first half, then lets the second be normalised, then computes that. Where its result is to be summed next, the sum of the
//! first half begins as soon as that half is there. Attention needs all rows, and whatever else reads a tensor lets it be finished
//! first ([`CudaBackend::settle`]).

use std::cell::RefCell;
use std::ops::Range;

use spark_backend::RouterSpec;

use super::CudaBackend;
use crate::kernels::Choice;
use crate::{Device, Event, Experts, Linear, ReduceNorm, Result, Stream, Team, Tensor};

/// Fewest rows of a step that is worth it: every half reads all weights.
const LEAST_ROWS: usize = 4096;
/// Halves end at a multiple of this, for the tiles of products.
const TILE: usize = 128;

/// The stream of sums, and what is under way there.
pub(super) struct Overlap {
    least_rows: usize,
    stream: Stream,
    /// Behind the first half of what is to be summed.
    first_half: Event,
    /// Behind all of it.
    whole: Event,
    /// Behind the sums of the halves.
    sums: [Event; 2],
    inner: RefCell<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Sums so far.
    count: u64,
    /// Where the tensor lies that `first_half` is about.
    halved: Option<u64>,
    second: Option<Second>,
}

/// The half that waits for its sum. Holds on to what that sum still writes.
struct Second {
    partial: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: f32,
    out: Tensor,
}

/// The experts of a step's rows, or of its first half, with what chooses those of the second.
#[derive(Debug)]
pub enum Routing {
    /// Of all rows.
    Whole(Choice),
    /// Of the first half.
    First {
        /// Its choice.
        choice: Choice,
        /// Chooses for the others.
        router: Box<Linear>,
        /// Experts of a row.
        top_k: usize,
        /// Whether their weights are made to sum to 1.
        renormalize: bool,
        /// The experts that this rank holds.
        experts: Range<usize>,
    },
}

impl Overlap {
    /// For steps of at least `least_rows`, or of as many as it is worth for.
    pub(super) fn new(device: &Device, least_rows: Option<usize>) -> Result<Self> {
        let event = || Event::without_time(device);
        Ok(Self {
            least_rows: least_rows.unwrap_or(LEAST_ROWS).max(TILE + 1),
            stream: Stream::urgent(device)?,
            first_half: event()?,
            whole: event()?,
            sums: [event()?, event()?],
            inner: RefCell::new(Inner::default()),
        })
    }

    /// Sums so far.
    pub(super) fn count(&self) -> u64 {
        self.inner.borrow().count
    }

    /// Whether the second half of `x` is still to come.
    fn is_second_of(&self, x: &Tensor) -> bool {
        self.inner.borrow().second.as_ref().is_some_and(|second| second.out.address() == x.address())
    }

    /// The first half of what `out` will be is in `stream`.
    fn mark_first_half(&self, stream: &Stream, out: &Tensor) -> Result<()> {
        self.first_half.record(stream)?;
        self.inner.borrow_mut().halved = Some(out.address());
        Ok(())
    }
}

/// The halves of a number of rows.
fn halves(rows: usize) -> [Range<usize>; 2] {
    let first = (rows / 2).next_multiple_of(TILE).min(rows);
    [0..first, first..rows]
}

/// Some rows of a tensor.
fn part(x: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    let row_bytes = x.columns() * x.dtype().size();
    let slice = x.slice().slice((rows.start * row_bytes) as u64, (rows.len() * row_bytes) as u64)?;
    Tensor::new(&slice, [rows.len(), x.columns()], x.dtype())
}

impl CudaBackend {
    /// The stream of sums, if the current step has `rows` and that is enough.
    fn overlap(&self, rows: usize) -> Option<&Overlap> {
        let is_prompts = |state: &super::State| state.is_prompt_step(rows);
        self.overlap
            .as_ref()
            .filter(|overlap| rows >= overlap.least_rows && self.state.as_ref().is_some_and(is_prompts))
    }

    /// Finishes what was begun for half of the rows: to be called before anything reads a tensor as a whole.
    pub(super) fn settle(&self) -> Result<()> {
        let Some(overlap) = &self.overlap else { return Ok(()) };
        overlap.inner.borrow_mut().halved = None;
        self.finish_second(overlap)
    }

    /// Normalises the half that waits for its sum, if there is one.
    fn finish_second(&self, overlap: &Overlap) -> Result<()> {
        let Some(second) = overlap.inner.borrow_mut().second.take() else { return Ok(()) };
        self.stream.wait(&overlap.sums[1])?;
        self.norm_part(&second, &halves(second.out.rows())[1])
    }

    fn norm_part(&self, of: &Second, rows: &Range<usize>) -> Result<()> {
        let [partial, residual, out] =
            [part(&of.partial, rows)?, part(&of.residual, rows)?, part(&of.out, rows)?];
        let args =
            ReduceNorm { partial: Some(&partial), residual: &residual, weight: &of.weight, eps: of.eps };
        self.kernels.reduce_norm(&self.stream, args, &out)
    }

    /// Begins the sums of both halves of `args.partial` and normalises the first; whether the step is one of those.
    pub(super) fn norm_in_halves(&self, args: &ReduceNorm<'_>, out: &Tensor) -> Result<bool> {
        let (Some(partial), Some(team)) = (args.partial, &self.team) else { return Ok(false) };
        let Some(overlap) = self.overlap(out.rows()) else { return Ok(false) };
        self.finish_second(overlap)?;
        let [first, second] = halves(out.rows());
        let halved = overlap.inner.borrow_mut().halved.take();
        if halved != Some(partial.address()) {
            overlap.first_half.record(&self.stream)?;
        }
        overlap.whole.record(&self.stream)?;
        let sums = [(&overlap.first_half, first), (&overlap.whole, second)];
        for ((ready, rows), done) in sums.iter().zip(&overlap.sums) {
            sum_part(team, overlap, ready, &part(partial, rows)?, done)?;
        }
        let both = Second {
            partial: partial.clone(),
            residual: args.residual.clone(),
            weight: args.weight.clone(),
            eps: args.eps,
            out: out.clone(),
        };
        self.stream.wait(&overlap.sums[0])?;
        self.norm_part(&both, &sums[0].1)?;
        let mut inner = overlap.inner.borrow_mut();
        inner.second = Some(both);
        inner.count += sums.len() as u64;
        Ok(true)
    }

    /// Computes `out` from `x` with `work`, which computes each row by itself: in halves, if the step is one of those.
    pub(super) fn in_halves(
        &self,
        x: &Tensor,
        out: &Tensor,
        work: impl Fn(&Tensor, &Tensor) -> spark_backend::Result<()>,
    ) -> spark_backend::Result<()> {
        let Some(overlap) = self.overlap(x.rows()) else {
            self.settle()?;
            return work(x, out);
        };
        if !overlap.is_second_of(x) {
            self.finish_second(overlap)?;
        }
        let [first, second] = halves(x.rows());
        work(&part(x, &first)?, &part(out, &first)?)?;
        overlap.mark_first_half(&self.stream, out)?;
        self.finish_second(overlap)?;
        work(&part(x, &second)?, &part(out, &second)?)
    }

    /// The experts of all rows of `x`, or of the half of it that is there.
    pub(super) fn route_in_halves(
        &self,
        x: &Tensor,
        spec: &RouterSpec<'_, Self>,
    ) -> spark_backend::Result<Routing> {
        let is_half = self.overlap(x.rows()).is_some_and(|overlap| overlap.is_second_of(x));
        if !is_half {
            self.settle()?;
            return Ok(Routing::Whole(self.put_route(x, spec)?));
        }
        let choice = self.put_route(&part(x, &halves(x.rows())[0])?, spec)?;
        let &RouterSpec { router, top_k, renormalize, ref experts } = spec;
        let (router, experts) = (Box::new(router.clone()), experts.clone());
        Ok(Routing::First { choice, router, top_k, renormalize, experts })
    }

    /// The experts' sums of all rows.
    pub(super) fn experts_in_halves(
        &self,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        out: &Tensor,
    ) -> spark_backend::Result<()> {
        match (routing, self.overlap(x.rows())) {
            (Routing::First { choice, router, top_k, renormalize, experts: held }, Some(overlap)) => {
                let [first, second] = halves(x.rows());
                self.put_experts(&part(x, &first)?, choice, experts, &part(out, &first)?)?;
                overlap.mark_first_half(&self.stream, out)?;
                self.finish_second(overlap)?;
                let x = part(x, &second)?;
                let (top_k, renormalize) = (*top_k, *renormalize);
                let spec = RouterSpec { router: &**router, top_k, renormalize, experts: held.clone() };
                let choice = self.put_route(&x, &spec)?;
                self.put_experts(&x, &choice, experts, &part(out, &second)?)
            }
            (Routing::Whole(choice) | Routing::First { choice, .. }, _) => {
                self.settle()?;
                self.put_experts(x, choice, experts, out)
            }
        }
    }
}

/// The sum of `partial`, which is there at `ready`, on the stream of sums; `done` is behind it.
fn sum_part(team: &Team, overlap: &Overlap, ready: &Event, partial: &Tensor, done: &Event) -> Result<()> {
    overlap.stream.wait(ready)?;
    team.all_reduce(&overlap.stream, partial)?;
    done.record(&overlap.stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_whole_tiles_and_cover_all_rows() {
        assert_eq!(halves(8192), [0..4096, 4096..8192]);
        assert_eq!(halves(4097), [0..2048, 2048..4097]);
        assert_eq!(halves(150), [0..128, 128..150]);
        assert_eq!(halves(100), [0..100, 100..100]);
    }
}
