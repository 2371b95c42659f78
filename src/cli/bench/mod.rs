//! `spark-engine bench`: speed of the engine on random prompts, of a server, and of the kernels alone.

mod drive;
mod kernels;
mod latency;
mod model;
mod serve;
mod stats;
mod table;
mod throughput;
mod vision;

use std::{fs, path::Path};

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::Value;

use super::ranks::RankArgs;

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
}

pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
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
    let Some(path) = path else { return Ok(()) };
    fs::write(path, format!("{results:#}\n")).with_context(|| format!("--output-json {}", path.display()))
}
