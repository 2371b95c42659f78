//! What clients get wrong, by mistake or on purpose: always a 4xx that names the field, and the engine sees nothing.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use serde_json::{Value, json};

use crate::chat::{png, with_image};
use crate::fake::{Fake, IMAGE, MAX_MODEL_LEN};
use crate::{chat, complete, send, server, server_with, text};

/// A server whose engine must see nothing.
struct Refusing {
    engine: Arc<Fake>,
    server: Router,
}

impl Refusing {
    fn new() -> Self {
        let engine = Fake::says("x");
        Self { server: server(&engine), engine }
    }

    /// Sends a body that must be refused for `param`.
    async fn check(&self, body: Value, param: &str) {
        let Self { engine, server } = self;
        let (status, answer) = match body.get("prompt").is_some() {
            true => complete(server, body.clone()).await,
            false => chat(server, body.clone()).await,
        };
        let shown: String = body.to_string().chars().take(200).collect();
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{shown}: {answer}");
        assert_eq!(
            (&answer["error"]["type"], &answer["error"]["code"]),
            (&json!("BadRequestError"), &json!(400))
        );
        assert!(!answer["error"]["message"].as_str().unwrap().is_empty());
        assert_eq!(engine.num_requests(), 0, "{shown}");
    }
}

#[tokio::test]
async fn values_out_of_range_are_named() {
    let refusing = Refusing::new();
    for (field, value) in [
        ("n", json!(5_000_000)),
        ("n", json!(0)),
        ("n", json!(-1)),
        ("max_tokens", json!(9_223_372_036_854_775_808_u64)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(1.5)),
        ("max_tokens", json!(MAX_MODEL_LEN)),
        ("temperature", json!(1e300)),
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.5)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1e18)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(3)),
        ("logprobs", json!(1_000_000_000)),
        ("logprobs", json!(21)),
        ("prompt_logprobs", json!(-1)),
        ("seed", json!(9_223_372_036_854_775_808_u64)),
        ("stop", json!("")),
        ("stop", json!(vec!["x"; 500_000 / 8])),
        ("stop", json!("x".repeat(100_000))),
        ("stop_token_ids", json!([-1])),
        ("stop_token_ids", json!([282])),
        ("stop_token_ids", json!(vec![1; 2000])),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"-1": 1})),
        ("logit_bias", json!({"282": 1})),
        ("logit_bias", json!({"1": 101})),
        ("logit_bias", json!({"1": "a"})),
        ("min_tokens", json!(17)),
        ("priority", json!(3_000_000_000_u64)),
        ("cache_salt", json!("x".repeat(5000))),
        ("stream_options", json!({"include_usage": true})),
        ("stream_options", json!({"include_usage": 1})),
    ] {
        refusing.check(json!({"prompt": "x", field: value}), field).await;
    }
    let wrong = json!({"prompt": "x", "logit_bias": {"1": 1, "x": 1, "y": 1}});
    let (_, error) = complete(&refusing.server, wrong).await;
    assert!(error["error"]["message"].as_str().unwrap().contains(r#"["x", "y"]"#), "{error}");
    refusing.check(json!({"prompt": "x", "stream": true, "prompt_logprobs": 1}), "prompt_logprobs").await;
    let messages = json!([{"role": "user", "content": "x"}]);
    refusing.check(json!({"messages": messages, "logprobs": true, "top_logprobs": 21}), "top_logprobs").await;
    refusing.check(json!({"messages": messages, "top_logprobs": 2}), "top_logprobs").await;
    refusing
        .check(
            json!({"messages": messages, "chat_template_kwargs": {"messages": []}}),
            "chat_template_kwargs",
        )
        .await;
}

#[tokio::test]
async fn broken_prompts_are_named() {
    let refusing = Refusing::new();
    let many = vec!["x"; 1025];
    for prompt in
        [json!(""), json!([]), json!([[]]), json!([282]), json!([-1]), json!([u64::MAX]), json!(many)]
    {
        refusing.check(json!({"prompt": prompt}), "prompt").await;
    }
    refusing.check(json!({"prompt": vec!["x"; 1000], "n": 2}), "n").await;
    refusing.check(json!({"prompt": "x".repeat(MAX_MODEL_LEN)}), "prompt").await;
    refusing.check(json!({"prompt": " ".repeat(900_000)}), "prompt").await;
    refusing.check(json!({"prompt": [65, IMAGE]}), "prompt").await;
    refusing.check(json!({"prompt": "a <|image_pad|>"}), "prompt").await;
    let engine = Fake::says("x");
    let longest = json!({"prompt": "x".repeat(MAX_MODEL_LEN - 1)});
    assert_eq!(complete(&server(&engine), longest).await.0, 200, "one token of room is enough");
}

#[tokio::test]
async fn broken_messages_are_named() {
    let refusing = Refusing::new();
    for messages in [
        json!(null),
        json!([]),
        json!({}),
        json!("x"),
        json!([1]),
        json!([{}]),
        json!([{"role": "root", "content": "x"}]),
        json!([{"role": "user", "content": 7}]),
        json!([{"role": "user", "content": [{"type": "text"}]}]),
        json!([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
        json!([{"role": "user", "content": "x".repeat(MAX_MODEL_LEN)}]),
    ] {
        refusing.check(json!({"messages": messages}), "messages").await;
    }
}

#[tokio::test]
async fn broken_images_are_named() {
    let refusing = Refusing::new();
    let data = |bytes: &[u8]| {
        use base64::Engine as _;
        format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
    };
    // A PNG whose header promises 50,000 x 50,000 pixels.
    let mut bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    bomb.extend([0, 0, 0xc3, 0x50, 0, 0, 0xc3, 0x50, 8, 2, 0, 0, 0]);
    bomb.extend([0x3f, 0x1c, 0x5d, 0x26]);
    for url in [
        "http://localhost/x.png".to_owned(),
        "https://example.com/x.png".to_owned(),
        "file:///etc/passwd".to_owned(),
        "data:image/png;base64,@@@".to_owned(),
        "data:image/png;base64,".to_owned(),
        data(b"not an image"),
        data(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        data(&bomb),
        png(1, 2000),
    ] {
        refusing.check(with_image(&url), "image_url").await;
    }
    let truncated = png(64, 64);
    let half = truncated.len() / 2 / 4 * 4;
    refusing.check(with_image(&truncated[..truncated.len() - half % 64 - 24]), "image_url").await;
    // Three images, where the engine takes two.
    let part = json!({"type": "image_url", "image_url": {"url": png(1, 1)}});
    refusing.check(json!({"messages": [{"role": "user", "content": [part, part, part]}]}), "messages").await;
    // The template shows no images of a system message.
    refusing.check(json!({"messages": [{"role": "system", "content": [part]}]}), "messages").await;
    let video = json!({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA=="}});
    refusing.check(json!({"messages": [{"role": "user", "content": [video]}]}), "video_url").await;
    let engine = Fake::says("x");
    assert_eq!(chat(&server(&engine), with_image(&png(1, 1))).await.0, 200, "one pixel is enough");
}

#[tokio::test]
async fn unsupported_fields_are_named_and_unknown_ones_ignored() {
    let refusing = Refusing::new();
    let messages = json!([{"role": "user", "content": "x"}]);
    for (field, value) in [
        ("tools", json!([{"type": "function", "function": {"name": ""}}])),
        ("response_format", json!({"type": "json_schema", "json_schema": {}})),
        ("response_format", json!({"type": "json_schema", "json_schema": {"schema": {"not": {}}}})),
        ("structured_outputs", json!({"regex": "("})),
        ("guided_regex", json!("a")),
        ("audio", json!({})),
        ("functions", json!([{}])),
        ("chat_template", json!("x")),
        ("best_of", json!(2)),
    ] {
        refusing.check(json!({"messages": messages, field: value}), field).await;
    }
    refusing.check(json!({"prompt": "x", "suffix": "y"}), "suffix").await;
    refusing.check(json!({"prompt": "x", "prompt_embeds": "AAAA"}), "prompt_embeds").await;
    let engine = Fake::says("x");
    let unknown =
        json!({"messages": messages, "no_such_field": 1, "tools": null, "suffix": "of another endpoint"});
    assert_eq!(chat(&server(&engine), unknown).await.0, 200);
}

#[tokio::test]
async fn bodies_that_are_no_json_objects_are_refused() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let deep = "[".repeat(100_000);
    let nan = r#"{"prompt": "x", "temperature": NaN}"#;
    let huge = r#"{"prompt": "x", "temperature": 1e999}"#;
    let lone = r#"{"prompt": "\ud800"}"#;
    for body in ["", "{", "[]", "7", "null", &deep, nan, huge, lone] {
        let request =
            Request::post("/v1/completions").header(header::CONTENT_TYPE, "application/json; charset=utf-8");
        let response = send(&server, request.body(Body::from(body.to_owned())).unwrap()).await;
        let status = response.status();
        let answer: Value = serde_json::from_str(&text(response).await).unwrap();
        assert_eq!(status, 400, "{answer}");
        assert_eq!(answer["error"]["param"], Value::Null);
    }
    let invalid_utf8 = Request::post("/v1/completions").header(header::CONTENT_TYPE, "application/json");
    let response =
        send(&server, invalid_utf8.body(Body::from(b"{\"prompt\": \"\xff\"}".to_vec())).unwrap()).await;
    assert_eq!(response.status(), 400);
    let undeclared = Request::post("/v1/completions").body(Body::from(r#"{"prompt": "x"}"#)).unwrap();
    assert_eq!(send(&server, undeclared).await.status(), 415);
}

#[tokio::test]
async fn a_body_over_the_limit_is_a_413() {
    let engine = Fake::says("x");
    let server = server_with(&engine, &[], 1000);
    let (status, answer) = complete(&server, json!({"prompt": "x".repeat(1000)})).await;
    assert_eq!((status, &answer["error"]["code"]), (413, &json!(413)));
    // Without a Content-Length.
    let pieces = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>("[".repeat(100)));
    let endless = Request::post("/v1/completions").header(header::CONTENT_TYPE, "application/json");
    let response = send(&server, endless.body(Body::from_stream(pieces)).unwrap()).await;
    assert_eq!(response.status(), 413);
    assert_eq!(engine.num_requests(), 0);
}
