//! `cargo xtask long`: the tests that take too long for every change, in their full size, and their numbers in
//! `docs/results/long.md`. Needs no GPU, and a machine on which nothing else runs.

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use crate::{fuzz, process};

/// Tells the tests to run in their full size.
const VARIABLE: &str = "SPARK_LONG";
/// Where the numbers go.
const RESULTS: &str = "docs/results/long.md";
/// What a test begins its lines of numbers with.
const ROW: &str = "| ";

/// Runs the tests one by one and writes what they measure.
///
/// # Errors
/// When one fails; the numbers of before stay then.
pub(crate) fn run(root: &Path) -> anyhow::Result<()> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).env(VARIABLE, "1").stdin(Stdio::null()).stdout(Stdio::piped());
    command.args(["nextest", "run", "--locked", "--profile", "long", "--no-capture", "-p", "spark-engine"]);
    let mut child =
        command.args(["--test", "integration", "load::"]).spawn().context("cannot start cargo nextest")?;
    let output = BufReader::new(child.stdout.take().context("the output is piped")?);
    let mut tables = String::new();
    for line in output.lines() {
        let line = line.context("the tests have written something that is no text")?;
        println!("{line}");
        if let Some(name) = test_that_ended(&line) {
            let _ = writeln!(tables, "\n`{name}` has passed.");
        }
        if line.starts_with(ROW) {
            let is_first = !tables.ends_with("|\n");
            let head = if is_first { "\n| what | value |\n|---|---|\n" } else { "" };
            let _ = writeln!(tables, "{head}{line}");
        }
    }
    let status = child.wait().context("cannot wait for cargo nextest")?;
    if !status.success() {
        bail!("the long tests have failed ({status}); {RESULTS} is as before");
    }
    let page = format!("{}{tables}", head());
    std::fs::write(root.join(RESULTS), page).with_context(|| format!("cannot write {RESULTS}"))?;
    fuzz::long(root)
}

/// `test NAME ... ok` of the test program.
fn test_that_ended(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... ok")
}

/// What the numbers are of.
fn head() -> String {
    format!(
        "# Long tests\n\nWritten by `cargo xtask long` {}. Each test below has passed; what it checks is in `tests/load.rs`. The \
         model is a fixture of a few layers on the CPU backend, so the numbers are of the server and not of a model.\n",
        process::provenance(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_test_that_passed_is_named() {
        assert_eq!(test_that_ended("test load::x ... ok"), Some("load::x"));
        assert_eq!(test_that_ended("test load::x ... FAILED"), None);
        assert_eq!(test_that_ended("test result: ok. 1 passed"), None);
    }
}
