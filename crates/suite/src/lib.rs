//! The tasks of the demo model `spark-tiny-vl`: seeded pictures and conversations with their answers.
//!
//! One generator serves training (`models/spark-tiny-vl`), `spark-engine eval` and the tests, so that what is measured is
//! what was taught. It draws pixels and writes messages; it knows no tokenizer, no model, no engine and no file.
//! Equal seeds give equal samples on every machine.
#![forbid(unsafe_code)]

mod canvas;
mod language;
mod message;
mod picture;
mod reading;
mod sample;
mod scene;
mod score;
mod task;

pub use picture::Picture;
pub use sample::Sample;
pub use score::{Answer, Scoring, ToolCall};
pub use task::{Split, Task, task, tasks};
