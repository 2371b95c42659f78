//! `spark-engine bench latency`: how long one batch takes, again and again. Flags and JSON as `vllm bench latency`.

use std::{io::Write, path::PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{
    drive::{Answer, Prompts, Run, drive},
    model::{BenchModel, Load},
    save,
    stats::{experts_line, mean, percentile, percentiles, summary_ms},
};

const PERCENTS: [u32; 6] = [10, 25, 50, 75, 90, 99];

/// Measure how long one batch of requests takes.
#[derive(Args)]
#[command(args_override_self = true)]
pub(super) struct LatencyArgs {
    #[command(flatten)]
    pub(super) model: BenchModel,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    input_len: usize,
    /// Tokens to generate for each.
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    output_len: usize,
    /// Requests of a batch.
    #[arg(long, default_value_t = 8, value_name = "N")]
    batch_size: usize,
    /// Batches before the measured ones.
    #[arg(long, default_value_t = 2, value_name = "N")]
    num_iters_warmup: usize,
    /// Measured batches.
    #[arg(long, default_value_t = 10, value_name = "N")]
    num_iters: usize,
    /// Write the results as JSON.
    #[arg(long, value_name = "FILE")]
    pub(super) output_json: Option<PathBuf>,
}

pub(super) fn run(args: LatencyArgs) -> anyhow::Result<()> {
    let LatencyArgs { model, input_len, output_len, batch_size, num_iters_warmup, num_iters, output_json } =
        args;
    anyhow::ensure!(batch_size > 0 && num_iters > 0, "--batch-size and --num-iters must be at least 1");
    anyhow::ensure!(input_len > 0 && output_len > 0, "--input-len and --output-len must be at least 1");
    let seed = model.seed;
    let load = Load { num_seqs: batch_size, num_tokens: input_len + output_len };
    let Some(bench) = model.start(load)? else { return Ok(()) };
    let engine = &bench.started.engine;
    let mut prompts = Prompts::new(&spark_engine::api::Engine::info(engine).limits, seed);
    let mut runs = Vec::with_capacity(num_iters);
    for iteration in 0..num_iters_warmup + num_iters {
        if iteration == num_iters_warmup {
            bench.clear_profile();
        }
        let run = drive(engine, prompts.take(batch_size, input_len), output_len, batch_size)?;
        if iteration >= num_iters_warmup {
            runs.push(run);
        }
    }
    let mut report = results(&runs);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", bench.heading())?;
    write_text(&mut out, &report)?;
    write!(out, "{}", bench.profile())?;
    let experts = bench.distinct_experts(&mut prompts, batch_size, [input_len, output_len])?;
    write!(out, "{}", experts_line(experts))?;
    report["distinct_experts"] = experts.into();
    report["input_len"] = input_len.into();
    report["output_len"] = output_len.into();
    report["batch_size"] = batch_size.into();
    report["engine"] = bench.facts();
    save(output_json.as_deref(), &report)
}

/// The fields of vLLM first, then what else is known.
fn results(runs: &[Run]) -> Value {
    let latencies: Vec<f64> = runs.iter().map(|run| run.elapsed.as_secs_f64()).collect();
    let answers: Vec<&Answer> = runs.iter().flat_map(|run| &run.answers).collect();
    let ttfts: Vec<f64> = answers.iter().map(|answer| answer.ttft()).collect();
    let tpots: Vec<f64> = answers.iter().filter_map(|answer| answer.tpot()).collect();
    let of_runs = |speed: &dyn Fn(&Run) -> f64| mean(&runs.iter().map(speed).collect::<Vec<_>>());
    let mut report = json!({
        "avg_latency": mean(&latencies),
        "latencies": latencies,
        "percentiles": percentiles(&latencies, &PERCENTS),
        "prefill_throughput": of_runs(&|run| run.prefill_speed()),
        "decode_throughput": of_runs(&|run| run.decode_speed().unwrap_or(0.0)),
        "output_throughput": of_runs(&|run| run.output_speed()),
        "num_steps": of_runs(&|run| run.num_steps as f64),
    });
    if let Some(report) = report.as_object_mut() {
        report.extend(summary_ms("ttft", &ttfts));
        report.extend(summary_ms("tpot", &tpots));
    }
    report
}

fn write_text(out: &mut impl Write, report: &Value) -> std::io::Result<()> {
    let number = |key: &str| report[key].as_f64().unwrap_or(0.0);
    writeln!(out, "Avg latency: {} seconds", number("avg_latency"))?;
    let latencies: Vec<f64> =
        report["latencies"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    for percent in PERCENTS {
        writeln!(
            out,
            "{percent}% percentile latency: {} seconds",
            percentile(&latencies, f64::from(percent))
        )?;
    }
    writeln!(
        out,
        "Prefill {:.1} tok/s, decode {:.1} tok/s, output over all {:.1} tok/s",
        number("prefill_throughput"),
        number("decode_throughput"),
        number("output_throughput")
    )?;
    for name in ["ttft", "tpot"] {
        writeln!(
            out,
            "{}: mean {:.3} ms, median {:.3} ms, p99 {:.3} ms",
            name.to_uppercase(),
            number(&format!("mean_{name}_ms")),
            number(&format!("median_{name}_ms")),
            number(&format!("p99_{name}_ms"))
        )?;
    }
    Ok(())
}
