//! The `prompt` of a completion: text or token ids, one or several.

use serde_json::Value;
use spark_api::TokenId;

use crate::ApiError;
use crate::body::{Body, as_token_id, wrong_type};

/// Most prompts of one request, as in vLLM.
pub(crate) const MAX_PROMPTS: usize = 1024;
const WANTED: &str = "a string, a list of strings, a list of token ids or a list of such lists";

/// One prompt as it was sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PromptInput {
    Text(String),
    Ids(Vec<TokenId>),
    /// Texts and ids, one after the other; each text is tokenised by itself.
    Mixed(Vec<PromptInput>),
    /// A text with marks for images ([`IMAGE_MARK`]), and their files as base64.
    WithImages {
        text: String,
        images: Vec<String>,
    },
}

/// Where an image of [`PromptInput::WithImages`] stands: llama-server's mark, as `/props` tells.
pub(crate) const IMAGE_MARK: &str = "<__media__>";

/// Reads `prompt`.
///
/// # Errors
/// When it is absent, empty, of another type or of mixed types.
pub(crate) fn read_prompts(body: &mut Body) -> Result<Vec<PromptInput>, ApiError> {
    let items = match body.take("prompt") {
        None => return Err(ApiError::field("prompt", "prompt is missing")),
        Some(Value::String(text)) => return Ok(vec![PromptInput::Text(text)]),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("prompt", WANTED, &other)),
    };
    if items.first().is_some_and(Value::is_number) {
        return Ok(vec![PromptInput::Ids(ids(&items)?)]);
    }
    if items.is_empty() || items.len() > MAX_PROMPTS {
        let message = format!("prompt has {} entries; 1 to {MAX_PROMPTS} are allowed", items.len());
        return Err(ApiError::field("prompt", message));
    }
    let all_text = items.iter().all(Value::is_string);
    items.into_iter().map(|item| one_of_many(item, all_text)).collect()
}

fn one_of_many(item: Value, all_text: bool) -> Result<PromptInput, ApiError> {
    match item {
        Value::String(text) if all_text => Ok(PromptInput::Text(text)),
        Value::Array(items) if !all_text => Ok(PromptInput::Ids(ids(&items)?)),
        other => Err(wrong_type("prompt", WANTED, &other)),
    }
}

fn ids(items: &[Value]) -> Result<Vec<TokenId>, ApiError> {
    items.iter().map(|item| as_token_id("prompt", item)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(prompt: &Value) -> Result<Vec<PromptInput>, ApiError> {
        read_prompts(&mut Body::new(json!({"prompt": prompt}))?)
    }

    #[test]
    fn the_four_forms() {
        assert_eq!(read(&json!("a")).unwrap(), [PromptInput::Text("a".into())]);
        assert_eq!(read(&json!(["a", "b"])).unwrap().len(), 2);
        assert_eq!(read(&json!([1, 2])).unwrap(), [PromptInput::Ids(vec![1, 2])]);
        assert_eq!(
            read(&json!([[1], [2, 3]])).unwrap(),
            [PromptInput::Ids(vec![1]), PromptInput::Ids(vec![2, 3])]
        );
    }

    #[test]
    fn everything_else_names_the_prompt() {
        for prompt in [
            json!(null),
            json!(7),
            json!({}),
            json!([]),
            json!([{}]),
            json!(["a", 1]),
            json!(["a", [1]]),
            json!([1, "a"]),
            json!([-1]),
            json!([1.5]),
            json!([4294967296u64]),
            json!([[1], "a"]),
            json!([[[1]]]),
            Value::Array(vec![json!("a"); MAX_PROMPTS + 1]),
        ] {
            let error = read(&prompt).expect_err(&prompt.to_string()).to_json();
            assert_eq!(error["error"]["param"], "prompt");
        }
    }
}
