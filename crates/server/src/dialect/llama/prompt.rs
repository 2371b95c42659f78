//! The prompts of llama-server: texts, token ids, both in one, and texts with pictures. Tokenises nothing.

use serde_json::{Map, Value};

use crate::ApiError;
use crate::body::{Body, as_token_id, kind, strings, wrong_type};
use crate::completion_request::{MAX_PROMPTS, PromptInput};

const NAME: &str = "prompt";
const WANTED: &str =
    "a string, a list of token ids and strings, an object with prompt_string, or a list of such prompts";

/// Reads `prompt`. A list with a number in it is one prompt; any other list is several.
///
/// # Errors
/// When it is absent, empty or of another form.
pub(super) fn read_prompts(body: &mut Body) -> Result<Vec<PromptInput>, ApiError> {
    match body.take(NAME) {
        None => Err(ApiError::field(NAME, "prompt is missing")),
        Some(Value::Array(items)) if !items.iter().any(Value::is_number) => {
            if items.is_empty() || items.len() > MAX_PROMPTS {
                let message = format!("prompt has {} entries; 1 to {MAX_PROMPTS} are allowed", items.len());
                return Err(ApiError::field(NAME, message));
            }
            items.into_iter().map(one).collect()
        }
        Some(prompt) => Ok(vec![one(prompt)?]),
    }
}

fn one(prompt: Value) -> Result<PromptInput, ApiError> {
    match prompt {
        Value::String(text) => Ok(PromptInput::Text(text)),
        Value::Array(items) if items.iter().any(Value::is_string) => mixed(items).map(PromptInput::Mixed),
        Value::Array(items) => {
            items.iter().map(|item| as_token_id(NAME, item)).collect::<Result<_, _>>().map(PromptInput::Ids)
        }
        Value::Object(fields) => with_media(fields),
        other => Err(wrong_type(NAME, WANTED, &other)),
    }
}

/// A list of ids and texts. Ids that follow each other are one part: a part for each would take many times the body.
fn mixed(items: Vec<Value>) -> Result<Vec<PromptInput>, ApiError> {
    let mut parts = Vec::new();
    for item in items {
        match (item, parts.last_mut()) {
            (Value::String(text), _) => parts.push(PromptInput::Text(text)),
            (item @ Value::Number(_), Some(PromptInput::Ids(ids))) => ids.push(as_token_id(NAME, &item)?),
            (item @ Value::Number(_), _) => parts.push(PromptInput::Ids(vec![as_token_id(NAME, &item)?])),
            (other, _) => return Err(wrong_type(NAME, WANTED, &other)),
        }
    }
    Ok(parts)
}

/// `{"prompt_string": TEXT, "multimodal_data": [BASE64, ...]}`
fn with_media(mut fields: Map<String, Value>) -> Result<PromptInput, ApiError> {
    let wrong = |message: String| Err(ApiError::field(NAME, message));
    if let Some(name) =
        fields.keys().find(|name| !["prompt_string", "multimodal_data"].contains(&name.as_str()))
    {
        let name: String = name.chars().take(64).collect();
        return wrong(format!("prompt has the key {name:?}; known here: prompt_string, multimodal_data"));
    }
    let mut take = |name| fields.get_mut(name).map(Value::take).unwrap_or_default();
    let text = match take("prompt_string") {
        Value::String(text) => text,
        other => return wrong(format!("prompt.prompt_string must be a string, not {}", kind(&other))),
    };
    let items = match take("multimodal_data") {
        Value::Null => return Ok(PromptInput::Text(text)),
        Value::Array(items) => items,
        other => {
            return wrong(format!("prompt.multimodal_data must be a list of strings, not {}", kind(&other)));
        }
    };
    let images = strings(items, |item| {
        ApiError::field(NAME, format!("prompt.multimodal_data has {}; it must be base64", kind(item)))
    })?;
    Ok(PromptInput::WithImages { text, images })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(prompt: &Value) -> Result<Vec<PromptInput>, ApiError> {
        read_prompts(&mut Body::new(json!({"prompt": prompt}))?)
    }

    #[test]
    fn every_form_is_read() {
        let text = |text: &str| PromptInput::Text(text.into());
        let picture = || PromptInput::WithImages { text: "a".into(), images: vec!["eA==".into()] };
        let mixed =
            || PromptInput::Mixed(vec![PromptInput::Ids(vec![1]), text("b"), PromptInput::Ids(vec![2, 3])]);
        for (prompt, expected) in [
            (json!("a"), vec![text("a")]),
            (json!([1, 2]), vec![PromptInput::Ids(vec![1, 2])]),
            (json!([1, "b", 2, 3]), vec![mixed()]),
            (json!(["a"]), vec![text("a")]),
            (json!(["a", [1, "b", 2, 3], [3]]), vec![text("a"), mixed(), PromptInput::Ids(vec![3])]),
            (json!({"prompt_string": "a"}), vec![text("a")]),
            (json!([{"prompt_string": "a", "multimodal_data": ["eA=="]}, "a"]), vec![picture(), text("a")]),
        ] {
            assert_eq!(read(&prompt).unwrap(), expected, "{prompt}");
        }
    }

    #[test]
    fn everything_else_names_the_prompt() {
        for prompt in [
            json!(null),
            json!(7),
            json!([]),
            json!({}),
            json!([{}]),
            json!([1, [2]]),
            json!([1, {"prompt_string": "a"}]),
            json!([1.5]),
            json!([-1]),
            json!([["a", [1]]]),
            json!([true]),
            json!({"prompt_string": 1}),
            json!({"prompt_string": "a", "multimodal_data": "eA=="}),
            json!({"prompt_string": "a", "multimodal_data": [1]}),
            json!({"prompt_string": "a", "image_data": []}),
            Value::Array(vec![json!("a"); MAX_PROMPTS + 1]),
        ] {
            let error = read(&prompt).expect_err(&prompt.to_string()).to_json();
            assert_eq!(error["error"]["param"], NAME, "{error}");
        }
    }
}
