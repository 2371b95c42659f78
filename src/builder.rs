//! From a model's name to a running engine: open, size, load, start. The only place that chooses a backend.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use spark_backend::{Backend, Dtype};
use spark_cpu::CpuBackend;
use spark_models::{Qwen3Vl, VisionConfig};
use spark_runtime::{EngineHandle, EngineOptions, HostMemory, MemoryPlan};
use spark_server::{FrontEnd, Options, SamplingDefaults};
use spark_text::{ChatTemplate, TextError, Tokenizer};
use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ImageProcessorOverrides};
use spark_weights::{LoadOptions, LoadStrategy, Params, ProgressFn};

use crate::{Error, ModelFiles, Result, SparkEngine, generation_defaults};

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// A GPU if this build can use one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU.
    Cuda,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The checkpoint's safetensors files.
    #[default]
    Auto,
    /// Random weights of the right shapes and schemes: for measuring speed, not for answers.
    Dummy,
}

type ChangeOptions = Box<dyn FnOnce(&mut Options) + Send>;

/// Builds a [`SparkEngine`]. Every setting has a default; names follow vLLM's flags.
#[must_use]
pub struct EngineBuilder {
    model: String,
    revision: Option<String>,
    dtype: Option<Dtype>,
    device: Device,
    load_format: LoadFormat,
    load_strategy: LoadStrategy,
    threads: Option<usize>,
    options: EngineOptions,
    processor: ImageProcessorOverrides,
    use_generation_config: bool,
    served_names: Vec<String>,
    chat_template: Option<PathBuf>,
    tokenizer: Option<PathBuf>,
    front_end: Option<ChangeOptions>,
    progress: Option<ProgressFn>,
    seed: u64,
}

impl EngineBuilder {
    /// For a checkpoint folder, or a Hugging Face id that is in the local cache.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            revision: None,
            dtype: None,
            device: Device::Auto,
            load_format: LoadFormat::Auto,
            load_strategy: LoadStrategy::default(),
            threads: None,
            options: EngineOptions::default(),
            processor: ImageProcessorOverrides::default(),
            use_generation_config: true,
            served_names: Vec::new(),
            chat_template: None,
            tokenizer: None,
            front_end: None,
            progress: None,
            seed: 0,
        }
    }

    /// Branch, tag or commit of a Hugging Face id.
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = Some(revision.into());
        self
    }

    /// Compute dtype; by default the checkpoint's, with half precision computed in bfloat16.
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Where to compute.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Where weights come from.
    pub fn load_format(mut self, format: LoadFormat) -> Self {
        self.load_format = format;
        self
    }

    /// How files are read.
    pub fn load_strategy(mut self, strategy: LoadStrategy) -> Self {
        self.load_strategy = strategy;
        self
    }

    /// Threads of the CPU backend; by default one per core.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Sizes and policies, changed in place.
    pub fn engine(mut self, change: impl FnOnce(&mut EngineOptions)) -> Self {
        change(&mut self.options);
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
        self.progress = Some(progress);
        self
    }

    /// First of the seeds for requests that bring none, and the seed of dummy weights.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Loads the model and starts the engine. Blocks until it is ready.
    ///
    /// # Errors
    /// Says what is wrong with the model, the options or the memory.
    pub fn build(mut self) -> Result<SparkEngine> {
        let files = match self.load_format {
            LoadFormat::Auto => ModelFiles::open(&self.model, self.revision.take())?,
            LoadFormat::Dummy => ModelFiles::open_config(&self.model, self.revision.take())?,
        };
        match self.device {
            Device::Auto | Device::Cpu => {}
            Device::Cuda => {
                return Err(Error::option(
                    "--device",
                    "this version computes on the CPU only; use --device auto or cpu",
                ));
            }
        }
        self.options.check(&files.config)?;
        let dtype = self.dtype.unwrap_or_else(|| files.auto_dtype());
        let dir = self.tokenizer.clone().unwrap_or_else(|| files.checkpoint.dir().to_owned());
        let tokenizer = Arc::new(Tokenizer::from_dir(&dir)?);
        let template = self.open_template(&dir, &tokenizer)?;
        let processor = match files.config.vision {
            Some(ref vision) => Some(self.open_processor(&dir, vision)?),
            None => None,
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
        options.seed = Some(self.seed);
        if let Some(change) = self.front_end.take() {
            change(&mut options);
        }
        let backend = CpuBackend::new(dtype, self.threads)?;
        let handle = self.start(files, backend, tokenizer.vocab_size())?;
        let front_end =
            FrontEnd::new(Arc::new(handle.clone()), tokenizer.clone(), template, processor, options);
        Ok(SparkEngine::new(handle, Arc::new(front_end), tokenizer))
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
        let mut hash_key = [0; 32];
        getrandom::fill(&mut hash_key)
            .map_err(|e| Error::option("random numbers", format!("the system gave none: {e}")))?;
        let decode = DecodeOptions::new(Alpha::OverWhite);
        let processor = ImageProcessor::from_folder(dir, &self.processor, decode, hash_key)?;
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
        self.options.image_mean_std = (processor.config().image_mean, processor.config().image_std);
        Ok(Arc::new(processor))
    }

    fn start<B: Backend>(self, files: ModelFiles, backend: B, vocab_size: usize) -> Result<EngineHandle> {
        let mut params = self.load(&files)?;
        let mean_std = self.options.image_mean_std;
        let dtype = backend.dtype();
        let model = Qwen3Vl::load(files.config, files.has_lm_head, mean_std, &mut params, &backend)?;
        params.finish()?;
        let plan = MemoryPlan::new(model.config(), &self.options, dtype, HostMemory::read()?)?;
        Ok(spark_runtime::start(backend, model, &self.options, &plan, vocab_size)?)
    }

    fn load(&self, files: &ModelFiles) -> Result<Params> {
        Ok(match self.load_format {
            LoadFormat::Dummy => spark_weights::dummy(files.checkpoint.config(), &files.specs, self.seed)?,
            LoadFormat::Auto => {
                let options = LoadOptions {
                    strategy: self.load_strategy,
                    progress: self.progress.clone(),
                    threads: self.threads.unwrap_or(0),
                    ..LoadOptions::default()
                };
                files.checkpoint.load(&files.specs, &options)?
            }
        })
    }
}
