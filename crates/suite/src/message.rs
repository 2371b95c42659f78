//! Messages in OpenAI's form. Pictures come before the words about them. No pixels and no chat template.

use serde_json::{Value, json};

/// A user's message of text.
pub(crate) fn user(text: &str) -> Value {
    json!({ "role": "user", "content": text })
}

/// A user's message of `pictures` pictures and then text. The pictures themselves are in the sample.
pub(crate) fn user_with_pictures(text: &str, pictures: usize) -> Value {
    let mut parts = vec![json!({ "type": "image" }); pictures];
    parts.push(json!({ "type": "text", "text": text }));
    json!({ "role": "user", "content": parts })
}

/// The assistant's message of text.
pub(crate) fn assistant(text: &str) -> Value {
    json!({ "role": "assistant", "content": text })
}
