//! What a run says: the numbers of `vllm bench serve`, by its names, as JSON and as its table.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::{answer::Answer, goals::Goals};
use crate::cli::bench::stats::{mean, percentile};

/// A metric that is reported over all requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Metric {
    Ttft,
    Tpot,
    Itl,
    E2el,
}

impl Metric {
    /// Its name in fields.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Ttft => "Time to First Token",
            Self::Tpot => "Time per Output Token (excl. 1st token)",
            Self::Itl => "Inter-token Latency",
            Self::E2el => "End-to-end Latency",
        }
    }

    /// Values of one request, in milliseconds.
    pub(super) fn of(self, answer: &Answer) -> Vec<f64> {
        let seconds = match self {
            Self::Ttft => vec![answer.ttft],
            Self::Tpot => answer.tpot().into_iter().collect(),
            Self::Itl => answer.itl.clone(),
            Self::E2el => vec![answer.latency],
        };
        seconds.into_iter().map(|value| 1e3 * value).collect()
    }
}

/// What a run was asked to do, as far as a report repeats it.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) backend: &'static str,
    pub(super) label: Option<String>,
    pub(super) model: String,
    pub(super) tokenizer: String,
    pub(super) request_rate: f64,
    pub(super) burstiness: f64,
    pub(super) max_concurrency: Option<usize>,
    pub(super) metrics: Vec<Metric>,
    pub(super) percentiles: Vec<f64>,
    pub(super) goals: Goals,
    /// `YYYYMMDD-HHMMSS`, UTC.
    pub(super) date: String,
}

/// The results of a run: its fields, and those of each request.
#[derive(Debug)]
pub(super) struct Report {
    plan: Plan,
    /// Everything but the fields of single requests.
    pub(super) fields: Map<String, Value>,
    /// `input_lens`, `ttfts` and so on: one entry a request.
    pub(super) details: Map<String, Value>,
}

impl Report {
    /// Of `answers`, which took `duration` seconds together.
    pub(super) fn new(plan: Plan, answers: &[Answer], duration: f64) -> Self {
        let good: Vec<&Answer> = answers.iter().filter(|answer| answer.is_success()).collect();
        let per_second = |count: usize| count as f64 / duration.max(1e-9);
        let total_input: usize = good.iter().map(|answer| answer.input_len).sum();
        let total_output: usize = good.iter().map(|answer| answer.output_len).sum();
        let goodput = (!plan.goals.is_empty())
            .then(|| per_second(good.iter().filter(|answer| plan.goals.are_met(answer)).count()));
        let server_input: usize = good.iter().filter_map(|answer| answer.server_input_len).sum();
        let (peak_tokens, peak_requests) = peaks(&good);
        let mut fields = object(json!({
            "date": plan.date,
            "endpoint_type": plan.backend,
            "backend": plan.backend,
            "label": plan.label,
            "model_id": plan.model,
            "tokenizer_id": plan.tokenizer,
            "num_prompts": answers.len(),
            "request_rate": if plan.request_rate.is_finite() { json!(plan.request_rate) } else { json!("inf") },
            "burstiness": if plan.burstiness.is_finite() { json!(plan.burstiness) } else { json!("inf") },
            "max_concurrency": plan.max_concurrency,
            "duration": duration,
            "completed": good.len(),
            "failed": answers.len() - good.len(),
            "total_input_tokens": total_input,
            "total_output_tokens": total_output,
            "request_throughput": per_second(good.len()),
            "request_goodput": goodput,
            "output_throughput": per_second(total_output),
            "total_token_throughput": per_second(total_input + total_output),
            "max_output_tokens_per_s": peak_tokens,
            "max_concurrent_requests": peak_requests,
            "server_input_tokens": server_input,
        }));
        for metric in &plan.metrics {
            let values: Vec<f64> = good.iter().flat_map(|answer| metric.of(answer)).collect();
            fields.extend(summary(metric.name(), &values, &plan.percentiles));
        }
        Self { plan, fields, details: details(answers) }
    }

    /// Fields of all, with those of each request if `is_detailed`.
    pub(super) fn json(&self, is_detailed: bool) -> Value {
        let mut all = self.fields.clone();
        if is_detailed {
            all.extend(self.details.clone());
        }
        Value::Object(all)
    }

