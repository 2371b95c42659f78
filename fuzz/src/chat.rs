//! Bodies of requests, through the router of the server to the engine and back: an answer or a 4xx, never a 500.

use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use serde_json::Value;
use spark_server::{ApiKeys, FrontEnd, HttpState, Options, router};
use spark_text::{ChatTemplate, Tokenizer};
use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ImageProcessorOverrides};
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::engine::Instantly;
use crate::folder::model;

const PATHS: [&str; 10] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/responses/input_tokens",
    "/completion",
    "/v1/chat/completions/batch",
];

struct Server {
    router: Router,
    runtime: Runtime,
}

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    let folder = model();
    let fixture = "the fixture is committed";
    let tokenizer = Arc::new(Tokenizer::from_dir(&folder).expect(fixture));
    let template = ChatTemplate::from_dir(&folder, &tokenizer).expect(fixture);
    let decode = DecodeOptions { max_pixels: 1 << 16, ..DecodeOptions::new(Alpha::OverWhite) };
    let overrides = ImageProcessorOverrides::default();
    let processor = ImageProcessor::from_folder(&folder, &overrides, decode, [7; 32]).expect(fixture);
    let options =
        Options { mm_processor_cache_bytes: 1 << 20, max_response_bytes: 1 << 20, ..Options::new("tiny") };
    let engine = Arc::new(Instantly::new());
    let (template, processor) = (Some(Arc::new(template)), Some(Arc::new(processor)));
    let front_end = Arc::new(FrontEnd::new(engine, tokenizer, template, processor, options));
    let keys: [&str; 0] = [];
    let state = HttpState { front_end, api_keys: ApiKeys::new(keys), max_body_bytes: 1 << 20 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Server { router: router(state), runtime: runtime.expect("a runtime needs only memory") }
});

/// Byte 0: the path. The rest is the body.
pub fn run(data: &[u8]) {
    let [path, body @ ..] = data else { return };
    let path = PATHS[*path as usize % PATHS.len()];
    let request =
        Request::post(path).header("content-type", "application/json").body(Body::from(body.to_vec()));
    let answer = async {
        let response = SERVER.router.clone().oneshot(request.expect("a path of ours")).await;
        let response = response.unwrap_or_else(|never| match never {});
        let status = response.status().as_u16();
        let is_stream =
            response.headers().get("content-type").is_some_and(|kind| kind == "text/event-stream");
        let bytes = to_bytes(response.into_body(), usize::MAX).await.expect("an answer comes to its end");
        (status, is_stream, bytes)
    };
    let (status, is_stream, bytes) = SERVER.runtime.block_on(answer);
    let text = String::from_utf8(bytes.to_vec()).expect("answers are UTF-8");
    let shown = || text.chars().take(500).collect::<String>();
    if is_stream {
        assert_eq!(status, 200);
        let datas =
            text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        datas.for_each(|data| drop(serde_json::from_str::<Value>(data).expect("an event is JSON")));
        return;
    }
    assert!(serde_json::from_str::<Value>(&text).is_ok(), "{path} answers {status} {}", shown());
    // A grammar may turn out to be too much for a token.
    let is_fault = status >= 500 && !text.contains("constraint") && !text.contains("grammar");
    assert!(!is_fault, "{path} answers {status} {}", shown());
}
