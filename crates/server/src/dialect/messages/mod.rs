//! Anthropic's messages: the way in and out of `/v1/messages`. What bodies and events look like is in the files beside.

mod answer;
mod request;

use serde_json::{Value, json};

pub(crate) use self::answer::MessageWriter;
use self::request::to_chat;
use super::Form;
use crate::body::Body;
use crate::fields::Endpoint;
use crate::params::read_model;
use crate::{ApiError, FrontEnd, Generation};

/// Names of the chat's fields in this dialect, where they differ.
const NAMES: [(&str, &str); 5] = [
    ("stop", "stop_sequences"),
    ("response_format", "output_config"),
    ("reasoning_effort", "output_config"),
    ("parallel_tool_calls", "tool_choice"),
    ("image_url", "messages"),
];

impl FrontEnd {
    /// Queues a message (the body of `POST /v1/messages`).
    ///
    /// # Errors
    /// What is wrong with the body, or why the engine does not take it.
    pub async fn message(&self, body: Value) -> Result<Generation, ApiError> {
        let mut body = self.open(Endpoint::Messages, body)?;
        if body.fields().get("max_tokens").is_none_or(Value::is_null) {
            return Err(ApiError::field("max_tokens", "max_tokens is missing"));
        }
        let own_names = |error: ApiError| error.renamed(&NAMES);
        let mut chat = Body::new(Value::Object(to_chat(&mut body, self.formats)?))?;
        let model = read_model(&mut chat, &self.options)?;
        let params = self.read_params(Endpoint::Chat, &mut chat).map_err(own_names)?;
        let prompt = self.chat_prompt(&mut chat, &params).await.map_err(own_names)?;
        self.submit(Form::Message, model, params, vec![prompt]).map_err(own_names)
    }

    /// How many tokens a message would send to the model (the body of `POST /v1/messages/count_tokens`).
    ///
    /// # Errors
    /// What is wrong with the body.
    pub async fn count_message_tokens(&self, body: Value) -> Result<Value, ApiError> {
        let mut body = self.open(Endpoint::Messages, body)?;
        let mut chat = Body::new(Value::Object(to_chat(&mut body, self.formats)?))?;
        read_model(&mut chat, &self.options)?;
        let tokens = self.chat_tokens(&mut chat, None, None).await.map_err(|error| error.renamed(&NAMES))?;
        Ok(json!({"input_tokens": tokens.tokens.len()}))
    }
}

/// Anthropic's form of an error.
pub(crate) fn error_json(error: &ApiError, request_id: Option<&str>) -> Value {
    let kind = match error.status() {
        401 => "authentication_error",
        403 => "permission_error",
        404 | 405 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.to_string()}, "request_id": request_id})
}
