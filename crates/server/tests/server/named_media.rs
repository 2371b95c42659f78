//! Pictures under a name (`uuid`): sent once, asked for again without their bytes, and never another client's.

use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use serde_json::{Value, json};
use spark_server::{ApiKeys, HttpState, router};

use crate::chat::png;
use crate::fake::Fake;
use crate::{chat, front_end, send, server, server_with, text};

/// A chat about pictures, each with what its part has beside its type.
fn about(parts: &[Value]) -> Value {
    let part = |extra: &Value| {
        let mut part = json!({"type": "image_url"});
        part.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        part
    };
    let content: Vec<Value> = parts.iter().map(part).collect();
    json!({"messages": [{"role": "user", "content": content}]})
}

fn sent(uuid: &str, url: &str) -> Value {
    json!({"image_url": {"url": url}, "uuid": uuid})
}

/// The hashes of the last request's pictures.
fn hashes(engine: &Fake) -> Vec<spark_api::MediaHash> {
    engine.last(|request| request.media.iter().map(|item| item.hash).collect())
}

async fn with_key(server: &Router, key: &str, body: &Value) -> (u16, Value) {
    let request = Request::post("/v1/chat/completions")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::AUTHORIZATION, format!("Bearer {key}"));
    let response = send(server, request.body(Body::from(body.to_string())).unwrap()).await;
    (response.status().as_u16(), serde_json::from_str(&text(response).await).unwrap())
}

#[tokio::test]
async fn a_named_picture_need_not_be_sent_again() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let (one, two) = (png(64, 64), png(96, 64));
    assert_eq!(chat(&server, about(&[sent("one", &one), sent("two", &two)])).await.0, 200);
    let first = hashes(&engine);
    let prompt = engine.last(|request| request.prompt.clone());
    // Null, empty, or left out; in any order.
    for (url, uuids) in [
        (json!({"image_url": null}), ["one", "two"]),
        (json!({"image_url": {}}), ["one", "two"]),
        (json!({"image_url": {"url": null}}), ["one", "two"]),
        (json!({}), ["one", "two"]),
        (json!({}), ["two", "one"]),
    ] {
        let named = uuids.map(|uuid| {
            let mut part = url.clone();
            part["uuid"] = json!(uuid);
            part
        });
        let (status, answer) = chat(&server, about(&named)).await;
        assert_eq!(status, 200, "{answer}");
        match uuids {
            ["one", _] => {
                assert_eq!(hashes(&engine), first);
                assert_eq!(engine.last(|request| request.prompt.clone()), prompt);
            }
            _ => assert_eq!(hashes(&engine), [first[1], first[0]]),
        }
    }
    // Bytes that are sent are always what is meant, and the name follows them.
    assert_eq!(chat(&server, about(&[sent("one", &two)])).await.0, 200);
    assert_eq!(hashes(&engine), first[1..]);
    assert_eq!(chat(&server, about(&[json!({"uuid": "one"})])).await.0, 200);
    assert_eq!(hashes(&engine), first[1..]);
}

#[tokio::test]
async fn a_name_without_a_picture_is_refused() {
    let engine = Fake::says("x");
    let server = server(&engine);
    assert_eq!(chat(&server, about(&[sent("one", &png(64, 64))])).await.0, 200);
    let (status, answer) =
        chat(&server, about(&[json!({"uuid": "one"}), json!({"image_url": {}, "uuid": "other"})])).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("image_url")));
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.starts_with("Cache miss for image at index 1 but data is not provided"), "{message}");
    assert_eq!(chat(&server, about(&[json!({"image_url": {}})])).await.0, 400);
    assert_eq!(chat(&server, about(&[json!({"image_url": {}, "uuid": 1})])).await.0, 400);
    // What cannot be decoded gets no name.
    let broken = sent("broken", &png(64, 64)[..120]);
    assert_eq!(chat(&server, about(&[broken])).await.0, 400);
    assert_eq!(chat(&server, about(&[json!({"uuid": "broken"})])).await.0, 400);
    assert_eq!(engine.num_requests(), 1);
}

#[tokio::test]
async fn nothing_is_promised_without_a_cache() {
    let engine = Fake::says("x");
    let front_end = front_end(&engine, |options| options.mm_processor_cache_bytes = 0);
    let server = router(HttpState { front_end, api_keys: ApiKeys::default(), max_body_bytes: 1 << 20 });
    assert_eq!(chat(&server, about(&[sent("one", &png(64, 64))])).await.0, 200);
    let (status, answer) = chat(&server, about(&[json!({"uuid": "one"})])).await;
    assert_eq!(status, 400, "{answer}");
}

#[tokio::test]
async fn names_belong_to_a_key() {
    let engine = Fake::says("x");
    let server = server_with(&engine, &["alice", "bob"], 1 << 20);
    let (secret, other) = (png(64, 64), png(96, 64));
    assert_eq!(with_key(&server, "alice", &about(&[sent("p", &secret)])).await.0, 200);
    let of_alice = hashes(&engine);
    let (status, answer) = with_key(&server, "bob", &about(&[json!({"uuid": "p"})])).await;
    assert_eq!(status, 400, "{answer}");
    // Another's picture under the same name changes nothing for the first.
    assert_eq!(with_key(&server, "bob", &about(&[sent("p", &other)])).await.0, 200);
    let of_bob = hashes(&engine);
    assert_ne!(of_bob, of_alice);
    for (key, want) in [("alice", of_alice), ("bob", of_bob)] {
        assert_eq!(with_key(&server, key, &about(&[json!({"uuid": "p"})])).await.0, 200);
        assert_eq!(hashes(&engine), want, "{key}");
    }
}
