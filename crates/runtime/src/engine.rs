//! The engine loop: commands in, plans to the runner, results out as events. Three verbs a step: `schedule`, `run`,
//! `complete`. Sleeps on a channel whenever it cannot do anything.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use spark_api::{EngineStats, Event, FinishReason, Health, TokenId};
use spark_backend::SampledToken;
use spark_scheduler::{Finish, SeqId, SeqUpdate};
use tokio::sync::mpsc::UnboundedSender;

use crate::{
    EngineHandle, EngineOptions, Failure, FailureHook, FailureReport, Rebuild, Result, Running,
    flight::FlightRecorder,
    group::Upload,
    handle::{Command, Shared, lock},
    link::Link,
    masks::Masks,
    pipeline::Order,
    runner::{StepResult, StepWork},
    running::spawn,
    sequence::Sequence,
};

/// What a lost rank needs to show: an operation that fails because of it fails first.
const LOSS_SHOWS_WITHIN: Duration = Duration::from_millis(1500);

impl EngineHandle {
    /// Starts the engine thread before a runner. With `rebuild`, a lost group is brought back and requests that nobody has
    /// seen anything of are kept; without it the engine ends.
    ///
    /// # Errors
    /// Sizes that no step could be made with.
    pub fn start(running: Running, options: &EngineOptions, rebuild: Option<Rebuild>) -> Result<Self> {
        let shared = Arc::new(Shared::new());
        let (commands, command_queue) = channel();
        let info = running.info.clone();
        let engine = Engine {
            link: Link::new(running, &commands, 0)?,
            sequences: HashMap::new(),
            uploading: BTreeMap::new(),
            kept: VecDeque::new(),
            next_upload: 0,
            forget: Vec::new(),
            own_commands: commands.clone(),
            commands: command_queue,
            deferred: VecDeque::new(),
            shared: shared.clone(),
            eos_token_ids: info.limits.eos_token_ids.clone(),
            masks: Masks::new(commands.clone(), info.limits.vocab_size, options.max_num_seqs),
            depth: if options.async_scheduling { 2 } else { 1 },
            step_timeout: options.step_timeout,
            flight: FlightRecorder::default(),
            on_failure: options.on_failure.clone(),
            rebuild,
            draining: false,
        };
        let ended = shared.clone();
        let thread = spawn("spark-engine", move || {
            let _end = SetEnded(ended);
            engine.run();
        })?;
        let queue = (options.max_num_seqs, options.max_num_queued_reqs);
        Ok(Self::new(commands, shared, info, queue, thread))
    }
}

/// Says that the engine thread is at its end, also when it panics.
struct SetEnded(Arc<Shared>);

impl Drop for SetEnded {
    fn drop(&mut self) {
        self.0.set_ended();
    }
}

pub(crate) struct Engine {
    pub(crate) link: Link,
    pub(crate) sequences: HashMap<SeqId, Sequence>,
    /// Sequences whose pixels are on their way to the other ranks.
    pub(crate) uploading: BTreeMap<u64, Sequence>,
    /// Sequences that wait for the group to come back.
    pub(crate) kept: VecDeque<Sequence>,
    next_upload: u64,
    /// Uploads that the other ranks may drop with the next step.
    pub(crate) forget: Vec<u64>,
    /// For threads that report here.
    pub(crate) own_commands: Sender<Command>,
    pub(crate) commands: Receiver<Command>,
    /// Commands that came while only one kind was waited for.
    pub(crate) deferred: VecDeque<Command>,
    pub(crate) shared: Arc<Shared>,
    eos_token_ids: Vec<TokenId>,
    pub(crate) masks: Masks,
    /// Steps that may be in flight at once: 2 when scheduling is asynchronous.
    depth: usize,
    step_timeout: Option<Duration>,
    flight: FlightRecorder,
    on_failure: FailureHook,
    pub(crate) rebuild: Option<Rebuild>,
    pub(crate) draining: bool,
}

/// What the engine thread does next.
enum Next {
    Step,
    Stop,
    Fail(Failure),
}

