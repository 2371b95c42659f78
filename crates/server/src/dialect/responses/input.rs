//! The items of a response's `input` as messages of a chat. No other field.

use serde_json::{Value, json};

use crate::ApiError;
use crate::body::kind;
use crate::dialect::node::{Node, nodes};

const FIELD: &str = "input";

/// Adds what `input` says to a conversation.
///
/// # Errors
/// Names the place that is wrong.
pub(super) fn read_input(input: Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    match input {
        Value::String(text) => messages.push(json!({"role": "user", "content": text})),
        items @ Value::Array(_) => {
            for item in nodes(items, FIELD, FIELD)? {
                read_item(item, messages)?;
            }
        }
        other => {
            let message = format!("{FIELD} must be a string or a list of items, not {}", kind(&other));
            return Err(ApiError::field(FIELD, message));
        }
    }
    if messages.is_empty() {
        return Err(ApiError::field(FIELD, format!("{FIELD} must have at least one item")));
    }
    Ok(())
}

fn read_item(mut item: Node, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    match item.text("type")?.as_deref() {
        None | Some("message") => read_message(item, messages),
        Some("reasoning") => {
            let text = read_reasoning(&mut item)?;
            if !text.is_empty() {
                assistant(messages, |turn| turn.get("tool_calls").is_none() && turn["content"] == "")["reasoning"] =
                    json!(text);
            }
            Ok(())
        }
        Some("function_call") => {
            let call = json!({"id": item.need_text("call_id")?, "type": "function", "function":
                {"name": item.need_text("name")?, "arguments": item.need_text("arguments")?}});
            let turn = assistant(messages, |_| true);
            match &mut turn["tool_calls"] {
                Value::Array(calls) => calls.push(call),
                none => *none = json!([call]),
            }
            Ok(())
        }
        Some("function_call_output") => {
            let id = item.need_text("call_id")?;
            let content = read_content(&mut item, "output")?;
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
            Ok(())
        }
        Some(other) => Err(item.refusal(format!("has the type {other:?}, which is not supported"))),
    }
}

/// The last turn, if it is the assistant's and `fits`, or a new one: what a model says at once is several items here and
/// one message there.
fn assistant(messages: &mut Vec<Value>, fits: impl Fn(&Value) -> bool) -> &mut Value {
    let is_open = messages.last().is_some_and(|last| last["role"] == "assistant" && fits(last));
    if !is_open {
        messages.push(json!({"role": "assistant", "content": ""}));
    }
    let last = messages.len() - 1;
    &mut messages[last]
}

fn read_message(mut item: Node, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = item.need_text("role")?;
    let content = read_content(&mut item, "content")?;
    match role.as_str() {
        "user" => messages.push(json!({"role": "user", "content": content})),
        "system" | "developer" => messages.push(json!({"role": "system", "content": joined(&content)})),
        "assistant" => {
            let fits = |turn: &Value| turn.get("tool_calls").is_none() && turn["content"] == "";
            assistant(messages, fits)["content"] = joined(&content);
        }
        _ => {
            let rule = "must have the role \"user\", \"assistant\", \"system\" or \"developer\"";
            return Err(item.refusal(rule));
        }
    }
    Ok(())
}

/// Text, or a list of parts of which the chat knows the kinds.
fn read_content(item: &mut Node, key: &str) -> Result<Value, ApiError> {
    let parts = match item.take(key) {
        Some(text @ Value::String(_)) => return Ok(text),
        Some(parts @ Value::Array(_)) => parts,
        other => return Err(item.wrong(key, "a string or a list of parts", &other.unwrap_or_default())),
    };
    let place = format!("{}.{key}", item.place());
    nodes(parts, &place, FIELD)?.into_iter().map(read_part).collect()
}

fn read_part(mut part: Node) -> Result<Value, ApiError> {
    match part.need_text("type")?.as_str() {
        "input_text" | "output_text" | "text" => Ok(json!({"type": "text", "text": part.need_text("text")?})),
        "refusal" => Ok(json!({"type": "text", "text": part.need_text("refusal")?})),
        "input_image" => {
            if part.take("file_id").is_some() {
                return Err(part.refusal("has a file_id; files are not stored here: send an image_url"));
            }
            let detail = part.take("detail");
            let url = part.need_text("image_url")?;
            Ok(json!({"type": "image_url", "image_url": {"url": url, "detail": detail}}))
        }
        other => Err(part.refusal(format!("has the type {other:?}, which is not supported"))),
    }
}

/// A content of text alone as one string.
fn joined(content: &Value) -> Value {
    match content {
        Value::Array(parts) if parts.iter().all(|part| part["type"] == "text") => {
            Value::String(parts.iter().filter_map(|part| part["text"].as_str()).collect())
        }
        other => other.clone(),
    }
}

/// The text of a reasoning item; what is encrypted says nothing here.
fn read_reasoning(item: &mut Node) -> Result<String, ApiError> {
    let mut text = String::new();
    if let Some(parts) = item.take("content") {
        for mut part in nodes(parts, &format!("{}.content", item.place()), FIELD)? {
            text.push_str(&part.need_text("text")?);
        }
    }
    Ok(text)
}
