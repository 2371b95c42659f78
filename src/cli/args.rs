//! Flags that every command with a model shares. Names and meanings are vLLM's where vLLM has them.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context;
use clap::{Args, ValueEnum};
use spark_engine::{EngineBuilder, ImageProcessorOverrides, LoadFormat, LoadStrategy, SparkEngine};

use super::{
    compat::CompatArgs, device::DeviceArgs, model_name::ModelName, parsers::ParserArgs, progress,
    ranks::RankArgs, sizes::SizeArgs,
};

/// Which model and how to run it.
#[derive(Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    pub(crate) model: ModelName,
    /// Branch, tag or commit of a Hugging Face id.
    #[arg(long)]
    pub(crate) revision: Option<String>,
    /// Names under which the model is served; by default MODEL.
    #[arg(long, num_args = 1.., value_name = "NAME")]
    pub(crate) served_model_name: Vec<String>,
    /// Folder of another tokenizer (with its chat template and image processor settings).
    #[arg(long, value_name = "FOLDER")]
    tokenizer: Option<PathBuf>,
    /// A Jinja file to use instead of the checkpoint's chat template.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// First seed for requests that bring none, and the seed of dummy weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where sampling defaults come from: the checkpoint's generation_config.json (`auto`) or OpenAI's (`vllm`).
    #[arg(long, value_enum, default_value = "auto")]
    generation_config: GenerationConfigArg,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    loading: LoadingArgs,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    media: MediaArgs,
    #[command(flatten)]
    parsers: ParserArgs,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
    #[command(flatten)]
    compat: CompatArgs,
    /// What only the server sets.
    #[arg(skip)]
    serving: Option<Serving>,
}

/// Settings of the front end that make sense only where strangers ask.
struct Serving {
    max_num_queued_tokens: usize,
    log_requests: bool,
}

#[derive(Args)]
#[command(next_help_heading = "Loading")]
struct LoadingArgs {
    /// Weights: the checkpoint's (`auto`), or random ones of the right shapes (`dummy`, for measuring speed; needs only
    /// config.json and a tokenizer, and MODEL may name a published shape: qwen3-vl-235b-a22b, qwen3-vl-30b-a3b,
    /// qwen3-vl-8b or qwen3-30b-a3b).
    #[arg(long, value_enum, default_value = "auto")]
    load_format: LoadFormatArg,
    /// Read files with large direct reads (`eager`) or map them (`lazy`).
    #[arg(long, value_enum, default_value = "eager")]
    safetensors_load_strategy: StrategyArg,
    /// Keep what each rank holds in this folder, ready for its next start; it is made anew when the checkpoint changes.
    #[arg(long, value_name = "FOLDER")]
    weight_cache: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "Images")]
struct MediaArgs {
    /// Encoder cache in image tokens; also the largest image.
    #[arg(long, default_value_t = 16_384, value_name = "TOKENS")]
    encoder_cache_tokens: usize,
    /// Most image tokens encoded in a step.
    #[arg(long, default_value_t = 16_384, value_name = "TOKENS")]
    max_encoder_tokens_per_step: usize,
    /// Image processor settings as JSON, for example '{"max_pixels": 1048576}'.
    #[arg(long, value_name = "JSON")]
    mm_processor_kwargs: Option<String>,
    /// Most images in a prompt: a number, or JSON such as '{"image": 4}'.
    #[arg(long, default_value = "64", value_name = "LIMIT")]
    limit_mm_per_prompt: String,
    /// Host cache of processed images, in GiB.
    #[arg(long, default_value_t = 4.0, value_name = "GIB")]
    mm_processor_cache_gb: f64,
}

#[derive(Clone, Copy, ValueEnum)]
enum GenerationConfigArg {
    Auto,
    Vllm,
}

#[derive(Clone, Copy, ValueEnum)]
enum LoadFormatArg {
    #[value(alias = "safetensors")]
    Auto,
    Dummy,
}

#[derive(Clone, Copy, ValueEnum)]
enum StrategyArg {
    Eager,
    Lazy,
}

impl ModelArgs {
    /// For a command that bounds its requests itself.
    pub(crate) fn without_queue_limit(mut self) -> Self {
        self.sizes.without_queue_limit();
        self
    }

    /// The same for a server.
    pub(crate) fn for_server(mut self, max_num_queued_tokens: usize) -> Self {
        let log_requests = !self.compat.disable_log_requests;
        self.serving = Some(Serving { max_num_queued_tokens, log_requests });
        self
    }

