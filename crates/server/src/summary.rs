//! One line in the log for each request that reached the engine: what it took and how it ended, never what it said.

use std::time::Instant;

use parking_lot::Mutex;

/// What all sequences of one request have in common for the log; written when the last of them is gone.
#[derive(Debug)]
pub(crate) struct Summary {
    /// The request's name, without control characters: a client may have chosen it.
    id: String,
    arrived: Instant,
    is_logged: bool,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    prompt_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    sequences: usize,
    longest: usize,
    first_token: Option<Instant>,
    /// How sequences ended, each once.
    ends: Vec<&'static str>,
}

impl Summary {
    /// Of a request without sequences so far. Unless `is_logged`, nothing is written in the end.
    pub(crate) fn new(id: &str, arrived: Instant, is_logged: bool) -> Self {
        let id = id.chars().map(|char| if char.is_control() { '?' } else { char }).take(200).collect();
        Self { id, arrived, is_logged, counts: Mutex::default() }
    }

    /// The prompt of a sequence was looked up.
    pub(crate) fn prompt(&self, prompt_tokens: usize, cached_tokens: usize) {
        let mut counts = self.counts.lock();
        counts.prompt_tokens += prompt_tokens;
        counts.cached_tokens += cached_tokens;
    }

    /// The first token of a sequence came.
    pub(crate) fn first_token(&self, now: Instant) {
        self.counts.lock().first_token.get_or_insert(now);
    }

    /// A sequence has ended after `output_tokens`.
    pub(crate) fn ended(&self, reason: &'static str, output_tokens: usize) {
        let mut counts = self.counts.lock();
        counts.sequences += 1;
        counts.output_tokens += output_tokens;
        counts.longest = counts.longest.max(output_tokens);
        if !counts.ends.contains(&reason) {
            counts.ends.push(reason);
        }
    }
}

impl Drop for Summary {
    fn drop(&mut self) {
        let counts = self.counts.get_mut();
        if !self.is_logged || counts.sequences == 0 {
            return;
        }
        let milliseconds = |end: Instant| end.saturating_duration_since(self.arrived).as_secs_f64() * 1e3;
        let rate =
            counts.first_token.map_or(0.0, |first| rate(counts.output_tokens, first.elapsed().as_secs_f64()));
        tracing::info!(
            id = %self.id,
            prompt_tokens = counts.prompt_tokens,
            cached_tokens = counts.cached_tokens,
            output_tokens = counts.output_tokens,
            sequences = counts.sequences,
            ttft_ms = counts.first_token.map(|first| rounded(milliseconds(first))),
            total_ms = rounded(milliseconds(Instant::now())),
            tokens_per_s = rounded(rate),
            finish = counts.ends.join(","),
            "request"
        );
    }
}

/// Tokens after the first, per second; 0 when there is none to measure.
#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn rate(output_tokens: usize, seconds: f64) -> f64 {
    if output_tokens > 1 && seconds > 0.0 { (output_tokens - 1) as f64 / seconds } else { 0.0 }
}

/// One decimal is what a person reads.
fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_write_lines() {
        let summary = Summary::new("a\r\n\u{1b}[31mINFO", Instant::now(), true);
        assert_eq!(summary.id, "a???[31mINFO");
    }

    #[test]
    fn sequences_add_up() {
        let summary = Summary::new("x", Instant::now(), false);
        summary.prompt(10, 4);
        for (reason, tokens) in [("stop", 3), ("length", 5), ("stop", 1)] {
            summary.ended(reason, tokens);
        }
        let counts = summary.counts.lock();
        assert_eq!((counts.output_tokens, counts.sequences, counts.longest), (9, 3, 5));
        assert_eq!(counts.ends, ["stop", "length"]);
        assert_eq!((rate(11, 2.0), rate(1, 2.0)), (5.0, 0.0));
    }
}
