//! The engine loop: commands in, plans to the runner, results out as events. Three verbs a step: `schedule`, `run`,
//! `complete`. Sleeps on a channel whenever it cannot do anything.

use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Instant,
};

use spark_api::{
    ConstraintError, EngineInfo, EngineStats, FinishReason, Health, Limits, MediaGeometry, TokenId,
};
use spark_backend::{Backend, SampledToken};
use spark_models::{ModelConfig, Qwen3Vl};
use spark_scheduler::{Finish, Scheduler, SchedulerConfig, SeqId, SeqUpdate, StepId};

use crate::{
    EngineHandle, EngineOptions, MemoryPlan, ModelRunner, Result,
    error::Error,
    handle::{Command, Shared, lock},
    options::MAX_PROMPT_LOGPROB_TOKENS,
    pipeline::{Order, run_steps},
    runner::{StepResult, StepWork},
    sequence::Sequence,
};

/// Allocates everything that `plan` says and starts the two threads.
///
/// `vocab_size` is the number of real tokens: the tokenizer's, which is below the model's padded table.
///
/// # Errors
/// Not enough memory, or options that contradict each other.
pub fn start<B: Backend>(
    backend: B,
    model: Qwen3Vl<B>,
    options: &EngineOptions,
    plan: &MemoryPlan,
    vocab_size: usize,
) -> Result<EngineHandle> {
    let config = model.config().clone();
    let vocab_size = vocab_size.min(config.text.vocab_size);
    let mut cache_key = [0; 32];
    getrandom::fill(&mut cache_key).map_err(|e| Error::Io {
        what: "asking the system for random bytes",
        source: std::io::Error::other(e),
    })?;
    let scheduler = Scheduler::new(scheduler_config(&config, options, plan, cache_key))?;
    let state = plan.state(options, vocab_size);
    let merge_size = config.vision.as_ref().map_or(1, |vision| vision.spatial_merge_size);
    let info = info(&config, options, plan, vocab_size);
    let began = Instant::now();
    let mut runner = ModelRunner::new(backend, model, state)?;
    let allocated = began.elapsed();
    runner.prepare()?;
    let times = (allocated, began.elapsed() - allocated);
    let shared = Arc::new(Shared {
        stats: Mutex::new(EngineStats::default()),
        health: Mutex::new(Health::Ready),
        num_open: AtomicUsize::new(0),
    });
    let (commands, command_queue) = channel();
    let (eos_token_ids, depth) = (config.eos_token_ids, if options.async_scheduling { 2 } else { 1 });
    let (orders, order_queue) = channel();
    let (results, result_queue) = channel();
    let runner = spawn("spark-runner", move || run_steps(runner, &order_queue, &results))?;
    let engine = Engine {
        scheduler,
        sequences: HashMap::new(),
        in_flight: VecDeque::new(),
        num_completed: 0,
        depth,
        commands: command_queue,
        orders,
        results: result_queue,
        shared: shared.clone(),
        eos_token_ids,
        merge_size,
        mask_words: vocab_size.div_ceil(32),
        draining: false,
    };
    let thread = spawn("spark-engine", move || {
        engine.run();
        // The channel of orders is closed now, so the runner ends after the step it is in. If it has panicked, the engine
        // has said so.
        let _ = runner.join();
    })?;
    let queue = (options.max_num_seqs, options.max_num_queued_reqs);
    Ok(EngineHandle::new(commands, shared, info, queue, thread, times))
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

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<thread::JoinHandle<()>> {
    thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|source| Error::Io { what: "starting a thread", source })
}

struct Engine {
    scheduler: Scheduler,
    sequences: HashMap<SeqId, Sequence>,
    in_flight: VecDeque<StepId>,
    /// Steps whose results were passed on.
    num_completed: u64,
    /// Steps that may be in flight at once: 2 when scheduling is asynchronous.
    depth: usize,
    commands: Receiver<Command>,
    orders: Sender<Order<StepWork>>,
    results: Receiver<spark_backend::Result<StepResult>>,
    shared: Arc<Shared>,
    eos_token_ids: Vec<TokenId>,
    merge_size: usize,
    /// Words of a grammar mask.
    mask_words: usize,
    draining: bool,
}

