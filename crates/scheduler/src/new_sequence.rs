//! What comes into the scheduler: one sequence to generate, and why it may be refused.

use spark_api::{MediaHash, TokenId};

/// A sequence to generate. Derived from a validated request; sampling parameters stay with the caller.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// `[num_prompt_tokens]`, at least one.
    pub prompt: Vec<TokenId>,
    /// What it has generated before, with another scheduler: it is computed anew with the prompt, as after a preemption. Fewer
    /// tokens than `max_tokens`.
    pub output: Vec<TokenId>,
    /// Media in the order of their placeholder runs.
    pub media: Vec<MediaSpan>,
    /// Most output tokens, at least 1. `max_model_len` bounds it further.
    pub max_tokens: usize,
    /// No end-of-sequence or stop token counts before this many output tokens.
    pub min_tokens: usize,
    /// Tokens that end this sequence, besides the model's.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Lower is served first, under [`Policy::Priority`](crate::Policy::Priority).
    pub priority: i32,
    /// Blocks are shared only between equal salts.
    pub cache_salt: Option<String>,
    /// What the next token may be depends on the last one, and somebody has to work it out: the sequence samples nothing
    /// before [`Scheduler::allow_sample`](crate::Scheduler::allow_sample), once for each token.
    pub constrained: bool,
    /// Every prompt row is needed: the prefix cache is not looked up.
    pub prompt_logprobs: bool,
}

/// A run of placeholder tokens that the embeddings of a medium replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MediaSpan {
    /// Identity: equal hashes mean equal embeddings, of equal length.
    pub hash: MediaHash,
    /// Index of the first placeholder in the prompt.
    pub offset: usize,
    /// Length of the run.
    pub num_tokens: usize,
}

impl MediaSpan {
    /// Index after the last placeholder.
    pub(crate) fn end(&self) -> usize {
        self.offset + self.num_tokens
    }
}

/// Why a sequence was not taken: it could never finish here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Nothing to compute, or nothing to generate.
    #[error(
        "a sequence needs at least one prompt token and max_tokens of at least 1; it has {num_prompt_tokens} and {max_tokens}"
    )]
    Empty {
        /// Length of the prompt.
        num_prompt_tokens: usize,
        /// Output tokens asked for.
        max_tokens: usize,
    },
    /// Over the model's length.
    #[error(
        "the prompt ({num_prompt_tokens} tokens) leaves no room for an output token in max_model_len ({max_model_len})"
    )]
    PromptTooLong {
        /// Length of the prompt.
        num_prompt_tokens: usize,
        /// The bound.
        max_model_len: usize,
    },
    /// It has all the output that it may have.
    #[error("the sequence has {num_output_tokens} output tokens, and may have {max_tokens}")]
    Complete {
        /// Tokens that it has generated before.
        num_output_tokens: usize,
        /// Most output tokens.
        max_tokens: usize,
    },
    /// Larger than the whole KV pool.
    #[error(
        "the sequence may grow to {num_tokens} tokens; the whole KV cache holds {capacity}: lower max_tokens, or give the cache more memory"
    )]
    OverKvCache {
        /// Prompt and output.
        num_tokens: usize,
        /// What fits ([`Scheduler::max_tokens_that_fit`](crate::Scheduler::max_tokens_that_fit)).
        capacity: usize,
    },
    /// Larger than the whole encoder cache.
    #[error(
        "medium {media_idx} has {num_tokens} tokens; the whole encoder cache holds {capacity}: use a smaller image, or raise --encoder-cache-tokens"
    )]
    OverEncoderCache {
        /// Index in [`NewSequence::media`].
        media_idx: usize,
        /// Its size.
        num_tokens: usize,
        /// The bound.
        capacity: usize,
    },
    /// Spans must be ascending, disjoint, not empty and inside the prompt.
    #[error(
        "medium {media_idx} fills tokens {offset}..{end}, which is empty, overlaps the medium before it, or ends after the prompt ({num_prompt_tokens} tokens)"
    )]
    BadSpan {
        /// Index in [`NewSequence::media`].
        media_idx: usize,
        /// First token.
        offset: usize,
        /// Token after the last.
        end: usize,
        /// Length of the prompt.
        num_prompt_tokens: usize,
    },
}
