//! `cargo xtask fuzz`: builds the fuzz targets (`fuzz/`) and runs them, as many at once as there are cores. The flags are
//! those of rustc's stable release: coverage counters in all code, and libFuzzer linked in by its crate.

use std::{
    fmt::Write as _,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
};

use anyhow::{Context as _, bail};

use crate::process;

/// Counters at every edge, their places, what comparisons compare; and the doors that some crates have for the targets.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";
/// Most seconds for one input: a grammar may take ten to compile, and instrumented code is slower.
const SECONDS_AN_INPUT: u32 = 25;
/// Most megabytes of one target.
const MEGABYTES: u32 = 3072;
/// Seconds of each target in the long run.
const LONG_SECONDS: u32 = 600;
const RESULTS: &str = "docs/results/fuzz.md";
/// Tells the program which target to run.
const VARIABLE: &str = "SPARK_FUZZ_TARGET";

/// What a target did.
struct Outcome {
    target: String,
    /// From libFuzzer's lines.
    executions: String,
    coverage: String,
    inputs: String,
    /// `None`: nothing was found.
    finding: Option<String>,
}

/// Runs each target, or `only` that one, for so many seconds.
///
/// # Errors
/// When a target finds something: it names the input and the log.
pub(crate) fn run(root: &Path, seconds: u32, only: Option<&str>) -> anyhow::Result<()> {
    fuzz(root, seconds, only).map(|_| ())
}

/// Runs all targets for ten minutes each, and writes what they did.
///
/// # Errors
/// As [`run`]; the results of before stay then.
pub(crate) fn long(root: &Path) -> anyhow::Result<()> {
    let outcomes = fuzz(root, LONG_SECONDS, None)?;
    let page = page(&outcomes, &process::provenance());
    fs::write(root.join(RESULTS), page).with_context(|| format!("cannot write {RESULTS}"))
}

fn fuzz(root: &Path, seconds: u32, only: Option<&str>) -> anyhow::Result<Vec<Outcome>> {
    let seeds = root.join("fuzz/seeds");
    let targets = targets(&seeds, only)?;
    let program = build(root)?;
    let work = process::target(root).join("fuzz");
    let lanes = thread::available_parallelism().map_or(1, usize::from).min(targets.len());
    println!("\n{} fuzz targets, {seconds} s each, {lanes} at once", targets.len());
    let (queue, outcomes) = (Mutex::new(targets.into_iter()), Mutex::new(Vec::new()));
    let next = || queue.lock().map(|mut queue| queue.next()).ok().flatten();
    let lane = || {
        while let Some(target) = next() {
            let outcome = run_target(&program, &work, &seeds, &target, seconds);
            if let Ok(mut outcomes) = outcomes.lock() {
                outcomes.push(outcome);
            }
        }
    };
    thread::scope(|scope| (0..lanes).for_each(|_| drop(scope.spawn(lane))));
    let mut all = Vec::new();
    for outcome in outcomes.into_inner().unwrap_or_default() {
        let outcome = outcome?;
        println!("{}", row(&outcome));
        all.push(outcome);
    }
    all.sort_by(|a, b| a.target.cmp(&b.target));
    let findings: Vec<_> = all.iter().filter_map(|outcome| outcome.finding.as_deref()).collect();
    match findings.is_empty() {
        true => Ok(all),
        false => bail!("fuzzing has found something:\n{}", findings.join("\n")),
    }
}

