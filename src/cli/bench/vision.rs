//! `spark-engine bench vision`: pictures a second through the vision encoder alone.

use std::{fmt, io::Write, path::PathBuf, str::FromStr, time::Duration};

use clap::Args;
use serde_json::{Value, json};
use spark_engine::{ListTimes, Pictures};

use super::{
    super::ranks::RankArgs,
    model::{BenchModel, Prepared},
    save,
    stats::{deviation, mean},
};

/// Of the sizes of `mixed`: the same pictures in every run, so that runs can be compared.
const MIX_SEED: u64 = 5;
/// Sides of these pictures are multiples of this.
const MIX_STEP: usize = 32;
/// Shortest and longest side, in steps.
const MIX_SHORTEST: usize = 8;
const MIX_LONGEST: usize = 48;
/// Their longer side to their shorter one, as cameras and screens have them.
const RATIOS: [[usize; 2]; 4] = [[1, 1], [4, 3], [3, 2], [16, 9]];

/// Measure the vision encoder.
#[derive(Args)]
#[command(
    args_override_self = true,
    after_help = "Pictures of an entry:\n  \
    16x512         16 squares of 512 pixels a side\n  \
    4x1280x736     4 that are 1280 wide and 736 high\n  \
    32xmixed       32 of many sizes, the same in every run: the longer side is\n                 \
    256 to 1536 pixels in steps of 32, the other one 1, 3/4, 2/3 or\n                 \
    9/16 of it (rounded to 32, at least 256), upright or not, all\n                 \
    equally likely\n  \
    8x256+1x2048   several of these\n\n\
    Examples:\n  \
    spark-engine bench vision --config qwen3-vl-30b-a3b --images 16x256,16x512,1x1024,16x1024\n  \
    spark-engine bench vision --config qwen3-vl-30b-a3b --images 32xmixed --tp 2"
)]
pub(super) struct VisionArgs {
    #[command(flatten)]
    model: BenchModel,
    /// Pictures to encode, as many entries as wanted: how many pictures, and their side, width and height, or `mixed`.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "16x256,16x512,1x1024,16x1024,4x2048",
        value_name = "NxSIZE[+...],..."
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
    pub(super) output_json: Option<PathBuf>,
}

impl VisionArgs {
    /// The place in a group of ranks.
    pub(super) fn ranks(&self) -> &RankArgs {
        &self.model.ranks
    }
}

/// Pictures that are encoded together, or one by one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Images {
    name: String,
    /// Widths and heights.
    sizes: Vec<[usize; 2]>,
}

impl FromStr for Images {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split('+').map(|part| {
            sizes(part).ok_or_else(|| {
                format!("`{part}` is not NxSIDE, NxWIDTHxHEIGHT or Nxmixed, such as 16x512, 4x1280x736 or 32xmixed")
            })
        });
        let sizes: Vec<Vec<_>> = parts.collect::<Result<_, _>>()?;
        Ok(Self { name: text.to_owned(), sizes: sizes.concat() })
    }
}

/// The pictures of a part of an entry.
fn sizes(part: &str) -> Option<Vec<[usize; 2]>> {
    // Sizes of which no product overflows.
    let number = |text: &str| text.trim().parse().ok().filter(|number| (1..=1 << 16).contains(number));
    let (count, size) = part.split_once('x')?;
    let count: usize = number(count)?;
    if size.trim() == "mixed" {
        return Some(mixed(count));
    }
    let (width, height) = size.split_once('x').unwrap_or((size, size));
    Some(vec![[number(width)?, number(height)?]; count])
}

/// Pictures of many sizes, by the rule that `--help` states. Fewer are the first ones of more.
fn mixed(count: usize) -> Vec<[usize; 2]> {
    let mut random = fastrand::Rng::with_seed(MIX_SEED);
    let mut picture = || {
        let long = random.usize(MIX_SHORTEST..=MIX_LONGEST);
        let [a, b] = RATIOS[random.usize(..RATIOS.len())];
        // Half a step and more is rounded up.
        let short = ((2 * long * b + a) / (2 * a)).max(MIX_SHORTEST);
        let [width, height] = if random.bool() { [short, long] } else { [long, short] };
        [width * MIX_STEP, height * MIX_STEP]
    };
    (0..count).map(|_| picture()).collect()
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
    let pictures: Vec<Pictures> =
        images.iter().map(|images| Pictures { sizes: images.sizes.clone(), together: !one_by_one }).collect();
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
    let width = images.iter().map(|images| images.name.len()).max().unwrap_or(0).max(10);
    let (title, line) = ("pictures", "-".repeat(width));
    writeln!(out, "| {title:<width$} |             img/s |   patches/s |   ms each | fullest rank |")?;
    writeln!(out, "| {line} | ----------------: | ----------: | --------: | -----------: |")?;
    let mut rows = Vec::new();
    for (images, list) in images.iter().zip(&measured.lists) {
        let row = Row::new(images, list);
        writeln!(out, "| {:<width$} {row}", images.name)?;
        rows.push(row.json(one_by_one));
    }
    if let Some(profile) = profile {
        writeln!(out, "\n{profile}")?;
    }
    let report = json!({"model": model, "weights": weights, "device": measured.device, "tests": rows});
    save(output_json.as_deref(), &report)
}