impl Engine {
    fn run(mut self) {
        while let Some(failure) = self.serve() {
            if !self.recover(failure) {
                return;
            }
        }
    }

    /// Runs steps until it is told to stop (`None`), or something fails.
    fn serve(&mut self) -> Option<Failure> {
        // Every sequence waits for its mask.
        let mut is_blocked = false;
        loop {
            match self.take_commands(is_blocked) {
                Next::Step => {}
                Next::Stop => return None,
                Next::Fail(failure) => return Some(failure),
            }
            self.drop_cancelled();
            self.await_masks();
            while self.link.in_flight.len() < self.depth && self.schedule() {}
            is_blocked = self.link.in_flight.is_empty() && self.link.scheduler.has_work();
            if is_blocked && !self.masks.any_at_work() {
                // `add` refuses what can never fit, so this is a defect: stop loudly instead of spinning.
                return Some(Failure::Defect("the scheduler has work but no plan".into()));
            }
            if let Err(failure) = self.complete() {
                return Some(failure);
            }
            self.publish_stats();
        }
    }

    /// Takes what was sent here; sleeps if there is nothing else to do, or nothing before a command comes.
    fn take_commands(&mut self, mut is_blocked: bool) -> Next {
        loop {
            let idle = self.link.is_idle();
            if idle && self.draining && self.uploading.is_empty() {
                return Next::Stop;
            }
            let command = match idle || std::mem::take(&mut is_blocked) {
                true => {
                    // A late mask may have ended a sequence since the last step.
                    self.publish_stats();
                    self.next_command()
                }
                false => match self.deferred.pop_front().map_or_else(|| self.commands.try_recv(), Ok) {
                    Ok(command) => Some(command),
                    Err(TryRecvError::Empty) => return Next::Step,
                    Err(TryRecvError::Disconnected) => None,
                },
            };
            match command {
                Some(Command::Add { request, events, arrived }) => {
                    let sequence = self.sequence(*request, events, arrived);
                    self.enqueue(sequence);
                }
                Some(Command::Uploaded { generation, id }) if generation == self.link.generation => {
                    if let Some(sequence) = self.uploading.remove(&id) {
                        self.add(sequence);
                    }
                }
                Some(Command::Lost { generation }) if generation == self.link.generation => {
                    let unknown = || Failure::Group("the group of ranks is lost".into());
                    return Next::Fail(self.link.loss().unwrap_or_else(unknown));
                }
                Some(Command::Masked(masked)) => self.masked(masked),
                // Of a group that is gone.
                Some(Command::Uploaded { .. } | Command::Lost { .. } | Command::Rebuilt { .. }) => {}
                Some(Command::Drain) => self.draining = true,
                Some(Command::Abort) | None => return Next::Stop,
            }
        }
    }

    /// Waits for a command.
    pub(crate) fn next_command(&mut self) -> Option<Command> {
        self.deferred.pop_front().or_else(|| self.commands.recv().ok())
    }

    /// A sequence for a request that has just come.
    pub(crate) fn sequence(
        &self,
        request: spark_api::Request,
        events: UnboundedSender<Event>,
        arrived: Instant,
    ) -> Sequence {
        Sequence::new(request, events, &self.eos_token_ids, arrived)
    }

    /// Lets a sequence wait for its turn; its pixels go to the other ranks first.
    pub(crate) fn enqueue(&mut self, mut sequence: Sequence) {
        let media = sequence.pixels();
        let Some(uploads) = self.link.uploads.as_ref().filter(|_| !media.is_empty()) else {
            return self.add(sequence);
        };
        let id = self.next_upload;
        self.next_upload += 1;
        sequence.upload = Some(id);
        // A thread that is gone has lost the group, which the monitor reports.
        let _ = uploads.send(Upload { id, media });
        self.uploading.insert(id, sequence);
    }

