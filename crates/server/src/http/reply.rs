//! Errors as responses, and JSON bodies as values. Replaces axum's plain-text refusals.

use std::error::Error;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, RequestExt};
use serde_json::Value;

use super::HttpState;
use super::intake::{BodyError, Share, share};
use crate::ApiError;
use crate::metrics::Rejection;

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
        // For those who write it in another dialect.
        response.extensions_mut().insert(self);
        response
    }
}

/// Larger bodies are parsed off the async threads: a body of images takes longer than another client's token may wait.
const MAX_INLINE_BYTES: usize = 64 << 10;

/// Most values of a body: a context of a million tokens as ids, twice.
const MAX_VALUES: usize = 1 << 21;
/// What a parsed value takes in memory, about.
const VALUE_BYTES: usize = 80;

/// A body that is JSON, of any shape.
pub(crate) struct JsonBody(pub(crate) Value);

impl FromRequest<HttpState> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &HttpState) -> Result<Self, ApiError> {
        let body = read(request, state).await;
        if let Err(ApiError::IntakeFull { .. }) = body {
            state.front_end.metrics.rejected(Rejection::IntakeBytes);
        }
        body.map(Self)
    }
}

async fn read(request: Request, state: &HttpState) -> Result<Value, ApiError> {
    if !declares_json(&request) {
        return Err(ApiError::NotJson);
    }
    let bytes: Bytes = request.extract().await.map_err(|rejection| unread(&rejection, state))?;
    let share = share();
    match bytes.len() {
        0..=MAX_INLINE_BYTES => parse(&bytes, share.as_deref()),
        _ => state.front_end.pool.run(move || parse(&bytes, share.as_deref())).await,
    }
}

/// Why a body could not be read: what `intake.rs` says is at the end of the chain.
fn unread(rejection: &BytesRejection, state: &HttpState) -> ApiError {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return ApiError::BodyTooLarge { limit: state.max_body_bytes };
    }
    let mut cause = rejection.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref() {
            return refused(error);
        }
        cause = error.source();
    }
    ApiError::body("the body ended early")
}

fn refused(error: &BodyError) -> ApiError {
    match error {
        BodyError::TooSlow => ApiError::BodyTooSlow,
        BodyError::Full { limit } => ApiError::IntakeFull { limit: *limit },
        BodyError::Connection(_) => ApiError::body("the body ended early"),
    }
}

/// At least as many values as `bytes` have when they are JSON: each but the first follows one of four marks. A value takes many
/// times the two bytes that it may be written with, so this is known before any is made.
fn num_values(bytes: &[u8]) -> Result<usize, ApiError> {
    let (mut count, mut in_string) = (1, false);
    let mut bytes = bytes.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => in_string = !in_string,
            b'\\' if in_string => _ = bytes.next(),
            b',' | b'[' | b'{' | b':' if !in_string => count += 1,
            _ => {}
        }
    }
    if count > MAX_VALUES {
        return Err(ApiError::body(format!("the body has over {MAX_VALUES} JSON values: send fewer")));
    }
    Ok(count)
}

/// serde_json refuses depths over 128, numbers that no f64 holds, and broken UTF-8.
fn parse(bytes: &[u8], share: Option<&Share>) -> Result<Value, ApiError> {
    let memory = num_values(bytes)?.saturating_mul(VALUE_BYTES);
    share.map_or(Ok(()), |share| share.grow(memory)).map_err(|error| refused(&error))?;
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::body(format!("the body is not valid JSON: {error}")))
}

/// Browsers send other types across origins without asking; so only JSON counts.
fn declares_json(request: &Request) -> bool {
    let value = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = value.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_before_they_are_made() {
        for (text, expected) in [
            ("7", 1),
            ("[]", 2),
            (r#"{"a": [1, 2], "b": "x,[{:"}"#, 7),
            (r#"["\"", ",", "\\"]"#, 4),
            (r#""never closed, [["#, 1),
        ] {
            assert_eq!(num_values(text.as_bytes()).unwrap(), expected, "{text}");
        }
        let many = format!("[{}1]", "1,".repeat(MAX_VALUES));
        assert_eq!(num_values(many.as_bytes()).unwrap_err().status(), 400);
    }
}
