//! `spark-engine` as a library: load a Qwen3-VL checkpoint and generate from it inside a Rust service.
//!
//! [`EngineBuilder`] loads a model and starts an engine; [`SparkEngine`] takes chats and completions in OpenAI's JSON form
//! and gives a stream of text, or takes token ids and gives a stream of events. Dropping a stream cancels its request.
//! There is no global state: two engines live side by side in one process.
//!
//! ```no_run
//! use serde_json::json;
//! use spark_engine::EngineBuilder;
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let engine = EngineBuilder::new("Qwen/Qwen3-VL-30B-A3B-Instruct").build()?;
//!     let mut answer = engine
//!         .chat(json!({"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 64}))
//!         .await?;
//!     while let Some(piece) = answer.next().await {
//!         print!("{}", piece?.text);
//!     }
//!     Ok(())
//! }
//! ```
#![forbid(unsafe_code)]

mod builder;
mod error;
mod facade;
mod model_files;

pub use builder::{Device, EngineBuilder, LoadFormat};
pub use error::{Error, Result};
pub use facade::{SparkEngine, image_data_url};
pub use model_files::{DTYPES, ModelFiles, generation_defaults};

pub use spark_api as api;
pub use spark_backend::Dtype;
pub use spark_runtime::{EngineOptions, HostMemory, KvCacheDtype, MemoryPlan, Policy};
pub use spark_server as server;
pub use spark_vision::ImageProcessorOverrides;
pub use spark_weights::{LoadProgress, LoadStrategy};
