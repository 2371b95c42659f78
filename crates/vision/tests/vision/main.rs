//! Tests of `spark-vision` through its public interface: goldens of Pillow, torchvision and transformers, hostile files,
//! processor configurations.
#![allow(clippy::unwrap_used, reason = "a failed unwrap in a helper of a test is a failed test")]

mod config;
mod golden;
mod hostile;
mod support;
mod video;
