//! The one table of request fields: which work, which mean nothing here, which are refused. No values are read here.

use std::collections::BTreeSet;

use parking_lot::Mutex;
use serde_json::{Map, Value};

use crate::ApiError;

/// Which kind of body a field belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Support {
    /// Read and obeyed (`params.rs`, `chat_request.rs`, `completion_request.rs`).
    Works,
    /// Says something about the client, nothing about the answer.
    NoEffect,
    /// 400, unless the value is null or asks for what happens anyway.
    Refused(Neutral),
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

use Support::{NoEffect, Refused, Works};

/// Fields of both endpoints. A field that is not here is unknown: it warns once and is ignored.
pub(crate) const COMMON: &[(&str, Support)] = &[
    ("model", Works),
    ("max_tokens", Works),
    ("temperature", Works),
    ("top_p", Works),
    ("top_k", Works),
    ("min_p", Works),
    ("n", Works),
    ("stop", Works),
    ("stop_token_ids", Works),
    ("include_stop_str_in_output", Works),
    ("ignore_eos", Works),
    ("min_tokens", Works),
    ("seed", Works),
    ("presence_penalty", Works),
    ("frequency_penalty", Works),
    ("repetition_penalty", Works),
    ("logit_bias", Works),
    ("logprobs", Works),
    ("prompt_logprobs", Works),
    ("return_token_ids", Works),
    ("return_tokens_as_token_ids", Works),
    ("skip_special_tokens", Works),
    ("add_special_tokens", Works),
    ("priority", Works),
    ("cache_salt", Works),
    ("request_id", Works),
    ("stream", Works),
    ("stream_options", Works),
    ("user", NoEffect),
    ("metadata", NoEffect),
    ("safety_identifier", NoEffect),
    ("prompt_cache_key", NoEffect),
    ("service_tier", Refused(Neutral::Words(&["auto", "default"]))),
    ("store", Refused(Neutral::Bool(false))),
    ("spaces_between_special_tokens", Refused(Neutral::Bool(true))),
    ("response_format", Works),
    ("structured_outputs", Works),
    ("guided_json", Refused(Neutral::Null)),
    ("guided_regex", Refused(Neutral::Null)),
    ("guided_choice", Refused(Neutral::Null)),
    ("guided_grammar", Refused(Neutral::Null)),
    ("guided_decoding_backend", Refused(Neutral::Null)),
    ("guided_whitespace_pattern", Refused(Neutral::Null)),
    ("structural_tag", Refused(Neutral::Null)),
    ("best_of", Refused(Neutral::Number(1.0))),
    ("use_beam_search", Refused(Neutral::Bool(false))),
    ("length_penalty", Refused(Neutral::Number(1.0))),
    ("truncate_prompt_tokens", Refused(Neutral::Null)),
    ("truncation_side", Refused(Neutral::Null)),
    ("allowed_token_ids", Refused(Neutral::Empty)),
    ("bad_words", Refused(Neutral::Empty)),
    ("logits_processors", Refused(Neutral::Empty)),
    ("logprob_token_ids", Refused(Neutral::Empty)),
    ("mm_processor_kwargs", Refused(Neutral::Empty)),
    ("kv_transfer_params", Refused(Neutral::Empty)),
    ("vllm_xargs", Refused(Neutral::Empty)),
    ("repetition_detection", Refused(Neutral::Null)),
];

/// Fields of chat alone.
pub(crate) const CHAT: &[(&str, Support)] = &[
    ("messages", Works),
    ("max_completion_tokens", Works),
    ("top_logprobs", Works),
    ("add_generation_prompt", Works),
    ("continue_final_message", Works),
    ("chat_template_kwargs", Works),
    ("tools", Works),
    ("tool_choice", Works),
    ("parallel_tool_calls", Works),
    // The names before tools, which OpenAI has retired.
    ("functions", Refused(Neutral::Empty)),
    ("function_call", Refused(Neutral::Words(&["none", "auto"]))),
    ("reasoning_effort", Refused(Neutral::Null)),
    ("include_reasoning", Works),
    ("thinking_token_budget", Refused(Neutral::Null)),
    ("modalities", Refused(Neutral::ListText)),
    ("audio", Refused(Neutral::Null)),
    ("prediction", Refused(Neutral::Null)),
    ("verbosity", Refused(Neutral::Words(&["medium"]))),
    ("web_search_options", Refused(Neutral::Null)),
    ("documents", Refused(Neutral::Empty)),
    ("chat_template", Refused(Neutral::Null)),
    ("media_io_kwargs", Refused(Neutral::Empty)),
    ("echo", Refused(Neutral::Bool(false))),
];

