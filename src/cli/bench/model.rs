//! The model of a benchmark: a checkpoint, or a configuration with random weights; an engine of token ids over it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use spark_engine::{
    EngineBuilder, EngineOptions, ExpertTally, LoadFormat, ModelFiles, Profile, Quantization, StartTimes,
    Started,
};

use super::drive::{Prompts, drive};
use crate::cli::{
    device::DeviceArgs, head::HeadArgs, model_name::ModelName, progress, ranks::RankArgs, sizes::SizeArgs,
};

/// Which model to measure and how to run it.
#[derive(Args)]
pub(super) struct BenchModel {
    #[command(flatten)]
    model: ModelName,
    /// A configuration to measure with random weights, instead of MODEL: a published shape (qwen3-30b-a3b, qwen3-vl-30b-a3b,
    /// qwen3-vl-235b-a22b, qwen3-vl-8b), or a folder with config.json.
    #[arg(long, value_name = "NAME|FOLDER", conflicts_with_all = ["MODEL", "model"])]
    config: Option<String>,
    /// Weights: the checkpoint's (`auto`), or random ones (`dummy`, the default with --config).
    #[arg(long, value_enum)]
    load_format: Option<LoadFormatArg>,
    /// Format of random weights; by default what the configuration says, or AWQ if it says nothing.
    #[arg(long, value_enum)]
    quantization: Option<QuantizationArg>,
    /// Seed of random weights and prompts.
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
    /// Keep what each rank holds of a checkpoint in this folder, ready for the next start.
    #[arg(long, value_name = "FOLDER")]
    weight_cache: Option<PathBuf>,
    /// Ranks read a checkpoint for each other, as `serve --load-exchange` does.
    #[arg(long)]
    load_exchange: bool,
    #[command(flatten)]
    head: HeadArgs,
    /// Also print where the time goes, by operation. Needs a GPU; steps are slower then, and not recorded.
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    pub(super) ranks: RankArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LoadFormatArg {
    #[value(alias = "safetensors")]
    Auto,
    Dummy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum QuantizationArg {
    /// 4-bit integers, groups of 128.
    Awq,
    /// 4-bit floats, groups of 16.
    Nvfp4,
    /// 8-bit floats, blocks of 128 x 128.
    Fp8,
    /// bfloat16.
    None,
}

impl From<QuantizationArg> for Quantization {
    fn from(quantization: QuantizationArg) -> Self {
        match quantization {
            QuantizationArg::Awq => Self::Awq,
            QuantizationArg::Nvfp4 => Self::Nvfp4,
            QuantizationArg::Fp8 => Self::Fp8,
            QuantizationArg::None => Self::None,
        }
    }
}

/// The largest load that a benchmark will make: sizes that nobody gave follow from it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// Requests at once.
    pub(super) num_seqs: usize,
    /// Prompt and output of one.
    pub(super) num_tokens: usize,
}

/// Tokens of each sequence whose steps are looked at for their experts.
const TALLIED_TOKENS: usize = 9;

/// A started engine with what a report says about it.
pub(super) struct Bench {
    pub(super) started: Started,
    /// The model, for people.
    pub(super) model: String,
    /// How its weights are stored.
    weights: String,
    /// What the operations took, if that is asked for.
    profile: Option<Profile>,
    expert_tally: ExpertTally,
}

/// What is to be built, and what a report says about it.
pub(super) struct Prepared {
    pub(super) builder: EngineBuilder,
    /// The model, for people.
    pub(super) model: String,
    /// How its weights are stored.
    pub(super) weights: String,
    /// Where operations put their times, if that is asked for.
    pub(super) profile: Option<Profile>,
    /// The other ranks.
    pub(super) ranks: RankArgs,
    /// To be finished when the weights are there.
    pub(super) bar: progress::ByteBar,
}

impl BenchModel {
    /// Loads the model and starts its engine. `None` on a rank that has followed another's engine to its end.
    pub(super) fn start(self, load: Load) -> anyhow::Result<Option<Bench>> {
        let Prepared { builder, model, weights, profile, ranks, bar } =
            self.prepare(|sizes, options| sizes.apply_for_load(options, load.num_seqs, load.num_tokens))?;
        if ranks.is_follower()? {
            ranks.follow(builder, false)?;
            return Ok(None);
        }
        let expert_tally = ExpertTally::default();
        let started = ranks.apply(builder.expert_tally(expert_tally.clone()))?.start();
        bar.finish();
        let started = started.with_context(|| {
            let Load { num_seqs, num_tokens } = load;
            format!("this benchmark needs room for {num_seqs} sequences of up to {num_tokens} tokens; other sizes: see --help")
        })?;
        Ok(Some(Bench { started, model, weights, profile, expert_tally }))
    }

