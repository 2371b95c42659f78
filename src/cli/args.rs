//! Flags that every command with a model shares. Names and meanings are vLLM's where vLLM has them.

use std::{path::PathBuf, sync::Arc};

use clap::{Args, ValueEnum, builder::NonEmptyStringValueParser};
use spark_engine::{EngineBuilder, FailureHook, LoadFormat, LoadStrategy, SparkEngine, server::Observers};

use super::{
    answers::AnswerArgs, compat::CompatArgs, device::DeviceArgs, head::HeadArgs, media::MediaArgs,
    model_name::ModelName, parsers::ParserArgs, progress, ranks::RankArgs, sizes::SizeArgs,
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
    #[arg(long, num_args = 1.., value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
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
    answers: AnswerArgs,
    log_requests: bool,
    watchers: Watchers,
}

/// Who is told what happens in a server, and what it says of itself.
#[derive(Default)]
pub(crate) struct Watchers {
    /// Of requests that have ended.
    pub(crate) observers: Observers,
    /// Of failures of the engine.
    pub(crate) on_failure: FailureHook,
    /// What it was told, without secrets.
    pub(crate) settings: serde_json::Value,
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
    #[command(flatten)]
    head: HeadArgs,
    /// Keep what each rank holds in this folder, ready for its next start; it is made anew when the checkpoint changes.
    #[arg(long, value_name = "FOLDER")]
    weight_cache: Option<PathBuf>,
    /// Ranks read for each other: each reads about its share of the checkpoint from its disk and sends the others what they need
    /// of it, instead of reading whole what cannot be read in parts (82 % of an AWQ checkpoint for each of two ranks, 60 %
    /// of an NVFP4 or FP8 one). No effect with one rank, and while a rank starts from its --weight-cache.
    #[arg(long)]
    load_exchange: bool,
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
    pub(crate) fn for_server(
        mut self,
        max_num_queued_tokens: usize,
        answers: AnswerArgs,
        watchers: Watchers,
    ) -> Self {
        let log_requests = !self.compat.disable_log_requests;
        self.sizes.with_queue_limit();
        self.serving = Some(Serving { max_num_queued_tokens, answers, log_requests, watchers });
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
        let media = self.media.read()?;
        let (overrides, media_sizes) = (media.overrides.clone(), media.sizes);
        let on_failure =
            self.serving.as_ref().map(|serving| serving.watchers.on_failure.clone()).unwrap_or_default();
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
                media.apply(options);
                self.parsers.apply(options);
                if let Some(Serving { max_num_queued_tokens, answers, log_requests, watchers }) = self.serving
                {
                    answers.apply(options);
                    (options.max_num_queued_tokens, options.log_requests) =
                        (max_num_queued_tokens, log_requests);
                    (options.observers, options.settings) = (watchers.observers, watchers.settings);
                }
            })
            .on_progress(Arc::new({
                let bar = bar.clone();
                move |progress| bar.update(progress.bytes_read, progress.bytes_total)
            }));
        builder =
            self.loading.head.apply(self.device.apply(builder)).load_exchange(self.loading.load_exchange);
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
        let sizes = self.sizes;
        builder = builder.engine(|options| {
            sizes.apply(options);
            media_sizes.apply(options);
            options.on_failure = on_failure;
        });
        Ok((builder, self.ranks, bar))
    }
}
