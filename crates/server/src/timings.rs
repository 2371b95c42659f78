//! What an answer says of its own time: llama-server's `timings`, vLLM's `metrics`. Measures nothing itself.

use std::time::Duration;

use serde_json::{Value, json};

/// Where the time of a sequence went, as far as it has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Tokens of the prompt.
    pub num_prompt_tokens: usize,
    /// Of these, taken from the prefix cache.
    pub num_cached_tokens: usize,
    /// Generated tokens.
    pub num_output_tokens: usize,
    /// From arrival until first scheduled.
    pub queued: Duration,
    /// From first scheduled until the prompt was computed, which gives the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

impl Timings {
    /// Tokens that took a step of their own: the first comes with the prompt.
    fn num_later_tokens(&self) -> usize {
        self.num_output_tokens.saturating_sub(1)
    }

    /// `timings` of an answer, as llama-server writes it; rates that cannot be known yet are 0.
    pub(crate) fn llama(&self) -> Value {
        let num_computed = self.num_prompt_tokens.saturating_sub(self.num_cached_tokens);
        let num_later = self.num_later_tokens();
        json!({
            "cache_n": self.num_cached_tokens,
            "prompt_n": num_computed,
            "prompt_ms": milliseconds(self.prefill),
            "prompt_per_token_ms": ratio(milliseconds(self.prefill), count(num_computed)),
            "prompt_per_second": ratio(count(num_computed), self.prefill.as_secs_f64()),
            "predicted_n": self.num_output_tokens,
            "predicted_ms": milliseconds(self.decode),
            "predicted_per_token_ms": ratio(milliseconds(self.decode), count(num_later)),
            "predicted_per_second": ratio(count(num_later), self.decode.as_secs_f64()),
        })
    }

    /// `metrics` of an answer, as vLLM writes it: a single token has no `mean_itl_ms`.
    pub(crate) fn vllm(&self) -> Value {
        let inference = self.prefill + self.decode;
        let mut metrics = json!({
            "time_to_first_token_ms": milliseconds(self.prefill),
            "generation_time_ms": milliseconds(self.decode),
            "queue_time_ms": milliseconds(self.queued),
            "tokens_per_second": ratio(count(self.num_output_tokens), inference.as_secs_f64()),
        });
        if self.num_later_tokens() > 0 {
            metrics["mean_itl_ms"] = json!(milliseconds(self.decode) / count(self.num_later_tokens()));
        }
        metrics
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn count(number: usize) -> f64 {
    number as f64
}

/// 0 instead of what JSON cannot say.
fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_leave_out_what_was_cached_and_the_first_token() {
        let timings = Timings {
            num_prompt_tokens: 30,
            num_cached_tokens: 10,
            num_output_tokens: 5,
            queued: Duration::from_millis(7),
            prefill: Duration::from_millis(40),
            decode: Duration::from_millis(10),
        };
        let llama = json!({"cache_n": 10, "prompt_n": 20, "prompt_ms": 40.0, "prompt_per_token_ms": 2.0,
            "prompt_per_second": 500.0, "predicted_n": 5, "predicted_ms": 10.0, "predicted_per_token_ms": 2.5,
            "predicted_per_second": 400.0});
        assert_eq!(timings.llama(), llama);
        let vllm = json!({"time_to_first_token_ms": 40.0, "generation_time_ms": 10.0, "queue_time_ms": 7.0,
            "tokens_per_second": 100.0, "mean_itl_ms": 2.5});
        assert_eq!(timings.vllm(), vllm);
    }

    #[test]
    fn what_has_not_happened_is_zero_or_absent() {
        let nothing = Timings::default();
        let rates = nothing.llama();
        assert!(
            rates.as_object().is_some_and(|rates| rates.values().all(|value| value.as_f64() == Some(0.0)))
        );
        assert!(nothing.vllm().get("mean_itl_ms").is_none());
    }
}
