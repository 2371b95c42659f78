//! From an opened model to an engine of token ids: choose the backend, load, size, start. The only place that chooses a
//! backend. Text and images are the builder's.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use spark_backend::{Backend, Dtype, Memory};
use spark_cpu::CpuBackend;
use spark_cuda::{CudaBackend, CudaOptions, Driver, KernelOptions, MAX_ALTERNATIVES, Profile};
use spark_models::Qwen3Vl;
use spark_runtime::{EngineHandle, EngineOptions, MemoryPlan, MemoryUse};
use spark_weights::{LoadOptions, LoadStrategy, Params, ProgressFn};

use crate::{Error, ModelFiles, Result};

/// The GPU that is used: the first of those that the process sees (CUDA_VISIBLE_DEVICES).
const ORDINAL: usize = 0;

/// Most tokens in a step on a GPU unless said: each of many experts then gets enough rows of a prompt to be worth reading its
/// weights.
const GPU_BATCHED_TOKENS: usize = 8192;

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// A GPU if there is one that the engine can use, else the CPU.
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

/// A running engine of token ids, and how it started.
pub struct Started {
    /// The engine: submit requests through [`spark_api::Engine`].
    pub engine: EngineHandle,
    /// What it computes on: the GPU's name, or the CPU with its threads.
    pub device: String,
    /// How the device's memory is divided.
    pub memory: MemoryPlan,
    /// Where the time went.
    pub times: StartTimes,
}

/// Where the time of a start went.
#[derive(Debug, Clone, Copy, Default)]
pub struct StartTimes {
    /// Opening the device and its kernels, compiled or found compiled.
    pub kernels: Duration,
    /// Weights: read or made, converted and brought to the device.
    pub load: Duration,
    /// KV pool, slots and buffers.
    pub state: Duration,
    /// Getting ready for steps: recording graphs.
    pub graphs: Duration,
    /// All of it, from the opened model to readiness.
    pub ready: Duration,
}

/// What [`start`](Settings::start) needs besides the model.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) dtype: Option<Dtype>,
    pub(crate) device: Device,
    pub(crate) kernel_dir: Option<PathBuf>,
    pub(crate) enforce_eager: bool,
    pub(crate) profile: Option<Profile>,
    pub(crate) load_format: LoadFormat,
    pub(crate) load_strategy: LoadStrategy,
    pub(crate) threads: Option<usize>,
    pub(crate) options: EngineOptions,
    pub(crate) progress: Option<ProgressFn>,
    pub(crate) seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            dtype: None,
            device: Device::Auto,
            kernel_dir: None,
            enforce_eager: false,
            profile: None,
            load_format: LoadFormat::Auto,
            load_strategy: LoadStrategy::default(),
            threads: None,
            options: EngineOptions::default(),
            progress: None,
            seed: 0,
        }
    }
}

impl Settings {
    /// Loads the model and starts its engine; blocks until it is ready. `vocab_size` is the number of real tokens.
    pub(crate) fn start(&self, files: ModelFiles, vocab_size: usize) -> Result<Started> {
        let began = Instant::now();
        let dtype = self.dtype.unwrap_or_else(|| files.auto_dtype());
        self.with_backend(dtype, StartEngine { files, vocab_size, began })
    }

    /// Chooses the backend and hands it to `user`.
    pub(crate) fn with_backend<U: UseBackend>(&self, dtype: Dtype, user: U) -> Result<U::Output> {
        let Some(gpu) = self.choose_gpu(dtype)? else {
            if self.enforce_eager {
                tracing::warn!("no effect: --enforce-eager: there are no graphs on the CPU");
            }
            if self.profile.is_some() {
                tracing::warn!("no effect: --profile: operations are timed on a GPU only");
            }
            let threads = self.threads.unwrap_or_else(num_cores);
            let backend = CpuBackend::new(dtype, self.threads)?;
            return user.run(self, backend, format!("CPU, {threads} threads"));
        };
        if self.options.max_logprobs > MAX_ALTERNATIVES {
            let problem =
                format!("a GPU reports at most {MAX_ALTERNATIVES}, not {}", self.options.max_logprobs);
            return Err(Error::option("--max-logprobs", problem));
        }
        let name = gpu.properties().name.clone();
        let kernels = KernelOptions { kernel_dir: self.kernel_dir.clone(), ..KernelOptions::default() };
        let (enforce_eager, profile) = (self.enforce_eager, self.profile.clone());
        let backend = CudaBackend::new(&CudaOptions { ordinal: ORDINAL, kernels, enforce_eager, profile });
        // Until here `gpu` has kept the device open.
        drop(gpu);
        let mut settings = self.clone();
        let tokens = GPU_BATCHED_TOKENS.max(self.options.max_num_seqs);
        settings.options.max_num_batched_tokens.get_or_insert(tokens);
        user.run(&settings, backend.map_err(spark_backend::Error::from)?, name)
    }

