//! From a model's name to a running engine with its front end: open the files, start the engine, put text and images
//! before it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use spark_backend::{Dtype, ExpertTally};
use spark_cuda::Profile;
use spark_models::{EncoderSplit, HeadDtype, MoeParallel, VisionConfig};
use spark_runtime::EngineOptions;
use spark_server::{FrontEnd, Options, SamplingDefaults};
use spark_text::{ChatTemplate, TextError, Tokenizer};
use spark_vision::{
    Alpha, DecodeOptions, ImageProcessor, ImageProcessorOverrides, VideoProcessor, VideoProcessorConfig,
};
use spark_weights::{LoadStrategy, ProgressFn};

use crate::{
    Device, EncoderTimes, Error, LoadFormat, ModelFiles, NativeFp4, Pictures, PrefillActivations,
    Quantization, Ranks, Result, SparkEngine, Started,
    encoder::EncodePictures,
    generation_defaults,
    start::{Reopen, Settings},
};

type ChangeOptions = Box<dyn FnOnce(&mut Options) + Send>;

/// Builds a [`SparkEngine`]. Every setting has a default; names follow vLLM's flags.
#[must_use]
pub struct EngineBuilder {
    model: String,
    revision: Option<String>,
    settings: Settings,
    quantization: Option<Quantization>,
    processor: ImageProcessorOverrides,
    use_generation_config: bool,
    served_names: Vec<String>,
    chat_template: Option<PathBuf>,
    tokenizer: Option<PathBuf>,
    front_end: Option<ChangeOptions>,
}

