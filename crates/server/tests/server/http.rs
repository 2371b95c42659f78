//! Routes, keys, errors of the engine, and the pages that only tell.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use serde_json::{Value, json};
use spark_api::{FinishReason, Health, SubmitError};
use spark_server::{ApiKeys, HttpState, router};

use crate::fake::{Fake, MAX_MODEL_LEN, Script};
use crate::{ask, chunks, complete, front_end, ids, post, send, server, server_with, text};

async fn get(server: &axum::Router, path: &str) -> (u16, String) {
    let response = send(server, Request::get(path).body(Body::empty()).unwrap()).await;
    (response.status().as_u16(), text(response).await)
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[tokio::test]
async fn models_and_version() {
    let server = server(&Fake::says("x"));
    let (status, page) = get(&server, "/v1/models").await;
    let created = json_of(&page)["data"][0]["created"].clone();
    assert!(created.as_u64().unwrap() > 1_600_000_000);
    let expected = json!({"object": "list", "data": [{"id": "tiny", "object": "model", "created": created,
        "owned_by": "spark-engine", "root": "tiny", "parent": null, "max_model_len": MAX_MODEL_LEN}]});
    assert_eq!((status, json_of(&page)), (200, expected.clone()));
    assert_eq!(json_of(&get(&server, "/v1/models/tiny").await.1), expected["data"][0]);
    assert_eq!(get(&server, "/v1/models/other/model").await.0, 404);
    assert_eq!(json_of(&get(&server, "/version").await.1)["version"], env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn an_unknown_model_is_a_404() {
    let engine = Fake::says("x");
    let (status, answer) = complete(&server(&engine), json!({"model": "gpt", "prompt": "x"})).await;
    assert_eq!((status, &answer["error"]["param"]), (404, &json!("model")));
    assert_eq!(answer["error"]["type"], "NotFoundError");
    assert_eq!(engine.num_requests(), 0);
}

#[tokio::test]
async fn unknown_routes_and_methods_have_json_errors() {
    let server = server(&Fake::says("x"));
    let (status, page) = get(&server, "/v2/chat").await;
    assert_eq!((status, &json_of(&page)["error"]["code"]), (404, &json!(404)));
    let (status, page) = get(&server, "/v1/completions").await;
    assert_eq!((status, &json_of(&page)["error"]["type"]), (405, &json!("MethodNotAllowedError")));
}

#[tokio::test]
async fn health_follows_the_engine() {
    let engine = Fake::says("x");
    let server = server(&engine);
    assert_eq!(get(&server, "/health").await.0, 200);
    for (health, status) in [(Health::Stopping, "stopping"), (Health::Failed("broken".into()), "failed")] {
        *engine.health.lock().unwrap() = health;
        let (code, page) = get(&server, "/health").await;
        assert_eq!((code, &json_of(&page)["status"]), (503, &json!(status)));
        assert_eq!((get(&server, "/ready").await.0, get(&server, "/live").await.0), (503, 200));
        assert_eq!(complete(&server, json!({"prompt": "x"})).await.0, 503);
    }
}

#[tokio::test]
async fn every_route_but_health_needs_the_key() {
    let engine = Fake::says("x");
    let server = server_with(&engine, &["secret", "other"], 1 << 20);
    let gets =
        ["/v1/models", "/v1/models/tiny", "/version", "/metrics", "/load", "/v1/responses/x", "/nowhere"];
    let posts = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/x/cancel",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    ];
    let messages = json!([{"role": "user", "content": "x"}]);
    let body = json!({"prompt": "x", "messages": messages, "max_tokens": 5, "input": "x", "tokens": [65]});
    let request = |path: &str| match gets.contains(&path) {
        true => Request::get(path).body(Body::empty()).unwrap(),
        false => post(path, &body),
    };
    for path in gets.into_iter().chain(posts) {
        for header in [
            None,
            Some("Bearer wrong"),
            Some("Bearer"),
            Some("Bearer "),
            Some("secret"),
            Some("Bearer secre"),
        ] {
            let mut request = request(path);
            if let Some(header) = header {
                request.headers_mut().insert(header::AUTHORIZATION, header.parse().unwrap());
            }
            let response = send(&server, request).await;
            assert_eq!(response.status(), 401, "{path} with {header:?}");
            let kind =
                if path.starts_with("/v1/messages") { "authentication_error" } else { "AuthenticationError" };
            assert_eq!(json_of(&text(response).await)["error"]["type"], kind);
        }
        for (name, value) in [("authorization", "Bearer other"), ("x-api-key", "secret")] {
            let mut request = request(path);
            request.headers_mut().insert(name, value.parse().unwrap());
            assert_ne!(send(&server, request).await.status(), 401, "{path}");
        }
    }
    for path in ["/health", "/live", "/ready", "/ping"] {
        assert_eq!(get(&server, path).await.0, 200, "{path}");
    }
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let engine = Fake::new(Script::Refuse(SubmitError::QueueFull { num_waiting: 9, limit: 9 }));
    let response = send(&server(&engine), post("/v1/completions", &json!({"prompt": "x"}))).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()[header::RETRY_AFTER]),
        (503, &"1".parse().unwrap())
    );
    assert!(text(response).await.contains("9 requests are waiting"));
    for error in [SubmitError::Stopping, SubmitError::Failed("x".into())] {
        let engine = Fake::new(Script::Refuse(error));
        assert_eq!(complete(&server(&engine), json!({"prompt": "x"})).await.0, 503);
    }
}

#[tokio::test]
async fn an_engine_that_fails_ends_the_answer_with_an_error() {
    for (script, code) in [
        (Script::Tokens(ids("ab"), FinishReason::EngineFailed("device lost".into())), 500),
        (Script::Tokens(ids("ab"), FinishReason::Cancelled), 503),
        (Script::Drop, 500),
    ] {
        let server = server(&Fake::new(script));
        let (status, answer) = complete(&server, json!({"prompt": "x"})).await;
        assert_eq!((status, &answer["error"]["code"]), (code, &json!(code)));
        let got = chunks(&server, "/v1/completions", json!({"prompt": "x", "stream": true})).await;
        assert_eq!(got.last().unwrap()["error"]["code"], code);
    }
}

#[tokio::test]
async fn an_engine_that_stops_with_the_request_in_its_queue_is_a_503_that_says_so() {
    let failed = Health::Failed("device lost".into());
    for (health, says) in [(Health::Stopping, "shutting down"), (failed, "device lost")] {
        for stream in [false, true] {
            let server = server(&Fake::new(Script::Stop(health.clone())));
            let body = json!({"prompt": "x", "stream": stream});
            let error = match stream {
                true => chunks(&server, "/v1/completions", body).await.pop().unwrap()["error"].take(),
                false => complete(&server, body).await.1["error"].take(),
            };
            assert_eq!(error["code"], 503, "{error}");
            assert!(error["message"].as_str().unwrap().contains(says), "{error}");
        }
    }
}

#[tokio::test]
async fn a_panic_costs_one_request_and_says_nothing() {
    let server = server(&Fake::new(Script::Panic));
    let (status, answer) = complete(&server, json!({"prompt": "x"})).await;
    assert_eq!((status, &answer["error"]["type"]), (500, &json!("InternalServerError")));
    assert!(!answer.to_string().contains("a defect"));
    assert_eq!(get(&server, "/health").await.0, 200);
}

#[tokio::test]
async fn metrics_have_vllms_names_and_labels() {
    let engine = Fake::says("xy");
    let server = server(&engine);
    assert_eq!(complete(&server, json!({"prompt": "x", "n": 2})).await.0, 200);
    let (status, page) = get(&server, "/metrics").await;
    assert_eq!(status, 200);
    let labels = r#"{engine="0",model_name="tiny"}"#;
    for line in [
        format!("vllm:num_requests_running{labels} 3"),
        format!("vllm:num_requests_waiting{labels} 0"),
        format!("vllm:kv_cache_usage_perc{labels} 0.25"),
        format!("vllm:prompt_tokens_total{labels} 40"),
        "vllm:request_success_total{engine=\"0\",model_name=\"tiny\",finished_reason=\"stop\"} 2".into(),
        format!("vllm:time_to_first_token_seconds_count{labels} 2"),
        format!("vllm:inter_token_latency_seconds_count{labels} 4"),
        format!("vllm:e2e_request_latency_seconds_count{labels} 2"),
        format!("vllm:request_prefill_time_seconds_sum{labels} 0.004"),
        format!("vllm:request_generation_tokens_sum{labels} 6"),
        format!("vllm:request_params_max_tokens_sum{labels} 32"),
        "# TYPE vllm:iteration_tokens_total histogram".into(),
        "vllm:cache_config_info{engine=\"0\",model_name=\"tiny\",block_size=\"32\",num_gpu_blocks=\"100\",kv_cache_size_tokens=\"3200\",kv_cache_max_concurrency=\"12.50\"} 1"
            .into(),
    ] {
        assert!(page.lines().any(|got| got == line), "{line} is not in\n{page}");
    }
}

#[tokio::test]
async fn texts_become_tokens_and_tokens_texts() {
    let server = server(&Fake::says("x"));
    let (status, answer) =
        ask(&server, "/tokenize", json!({"model": "tiny", "prompt": "hi<|im_end|>"})).await;
    assert_eq!(status, 200);
    let tokens = ids("hi<|im_end|>");
    let expected = json!({"count": 3, "max_model_len": MAX_MODEL_LEN, "tokens": tokens, "token_strs": null});
    assert_eq!(answer, expected);
    let (_, answer) = ask(&server, "/detokenize", json!({"tokens": tokens})).await;
    assert_eq!(answer, json!({"prompt": "hi<|im_end|>", "content": "hi<|im_end|>"}));
    let messages = json!([{"role": "user", "content": "Hello!"}]);
    let (_, answer) =
        ask(&server, "/tokenize", json!({"messages": messages, "return_token_strs": true})).await;
    assert_eq!((&answer["count"], &answer["token_strs"][0]), (&json!(25), &json!("<|im_start|>")));
    for (path, body) in [
        ("/tokenize", json!({})),
        ("/tokenize", json!({"prompt": 7})),
        ("/tokenize", json!({"prompt": "x", "chat_template": "x"})),
        ("/detokenize", json!({})),
        ("/detokenize", json!({"tokens": [282]})),
        ("/detokenize", json!({"tokens": ["a"]})),
    ] {
        assert_eq!(ask(&server, path, body).await.0, 400);
    }
}

#[tokio::test]
async fn a_request_id_comes_from_the_body_or_the_header() {
    let server = server(&Fake::says("x"));
    let mut request = post("/v1/completions", &json!({"prompt": "x"}));
    request.headers_mut().insert("x-request-id", "from-header".parse().unwrap());
    let response = send(&server, request).await;
    assert_eq!(response.headers()["x-request-id"], "from-header");
    assert_eq!(json_of(&text(response).await)["id"], "cmpl-from-header");

    let mut request = post("/v1/completions", &json!({"prompt": "x", "request_id": "from-body"}));
    request.headers_mut().insert("x-request-id", "from-header".parse().unwrap());
    let response = send(&server, request).await;
    assert_eq!(response.headers()["x-request-id"], "from-body");
    assert_eq!(json_of(&text(response).await)["id"], "cmpl-from-body");

    // Made up by the server: the same in header and body.
    let response = send(&server, post("/v1/completions", &json!({"prompt": "x"}))).await;
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert_eq!(json_of(&text(response).await)["id"], format!("cmpl-{id}"));
    let refused = send(&server, post("/v1/completions", &json!({}))).await;
    assert!(!refused.headers()["x-request-id"].is_empty());
    let (_, first) = complete(&server, json!({"prompt": "x"})).await;
    let (_, second) = complete(&server, json!({"prompt": "x"})).await;
    assert_ne!(first["id"], second["id"]);
}

#[tokio::test]
async fn the_load_is_what_is_at_work() {
    let engine = Fake::new(Script::Hang(ids("ab")));
    let server = server(&engine);
    let load = async || json_of(&get(&server, "/load").await.1)["server_load"].clone();
    assert_eq!(load().await, 0);
    let stream = send(&server, post("/v1/completions", &json!({"prompt": "x", "stream": true}))).await;
    assert_eq!(load().await, 1);
    drop(stream);
    assert_eq!(load().await, 0);
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive_with_comments() {
    use futures_util::StreamExt;
    let front_end = front_end(&Fake::new(Script::Hang(Vec::new())), |options| {
        options.keep_alive = Duration::from_millis(1);
    });
    let server =
        router(HttpState { front_end, api_keys: ApiKeys::new(&[] as &[&str]), max_body_bytes: 1 << 20 });
    let response = send(&server, post("/v1/completions", &json!({"prompt": "x", "stream": true}))).await;
    let mut body = response.into_body().into_data_stream();
    assert_eq!(body.next().await.unwrap().unwrap(), ": keep-alive\n\n");
}
