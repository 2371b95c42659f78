//! How far a prompt has come, in llama-server's words (`prompt_progress`). Knows no chunks.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Delta;
use crate::answer::Shape;
use crate::timings::Timings;

/// What has been said about the prompt of one choice.
#[derive(Debug, Clone, Default)]
pub(crate) struct PromptProgress {
    /// When the first report came, and what it found done: that was cached.
    first: Option<(Instant, usize)>,
}

/// Where a prompt is.
pub(crate) struct Progress {
    total: usize,
    /// Tokens that were cached.
    pub(crate) num_cached: usize,
    processed: usize,
    /// Since the request arrived.
    elapsed: Duration,
    /// Since the first report.
    computing: Duration,
}

impl PromptProgress {
    /// What a delta says about it; the prompt's own end is the last report, where there was a first.
    pub(crate) fn report(&mut self, shape: &Shape, delta: &Delta) -> Option<Progress> {
        let total = shape.prompt(delta.choice).tokens.len();
        let at_end = delta.prompt.as_ref().filter(|_| self.first.is_some()).map(|_| total);
        let processed = delta.progress.or(at_end)?;
        let now = Instant::now();
        let (since, num_cached) = *self.first.get_or_insert((now, processed));
        let computing = now.saturating_duration_since(since);
        Some(Progress { total, num_cached, processed, elapsed: shape.arrived.elapsed(), computing })
    }
}

impl Progress {
    /// `prompt_progress`
    pub(crate) fn to_json(&self) -> Value {
        let time_ms = u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX);
        json!({"total": self.total, "cache": self.num_cached, "processed": self.processed, "time_ms": time_ms})
    }

    /// What the prompt has taken so far, as seen from here: the engine says it when the prompt is done.
    pub(crate) fn timings(&self) -> Timings {
        Timings {
            num_prompt_tokens: self.processed,
            num_cached_tokens: self.num_cached,
            prefill: self.computing,
            ..Timings::default()
        }
    }
}
