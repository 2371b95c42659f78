//! From an opened model to an engine of token ids, or to a rank that follows one: choose the backend, load, size, start. The
//! only place that chooses a backend. Text and images are the builder's.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use spark_api::MAX_LOGPROB_TOKEN_IDS;
use spark_backend::{Backend, Dtype, ExpertTally, Memory, Rank};
use spark_cpu::CpuBackend;
use spark_cuda::{
    Arch, CudaBackend, CudaOptions, Driver, KernelOptions, MAX_ALTERNATIVES, MAX_NAMED_TOKENS, Profile,
};
use spark_models::{EncoderSplit, Head, HeadDtype, MoeParallel, Qwen3Vl};
use spark_runtime::{EngineHandle, EngineOptions, LeaderGroup, MemoryPlan, MemoryUse, Rebuild, Running};
use spark_weights::{Exchange, LoadOptions, LoadStrategy, Params, ProgressFn};

use crate::{Error, ModelFiles, Ranks, Result, fingerprint, ranks::Team};

/// Most tokens in a step on a GPU unless said: each of many experts then gets enough rows of a prompt to be worth reading its
/// weights.
const GPU_BATCHED_TOKENS: usize = 8192;

// What a request may name, a GPU has room for.
const _: () = assert!(MAX_LOGPROB_TOKEN_IDS <= MAX_NAMED_TOKENS);

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

/// What activations are in products of many rows with NVFP4 weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NativeFp4 {
    /// As everywhere else: bfloat16.
    #[default]
    Off,
    /// NVFP4 where a GPU has the instructions and passes a test of them at the start.
    Auto,
    /// On the CPU, rounded to NVFP4 in every product, as such a GPU has them in those of many rows: to measure the error.
    Emulated,
}

/// What the decoder's activations are in products of many rows, so mostly of prompts, with 4-bit integer weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrefillActivations {
    /// bfloat16, as everywhere.
    #[default]
    Bf16,
    /// FP8 (E4M3) with a scale for each row, on a GPU: faster where tensor cores have instructions for it (GB10), less exact.
    Fp8,
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
    pub(crate) expert_tally: Option<ExpertTally>,
    pub(crate) load_format: LoadFormat,
    pub(crate) load_strategy: LoadStrategy,
    pub(crate) lm_head_dtype: HeadDtype,
    pub(crate) encoder_split: EncoderSplit,
    pub(crate) prefill_activations: PrefillActivations,
    pub(crate) native_fp4: NativeFp4,
    pub(crate) moe_parallel: MoeParallel,
    pub(crate) weight_cache: Option<PathBuf>,
    pub(crate) load_exchange: bool,
    pub(crate) threads: Option<usize>,
    pub(crate) options: EngineOptions,
    pub(crate) progress: Option<ProgressFn>,
    pub(crate) seed: u64,
    pub(crate) ranks: Option<Ranks>,
}

/// Opens the model's files once more.
pub(crate) type Reopen = Box<dyn Fn() -> Result<ModelFiles> + Send>;

/// What ranks compare before they become a group, and how long they wait for each other.
pub(crate) struct Joining {
    model: [u8; 32],
    timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            dtype: None,
            device: Device::Auto,
            kernel_dir: None,
            enforce_eager: false,
            profile: None,
            expert_tally: None,
            load_format: LoadFormat::Auto,
            load_strategy: LoadStrategy::default(),
            lm_head_dtype: HeadDtype::default(),
            encoder_split: EncoderSplit::default(),
            prefill_activations: PrefillActivations::default(),
            native_fp4: NativeFp4::default(),
            moe_parallel: MoeParallel::default(),
            weight_cache: None,
            load_exchange: false,
            threads: None,
            options: EngineOptions::default(),
            progress: None,
            seed: 0,
            ranks: None,
        }
    }
}

impl Settings {
    /// Loads the model and starts its engine; blocks until it is ready. `vocab_size` is the number of real tokens. A group that
    /// is lost later is made again from the files that `reopen` gives.
    pub(crate) fn start(&self, files: ModelFiles, vocab_size: usize, reopen: Reopen) -> Result<Started> {
        let began = Instant::now();
        let timeout = self.ranks.as_ref().map_or(Duration::ZERO, |ranks| ranks.join_timeout);
        let made = self.make(files, vocab_size, timeout)?;
        let Made { running, device, mut memory, mut times } = made;
        let rebuild = self.rebuild(reopen, vocab_size, running.max_model_len());
        let engine = EngineHandle::start(running, &self.options, rebuild)?;
        // A group has what its smallest rank can hold.
        memory.kv.num_blocks = engine.num_kv_blocks();
        times.ready = began.elapsed();
        tracing::info!(
            kernels_ms = times.kernels.as_millis(),
            load_ms = times.load.as_millis(),
            graphs_ms = times.graphs.as_millis(),
            ready_ms = times.ready.as_millis(),
            kv_tokens = memory.kv.num_blocks * memory.kv.block_size,
            "started"
        );
        Ok(Started { engine, device, memory, times })
    }

