//! HTTP around a [`FrontEnd`]: routes, keys, limits, serving. What the bodies mean is decided elsewhere.

mod auth;
mod browsers;
mod completions;
mod docs;
mod info;
mod intake;
mod messages;
mod reply;
mod request_id;
mod responses;
mod serve;
mod tls;
mod tokens;
mod ui;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

pub use auth::ApiKeys;
pub use browsers::{Cors, CorsError};
pub(crate) use intake::settle;
pub use serve::{ServeOptions, serve};
pub use tls::{Tls, TlsError};

use crate::{ApiError, FrontEnd};

/// Largest body by default: vLLM's, enough for a few photographs as base64.
pub const DEFAULT_MAX_BODY_BYTES: usize = 32 << 20;

/// What the routes share.
#[derive(Clone)]
pub struct HttpState {
    /// Answers requests.
    pub front_end: Arc<FrontEnd>,
    /// Keys that open the server; none means that it is open.
    pub api_keys: ApiKeys,
    /// Largest body, in bytes.
    pub max_body_bytes: usize,
}

/// Every route of the server. All but those that load balancers ask need an API key, if there are any.
pub fn router(state: HttpState) -> Router {
    let keys = state.api_keys.clone();
    Router::new()
        .route("/v1/chat/completions", post(completions::chat))
        .route("/v1/chat/completions/batch", post(completions::chat_batch))
        .route("/v1/chat/completions/input_tokens", post(tokens::count_chat_tokens))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/input_tokens", post(responses::count_tokens))
        .route("/v1/responses/{id}", get(responses::get).delete(responses::delete))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::model))
        .merge(without_version())
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/apply-template", post(tokens::apply_template))
        .route("/tokenizer_info", get(info::tokenizer_info))
        .route("/health", get(info::health))
        .route("/live", get(info::live))
        .route("/ready", get(info::health))
        .route("/ping", get(info::health).post(info::health))
        .route("/load", get(info::load))
        .route("/openapi.json", get(docs::document))
        .route("/docs", get(docs::docs))
        .route("/version", get(info::version))
        .route("/server_info", get(info::server_info))
        .route("/props", get(info::props))
        .route("/metrics", get(info::metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(state.max_body_bytes))
        .layer(middleware::from_fn_with_state(keys, auth::require_key))
        .merge(ui::routes())
        .layer(CatchPanicLayer::custom(on_panic))
        .layer(middleware::from_fn(request_id::name))
        .with_state(state)
}

/// What llama-server answers without `/v1`: there `/completions` is its own dialect, and the others are OpenAI's.
fn without_version() -> Router<HttpState> {
    Router::new()
        .route("/completion", post(completions::llama))
        .route("/completions", post(completions::llama))
        .route("/chat/completions", post(completions::chat))
        .route("/chat/completions/input_tokens", post(tokens::count_chat_tokens))
        .route("/responses", post(responses::create))
        .route("/responses/input_tokens", post(responses::count_tokens))
        .route("/models", get(info::models))
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::RouteNotFound { path: shown_path(&uri) }
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed { method: method.to_string(), path: shown_path(&uri) }
}

/// A path is the client's text: it goes back shortened.
fn shown_path(uri: &Uri) -> String {
    uri.path().chars().take(200).collect()
}

/// A defect in one handler costs that request alone.
#[allow(clippy::needless_pass_by_value, reason = "the signature is tower-http's")]
fn on_panic(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    ApiError::internal(&format!("a handler panicked: {text}")).into_response()
}
