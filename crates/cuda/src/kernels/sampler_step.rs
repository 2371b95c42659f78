//! Wrapper of `kernels/sample.cu`: a step's rows of logits to tokens and log-probabilities. Where ranks have a share of the
//! tokens each, its two halves: what a rank finds in its share, and the choice among all ranks' candidates.

use spark_backend::Dtype;

use super::sampler_output::{MAX_ALTERNATIVES, SampleOut};
use super::{Kernels, LoadedModule, Sampler, disjoint, to_u32, words};
use crate::launch::{Kernel, Launch, Params};
use crate::step::StepView;
use crate::{DeviceSlice, Error, Result, Stream, Tensor};

const OP: &str = "sample";
const NUM_THREADS: u32 = 512;
/// Logits that a block takes at a time.
const CHUNK: usize = 4 * NUM_THREADS as usize;
/// Blocks of the kernels that go through rows which fit a multiprocessor.
const BLOCKS_PER_SM: u32 = 2;
/// Threads of a block that chooses, one for each row.
const CHOOSE_THREADS: u32 = 128;
/// Values of 4 bytes of a row's candidates: `Candidate` of `kernels/sample.cuh`.
pub(crate) const CANDIDATE_WORDS: usize = 8;

/// `SampleParams` of `kernels/sample.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct SampleParams {
    logits: u64,
    sample_slots: u64,
    mask_rows: u64,
    masks: u64,
    targets: u64,
    slots: u64,
    last_tokens: u64,
    bias: u64,
    stops: u64,
    history: u64,
    rows: u64,
    active: u64,
    bins: u64,
    lists: u64,
    tokens: u64,
    details: u64,
    alternatives: u64,
    candidates: u64,
    named: u64,
    num_rows: u32,
    num_slots: u32,
    vocab: u32,
    columns: u32,
    stride: u32,
    mask_words: u32,
    num_chunks: u32,
    chunks_per_block: u32,
    max_alternatives: u32,
    first_token: u32,
    world: u32,
    candidate_rows: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 19 * 8 + 12 * 4 bytes, no padding.
unsafe impl Params for SampleParams {
    const NAME: &'static str = "SampleParams";
}

#[derive(Debug)]
pub(super) struct Sample {
    scan: Kernel<SampleParams>,
    bins: Kernel<SampleParams>,
    list: Kernel<SampleParams>,
    select: Kernel<SampleParams>,
    share: Kernel<SampleParams>,
    choose: Kernel<SampleParams>,
}

impl Sample {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        let kernel = |name| Kernel::overlapping(module, name, 0);
        Ok(Self {
            scan: kernel("sample_scan")?,
            bins: kernel("sample_bins")?,
            list: kernel("sample_list")?,
            select: kernel("sample_select")?,
            share: kernel("sample_share")?,
            choose: kernel("sample_choose")?,
        })
    }
}