    /// Joins the group of rank 0 and computes for it until it ends; blocks.
    pub(crate) fn follow(&self, files: ModelFiles) -> Result<()> {
        let timeout = self.ranks.as_ref().map_or(Duration::ZERO, |ranks| ranks.join_timeout);
        let joining = self.joining(&files, timeout)?;
        let dtype = self.dtype.unwrap_or_else(|| files.auto_dtype());
        self.with_backend(dtype, joining.as_ref(), Follow { files })
    }

    fn make(&self, files: ModelFiles, vocab_size: usize, timeout: Duration) -> Result<Made> {
        let began = Instant::now();
        let joining = self.joining(&files, timeout)?;
        let dtype = self.dtype.unwrap_or_else(|| files.auto_dtype());
        self.with_backend(dtype, joining.as_ref(), MakeRunning { files, vocab_size, began })
    }

    /// What brings a lost group back; `None` without a group. It also holds the group's other processes: they live as long as
    /// the engine.
    fn rebuild(&self, reopen: Reopen, vocab_size: usize, max_model_len: usize) -> Option<Rebuild> {
        let timeout = self.ranks.as_ref()?.rejoin_timeout();
        let mut settings = self.clone();
        // What clients were told holds afterwards, too.
        settings.options.max_model_len = Some(max_model_len);
        Some(Box::new(move || {
            if timeout.is_zero() {
                return Err("it is not waited for (--rejoin-timeout 0)".into());
            }
            let made = reopen().and_then(|files| settings.make(files, vocab_size, timeout));
            made.map(|made| made.running).map_err(|error| error.to_string())
        }))
    }

    /// `None` without a group.
    pub(crate) fn joining(&self, files: &ModelFiles, timeout: Duration) -> Result<Option<Joining>> {
        let Some(ranks) = &self.ranks else { return Ok(None) };
        files.config.check_ranks(ranks.rank.world())?;
        let checkpoint = &files.checkpoint;
        let model = match self.load_format {
            LoadFormat::Dummy => blake3::hash(checkpoint.config().to_string().as_bytes()).into(),
            LoadFormat::Auto => fingerprint::model(checkpoint.dir()).map_err(|error| {
                Error::option("MODEL", format!("reading {}: {error}", checkpoint.dir().display()))
            })?,
        };
        Ok(Some(Joining { model, timeout }))
    }

    /// Waits for the other ranks, if there is a group.
    fn gather(&self, device: &str, dtype: Dtype, joining: Option<&Joining>) -> Result<Option<Team>> {
        let (Some(ranks), Some(joining)) = (&self.ranks, joining) else { return Ok(None) };
        // Not what a rank may have of its own: memory and waiting.
        let options = EngineOptions {
            gpu_memory_utilization: 0.0,
            max_num_queued_reqs: None,
            step_timeout: None,
            max_model_len: None,
            ..self.options.clone()
        };
        let (load_format, seed, eager) = (self.load_format, self.seed, self.enforce_eager);
        let formats = (self.lm_head_dtype, self.prefill_activations, self.native_fp4);
        let shared = (self.moe_parallel, self.encoder_split, self.load_exchange);
        let settings =
            format!("{device} {dtype:?} {formats:?} {shared:?} {load_format:?} {seed} {eager} {options:?}");
        ranks.gather(joining.model, &settings, joining.timeout).map(Some)
    }

