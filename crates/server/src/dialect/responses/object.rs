//! The response object: what a request asked for, repeated, with what came of it. No events.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::store::ResponseStore;
use crate::ApiError;
use crate::answer::{Shape, Usage};
use crate::ids::unix_seconds;

/// What a response repeats of its request, and where it is kept.
pub(crate) struct ResponseHead {
    /// Fields that are the same in the object at all times.
    pub(crate) echo: Map<String, Value>,
    /// The store, and the conversation up to the answer, without instructions.
    pub(crate) keep: Option<(Arc<ResponseStore>, Vec<Value>)>,
    /// What it was asked, as items; empty if it is not kept.
    pub(crate) input: Arc<Vec<Value>>,
    pub(crate) is_background: bool,
}

/// The object in a state, with the items that are there.
pub(crate) fn response_json(shape: &Shape, head: &ResponseHead, status: &str, output: &[Value]) -> Value {
    let mut json = json!({
        "id": shape.id,
        "object": "response",
        "created_at": shape.created,
        "status": status,
        "background": head.is_background,
        "completed_at": (status == "completed").then(unix_seconds),
        "error": null,
        "incomplete_details": (status == "incomplete").then(|| json!({"reason": "max_output_tokens"})),
        "model": shape.model,
        "output": output,
        "usage": null,
        "service_tier": "default",
        "truncation": "disabled",
        "max_tool_calls": null,
        "user": null,
    });
    if let Value::Object(fields) = &mut json {
        fields.extend(head.echo.clone());
    }
    json
}

/// The object's `usage`.
pub(crate) fn usage_json(usage: Usage, shape: &Shape) -> Value {
    json!({
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached},
        "output_tokens": usage.num_completion,
        "output_tokens_details": {"reasoning_tokens": if shape.reasons { usage.num_reasoning } else { 0 }},
        "total_tokens": usage.num_prompt + usage.num_completion,
    })
}

/// The object's `error`.
pub(crate) fn failure_json(error: &ApiError) -> Value {
    let code = if error.status() < 500 { "invalid_prompt" } else { "server_error" };
    json!({"code": code, "message": error.to_string()})
}
