//! `spark-engine probe`: measures this machine and writes one JSON file, to be sent by who owns a machine that the authors do
//! not have. Runs no model and sends nothing by itself.

mod disk;
mod host;

use std::{fs, io::Write, path::PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::{Map, Value, json};
use spark_cuda::{Cubins, KernelOptions, probe};

use crate::cli::kernels::device;

/// Version of the JSON file: changes when a field changes its meaning or goes.
pub(crate) const SCHEMA_VERSION: u32 = 1;
/// What no single machine or no part of this program can measure yet.
const NEVER: [(&str, &str); 2] = [
    ("gpu_to_peer_gpu_flag_us", "needs two machines with a network between them"),
    ("l2_prefetch", "needs the collectives between two machines, whose time a prefetch would use"),
];

/// Measure what this machine can do: GPU, memory, disk. Takes under a minute.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    spark-engine probe --json spark.json\n  \
    spark-engine probe --file checkpoint/model-00001-of-00013.safetensors --json spark.json")]
pub(crate) struct ProbeArgs {
    /// Write all of it to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Read this large file to measure the disk it is on; by default one that is written for it, in the current folder, and removed.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// A folder made by `kernels build`, instead of compiling here.
    #[arg(long, env = "SPARK_KERNEL_DIR", value_name = "FOLDER")]
    kernel_dir: Option<PathBuf>,
    /// Number of the GPU.
    #[arg(long, default_value_t = 0, value_name = "N")]
    gpu: usize,
}

/// What was found, in the order in which it is shown.
#[derive(Default)]
struct Report {
    sections: Map<String, Value>,
    missing: Map<String, Value>,
}

impl Report {
    fn missing(&mut self, name: &str, why: impl std::fmt::Display) {
        self.missing.insert(name.to_owned(), why.to_string().into());
    }

    fn into_json(self) -> Value {
        let mut all = json!({
            "schema_version": SCHEMA_VERSION,
            "program": concat!("spark-engine ", env!("CARGO_PKG_VERSION")),
        });
        if let Some(all) = all.as_object_mut() {
            all.extend(self.sections);
            all.insert("missing".to_owned(), self.missing.into());
        }
        all
    }
}

pub(crate) fn run(args: &ProbeArgs) -> anyhow::Result<()> {
    let mut report = Report::default();
    report.sections.insert("host".to_owned(), host::measure());
    tracing::info!("the host is measured; next the disk");
    match disk::measure(args.file.as_deref()) {
        Ok(disk) => drop(report.sections.insert("disk".to_owned(), disk)),
        Err(error) => report.missing("disk", format!("{error:#}")),
    }
    tracing::info!("the disk is measured; next the GPU");
    match gpu(args, &mut report) {
        Ok(gpu) => drop(report.sections.insert("gpu".to_owned(), gpu)),
        Err(error) => report.missing("gpu", format!("{error:#}")),
    }
    for (name, why) in NEVER {
        report.missing(name, why);
    }
    let report = report.into_json();
    write_text(&mut std::io::stdout().lock(), &report)?;
    if let Some(path) = &args.json {
        fs::write(path, format!("{report:#}\n")).with_context(|| format!("--json {}", path.display()))?;
    }
    Ok(())
}

fn gpu(args: &ProbeArgs, report: &mut Report) -> anyhow::Result<Value> {
    let device = device(args.gpu)?;
    let options = KernelOptions { kernel_dir: args.kernel_dir.clone(), ..Default::default() };
    let cubins = Cubins::get(device.arch(), &options)?;
    let memory = device.memory()?;
    let found = probe::run(&device, &cubins)?;
    for (name, why) in &found.missing {
        report.missing(&format!("gpu.{name}"), why);
    }
    let numbers = |values: Vec<(String, f64)>| -> Map<String, Value> {
        values.into_iter().map(|(name, value)| (name, number(value))).collect()
    };
    let properties = device.properties();
    Ok(json!({
        "name": properties.name,
        "arch": properties.arch.name(),
        "driver_cuda": properties.driver.to_string(),
        "nvrtc": cubins.nvrtc.map(|version| version.to_string()),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "device": numbers(found.device),
        "measured": numbers(found.measured),
    }))
}

/// Four digits that count: more is noise. JSON has no number for infinity, which becomes null.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 {
        return (value as i64).into();
    }
    let digits = (3 - value.abs().log10().floor() as i32).clamp(0, 12);
    let scale = 10f64.powi(digits);
    ((value * scale).round() / scale).into()
}

/// A line for each number, with the path to it.
fn write_text(out: &mut impl Write, report: &Value) -> std::io::Result<()> {
    for (section, values) in report.as_object().into_iter().flatten() {
        match values {
            Value::Object(values) => {
                writeln!(out, "{section}")?;
                write_values(out, values, 2)?;
            }
            value => writeln!(out, "{section} {}", plain(value))?,
        }
    }
    Ok(())
}

fn write_values(out: &mut impl Write, values: &Map<String, Value>, indent: usize) -> std::io::Result<()> {
    for (name, value) in values {
        match value {
            Value::Object(inner) => {
                writeln!(out, "{:indent$}{name}", "")?;
                write_values(out, inner, indent + 2)?;
            }
            value => writeln!(out, "{:indent$}{name:48} {}", "", plain(value))?,
        }
    }
    Ok(())
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_four_digits_that_count() {
        assert_eq!(number(1234.567), json!(1235.0));
        assert_eq!(number(0.012_345_6), json!(0.01235));
        assert_eq!(number(48.0), json!(48));
        assert_eq!(number(f64::NAN), Value::Null);
    }

    #[test]
    fn the_report_has_a_version_and_says_what_is_missing() {
        let mut report = Report::default();
        report.sections.insert("host".to_owned(), json!({"cores": 2, "cpu": {"name": "x"}}));
        report.missing("gpu", "no driver");
        let value = report.into_json();
        assert_eq!(value["schema_version"], 1);
        assert_eq!(value["missing"]["gpu"], "no driver");
        let mut text = Vec::new();
        write_text(&mut text, &value).unwrap();
        let text = String::from_utf8(text).unwrap();
        let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(
            words.contains(&vec!["cores", "2"]) && words.contains(&vec!["gpu", "no", "driver"]),
            "{text}"
        );
    }

    /// On a machine with or without a GPU: a report, no failure.
    #[test]
    fn a_machine_without_a_gpu_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let (data, json) = (folder.path().join("data"), folder.path().join("probe.json"));
        fs::write(&data, vec![7; 3 << 20]).unwrap();
        // A GPU that no machine has.
        let args = ProbeArgs { json: Some(json.clone()), file: Some(data), kernel_dir: None, gpu: 4096 };
        run(&args).unwrap();
        let report: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
        assert!(report["host"]["memory_total_bytes"].as_u64().unwrap() > 0, "{report:#}");
        assert!(report["disk"].is_object() || report["missing"]["disk"].is_string(), "{report:#}");
        assert!(report["missing"]["gpu"].is_string(), "{report:#}");
    }
}