    fn add(&mut self, sequence: Sequence) {
        if sequence.is_cancelled() {
            return self.end(sequence, FinishReason::Cancelled);
        }
        match self.link.scheduler.add(sequence.to_schedule()) {
            Ok(id) => {
                self.sequences.insert(id, sequence);
                self.begin_mask(id);
            }
            Err(error) => self.end(sequence, FinishReason::EngineFailed(error.to_string())),
        }
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<SeqId> =
            self.sequences.iter().filter(|(_, s)| s.is_cancelled()).map(|(id, _)| *id).collect();
        for id in gone {
            self.link.scheduler.cancel(id);
            self.remove(id, FinishReason::Cancelled);
        }
    }

    /// Plans a step and hands it to the runner. `false` if nothing can run now.
    fn schedule(&mut self) -> bool {
        let plan = self.link.scheduler.schedule();
        for id in self.link.scheduler.take_unsettled() {
            self.order_mask(id, Vec::new());
        }
        let Some(plan) = plan else { return false };
        let mut admissions = Vec::new();
        let mut masks = Vec::new();
        for planned in &plan.seqs {
            let Some(sequence) = self.sequences.get_mut(&planned.seq) else { continue };
            if planned.admit {
                admissions.push(sequence.admission(planned));
            }
            sequence.send_progress(planned.start);
            if planned.samples
                && let Some(mask) = sequence.constraint.take_mask()
            {
                // A constraint that has begun cannot begin anew.
                sequence.is_untouched = false;
                masks.push((planned.slot, mask));
            }
        }
        self.link.in_flight.push_back(plan.id);
        self.flight.planned(&plan);
        let forget = std::mem::take(&mut self.forget);
        self.link.runner.send(Order::Launch(StepWork { plan, admissions, masks, forget }));
        true
    }

