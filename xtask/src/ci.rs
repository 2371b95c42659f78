//! `cargo xtask ci`: everything that must pass, the cheap checks first. Needs no GPU.
//!
//! Third-party crates are compiled three times in all: as metadata (shared by clippy and rustdoc), as code (shared by
//! the tests and the doc tests), and with coverage counters what the fuzz targets need. Every cargo call therefore names the
//! whole workspace: naming a single package could select other features of a dependency and compile it again.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::{binary, fuzz, kernels, process, tidy, ui};

/// The integration test that talks to the server with the `openai` client finds its Python here.
const PYTHON_VARIABLE: &str = "SPARK_TEST_PYTHON";

/// How long the server is kept under load (`tests/load.rs`): long enough for memory that grows to show.
const SOAK_VARIABLE: &str = "SPARK_SOAK_SECONDS";
const SOAK_SECONDS: &str = "120";

/// Seconds of each fuzz target: its seeds, and a look around. `cargo xtask long` gives each ten minutes.
const FUZZ_SECONDS: u32 = 30;

/// Runs all checks; stops at the first that fails.
///
/// # Errors
/// Names the check that failed.
pub(crate) fn run(root: &Path) -> anyhow::Result<()> {
    let start = Instant::now();
    let cargo = |args: &[&str]| {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(root).args(args);
        command
    };

    process::run(&mut cargo(&["fmt", "--all", "--check"]))?;
    tidy::run(root, false)?;
    process::run(&mut cargo(&[
        "clippy",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;

    ui::build(root, ui::Page::Check)?;

    let python = process::python(root, "python-client", &root.join("tests/python/requirements.txt"))?;
    process::run(
        cargo(&["nextest", "run", "--locked", "--workspace", "--no-fail-fast"])
            .env(PYTHON_VARIABLE, python)
            .env(SOAK_VARIABLE, SOAK_SECONDS),
    )?;
    ui::test(root, &process::target(root).join("debug/spark-engine"))?;
    kernels::check(root)?;
    // The tests have built it. A release build links the same libraries.
    binary::run(&process::target(root).join("debug/spark-engine"))?;
    process::run(&mut cargo(&["test", "--locked", "--workspace", "--doc"]))?;
    process::run(
        cargo(&["doc", "--locked", "--workspace", "--no-deps", "--lib"]).env("RUSTDOCFLAGS", "-D warnings"),
    )?;

    // Last, as it compiles most of the workspace once more, with coverage counters.
    fuzz::run(root, FUZZ_SECONDS, None)?;

    println!("\nxtask ci: all checks passed in {} s", start.elapsed().as_secs());
    Ok(())
}
