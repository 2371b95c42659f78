//! What `/metrics` shows: vLLM's names, for what exists here. Engine counters are read at the time of the scrape.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use spark_api::{DurationHistogram, EngineInfo, EngineStats, Finished, StepHistogram};

use crate::RequestReport;
use crate::histogram::{
    CHOICES, Exposition, Histogram, LATENCY_SECONDS, PREEMPTIONS, STEP_TOKENS, TOKEN_SECONDS, TTFT_SECONDS,
    one_two_five,
};

/// How a request ended, as a label.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Outcome {
    Stop,
    Length,
    /// The client went away, or the engine cancelled.
    Abort,
    Error,
}

const OUTCOMES: [(Outcome, &str); 4] = [
    (Outcome::Stop, "stop"),
    (Outcome::Length, "length"),
    (Outcome::Abort, "abort"),
    (Outcome::Error, "error"),
];

/// Why a request was turned away before it was queued, as a label.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rejection {
    /// `--max-num-queued-reqs`.
    QueuedRequests,
    /// `--max-num-queued-tokens`.
    QueuedTokens,
    /// `--max-intake-bytes`.
    IntakeBytes,
    /// `--max-connections`.
    Connections,
}

const REJECTIONS: [(Rejection, &str); 4] = [
    (Rejection::QueuedRequests, "max_num_queued_reqs"),
    (Rejection::QueuedTokens, "max_num_queued_tokens"),
    (Rejection::IntakeBytes, "max_intake_bytes"),
    (Rejection::Connections, "max_connections"),
];

impl Outcome {
    /// vLLM's word for it.
    pub(crate) fn label(self) -> &'static str {
        OUTCOMES[self as usize].1
    }
}

/// Measurements of requests, taken where their events are read.
#[derive(Debug)]
pub(crate) struct Metrics {
    outcomes: [AtomicU64; OUTCOMES.len()],
    rejections: [AtomicU64; REJECTIONS.len()],
    /// Of prompts as they were first looked up, unlike the engine's counters, which count again after a preemption.
    prompt_tokens_cached: AtomicU64,
    prompt_tokens_computed: AtomicU64,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    time_per_output_token: Histogram,
    e2e_latency: Histogram,
    queue_time: Histogram,
    inference_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    params_n: Histogram,
    params_max_tokens: Histogram,
    prefill_computed: Histogram,
    /// Of requests, not of sequences: of their choices the longest.
    longest_generation: Histogram,
    preemptions: Histogram,
}

impl Metrics {
    /// No measurements yet.
    pub(crate) fn new(max_model_len: usize) -> Self {
        let tokens = one_two_five(max_model_len);
        let latency = || Histogram::new(LATENCY_SECONDS);
        Self {
            outcomes: Default::default(),
            rejections: Default::default(),
            prompt_tokens_cached: AtomicU64::new(0),
            prompt_tokens_computed: AtomicU64::new(0),
            time_to_first_token: Histogram::new(TTFT_SECONDS),
            inter_token_latency: Histogram::new(TOKEN_SECONDS),
            time_per_output_token: Histogram::new(TOKEN_SECONDS),
            e2e_latency: latency(),
            queue_time: latency(),
            inference_time: latency(),
            prefill_time: latency(),
            decode_time: latency(),
            prompt_tokens: Histogram::new(&tokens),
            generation_tokens: Histogram::new(&tokens),
            params_n: Histogram::new(CHOICES),
            params_max_tokens: Histogram::new(&tokens),
            prefill_computed: Histogram::new(&tokens),
            longest_generation: Histogram::new(&tokens),
            preemptions: Histogram::new(PREEMPTIONS),
        }
    }

    /// A sequence was queued.
    pub(crate) fn submitted(&self, n: usize, max_tokens: usize) {
        self.params_n.observe_count(n);
        self.params_max_tokens.observe_count(max_tokens);
    }

    /// A request was turned away.
    pub(crate) fn rejected(&self, reason: Rejection) {
        self.rejections[reason as usize].fetch_add(1, Relaxed);
    }

    /// A prompt was looked up in the prefix cache.
    pub(crate) fn prompt(&self, num_tokens: usize, num_cached: usize) {
        let num_computed = num_tokens.saturating_sub(num_cached);
        self.prompt_tokens_cached.fetch_add(num_cached as u64, Relaxed);
        self.prompt_tokens_computed.fetch_add(num_computed as u64, Relaxed);
        self.prefill_computed.observe_count(num_computed);
    }

    /// A token arrived: the first of its sequence, or `previous` was the one before.
    pub(crate) fn token(&self, arrived: Instant, previous: Option<Instant>, now: Instant) {
        match previous {
            None => self.time_to_first_token.observe(seconds(now - arrived)),
            Some(previous) => self.inter_token_latency.observe(seconds(now - previous)),
        }
    }

