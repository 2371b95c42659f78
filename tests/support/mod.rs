//! Engines, chats and servers for the integration tests. No assertions about results.

pub(crate) mod forward;
pub(crate) mod server;

use serde_json::{Value, json};
use spark_engine::{Dtype, EngineBuilder, EngineOptions, SparkEngine, image_data_url};
use spark_testing::{Case, media_path, model_dir};

/// A builder for fixture `model` with memory and sizes fit for a test machine.
pub(crate) fn builder(model: &str, dtype: Dtype) -> EngineBuilder {
    EngineBuilder::new(model_dir(model).display().to_string()).dtype(dtype).threads(2).engine(small)
}

fn small(options: &mut EngineOptions) {
    options.max_model_len = Some(1024);
    options.max_num_seqs = 16;
    options.kv_cache_memory_bytes = Some(64 << 20);
}

/// The oracle's conversation as a chat body: greedy, `max_tokens` long whatever is sampled, ids in the answer.
pub(crate) fn chat_body(case: &Case, max_tokens: usize) -> Value {
    json!({
        "messages": messages(case),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "return_token_ids": true,
    })
}

/// Messages with the images of `media/` as `data:` URLs.
pub(crate) fn messages(case: &Case) -> Value {
    let mut messages = case.messages.clone();
    for message in messages.as_array_mut().expect("messages are a list") {
        let Some(parts) = message["content"].as_array_mut() else { continue };
        for part in parts.iter_mut().filter(|part| part["type"] == "image") {
            let name = part["image"].as_str().expect("an image part names its file");
            let url = image_data_url(&media_path(name)).expect("the image is committed");
            *part = json!({"type": "image_url", "image_url": {"url": url}});
        }
    }
    messages
}

/// What an engine answers to a chat: the whole body.
pub(crate) async fn answer(engine: &SparkEngine, body: Value) -> Value {
    let generation = engine.chat(body).await.expect("the body is valid");
    generation.into_response().await.expect("the engine runs")
}

/// Token ids under `key` of an answer or of its first choice.
pub(crate) fn ids(value: &Value) -> Vec<u32> {
    let list = value.as_array().unwrap_or_else(|| panic!("expected a list of ids, got {value}"));
    list.iter().map(|id| id.as_u64().expect("an id is a number") as u32).collect()
}

/// Prompt ids and generated ids of a chat answer.
pub(crate) fn prompt_and_output(answer: &Value) -> (Vec<u32>, Vec<u32>) {
    (ids(&answer["prompt_token_ids"]), ids(&answer["choices"][0]["token_ids"]))
}

/// Runs a future to its end.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime starts").block_on(future)
}

/// The placeholder token of an image prompt: its most frequent id.
pub(crate) fn placeholder(case: &Case) -> u32 {
    let count = |id: u32| case.prompt_ids.iter().filter(|&&other| other == id).count();
    case.prompt_ids.iter().copied().max_by_key(|&id| count(id)).expect("a prompt is not empty")
}
