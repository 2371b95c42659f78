//! The vocabulary of the engine's mathematics: the [`Backend`] trait, what a step is made of, how weights reach it.
//!
//! No implementation lives here. There are exactly two: `spark-cpu` (the reference) and the CUDA backend. A model is
//! written once over [`Backend`]; each backend decides how it stores weights, activations and KV.
#![forbid(unsafe_code)]

mod backend;
mod error;
mod group;
mod kv;
mod memory;
mod step;
mod tally;
mod weight;

pub use backend::{Activation, AttentionSpec, Backend, RouterSpec, VisionSpec};
pub use error::{Error, Result};
pub use group::{Collective, Rank};
pub use kv::{KvDtype, KvSpec};
pub use memory::Memory;
pub use step::{
    ActivationSpec, SampledToken, SeqInput, SlotParams, StateSpec, StepInputs, StepKey, StepOutput,
    TokenInput, TokenLogprob, VisualRows,
};
pub use tally::ExpertTally;
pub use weight::{Dtype, ExpertsWeight, LinearWeight, Matrix, MatrixData, VectorWeight};

pub use bytes::Bytes;
