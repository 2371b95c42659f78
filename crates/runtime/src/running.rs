//! Everything of an engine that is made anew when its group is: the runner thread with backend and model, and the
//! connections. Policy and clients are the engine's.

use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use spark_api::{EngineInfo, Limits, MediaGeometry};
use spark_backend::{Backend, Result as BackendResult};
use spark_comm::{BulkLeader, Monitor};
use spark_models::{ModelConfig, Qwen3Vl};
use spark_scheduler::SchedulerConfig;

use crate::{
    EngineOptions, Error, LeaderGroup, MemoryPlan, ModelRunner, Result,
    group::{HashedRunner, LeaderSteps},
    options::MAX_PROMPT_LOGPROB_TOKENS,
    pipeline::{Order, run_steps},
    runner::{StepResult, StepWork},
};

/// A runner that waits for steps; [`EngineHandle::start`](crate::EngineHandle::start) puts an engine before it.
pub struct Running {
    pub(crate) orders: Sender<Order<StepWork>>,
    pub(crate) results: Receiver<BackendResult<StepResult>>,
    pub(crate) runner: JoinHandle<()>,
    pub(crate) group: Option<(BulkLeader, Monitor)>,
    pub(crate) scheduler: SchedulerConfig,
    pub(crate) info: EngineInfo,
    /// What the state took, and the preparation.
    pub(crate) times: (Duration, Duration),
}

/// Brings a lost group back: other ranks, backend, model. May take minutes; blocks. The text of an error is for people.
pub type Rebuild = Box<dyn FnMut() -> std::result::Result<Running, String> + Send>;

impl Running {
    /// Allocates everything that `plan` says (with a group, what the smallest rank can) and starts the runner thread.
    ///
    /// `vocab_size` is the number of real tokens: the tokenizer's, which is below the model's padded table.
    ///
    /// # Errors
    /// Not enough memory, options that contradict each other, or a rank that is gone.
    pub fn new<B: Backend>(
        backend: B,
        model: Qwen3Vl<B>,
        options: &EngineOptions,
        plan: &MemoryPlan,
        vocab_size: usize,
        mut group: Option<LeaderGroup>,
    ) -> Result<Self> {
        let config = model.config().clone();
        let vocab_size = vocab_size.min(config.text.vocab_size);
        let plan = match &mut group {
            Some(group) => group.agree(plan, vocab_size)?,
            None => *plan,
        };
        let mut cache_key = [0; 32];
        getrandom::fill(&mut cache_key).map_err(|e| Error::Io {
            what: "asking the system for random bytes",
            source: std::io::Error::other(e),
        })?;
        let scheduler = scheduler_config(&config, options, &plan, cache_key);
        let info = info(&config, options, &plan, vocab_size);
        let began = Instant::now();
        let mut runner = ModelRunner::new(backend, model, plan.state(options, vocab_size))?;
        let allocated = began.elapsed();
        runner.prepare()?;
        let times = (allocated, began.elapsed() - allocated);
        let (orders, order_queue) = channel();
        let (results, result_queue) = channel();
        let (runner, group) = match group {
            None => (spawn("spark-runner", move || run_steps(runner, &order_queue, &results))?, None),
            Some(mut group) => {
                group.wait_until_ready()?;
                let LeaderGroup { plans, bulk, monitor } = group;
                let steps = LeaderSteps { steps: HashedRunner::new(runner), plans };
                let thread = spawn("spark-runner", move || run_steps(steps, &order_queue, &results))?;
                (thread, Some((bulk, monitor)))
            }
        };
        Ok(Self { orders, results: result_queue, runner, group, scheduler, info, times })
    }

    /// Longest sequence.
    pub fn max_model_len(&self) -> usize {
        self.info.limits.max_model_len
    }

    /// How long the backend took to allocate its state, and to get ready for steps.
    pub fn times(&self) -> (Duration, Duration) {
        self.times
    }
}

fn scheduler_config(
    config: &ModelConfig,
    options: &EngineOptions,
    plan: &MemoryPlan,
    cache_key: [u8; 32],
) -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: options.max_num_seqs,
        max_num_batched_tokens: options.batched_tokens(),
        block_size: options.block_size,
        num_blocks: plan.kv.num_blocks,
        max_model_len: plan.max_model_len,
        enable_prefix_caching: options.enable_prefix_caching,
        policy: options.scheduling_policy,
        eos_token_ids: config.eos_token_ids.clone(),
        encoder_cache_tokens: options.encoder_cache_tokens,
        max_encoder_tokens_per_step: options.max_encoder_tokens_per_step,
        cache_key,
        max_chunk_tokens: options.long_prefill_token_threshold,
        max_prompt_logprob_tokens: MAX_PROMPT_LOGPROB_TOKENS,
    }
}

fn info(config: &ModelConfig, options: &EngineOptions, plan: &MemoryPlan, vocab_size: usize) -> EngineInfo {
    EngineInfo {
        architecture: config.model_type.clone(),
        limits: Limits {
            max_model_len: plan.max_model_len,
            vocab_size,
            max_logprobs: options.max_logprobs,
            max_media_tokens: if config.vision.is_some() { options.encoder_cache_tokens } else { 0 },
            media_geometry: config.vision.as_ref().map(|vision| MediaGeometry {
                patch_size: vision.patch_size,
                temporal_patch_size: vision.temporal_patch_size,
                merge_size: vision.spatial_merge_size,
            }),
            max_media: if config.vision.is_some() { options.limit_mm_per_prompt } else { 0 },
            image_token_id: config.image_token_id,
            video_token_id: config.video_token_id,
            eos_token_ids: config.eos_token_ids.clone(),
        },
        num_kv_tokens: plan.kv.num_blocks * plan.kv.block_size,
        block_size: options.block_size,
    }
}

pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|source| Error::Io { what: "starting a thread", source })
}
