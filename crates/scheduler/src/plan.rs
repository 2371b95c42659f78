//! What goes out of the scheduler: the plan of a step, and what a completed step meant for its sequences. Plain data.

use serde::{Deserialize, Serialize};
use spark_api::{MediaHash, StepHistogram, TokenId};

/// Identity of a sequence within its scheduler; in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SeqId(pub(crate) u64);

/// Identity of a step within its scheduler; in order of execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StepId(pub(crate) u64);

impl StepId {
    /// Its place in the order of execution, from 0.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// One step, to be executed after every step planned before it.
///
/// The executor drops `evict_media`, encodes `encode`, then runs the rows of `seqs`. Serialisable, because every rank of a
/// group executes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StepPlan {
    /// To hand back to [`Scheduler::complete`](crate::Scheduler::complete).
    pub id: StepId,
    /// Decodes first, then prefills; never empty. Each sequence at most once.
    pub seqs: Vec<PlannedSeq>,
    /// Media to encode into the encoder cache before the rows run; each hash at most once.
    pub encode: Vec<EncodeMedia>,
    /// Encoder-cache entries to drop before `encode`. No step in flight reads them.
    pub evict_media: Vec<MediaHash>,
    /// Rows of all sequences together.
    pub num_tokens: usize,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlannedSeq {
    /// Whose rows.
    pub seq: SeqId,
    /// Index of its device state. Kept from admission to the end or to preemption.
    pub slot: usize,
    /// First step since (re)admission: the slot's state must be sent. All tokens so far are known then.
    pub admit: bool,
    /// Output tokens before the one that this step may sample, a pending one included: the index of that sample.
    pub num_output_tokens: usize,
    /// Absolute index (in prompt and output) of the first row.
    pub start: usize,
    /// `[num_rows]`, never empty.
    pub tokens: Vec<PlanToken>,
    /// KV tokens after this step: `start + tokens.len()`.
    pub context_len: usize,
    /// `[ceil(context_len / block_size)]` blocks that hold them, in order.
    pub block_table: Vec<u32>,
    /// The last row is sampled.
    pub samples: bool,
    /// Rows that take embeddings of media, ascending.
    pub media: Vec<MediaRows>,
    /// Tokens that this admission found in the prefix cache: rows start there.
    pub num_cached_tokens: usize,
}

/// A token of a planned row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PlanToken {
    /// The host knows it.
    Known(TokenId),
    /// The sequence's sample of the step in flight; it is still on the device, in the sequence's slot.
    Pending,
}

/// Rows of a medium's embeddings that replace token embeddings of one [`PlannedSeq`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MediaRows {
    /// Index in [`NewSequence::media`](crate::NewSequence::media).
    pub media_idx: usize,
    /// Entry of the encoder cache.
    pub hash: MediaHash,
    /// First row, counted within this sequence's rows of this step.
    pub token_row: usize,
    /// First row of the medium.
    pub source_row: usize,
    /// How many.
    pub rows: usize,
}

/// A medium to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EncodeMedia {
    /// Sequence that brings the pixels.
    pub seq: SeqId,
    /// Index in [`NewSequence::media`](crate::NewSequence::media).
    pub media_idx: usize,
    /// Entry of the encoder cache to fill.
    pub hash: MediaHash,
    /// Rows of the entry.
    pub num_tokens: usize,
}

/// What a completed step changed for a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeqUpdate {
    /// Which.
    pub seq: SeqId,
    /// Accepted output tokens, in order, the ending one included. Tokens past it were dropped.
    pub tokens: Vec<TokenId>,
    /// The whole prompt is computed now (reported once): how many of its tokens were found in the prefix cache.
    pub prompt_done: Option<usize>,
    /// The sequence has ended; its id is no longer valid.
    pub finish: Option<Finish>,
    /// Times that it was preempted so far.
    pub num_preemptions: usize,
}

/// Why a sequence ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token of the model.
    Eos,
    /// One of the sequence's own stop tokens.
    StopToken(TokenId),
    /// `max_tokens` or `max_model_len` is reached.
    Length,
}

/// Gauges as of now, and counters since the scheduler was made.
#[derive(Debug, Clone, Default)]
pub struct SchedulerStats {
    /// Sequences in the running set.
    pub num_running: usize,
    /// Sequences that wait for (re)admission.
    pub num_waiting: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Blocks that no sequence uses; cached ones that may be evicted are among them.
    pub num_free_blocks: usize,
    /// Tokens of the encoder cache that hold an entry, used or not.
    pub encoder_cache_tokens: usize,
    /// Steps planned.
    pub num_steps: u64,
    /// Preemptions.
    pub num_preemptions: u64,
    /// Prompt tokens of sequences whose prompt is done, computed or taken from the cache.
    pub num_prompt_tokens: u64,
    /// Accepted output tokens.
    pub num_generation_tokens: u64,
    /// Tokens looked up in the prefix cache at admission.
    pub prefix_cache_queries: u64,
    /// Tokens found there.
    pub prefix_cache_hits: u64,
    /// Media looked up in the encoder cache.
    pub mm_cache_queries: u64,
    /// Media found there.
    pub mm_cache_hits: u64,
    /// Tokens per step.
    pub tokens_per_step: StepHistogram,
}