    /// A sequence ended. `finished` is what the engine says about it, if it had the last word.
    pub(crate) fn finished(&self, outcome: Outcome, counts: Counts, finished: Option<&Finished>) {
        self.outcomes[outcome as usize].fetch_add(1, Relaxed);
        if matches!(outcome, Outcome::Abort | Outcome::Error) {
            return;
        }
        self.e2e_latency.observe(seconds(counts.arrived.elapsed()));
        self.prompt_tokens.observe_count(counts.num_prompt_tokens);
        self.generation_tokens.observe_count(counts.num_output_tokens);
        let Some(timings) = finished.map(|finished| finished.timings) else { return };
        self.queue_time.observe(seconds(timings.queued));
        self.prefill_time.observe(seconds(timings.prefill));
        self.decode_time.observe(seconds(timings.decode));
        self.inference_time.observe(seconds(timings.prefill + timings.decode));
        self.preemptions.observe_count(timings.num_preemptions);
        if let Ok(later_tokens @ 1..) = u32::try_from(counts.num_output_tokens.saturating_sub(1)) {
            self.time_per_output_token.observe(seconds(timings.decode) / f64::from(later_tokens));
        }
    }

    /// A request ended, all of its sequences. Its longest had `longest` tokens.
    pub(crate) fn request(&self, longest: usize, report: &RequestReport) {
        if !report.ends.iter().any(|end| matches!(*end, "abort" | "error")) {
            self.longest_generation.observe_count(longest);
        }
    }

    /// The page.
    pub(crate) fn render(&self, model_name: &str, info: &EngineInfo, stats: &EngineStats) -> String {
        let mut page = Exposition::new(model_name);
        engine_metrics(&mut page, info, stats);
        page.metric("request_success_total", "counter", "Sequences that ended, by reason.");
        for (outcome, reason) in OUTCOMES {
            let count = self.outcomes[outcome as usize].load(Relaxed);
            page.sample("request_success_total", &format!(",finished_reason=\"{reason}\""), count);
        }
        page.metric(
            "admission_rejections_total",
            "counter",
            "Requests turned away before they were queued, by limit.",
        );
        for (rejection, reason) in REJECTIONS {
            let count = self.rejections[rejection as usize].load(Relaxed);
            page.sample("admission_rejections_total", &format!(",reason=\"{reason}\""), count);
        }
        let cached = self.prompt_tokens_cached.load(Relaxed);
        let computed = self.prompt_tokens_computed.load(Relaxed);
        page.single(
            "prompt_tokens_cached_total",
            "counter",
            "Prompt tokens found in the prefix cache.",
            cached,
        );
        page.metric(
            "prompt_tokens_by_source_total",
            "counter",
            "Prompt tokens by where their keys and values are from.",
        );
        for (source, count) in [("local_compute", computed), ("local_cache_hit", cached)] {
            page.sample("prompt_tokens_by_source_total", &format!(",source=\"{source}\""), count);
        }
        for (name, help, histogram) in self.histograms() {
            let (bounds, counts, sum) = histogram.snapshot();
            page.histogram(name, help, bounds, &counts, sum);
        }
        page.finish()
    }

    fn histograms(&self) -> [(&'static str, &'static str, &Histogram); 15] {
        [
            ("time_to_first_token_seconds", "From arrival to the first token.", &self.time_to_first_token),
            ("inter_token_latency_seconds", "Between two tokens of a sequence.", &self.inter_token_latency),
            (
                "request_time_per_output_token_seconds",
                "Decode time per later token.",
                &self.time_per_output_token,
            ),
            ("e2e_request_latency_seconds", "From arrival to the end.", &self.e2e_latency),
            ("request_queue_time_seconds", "From arrival until first scheduled.", &self.queue_time),
            ("request_inference_time_seconds", "From first scheduled to the end.", &self.inference_time),
            ("request_prefill_time_seconds", "From first scheduled to the first token.", &self.prefill_time),
            ("request_decode_time_seconds", "From the first token to the end.", &self.decode_time),
            ("request_prompt_tokens", "Prompt tokens of a sequence.", &self.prompt_tokens),
            ("request_generation_tokens", "Generated tokens of a sequence.", &self.generation_tokens),
            ("request_params_n", "Values of n.", &self.params_n),
            ("request_params_max_tokens", "Values of max_tokens.", &self.params_max_tokens),
            (
                "request_prefill_kv_computed_tokens",
                "Prompt tokens of a sequence that were not in the prefix cache.",
                &self.prefill_computed,
            ),
            (
                "request_max_num_generation_tokens",
                "Generated tokens of a request's longest choice.",
                &self.longest_generation,
            ),
            ("request_num_preemptions", "Times that a sequence was preempted.", &self.preemptions),
        ]
    }
}

/// What a sequence used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) arrived: Instant,
    pub(crate) num_prompt_tokens: usize,
    pub(crate) num_output_tokens: usize,
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

