//! POST /tokenize and /detokenize, in vLLM's shapes.

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