impl Kernels {
    /// Samples the rows of `logits` (`[num_logit_rows, columns]` f32, real tokens first) that have a slot, keeps the tokens
    /// for the next step, and computes the log-probabilities that slots and prompts asked for. A slot may have one row in a
    /// step. Rows without slot and target are not read.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn sample(
        &self,
        stream: &Stream,
        logits: &Tensor,
        step: &StepView,
        sampler: &Sampler,
        out: &SampleOut,
    ) -> Result<()> {
        let columns = logits.columns();
        if columns < sampler.vocab_size() {
            return Err(Error::shape(OP, format!("at least {} columns", sampler.vocab_size()), columns));
        }
        check_logits(stream, logits, step, sampler)?;
        check_out(stream, step, out)?;
        disjoint(OP, out.slice(), &[logits.slice(), &step.masks])?;
        for [first, count] in batches(step, sampler) {
            let params = SampleParams {
                logits: logits.address() + (4 * first * columns) as u64,
                columns: to_u32(OP, columns)?,
                num_chunks: to_u32(OP, columns.div_ceil(CHUNK))?,
                ..params(step, sampler, [first, count])?.with_out(out, first)
            };
            self.sample_rows(stream, &params)?;
        }
        Ok(())
    }

    /// What a rank finds in its share: `logits` (`[num_logit_rows, share]` f32) of the tokens from `first_token` on, to `candidates`
    /// (`[num_logit_rows]` of 32 bytes). For steps in which no row has filters, log-probabilities or a target
    /// ([`Sampler::takes_shares`]).
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn sample_share(
        &self,
        stream: &Stream,
        logits: &Tensor,
        first_token: usize,
        step: &StepView,
        sampler: &Sampler,
        candidates: &DeviceSlice,
    ) -> Result<()> {
        let columns = logits.columns();
        check_logits(stream, logits, step, sampler)?;
        expect_candidates(stream, candidates, step.num_logit_rows)?;
        disjoint(OP, candidates, &[logits.slice(), &step.masks])?;
        // Tokens are numbers of 32 bits, also those behind the share.
        to_u32(OP, first_token.saturating_add(columns + CHUNK))?;
        for [first, count] in batches(step, sampler) {
            let params = SampleParams {
                logits: logits.address() + (4 * first * columns) as u64,
                columns: to_u32(OP, columns)?,
                // Blocks begin at a multiple of four tokens.
                num_chunks: to_u32(OP, (first_token % 4 + columns).div_ceil(CHUNK).max(1))?,
                first_token: to_u32(OP, first_token)?,
                candidates: candidates.address() + (4 * CANDIDATE_WORDS * first) as u64,
                ..params(step, sampler, [first, count])?
            };
            let (params, scan, _) = grids(stream, &params);
            // SAFETY: logits, step data and candidates were checked; the sampler's parts have the sizes that the kernel takes for
            // `max_rows` rows.
            unsafe { self.sample.share.launch(stream, scan, &params)? };
        }
        Ok(())
    }

    /// Chooses among the `candidates` of all ranks (`[world][num_logit_rows]` of 32 bytes), keeps the tokens for the next step: as
    /// [`Kernels::sample`] does with all logits.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn sample_choose(
        &self,
        stream: &Stream,
        candidates: &DeviceSlice,
        world: usize,
        step: &StepView,
        sampler: &Sampler,
        out: &SampleOut,
    ) -> Result<()> {
        let num_rows = step.num_logit_rows;
        expect_candidates(stream, candidates, num_rows.saturating_mul(world))?;
        words(OP, &step.sample_slots, num_rows)?;
        stream.uses(OP, &[&sampler.parts().slots, &step.sample_slots])?;
        check_out(stream, step, out)?;
        disjoint(OP, out.slice(), &[candidates])?;
        let params = SampleParams {
            candidates: candidates.address(),
            world: to_u32(OP, world)?,
            candidate_rows: to_u32(OP, num_rows)?,
            ..params(step, sampler, [0, num_rows])?.with_out(out, 0)
        };
        let launch = Launch::blocks(params.num_rows.div_ceil(CHOOSE_THREADS), CHOOSE_THREADS);
        // SAFETY: as above; there are candidates of every rank for every row.
        unsafe { self.sample.choose.launch(stream, launch, &params) }
    }

    /// The four launches for up to `max_rows` rows.
    fn sample_rows(&self, stream: &Stream, params: &SampleParams) -> Result<()> {
        let (params, scan, through) = grids(stream, params);
        // SAFETY: `sample` has checked logits, step data and results; the sampler's parts have the sizes that the kernels
        // take for `max_rows` rows. Slots, masks and targets are checked by the kernels or by whoever packed the step.
        unsafe {
            self.sample.scan.launch(stream, scan, &params)?;
            self.sample.bins.launch(stream, through, &params)?;
            self.sample.list.launch(stream, through, &params)?;
            self.sample.select.launch(stream, Launch::blocks(params.num_rows, NUM_THREADS), &params)
        }
    }
}

/// An error unless the kernels may read the logits, and what the step says of them.
fn check_logits(stream: &Stream, logits: &Tensor, step: &StepView, sampler: &Sampler) -> Result<()> {
    let num_rows = step.num_logit_rows;
    logits.expect(OP, [num_rows, logits.columns()], Dtype::F32)?;
    if step.mask_words < sampler.vocab_size().div_ceil(32) {
        return Err(Error::shape(OP, format!("masks of {} tokens", sampler.vocab_size()), step.mask_words));
    }
    for slice in [&step.sample_slots, &step.mask_rows, &step.prompt_targets] {
        words(OP, slice, num_rows)?;
    }
    words(OP, &step.masks, 0)?;
    stream.uses(OP, &[logits.slice(), &sampler.parts().slots, &step.sample_slots])?;
    stream.uses(OP, &[&step.mask_rows, &step.masks, &step.prompt_targets])
}

