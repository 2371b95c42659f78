//! OpenAI-compatible HTTP, and the front end behind it: JSON bodies to engine requests, engine events to answers.
//!
//! [`FrontEnd`] knows bodies and needs no network: the program's `generate` and `batch` use it directly. [`router`] and
//! [`serve`] put HTTP around it. Nothing here knows a model, a device or a scheduler: the engine is a
//! [`spark_api::Engine`].
#![forbid(unsafe_code)]

mod about;
mod allowed;
mod answer;
mod batch_chat;
mod body;
mod byte_bound;
mod chat_request;
mod choice;
mod chunks;
mod client;
mod completion_request;
mod data_url;
mod dialect;
mod echo;
mod error;
mod fields;
mod front_end;
mod generation;
mod grammars;
mod histogram;
mod http;
mod ids;
mod logprobs;
mod lru;
mod media;
mod metrics;
mod observe;
mod openapi;
mod options;
mod params;
mod parts;
mod pool;
mod progress;
mod prompts;
mod structured;
mod submit;
mod summary;
mod thinking;
mod timings;
mod tokenize;
mod tools;

pub use choice::{Delta, Finish, PromptReport, Stop};
pub use error::ApiError;
pub use front_end::FrontEnd;
pub use generation::Generation;
pub use http::{
    ApiKeys, Cors, CorsError, DEFAULT_MAX_BODY_BYTES, HttpState, ServeOptions, Tls, TlsError, router, serve,
};
pub use media::{FetchPolicy, LocalMedia, Network, NetworkError, VideoDecoder};
pub use observe::{Observer, Observers, Phases, RequestReport, TraceParent};
pub use openapi::openapi;
pub use options::{Options, ReasoningParser, SamplingDefaults, ToolCallParser};
pub use parts::{ToolCallDelta, ToolCallStart};
pub use timings::Timings;
