//! `spark-engine bench vision`: pictures a second through the vision encoder alone.

use std::{io::Write, path::PathBuf, str::FromStr};

use clap::Args;
use serde_json::json;
use spark_engine::Pictures;

use super::{
    super::ranks::RankArgs,
    model::{BenchModel, Prepared},
    save,
    stats::{deviation, mean},
};

/// Measure the vision encoder.
#[derive(Args)]
#[command(
    args_override_self = true,
    after_help = "Example:\n  \
    spark-engine bench vision --config qwen3-vl-30b-a3b --images 16x256,16x512,1x1024,16x1024"
)]
pub(super) struct VisionArgs {
    #[command(flatten)]
    model: BenchModel,
    /// Pictures to encode: how many, and their side in pixels.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "16x256,16x512,1x1024,16x1024,4x2048",
        value_name = "NxSIDE,..."
    )]
    images: Vec<Images>,
    /// One picture after the other, instead of all of an entry together.
    #[arg(long)]
    one_by_one: bool,
    /// Measurements of each entry, after one that does not count.
    #[arg(short, long, default_value_t = 5, value_name = "N")]
    repetitions: usize,
    /// Write the results as JSON.
    #[arg(long, value_name = "FILE")]
    output_json: Option<PathBuf>,
}

impl VisionArgs {
    /// The place in a group of ranks.
    pub(super) fn ranks(&self) -> &RankArgs {
        &self.model.ranks
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Images {
    count: usize,
    side: usize,
}

impl FromStr for Images {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Sizes of which no product overflows.
        let number = |part: &str| part.trim().parse().ok().filter(|number| (1..=1 << 16).contains(number));
        let parts = text.split_once('x').and_then(|(count, side)| Some((number(count)?, number(side)?)));
        let (count, side) = parts.ok_or_else(|| format!("`{text}` is not NxSIDE, such as 16x512"))?;
        Ok(Self { count, side })
    }
}

pub(super) fn run(args: VisionArgs) -> anyhow::Result<()> {
    let VisionArgs { model, images, one_by_one, repetitions, output_json } = args;
    anyhow::ensure!(repetitions > 0, "--repetitions must be at least 1");
    if one_by_one {
        model.ranks.ensure_alone("--one-by-one")?;
    }
    let Prepared { builder, model, weights, profile, ranks, bar } = model.prepare(|_, options| {
        options.max_num_seqs = 1;
        options.max_num_batched_tokens = Some(64);
        options.max_model_len = Some(64);
    })?;
    let pictures: Vec<Pictures> = images
        .iter()
        .map(|&Images { count, side }| Pictures { count, side, together: !one_by_one })
        .collect();
    let is_follower = ranks.is_follower()?;
    let measured = ranks.apply(builder)?.measure_encoder(&pictures, repetitions);
    bar.finish();
    let measured = measured?;
    if is_follower {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    let how = if one_by_one { "one by one" } else { "together" };
    writeln!(out, "{model} (weights {weights}) on {}; pictures {how}\n", measured.device)?;
    writeln!(out, "| pictures   |             img/s |   ms each |")?;
    writeln!(out, "| ---------- | ----------------: | --------: |")?;
    let mut rows = Vec::new();
    for (images, times) in images.iter().zip(&measured.times) {
        let name = format!("{}x{}", images.count, images.side);
        let speed = |time: &std::time::Duration| images.count as f64 / time.as_secs_f64().max(1e-9);
        let speeds: Vec<f64> = times.iter().map(speed).collect();
        let each = 1e3 / mean(&speeds).max(1e-9);
        let shown = format!("{:.2} ± {:.2}", mean(&speeds), deviation(&speeds));
        writeln!(out, "| {name:<10} | {shown:>17} | {each:>9.3} |")?;
        rows.push(json!({"images": images.count, "side": images.side, "together": !one_by_one,
            "avg_images_per_second": mean(&speeds), "stddev_images_per_second": deviation(&speeds),
            "samples_s": times.iter().map(std::time::Duration::as_secs_f64).collect::<Vec<_>>()}));
    }
    if let Some(profile) = profile {
        writeln!(out, "\n{profile}")?;
    }
    let report = json!({"model": model, "weights": weights, "device": measured.device, "tests": rows});
    save(output_json.as_deref(), &report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_a_count_and_a_side() {
        assert_eq!("16x512".parse(), Ok(Images { count: 16, side: 512 }));
        for wrong in ["512", "0x512", "1x0", "x", "1x99999999999"] {
            assert!(wrong.parse::<Images>().is_err(), "{wrong}");
        }
    }
}
