//! `spark-engine quantize`: a 4-bit or 8-bit checkpoint from a plain one. Calibration prompts are in `calibration`.

mod calibration;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use spark_engine::ModelFiles;
use spark_quantize::{Format, Options, Progress, Report, check, quantize};

use super::progress::count_bar;
use calibration::Calibrator;

/// Write a 4-bit or 8-bit version of a checkpoint.
#[derive(Args)]
#[command(
    args_override_self = true,
    after_help = "The linear layers of the decoder are quantised: attention, MLPs, experts. Encoder, embeddings, output \
    head, routers and norms keep their type.\n\n\
    Memory: one layer in float32, and one shard of the output. Calibration (awq, unless --no-search; the others with \
    --calibration) runs the prompts through the model on the CPU, which takes the memory of the whole checkpoint.\n\n\
    The built-in prompts are the training samples of the demo model spark-tiny-vl. For any other model give prompts \
    like those that it will get: FILE has one JSON object a line, {\"messages\": [...]} in OpenAI's form (with tools and \
    chat_template_kwargs where they apply; images as data: URLs, file: URLs or paths beside FILE) or {\"text\": \"...\"}. \
    A hundred prompts of some hundred tokens are enough."
)]
pub(crate) struct QuantizeArgs {
    /// The checkpoint in bfloat16, float16 or float32: a folder, or a Hugging Face id in the local cache.
    #[arg(value_name = "MODEL")]
    model: String,
    /// What to write.
    #[arg(long, value_enum)]
    format: FormatArg,
    /// The folder to create.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Branch, tag or commit of a Hugging Face id.
    #[arg(long)]
    revision: Option<String>,
    /// Inputs that share a scale (awq): 32, 64 or 128; by default the largest that divides all input sizes.
    #[arg(long, value_name = "N", value_parser = ["32", "64", "128"])]
    group_size: Option<String>,
    /// Round to nearest, without a search for scales (awq, nvfp4).
    #[arg(long)]
    no_search: bool,
    /// Prompts to calibrate with, as JSON lines.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
}

/// Formats by their flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    /// 4-bit integers with activation-aware scales, as AutoAWQ writes them.
    Awq,
    /// 4-bit floats with a scale per 16 weights, weights only, as compressed-tensors writes them.
    Nvfp4,
    /// 8-bit floats with a scale per block of 128 x 128, as Qwen's FP8 checkpoints.
    Fp8,
}

pub(crate) fn run(args: &QuantizeArgs) -> anyhow::Result<()> {
    let format = args.format()?;
    let files = ModelFiles::open(&args.model, args.revision.clone())?;
    // Before the prompts, which take minutes to prepare.
    check(&files.checkpoint, &format, &args.out)?;
    let mut options = Options::new(format);
    let searches_activations = matches!(options.format, Format::Awq { search: true, .. });
    let mut prompts = Vec::new();
    if searches_activations || args.calibration.is_some() {
        let calibrator = Calibrator::open(&files)?;
        if let Some(mean_std) = calibrator.image_mean_std() {
            options.image_mean_std = mean_std;
        }
        prompts = match &args.calibration {
            Some(path) => calibrator.read(path)?,
            None => calibrator.built_in()?,
        };
        let num_tokens: usize = prompts.iter().map(|prompt| prompt.ids.len()).sum();
        tracing::info!("calibrating with {} prompts of {num_tokens} tokens together", prompts.len());
    }
    let bars = [count_bar("calibrating"), count_bar("quantising")];
    let progress = |now: Progress| match now {
        Progress::Calibrated { done, total } => update(&bars[0], done, total),
        Progress::Quantised { done, total } => update(&bars[1], done, total),
    };
    let report = quantize(&files.checkpoint, &options, &prompts, &args.out, &progress);
    bars.iter().for_each(ProgressBar::finish_and_clear);
    write_report(&mut std::io::stdout().lock(), &report?)?;
    tracing::info!("wrote {}", args.out.display());
    Ok(())
}

fn update(bar: &ProgressBar, done: usize, total: usize) {
    bar.set_length(total as u64);
    bar.set_position(done as u64);
}

impl QuantizeArgs {
    fn format(&self) -> anyhow::Result<Format> {
        let search = !self.no_search;
        anyhow::ensure!(
            self.group_size.is_none() || self.format == FormatArg::Awq,
            "--group-size is for --format awq; the groups of the other formats are fixed"
        );
        anyhow::ensure!(
            search || self.format != FormatArg::Fp8,
            "--no-search is for --format awq and nvfp4; fp8 searches nothing"
        );
        Ok(match self.format {
            FormatArg::Awq => {
                let group_size = self.group_size.as_ref().map(|size| size.parse()).transpose()?;
                Format::Awq { group_size, search }
            }
            FormatArg::Nvfp4 => Format::Nvfp4 { search },
            FormatArg::Fp8 => Format::Fp8,
        })
    }
}

fn write_report(out: &mut impl Write, report: &Report) -> anyhow::Result<()> {
    let of = if report.calibrated { "of outputs" } else { "of weights" };
    writeln!(out, "{:<12} {:>7} {:>16} {:>16} {:>14}", "", "", "", "", "relative error")?;
    writeln!(
        out,
        "{:<12} {:>7} {:>16} {:>16} {:>14}",
        "layers", "number", "bytes before", "bytes after", of
    )?;
    for kind in &report.kinds {
        let (name, error) = (kind.kind.name(), format!("{:.5}", kind.relative_error()));
        let (before, after) = (kind.bytes_before, kind.bytes_after);
        writeln!(out, "{name:<12} {:>7} {before:>16} {after:>16} {error:>14}", kind.layers)?;
    }
    let kept = report.bytes_kept;
    writeln!(out, "{:<12} {:>7} {kept:>16} {kept:>16}", "unchanged", "")?;
    writeln!(out, "{:<12} {:>7} {:>16} {:>16}", "all", "", report.bytes_before, report.bytes_after)?;
    if let Some(group_size) = report.group_size {
        writeln!(out, "group size {group_size}")?;
    }
    Ok(())
}
