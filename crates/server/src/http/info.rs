//! Routes that only tell: models, health, version, metrics.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use spark_api::Health;

use super::HttpState;
use crate::ApiError;

/// GET /v1/models
pub(super) async fn models(State(state): State<HttpState>) -> Json<Value> {
    Json(state.front_end.models())
}

/// GET /v1/models/{name}; names may contain slashes.
pub(super) async fn model(
    State(state): State<HttpState>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    state.front_end.model(&name).map(Json)
}

/// GET /live: 200 as long as there is a process that answers.
pub(super) async fn live() -> StatusCode {
    StatusCode::OK
}

/// GET /load: how many requests are at work, in vLLM's shape.
pub(super) async fn load(State(state): State<HttpState>) -> Json<Value> {
    Json(json!({"server_load": state.front_end.load()}))
}

/// GET /health, /ready and /ping: 200 with no body when the engine can serve, else 503 and the reason.
pub(super) async fn health(State(state): State<HttpState>) -> Response {
    let (status, reason) = match state.front_end.health() {
        Health::Ready => return StatusCode::OK.into_response(),
        Health::Stopping => ("stopping", "the engine is shutting down".to_owned()),
        Health::Failed(reason) => ("failed", reason),
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": status, "reason": reason}))).into_response()
}

/// GET /server_info: what is served, and with which settings.
pub(super) async fn server_info(State(state): State<HttpState>) -> Json<Value> {
    Json(state.front_end.server_info())
}

/// GET /props: the same for clients of llama-server.
pub(super) async fn props(State(state): State<HttpState>) -> Json<Value> {
    Json(state.front_end.props())
}

/// GET /tokenizer_info: 404 unless the operator has switched it on.
pub(super) async fn tokenizer_info(State(state): State<HttpState>) -> Result<Json<Value>, ApiError> {
    state.front_end.tokenizer_info().map(Json)
}

/// GET /version
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// GET /metrics in the Prometheus text format.
pub(super) async fn metrics(State(state): State<HttpState>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.front_end.metrics())
        .into_response()
}