impl EngineBuilder {
    /// For a checkpoint folder, or a Hugging Face id that is in the local cache.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            revision: None,
            settings: Settings::default(),
            quantization: None,
            processor: ImageProcessorOverrides::default(),
            use_generation_config: true,
            served_names: Vec::new(),
            chat_template: None,
            tokenizer: None,
            front_end: None,
        }
    }

    /// Branch, tag or commit of a Hugging Face id.
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = Some(revision.into());
        self
    }

    /// Where the files of the model are.
    ///
    /// # Errors
    /// There is no such model, or its files contradict each other.
    pub fn model_folder(&self) -> Result<PathBuf> {
        let files = ModelFiles::open(&self.model, self.revision.clone())?;
        Ok(files.checkpoint.dir().to_owned())
    }

    /// Compute dtype; by default the checkpoint's, with half precision computed in bfloat16.
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.settings.dtype = Some(dtype);
        self
    }

    /// Where to compute.
    pub fn device(mut self, device: Device) -> Self {
        self.settings.device = device;
        self
    }

    /// A folder of compiled kernels (`spark-engine kernels build`), for machines without NVIDIA's compiler.
    pub fn kernel_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.settings.kernel_dir = Some(folder.into());
        self
    }

    /// Whether the GPU runs every step call by call instead of replaying recorded graphs.
    pub fn enforce_eager(mut self, eager: bool) -> Self {
        self.settings.enforce_eager = eager;
        self
    }

    /// Takes the time of every operation on the GPU into `profile`; steps are slower then, and not recorded.
    pub fn profile(mut self, profile: Profile) -> Self {
        self.settings.profile = Some(profile);
        self
    }

    /// Counts the distinct experts of decode steps while `tally` is on; such steps are slower on a GPU. No effect in a group of ranks.
    pub fn expert_tally(mut self, tally: ExpertTally) -> Self {
        self.settings.expert_tally = Some(tally);
        self
    }

    /// Format of dummy weights; by default what the configuration says.
    pub fn quantization(mut self, quantization: Quantization) -> Self {
        self.quantization = Some(quantization);
        self
    }

    /// Where weights come from.
    pub fn load_format(mut self, format: LoadFormat) -> Self {
        self.settings.load_format = format;
        self
    }

    /// How files are read.
    pub fn load_strategy(mut self, strategy: LoadStrategy) -> Self {
        self.settings.load_strategy = strategy;
        self
    }

    /// How the output head is kept; by default as the checkpoint has it.
    pub fn lm_head_dtype(mut self, dtype: HeadDtype) -> Self {
        self.settings.lm_head_dtype = dtype;
        self
    }

    /// What ranks split of the vision encoder: its media unless said.
    pub fn encoder_split(mut self, split: EncoderSplit) -> Self {
        self.settings.encoder_split = split;
        self
    }

    /// What activations are in products of many rows with NVFP4 weights; bfloat16 unless said.
    pub fn native_fp4(mut self, native_fp4: NativeFp4) -> Self {
        self.settings.native_fp4 = native_fp4;
        self
    }

    /// What activations are in products of many rows with 4-bit integer weights; bfloat16 unless said.
    pub fn prefill_activations(mut self, activations: PrefillActivations) -> Self {
        self.settings.prefill_activations = activations;
        self
    }

    /// How ranks share the experts of a layer; a slice of each unless said. No effect on one rank.
    pub fn moe_parallel(mut self, parallel: MoeParallel) -> Self {
        self.settings.moe_parallel = parallel;
        self
    }

    /// A folder where what this rank holds is kept for its next start.
    pub fn weight_cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.settings.weight_cache = Some(folder.into());
        self
    }

    /// Lets the ranks of a group read for each other: each reads about its share of the checkpoint and sends the others what they
    /// need of it. Faster than reading alone where the way between the ranks is faster than their disks.
    pub fn load_exchange(mut self, exchange: bool) -> Self {
        self.settings.load_exchange = exchange;
        self
    }

    /// Threads of the CPU backend; by default one per core.
    pub fn threads(mut self, threads: usize) -> Self {
        self.settings.threads = Some(threads);
        self
    }

    /// Sizes and policies, changed in place.
    pub fn engine(mut self, change: impl FnOnce(&mut EngineOptions)) -> Self {
        change(&mut self.settings.options);
        self
    }

    /// What to change in the image processor's settings (`--mm-processor-kwargs`).
    pub fn image_processor(mut self, overrides: ImageProcessorOverrides) -> Self {
        self.processor = overrides;
        self
    }

    /// Whether sampling defaults come from `generation_config.json`; `true` unless said.
    pub fn generation_config(mut self, use_it: bool) -> Self {
        self.use_generation_config = use_it;
        self
    }

    /// Names under which the model is served; by default the model as given.
    pub fn served_names(mut self, names: Vec<String>) -> Self {
        self.served_names = names;
        self
    }

    /// A Jinja file to use instead of the checkpoint's chat template.
    pub fn chat_template(mut self, path: impl Into<PathBuf>) -> Self {
        self.chat_template = Some(path.into());
        self
    }

    /// A folder whose tokenizer, chat template and image processor settings to use instead of the checkpoint's.
    pub fn tokenizer(mut self, folder: impl Into<PathBuf>) -> Self {
        self.tokenizer = Some(folder.into());
        self
    }

    /// Options of the OpenAI front end, changed in place once the model is known.
    pub fn front_end(mut self, change: impl FnOnce(&mut Options) + Send + 'static) -> Self {
        self.front_end = Some(Box::new(change));
        self
    }

    /// Called from loading threads as weights arrive.
    pub fn on_progress(mut self, progress: ProgressFn) -> Self {
        self.settings.progress = Some(progress);
        self
    }

    /// First of the seeds for requests that bring none, and the seed of dummy weights.
    pub fn seed(mut self, seed: u64) -> Self {
        self.settings.seed = seed;
        self
    }

    /// The place of this process in a group of ranks. Rank 0 [builds](Self::build) or [starts](Self::start) the engine, the
    /// others [follow](Self::follow) it.
    pub fn ranks(mut self, ranks: Ranks) -> Self {
        self.settings.ranks = Some(ranks);
        self
    }

    /// Loads the model and starts the engine. Blocks until it is ready.
    ///
    /// # Errors
    /// Says what is wrong with the model, the options or the memory.
    pub fn build(mut self) -> Result<SparkEngine> {
        let files = self.open()?;
        let dir = self.tokenizer.clone().unwrap_or_else(|| files.checkpoint.dir().to_owned());
        let tokenizer = Arc::new(Tokenizer::from_dir(&dir)?);
        let template = self.open_template(&dir, &tokenizer)?;
        let (processor, videos) = match files.config.vision {
            Some(ref vision) => {
                let processor = self.open_processor(&dir, vision)?;
                let config = VideoProcessorConfig::from_folder(&dir, processor.config())?;
                let videos = VideoProcessor::new(config, processor.config(), hash_key()?);
                (Some(processor), Some(Arc::new(videos)))
            }
            None => (None, None),
        };
        let mut options = Options::new(&self.model);
        if self.use_generation_config {
            options.sampling_defaults = generation_defaults(&files.checkpoint)?;
        } else {
            options.sampling_defaults = SamplingDefaults::neutral();
        }
        if !self.served_names.is_empty() {
            options.served_names = std::mem::take(&mut self.served_names);
        }
        options.seed = Some(self.settings.seed);
        if let Some(change) = self.front_end.take() {
            change(&mut options);
        }
        let handle = self.settings.start(files, tokenizer.vocab_size(), self.reopen())?.engine;
        let front_end =
            FrontEnd::new(Arc::new(handle.clone()), tokenizer.clone(), template, processor, options);
        let front_end = match videos {
            Some(videos) => front_end.with_videos(videos),
            None => front_end,
        };
        Ok(SparkEngine::new(handle, Arc::new(front_end), tokenizer))
    }

    /// Loads the model and starts an engine of token ids alone: it needs no tokenizer, no template and no image processor.
    /// Blocks until it is ready.
    ///
    /// # Errors
    /// As for [`EngineBuilder::build`].
    pub fn start(mut self) -> Result<Started> {
        let files = self.open()?;
        let vocab_size = files.config.text.vocab_size;
        self.settings.start(files, vocab_size, self.reopen())
    }

    /// Computes for rank 0 until its engine ends; for every other rank of a group, with the same settings. `has_images` says
    /// whether rank 0's engine is [built](Self::build) with an image processor or [started](Self::start) without. Blocks.
    ///
    /// # Errors
    /// As for [`EngineBuilder::build`]; rank 0 is lost, or the ranks' results differ.
    pub fn follow(mut self, has_images: bool) -> Result<()> {
        let files = self.open()?;
        if let (true, Some(vision)) = (has_images, &files.config.vision) {
            let dir = self.tokenizer.clone().unwrap_or_else(|| files.checkpoint.dir().to_owned());
            self.open_processor(&dir, vision)?;
        }
        self.settings.follow(files)
    }

    /// Loads the model and measures its vision encoder alone: every entry of `pictures`, `repetitions` times after one run that does
    /// not count. The encoder cache is as large as they need. Every rank of a group must call this: pictures of a step are divided. Blocks.
    ///
    /// # Errors
    /// As for [`EngineBuilder::build`]; a text model, or sides that the encoder does not take.
    pub fn measure_encoder(mut self, pictures: &[Pictures], repetitions: usize) -> Result<EncoderTimes> {
        let files = self.open()?;
        let vision = files.config.vision.as_ref();
        let token = vision.map_or(1, |v| v.patch_size * v.spatial_merge_size).max(1);
        let most_tokens = pictures.iter().map(|pictures| pictures.most_tokens(token)).max();
        self.settings.options.encoder_cache_tokens = most_tokens.unwrap_or(1).max(1);
        self.settings.options.check(&files.config)?;
        let dtype = self.settings.dtype.unwrap_or_else(|| files.auto_dtype());
        let timeout = self.settings.ranks.as_ref().map_or(Duration::ZERO, |ranks| ranks.join_timeout);
        let joining = self.settings.joining(&files, timeout)?;
        let encode = EncodePictures { files, pictures, repetitions };
        self.settings.with_backend(dtype, joining.as_ref(), encode)
    }

    /// The model's files, with options that fit them.
    fn open(&mut self) -> Result<ModelFiles> {
        let files = self.reopen()()?;
        self.settings.options.check(&files.config)?;
        Ok(files)
    }

    /// Opens the model's files, as often as it is called.
    fn reopen(&self) -> Reopen {
        let (model, revision) = (self.model.clone(), self.revision.clone());
        let (load_format, quantization) = (self.settings.load_format, self.quantization);
        let (experts, encoder) = (self.settings.moe_parallel, self.settings.encoder_split);
        Box::new(move || {
            let files = match (load_format, quantization) {
                (LoadFormat::Auto, None) => ModelFiles::open(&model, revision.clone()),
                (LoadFormat::Auto, Some(_)) => {
                    let problem =
                        "only dummy weights have a format that can be chosen; a checkpoint has its own";
                    Err(Error::option("--quantization", problem))
                }
                (LoadFormat::Dummy, quantization) => {
                    ModelFiles::open_config(&model, revision.clone(), quantization)
                }
            }?;
            files.shared(experts, encoder)
        })
    }

    /// Without a template the model still completes prompts; a chat is then a 400.
    fn open_template(&self, dir: &Path, tokenizer: &Tokenizer) -> Result<Option<Arc<ChatTemplate>>> {
        let template = match &self.chat_template {
            Some(path) => ChatTemplate::from_file(path, dir, tokenizer),
            None => ChatTemplate::from_dir(dir, tokenizer),
        };
        match template {
            Ok(template) => Ok(Some(Arc::new(template))),
            Err(error @ TextError::NoTemplate { .. }) => {
                tracing::warn!("chats will be refused: {error}");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn open_processor(&mut self, dir: &Path, vision: &VisionConfig) -> Result<Arc<ImageProcessor>> {
        let decode = DecodeOptions::new(Alpha::OverWhite);
        let processor = ImageProcessor::from_folder(dir, &self.processor, decode, hash_key()?)?;
        let config = processor.config();
        for (name, ours, models) in [
            ("patch_size", config.patch_size, vision.patch_size),
            ("temporal_patch_size", config.temporal_patch_size, vision.temporal_patch_size),
            ("merge_size", config.merge_size, vision.spatial_merge_size),
        ] {
            if ours != models {
                let problem =
                    format!("{name} is {ours} in {}, but the model was made for {models}", dir.display());
                return Err(Error::option("image processor", problem));
            }
        }
        self.settings.options.image_mean_std = (processor.config().image_mean, processor.config().image_std);
        Ok(Arc::new(processor))
    }
}

/// A key for hashes that nobody outside can guess.
fn hash_key() -> Result<[u8; 32]> {
    let mut key = [0; 32];
    getrandom::fill(&mut key)
        .map_err(|e| Error::option("random numbers", format!("the system gave none: {e}")))?;
    Ok(key)
}
