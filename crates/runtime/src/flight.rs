//! What an engine remembers of its last steps, and what it says about them when it fails. Writes no file.

use std::{
    collections::VecDeque,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use spark_api::{DurationHistogram, EngineStats};
use spark_scheduler::StepPlan;

use crate::Failure;

/// Steps that are remembered: some seconds of decoding, at some hundred bytes each.
const MAX_STEPS: usize = 1024;

/// One step: what was planned, and how long it took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepRecord {
    /// Its number; begins anew when a group of ranks is made anew.
    pub step: u64,
    /// When it was planned.
    pub planned: Instant,
    /// From the moment that the device could begin with it to its results; `None` while it has none.
    pub took: Option<Duration>,
    /// Sequences in it.
    pub num_seqs: usize,
    /// Those of them whose prompts are being computed.
    pub num_prefills: usize,
    /// Rows of all sequences.
    pub num_tokens: usize,
    /// Media that were encoded for it.
    pub num_encoded: usize,
}

/// A request at the moment of a failure. What it said is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceRecord {
    /// Its request's name.
    pub name: String,
    /// Since it came.
    pub age: Duration,
    /// Whether it was scheduled already.
    pub is_scheduled: bool,
    /// Prompt tokens.
    pub num_prompt_tokens: usize,
    /// Generated tokens.
    pub num_output_tokens: usize,
    /// Images.
    pub num_media: usize,
    /// Times that it was preempted.
    pub num_preemptions: usize,
}

/// An engine that fails, as it was then.
#[derive(Debug, Clone)]
pub struct FailureReport {
    /// What has happened.
    pub failure: Failure,
    /// Whether the engine will try to go on.
    pub may_recover: bool,
    /// The last steps, oldest first.
    pub steps: Vec<StepRecord>,
    /// Requests that had not ended, in order of arrival.
    pub sequences: Vec<SequenceRecord>,
    /// Counters and gauges.
    pub stats: EngineStats,
}

/// Called with every failure, by the engine's thread, before requests get their ends: it should be quick. It must not panic.
#[derive(Clone, Default)]
pub struct FailureHook(Option<Arc<Hook>>);

type Hook = dyn Fn(&FailureReport) + Send + Sync;

impl FailureHook {
    /// Calls `hook`.
    pub fn new(hook: impl Fn(&FailureReport) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hook)))
    }

    pub(crate) fn call(&self, report: impl FnOnce() -> FailureReport) {
        if let Some(hook) = &self.0 {
            hook(&report());
        }
    }
}

/// The same for all: ranks compare their options by this text.
impl fmt::Debug for FailureHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FailureHook")
    }
}

/// The last steps of an engine, and the times of all.
#[derive(Debug, Default)]
pub(crate) struct FlightRecorder {
    steps: VecDeque<StepRecord>,
    num_open: usize,
    last_end: Option<Instant>,
    times: DurationHistogram,
}

impl FlightRecorder {
    /// A step goes to the runner.
    pub(crate) fn planned(&mut self, plan: &StepPlan) {
        if self.steps.len() == MAX_STEPS {
            self.steps.pop_front();
        }
        self.num_open += 1;
        self.steps.push_back(StepRecord {
            step: plan.id.number(),
            planned: Instant::now(),
            took: None,
            num_seqs: plan.seqs.len(),
            num_prefills: plan.seqs.iter().filter(|seq| seq.num_output_tokens == 0).count(),
            num_tokens: plan.num_tokens,
            num_encoded: plan.encode.len(),
        });
    }

    /// The oldest step without results has them.
    pub(crate) fn completed(&mut self) {
        let now = Instant::now();
        let oldest = self.steps.len().checked_sub(self.num_open);
        if let Some(step) = oldest.and_then(|place| self.steps.get_mut(place)) {
            // A step that was planned early waits for the one before it.
            let began = self.last_end.map_or(step.planned, |end| end.max(step.planned));
            let took = now.saturating_duration_since(began);
            step.took = Some(took);
            self.times.observe(took);
        }
        self.num_open = self.num_open.saturating_sub(1);
        self.last_end = Some(now);
    }

    /// Steps in flight will never have results.
    pub(crate) fn give_up(&mut self) {
        self.num_open = 0;
    }

    pub(crate) fn steps(&self) -> Vec<StepRecord> {
        self.steps.iter().cloned().collect()
    }

    /// Of all steps so far.
    pub(crate) fn times(&self) -> &DurationHistogram {
        &self.times
    }
}
