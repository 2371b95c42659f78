//! Errors as responses, and JSON bodies as values. Replaces axum's plain-text refusals.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, RequestExt};
use serde_json::Value;

use super::HttpState;
use crate::ApiError;

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        // Every status of the table is a valid one.
        let status = StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self.to_json())).into_response();
        if let Some(seconds) = self.retry_after() {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if status == StatusCode::UNAUTHORIZED {
            let scheme = axum::http::HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

/// Larger bodies are parsed off the async threads: a body of images takes longer than another client's token may wait.
const MAX_INLINE_BYTES: usize = 64 << 10;

/// A body that is JSON, of any shape.
pub(crate) struct JsonBody(pub(crate) Value);

impl FromRequest<HttpState> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &HttpState) -> Result<Self, ApiError> {
        if !declares_json(&request) {
            return Err(ApiError::NotJson);
        }
        let bytes: Bytes =
            request.extract().await.map_err(|rejection: BytesRejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => ApiError::BodyTooLarge { limit: state.max_body_bytes },
                _ => ApiError::body("the body ended early"),
            })?;
        match bytes.len() {
            0..=MAX_INLINE_BYTES => parse(&bytes).map(Self),
            _ => state.front_end.pool.run(move || parse(&bytes)).await.map(Self),
        }
    }
}

/// serde_json refuses depths over 128, numbers that no f64 holds, and broken UTF-8.
fn parse(bytes: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::body(format!("the body is not valid JSON: {error}")))
}

/// Browsers send other types across origins without asking; so only JSON counts.
fn declares_json(request: &Request) -> bool {
    let value = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = value.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}