impl Engine {
    fn run(mut self) {
        loop {
            if !self.take_commands() {
                return;
            }
            self.drop_cancelled();
            while self.in_flight.len() < self.depth && self.schedule() {}
            if self.in_flight.is_empty() && self.scheduler.has_work() {
                // `add` refuses what can never fit, so this is a defect: stop loudly instead of spinning.
                return self.fail("the scheduler has work but no plan");
            }
            if let Err(message) = self.complete() {
                return self.fail(&message);
            }
            self.publish_stats();
        }
    }

    /// Takes what clients sent; sleeps if there is nothing else to do. `false` means stop.
    fn take_commands(&mut self) -> bool {
        loop {
            let idle = self.in_flight.is_empty() && !self.scheduler.has_work();
            if idle && self.draining {
                return false;
            }
            let command = match idle {
                true => self.commands.recv().ok(),
                false => match self.commands.try_recv() {
                    Ok(command) => Some(command),
                    Err(std::sync::mpsc::TryRecvError::Empty) => return true,
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => None,
                },
            };
            match command {
                Some(Command::Add { request, events, arrived }) => {
                    let (new, sequence) =
                        Sequence::new(*request, events, &self.eos_token_ids, self.merge_size, arrived);
                    match self.scheduler.add(new) {
                        Ok(id) => drop(self.sequences.insert(id, sequence)),
                        Err(error) => self.end(sequence, FinishReason::EngineFailed(error.to_string())),
                    }
                }
                Some(Command::Drain) => self.draining = true,
                Some(Command::Abort) | None => return false,
            }
        }
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<SeqId> =
            self.sequences.iter().filter(|(_, s)| s.is_cancelled()).map(|(id, _)| *id).collect();
        for id in gone {
            self.scheduler.cancel(id);
            self.remove(id, FinishReason::Cancelled);
        }
    }

    /// Plans a step and hands it to the runner. `false` if nothing can run now.
    fn schedule(&mut self) -> bool {
        let Some(plan) = self.scheduler.schedule() else { return false };
        let mut admissions = Vec::new();
        let mut masks = Vec::new();
        let mut failed = Vec::new();
        for planned in &plan.seqs {
            let Some(sequence) = self.sequences.get_mut(&planned.seq) else { continue };
            if planned.admit {
                admissions.push(sequence.admission(planned));
            }
            if let (true, Some(constraint)) = (planned.samples, &mut sequence.constraint) {
                let mut allowed = vec![u32::MAX; self.mask_words];
                match guarded(|| constraint.mask(&mut allowed)) {
                    Ok(()) => masks.push((planned.slot, allowed)),
                    Err(error) => failed.push((planned.seq, error)),
                }
            }
        }
        for (id, error) in failed {
            self.scheduler.cancel(id);
            self.remove(id, FinishReason::ConstraintFailed(error));
        }
        self.in_flight.push_back(plan.id);
        // A runner that is gone shows in `complete`, where its last words are.
        let _ = self.orders.send(Order::Launch(StepWork { plan, admissions, masks }));
        true
    }

