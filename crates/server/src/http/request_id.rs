//! Around all routes: every request has a name, which every response repeats; and errors take the form of their dialect.

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::dialect::messages;
use crate::ids::random_id;
use crate::observe::within_trace;
use crate::{ApiError, TraceParent};

/// The name of a request, in both directions.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The same in Anthropic's dialect.
const ANTHROPIC_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
/// Routes of Anthropic's dialect begin so.
const ANTHROPIC: &str = "/v1/messages";

/// Names the request, if its client has not, and the response.
pub(super) async fn name(mut request: Request, next: Next) -> Response {
    let is_anthropic = request.uri().path().starts_with(ANTHROPIC);
    let random = || HeaderValue::from_str(&random_id()).ok();
    let given = request.headers().get(REQUEST_ID).cloned();
    let id = given.or_else(random);
    if let Some(id) = &id {
        request.headers_mut().insert(REQUEST_ID, id.clone());
    }
    let trace = trace_parent(request.headers());
    let mut response = within_trace(trace, next.run(request)).await;
    if let Some(id) = id {
        response.headers_mut().entry(REQUEST_ID).or_insert(id);
    }
    if is_anthropic { in_anthropic(response) } else { response }
}

/// The trace that a request belongs to.
fn trace_parent(headers: &HeaderMap) -> Option<TraceParent> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    TraceParent::parse(text("traceparent")?, text("tracestate"))
}

fn in_anthropic(mut response: Response) -> Response {
    let id = response.headers().get(REQUEST_ID).cloned();
    let text = id.as_ref().and_then(|id| id.to_str().ok());
    if let Some(error) = response.extensions().get::<ApiError>() {
        let body = Json(messages::error_json(error, text)).into_response().into_body();
        *response.body_mut() = body;
    }
    if let Some(id) = id {
        response.headers_mut().insert(ANTHROPIC_REQUEST_ID, id);
    }
    response
}
