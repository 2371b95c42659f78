//! Engines, chats and servers for the integration tests. No assertions about results.

pub(crate) mod chats;
pub(crate) mod forward;
pub(crate) mod questions;
pub(crate) mod server;
pub(crate) mod taught;

use serde_json::Value;
use spark_engine::{Dtype, EngineBuilder, EngineOptions};
use spark_testing::{Case, model_dir};

pub(crate) use chats::*;

/// A builder for fixture `model` with memory and sizes fit for a test machine.
pub(crate) fn builder(model: &str, dtype: Dtype) -> EngineBuilder {
    EngineBuilder::new(model_dir(model).display().to_string()).dtype(dtype).threads(2).engine(small)
}

fn small(options: &mut EngineOptions) {
    options.max_model_len = Some(1024);
    options.max_num_seqs = 16;
    options.kv_cache_memory_bytes = Some(64 << 20);
}

/// Prompt ids and generated ids of a chat answer.
pub(crate) fn prompt_and_output(answer: &Value) -> (Vec<u32>, Vec<u32>) {
    (ids(&answer["prompt_token_ids"]), ids(&answer["choices"][0]["token_ids"]))
}

/// The placeholder token of an image prompt: its most frequent id.
pub(crate) fn placeholder(case: &Case) -> u32 {
    let count = |id: u32| case.prompt_ids.iter().filter(|&&other| other == id).count();
    case.prompt_ids.iter().copied().max_by_key(|&id| count(id)).expect("a prompt is not empty")
}
