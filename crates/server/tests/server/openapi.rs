//! The OpenAPI document: what it says of fields and routes is true, and the committed copy is the one that is served.

use std::path::Path;

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use spark_server::{ApiKeys, HttpState, router};

use crate::fake::Fake;
use crate::{ask, front_end, post, send, server, text};

async fn served() -> Value {
    let request = Request::get("/openapi.json").body(Body::empty()).unwrap();
    serde_json::from_str(&text(send(&server(&Fake::says("x")), request).await).await).unwrap()
}

#[tokio::test]
async fn the_committed_document_is_the_one_that_is_served() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/openapi.json");
    let document = serde_json::to_string_pretty(&served().await).unwrap() + "\n";
    if std::env::var_os("SPARK_UPDATE").is_some() {
        std::fs::write(&path, &document).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(
        committed == document,
        "docs/openapi.json is old: SPARK_UPDATE=1 cargo nextest run -p spark-server openapi writes it anew"
    );
}

/// Sends a value of a wrong type in every field that the document lists: who reads a field refuses it.
#[tokio::test]
async fn every_field_that_works_is_read() {
    let document = served().await;
    let server = server(&Fake::says("x"));
    let messages = json!([{"role": "user", "content": "x"}]);
    for (path, base) in [
        ("/v1/chat/completions", json!({"messages": messages})),
        ("/v1/chat/completions/batch", json!({"messages": [messages]})),
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/responses", json!({"input": "x"})),
        ("/completion", json!({"prompt": "x"})),
        ("/v1/messages", json!({"messages": messages, "max_tokens": 5})),
    ] {
        let (status, answer) = ask(&server, path, base.clone()).await;
        assert_eq!(status, 200, "{path}: {answer}");
        let post = &document["paths"][path]["post"];
        let body = post["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str().unwrap();
        let fields =
            document.pointer(body.trim_start_matches('#')).unwrap()["properties"].as_object().unwrap();
        assert!(fields.len() > 20, "{path}");
        for name in fields.keys() {
            let mut body = base.clone();
            body[name] = json!([{}]);
            let (status, error) = ask(&server, path, body).await;
            assert_eq!(status, 400, "{path}: {name}");
            match path {
                // No param in this form: the message says it.
                "/v1/messages" => {
                    assert!(error["error"]["message"].as_str().unwrap().contains(name), "{name}: {error}")
                }
                _ => assert_eq!(error["error"]["param"], *name, "{path}: {error}"),
            }
        }
    }
}

#[tokio::test]
async fn every_documented_route_exists() {
    let document = served().await;
    // One of them only exists where the operator says so.
    let front_end = front_end(&Fake::says("x"), |options| options.tokenizer_info = true);
    let server = router(HttpState { front_end, api_keys: ApiKeys::default(), max_body_bytes: 1 << 20 });
    let mut num_routes = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let request = match method.as_str() {
                "post" => post(path, &json!({})),
                method => Request::builder()
                    .method(method.to_uppercase().as_str())
                    .uri(path.replace(['{', '}'], ""))
                    .body(Body::empty())
                    .unwrap(),
            };
            let response = send(&server, request).await;
            let (status, body) = (response.status(), text(response).await);
            assert!(status != 405 && !body.contains("there is no route"), "{method} {path}: {status} {body}");
            num_routes += 1;
        }
    }
    assert!(num_routes > 20);
}

#[tokio::test]
async fn the_page_shows_routes_and_fields_without_scripts_or_other_hosts() {
    let request = Request::get("/docs").body(Body::empty()).unwrap();
    let page = text(send(&server(&Fake::says("x")), request).await).await;
    for part in ["/v1/messages", "thinking_token_budget", "cache_salt"] {
        assert!(page.contains(part), "{part}");
    }
    for part in ["<script", "http://", "https://", "//cdn"] {
        assert!(!page.contains(part), "{part}");
    }
}