#[allow(clippy::cast_precision_loss, reason = "a ratio of counts far below 2^53")]
fn engine_metrics(page: &mut Exposition, info: &EngineInfo, stats: &EngineStats) {
    let gauge = "gauge";
    page.single("num_requests_running", gauge, "Sequences in the running set.", stats.num_running);
    page.single("num_requests_waiting", gauge, "Sequences waiting to be scheduled.", stats.num_waiting);
    page.metric("num_requests_waiting_by_reason", gauge, "Sequences waiting to be scheduled, by what for.");
    // Nothing here waits for anything but room in the running set and in the cache.
    page.sample("num_requests_waiting_by_reason", ",reason=\"capacity\"", stats.num_waiting);
    page.single("kv_cache_usage_perc", gauge, "Share of KV blocks in use, 0 to 1.", stats.kv_cache_usage);
    page.metric("engine_sleep_state", gauge, "1 for the state that the engine is in; it never sleeps.");
    for (state, value) in [("awake", 1), ("weights_offloaded", 0), ("discard_all", 0)] {
        page.sample("engine_sleep_state", &format!(",sleep_state=\"{state}\""), value);
    }
    page.metric("cache_config_info", gauge, "Configuration of the KV cache.");
    let num_blocks = info.num_kv_tokens / info.block_size.max(1);
    let (num_tokens, longest) = (info.num_kv_tokens, info.limits.max_model_len.max(1));
    let labels = format!(
        ",block_size=\"{}\",num_gpu_blocks=\"{num_blocks}\",kv_cache_size_tokens=\"{num_tokens}\",\
         kv_cache_max_concurrency=\"{:.2}\"",
        info.block_size,
        // How many sequences of the greatest length there is room for.
        num_tokens as f64 / longest as f64
    );
    page.sample("cache_config_info", &labels, 1);
    for (name, help, value) in [
        ("num_preemptions_total", "Preemptions.", stats.num_preemptions),
        ("prompt_tokens_total", "Prompt tokens computed or found in the cache.", stats.num_prompt_tokens),
        ("generation_tokens_total", "Generated tokens.", stats.num_generation_tokens),
        (
            "prefix_cache_queries_total",
            "Prompt tokens looked up in the prefix cache.",
            stats.prefix_cache_queries,
        ),
        ("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
        ("mm_cache_queries_total", "Media looked up in the encoder cache.", stats.mm_cache_queries),
        ("mm_cache_hits_total", "Media found in the encoder cache.", stats.mm_cache_hits),
    ] {
        page.single(name, "counter", help, value);
    }
    let (counts, sum) = step_tokens(&stats.tokens_per_step);
    page.histogram("iteration_tokens_total", "Tokens of a step.", STEP_TOKENS, &counts, sum);
    own_metrics(page, stats);
}

/// What vLLM has no name for.
fn own_metrics(page: &mut Exposition, stats: &EngineStats) {
    page.own_single(
        "engine_rebuilt_total",
        "counter",
        "Groups of ranks made anew after a loss.",
        stats.num_rebuilt,
    );
    page.own_single("steps_total", "counter", "Steps run.", stats.num_steps);
    let times = &stats.step_times;
    let unit = DurationHistogram::UNIT.as_secs_f64();
    let bounds: Vec<f64> = (0..times.counts.len() - 1).map(|i| unit * f64::from(1u32 << i)).collect();
    page.own_histogram(
        "step_seconds",
        "What a step took on rank 0.",
        &bounds,
        &times.counts,
        seconds(times.sum),
    );
    if let Some(bytes) = resident_bytes() {
        page.own_single("process_resident_memory_bytes", "gauge", "Memory of the server's process.", bytes);
    }
}

/// Memory of this process that is in use, the CPU backend's weights included.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The engine counts steps by powers of two; vLLM's buckets are the powers 0, 3, 4 ... 14 and the rest.
#[allow(clippy::cast_precision_loss, reason = "a page of statistics, not a ledger")]
fn step_tokens(steps: &StepHistogram) -> (Vec<u64>, f64) {
    let mut counts = vec![steps.counts[0], steps.counts[1..=3].iter().sum()];
    counts.extend(&steps.counts[4..=14]);
    counts.push(steps.counts[15..].iter().sum());
    (counts, steps.sum as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_buckets_line_up_with_their_bounds() {
        let mut steps = StepHistogram::default();
        for tokens in [1, 2, 8, 9, 16, 16384, 16385] {
            steps.observe(tokens);
        }
        let (counts, sum) = step_tokens(&steps);
        assert_eq!(counts.len(), STEP_TOKENS.len() + 1);
        assert_eq!((counts[0], counts[1], counts[2], counts[12], counts[13]), (1, 2, 2, 1, 1));
        assert_eq!(sum, 32805.0);
    }
}
