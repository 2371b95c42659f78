//! `cargo bench --bench load`: how fast checkpoints of 2 GB load, against `dd` with O_DIRECT on the same files, and
//! how much memory that takes. Every measurement runs in a process of its own, so that peaks are its own.
//!
//! `SPARK_BENCH_DIR` names a folder on the disk to measure; by default files go below the target folder. They are
//! removed at the end.
#![expect(clippy::print_stdout, reason = "a benchmark prints its results")]

#[path = "support/checkpoint.rs"]
mod checkpoint;
#[path = "support/measure.rs"]
mod measure;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use checkpoint::Layout;
use measure::{head, median, row, sorted};
use serde_json::{Value, json};
use spark_engine::{Device, EngineBuilder, LoadStrategy, ModelFiles, api::Event, api::SamplingParams};
use spark_weights::LoadOptions;

/// Names the measurement that a child process is to make, and its model.
const CHILD: &str = "SPARK_BENCH_CHILD";
const MODEL: &str = "SPARK_BENCH_MODEL";
/// Repetitions; medians are shown.
const ROUNDS: usize = 5;
/// What must be free on the disk.
const NEEDED: u64 = 4 << 30;

fn main() -> Result<()> {
    if let (Ok(what), Ok(model)) = (env::var(CHILD), env::var(MODEL)) {
        println!("{}", child(&what, &model)?);
        return Ok(());
    }
    let parent = env::var_os("SPARK_BENCH_DIR").map_or(env!("CARGO_TARGET_TMPDIR").into(), PathBuf::from);
    fs::create_dir_all(&parent)?;
    let disk = rustix::fs::statvfs(&parent)?;
    ensure!(disk.f_bavail * disk.f_frsize > NEEDED, "the benchmark needs {NEEDED} free bytes");
    println!("medians of {ROUNDS} rounds; GB/s are file bytes over seconds; peak is VmHWM over file bytes");
    head(&["layout", "what", "s", "GB/s", "of dd", "peak GB", "peak / file", "first token s"]);
    for layout in [Layout::DenseBf16, Layout::MoeBf16, Layout::MoeAwq] {
        let dir = tempfile::Builder::new().prefix("load-bench").tempdir_in(&parent)?;
        let files = checkpoint::write(dir.path(), layout)?;
        measure_layout(layout, dir.path(), &files)?;
    }
    Ok(())
}

fn measure_layout(layout: Layout, dir: &Path, files: &[PathBuf]) -> Result<()> {
    let bytes = files.iter().map(|file| Ok(fs::metadata(file)?.len())).sum::<Result<u64>>()? as f64;
    let what = ["dd", "load eager", "engine eager", "load lazy", "engine lazy"];
    let mut rounds = vec![Vec::new(); what.len()];
    // Interleaved, so that a slow minute of the disk falls on all.
    for _ in 0..ROUNDS {
        for (what, results) in what.iter().zip(&mut rounds) {
            forget(files)?;
            results.push(if *what == "dd" { dd(files)? } else { spawn(what, dir)? });
        }
    }
    let middle = |results: &[Value], key: &str| {
        median(&sorted(results.iter().filter_map(|result| result[key].as_f64())))
    };
    let dd = middle(&rounds[0], "seconds");
    for (what, results) in what.iter().zip(&rounds) {
        let seconds = middle(results, "seconds");
        let (peak, first) = (middle(results, "peak"), middle(results, "first_token"));
        let shown = |value: f64, text: String| if value > 0.0 { text } else { "-".to_owned() };
        row(&[
            format!("{layout:?}"),
            (*what).to_owned(),
            format!("{seconds:.3}"),
            format!("{:.2}", bytes / seconds / 1e9),
            format!("{:.0} %", 100.0 * dd / seconds),
            shown(peak, format!("{:.2}", peak / 1e9)),
            shown(peak, format!("{:.2}", peak / bytes)),
            shown(first, format!("{first:.3}")),
        ]);
    }
    Ok(())
}

/// Takes the files out of the page cache.
fn forget(files: &[PathBuf]) -> Result<()> {
    for path in files {
        rustix::fs::fadvise(&fs::File::open(path)?, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

/// Reads the files one after the other with `dd`, past the page cache.
fn dd(files: &[PathBuf]) -> Result<Value> {
    let start = Instant::now();
    for path in files {
        let input = format!("if={}", path.display());
        let output = Command::new("dd").args([&input, "of=/dev/null", "iflag=direct", "bs=16M"]).output()?;
        ensure!(output.status.success(), "dd: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(json!({"seconds": start.elapsed().as_secs_f64()}))
}

/// Runs a measurement in a process of its own.
fn spawn(what: &str, model: &Path) -> Result<Value> {
    let output = Command::new(env::current_exe()?).env(CHILD, what).env(MODEL, model).output()?;
    ensure!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("a child prints one JSON object")
}

fn child(what: &str, model: &str) -> Result<Value> {
    let strategy = if what.ends_with("lazy") { LoadStrategy::Lazy } else { LoadStrategy::Eager };
    let start = Instant::now();
    if what.starts_with("load") {
        let files = ModelFiles::open(model, None)?;
        let options = LoadOptions { strategy, ..LoadOptions::default() };
        let params = files.checkpoint.load(&files.specs, &options)?;
        let seconds = start.elapsed().as_secs_f64();
        let peak = peak_bytes()?;
        drop(params);
        return Ok(json!({"seconds": seconds, "peak": peak}));
    }
    let builder = EngineBuilder::new(model).device(Device::Cpu).load_strategy(strategy).engine(|options| {
        options.max_model_len = Some(1024);
        options.kv_cache_memory_bytes = Some(64 << 20);
    });
    let engine = builder.build()?;
    let seconds = start.elapsed().as_secs_f64();
    let peak = peak_bytes()?;
    let mut events = engine.submit(engine.request(vec![72, 105], SamplingParams::greedy(1))?)?;
    while let Some(event) = events.blocking_recv() {
        if let Event::Token(_) = event {
            let first_token = start.elapsed().as_secs_f64();
            return Ok(json!({"seconds": seconds, "peak": peak, "first_token": first_token}));
        }
    }
    bail!("the engine answered no token")
}

/// The most memory that this process has had resident.
fn peak_bytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}
