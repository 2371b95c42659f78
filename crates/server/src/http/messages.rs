//! The routes of Anthropic's dialect. The form of its errors is put on in `request_id.rs`, for all that can go wrong.

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde_json::Value;

use super::HttpState;
use super::completions::{respond, with_request_id};
use super::reply::JsonBody;
use crate::ApiError;

/// POST /v1/messages
pub(super) async fn create(
    State(state): State<HttpState>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let body = with_request_id(body, &headers);
    respond(&state, state.front_end.message(body).await?).await
}

/// POST /v1/messages/count_tokens
pub(super) async fn count_tokens(
    State(state): State<HttpState>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ApiError> {
    state.front_end.count_message_tokens(body).await.map(Json)
}
