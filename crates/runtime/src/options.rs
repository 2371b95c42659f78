//! How an engine is sized. Names are vLLM's flags; nothing here is parsed from text.

use std::time::Duration;

use spark_backend::{Dtype, KvDtype};
use spark_models::ModelConfig;
use spark_scheduler::Policy;

use crate::{Error, FailureHook, Result};

/// Most prompt tokens in a step whose logits are computed: at a vocabulary of 152k each takes 0.6 MB.
pub(crate) const MAX_PROMPT_LOGPROB_TOKENS: usize = 128;

/// Most tokens in a step unless said, for a device of which nothing is known.
pub const DEFAULT_BATCHED_TOKENS: usize = 2048;

/// Sizes and policies of one engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Prompt and output together; `None`: as long as the model and the KV cache allow.
    pub max_model_len: Option<usize>,
    /// Most sequences that run at once.
    pub max_num_seqs: usize,
    /// Most tokens in a step; `None`: what suits the device.
    pub max_num_batched_tokens: Option<usize>,
    /// Most prefill tokens of one sequence in a step; `None` leaves the step's budget.
    pub long_prefill_token_threshold: Option<usize>,
    /// Most requests that may wait; `None` is unbounded.
    pub max_num_queued_reqs: Option<usize>,
    /// Reuse KV of equal prefixes.
    pub enable_prefix_caching: bool,
    /// Who goes first.
    pub scheduling_policy: Policy,
    /// Plan the next step while one is running.
    pub async_scheduling: bool,
    /// Share of the machine's memory that the engine may take.
    pub gpu_memory_utilization: f64,
    /// KV cache size; overrides the share.
    pub kv_cache_memory_bytes: Option<u64>,
    /// KV storage type.
    pub kv_cache_dtype: KvCacheDtype,
    /// Capacity of the encoder cache, in media tokens; also the largest medium.
    pub encoder_cache_tokens: usize,
    /// Most media tokens encoded in a step.
    pub max_encoder_tokens_per_step: usize,
    /// Most media in a prompt.
    pub limit_mm_per_prompt: usize,
    /// Most alternatives in log-probabilities.
    pub max_logprobs: usize,
    /// Per-channel mean and standard deviation of the image processor.
    pub image_mean_std: ([f32; 3], [f32; 3]),
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Longest that a step may take before the device counts as hung; `None` waits for ever.
    pub step_timeout: Option<Duration>,
    /// Told of every failure of the engine.
    pub on_failure: FailureHook,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: None,
            long_prefill_token_threshold: None,
            max_num_queued_reqs: None,
            enable_prefix_caching: true,
            scheduling_policy: Policy::Fcfs,
            async_scheduling: true,
            gpu_memory_utilization: 0.9,
            kv_cache_memory_bytes: None,
            kv_cache_dtype: KvCacheDtype::Auto,
            // The largest image of the default processor settings: 16,777,216 pixels at 32 x 32 a token.
            encoder_cache_tokens: 16_384,
            max_encoder_tokens_per_step: 16_384,
            limit_mm_per_prompt: 64,
            max_logprobs: 20,
            image_mean_std: ([0.5; 3], [0.5; 3]),
            block_size: 32,
            step_timeout: None,
            on_failure: FailureHook::default(),
        }
    }
}

/// KV storage type as asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvCacheDtype {
    /// The compute dtype.
    Auto,
    /// FP8 E4M3 with a scale per token and head.
    Fp8,
    /// bfloat16.
    Bf16,
}

impl KvCacheDtype {
    /// The storage type under compute dtype `compute`.
    pub fn resolve(self, compute: Dtype) -> KvDtype {
        match (self, compute) {
            (Self::Fp8, _) => KvDtype::Fp8,
            (Self::Auto, Dtype::F32) => KvDtype::F32,
            (Self::Bf16 | Self::Auto, _) => KvDtype::Bf16,
        }
    }
}

/// No size of an engine comes near this; it keeps products of a few of them inside 64 bits.
const MAX_SIZE: usize = 1 << 24;

impl EngineOptions {
    /// Most tokens in a step: as set, or [`DEFAULT_BATCHED_TOKENS`] and a token for every sequence.
    pub fn batched_tokens(&self) -> usize {
        self.max_num_batched_tokens.unwrap_or(DEFAULT_BATCHED_TOKENS.max(self.max_num_seqs))
    }

    /// Checks what does not depend on memory: cheap, so that it can be done before anything is loaded.
    ///
    /// # Errors
    /// Names the flag, its value and the rule.
    pub fn check(&self, model: &ModelConfig) -> Result<()> {
        let sizes = [
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-num-batched-tokens", self.batched_tokens()),
            ("--long-prefill-token-threshold", self.long_prefill_token_threshold.unwrap_or(1)),
            ("--encoder-cache-tokens", self.encoder_cache_tokens),
            ("--max-encoder-tokens-per-step", self.max_encoder_tokens_per_step),
            ("--block-size", self.block_size),
        ];
        if let Some((option, size)) = sizes.into_iter().find(|(_, size)| !(1..=MAX_SIZE).contains(size)) {
            return Err(Error::option(option, format!("{size} is not between 1 and {MAX_SIZE}")));
        }
        if self.batched_tokens() < self.max_num_seqs {
            let (tokens, seqs) = (self.batched_tokens(), self.max_num_seqs);
            let problem = format!(
                "{tokens} is below --max-num-seqs ({seqs}): every sequence must be able to decode in every step"
            );
            return Err(Error::option("--max-num-batched-tokens", problem));
        }
        if !(self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0) {
            let value = self.gpu_memory_utilization;
            return Err(Error::option(
                "--gpu-memory-utilization",
                format!("{value} is not above 0 and at most 1"),
            ));
        }
        let most = model.text.max_position_embeddings;
        match self.max_model_len {
            Some(len) if len > most => Err(Error::option(
                "--max-model-len",
                format!("{len} is over the model's own limit of {most} tokens"),
            )),
            Some(len) if len < 2 => Err(Error::option(
                "--max-model-len",
                format!("{len} leaves no room for a prompt and an answer"),
            )),
            _ => Ok(()),
        }
    }
}