    /// A number of the report.
    pub(super) fn number(&self, name: &str) -> f64 {
        self.fields.get(name).and_then(Value::as_f64).unwrap_or(0.0)
    }

    /// The table of `vllm bench serve`: 50 columns.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        let mut row = |label: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{label:<40} {value:<10}");
        };
        let count = |name: &str| format!("{:.0}", self.number(name));
        let decimal = |name: &str| format!("{:.2}", self.number(name));
        row("Successful requests:", count("completed"));
        row("Failed requests:", count("failed"));
        if let Some(limit) = self.plan.max_concurrency {
            row("Maximum request concurrency:", limit.to_string());
        }
        if self.plan.request_rate.is_finite() {
            row("Request rate configured (RPS):", format!("{:.2}", self.plan.request_rate));
        }
        row("Benchmark duration (s):", decimal("duration"));
        row("Total input tokens:", count("total_input_tokens"));
        row("Total generated tokens:", count("total_output_tokens"));
        row("Request throughput (req/s):", decimal("request_throughput"));
        if !self.plan.goals.is_empty() {
            row("Request goodput (req/s):", decimal("request_goodput"));
        }
        row("Output token throughput (tok/s):", decimal("output_throughput"));
        row("Peak output token throughput (tok/s):", decimal("max_output_tokens_per_s"));
        row("Peak concurrent requests:", decimal("max_concurrent_requests"));
        row("Total token throughput (tok/s):", decimal("total_token_throughput"));
        for metric in &self.plan.metrics {
            let _ = writeln!(text, "{:-^50}", metric.title());
            for (kind, label) in self.kinds() {
                let name = metric.name();
                let value = self.number(&format!("{kind}_{name}_ms"));
                let label = format!("{label} {} (ms):", name.to_uppercase());
                let _ = writeln!(text, "{label:<40} {:<10}", format!("{value:.2}"));
            }
        }
        format!("{:=^50}\n{text}{}\n", " Serving Benchmark Result ", "=".repeat(50))
    }

    /// Prefixes of the fields that the table shows, with their words.
    fn kinds(&self) -> Vec<(String, String)> {
        let mut kinds = vec![("mean".into(), "Mean".into()), ("median".into(), "Median".into())];
        for percent in &self.plan.percentiles {
            kinds.push((format!("p{percent}"), format!("P{percent}")));
        }
        kinds
    }
}

/// `{mean,median,std,pXX}_NAME_ms`. The deviation is that of all values, as numpy's.
fn summary(name: &str, values: &[f64], percents: &[f64]) -> Map<String, Value> {
    let mean_value = mean(values);
    let squares: Vec<f64> = values.iter().map(|value| (value - mean_value).powi(2)).collect();
    let mut fields = Map::new();
    fields.insert(format!("mean_{name}_ms"), json!(mean_value));
    fields.insert(format!("median_{name}_ms"), json!(percentile(values, 50.0)));
    fields.insert(format!("std_{name}_ms"), json!(mean(&squares).sqrt()));
    for percent in percents {
        fields.insert(format!("p{percent}_{name}_ms"), json!(percentile(values, *percent)));
    }
    fields
}

/// Most tokens that arrived within one second of the run, and most requests that were under way at one time.
fn peaks(answers: &[&Answer]) -> (f64, usize) {
    let second = |time: f64| time.max(0.0) as usize;
    let last = answers.iter().map(|answer| second(answer.start + answer.latency)).max().unwrap_or(0);
    let mut tokens = vec![0.0_f64; last + 1];
    let mut changes = Vec::new();
    for answer in answers {
        let mut at = answer.start + answer.ttft;
        // Chunks may hold several tokens: each is as many as the average of its answer.
        let share = answer.output_len as f64 / (answer.itl.len() + 1) as f64;
        tokens[second(at).min(last)] += share;
        for gap in &answer.itl {
            at += gap;
            tokens[second(at).min(last)] += share;
        }
        changes.extend([(answer.start, 1), (answer.start + answer.latency, -1)]);
    }
    // At equal times an end comes before a start.
    changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let under_way = changes.iter().scan(0_isize, |count, (_, change)| {
        *count += change;
        Some(*count)
    });
    (tokens.into_iter().fold(0.0, f64::max), under_way.max().unwrap_or(0).unsigned_abs())
}