    /// Loads the model with a progress bar and starts the engine.
    pub(crate) fn build(self) -> anyhow::Result<SparkEngine> {
        let (builder, ranks, bar) = self.prepare()?;
        let engine = ranks.apply(builder)?.build();
        bar.finish();
        Ok(engine?)
    }

    /// Computes for rank 0 until it ends: what every command does on the other ranks.
    pub(crate) fn follow(self) -> anyhow::Result<()> {
        let (builder, ranks, _) = self.prepare()?;
        ranks.follow(builder, true)
    }

    /// Everything but the loading.
    fn prepare(self) -> anyhow::Result<(EngineBuilder, RankArgs, progress::ByteBar)> {
        self.compat.warn();
        let model = self.model.choose()?;
        let served_names = match self.served_model_name.is_empty() {
            true => model.served_name.into_iter().collect(),
            false => self.served_model_name,
        };
        let max_images = parse_media_limit(&self.media.limit_mm_per_prompt)?;
        let overrides = match &self.media.mm_processor_kwargs {
            Some(json) => serde_json::from_str(json).context("--mm-processor-kwargs")?,
            None => ImageProcessorOverrides::default(),
        };
        let cache_bytes = (self.media.mm_processor_cache_gb.max(0.0) * f64::from(1 << 30)) as usize;
        let bar = progress::ByteBar::new("loading");
        let mut builder = EngineBuilder::new(model.model)
            .load_format(match self.loading.load_format {
                LoadFormatArg::Auto => LoadFormat::Auto,
                LoadFormatArg::Dummy => LoadFormat::Dummy,
            })
            .load_strategy(match self.loading.safetensors_load_strategy {
                StrategyArg::Eager => LoadStrategy::Eager,
                StrategyArg::Lazy => LoadStrategy::Lazy,
            })
            .generation_config(matches!(self.generation_config, GenerationConfigArg::Auto))
            .served_names(served_names)
            .image_processor(overrides)
            .seed(self.seed)
            .front_end(move |options| {
                options.mm_processor_cache_bytes = cache_bytes;
                self.parsers.apply(options);
                if let Some(Serving { max_num_queued_tokens, log_requests }) = self.serving {
                    (options.max_num_queued_tokens, options.log_requests) =
                        (max_num_queued_tokens, log_requests);
                }
            })
            .on_progress(Arc::new({
                let bar = bar.clone();
                move |progress| bar.update(progress.bytes_read, progress.bytes_total)
            }));
        builder = self.device.apply(builder);
        if let Some(folder) = self.loading.weight_cache {
            builder = builder.weight_cache(folder);
        }
        if let Some(revision) = self.revision {
            builder = builder.revision(revision);
        }
        if let Some(folder) = self.tokenizer {
            builder = builder.tokenizer(folder);
        }
        if let Some(path) = self.chat_template {
            builder = builder.chat_template(path);
        }
        let (sizes, media) = (self.sizes, self.media);
        builder = builder.engine(|options| {
            sizes.apply(options);
            options.encoder_cache_tokens = media.encoder_cache_tokens;
            options.max_encoder_tokens_per_step = media.max_encoder_tokens_per_step;
            options.limit_mm_per_prompt = max_images;
        });
        Ok((builder, self.ranks, bar))
    }
}

/// A number, or vLLM's `{"image": N}` (also as `image=N`).
fn parse_media_limit(text: &str) -> anyhow::Result<usize> {
    if let Ok(limit) = text.parse() {
        return Ok(limit);
    }
    if let Some(limit) = text.strip_prefix("image=").and_then(|n| n.parse().ok()) {
        return Ok(limit);
    }
    let value: serde_json::Value = serde_json::from_str(text).context("--limit-mm-per-prompt")?;
    let limit = value.get("image").and_then(serde_json::Value::as_u64);
    limit
        .map(|n| n as usize)
        .with_context(|| format!("--limit-mm-per-prompt {text}: expected a number or {{\"image\": N}}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_limits_come_in_three_spellings() {
        assert_eq!(parse_media_limit("4").unwrap(), 4);
        assert_eq!(parse_media_limit("image=2").unwrap(), 2);
        assert_eq!(parse_media_limit(r#"{"image": 7, "video": 0}"#).unwrap(), 7);
        assert!(parse_media_limit(r#"{"video": 1}"#).is_err());
        assert!(parse_media_limit("many").is_err());
    }
}