/// An error unless `out` holds the step's rows.
fn check_out(stream: &Stream, step: &StepView, out: &SampleOut) -> Result<()> {
    if step.num_logit_rows > out.num_rows() {
        return Err(Error::shape(OP, format!("at most {} rows", out.num_rows()), step.num_logit_rows));
    }
    stream.uses(OP, &[out.slice()])
}

/// An error unless `candidates` holds those of `num_rows` rows.
fn expect_candidates(stream: &Stream, candidates: &DeviceSlice, num_rows: usize) -> Result<()> {
    words(OP, candidates, num_rows.saturating_mul(CANDIDATE_WORDS))?;
    if !candidates.address().is_multiple_of(8) {
        return Err(Error::shape(OP, "candidates from a multiple of 8 on", candidates.address()));
    }
    stream.uses(OP, &[candidates])
}

/// First row and number of rows of each launch.
fn batches(step: &StepView, sampler: &Sampler) -> impl Iterator<Item = [usize; 2]> {
    let (num_rows, most) = (step.num_logit_rows, sampler.max_rows());
    (0..num_rows).step_by(most).map(move |first| [first, most.min(num_rows - first)])
}

/// The parameters with the parts of rows, and the launches over parts of rows and over jobs.
fn grids(stream: &Stream, params: &SampleParams) -> (SampleParams, Launch, Launch) {
    // As many parts of rows as fit the device at once: nothing is gained by more.
    let num_blocks = BLOCKS_PER_SM * stream.num_sms().max(1);
    let blocks_per_row = (num_blocks / params.num_rows).clamp(1, params.num_chunks);
    let chunks_per_block = params.num_chunks.div_ceil(blocks_per_row);
    let params = SampleParams { chunks_per_block, ..*params };
    let blocks_per_row = params.num_chunks.div_ceil(chunks_per_block);
    let scan =
        Launch { grid: [blocks_per_row, params.num_rows, 1], num_threads: NUM_THREADS, shared_bytes: 0 };
    let num_items = 2 * params.num_rows * blocks_per_row;
    (params, scan, Launch::blocks(num_items.min(num_blocks), NUM_THREADS))
}

/// Parameters for `count` rows from `first` on, without logits, results and candidates.
fn params(step: &StepView, sampler: &Sampler, [first, count]: [usize; 2]) -> Result<SampleParams> {
    let parts = sampler.parts();
    Ok(SampleParams {
        logits: 0,
        sample_slots: step.sample_slots.address() + 4 * first as u64,
        mask_rows: step.mask_rows.address() + 4 * first as u64,
        masks: step.masks.address(),
        targets: step.prompt_targets.address() + 4 * first as u64,
        slots: parts.slots.address(),
        last_tokens: parts.last_tokens.address(),
        bias: parts.bias.address(),
        stops: parts.stops.address(),
        history: parts.history.address(),
        rows: parts.rows.address(),
        active: parts.active.address(),
        bins: parts.bins.address(),
        lists: parts.lists.address(),
        tokens: 0,
        details: 0,
        alternatives: 0,
        candidates: 0,
        named: parts.named.address(),
        num_rows: to_u32(OP, count)?,
        num_slots: to_u32(OP, sampler.num_slots())?,
        vocab: to_u32(OP, sampler.vocab_size())?,
        columns: 0,
        stride: to_u32(OP, sampler.stride() as usize)?,
        mask_words: to_u32(OP, step.mask_words)?,
        num_chunks: 1,
        chunks_per_block: 1,
        max_alternatives: MAX_ALTERNATIVES as u32,
        first_token: 0,
        world: 1,
        candidate_rows: 0,
    })
}

impl SampleParams {
    /// With results from row `first` of `out` on.
    fn with_out(self, out: &SampleOut, first: usize) -> Self {
        let [tokens, details, alternatives] = out.addresses(first);
        Self { tokens, details, alternatives, ..self }
    }
}