    /// Waits for the oldest step in flight and passes its results on. `Err` says how the engine has failed.
    fn complete(&mut self) -> std::result::Result<(), String> {
        let Some(step) = self.in_flight.pop_front() else { return Ok(()) };
        self.num_completed += 1;
        let _ = self.orders.send(Order::Await(self.num_completed));
        let result = match self.results.recv() {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err("the runner thread has panicked".into()),
        };
        debug_assert_eq!(result.id, step, "steps complete in the order of their plans");
        for (id, index, token, top) in &result.prompt_logprobs {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.keep_prompt_logprobs(*index, *token, top);
            }
        }
        let sampled: HashMap<SeqId, SampledToken> = result.sampled.into_iter().collect();
        let tokens: Vec<_> = sampled.iter().map(|(id, sampled)| (*id, vec![sampled.token])).collect();
        for update in self.scheduler.complete(step, &tokens) {
            self.update(&update, sampled.get(&update.seq));
        }
        Ok(())
    }

    fn update(&mut self, update: &SeqUpdate, sampled: Option<&SampledToken>) {
        let Some(sequence) = self.sequences.get_mut(&update.seq) else { return };
        sequence.set_preemptions(update.num_preemptions);
        if let Some(num_cached_tokens) = update.prompt_done {
            sequence.send_prompt(num_cached_tokens);
        }
        let mut reason = update.finish.map(|finish| match finish {
            Finish::Eos => FinishReason::Eos,
            Finish::StopToken(id) => FinishReason::StopToken(id),
            Finish::Length => FinishReason::Length,
        });
        for &token in &update.tokens {
            sequence.send_token(token, sampled.and_then(|s| s.logprobs.as_ref()));
            let Some(constraint) = &mut sequence.constraint else { continue };
            let ended = match guarded(|| constraint.commit(token)) {
                Ok(false) => continue,
                Ok(true) => FinishReason::ConstraintComplete,
                Err(error) => FinishReason::ConstraintFailed(error),
            };
            if reason.is_none() {
                self.scheduler.finish(update.seq);
                reason = Some(ended);
            }
            break;
        }
        if let Some(reason) = reason {
            self.remove(update.seq, reason);
        }
    }

    fn remove(&mut self, id: SeqId, reason: FinishReason) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.end(sequence, reason);
        }
    }

    fn end(&self, sequence: Sequence, reason: FinishReason) {
        // Counted down first: who sees the end of its stream finds the place free.
        self.shared.num_open.fetch_sub(1, Ordering::Relaxed);
        sequence.send_finished(reason);
    }

    /// Only says it; the streams get their ends when the engine is dropped.
    fn fail(&self, message: &str) {
        tracing::error!("the engine has failed: {message}");
        *lock(&self.shared.health) = Health::Failed(message.to_owned());
    }

    fn publish_stats(&self) {
        let s = self.scheduler.stats();
        let used = s.num_blocks - s.num_free_blocks;
        *lock(&self.shared.stats) = EngineStats {
            num_running: s.num_running,
            num_waiting: s.num_waiting,
            kv_cache_usage: used as f64 / s.num_blocks.max(1) as f64,
            num_steps: s.num_steps,
            num_preemptions: s.num_preemptions,
            num_prompt_tokens: s.num_prompt_tokens,
            num_generation_tokens: s.num_generation_tokens,
            prefix_cache_queries: s.prefix_cache_queries,
            prefix_cache_hits: s.prefix_cache_hits,
            mm_cache_queries: s.mm_cache_queries,
            mm_cache_hits: s.mm_cache_hits,
            tokens_per_step: s.tokens_per_step,
        };
    }
}

/// However the engine thread ends, every stream gets its end, and gauges and health tell the truth.
impl Drop for Engine {
    fn drop(&mut self) {
        if thread::panicking() {
            self.fail("the engine thread has panicked");
        }
        let reason = match &*lock(&self.shared.health) {
            Health::Failed(message) => FinishReason::EngineFailed(message.clone()),
            Health::Ready | Health::Stopping => FinishReason::Cancelled,
        };
        for (_, sequence) in std::mem::take(&mut self.sequences) {
            self.end(sequence, reason.clone());
        }
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Add { request, events, arrived } = command {
                let (_, sequence) = Sequence::new(*request, events, &[], self.merge_size, arrived);
                self.end(sequence, reason.clone());
            }
        }
        let mut stats = lock(&self.shared.stats);
        (stats.num_running, stats.num_waiting, stats.kv_cache_usage) = (0, 0, 0.0);
    }
}

/// Calls into a constraint, which is code of the embedding program: a panic there ends one request, not the engine.
fn guarded<T>(
    call: impl FnOnce() -> std::result::Result<T, ConstraintError>,
) -> std::result::Result<T, ConstraintError> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err(ConstraintError("the constraint has panicked".into())))
}