/// Fields of completions alone.
pub(crate) const COMPLETIONS: &[(&str, Support)] = &[
    ("prompt", Works),
    ("echo", Works),
    ("suffix", Refused(Neutral::Empty)),
    ("prompt_embeds", Refused(Neutral::Null)),
];

/// Looks a field up.
pub(crate) fn support(endpoint: Endpoint, name: &str) -> Option<Support> {
    let own = match endpoint {
        Endpoint::Chat => CHAT,
        Endpoint::Completions => COMPLETIONS,
    };
    own.iter().chain(COMMON).find(|(field, _)| *field == name).map(|(_, support)| *support)
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
        if let Some(Refused(neutral)) = support(endpoint, name)
            && !value.is_null()
            && !neutral.holds(value)
        {
            let message = format!("{name} is not supported with this value; leave it out");
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
    use crate::Options;
    use crate::body::Body;
    use crate::chat_request::read_chat;
    use crate::completion_request::read_prompts;
    use crate::params::{Params, read_model};
    use crate::tools::Formats;

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
            json!({"echo": true}),
            json!({"function_call": {"name": "f"}}),
            json!({"thinking_token_budget": 5}),
            json!({"spaces_between_special_tokens": false}),
        ] {
            let name = body.as_object().unwrap().keys().next().unwrap().clone();
            let error = check_chat(&body).expect_err(&name);
            assert_eq!(error.to_json()["error"]["param"], json!(name));
        }
        let neutral = json!({"response_format": {"type": "text"}, "guided_json": null, "best_of": 1,
            "modalities": ["text"], "echo": false, "function_call": "auto", "functions": null, "store": false,
            "spaces_between_special_tokens": true});
        check_chat(&neutral).unwrap();
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

    /// Sends a value of a wrong type in every field that works: who reads a field refuses it.
    #[test]
    fn every_field_that_works_is_read() {
        let options = Options::new("m");
        let formats = Formats { tools: None, reasoning: false };
        let read = |endpoint, body: Value| -> Result<(), ApiError> {
            let mut body = Body::new(body)?;
            check(endpoint, body.fields(), &UnknownFields::default())?;
            read_model(&mut body, &options)?;
            Params::read(endpoint, &mut body, &options, 20)?;
            match endpoint {
                Endpoint::Chat => read_chat(&mut body, true, formats).map(|_| ()),
                Endpoint::Completions => read_prompts(&mut body).map(|_| ()),
            }
        };
        let chat = json!({"messages": [{"role": "user", "content": "x"}]});
        let completion = json!({"prompt": "x"});
        for (endpoint, own, base) in
            [(Endpoint::Chat, CHAT, chat), (Endpoint::Completions, COMPLETIONS, completion)]
        {
            assert_eq!(read(endpoint, base.clone()), Ok(()));
            for (name, _) in own.iter().chain(COMMON).filter(|(_, support)| *support == Works) {
                let mut body = base.clone();
                body[name] = json!([{}]);
                let error = read(endpoint, body).expect_err(name);
                assert_eq!(error.to_json()["error"]["param"], *name);
            }
        }
    }

    #[test]
    fn no_field_is_listed_twice() {
        for own in [CHAT, COMPLETIONS] {
            let names: Vec<_> = own.iter().chain(COMMON).map(|(name, _)| name).collect();
            assert_eq!(names.len(), names.iter().collect::<BTreeSet<_>>().len());
        }
    }
}