    /// Waits for the oldest step in flight and passes its results on.
    fn complete(&mut self) -> std::result::Result<(), Failure> {
        let Some(step) = self.link.in_flight.pop_front() else { return Ok(()) };
        self.link.num_completed += 1;
        self.link.runner.send(Order::Await(self.link.num_completed));
        let result = self.receive()?;
        self.masks.note_step();
        self.flight.completed();
        debug_assert_eq!(result.id, step, "steps complete in the order of their plans");
        for (id, index, token, top) in &result.prompt_logprobs {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.keep_prompt_logprobs(*index, *token, top);
            }
        }
        let sampled: HashMap<SeqId, SampledToken> = result.sampled.into_iter().collect();
        let tokens: Vec<_> = sampled.iter().map(|(id, sampled)| (*id, vec![sampled.token])).collect();
        for update in self.link.scheduler.complete(step, &tokens) {
            self.update(&update, sampled.get(&update.seq));
        }
        Ok(())
    }

    /// The oldest result. Nothing of a lost group is passed on: what its ranks computed at the end nobody knows.
    fn receive(&mut self) -> std::result::Result<StepResult, Failure> {
        match (self.link.runner.receive(self.step_timeout), self.step_timeout) {
            (Ok(Ok(result)), _) => self.link.loss().map_or(Ok(result), Err),
            (Ok(Err(error)), _) => Err(self.loss_behind().unwrap_or_else(|| match error {
                spark_backend::Error::Device { .. } => Failure::Device(error.to_string()),
                _ => Failure::Defect(error.to_string()),
            })),
            (Err(RecvTimeoutError::Timeout), Some(limit)) => Err(self.hung(limit)),
            (Err(_), _) => {
                let panicked = || Failure::Defect("the runner thread has panicked".into());
                Err(self.loss_behind().unwrap_or_else(panicked))
            }
        }
    }

    /// Whether the group is lost. An operation that fails because of a lost rank may fail before the loss shows.
    fn loss_behind(&mut self) -> Option<Failure> {
        self.link.monitor.as_ref()?;
        let deadline = Instant::now() + LOSS_SHOWS_WITHIN;
        loop {
            if let Some(failure) = self.link.loss() {
                return Some(failure);
            }
            match self.commands.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Command::Lost { .. }) => {}
                Ok(command) => self.deferred.push_back(command),
                Err(_) => return self.link.loss(),
            }
        }
    }

    /// A step takes too long.
    fn hung(&mut self, limit: Duration) -> Failure {
        let step = self.link.num_completed;
        let message = format!("step {step} has no result after {} s (--step-timeout)", limit.as_secs());
        match &self.link.monitor {
            Some(monitor) => {
                monitor.abort();
                Failure::Group(format!("{message}: a rank hangs, or the network between the ranks"))
            }
            None => {
                self.link.runner.abandon();
                Failure::Device(format!("{message}: the device hangs"))
            }
        }
    }

    fn update(&mut self, update: &SeqUpdate, sampled: Option<&SampledToken>) {
        let Some(sequence) = self.sequences.get_mut(&update.seq) else { return };
        sequence.set_preemptions(update.num_preemptions);
        if let Some(num_cached_tokens) = update.prompt_done {
            sequence.send_prompt(num_cached_tokens);
        }
        let reason = update.finish.map(|finish| match finish {
            Finish::Eos => FinishReason::Eos,
            Finish::StopToken(id) => FinishReason::StopToken(id),
            Finish::Length => FinishReason::Length,
        });
        for &token in &update.tokens {
            sequence.send_token(token, sampled);
        }
        match reason {
            Some(reason) => self.remove(update.seq, reason),
            None if update.tokens.is_empty() => {}
            None => self.order_mask(update.seq, update.tokens.clone()),
        }
    }

    pub(crate) fn remove(&mut self, id: SeqId, reason: FinishReason) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.end(sequence, reason);
        }
    }

    pub(crate) fn end(&mut self, sequence: Sequence, reason: FinishReason) {
        self.forget.extend(sequence.upload);
        // Counted down first: who sees the end of its stream finds the place free.
        self.shared.num_open.fetch_sub(1, Ordering::Relaxed);
        sequence.send_finished(reason);
    }

    /// Tells who wants to know how everything was.
    pub(crate) fn report(&mut self, failure: &Failure, may_recover: bool) {
        self.publish_stats();
        self.flight.give_up();
        self.on_failure.call(|| {
            let mut sequences: Vec<_> =
                self.sequences.values().chain(self.uploading.values()).map(Sequence::record).collect();
            sequences.sort_by_key(|sequence| std::cmp::Reverse(sequence.age));
            let stats = lock(&self.shared.stats).clone();
            FailureReport {
                failure: failure.clone(),
                may_recover,
                steps: self.flight.steps(),
                sequences,
                stats,
            }
        });
    }

    /// Only says it; the streams get their ends when the engine is dropped.
    pub(crate) fn fail(&self, failure: Failure) {
        tracing::error!("the engine has failed: {}", failure.message());
        self.set_health(Health::Failed(failure.message().to_owned()));
        *lock(&self.shared.failure) = Some(failure);
    }

    pub(crate) fn set_health(&self, health: Health) {
        *lock(&self.shared.health) = health;
    }

    fn publish_stats(&self) {
        let s = self.link.scheduler.stats();
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
            step_times: self.flight.times().clone(),
            num_rebuilt: self.link.generation,
        };
    }
}

/// However the engine thread ends, every stream gets its end, and gauges and health tell the truth.
impl Drop for Engine {
    fn drop(&mut self) {
        if thread::panicking() {
            let failure = Failure::Defect("the engine thread has panicked".into());
            self.report(&failure, false);
            self.fail(failure);
        }
        let reason = match &*lock(&self.shared.health) {
            Health::Failed(message) => FinishReason::EngineFailed(message.clone()),
            Health::Ready | Health::Stopping => FinishReason::Cancelled,
        };
        let mut left: Vec<Sequence> = std::mem::take(&mut self.sequences).into_values().collect();
        left.extend(std::mem::take(&mut self.uploading).into_values());
        left.extend(std::mem::take(&mut self.kept));
        let queued = std::mem::take(&mut self.deferred).into_iter().chain(self.commands.try_iter());
        left.extend(queued.filter_map(|command| match command {
            Command::Add { request, events, arrived } => Some(Sequence::new(*request, events, &[], arrived)),
            _ => None,
        }));
        for sequence in left {
            self.end(sequence, reason.clone());
        }
        let mut stats = lock(&self.shared.stats);
        (stats.num_running, stats.num_waiting, stats.kv_cache_usage) = (0, 0, 0.0);
    }
}
