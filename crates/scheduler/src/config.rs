//! What a scheduler is made with. Plain numbers that the caller has computed; no flag parsing and no memory planning.

use spark_api::TokenId;

/// Sizes and rules of one scheduler.
#[derive(Clone)]
pub struct SchedulerConfig {
    /// Slots: most sequences that are in the running set at once.
    pub max_num_seqs: usize,
    /// Token budget of a step. At least `max_num_seqs`, so that a prefill can never push a decode out of a step.
    pub max_num_batched_tokens: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Blocks in the KV pool.
    pub num_blocks: usize,
    /// Most tokens of prompt and output together.
    pub max_model_len: usize,
    /// Reuse full blocks whose whole prefix is equal.
    pub enable_prefix_caching: bool,
    /// Order of the sequences.
    pub policy: Policy,
    /// Tokens that end a sequence, unless it ignores them.
    pub eos_token_ids: Vec<TokenId>,
    /// Capacity of the encoder cache in media tokens (rows of embeddings).
    pub encoder_cache_tokens: usize,
    /// Most media tokens encoded in one step; a single larger medium is still let through, alone.
    pub max_encoder_tokens_per_step: usize,
    /// Key of the block hashes. Random per process, so that nobody can construct prompts whose blocks collide.
    pub cache_key: [u8; 32],
    /// Most prefill tokens of one sequence in one step; `None` leaves only the token budget.
    pub max_chunk_tokens: Option<usize>,
    /// Most prefill tokens in a step of sequences that want prompt log-probabilities: each of them costs a row of logits.
    pub max_prompt_logprob_tokens: usize,
}

/// Who goes first, and (from the other end) who is preempted first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// By arrival; `priority` is ignored.
    Fcfs,
    /// By `priority`, lower first, then by arrival. A more urgent waiting sequence preempts less urgent running ones.
    Priority,
}

/// A configuration that no step could be made with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A size must be positive.
    #[error("scheduler: {field} is 0; it must be at least 1")]
    Zero {
        /// The field of [`SchedulerConfig`].
        field: &'static str,
    },
    /// Every running sequence must be able to decode in every step.
    #[error(
        "scheduler: max_num_batched_tokens ({max_num_batched_tokens}) is below max_num_seqs ({max_num_seqs}): \
         raise the one or lower the other, so that each running sequence can decode in each step"
    )]
    BudgetBelowSeqs {
        /// Token budget of a step.
        max_num_batched_tokens: usize,
        /// Most running sequences.
        max_num_seqs: usize,
    },
    /// Block ids are 32 bits wide.
    #[error("scheduler: num_blocks is {num_blocks}; block ids end at {}", u32::MAX)]
    TooManyBlocks {
        /// Blocks in the pool.
        num_blocks: usize,
    },
}

impl SchedulerConfig {
    /// Checks what [`Scheduler::new`](crate::Scheduler::new) relies on.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("block_size", self.block_size),
            ("num_blocks", self.num_blocks),
            ("max_model_len", self.max_model_len),
            ("max_chunk_tokens", self.max_chunk_tokens.unwrap_or(1)),
            ("max_prompt_logprob_tokens", self.max_prompt_logprob_tokens),
        ];
        if let Some(&(field, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(ConfigError::Zero { field });
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            let (max_num_batched_tokens, max_num_seqs) = (self.max_num_batched_tokens, self.max_num_seqs);
            return Err(ConfigError::BudgetBelowSeqs { max_num_batched_tokens, max_num_seqs });
        }
        match u32::try_from(self.num_blocks) {
            Ok(_) => Ok(()),
            Err(_) => Err(ConfigError::TooManyBlocks { num_blocks: self.num_blocks }),
        }
    }

    /// Tokens that the whole KV pool holds.
    pub(crate) fn num_kv_tokens(&self) -> usize {
        self.num_blocks.saturating_mul(self.block_size)
    }
}