    /// Takes the model to `backend`, and divides the memory that is left.
    pub(crate) fn load<B: Backend>(
        &self,
        files: ModelFiles,
        backend: &B,
    ) -> Result<(Qwen3Vl<B>, MemoryPlan)> {
        let before = backend.memory()?;
        let mut params = self.params(&files, before)?;
        let mean_std = self.options.image_mean_std;
        let model = Qwen3Vl::load(files.config, files.has_lm_head, mean_std, &mut params, backend)?;
        params.finish()?;
        let memory = MemoryUse { before, now: backend.memory()? };
        let activation_bytes = |spec: &_| backend.activation_bytes(spec);
        let plan = MemoryPlan::new(model.config(), &self.options, backend.dtype(), memory, activation_bytes)?;
        Ok((model, plan))
    }

    /// The GPU to compute on; `None` is the CPU. Says which it is and, where nothing was said, why.
    fn choose_gpu(&self, dtype: Dtype) -> Result<Option<spark_cuda::Device>> {
        if self.device == Device::Cpu {
            tracing::info!("computing on the CPU");
            return Ok(None);
        }
        let gpu = Driver::open().and_then(|driver| driver.device(ORDINAL));
        match (gpu, dtype, self.device) {
            (Ok(gpu), Dtype::Bf16, _) => {
                let is = gpu.properties();
                tracing::info!("computing on {} ({}, driver for CUDA {})", is.name, is.arch, is.driver);
                Ok(Some(gpu))
            }
            (Ok(_), _, Device::Cuda) => {
                let problem =
                    "a GPU computes in bfloat16 only; use --dtype bfloat16, or --device cpu for float32";
                Err(Error::option("--dtype", problem))
            }
            (Ok(gpu), ..) => {
                let name = &gpu.properties().name;
                tracing::info!(
                    "computing on the CPU: float32 is asked for, and {name} computes in bfloat16 only"
                );
                Ok(None)
            }
            (Err(error), _, Device::Cuda) => Err(Error::option("--device", format!("cuda: {error}"))),
            (Err(error), ..) => {
                tracing::info!("computing on the CPU; no GPU can be used: {error}");
                Ok(None)
            }
        }
    }

    /// Parameters that are read, or made up, while the model takes them.
    fn params(&self, files: &ModelFiles, memory: Memory) -> Result<Params> {
        let config = files.checkpoint.config();
        Ok(match self.load_format {
            // Only memory that is not the machine's holds what the machine's does not.
            LoadFormat::Dummy if memory.is_shared => spark_weights::dummy(config, &files.specs, self.seed)?,
            LoadFormat::Dummy => spark_weights::dummy_for_device(config, &files.specs, self.seed)?,
            LoadFormat::Auto => {
                let options = LoadOptions {
                    strategy: self.load_strategy,
                    progress: self.progress.clone(),
                    threads: self.threads.unwrap_or(0),
                    ..LoadOptions::default()
                };
                files.checkpoint.stream(&files.specs, &options)?
            }
        })
    }
}

/// Something that is done with the chosen backend, whichever it is.
pub(crate) trait UseBackend {
    /// What comes of it.
    type Output;

    /// Does it. `settings` are those that suit the backend; `device` is for people.
    ///
    /// # Errors
    /// Its own, and those of the backend.
    fn run<B: Backend>(self, settings: &Settings, backend: B, device: String) -> Result<Self::Output>;
}

struct StartEngine {
    files: ModelFiles,
    vocab_size: usize,
    began: Instant,
}

impl UseBackend for StartEngine {
    type Output = Started;

    fn run<B: Backend>(self, settings: &Settings, backend: B, device: String) -> Result<Started> {
        let Self { files, vocab_size, began } = self;
        let kernels = began.elapsed();
        let (model, memory) = settings.load(files, &backend)?;
        let load = began.elapsed() - kernels;
        let engine = spark_runtime::start(backend, model, &settings.options, &memory, vocab_size)?;
        let (state, graphs) = engine.start_times();
        let times = StartTimes { kernels, load, state, graphs, ready: began.elapsed() };
        tracing::info!(
            kernels_ms = kernels.as_millis(),
            load_ms = load.as_millis(),
            graphs_ms = graphs.as_millis(),
            ready_ms = times.ready.as_millis(),
            kv_tokens = memory.kv.num_blocks * memory.kv.block_size,
            "started"
        );
        Ok(Started { engine, device, memory, times })
    }
}

fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
