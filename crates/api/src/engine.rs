//! The engine as its front ends see it: submit a request, read its events, drop the stream to cancel.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

use crate::{Event, Limits, Request};

/// A running engine. Cheap to share; all methods return at once.
pub trait Engine: Send + Sync + 'static {
    /// Queues a request. Its events arrive on the stream; dropping the stream cancels it before the next step.
    ///
    /// # Errors
    /// When the queue is full, or the engine is stopping or has failed.
    fn submit(&self, request: Request) -> Result<EventStream, SubmitError>;

    /// What was loaded.
    fn info(&self) -> &EngineInfo;

    /// Counters and gauges, as of now.
    fn stats(&self) -> EngineStats;

    /// Whether the engine can serve.
    fn health(&self) -> Health;
}

/// The events of one request. A stream has at most `max_tokens + 2` events, so it needs no bound of its own.
pub type EventStream = UnboundedReceiver<Event>;

/// Facts about the loaded model.
#[derive(Debug, Clone)]
pub struct EngineInfo {
    /// `model_type` of the configuration, for example `qwen3_vl_moe`.
    pub architecture: String,
    /// Bounds that requests are checked against.
    pub limits: Limits,
    /// KV cache capacity in tokens.
    pub num_kv_tokens: usize,
    /// Tokens of one KV block.
    pub block_size: usize,
}

/// Why a request was not queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Come back later.
    #[error("{num_waiting} requests are waiting already; the limit is {limit}")]
    QueueFull {
        /// Requests in the queue.
        num_waiting: usize,
        /// The most that may wait.
        limit: usize,
    },
    /// The engine is draining.
    #[error("the engine is shutting down")]
    Stopping,
    /// The engine failed; the text says how.
    #[error("the engine has failed: {0}")]
    Failed(String),
}

/// Whether the engine can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It can.
    Ready,
    /// It finishes what it has and takes nothing new.
    Stopping,
    /// It cannot any more; the text says why.
    Failed(String),
}

/// Counters (since start) and gauges of an engine.
#[derive(Debug, Clone, Default)]
pub struct EngineStats {
    /// Sequences in the running set.
    pub num_running: usize,
    /// Sequences waiting to be scheduled.
    pub num_waiting: usize,
    /// Share of KV blocks in use by sequences, 0 to 1.
    pub kv_cache_usage: f64,
    /// Steps run.
    pub num_steps: u64,
    /// Preemptions.
    pub num_preemptions: u64,
    /// Prompt tokens computed or taken from the cache.
    pub num_prompt_tokens: u64,
    /// Generated tokens.
    pub num_generation_tokens: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Prompt tokens found there.
    pub prefix_cache_hits: u64,
    /// Media looked up in the encoder cache.
    pub mm_cache_queries: u64,
    /// Media found there.
    pub mm_cache_hits: u64,
    /// Tokens per step.
    pub tokens_per_step: StepHistogram,
    /// What steps took.
    pub step_times: DurationHistogram,
    /// Times that a lost group of ranks was made anew.
    pub num_rebuilt: u64,
}

/// Durations by size: `counts[i]` took at most `2^i` units of [`UNIT`](Self::UNIT) (and more than the bucket before).
#[derive(Debug, Clone, Default)]
pub struct DurationHistogram {
    /// Durations per bucket; the last bucket is open.
    pub counts: [u64; 18],
    /// All of them together.
    pub sum: Duration,
}

impl DurationHistogram {
    /// The bound of the first bucket; that of the last but one is 6.5 s.
    pub const UNIT: Duration = Duration::from_micros(100);

    /// Counts one.
    pub fn observe(&mut self, duration: Duration) {
        let units = duration.as_nanos().div_ceil(Self::UNIT.as_nanos());
        let bucket = units.max(1).next_power_of_two().trailing_zeros() as usize;
        self.counts[bucket.min(self.counts.len() - 1)] += 1;
        self.sum += duration;
    }
}

/// Steps by size: `counts[i]` steps had at most `2^i` tokens (and more than the bucket before).
#[derive(Debug, Clone, Default)]
pub struct StepHistogram {
    /// Steps per bucket; the last bucket is open.
    pub counts: [u64; 16],
    /// Tokens of all steps.
    pub sum: u64,
}

impl StepHistogram {
    /// Counts one step of `num_tokens` tokens.
    pub fn observe(&mut self, num_tokens: usize) {
        let bucket = num_tokens.max(1).next_power_of_two().trailing_zeros() as usize;
        self.counts[bucket.min(self.counts.len() - 1)] += 1;
        self.sum += num_tokens as u64;
    }
}