    /// Chooses the backend and hands it to `user`; with `joining` it is a rank of the group.
    pub(crate) fn with_backend<U: UseBackend>(
        &self,
        dtype: Dtype,
        joining: Option<&Joining>,
        user: U,
    ) -> Result<U::Output> {
        let Some(gpu) = self.choose_gpu(dtype)? else {
            return self.with_cpu(dtype, joining, user);
        };
        if self.options.max_logprobs > MAX_ALTERNATIVES {
            let problem =
                format!("a GPU reports at most {MAX_ALTERNATIVES}, not {}", self.options.max_logprobs);
            return Err(Error::option("--max-logprobs", problem));
        }
        let mut settings = self.clone();
        let tokens = GPU_BATCHED_TOKENS.max(self.options.max_num_seqs);
        settings.options.max_num_batched_tokens.get_or_insert(tokens);
        let mut team = settings.gather("GPU", dtype, joining)?;
        let allow_old_nccl = self.ranks.as_ref().is_some_and(|ranks| ranks.allow_old_nccl);
        let group = team.as_mut().map(|team| team.nccl(allow_old_nccl)).transpose()?;
        let name = gpu.properties().name.clone();
        let kernels = KernelOptions { kernel_dir: self.kernel_dir.clone(), ..KernelOptions::default() };
        let (enforce_eager, profile) = (self.enforce_eager, self.profile.clone());
        if self.native_fp4 == NativeFp4::Emulated {
            tracing::warn!("no effect: --native-fp4 emulate: it is for --device cpu");
        }
        let fp8_activations = self.prefill_activations == PrefillActivations::Fp8;
        if fp8_activations && gpu.arch() == Arch::Sm90 {
            tracing::warn!(
                "--prefill-activations fp8 costs speed on {name}: its tensor cores have no FP8 instructions of the kind that this \
                 engine uses, and the compiler puts others in their place"
            );
        }
        let options = CudaOptions {
            ordinal: self.ordinal(),
            fp8_activations,
            native_fp4: self.native_fp4 == NativeFp4::Auto,
            kernels,
            enforce_eager,
            profile,
            expert_tally: self.tally_alone(),
            group,
            ..CudaOptions::default()
        };
        let backend = CudaBackend::new(&options).map_err(spark_backend::Error::from);
        // Until here `gpu` has kept the device open.
        drop(gpu);
        user.run(&settings, backend?, Place { device: name, team })
    }

    fn with_cpu<U: UseBackend>(&self, dtype: Dtype, joining: Option<&Joining>, user: U) -> Result<U::Output> {
        if self.enforce_eager {
            tracing::warn!("no effect: --enforce-eager: there are no graphs on the CPU");
        }
        if self.native_fp4 == NativeFp4::Auto {
            tracing::warn!("no effect: --native-fp4 auto: the CPU has no FP4 products");
        }
        if self.prefill_activations == PrefillActivations::Fp8 {
            tracing::warn!("no effect: --prefill-activations fp8: activations are quantised on a GPU only");
        }
        if self.profile.is_some() {
            tracing::warn!("no effect: --profile: operations are timed on a GPU only");
        }
        let share = self.ranks.as_ref().map(|ranks| ranks.share_of(num_cores()));
        let threads = self.threads.or(share);
        let mut team = self.gather("CPU", dtype, joining)?;
        let mut backend = CpuBackend::new(dtype, threads)?.with_expert_tally(self.tally_alone());
        if self.native_fp4 == NativeFp4::Emulated {
            backend = backend.with_nvfp4_activations();
        }
        if let Some(team) = &mut team {
            backend = backend.with_group(team.collective()?);
        }
        let device = format!("CPU, {} threads", threads.unwrap_or_else(num_cores));
        user.run(self, backend, Place { device, team })
    }

    /// What counts experts: ranks of a group take no part, because all of them would have to run the same steps in the same way.
    fn tally_alone(&self) -> ExpertTally {
        self.expert_tally.clone().filter(|_| self.ranks.is_none()).unwrap_or_default()
    }

    /// The GPU that this process takes, of those that it sees (CUDA_VISIBLE_DEVICES).
    fn ordinal(&self) -> usize {
        self.ranks.as_ref().map_or(0, |ranks| ranks.local_rank)
    }

    /// Takes the model to `backend`, one of `team` if it is a rank of a group, and divides the memory that is left.
    pub(crate) fn load<B: Backend>(
        &self,
        files: ModelFiles,
        backend: &B,
        team: Option<&mut Team>,
    ) -> Result<(Qwen3Vl<B>, MemoryPlan)> {
        let before = self.share_of_memory(backend.memory()?);
        let reads = self.load_exchange && self.load_format == LoadFormat::Auto;
        let exchange = team.filter(|_| reads).map(Team::exchange).transpose()?;
        let mut params = self.params(&files, before, backend.rank(), exchange)?;
        let mean_std = self.options.image_mean_std;
        let head = Head { is_own: files.has_lm_head, dtype: self.lm_head_dtype };
        let model = Qwen3Vl::load(files.config, head, mean_std, &mut params, backend)?;
        params.finish()?;
        let memory = MemoryUse { before, now: self.share_of_memory(backend.memory()?) };
        let activation_bytes = |spec: &_| backend.activation_bytes(spec);
        let (dtype, rank) = (backend.dtype(), backend.rank());
        let plan = MemoryPlan::new(model.config(), &self.options, dtype, memory, rank, activation_bytes)?;
        Ok((model, plan))
    }

