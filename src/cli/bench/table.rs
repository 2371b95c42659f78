//! `spark-engine bench table`: prefill and decode at several sizes in one process, as a table like llama-bench's.

use std::{fmt, io::Write, path::PathBuf, str::FromStr};

use clap::Args;
use serde_json::{Value, json};
use spark_engine::api::Engine;

use super::{
    drive::{Answer, Prompts, Run, drive},
    model::{Bench, BenchModel, Load},
    save,
    stats::{deviation, mean, percentile, summary_ms},
};

/// Measure prefill and decode at several sizes; the model is loaded once.
#[derive(Args)]
#[command(
    args_override_self = true,
    after_help = "Example:\n  \
    spark-engine bench table --config qwen3-30b-a3b --pp 8192,16x2048 --tg 256 --batch 1,4,16,64,128 --depth 128"
)]
pub(super) struct TableArgs {
    #[command(flatten)]
    pub(super) model: BenchModel,
    /// Prefills to measure: tokens of one prompt, or NxTOKENS for N prompts at once.
    #[arg(long, value_delimiter = ',', default_value = "512,8192", value_name = "[Nx]TOKENS,...")]
    pp: Vec<Prefill>,
    /// Numbers of tokens to generate.
    #[arg(long, value_delimiter = ',', default_value = "256", value_name = "TOKENS,...")]
    tg: Vec<usize>,
    /// Requests at once, for each of --tg.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,128", value_name = "N,...")]
    batch: Vec<usize>,
    /// Tokens that are in the context before those of --tg: the lengths of the prompts.
    #[arg(long, value_delimiter = ',', default_value = "128", value_name = "TOKENS,...")]
    depth: Vec<usize>,
    /// Measurements of each row, after one that does not count.
    #[arg(short, long, default_value_t = 3, value_name = "N")]
    repetitions: usize,
    /// Write the results as JSON.
    #[arg(long, value_name = "FILE")]
    pub(super) output_json: Option<PathBuf>,
}

/// Prompts that are computed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Prefill {
    count: usize,
    len: usize,
}

impl FromStr for Prefill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (count, len) = text.split_once('x').unwrap_or(("1", text));
        let number = |part: &str| part.trim().parse().ok().filter(|&number: &usize| number > 0);
        match (number(count), number(len)) {
            (Some(count), Some(len)) => Ok(Self { count, len }),
            _ => Err(format!("`{text}` is neither TOKENS nor NxTOKENS, such as 8192 or 16x2048")),
        }
    }
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Test {
    Prefill(Prefill),
    Decode { batch: usize, depth: usize, len: usize },
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill(prefill) => write!(f, "pp{}", prefill.len),
            Self::Decode { depth, len, .. } => write!(f, "tg{len} @ d{depth}"),
        }
    }
}

impl Test {
    fn batch(self) -> usize {
        match self {
            Self::Prefill(prefill) => prefill.count,
            Self::Decode { batch, .. } => batch,
        }
    }

    /// Tokens of a prompt, tokens to generate.
    fn lens(self) -> (usize, usize) {
        match self {
            Self::Prefill(prefill) => (prefill.len, 1),
            Self::Decode { depth, len, .. } => (depth, len),
        }
    }
}

impl TableArgs {
    fn tests(&self) -> anyhow::Result<Vec<Test>> {
        let lists = [("--tg", &self.tg), ("--batch", &self.batch), ("--depth", &self.depth)];
        if let Some((flag, _)) = lists.iter().find(|(_, list)| list.contains(&0)) {
            anyhow::bail!("{flag}: 0 is no size");
        }
        anyhow::ensure!(self.repetitions > 0, "--repetitions must be at least 1");
        let mut tests: Vec<Test> = self.pp.iter().map(|&prefill| Test::Prefill(prefill)).collect();
        for &depth in &self.depth {
            for &len in &self.tg {
                tests.extend(self.batch.iter().map(|&batch| Test::Decode { batch, depth, len }));
            }
        }
        Ok(tests)
    }
}

pub(super) fn run(args: TableArgs) -> anyhow::Result<()> {
    let tests = args.tests()?;
    let num_seqs = tests.iter().map(|test| test.batch()).max().unwrap_or(1);
    let longest = tests.iter().map(|test| test.lens()).map(|(prompt, output)| prompt + output).max();
    let seed = args.model.seed;
    let load = Load { num_seqs, num_tokens: longest.unwrap_or(2) };
    let Some(bench) = args.model.start(load)? else { return Ok(()) };
    let mut prompts = Prompts::new(&bench.started.engine.info().limits, seed);
    // Not locked: rows are shown as they come.
    let mut out = std::io::stdout();
    writeln!(out, "{}\n", bench.heading())?;
    writeln!(
        out,
        "| test           | batch |                 t/s |  decode t/s | TTFT p50 ms | TTFT p99 ms | TPOT p50 ms | TPOT p99 ms | experts |"
    )?;
    writeln!(
        out,
        "| -------------- | ----: | ------------------: | ----------: | ----------: | ----------: | ----------: | ----------: | ------: |"
    )?;
    let mut rows = Vec::new();
    for test in tests {
        let runs = measure(&bench, &mut prompts, test, args.repetitions)?;
        let profile = bench.profile();
        let (len, batch) = (test.lens(), test.batch());
        let experts = bench.distinct_experts(&mut prompts, batch, [len.0, len.1])?;
        writeln!(out, "{}", row(test, &runs, experts))?;
        write!(out, "{profile}")?;
        let mut row = as_json(test, &runs);
        row["distinct_experts"] = experts.into();
        rows.push(row);
    }
    save(args.output_json.as_deref(), &json!({"engine": bench.facts(), "tests": rows}))
}

