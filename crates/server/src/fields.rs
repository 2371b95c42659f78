//! The one table of request fields: which work, which mean nothing here, which are refused. No values are read here.

mod tables;

use std::collections::BTreeSet;

use parking_lot::Mutex;
use serde_json::{Map, Value};

use crate::ApiError;

/// Which kind of body a field belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/chat/completions/batch`
    Batch,
    /// `/v1/completions`
    Completions,
    /// `/v1/messages`
    Messages,
    /// `/v1/responses`
    Responses,
    /// `/completion`
    Llama,
}

impl Endpoint {
    /// All of them.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 6] =
        [Self::Chat, Self::Batch, Self::Completions, Self::Messages, Self::Responses, Self::Llama];
}

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Support {
    /// Read and obeyed (`params.rs`, `chat_request.rs`, `completion_request.rs`, `dialect/`).
    Works,
    /// Says something about the client, nothing about the answer.
    NoEffect,
    /// 400, unless the value is null or asks for what happens anyway.
    Refused(Neutral),
    /// 400, unless the value is null: another field says the same. What to send.
    Replaced(&'static str),
}

/// Values of a refused field that ask for nothing, so that clients which always send the field are served.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Neutral {
    /// Only null.
    Null,
    /// `[]`, `{}` or `""`.
    Empty,
    /// This boolean.
    Bool(bool),
    /// This number.
    Number(f64),
    /// One of these strings.
    Words(&'static [&'static str]),
    /// `["text"]`.
    ListText,
}

impl Neutral {
    fn holds(self, value: &Value) -> bool {
        match self {
            Self::Null => false,
            Self::Empty => match value {
                Value::Array(items) => items.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::String(text) => text.is_empty(),
                _ => false,
            },
            Self::Bool(neutral) => value.as_bool() == Some(neutral),
            Self::Number(neutral) => value.as_f64() == Some(neutral),
            Self::Words(words) => value.as_str().is_some_and(|text| words.contains(&text)),
            Self::ListText => value.as_array().is_some_and(|items| items.iter().all(|item| item == "text")),
        }
    }
}

pub(crate) use self::tables::PASSED;
use self::tables::{BATCH, CHAT, COMMON, COMPLETIONS, LLAMA, MESSAGES, RESPONSES};
use Support::{Refused, Replaced};

/// Looks a field up.
pub(crate) fn support(endpoint: Endpoint, name: &str) -> Option<Support> {
    all(endpoint).find(|(field, _)| *field == name).map(|(_, support)| support)
}

/// The table of an endpoint.
pub(crate) fn all(endpoint: Endpoint) -> impl Iterator<Item = (&'static str, Support)> {
    let (own, shared): (&[_], &[_]) = match endpoint {
        Endpoint::Chat | Endpoint::Batch => (CHAT, COMMON),
        Endpoint::Completions => (COMPLETIONS, COMMON),
        Endpoint::Messages => (MESSAGES, &[]),
        Endpoint::Responses => (RESPONSES, &[]),
        Endpoint::Llama => (LLAMA, &[]),
    };
    let is_translated = matches!(endpoint, Endpoint::Messages | Endpoint::Responses);
    let passed = PASSED.iter().filter(move |_| is_translated).map(|name| (*name, Support::Works));
    let special: &[_] = if endpoint == Endpoint::Batch { BATCH } else { &[] };
    let is_special = |name: &str| special.iter().any(|(field, _)| *field == name);
    let others = own.iter().chain(shared).filter(move |(name, _)| !is_special(name));
    special.iter().chain(others).copied().chain(passed)
}

/// Refuses fields that are known and not supported; warns about unknown ones.
///
/// # Errors
/// Names the first refused field.
pub(crate) fn check(
    endpoint: Endpoint,
    body: &Map<String, Value>,
    unknown: &UnknownFields,
) -> Result<(), ApiError> {
    body.keys().filter(|name| support(endpoint, name).is_none()).for_each(|name| unknown.warn(name));
    refuse_unsupported(endpoint, body)
}

/// Refuses fields that are known and not supported.
///
/// # Errors
/// Names the first.
pub(crate) fn refuse_unsupported(endpoint: Endpoint, body: &Map<String, Value>) -> Result<(), ApiError> {
    for (name, value) in body {
        let message = match support(endpoint, name) {
            Some(Refused(neutral)) if !neutral.holds(value) => {
                format!("{name} is not supported with this value; leave it out")
            }
            Some(Replaced(by)) => format!("{name} is not supported; send {by} instead"),
            _ => continue,
        };
        if !value.is_null() {
            return Err(ApiError::field(name.clone(), message));
        }
    }
    Ok(())
}

