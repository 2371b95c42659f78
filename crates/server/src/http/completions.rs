//! The two generating routes: a JSON body, or server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt};
use serde_json::Value;

use super::HttpState;
use super::reply::JsonBody;
use crate::{ApiError, Generation};

/// Silence after which a comment keeps proxies from closing the connection during a long prefill.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// POST /v1/chat/completions
pub(super) async fn chat(
    State(state): State<HttpState>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    respond(state.front_end.chat(with_request_id(body, &headers)).await?).await
}

/// POST /v1/completions
pub(super) async fn completions(
    State(state): State<HttpState>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    respond(state.front_end.completion(with_request_id(body, &headers)).await?).await
}

/// The header names the request where the body does not, as in vLLM.
fn with_request_id(mut body: Value, headers: &HeaderMap) -> Value {
    let header = headers.get("x-request-id").and_then(|value| value.to_str().ok());
    if let (Some(id), Value::Object(fields)) = (header, &mut body)
        && fields.get("request_id").is_none_or(Value::is_null)
    {
        fields.insert("request_id".into(), Value::String(id.to_owned()));
    }
    body
}

/// When the client goes away, the response is dropped, and with it the generation: that cancels its sequences.
async fn respond(generation: Generation) -> Result<Response, ApiError> {
    if !generation.is_streamed() {
        return Ok(Json(generation.into_response().await?).into_response());
    }
    let chunks = generation.into_chunks().map(|chunk| Event::default().data(chunk.to_string()));
    let done = stream::once(async { Event::default().data("[DONE]") });
    let events = chunks.chain(done).map(Ok::<_, Infallible>);
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive")).into_response())
}
