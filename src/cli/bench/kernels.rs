//! `spark-engine bench kernels`: every CUDA kernel alone. Runs no model.

use std::{io::Write, path::PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use spark_cuda::{Cubins, Device, KernelOptions, Kernels};
use spark_cuda::{bench, bench_attention, bench_gemm, bench_proxy};

use super::save;
use crate::cli::kernels::device;

/// Measure every kernel on this machine's GPU.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    spark-engine bench kernels --part decode\n  \
    spark-engine bench kernels --sms 48 --output-json gb10-proxy.json")]
pub(super) struct KernelsArgs {
    /// What to measure; by default all of it.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART,...", conflicts_with = "sms")]
    part: Vec<Part>,
    /// Measure the decode kernels at the shapes of half a 235B on N multiprocessors only, against what a GB10 (which has 48)
    /// could use. Needs driver 550 or newer.
    #[arg(long, value_name = "N")]
    sms: Option<u32>,
    /// A folder made by `kernels build`, instead of compiling here.
    #[arg(long, env = "SPARK_KERNEL_DIR", value_name = "FOLDER")]
    kernel_dir: Option<PathBuf>,
    /// Number of the GPU.
    #[arg(long, default_value_t = 0, value_name = "N")]
    gpu: usize,
    /// Write the results as JSON.
    #[arg(long, visible_alias = "json", value_name = "FILE")]
    pub(super) output_json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Kernels of a decode step, by bytes a second.
    Decode,
    /// Products with many rows, by operations a second.
    Gemm,
    /// Attention at decode, over prompts and in the vision encoder.
    Attention,
}

impl Part {
    /// Measures, shows the table, returns it for JSON.
    fn measure(self, device: &Device, kernels: &Kernels, out: &mut impl Write) -> anyhow::Result<Value> {
        Ok(match self {
            Self::Decode => {
                let report = bench::run(device, kernels)?;
                writeln!(out, "{report}")?;
                let timings = std::iter::once(&report.copy).chain(&report.kernels);
                json!({"decode": timings.map(|timing| timing_json(timing, &report.copy)).collect::<Vec<_>>()})
            }
            Self::Gemm => {
                let report = bench_gemm::run(device, kernels)?;
                writeln!(out, "{report}")?;
                json!({"gemm": report.timings.iter().map(|timing| gemm_json(timing, report.peak)).collect::<Vec<_>>()})
            }
            Self::Attention => {
                let report = bench_attention::run(device, kernels)?;
                writeln!(out, "{report}")?;
                json!({"attention": report.timings.iter().map(attention_json).collect::<Vec<_>>()})
            }
        })
    }
}

pub(super) fn run(args: KernelsArgs) -> anyhow::Result<()> {
    let device = device(args.gpu)?;
    let options = KernelOptions { kernel_dir: args.kernel_dir, ..Default::default() };
    let cubins = Cubins::get(device.arch(), &options)?;
    tracing::info!(
        compiled = cubins.num_compiled,
        milliseconds = cubins.elapsed.as_millis(),
        "kernels are ready"
    );
    let kernels = Kernels::load(&device, &cubins)?;
    let properties = device.properties();
    // Not locked: tables are shown as they come.
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{}, {}, {} multiprocessors, driver CUDA {}",
        properties.name, properties.arch, properties.num_sms, properties.driver
    )?;
    let mut results = json!({
        "gpu": properties.name,
        "arch": properties.arch.name(),
        "multiprocessors": properties.num_sms,
        "driver_cuda": properties.driver.to_string(),
    });
    let mut add = |part: Value| {
        if let (Some(results), Value::Object(part)) = (results.as_object_mut(), part) {
            results.extend(part);
        }
    };
    if let Some(num_sms) = args.sms {
        let report = bench_proxy::run(&device, &cubins, &kernels, num_sms)?;
        write!(out, "{report}")?;
        add(json!({"gb10_proxy": proxy_json(&report)}));
    } else {
        let parts = if args.part.is_empty() { Part::value_variants() } else { &args.part };
        for part in parts {
            add(part.measure(&device, &kernels, &mut out)?);
        }
    }
    save(args.output_json.as_deref(), &results)
}

fn timing_json(timing: &bench::Timing, copy: &bench::Timing) -> Value {
    json!({
        "kernel": timing.name,
        "shape": timing.shape,
        "us": timing.micros,
        "bytes": timing.num_bytes,
        "gb_per_s": timing.gb_per_second(),
        "share_of_copy": timing.gb_per_second() / copy.gb_per_second(),
    })
}

fn gemm_json(timing: &bench_gemm::GemmTiming, peak: Option<f64>) -> Value {
    let per_second = timing.num_operations / timing.micros * 1e6;
    json!({
        "kernel": timing.name,
        "shape": timing.shape,
        "us": timing.micros,
        "tflops": per_second / 1e12,
        "share_of_peak": peak.map(|peak| per_second / peak),
        "weight_bytes": timing.num_bytes,
    })
}

fn attention_json(timing: &bench_attention::AttentionTiming) -> Value {
    json!({
        "kernel": timing.name,
        "shape": timing.shape,
        "us": timing.micros,
        "tflops": timing.num_operations / timing.micros / 1e6,
        "kv_bytes": timing.num_bytes,
    })
}

fn proxy_json(report: &bench_proxy::ProxyReport) -> Value {
    let kernels: Vec<Value> = report
        .kernels
        .iter()
        .map(|kernel| {
            let mut value = timing_json(&kernel.timing, &report.copy);
            value["tflops"] = (kernel.num_operations / kernel.timing.micros / 1e6).into();
            value["gb10_limit"] =
                if kernel.is_bound_by_operations() { "tensor cores" } else { "memory" }.into();
            value["times_gb10"] = kernel.times_gb10().into();
            value
        })
        .collect();
    json!({
        "multiprocessors": report.num_sms,
        "gb10_gb_per_s": bench_proxy::GB10_GB_PER_SECOND,
        "gb10_bf16_tflops": bench_proxy::GB10_TFLOPS,
        "copy_gb_per_s": report.copy.gb_per_second(),
        "kernels": kernels,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: KernelsArgs,
    }

    #[test]
    fn parts_are_chosen_and_do_not_go_with_the_proxy() {
        let line = Line::try_parse_from(["x", "--part", "decode,gemm", "--json", "f"]).unwrap();
        assert_eq!(line.args.part, [Part::Decode, Part::Gemm]);
        assert!(line.args.output_json.is_some());
        assert_eq!(Line::try_parse_from(["x", "--sms", "48"]).unwrap().args.sms, Some(48));
        assert!(Line::try_parse_from(["x", "--sms", "48", "--part", "gemm"]).is_err());
    }

    #[test]
    fn json_of_the_proxy_says_what_limits_a_gb10() {
        let timing = |micros| bench::Timing { name: "k", shape: "s".into(), micros, num_bytes: 2_320_000 };
        let kernel = bench_proxy::ProxyTiming { timing: timing(5.0), num_operations: 1.0 };
        let report = bench_proxy::ProxyReport { num_sms: 48, copy: timing(2.5), kernels: vec![kernel] };
        let value = proxy_json(&report);
        assert_eq!(value["kernels"][0]["gb10_limit"], "memory");
        let times = value["kernels"][0]["times_gb10"].as_f64().unwrap();
        assert!((times - 2.0).abs() < 1e-9, "{times}");
        let share = value["kernels"][0]["share_of_copy"].as_f64().unwrap();
        assert!((share - 0.5).abs() < 1e-9, "{share}");
    }
}
