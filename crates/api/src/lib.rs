//! What front ends and the engine say to each other: requests, sampling parameters, events, limits.
//!
//! Plain data and one trait ([`Engine`]). No text, no JSON, no device, no IO: token ids go in, token ids come out.
//! A [`Request`] is built through [`Request::new`], which validates it once against [`Limits`]; from then on it is
//! valid and nobody checks it again.
#![forbid(unsafe_code)]

mod constraint;
mod engine;
mod event;
mod limits;
mod media;
mod request;
mod sampling;

pub use constraint::{ConstraintError, TokenConstraint};
pub use engine::{
    DurationHistogram, Engine, EngineInfo, EngineStats, EventStream, Health, StepHistogram, SubmitError,
};
pub use event::{Event, FinishReason, Finished, RankedToken, RequestTimings, TokenEvent, TokenLogprobs};
pub use limits::{Limits, MediaGeometry};
pub use media::{GridThw, MediaHash, MediaItem};
pub use request::{Request, RequestError};
pub use sampling::{MAX_LOGPROB_TOKEN_IDS, SamplingParams};

/// Vocabulary index of a token.
pub type TokenId = u32;