    /// What this rank may count on where ranks live in the same memory.
    fn share_of_memory(&self, memory: Memory) -> Memory {
        let sharers = self.ranks.as_ref().filter(|_| memory.is_shared).map_or(1, |ranks| ranks.local_world);
        let available = memory.available / sharers.max(1) as u64;
        Memory { total: memory.total - (memory.available - available), available, ..memory }
    }

    /// The GPU to compute on; `None` is the CPU. Says which it is and, where nothing was said, why.
    fn choose_gpu(&self, dtype: Dtype) -> Result<Option<spark_cuda::Device>> {
        if self.device == Device::Cpu {
            tracing::info!("computing on the CPU");
            return Ok(None);
        }
        let gpu = Driver::open().and_then(|driver| driver.device(self.ordinal()));
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
            (Err(error), _, Device::Cuda) => {
                let problem = format!("cuda: {error}; --device cpu computes without a GPU");
                Err(Error::option("--device", problem))
            }
            (Err(error), ..) => {
                tracing::info!("computing on the CPU; no GPU can be used: {error}");
                Ok(None)
            }
        }
    }

    /// Parameters that are read, or made up, while the model takes them.
    fn params(
        &self,
        files: &ModelFiles,
        memory: Memory,
        rank: Rank,
        exchange: Option<Arc<dyn Exchange>>,
    ) -> Result<Params> {
        let config = files.checkpoint.config();
        Ok(match self.load_format {
            // Only memory that is not the machine's holds what the machine's does not.
            LoadFormat::Dummy if memory.is_shared => {
                spark_weights::dummy(config, &files.specs, self.seed, rank)?
            }
            LoadFormat::Dummy => spark_weights::dummy_for_device(config, &files.specs, self.seed, rank)?,
            LoadFormat::Auto => {
                let options = LoadOptions {
                    strategy: self.load_strategy,
                    rank,
                    progress: self.progress.clone(),
                    threads: self.threads.unwrap_or(0),
                    cache: self.weight_cache.clone(),
                    exchange,
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

    /// Does it. `settings` are those that suit the backend.
    ///
    /// # Errors
    /// Its own, and those of the backend.
    fn run<B: Backend>(self, settings: &Settings, backend: B, place: Place) -> Result<Self::Output>;
}

/// Where a backend computes.
pub(crate) struct Place {
    /// For people.
    pub(crate) device: String,
    /// The other ranks, if it is one of several.
    pub(crate) team: Option<Team>,
}

struct MakeRunning {
    files: ModelFiles,
    vocab_size: usize,
    began: Instant,
}

/// A runner, and what there is to say about it.
struct Made {
    running: Running,
    device: String,
    memory: MemoryPlan,
    times: StartTimes,
}

impl UseBackend for MakeRunning {
    type Output = Made;

    fn run<B: Backend>(self, settings: &Settings, backend: B, mut place: Place) -> Result<Made> {
        let Self { files, vocab_size, began } = self;
        let kernels = began.elapsed();
        let (model, memory) = settings.load(files, &backend, place.team.as_mut())?;
        let load = began.elapsed() - kernels;
        let group = match place.team {
            Some(Team::Leader(leader)) => Some(LeaderGroup::new(leader)),
            Some(Team::Follower(_)) => {
                return Err(Error::option("--rank", "only rank 0 has an engine; other ranks follow it"));
            }
            None => None,
        };
        let running = Running::new(backend, model, &settings.options, &memory, vocab_size, group)?;
        let (state, graphs) = running.times();
        let times = StartTimes { kernels, load, state, graphs, ready: began.elapsed() };
        Ok(Made { running, device: place.device, memory, times })
    }
}

struct Follow {
    files: ModelFiles,
}

impl UseBackend for Follow {
    type Output = ();

    fn run<B: Backend>(self, settings: &Settings, backend: B, mut place: Place) -> Result<()> {
        let (model, memory) = settings.load(self.files, &backend, place.team.as_mut())?;
        let Some(Team::Follower(follower)) = place.team else {
            return Err(Error::option("--rank", "rank 0 has nobody to follow"));
        };
        Ok(spark_runtime::follow(backend, model, &settings.options, &memory, follower)?)
    }
}

fn num_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
