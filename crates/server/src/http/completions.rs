//! The generating routes of OpenAI's older dialects and of llama-server's, and what all generating routes share: a JSON body, or server-sent
//! events.

use std::convert::Infallible;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt};
use serde_json::Value;

use super::HttpState;
use super::reply::JsonBody;
use super::request_id::REQUEST_ID;
use crate::dialect::Framing;
use crate::{ApiError, Generation};

/// POST /v1/chat/completions
pub(super) async fn chat(
    State(state): State<HttpState>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let body = with_request_id(body, &headers);
    respond(&state, state.front_end.chat(body).await?).await
}

/// POST /v1/chat/completions/batch
pub(super) async fn chat_batch(
    State(state): State<HttpState>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let body = with_request_id(body, &headers);
    respond(&state, state.front_end.chat_batch(body).await?).await
}

/// POST /v1/completions
pub(super) async fn completions(
    State(state): State<HttpState>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let body = with_request_id(body, &headers);
    respond(&state, state.front_end.completion(body).await?).await
}

/// POST /completion
pub(super) async fn llama(
    State(state): State<HttpState>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let body = with_request_id(body, &headers);
    respond(&state, state.front_end.llama_completion(body).await?).await
}

/// The header names the request where the body does not, as in vLLM.
pub(super) fn with_request_id(mut body: Value, headers: &HeaderMap) -> Value {
    let header = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    if let (Some(id), Value::Object(fields)) = (header, &mut body)
        && fields.get("request_id").is_none_or(Value::is_null)
    {
        fields.insert("request_id".into(), Value::String(id.to_owned()));
    }
    body
}

/// When the client goes away, the response is dropped, and with it the generation: that cancels its sequences.
pub(super) async fn respond(state: &HttpState, generation: Generation) -> Result<Response, ApiError> {
    let request_id = HeaderValue::from_str(generation.request_id()).ok();
    let mut response = match generation.is_streamed() {
        true => {
            let framing = generation.framing();
            stream(state, generation.into_chunks(), framing)
        }
        false => Json(generation.into_response().await?).into_response(),
    };
    if let Some(request_id) = request_id {
        response.headers_mut().insert(REQUEST_ID, request_id);
    }
    Ok(response)
}

/// Server-sent events.
pub(super) fn stream(
    state: &HttpState,
    chunks: impl Stream<Item = Value> + Send + 'static,
    framing: Framing,
) -> Response {
    let events = chunks.map(move |chunk| {
        let name = chunk.get("type").and_then(Value::as_str).filter(|_| framing == Framing::Named);
        let event = name.map_or_else(Event::default, |name| Event::default().event(name));
        event.data(chunk.to_string())
    });
    let done = stream::iter((framing == Framing::Done).then(|| Event::default().data("[DONE]")));
    let events = events.chain(done).map(Ok::<_, Infallible>);
    let keep_alive = KeepAlive::new().interval(state.front_end.options.keep_alive).text("keep-alive");
    Sse::new(events).keep_alive(keep_alive).into_response()
}
