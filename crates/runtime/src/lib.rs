//! Runs the model: plans become tensors, sampled tokens become events.
//!
//! Two threads. The engine thread owns the scheduler and talks to clients ([`EngineHandle`]); the runner thread owns
//! the backend and the model ([`ModelRunner`]). With asynchronous scheduling the engine plans step `n + 1` while step `n`
//! is computed, and on a device that works by itself the runner launches it then too. Both sleep when there is nothing to do. Text never comes here: token ids only.
#![forbid(unsafe_code)]

mod admission;
mod engine;
mod error;
mod handle;
mod memory;
mod options;
mod pipeline;
mod runner;
mod sequence;

pub use engine::start;
pub use error::{Error, Result};
pub use handle::EngineHandle;
pub use memory::{MemoryPlan, MemoryUse};
pub use options::{DEFAULT_BATCHED_TOKENS, EngineOptions, KvCacheDtype};
pub use runner::ModelRunner;
pub use spark_scheduler::Policy;