fn details(answers: &[Answer]) -> Map<String, Value> {
    let list = |value: &dyn Fn(&Answer) -> Value| Value::Array(answers.iter().map(value).collect());
    object(json!({
        "input_lens": list(&|answer| json!(answer.input_len)),
        "output_lens": list(&|answer| json!(answer.output_len)),
        "start_times": list(&|answer| json!(answer.start)),
        "latencies": list(&|answer| json!(answer.latency)),
        "ttfts": list(&|answer| json!(answer.ttft)),
        "itls": list(&|answer| json!(answer.itl)),
        "generated_texts": list(&|answer| json!(answer.text)),
        "errors": list(&|answer| json!(answer.error)),
    }))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(start: f64, ttft: f64, itl: &[f64]) -> Answer {
        let latency = ttft + itl.iter().sum::<f64>();
        let output_len = itl.len() + 1;
        Answer { start, ttft, itl: itl.to_vec(), latency, input_len: 10, output_len, ..Answer::default() }
    }

    fn plan() -> Plan {
        Plan {
            backend: "openai",
            label: None,
            model: "m".into(),
            tokenizer: "t".into(),
            request_rate: f64::INFINITY,
            burstiness: 1.0,
            max_concurrency: Some(2),
            metrics: vec![Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el],
            percentiles: vec![50.0, 99.9],
            goals: "ttft:150".parse().unwrap(),
            date: "20261121-120000".into(),
        }
    }

    #[test]
    fn numbers_are_those_of_the_answers() {
        let failed = Answer { error: "HTTP 500: x".into(), input_len: 99, ..Answer::default() };
        let answers = [answer(0.0, 0.1, &[0.2, 0.4]), answer(0.5, 0.3, &[0.1]), failed];
        let report = Report::new(plan(), &answers, 2.0);
        let expected = [
            ("completed", 2.0),
            ("failed", 1.0),
            ("total_input_tokens", 20.0),
            ("total_output_tokens", 5.0),
            ("request_throughput", 1.0),
            ("request_goodput", 0.5),
            ("output_throughput", 2.5),
            ("total_token_throughput", 12.5),
            // Both first tokens, and the second ones of both, come in the first second.
            ("max_output_tokens_per_s", 5.0),
            ("max_concurrent_requests", 2.0),
            ("mean_ttft_ms", 200.0),
            ("std_ttft_ms", 100.0),
            ("mean_tpot_ms", 200.0),
            ("median_itl_ms", 200.0),
            ("p50_e2el_ms", 550.0),
        ];
        for (name, value) in expected {
            assert!((report.number(name) - value).abs() < 1e-6, "{name}: {} {value}", report.number(name));
        }
        assert_eq!(report.fields["request_rate"], "inf");
        assert!(
            report.fields.contains_key("p99.9_ttft_ms") && !report.json(false).to_string().contains("itls")
        );
        assert_eq!(report.json(true)["errors"], json!(["", "", "HTTP 500: x"]));
    }

    #[test]
    fn the_table_has_vllms_lines() {
        let table = Report::new(plan(), &[answer(0.0, 0.1, &[0.2])], 2.0).table();
        let lines: Vec<&str> = table.lines().map(str::trim_end).collect();
        assert_eq!(lines[0], "============ Serving Benchmark Result ============");
        assert_eq!(lines[1], "Successful requests:                     1");
        assert!(lines.contains(&"Request goodput (req/s):                 0.50"), "{table}");
        assert!(lines.contains(&"---------------Time to First Token----------------"), "{table}");
        assert!(lines.contains(&"P99.9 TTFT (ms):                         100.00"), "{table}");
        assert_eq!(lines.last(), Some(&"=".repeat(50).as_str()));
    }

    #[test]
    fn nothing_that_succeeded_is_no_division() {
        let failed = Answer { error: "x".into(), ..Answer::default() };
        let report = Report::new(plan(), &[failed], 0.0);
        assert_eq!((report.number("failed"), report.number("mean_ttft_ms")), (1.0, 0.0));
        assert!(report.table().contains("Failed requests:"));
    }
}
