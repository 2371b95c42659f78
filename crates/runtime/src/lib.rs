//! Runs the model: plans become tensors, sampled tokens become events.
//!
//! Two threads. The engine thread owns the scheduler and talks to clients ([`EngineHandle`]); the runner thread owns
//! the backend and the model ([`ModelRunner`]). With asynchronous scheduling the engine plans step `n + 1` while step `n`
//! is computed, and on a device that works by itself the runner launches it then too. Both sleep when there is nothing to do. Text never comes here: token ids only.
//!
//! With several ranks, rank 0 is such an engine with a [`LeaderGroup`]: its runner sends every step to the other ranks
//! before it runs it. Each of those is a process in [`follow`]: the same runner without an engine.
#![forbid(unsafe_code)]
#![allow(unexpected_cfgs, reason = "`cargo xtask fuzz` sets `fuzzing`, as other fuzzers do")]

mod admission;
mod digest;
mod encode;
mod engine;
mod error;
mod flight;
mod follower;
#[cfg(fuzzing)]
pub mod fuzz;
mod group;
mod handle;
mod link;
mod masks;
mod memory;
mod options;
mod pipeline;
mod recovery;
mod runner;
mod running;
mod sequence;
mod wire;

pub use encode::{EncodeBatch, Medium};
pub use error::{Error, Result};
pub use flight::{FailureHook, FailureReport, SequenceRecord, StepRecord};
pub use follower::follow;
pub use group::LeaderGroup;
pub use handle::{EngineHandle, Failure};
pub use memory::{MemoryPlan, MemoryUse};
pub use options::{DEFAULT_BATCHED_TOKENS, EngineOptions, KvCacheDtype};
pub use runner::ModelRunner;
pub use running::{Rebuild, Running};
pub use spark_scheduler::Policy;
