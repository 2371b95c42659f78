//! Repository tasks, run as `cargo xtask <task>`. No product code: nothing here is part of the engine.
#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line program reports on the terminal"
)]

mod binary;
mod ci;
mod conformance;
mod fuzz;
mod golden;
mod kernels;
mod long;
mod process;
mod tidy;
mod ui;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

/// Repository tasks of spark-engine.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Checks what the compiler does not: sizes, dependency arrows, forbidden words, documents.
    Tidy {
        /// Also lists files and functions that are over the aim but under the limit.
        #[arg(long)]
        notes: bool,
    },
    /// Everything that must pass before a change is merged.
    Ci,
    /// Checks what a built program needs of a machine: nothing but glibc, and no newer one than DGX OS has.
    Binary {
        /// The program.
        #[arg(default_value = "target/release/spark-engine")]
        path: PathBuf,
    },
    /// Compiles the CUDA kernels for every architecture with NVIDIA's compiler (from its Python package). Needs no GPU.
    Kernels,
    /// Builds the tests that need a GPU, with their kernels, into target/gpu-test; runs them if there is a GPU.
    GpuTest {
        /// Architecture of the GPU: sm_80, sm_90, sm_120a or sm_121a.
        #[arg(long, default_value = "sm_90")]
        arch: String,
    },
    /// The tests that take too long for every change, in their full size; their numbers go to docs/results/long.md.
    Long,
    /// The test suites of vLLM and llama.cpp and load clients of others against the program; docs/results/conformance.md.
    Conformance {
        /// Suites (vllm, llama, clients) and flags of tests/conformance/run.py.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Builds the fuzz targets and runs them.
    Fuzz {
        /// Seconds for each target.
        #[arg(long, default_value_t = 30)]
        seconds: u32,
        /// Only this target: a folder of fuzz/seeds.
        target: Option<String>,
    },
    /// Builds the web page, compares it with the committed one and tests it in a browser.
    Ui {
        /// Puts the built page in place of the committed one instead.
        #[arg(long)]
        write: bool,
    },
    /// Makes the fixtures again and says which of them changed.
    Golden {
        /// Arguments for the fixture script.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = root().and_then(|root| match Cli::parse().task {
        Task::Tidy { notes } => tidy::run(&root, notes),
        Task::Ci => ci::run(&root),
        Task::Binary { path } => binary::run(&path),
        Task::Kernels => kernels::check(&root),
        Task::GpuTest { arch } => kernels::gpu_test(&root, &arch),
        Task::Long => long::run(&root),
        Task::Fuzz { seconds, target } => fuzz::run(&root, seconds, target.as_deref()),
        Task::Conformance { args } => conformance::run(&root, &args),
        Task::Ui { write: true } => ui::build(&root, ui::Page::Write),
        Task::Ui { write: false } => ui::build(&root, ui::Page::Check)
            .and_then(|()| ui::test(&root, &process::target(&root).join("debug/spark-engine"))),
        Task::Golden { args } => golden::run(&root, &args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the repository: the parent of this crate's folder.
fn root() -> anyhow::Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map(Path::to_path_buf).context("xtask must lie one folder below the root of the repository")
}
