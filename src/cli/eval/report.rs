//! Results of a run: counts per task, intervals, the table and the JSON object. Runs nothing.

use std::{io::Write, time::Duration};

use anyhow::Context;
use serde_json::{Map, Value, json};

/// Name of the only suite.
pub(crate) const SUITE: &str = "tiny-vl";
/// Two-sided 95 % of the normal distribution.
const Z95: f64 = 1.959_964;

/// Counts of one task.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TaskResult {
    pub(crate) name: String,
    pub(crate) samples: u64,
    pub(crate) right: u64,
    /// Samples without an answer; none of them is right.
    pub(crate) errors: u64,
}

/// Counts of a run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Report {
    pub(crate) model: String,
    /// In the order of the suite.
    pub(crate) tasks: Vec<TaskResult>,
    /// Index of the first sample of each task.
    pub(crate) offset: u64,
    pub(crate) elapsed: Duration,
    pub(crate) prompt_tokens: u64,
    pub(crate) output_tokens: u64,
    /// Whether all samples were asked.
    pub(crate) is_complete: bool,
}

impl TaskResult {
    /// Share of right answers; 0 without samples.
    pub(crate) fn accuracy(&self) -> f64 {
        if self.samples == 0 { 0.0 } else { self.right as f64 / self.samples as f64 }
    }

    /// 95 % interval of the accuracy.
    pub(crate) fn interval(&self) -> (f64, f64) {
        wilson(self.right, self.samples)
    }
}

/// Wilson's 95 % score interval of a share, as fractions. Without samples nothing is known: 0 to 1.
pub(crate) fn wilson(right: u64, samples: u64) -> (f64, f64) {
    if samples == 0 {
        return (0.0, 1.0);
    }
    let n = samples as f64;
    let share = right as f64 / n;
    let z2 = Z95 * Z95;
    let center = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    // At the ends the bound is exact; rounding must not move it past them.
    let low = if right == 0 { 0.0 } else { (center - half).max(0.0) };
    let high = if right == samples { 1.0 } else { (center + half).min(1.0) };
    (low, high)
}

impl Report {
    /// Mean of the tasks' accuracies, each with the same weight.
    pub(crate) fn mean(&self) -> f64 {
        let sum: f64 = self.tasks.iter().map(TaskResult::accuracy).sum();
        if self.tasks.is_empty() { 0.0 } else { sum / self.tasks.len() as f64 }
    }

    fn total(&self, count: impl Fn(&TaskResult) -> u64) -> u64 {
        self.tasks.iter().map(count).sum()
    }

    fn tokens_per_second(&self) -> f64 {
        self.output_tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// The table for people.
    pub(crate) fn write_table(&self, out: &mut impl Write) -> std::io::Result<()> {
        let width = self.tasks.iter().map(|task| task.name.len()).max().unwrap_or(0).max(4);
        writeln!(
            out,
            "{:<width$} {:>8} {:>8} {:>11}   95 % interval",
            "task", "samples", "right", "accuracy"
        )?;
        for task in &self.tasks {
            let (low, high) = task.interval();
            write!(out, "{:<width$} {:>8} {:>8} ", task.name, task.samples, task.right)?;
            write!(out, "{:>9.1} %   {:.1} to {:.1} %", task.accuracy() * 1e2, low * 1e2, high * 1e2)?;
            writeln!(
                out,
                "{}",
                if task.errors > 0 { format!("   ({} errors)", task.errors) } else { String::new() }
            )?;
        }
        let (samples, right) = (self.total(|task| task.samples), self.total(|task| task.right));
        writeln!(out, "{:<width$} {samples:>8} {right:>8} {:>9.1} %", "mean", self.mean() * 1e2)?;
        writeln!(
            out,
            "{}: {:.1} s, {} prompt tokens, {} output tokens, {:.1} output tok/s{}",
            self.model,
            self.elapsed.as_secs_f64(),
            self.prompt_tokens,
            self.output_tokens,
            self.tokens_per_second(),
            if self.is_complete { "" } else { " (interrupted)" }
        )
    }

    /// The object for programs. Shares are fractions from 0 to 1.
    pub(crate) fn to_json(&self) -> Value {
        let tasks: Map<String, Value> =
            self.tasks.iter().map(|task| (task.name.clone(), task_json(task))).collect();
        json!({
            "suite": SUITE,
            "model": self.model,
            "mean": self.mean(),
            "tasks": tasks,
            "samples": self.total(|task| task.samples),
            "right": self.total(|task| task.right),
            "errors": self.total(|task| task.errors),
            "offset": self.offset,
            "seconds": self.elapsed.as_secs_f64(),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "tokens_per_second": self.tokens_per_second(),
            "complete": self.is_complete,
        })
    }

    /// Reads what [`Report::to_json`] wrote: the last line of `text` that is not empty.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let line = text.lines().rfind(|line| !line.trim().is_empty()).context("it is empty")?;
        let value: Value = serde_json::from_str(line).context("its last line is not JSON")?;
        anyhow::ensure!(
            value["suite"] == SUITE,
            "its last line is no result of `eval --suite {SUITE} --json`"
        );
        let count = |value: &Value, name: &str| {
            value[name].as_u64().with_context(|| format!("{name} is {}, which is no count", value[name]))
        };
        let tasks = value["tasks"].as_object().context("tasks is no object")?;
        let task = |(name, task): (&String, &Value)| -> anyhow::Result<TaskResult> {
            let [samples, right, errors] = ["samples", "right", "errors"].map(|key| count(task, key));
            let result = TaskResult { name: name.clone(), samples: samples?, right: right?, errors: errors? };
            anyhow::ensure!(result.right <= result.samples, "{name}: more right answers than samples");
            Ok(result)
        };
        let seconds = value["seconds"].as_f64().unwrap_or_default();
        Ok(Self {
            model: value["model"].as_str().unwrap_or_default().to_owned(),
            tasks: tasks.iter().map(task).collect::<anyhow::Result<_>>()?,
            offset: count(&value, "offset")?,
            elapsed: Duration::try_from_secs_f64(seconds).context("seconds")?,
            prompt_tokens: count(&value, "prompt_tokens")?,
            output_tokens: count(&value, "output_tokens")?,
            is_complete: value["complete"].as_bool().context("complete is no boolean")?,
        })
    }
}

