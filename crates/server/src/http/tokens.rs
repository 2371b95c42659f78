//! Routes that show prompts without running them: tokens, text, counts.

use axum::Json;
use axum::extract::State;
use serde_json::Value;

use super::HttpState;
use super::reply::JsonBody;
use crate::ApiError;

/// POST /tokenize
pub(super) async fn tokenize(
    State(state): State<HttpState>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ApiError> {
    state.front_end.tokenize(body).await.map(Json)
}

/// POST /detokenize
pub(super) async fn detokenize(
    State(state): State<HttpState>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ApiError> {
    state.front_end.detokenize(body).await.map(Json)
}

/// POST /apply-template
pub(super) async fn apply_template(
    State(state): State<HttpState>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ApiError> {
    state.front_end.apply_template(body).await.map(Json)
}

/// POST /v1/chat/completions/input_tokens
pub(super) async fn count_chat_tokens(
    State(state): State<HttpState>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ApiError> {
    state.front_end.count_chat_tokens(body).await.map(Json)
}