/// Names of unknown fields seen so far: each is warned about once.
#[derive(Debug, Default)]
pub(crate) struct UnknownFields(Mutex<BTreeSet<String>>);

/// Most names remembered, and most bytes shown of each: clients choose the names, so memory and log are bounded.
const MAX_NAMES: usize = 256;
const MAX_NAME_CHARS: usize = 64;

impl UnknownFields {
    /// Warns, the first time that a name is seen.
    pub(crate) fn warn(&self, name: &str) {
        let name: String = name.chars().take(MAX_NAME_CHARS).collect();
        let mut seen = self.0.lock();
        if seen.len() < MAX_NAMES && seen.insert(name.clone()) {
            // Debug format: control characters of the client do not reach the log.
            tracing::warn!("unknown request field {name:?} is ignored");
        }
    }

    #[cfg(test)]
    fn names(&self) -> Vec<String> {
        self.0.lock().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check_chat(body: &Value) -> Result<(), ApiError> {
        check(Endpoint::Chat, body.as_object().unwrap(), &UnknownFields::default())
    }

    #[test]
    fn refused_fields_are_named_and_neutral_values_pass() {
        for body in [
            json!({"functions": [{"name": "f"}]}),
            json!({"guided_json": {}}),
            json!({"chat_template": "{{ 1 }}"}),
            json!({"modalities": ["text", "audio"]}),
            json!({"best_of": 2}),
            json!({"repeat_penalty": 1.1}),
            json!({"reasoning_format": "none"}),
            json!({"mirostat": 2}),
            json!({"echo": true}),
            json!({"function_call": {"name": "f"}}),
            json!({"spaces_between_special_tokens": false}),
        ] {
            let name = body.as_object().unwrap().keys().next().unwrap().clone();
            let error = check_chat(&body).expect_err(&name);
            assert_eq!(error.to_json()["error"]["param"], json!(name));
        }
        let neutral = json!({"response_format": {"type": "text"}, "guided_json": null, "best_of": 1,
            "modalities": ["text"], "echo": false, "function_call": "auto", "functions": null, "store": false,
            "spaces_between_special_tokens": true, "repeat_penalty": 1.0, "typical_p": 1, "mirostat": 0, "top_n_sigma": -1});
        check_chat(&neutral).unwrap();
    }

    #[test]
    fn fields_with_another_name_here_say_it() {
        for (name, by) in [
            ("guided_json", r#"{"structured_outputs": {"json": ...}}"#),
            ("guided_regex", r#"{"structured_outputs": {"regex": ...}}"#),
            ("guided_choice", r#"{"structured_outputs": {"choice": ...}}"#),
            ("guided_grammar", r#"{"structured_outputs": {"grammar": ...}}"#),
            ("structural_tag", r#"{"structured_outputs": {"structural_tag": ...}}"#),
        ] {
            let error = check_chat(&json!({name: "x"})).expect_err(name).to_json();
            let message = error["error"]["message"].as_str().unwrap();
            assert!(message.contains(by) && !message.contains("leave it out"), "{message}");
            assert!(crate::structured::CONSTRAINTS.iter().any(|constraint| by.contains(constraint)));
            check_chat(&json!({name: null})).unwrap();
        }
    }

    #[test]
    fn an_unknown_field_is_remembered_once_and_the_memory_is_bounded() {
        let unknown = UnknownFields::default();
        unknown.warn("zebra");
        unknown.warn("zebra");
        assert_eq!(unknown.names(), ["zebra"]);
        for i in 0..2 * MAX_NAMES {
            unknown.warn(&format!("field-{i}-{}", "x".repeat(1000)));
        }
        assert_eq!(unknown.names().len(), MAX_NAMES);
        assert!(unknown.names().iter().all(|name| name.len() <= MAX_NAME_CHARS));
    }

    #[test]
    fn no_field_is_listed_twice() {
        for endpoint in Endpoint::ALL {
            let names: Vec<_> = all(endpoint).map(|(name, _)| name).collect();
            assert_eq!(names.len(), names.iter().collect::<BTreeSet<_>>().len());
        }
    }
}
