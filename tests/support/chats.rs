//! Chats of the oracle, and what engines answer to them. No assertions about results.

use serde_json::{Value, json};
use spark_engine::{SparkEngine, image_data_url};
use spark_testing::{Case, media_path};

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

/// Runs a future to its end.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime starts").block_on(future)
}
