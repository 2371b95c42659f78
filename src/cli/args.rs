//! Flags that every command with a model shares. Names and meanings are vLLM's where vLLM has them.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context;
use clap::{Args, ValueEnum};
use spark_engine::{
    Device, Dtype, EngineBuilder, ImageProcessorOverrides, KvCacheDtype, LoadFormat, LoadStrategy, Policy,
    SparkEngine,
};

use super::{compat::CompatArgs, model_name::ModelName, parsers::ParserArgs, progress};

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
    /// Compute in: `auto` takes the checkpoint's dtype, with half precision computed in bfloat16.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: DtypeArg,
    /// Compute on: `auto` takes a GPU if this build can use one.
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceArg,
    /// CPU threads; by default one per core.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Ranks of tensor parallelism.
    #[arg(long, visible_alias = "tp", default_value_t = 1, value_name = "N")]
    pub(crate) tensor_parallel_size: usize,
    /// First seed for requests that bring none, and the seed of dummy weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where sampling defaults come from: the checkpoint's generation_config.json (`auto`) or OpenAI's (`vllm`).
    #[arg(long, value_enum, default_value = "auto")]
    generation_config: GenerationConfigArg,
    #[command(flatten)]
    loading: LoadingArgs,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    media: MediaArgs,
    #[command(flatten)]
    parsers: ParserArgs,
    #[command(flatten)]
    compat: CompatArgs,
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
}

#[derive(Args)]
#[command(next_help_heading = "Memory and scheduling")]
struct SizeArgs {
    /// Longest sequence, prompt and output together; by default as long as model and memory allow.
    #[arg(long, value_name = "TOKENS")]
    max_model_len: Option<usize>,
    /// Most sequences that run at once.
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_num_seqs: usize,
    /// Most tokens in a step.
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    max_num_batched_tokens: usize,
    /// Most prefill tokens of one sequence in a step.
    #[arg(long, value_name = "TOKENS")]
    long_prefill_token_threshold: Option<usize>,
    /// Most requests that may wait; more are answered with 503.
    #[arg(long, value_name = "N")]
    max_num_queued_reqs: Option<usize>,
    /// Share of the machine's memory that the engine may use, weights included.
    #[arg(long, default_value_t = 0.9, value_name = "SHARE")]
    gpu_memory_utilization: f64,
    /// Size of the KV cache in bytes; overrides the share.
    #[arg(long, value_name = "BYTES")]
    kv_cache_memory_bytes: Option<u64>,
    /// KV storage: the compute dtype (`auto`), FP8 with a scale per token and head, or bfloat16.
    #[arg(long, value_enum, default_value = "auto")]
    kv_cache_dtype: KvDtypeArg,
    /// Do not reuse the KV of equal prefixes.
    #[arg(long, overrides_with = "enable_prefix_caching")]
    no_enable_prefix_caching: bool,
    /// Reuse the KV of equal prefixes (the default).
    #[arg(long)]
    enable_prefix_caching: bool,
    /// Order of requests.
    #[arg(long, value_enum, default_value = "fcfs")]
    scheduling_policy: PolicyArg,
    /// Plan a step only when the one before it is complete.
    #[arg(long, overrides_with = "async_scheduling")]
    no_async_scheduling: bool,
    /// Plan the next step while one is running (the default).
    #[arg(long)]
    async_scheduling: bool,
    /// Most alternatives that a request may ask for in log-probabilities.
    #[arg(long, default_value_t = 20, value_name = "N")]
    max_logprobs: usize,
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
enum DtypeArg {
    Auto,
    #[value(alias = "bf16")]
    Bfloat16,
    #[value(alias = "float")]
    Float32,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceArg {
    Auto,
    Cpu,
    Cuda,
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

#[derive(Clone, Copy, ValueEnum)]
enum KvDtypeArg {
    Auto,
    #[value(alias = "fp8_e4m3")]
    Fp8,
    #[value(name = "bf16", alias = "bfloat16")]
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum PolicyArg {
    Fcfs,
    Priority,
}

impl ModelArgs {
    /// For a command that bounds its requests itself.
    pub(crate) fn without_queue_limit(mut self) -> Self {
        if self.sizes.max_num_queued_reqs.take().is_some() {
            tracing::warn!(
                "no effect: --max-num-queued-reqs: this command waits instead of refusing requests"
            );
        }
        self
    }

    /// Loads the model with a progress bar and starts the engine.
    pub(crate) fn build(self) -> anyhow::Result<SparkEngine> {
        self.compat.warn();
        anyhow::ensure!(
            self.tensor_parallel_size == 1,
            "--tensor-parallel-size {}: this version runs one rank; `inspect --tp N` shows what N ranks would hold",
            self.tensor_parallel_size
        );
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
            .device(match self.device {
                DeviceArg::Auto => Device::Auto,
                DeviceArg::Cpu => Device::Cpu,
                DeviceArg::Cuda => Device::Cuda,
            })
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
            })
            .on_progress(Arc::new({
                let bar = bar.clone();
                move |progress| bar.update(progress.bytes_read, progress.bytes_total)
            }));
        builder = match self.dtype {
            DtypeArg::Auto => builder,
            DtypeArg::Bfloat16 => builder.dtype(Dtype::Bf16),
            DtypeArg::Float32 => builder.dtype(Dtype::F32),
        };
        if let Some(revision) = self.revision {
            builder = builder.revision(revision);
        }
        if let Some(folder) = self.tokenizer {
            builder = builder.tokenizer(folder);
        }
        if let Some(path) = self.chat_template {
            builder = builder.chat_template(path);
        }
        if let Some(threads) = self.threads {
            builder = builder.threads(threads);
        }
        let (sizes, media) = (self.sizes, self.media);
        let engine = builder.engine(|options| apply_sizes(options, &sizes, &media, max_images)).build();
        bar.finish();
        Ok(engine?)
    }
}

fn apply_sizes(
    options: &mut spark_engine::EngineOptions,
    sizes: &SizeArgs,
    media: &MediaArgs,
    max_images: usize,
) {
    options.max_model_len = sizes.max_model_len;
    options.max_num_seqs = sizes.max_num_seqs;
    options.max_num_batched_tokens = sizes.max_num_batched_tokens;
    options.long_prefill_token_threshold = sizes.long_prefill_token_threshold;
    options.max_num_queued_reqs = sizes.max_num_queued_reqs;
    options.gpu_memory_utilization = sizes.gpu_memory_utilization;
    options.kv_cache_memory_bytes = sizes.kv_cache_memory_bytes;
    options.kv_cache_dtype = match sizes.kv_cache_dtype {
        KvDtypeArg::Auto => KvCacheDtype::Auto,
        KvDtypeArg::Fp8 => KvCacheDtype::Fp8,
        KvDtypeArg::Bf16 => KvCacheDtype::Bf16,
    };
    options.enable_prefix_caching = !sizes.no_enable_prefix_caching;
    options.scheduling_policy = match sizes.scheduling_policy {
        PolicyArg::Fcfs => Policy::Fcfs,
        PolicyArg::Priority => Policy::Priority,
    };
    options.async_scheduling = !sizes.no_async_scheduling;
    options.max_logprobs = sizes.max_logprobs;
    options.encoder_cache_tokens = media.encoder_cache_tokens;
    options.max_encoder_tokens_per_step = media.max_encoder_tokens_per_step;
    options.limit_mm_per_prompt = max_images;
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
