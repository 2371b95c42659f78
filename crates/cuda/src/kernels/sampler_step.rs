//! Wrapper of `kernels/sample.cu`: a step's rows of logits to tokens and log-probabilities.

use spark_backend::Dtype;

use super::sampler_output::{MAX_ALTERNATIVES, SampleOut};
use super::{Kernels, LoadedModule, Sampler, disjoint, to_u32, words};
use crate::launch::{Kernel, Launch, Params};
use crate::step::StepView;
use crate::{Error, Result, Stream, Tensor};

const OP: &str = "sample";
const NUM_THREADS: u32 = 512;
/// Logits that a block takes at a time.
const CHUNK: usize = 4 * NUM_THREADS as usize;
/// Blocks of the kernels that go through rows which fit a multiprocessor.
const BLOCKS_PER_SM: u32 = 2;

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
    num_rows: u32,
    num_slots: u32,
    vocab: u32,
    columns: u32,
    stride: u32,
    mask_words: u32,
    num_chunks: u32,
    chunks_per_block: u32,
    max_alternatives: u32,
    unused: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 17 * 8 + 10 * 4 bytes, no padding.
unsafe impl Params for SampleParams {
    const NAME: &'static str = "SampleParams";
}

#[derive(Debug)]
pub(super) struct Sample {
    scan: Kernel<SampleParams>,
    bins: Kernel<SampleParams>,
    list: Kernel<SampleParams>,
    select: Kernel<SampleParams>,
}

impl Sample {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        let kernel = |name| Kernel::overlapping(module, name, 0);
        Ok(Self {
            scan: kernel("sample_scan")?,
            bins: kernel("sample_bins")?,
            list: kernel("sample_list")?,
            select: kernel("sample_select")?,
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
        let (num_rows, columns) = (step.num_logit_rows, logits.columns());
        logits.expect(OP, [num_rows, columns], Dtype::F32)?;
        if columns < sampler.vocab_size() {
            return Err(Error::shape(OP, format!("at least {} columns", sampler.vocab_size()), columns));
        }
        if num_rows > out.num_rows() {
            return Err(Error::shape(OP, format!("at most {} rows", out.num_rows()), num_rows));
        }
        if step.mask_words < sampler.vocab_size().div_ceil(32) {
            return Err(Error::shape(
                OP,
                format!("masks of {} tokens", sampler.vocab_size()),
                step.mask_words,
            ));
        }
        for slice in [&step.sample_slots, &step.mask_rows, &step.prompt_targets] {
            words(OP, slice, num_rows)?;
        }
        words(OP, &step.masks, 0)?;
        stream.uses(OP, &[logits.slice(), out.slice(), &sampler.parts().slots, &step.sample_slots])?;
        stream.uses(OP, &[&step.mask_rows, &step.masks, &step.prompt_targets])?;
        disjoint(OP, out.slice(), &[logits.slice(), &step.masks])?;
        for first in (0..num_rows).step_by(sampler.max_rows()) {
            let count = sampler.max_rows().min(num_rows - first);
            self.sample_rows(stream, &params(logits, step, sampler, out, [first, count])?)?;
        }
        Ok(())
    }

    /// The four launches for up to `max_rows` rows.
    fn sample_rows(&self, stream: &Stream, params: &SampleParams) -> Result<()> {
        // As many parts of rows as fit the device at once: nothing is gained by more.
        let num_blocks = BLOCKS_PER_SM * stream.num_sms().max(1);
        let blocks_per_row = (num_blocks / params.num_rows).clamp(1, params.num_chunks);
        let chunks_per_block = params.num_chunks.div_ceil(blocks_per_row);
        let params = SampleParams { chunks_per_block, ..*params };
        let blocks_per_row = params.num_chunks.div_ceil(chunks_per_block);
        let scan =
            Launch { grid: [blocks_per_row, params.num_rows, 1], num_threads: NUM_THREADS, shared_bytes: 0 };
        let num_items = 2 * params.num_rows * blocks_per_row;
        let through = Launch::blocks(num_items.min(num_blocks), NUM_THREADS);
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

/// Parameters for `count` rows from `first` on, without the number of chunks of a block.
fn params(
    logits: &Tensor,
    step: &StepView,
    sampler: &Sampler,
    out: &SampleOut,
    [first, count]: [usize; 2],
) -> Result<SampleParams> {
    let parts = sampler.parts();
    let [tokens, details, alternatives] = out.addresses(first);
    let columns = logits.columns();
    Ok(SampleParams {
        logits: logits.address() + (4 * first * columns) as u64,
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
        tokens,
        details,
        alternatives,
        num_rows: to_u32(OP, count)?,
        num_slots: to_u32(OP, sampler.num_slots())?,
        vocab: to_u32(OP, sampler.vocab_size())?,
        columns: to_u32(OP, columns)?,
        stride: to_u32(OP, sampler.stride() as usize)?,
        mask_words: to_u32(OP, step.mask_words)?,
        num_chunks: to_u32(OP, columns.div_ceil(CHUNK))?,
        chunks_per_block: 1,
        max_alternatives: MAX_ALTERNATIVES as u32,
        unused: 0,
    })
}