fn task_json(task: &TaskResult) -> Value {
    let (low, high) = task.interval();
    json!({"accuracy": task.accuracy(), "low": low, "high": high, "samples": task.samples, "right": task.right,
           "errors": task.errors})
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against values computed by hand from the formula and known from textbooks.
    #[test]
    fn wilson_intervals() {
        for (right, samples, low, high) in [
            (0, 10, 0.0, 0.277_5),
            (10, 10, 0.722_5, 1.0),
            (5, 10, 0.236_6, 0.763_4),
            (50, 100, 0.403_8, 0.596_2),
            (95, 100, 0.888_2, 0.978_5),
            (1, 1, 0.206_5, 1.0),
            (0, 0, 0.0, 1.0),
        ] {
            let got = wilson(right, samples);
            assert!((got.0 - low).abs() < 1e-4 && (got.1 - high).abs() < 1e-4, "{right}/{samples}: {got:?}");
        }
        for samples in 1..200 {
            for right in 0..=samples {
                let (low, high) = wilson(right, samples);
                let share = right as f64 / samples as f64;
                assert!(0.0 <= low && low <= share && share <= high && high <= 1.0, "{right}/{samples}");
            }
        }
    }

    fn report() -> Report {
        let task =
            |name: &str, samples, right, errors| TaskResult { name: name.into(), samples, right, errors };
        Report {
            model: "m".into(),
            tasks: vec![task("add", 100, 95, 0), task("count_letters", 10, 5, 2)],
            offset: 3,
            elapsed: Duration::from_millis(2500),
            prompt_tokens: 1000,
            output_tokens: 500,
            is_complete: true,
        }
    }

    #[test]
    fn the_mean_weighs_tasks_equally() {
        let json = report().to_json();
        assert!((json["mean"].as_f64().unwrap() - 0.725).abs() < 1e-12);
        assert_eq!(
            (&json["samples"], &json["right"], &json["errors"]),
            (&json!(110), &json!(100), &json!(2))
        );
        assert_eq!(json["tokens_per_second"], 200.0);
        let mut text = Vec::new();
        report().write_table(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("95.0 %   88.8 to 97.8 %") && text.contains("(2 errors)"), "{text}");
        assert!(text.contains("72.5 %") && text.contains("200.0 output tok/s"), "{text}");
    }

    #[test]
    fn a_report_survives_json() {
        let text = format!("a table\n{}\n\n", report().to_json());
        assert_eq!(Report::parse(&text).unwrap(), report());
        for (text, problem) in [
            ("", "empty"),
            ("table", "not JSON"),
            ("{}", "no result"),
            (r#"{"suite": "tiny-vl"}"#, "tasks"),
            (
                r#"{"suite": "tiny-vl", "tasks": {"a": {"samples": 1, "right": 2, "errors": 0}}}"#,
                "more right",
            ),
        ] {
            let message = format!("{:#}", Report::parse(text).unwrap_err());
            assert!(message.contains(problem), "{text}: {message}");
        }
    }
}
