//! The server through its router, with a fake engine behind it: bodies in, bodies out. No model, no sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a case that cannot be set up has failed")]

mod bad_input;
mod batch;
mod chat;
mod completions;
mod connections;
mod fake;
mod http;
mod images;
mod lifecycle;
mod llama;
mod messages;
mod named_media;
mod named_tokens;
mod newcomers;
mod observed;
mod openapi;
mod responses;
mod responses_again;
mod structured;
mod thinking;
mod tools;

use std::path::Path;
use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, Response, header};
use serde_json::Value;
use spark_api::Engine;
use spark_server::{ApiKeys, FrontEnd, HttpState, Options, router};
use spark_text::{ChatTemplate, Tokenizer};
use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ImageProcessorOverrides};
use tower::ServiceExt;

use self::fake::Fake;

/// A vision model's folder: a tokenizer of single bytes, 26 added tokens, a template with images.
fn model_folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/dense_vl_bf16")
}

fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> =
        LazyLock::new(|| Arc::new(Tokenizer::from_dir(&model_folder()).unwrap()));
    TOKENIZER.clone()
}

/// Token ids of a text.
fn ids(text: &str) -> Vec<u32> {
    tokenizer().encode_trusted(text).unwrap()
}

/// A front end before `engine`; `change` edits its options.
fn front_end(engine: &Arc<Fake>, change: impl FnOnce(&mut Options)) -> Arc<FrontEnd> {
    let tokenizer = tokenizer();
    let template = ChatTemplate::from_dir(&model_folder(), &tokenizer).unwrap();
    front_end_of(engine, tokenizer, template, change)
}

/// A front end with another tokenizer or template.
fn front_end_of(
    engine: &Arc<Fake>,
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    change: impl FnOnce(&mut Options),
) -> Arc<FrontEnd> {
    let folder = model_folder();
    let decode = DecodeOptions::new(Alpha::OverWhite);
    let processor =
        ImageProcessor::from_folder(&folder, &ImageProcessorOverrides::default(), decode, [7; 32]);
    let mut options = Options::new("tiny");
    change(&mut options);
    let engine: Arc<dyn Engine> = engine.clone();
    let processor = Some(Arc::new(processor.unwrap()));
    Arc::new(FrontEnd::new(engine, tokenizer, Some(Arc::new(template)), processor, options))
}

fn server(engine: &Arc<Fake>) -> Router {
    server_with(engine, &[], 1 << 20)
}

fn server_with(engine: &Arc<Fake>, keys: &[&str], max_body_bytes: usize) -> Router {
    let front_end = front_end(engine, |_| {});
    router(HttpState { front_end, api_keys: ApiKeys::new(keys), max_body_bytes })
}

/// A POST of a JSON body.
fn post(path: &str, body: &Value) -> Request<Body> {
    let json = Body::from(body.to_string());
    Request::post(path).header(header::CONTENT_TYPE, "application/json").body(json).unwrap()
}

async fn send(server: &Router, request: Request<Body>) -> Response<Body> {
    server.clone().oneshot(request).await.unwrap()
}

async fn text(response: Response<Body>) -> String {
    String::from_utf8(to_bytes(response.into_body(), usize::MAX).await.unwrap().to_vec()).unwrap()
}

/// Status and JSON body of a POST.
async fn ask(server: &Router, path: &str, body: Value) -> (u16, Value) {
    let response = send(server, post(path, &body)).await;
    let status = response.status().as_u16();
    let text = text(response).await;
    (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("{path} answered {text:?}")))
}

/// The events of a stream whose events have names: those must be the types in their data.
async fn events(server: &Router, path: &str, body: Value) -> Vec<Value> {
    let response = send(server, post(path, &body)).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
    let event = |event: &str| {
        let (name, data) = event.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
        data
    };
    text(response).await.split("\n\n").filter(|event| !event.is_empty()).map(event).collect()
}

async fn chat(server: &Router, body: Value) -> (u16, Value) {
    ask(server, "/v1/chat/completions", body).await
}

async fn complete(server: &Router, body: Value) -> (u16, Value) {
    ask(server, "/v1/completions", body).await
}

/// The chunks of a streamed answer, which must end with `[DONE]`.
async fn chunks(server: &Router, path: &str, body: Value) -> Vec<Value> {
    let response = send(server, post(path, &body)).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
    let text = text(response).await;
    let events: Vec<_> = text.split("\n\n").filter(|event| !event.is_empty()).collect();
    let data: Vec<_> = events.iter().map(|event| event.strip_prefix("data: ").unwrap()).collect();
    let (last, chunks) = data.split_last().unwrap();
    assert_eq!(*last, "[DONE]");
    chunks.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
}
