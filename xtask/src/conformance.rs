//! `cargo xtask conformance`: the test suites of vLLM and llama.cpp, and load clients of others, against the built program.
//! The work is done by `tests/conformance/run.py`; nothing that it fetches is part of the repository.

use std::path::Path;
use std::process::Command;

use crate::process;

/// Where everything is fetched to, below the target folder.
const WORK: &str = "conformance";
/// What is written from the results.
const PAGE: &str = "docs/results/conformance.md";

/// Builds the program and runs suites against it: those that are named (`vllm`, `llama`, `clients`), or all.
///
/// # Errors
/// When the build fails, or a test fails for no reason that is known.
pub(crate) fn run(root: &Path, arguments: &[String]) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let words = ["build", "--locked", "--release", "-p", "spark-engine", "--bin", "spark-engine"];
    let mut build = Command::new(cargo);
    build.current_dir(root).args(words);
    let target = process::target(root);
    let mut script = Command::new("python3");
    script.current_dir(root).arg(root.join("tests/conformance/run.py"));
    script.arg("--program").arg(target.join("release/spark-engine"));
    script.arg("--model").arg(root.join("models/spark-tiny-vl/awq"));
    script.arg("--work").arg(target.join(WORK)).arg("--page").arg(root.join(PAGE)).args(arguments);
    process::run(&mut build)?;
    process::run(&mut script)
}