    /// Everything but the loading; `set_sizes` has the last word about sizes.
    pub(super) fn prepare(
        self,
        set_sizes: impl FnOnce(&SizeArgs, &mut EngineOptions),
    ) -> anyhow::Result<Prepared> {
        let is_dummy = match (self.load_format, &self.config) {
            (Some(LoadFormatArg::Auto), Some(config)) => {
                bail!(
                    "--config {config}: a configuration has random weights only; name a checkpoint as MODEL instead"
                )
            }
            (format, config) => format == Some(LoadFormatArg::Dummy) || config.is_some(),
        };
        let chosen = match self.config {
            Some(config) => folder_of(&config)?,
            None => self.model.choose()?.model,
        };
        let mut builder = self.head.apply(self.device.apply(EngineBuilder::new(&chosen))).seed(self.seed);
        let mut weights = "as in the checkpoint".to_owned();
        if is_dummy {
            let quantization = match self.quantization {
                Some(quantization) => Some(quantization),
                None => default_quantization(&chosen)?,
            };
            let name = quantization.map_or("as configured".into(), |q| format!("{q:?}").to_lowercase());
            weights = format!("random, {name}");
            builder = builder.load_format(LoadFormat::Dummy);
            if let Some(quantization) = quantization {
                builder = builder.quantization(quantization.into());
            }
        } else if self.quantization.is_some() {
            bail!(
                "--quantization: a checkpoint has its own format; this flag is for random weights (--config, --load-format dummy)"
            );
        }
        if let Some(folder) = self.weight_cache {
            builder = builder.weight_cache(folder);
        }
        builder = builder.load_exchange(self.load_exchange);
        let profile = self.profile.then(Profile::default);
        if let Some(profile) = &profile {
            builder = builder.profile(profile.clone());
        }
        let bar = progress::ByteBar::new("loading");
        let shown = bar.clone();
        let builder = builder
            .on_progress(Arc::new(move |p| shown.update(p.bytes_read, p.bytes_total)))
            .engine(|options| set_sizes(&self.sizes, options));
        Ok(Prepared { builder, model: short_name(&chosen), weights, profile, ranks: self.ranks, bar })
    }
}

/// The last part of a path or an id.
fn short_name(model: &str) -> String {
    let name = Path::new(model).file_name().map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| model.to_owned())
}

/// A configuration file is named by its folder as well.
fn folder_of(config: &str) -> anyhow::Result<String> {
    let path = Path::new(config);
    if !path.is_file() {
        return Ok(config.to_owned());
    }
    let folder = path.parent().filter(|_| path.file_name().is_some_and(|name| name == "config.json"));
    let folder = folder.with_context(|| format!("--config {config}: a file must be called config.json"))?;
    Ok(if folder.as_os_str().is_empty() { ".".into() } else { folder.display().to_string() })
}

/// AWQ where the configuration names no format, as those of the published shapes do not.
fn default_quantization(model: &str) -> anyhow::Result<Option<QuantizationArg>> {
    let files = ModelFiles::open_config(model, None, None)?;
    let config = files.checkpoint.config();
    let is_named = config.get("quantization_config").is_some_and(|named| !named.is_null());
    Ok((!is_named).then_some(QuantizationArg::Awq))
}

