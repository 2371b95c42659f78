//! `spark-engine bench`: speed of the engine on random prompts, of a server, and of the kernels alone.

mod drive;
mod kernels;
mod latency;
mod model;
mod output;
mod serve;
mod stats;
mod table;
mod throughput;
mod vision;

use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::ranks::RankArgs;

const OUTPUT_JSON: &str = "--output-json";

/// Measure speed.
#[derive(Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Subcommand)]
enum BenchCommand {
    /// How long one batch of requests takes.
    Latency(Box<latency::LatencyArgs>),
    /// How many tokens a second many requests get together.
    Throughput(Box<throughput::ThroughputArgs>),
    /// Prefill and decode at several sizes, with the model loaded once.
    Table(Box<table::TableArgs>),
    /// Load on a server, ours or another, seen from its client.
    Serve(Box<serve::ServeBenchArgs>),
    /// Pictures a second through the vision encoder alone.
    Vision(Box<vision::VisionArgs>),
    /// Every kernel alone: time, bytes moved a second, share of what a copy reaches. Needs a GPU.
    Kernels(kernels::KernelsArgs),
}

impl BenchArgs {
    /// Of a measurement that may have several ranks.
    pub(crate) fn ranks(&self) -> Option<&RankArgs> {
        match &self.command {
            BenchCommand::Latency(args) => Some(&args.model.ranks),
            BenchCommand::Throughput(args) => Some(&args.model.ranks),
            BenchCommand::Table(args) => Some(&args.model.ranks),
            BenchCommand::Vision(args) => Some(args.ranks()),
            BenchCommand::Serve(_) | BenchCommand::Kernels(_) => None,
        }
    }

    /// The file of `--output-json`.
    fn output_json(&self) -> Option<&Path> {
        match &self.command {
            BenchCommand::Latency(args) => args.output_json.as_deref(),
            BenchCommand::Throughput(args) => args.output_json.as_deref(),
            BenchCommand::Table(args) => args.output_json.as_deref(),
            BenchCommand::Serve(args) => args.output_json(),
            BenchCommand::Vision(args) => args.output_json.as_deref(),
            BenchCommand::Kernels(args) => args.output_json.as_deref(),
        }
    }
}

pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    // Results are rank 0's to write.
    let follows = args.ranks().map_or(Ok(false), RankArgs::is_follower)?;
    if let Some(path) = args.output_json().filter(|_| !follows) {
        output::check(OUTPUT_JSON, path)?;
    }
    match args.command {
        BenchCommand::Latency(args) => latency::run(*args),
        BenchCommand::Throughput(args) => throughput::run(*args),
        BenchCommand::Table(args) => table::run(*args),
        BenchCommand::Serve(args) => serve::run(&args),
        BenchCommand::Vision(args) => vision::run(*args),
        BenchCommand::Kernels(args) => kernels::run(args),
    }
}

/// Writes `results` to `path`, if there is one.
fn save(path: Option<&Path>, results: &Value) -> anyhow::Result<()> {
    path.map_or(Ok(()), |path| output::write(OUTPUT_JSON, path, results))
}
