//! `spark-engine bench throughput`: many requests at once, and how many tokens a second come out. Flags and JSON as `vllm bench
//! throughput`.

use std::{io::Write, path::PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{
    drive::{Prompts, Run, drive},
    model::{BenchModel, Load},
    save,
    stats::{experts_line, summary_ms},
};

/// Measure how many tokens a second many requests get together.
#[derive(Args)]
#[command(args_override_self = true)]
pub(super) struct ThroughputArgs {
    #[command(flatten)]
    pub(super) model: BenchModel,
    /// Tokens of each prompt.
    #[arg(long, visible_alias = "random-input-len", default_value_t = 128, value_name = "TOKENS")]
    input_len: usize,
    /// Tokens to generate for each.
    #[arg(long, visible_alias = "random-output-len", default_value_t = 128, value_name = "TOKENS")]
    output_len: usize,
    /// Requests.
    #[arg(long, default_value_t = 256, value_name = "N")]
    num_prompts: usize,
    /// Most requests at once; by default as many as the engine runs side by side.
    #[arg(long, value_name = "N")]
    max_concurrency: Option<usize>,
    /// Write the results as JSON.
    #[arg(long, value_name = "FILE")]
    pub(super) output_json: Option<PathBuf>,
}

pub(super) fn run(args: ThroughputArgs) -> anyhow::Result<()> {
    let ThroughputArgs { model, input_len, output_len, num_prompts, max_concurrency, output_json } = args;
    anyhow::ensure!(num_prompts > 0, "--num-prompts must be at least 1");
    anyhow::ensure!(input_len > 0 && output_len > 0, "--input-len and --output-len must be at least 1");
    let seed = model.seed;
    let num_seqs = max_concurrency.unwrap_or(0).min(num_prompts);
    let load = Load { num_seqs, num_tokens: input_len + output_len };
    let Some(bench) = model.start(load)? else { return Ok(()) };
    let engine = &bench.started.engine;
    let mut prompts = Prompts::new(&spark_engine::api::Engine::info(engine).limits, seed);
    // The first request of a process meets cold caches.
    drive(engine, prompts.take(1, input_len), output_len.min(8), 1)?;
    bench.clear_profile();
    let concurrency = max_concurrency.unwrap_or(num_prompts);
    let run = drive(engine, prompts.take(num_prompts, input_len), output_len, concurrency)?;
    let mut report = results(&run);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", bench.heading())?;
    writeln!(
        out,
        "Throughput: {:.2} requests/s, {:.2} total tokens/s, {:.2} output tokens/s",
        report["requests_per_second"].as_f64().unwrap_or(0.0),
        report["tokens_per_second"].as_f64().unwrap_or(0.0),
        report["output_throughput"].as_f64().unwrap_or(0.0)
    )?;
    writeln!(out, "Total num prompt tokens:  {}", run.num_prompt_tokens())?;
    writeln!(out, "Total num output tokens:  {}", run.num_output_tokens())?;
    write!(out, "{}", bench.profile())?;
    let experts =
        bench.distinct_experts(&mut prompts, concurrency.min(num_prompts), [input_len, output_len])?;
    write!(out, "{}", experts_line(experts))?;
    report["distinct_experts"] = experts.into();
    report["max_concurrency"] = max_concurrency.into();
    report["engine"] = bench.facts();
    save(output_json.as_deref(), &report)
}

/// The fields of vLLM first, then what else is known.
fn results(run: &Run) -> Value {
    let elapsed = run.elapsed.as_secs_f64().max(1e-9);
    let total = run.num_prompt_tokens() + run.num_output_tokens();
    let ttfts: Vec<f64> = run.answers.iter().map(|answer| answer.ttft()).collect();
    let tpots: Vec<f64> = run.answers.iter().filter_map(|answer| answer.tpot()).collect();
    let mut report = json!({
        "elapsed_time": elapsed,
        "num_requests": run.answers.len(),
        "total_num_tokens": total,
        "requests_per_second": run.answers.len() as f64 / elapsed,
        "tokens_per_second": total as f64 / elapsed,
        "total_input_tokens": run.num_prompt_tokens(),
        "total_output_tokens": run.num_output_tokens(),
        "output_throughput": run.output_speed(),
        "num_steps": run.num_steps,
    });
    if let Some(report) = report.as_object_mut() {
        report.extend(summary_ms("ttft", &ttfts));
        report.extend(summary_ms("tpot", &tpots));
    }
    report
}