/// What was measured with an entry.
struct Row<'a> {
    images: &'a Images,
    list: &'a ListTimes,
    /// Pictures a second, of each measurement.
    speeds: Vec<f64>,
}

impl<'a> Row<'a> {
    fn new(images: &'a Images, list: &'a ListTimes) -> Self {
        let speed = |time: &Duration| images.sizes.len() as f64 / time.as_secs_f64().max(1e-9);
        Self { images, list, speeds: list.times.iter().map(speed).collect() }
    }

    fn patches_per_second(&self) -> f64 {
        mean(&self.speeds) * self.list.num_patches as f64 / self.images.sizes.len().max(1) as f64
    }

    /// Part of all patches that the rank with most of them has encoded.
    fn largest_share(&self) -> f64 {
        self.list.most_patches as f64 / self.list.num_patches.max(1) as f64
    }

    fn json(&self, one_by_one: bool) -> Value {
        let sizes = &self.images.sizes;
        let side = sizes.first().filter(|first| first[0] == first[1] && sizes.iter().all(|s| s == *first));
        json!({"name": self.images.name, "images": sizes.len(), "side": side.map(|side| side[0]), "sizes": sizes,
            "patches": self.list.num_patches, "together": !one_by_one,
            "avg_images_per_second": mean(&self.speeds), "stddev_images_per_second": deviation(&self.speeds),
            "avg_patches_per_second": self.patches_per_second(), "largest_share": self.largest_share(),
            "samples_s": self.list.times.iter().map(Duration::as_secs_f64).collect::<Vec<_>>()})
    }
}

/// The columns after the entry's name.
impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let speeds = &self.speeds;
        let shown = format!("{:.2} ± {:.2}", mean(speeds), deviation(speeds));
        let (patches, each) = (self.patches_per_second(), 1e3 / mean(speeds).max(1e-9));
        let share = 100.0 * self.largest_share();
        write!(f, "| {shown:>17} | {patches:>11.0} | {each:>9.3} | {share:>10.1} % |")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_counts_and_sizes() {
        let parsed = |text: &str| text.parse::<Images>().unwrap().sizes;
        assert_eq!(parsed("3x512"), [[512, 512]; 3]);
        assert_eq!(parsed("1x1024x768"), [[1024, 768]]);
        assert_eq!(parsed("2x32+1x64x32+1xmixed"), [vec![[32, 32]; 2], vec![[64, 32]], mixed(1)].concat());
        for wrong in
            ["512", "0x512", "1x0", "x", "1x99999999999", "1x2x3x4", "1x2+", "mixed", "0xmixed", "1xmix"]
        {
            assert!(wrong.parse::<Images>().unwrap_err().contains("32xmixed"), "{wrong}");
        }
    }

    /// What is measured with them is compared over time.
    #[test]
    fn mixed_pictures_are_the_known_ones() {
        let sizes = mixed(32);
        assert_eq!(sizes[..3], [[480, 480], [320, 576], [1312, 736]]);
        assert_eq!(mixed(5), sizes[..5]);
        let pixels: usize = sizes.iter().map(|[width, height]| width * height).sum();
        assert_eq!(pixels / (16 * 16), 102_044);
        for [width, height] in mixed(1000) {
            let (long, short) = (width.max(height), width.min(height));
            assert!(short.is_multiple_of(32) && long.is_multiple_of(32) && short >= 256 && long <= 1536);
            let is_known = |[a, b]: &[usize; 2]| (short * a).abs_diff(long * b) <= 16 * a;
            assert!(short == 256 || RATIOS.iter().any(is_known), "{width}x{height}");
        }
    }
}