impl Bench {
    /// One line for people: what was measured where, and how long the start took.
    pub(super) fn heading(&self) -> String {
        let Started { device, memory, times, .. } = &self.started;
        let seconds = |time: std::time::Duration| format!("{:.2} s", time.as_secs_f64());
        format!(
            "{} (weights {}) on {device}, KV cache {:?} for {} tokens\nstart-up: kernels {}, weights {}, buffers {}, \
             graphs {}; ready after {}",
            self.model,
            self.weights,
            memory.kv.dtype,
            memory.kv.num_blocks * memory.kv.block_size,
            seconds(times.kernels),
            seconds(times.load),
            seconds(times.state),
            seconds(times.graphs),
            seconds(times.ready),
        )
    }

    /// Distinct experts of a layer in a decode step of `batch` sequences behind prompts of `input_len` tokens, in the mean. Some steps
    /// beside the measured ones; `None` without experts, without decode steps, and in a group of ranks.
    pub(super) fn distinct_experts(
        &self,
        prompts: &mut Prompts,
        batch: usize,
        [input_len, output_len]: [usize; 2],
    ) -> anyhow::Result<Option<f64>> {
        if output_len < 2 {
            return Ok(None);
        }
        self.expert_tally.switch(true);
        let engine = &self.started.engine;
        let run = drive(engine, prompts.take(batch, input_len), output_len.min(TALLIED_TOKENS), batch);
        self.expert_tally.switch(false);
        run.map(|_| self.expert_tally.mean())
    }

    /// Forgets what operations took so far.
    pub(super) fn clear_profile(&self) {
        self.profile.iter().for_each(Profile::clear);
    }

    /// What operations took since it was cleared; nothing if that was not asked for.
    pub(super) fn profile(&self) -> String {
        self.profile.as_ref().map_or_else(String::new, |profile| format!("\n{profile}\n"))
    }

    /// The heading as JSON.
    pub(super) fn facts(&self) -> Value {
        let Started { device, memory, times, .. } = &self.started;
        let StartTimes { kernels, load, state, graphs, ready } = times;
        json!({
            "model": self.model,
            "weights": self.weights,
            "device": device,
            "kv_cache_dtype": format!("{:?}", memory.kv.dtype).to_lowercase(),
            "kv_cache_tokens": memory.kv.num_blocks * memory.kv.block_size,
            "startup_s": {
                "kernels": kernels.as_secs_f64(),
                "load": load.as_secs_f64(),
                "buffers": state.as_secs_f64(),
                "graphs": graphs.as_secs_f64(),
                "ready": ready.as_secs_f64(),
            },
            "version": env!("CARGO_PKG_VERSION"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_weights_are_awq_unless_the_configuration_says_more() {
        let fixture = |name: &str| spark_testing::model_dir(name).display().to_string();
        assert_eq!(default_quantization("qwen3-30b-a3b").unwrap(), Some(QuantizationArg::Awq));
        assert_eq!(default_quantization(&fixture("moe_vl_bf16")).unwrap(), Some(QuantizationArg::Awq));
        assert_eq!(default_quantization(&fixture("text_moe_fp8_block")).unwrap(), None);
    }

    #[test]
    fn a_configuration_is_a_name_a_folder_or_its_file() {
        let folder = spark_testing::model_dir("moe_vl_bf16");
        let file = folder.join("config.json").display().to_string();
        assert_eq!(folder_of("qwen3-30b-a3b").unwrap(), "qwen3-30b-a3b");
        assert_eq!(folder_of(&file).unwrap(), folder.display().to_string());
        let other = folder.join("oracle.json").display().to_string();
        assert!(folder_of(&other).unwrap_err().to_string().contains("config.json"));
    }
}
