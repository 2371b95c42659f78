//! The networks, written once as mathematics over [`spark_backend::Backend`].
//!
//! Qwen3-VL (MoE and dense) and its text-only siblings Qwen3-MoE and Qwen3. No device, pointer, stream or dtype
//! branch lives here; what differs between the models is an argument, not a copy. Parameters are stated beside the
//! mathematics that uses them ([`spark_weights::ParamSpec`]).
#![forbid(unsafe_code)]

mod config;
mod decoder;
mod error;
mod fields;
mod head;
mod param;
mod qwen3_vl;
mod ranks;
mod registry;
mod rope;
mod vision;

pub use config::{EncoderSplit, ModelConfig, MoeConfig, TextConfig, VisionConfig};
pub use error::{Error, Result};
pub use head::{Head, HeadDtype};
pub use qwen3_vl::{Encoded, Qwen3Vl};
pub use ranks::MoeParallel;
pub use registry::{PUBLISHED, published};
pub use rope::{RopeConfig, RopeIndex};