/// Every target has a folder of seeds.
fn targets(seeds: &Path, only: Option<&str>) -> anyhow::Result<Vec<String>> {
    let folders = fs::read_dir(seeds).with_context(|| format!("cannot read {}", seeds.display()))?;
    let mut names = Vec::new();
    for folder in folders {
        names.push(folder?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    match only {
        None => Ok(names),
        Some(only) if names.iter().any(|name| name == only) => Ok(vec![only.to_owned()]),
        Some(only) => bail!("there is no fuzz target {only}; there are {}", names.join(", ")),
    }
}

fn build(root: &Path) -> anyhow::Result<PathBuf> {
    let host = process::host()?;
    let target = process::target(root).join("fuzz");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // With an explicit target the flags are not for build scripts, which nothing would link.
    command.current_dir(root.join("fuzz")).args(["build", "--release", "--locked", "--target", &host]);
    process::run(command.arg("--target-dir").arg(&target).env("RUSTFLAGS", FLAGS))?;
    Ok(target.join(host).join("release/spark-fuzz"))
}

/// Runs one target; what it learns stays in `work` for the next time.
fn run_target(
    program: &Path,
    work: &Path,
    seeds: &Path,
    target: &str,
    seconds: u32,
) -> anyhow::Result<Outcome> {
    let (corpus, findings) = (work.join("corpus").join(target), work.join("findings"));
    for folder in [&corpus, &findings] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let log = work.join(format!("{target}.log"));
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let status = Command::new(program)
        .env(VARIABLE, target)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={SECONDS_AN_INPUT}"))
        .arg(format!("-rss_limit_mb={MEGABYTES}"))
        .arg(format!("-artifact_prefix={}/{target}-", findings.display()))
        .args([&corpus, &seeds.join(target)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let said = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let said = String::from_utf8_lossy(&said);
    let (executions, coverage, inputs) = numbers(&said);
    let finding = (!status.success()).then(|| {
        let tail: Vec<_> = said.lines().rev().take(25).collect();
        let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
        format!("{target} ({status}), log {}:\n{tail}", log.display())
    });
    Ok(Outcome { target: target.to_owned(), executions, coverage, inputs, finding })
}

/// Executions, edges and inputs by the last line of the form `#123 NEW cov: 45 ft: 67 corp: 8/90b ...`.
fn numbers(log: &str) -> (String, String, String) {
    let after = |line: &str, key: &str| {
        let value = line.split_once(key).map(|(_, rest)| rest.trim_start());
        let end = |c: char| !c.is_ascii_digit();
        value.and_then(|value| value.split(end).next()).unwrap_or("?").to_owned()
    };
    let last = log.lines().rev().find(|line| line.starts_with('#') && line.contains(" cov: "));
    last.map_or_else(
        || ("?".into(), "?".into(), "?".into()),
        |line| (after(line, "#"), after(line, " cov: "), after(line, " corp: ")),
    )
}

fn row(outcome: &Outcome) -> String {
    let Outcome { target, executions, coverage, inputs, finding } = outcome;
    let end = if finding.is_some() { "a finding" } else { "clean" };
    format!("| `{target}` | {executions} | {coverage} | {inputs} | {end} |")
}

fn page(outcomes: &[Outcome], provenance: &str) -> String {
    let mut page = format!(
        "# Fuzzing\n\nWritten by `cargo xtask long`, {provenance}. Each target ran for {LONG_SECONDS} s in one thread, from its \
         seeds in `fuzz/seeds` and what earlier runs had kept; what a target checks is at the top of its file in `fuzz/src`. Arithmetic \
         overflow, failed assertions, {SECONDS_AN_INPUT} s for one input and {MEGABYTES} MB of memory count as findings.\n\n\
         | target | executions | edges covered | inputs kept | end |\n|---|---|---|---|---|\n"
    );
    for outcome in outcomes {
        let _ = writeln!(page, "{}", row(outcome));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_with_numbers_counts() {
        let log = "INFO: x\n#2\tINITED cov: 5 ft: 6 corp: 1/2b\n#77\tREDUCE cov: 45 ft: 67 corp: 8/90b lim: 4\nDone 80 runs\n";
        assert_eq!(numbers(log), ("77".into(), "45".into(), "8".into()));
        assert_eq!(numbers("nothing").0, "?");
    }

    #[test]
    fn a_target_is_named_by_its_seeds() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
        let source = fs::read_to_string(seeds.join("../src/main.rs")).unwrap();
        let all = targets(&seeds, None).unwrap();
        assert!(!all.is_empty());
        for target in &all {
            assert!(source.contains(&format!("(\"{target}\", {target}::run)")), "{target} has seeds only");
            assert_eq!(targets(&seeds, Some(target)).unwrap(), [target.as_str()]);
        }
        assert_eq!(source.matches("::run),").count(), all.len(), "every target has seeds");
        assert!(targets(&seeds, Some("x")).is_err());
    }
}