fn measure(bench: &Bench, prompts: &mut Prompts, test: Test, repetitions: usize) -> anyhow::Result<Vec<Run>> {
    let (prompt_len, output_len) = test.lens();
    let mut runs = Vec::with_capacity(repetitions);
    for repetition in 0..=repetitions {
        let prompts = prompts.take(test.batch(), prompt_len);
        let run = drive(&bench.started.engine, prompts, output_len, test.batch())?;
        if repetition > 0 {
            runs.push(run);
        } else {
            bench.clear_profile();
        }
    }
    Ok(runs)
}

/// Tokens a second that the test is about, of each run: prompt tokens of a prefill; of a decode the generated tokens over
/// the whole time, prompts included.
fn speeds(test: Test, runs: &[Run]) -> Vec<f64> {
    let speed = |run: &Run| match test {
        Test::Prefill(_) => run.prefill_speed(),
        Test::Decode { .. } => run.output_speed(),
    };
    runs.iter().map(speed).collect()
}

fn decode_speeds(runs: &[Run]) -> Vec<f64> {
    runs.iter().filter_map(Run::decode_speed).collect()
}

/// Seconds to the first token and seconds a token, of all requests.
fn times(runs: &[Run]) -> (Vec<f64>, Vec<f64>) {
    let answers = || runs.iter().flat_map(|run| &run.answers);
    (answers().map(Answer::ttft).collect(), answers().filter_map(Answer::tpot).collect())
}

fn row(test: Test, runs: &[Run], experts: Option<f64>) -> String {
    let speeds = speeds(test, runs);
    let speed = format!("{:.2} ± {:.2}", mean(&speeds), deviation(&speeds));
    let decode = match decode_speeds(runs) {
        speeds if speeds.is_empty() => String::new(),
        speeds => format!("{:.2}", mean(&speeds)),
    };
    let (ttfts, tpots) = times(runs);
    let milliseconds = |values: &[f64], percent| match values {
        [] => String::new(),
        values => format!("{:.3}", 1e3 * percentile(values, percent)),
    };
    format!(
        "| {:<14} | {:>5} | {speed:>19} | {decode:>11} | {:>11} | {:>11} | {:>11} | {:>11} | {:>7} |",
        test.to_string(),
        test.batch(),
        milliseconds(&ttfts, 50.0),
        milliseconds(&ttfts, 99.0),
        milliseconds(&tpots, 50.0),
        milliseconds(&tpots, 99.0),
        experts.map_or_else(String::new, |mean| format!("{mean:.1}")),
    )
}

/// The fields of llama-bench, with those of several requests at once beside them.
fn as_json(test: Test, runs: &[Run]) -> Value {
    let speeds = speeds(test, runs);
    let nanos: Vec<f64> = runs.iter().map(|run| 1e9 * run.elapsed.as_secs_f64()).collect();
    let (ttfts, tpots) = times(runs);
    let (n_prompt, n_gen, n_depth) = match test {
        Test::Prefill(prefill) => (prefill.len, 0, 0),
        Test::Decode { depth, len, .. } => (0, len, depth),
    };
    let mut row = json!({
        "test": test.to_string(),
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": n_depth,
        "n_batch": test.batch(),
        "avg_ns": mean(&nanos),
        "stddev_ns": deviation(&nanos),
        "avg_ts": mean(&speeds),
        "stddev_ts": deviation(&speeds),
        "samples_ns": nanos,
        "samples_ts": speeds,
        "decode_ts": mean(&decode_speeds(runs)),
        "num_steps": mean(&runs.iter().map(|run| run.num_steps as f64).collect::<Vec<_>>()),
    });
    if let Some(row) = row.as_object_mut() {
        row.extend(summary_ms("ttft", &ttfts));
        row.extend(summary_ms("tpot", &tpots));
    }
    row
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: TableArgs,
    }

    #[test]
    fn prefills_are_one_prompt_or_several() {
        assert_eq!("8192".parse(), Ok(Prefill { count: 1, len: 8192 }));
        assert_eq!("16x2048".parse(), Ok(Prefill { count: 16, len: 2048 }));
        for wrong in ["", "x", "0", "3x0", "x7", "many"] {
            assert!(wrong.parse::<Prefill>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_size_gets_its_row() {
        let line = "x --config c --pp 64,2x32 --tg 8 --batch 1,4 --depth 16,128";
        let tests = Line::try_parse_from(line.split(' ')).unwrap().args.tests().unwrap();
        let names: Vec<String> = tests.iter().map(|test| format!("{}x {test}", test.batch())).collect();
        assert_eq!(
            names,
            ["1x pp64", "2x pp32", "1x tg8 @ d16", "4x tg8 @ d16", "1x tg8 @ d128", "4x tg8 @ d128"]
        );
        let zero = Line::try_parse_from("x --config c --batch 0".split(' ')).unwrap().args.tests();
        assert!(zero.unwrap_err().to_string().contains("--batch"));
    }
}
