//! `spark-engine` as a library: load a Qwen3-VL checkpoint and generate from it inside a Rust service.
//!
//! [`EngineBuilder`] loads a model and starts an engine; [`SparkEngine`] takes chats and completions in OpenAI's JSON form
//! and gives a stream of text, or takes token ids and gives a stream of events. Dropping a stream cancels its request.
//! There is no global state: two engines live side by side in one process.
//!
//! ```
//! use serde_json::json;
//! use spark_engine::{EngineBuilder, image_data_url};
//!
//! # const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/spark-tiny-vl/awq");
//! # const PICTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/media/demo.png");
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // A folder, or a Hugging Face id in the local cache: "Qwen/Qwen3-VL-30B-A3B-Instruct".
//!     let engine = EngineBuilder::new(MODEL).engine(|options| options.max_model_len = Some(4096)).build()?;
//!     let mut answer = engine
//!         .chat(json!({
//!             "messages": [{"role": "user", "content": [
//!                 {"type": "image_url", "image_url": {"url": image_data_url(PICTURE.as_ref())?}},
//!                 {"type": "text", "text": "Describe the picture."},
//!             ]}],
//!             "max_tokens": 64,
//!         }))
//!         .await?;
//!     # let mut whole = String::new();
//!     while let Some(delta) = answer.next().await {
//!         let delta = delta?;
//!         print!("{}", delta.text);
//!         # whole += &delta.text;
//!     }
//!     # assert!(whole.contains("a pink ring at the top left"), "{whole}");
//!     Ok(())
//! }
//! ```
//!
//! A service that speaks HTTP mounts [`server::router`] on [`SparkEngine::front_end`]; one that has token ids already uses
//! [`SparkEngine::request`] and [`SparkEngine::submit`]. The repository's `examples` folder has a program for each.
#![forbid(unsafe_code)]

mod builder;
mod demo_model;
mod encoder;
mod error;
mod facade;
pub mod fingerprint;
mod model_files;
mod ranks;
mod start;

pub use builder::EngineBuilder;
pub use demo_model::{DEMO_MODEL, find_demo_model};
pub use encoder::{EncoderTimes, ListTimes, Pictures};
pub use error::{Error, Result};
pub use facade::{SparkEngine, image_data_url};
pub use model_files::{DTYPES, ModelFiles, Quantization, generation_defaults};
pub use ranks::{OnJoined, Ranks, Role, StartRanks};
pub use start::{Device, LoadFormat, NativeFp4, PrefillActivations, StartTimes, Started};

pub use spark_api as api;
pub use spark_backend::{Dtype, ExpertTally, Memory, Rank};
pub use spark_comm as comm;
pub use spark_cuda::Profile;
pub use spark_models::{EncoderSplit, HeadDtype, MoeParallel};
pub use spark_runtime::{
    EngineHandle, EngineOptions, Failure, FailureHook, FailureReport, KvCacheDtype, MemoryPlan, MemoryUse,
    Policy, SequenceRecord, StepRecord,
};
pub use spark_server as server;
pub use spark_server::{ApiError, Generation};
pub use spark_text::Tokenizer;
pub use spark_vision::ImageProcessorOverrides;
pub use spark_weights::{LoadProgress, LoadStrategy, ProgressFn};
