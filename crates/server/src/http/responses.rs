//! The routes of OpenAI's responses: made, asked for again, cancelled, forgotten.

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use super::HttpState;
use super::completions::{respond, stream};
use super::reply::JsonBody;
use crate::ApiError;
use crate::dialect::Framing;
use crate::dialect::responses::Page;

/// POST /v1/responses
pub(super) async fn create(
    State(state): State<HttpState>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let generation = state.front_end.response(body).await?;
    let is_streamed = generation.is_streamed();
    match generation.into_background() {
        Ok(response) if is_streamed => {
            let id = response["id"].as_str().unwrap_or_default();
            Ok(stream(&state, state.front_end.response_events(id, None)?, Framing::Named))
        }
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

/// What the parameters of a GET ask for: `None` is the response as it is, else its events after a number.
fn read_query(query: &[(String, String)]) -> Result<Option<Option<usize>>, ApiError> {
    let (mut is_streamed, mut after) = (false, None);
    for (name, value) in query {
        match (name.as_str(), value.as_str()) {
            ("stream", "true" | "false") => is_streamed = value == "true",
            ("stream", _) => return Err(ApiError::field("stream", "stream must be true or false")),
            ("starting_after", number) => {
                let rule =
                    || ApiError::field("starting_after", "starting_after must be the number of an event");
                after = Some(number.parse().map_err(|_| rule())?);
            }
            // Events are never padded.
            ("include_obfuscation", "false") => {}
            _ => {
                let name: String = name.chars().take(100).collect();
                let message =
                    format!("{name}={value:.100} is not supported here: only stream and starting_after are");
                return Err(ApiError::field(name, message));
            }
        }
    }
    match (is_streamed, after) {
        (false, Some(_)) => Err(ApiError::field("starting_after", "starting_after needs stream=true")),
        (is_streamed, after) => Ok(is_streamed.then_some(after)),
    }
}

/// GET /v1/responses/{id}
pub(super) async fn get(
    State(state): State<HttpState>,
    Path(id): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Response, ApiError> {
    match read_query(&query)? {
        None => Ok(Json(state.front_end.stored_response(&id)?).into_response()),
        Some(after) => Ok(stream(&state, state.front_end.response_events(&id, after)?, Framing::Named)),
    }
}

/// GET /v1/responses/{id}/input_items
pub(super) async fn input_items(
    State(state): State<HttpState>,
    Path(id): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    state.front_end.response_input_items(&id, &Page::read(&query)?).map(Json)
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
