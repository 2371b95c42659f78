//! Flags about memory and scheduling.

use clap::{Args, ValueEnum};
use spark_engine::{EngineOptions, KvCacheDtype, Policy};

/// Most sequences that wait in a server unless said: as many as it has connections, and more than one request may ask for.
const SERVER_QUEUE: usize = 4096;

#[derive(Args)]
#[command(next_help_heading = "Memory and scheduling")]
pub(crate) struct SizeArgs {
    /// Longest sequence, prompt and output together; by default as long as model and memory allow.
    #[arg(long, value_name = "TOKENS")]
    max_model_len: Option<usize>,
    /// Most sequences that run at once.
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_num_seqs: usize,
    /// Most tokens in a step; by default 8192 on a GPU and 2048 on the CPU.
    #[arg(long, value_name = "TOKENS")]
    max_num_batched_tokens: Option<usize>,
    /// Most prefill tokens of one sequence in a step.
    #[arg(long, value_name = "TOKENS")]
    long_prefill_token_threshold: Option<usize>,
    /// Most sequences that may wait; a request for more gets a 503. 4096 for a server.
    #[arg(long, value_name = "N")]
    max_num_queued_reqs: Option<usize>,
    /// Share of the device's memory that the engine may use, weights included. Of memory that the whole machine lives in
    /// (the CPU's, a DGX Spark's) it is the share that may be in use at all.
    #[arg(long, default_value_t = 0.9, value_name = "SHARE")]
    gpu_memory_utilization: f64,
    /// Size of the KV cache in bytes; overrides the share.
    #[arg(long, value_name = "BYTES")]
    kv_cache_memory_bytes: Option<u64>,
    /// KV storage: the compute dtype (`auto`), FP8 with a scale per token and head, or bfloat16.
    #[arg(long, value_enum, default_value = "auto")]
    kv_cache_dtype: KvDtypeArg,
    /// Do not reuse the KV of equal prefixes.
    #[arg(long, overrides_with = "enable_prefix_caching")]
    no_enable_prefix_caching: bool,
    /// Reuse the KV of equal prefixes (the default).
    #[arg(long)]
    enable_prefix_caching: bool,
    /// Order of requests.
    #[arg(long, value_enum, default_value = "fcfs")]
    scheduling_policy: PolicyArg,
    /// Plan a step only when the one before it is complete.
    #[arg(long, overrides_with = "async_scheduling")]
    no_async_scheduling: bool,
    /// Plan the next step while one is running (the default).
    #[arg(long)]
    async_scheduling: bool,
    /// Most alternatives that a request may ask for in log-probabilities.
    #[arg(long, default_value_t = 20, value_name = "N")]
    max_logprobs: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum KvDtypeArg {
    Auto,
    #[value(alias = "fp8_e4m3")]
    Fp8,
    #[value(name = "bf16", alias = "bfloat16")]
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum PolicyArg {
    Fcfs,
    Priority,
}

impl SizeArgs {
    /// Sets them.
    pub(crate) fn apply(&self, options: &mut EngineOptions) {
        options.max_model_len = self.max_model_len;
        options.max_num_seqs = self.max_num_seqs;
        options.max_num_batched_tokens = self.max_num_batched_tokens;
        options.long_prefill_token_threshold = self.long_prefill_token_threshold;
        options.max_num_queued_reqs = self.max_num_queued_reqs;
        options.gpu_memory_utilization = self.gpu_memory_utilization;
        options.kv_cache_memory_bytes = self.kv_cache_memory_bytes;
        options.kv_cache_dtype = match self.kv_cache_dtype {
            KvDtypeArg::Auto => KvCacheDtype::Auto,
            KvDtypeArg::Fp8 => KvCacheDtype::Fp8,
            KvDtypeArg::Bf16 => KvCacheDtype::Bf16,
        };
        options.enable_prefix_caching = !self.no_enable_prefix_caching;
        options.scheduling_policy = match self.scheduling_policy {
            PolicyArg::Fcfs => Policy::Fcfs,
            PolicyArg::Priority => Policy::Priority,
        };
        options.async_scheduling = !self.no_async_scheduling;
        options.max_logprobs = self.max_logprobs;
    }

    /// Sets them for a measurement of `num_seqs` requests of `num_tokens` tokens each: sizes that were not given fit it, and
    /// prompts are computed, not found.
    pub(crate) fn apply_for_load(&self, options: &mut EngineOptions, num_seqs: usize, num_tokens: usize) {
        self.apply(options);
        options.max_num_seqs = self.max_num_seqs.max(num_seqs);
        options.max_model_len = self.max_model_len.or(Some(num_tokens));
        options.enable_prefix_caching = self.enable_prefix_caching;
    }

    /// For a server, which strangers ask.
    pub(crate) fn with_queue_limit(&mut self) {
        self.max_num_queued_reqs.get_or_insert(SERVER_QUEUE);
    }

    /// For a command that bounds its requests itself.
    pub(crate) fn without_queue_limit(&mut self) {
        if self.max_num_queued_reqs.take().is_some() {
            tracing::warn!(
                "no effect: --max-num-queued-reqs: this command waits instead of refusing requests"
            );
        }
    }
}
