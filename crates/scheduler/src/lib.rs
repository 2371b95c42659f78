//! Which rows run in the next step: sequences, paged KV blocks with a prefix cache, and the step policy.
//!
//! Pure policy. It does no IO and knows no clock, thread, device or random number: equal calls give equal plans, so it
//! is driven token by token in tests. Running out of blocks is a scheduling result, never an error.
//!
//! ```text
//! add -> waiting --admit--> running --complete--> finished
//!           ^                  |
//!           +----- preempt ----+        (drops the blocks; recomputed at re-admission)
//! ```
//!
//! [`Scheduler::schedule`] plans a step and counts its tokens as computed at once; [`Scheduler::complete`] brings the
//! sampled tokens. One step may be in flight while the next one is planned: a token that is not known yet is then
//! [`PlanToken::Pending`]. Steps execute in the order of their plans, and what a step in flight uses (blocks, slots,
//! encoder entries) is given to nobody else before that step completes.
#![forbid(unsafe_code)]

mod block_hash;
mod block_manager;
mod config;
mod encoder_cache;
mod new_sequence;
mod plan;
mod scheduler;
mod sequence;

pub use config::{ConfigError, Policy, SchedulerConfig};
pub use new_sequence::{AddError, MediaSpan, NewSequence};
pub use plan::{
    EncodeMedia, Finish, MediaRows, PlanToken, PlannedSeq, SchedulerStats, SeqId, SeqUpdate, StepId, StepPlan,
};
pub use scheduler::Scheduler;
