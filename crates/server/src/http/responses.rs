//! The routes of OpenAI's responses: made, asked for again, cancelled, forgotten.

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use super::HttpState;
use super::completions::respond;
use super::reply::JsonBody;
use crate::ApiError;

/// POST /v1/responses
pub(super) async fn create(
    State(state): State<HttpState>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    match state.front_end.response(body).await?.into_background() {
        Ok(response) => Ok(Json(response).into_response()),
        Err(generation) => respond(&state, *generation).await,
    }
}

/// POST /v1/responses/input_tokens
pub(super) async fn count_tokens(
    State(state): State<HttpState>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ApiError> {
    state.front_end.count_response_tokens(body).await.map(Json)
}

/// Parameters of a GET that OpenAI has and this server has not, each with the value that asks for nothing.
const REFUSED: [(&str, Option<&str>); 5] = [
    ("stream", Some("false")),
    ("starting_after", None),
    ("include", None),
    ("include[]", None),
    ("include_obfuscation", None),
];

/// GET /v1/responses/{id}
pub(super) async fn get(
    State(state): State<HttpState>,
    Path(id): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    let is_refused = |(name, value): &&(String, String)| {
        REFUSED.iter().any(|(refused, neutral)| refused == name && *neutral != Some(value.as_str()))
    };
    if let Some((name, _)) = query.iter().find(is_refused) {
        let message = format!("{name} is not supported here: a stored response is given as it is");
        return Err(ApiError::field(name.clone(), message));
    }
    state.front_end.stored_response(&id).map(Json)
}

/// DELETE /v1/responses/{id}
pub(super) async fn delete(
    State(state): State<HttpState>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    state.front_end.delete_response(&id).map(Json)
}

/// POST /v1/responses/{id}/cancel
pub(super) async fn cancel(
    State(state): State<HttpState>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    state.front_end.cancel_response(&id).map(Json)
}
