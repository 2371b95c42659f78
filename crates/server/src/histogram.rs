//! A Prometheus histogram of atomics, and the text format. No registry, no locks, no other metric type.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bounds of vLLM's histograms, so that its dashboards work unchanged.
pub(crate) const TTFT_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Time between tokens.
pub(crate) const TOKEN_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Whole requests and their phases.
pub(crate) const LATENCY_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// Values of `n`.
pub(crate) const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
/// Tokens of a step.
pub(crate) const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Times that a sequence is preempted.
pub(crate) const PREEMPTIONS: &[f64] = &[0.0, 1.0, 2.0, 5.0, 10.0, 20.0];

/// The series 1, 2, 5, 10 ... up to `max`, which is how vLLM cuts token counts.
pub(crate) fn one_two_five(max: usize) -> Vec<f64> {
    let powers = std::iter::successors(Some(1.0), |power| Some(power * 10.0));
    #[allow(clippy::cast_precision_loss, reason = "lengths are far below 2^53")]
    let max = max as f64;
    powers
        .flat_map(|power: f64| [power, 2.0 * power, 5.0 * power])
        .take_while(|bound| *bound <= max)
        .collect()
}

/// Counts of observations by size. Observing takes no lock.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: Vec<f64>,
    /// One per bound, and one for what is over the last.
    counts: Vec<AtomicU64>,
    /// Bits of an f64.
    sum: AtomicU64,
}

impl Histogram {
    /// An empty histogram. Bounds ascend.
    pub(crate) fn new(bounds: &[f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds: bounds.to_vec(), counts, sum: AtomicU64::new(0.0f64.to_bits()) }
    }

    /// Counts one value.
    pub(crate) fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        let add = |bits| Some((f64::from_bits(bits) + value).to_bits());
        // The closure never gives None, so this never fails.
        let _ = self.sum.fetch_update(Relaxed, Relaxed, add);
    }

    /// Counts one number of things.
    #[allow(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    pub(crate) fn observe_count(&self, value: usize) {
        self.observe(value as f64);
    }

    /// Bounds, counts (one more than bounds) and sum, as of now.
    pub(crate) fn snapshot(&self) -> (&[f64], Vec<u64>, f64) {
        let counts = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        (&self.bounds, counts, f64::from_bits(self.sum.load(Relaxed)))
    }
}

/// Text in the Prometheus exposition format 0.0.4, every sample with the same base labels.
pub(crate) struct Exposition {
    labels: String,
    text: String,
}

impl Exposition {
    /// An empty page whose samples carry vLLM's two labels.
    pub(crate) fn new(model_name: &str) -> Self {
        let escaped = model_name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        Self { labels: format!("engine=\"0\",model_name=\"{escaped}\""), text: String::new() }
    }

    /// Starts a metric of vLLM's; its samples follow.
    pub(crate) fn metric(&mut self, name: &str, kind: &str, help: &str) {
        self.head(&format!("vllm:{name}"), kind, help);
    }

    /// One sample; `extra` is empty or `,name="value"`.
    pub(crate) fn sample(&mut self, name: &str, extra: &str, value: impl std::fmt::Display) {
        self.value(&format!("vllm:{name}"), extra, value);
    }

    /// A metric with a single sample.
    pub(crate) fn single(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.metric(name, kind, help);
        self.sample(name, "", value);
    }

    /// A histogram. `counts` has one entry more than `bounds`.
    pub(crate) fn histogram(&mut self, name: &str, help: &str, bounds: &[f64], counts: &[u64], sum: f64) {
        self.buckets(&format!("vllm:{name}"), help, bounds, counts, sum);
    }

    /// A metric of our own with a single sample.
    pub(crate) fn own_single(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        let name = format!("spark_{name}");
        self.head(&name, kind, help);
        self.value(&name, "", value);
    }

    /// A histogram of our own.
    pub(crate) fn own_histogram(&mut self, name: &str, help: &str, bounds: &[f64], counts: &[u64], sum: f64) {
        self.buckets(&format!("spark_{name}"), help, bounds, counts, sum);
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn value(&mut self, name: &str, extra: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{name}{{{}{extra}}} {value}", self.labels);
    }

    fn buckets(&mut self, name: &str, help: &str, bounds: &[f64], counts: &[u64], sum: f64) {
        self.head(name, "histogram", help);
        let mut total = 0;
        for (bound, count) in bounds.iter().zip(counts) {
            total += count;
            self.value(&format!("{name}_bucket"), &format!(",le=\"{bound:?}\""), total);
        }
        total = counts.iter().sum();
        self.value(&format!("{name}_bucket"), ",le=\"+Inf\"", total);
        self.value(&format!("{name}_sum"), "", sum);
        self.value(&format!("{name}_count"), "", total);
    }

    /// The page.
    pub(crate) fn finish(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_counts_in_the_bucket_whose_bound_it_does_not_exceed() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        for value in [0.5, 1.0, 1.5, 3.0] {
            histogram.observe(value);
        }
        assert_eq!(histogram.snapshot(), (&[1.0, 2.0][..], vec![2, 1, 1], 6.0));
        assert_eq!(one_two_five(60), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
    }

    #[test]
    fn the_text_format_accumulates_buckets_and_escapes_labels() {
        let mut page = Exposition::new("a\"b\\\n");
        page.histogram("x", "X.", &[1.0, 2.0], &[2, 1, 1], 6.0);
        let labels = r#"engine="0",model_name="a\"b\\\n""#;
        let expected = format!(
            "# HELP vllm:x X.\n# TYPE vllm:x histogram\nvllm:x_bucket{{{labels},le=\"1.0\"}} 2\n\
             vllm:x_bucket{{{labels},le=\"2.0\"}} 3\nvllm:x_bucket{{{labels},le=\"+Inf\"}} 4\n\
             vllm:x_sum{{{labels}}} 6\nvllm:x_count{{{labels}}} 4\n"
        );
        assert_eq!(page.finish(), expected);
    }
}
