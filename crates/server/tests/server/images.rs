//! Images of requests: what is judged before pixels are decoded, and how much memory they may hold.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::{Value, json};
use spark_api::FinishReason;
use spark_server::{FrontEnd, Generation};

use crate::chat::{png, with_image};
use crate::fake::{Fake, Script};
use crate::{ask, chat, front_end, ids, server};

/// A PNG with an intact header whose pixels cannot be decoded.
fn broken_png(width: u32, height: u32) -> String {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    let whole = png(width, height);
    let (head, data) = whole.split_once(',').unwrap();
    let mut bytes = STANDARD.decode(data).unwrap();
    // Signature and IHDR take 33 bytes, the length and type of the first IDAT another 8.
    bytes[41..].fill(0xff);
    format!("{head},{}", STANDARD.encode(bytes))
}

fn with_images(urls: &[String]) -> Value {
    let parts: Vec<_> =
        urls.iter().map(|url| json!({"type": "image_url", "image_url": {"url": url}})).collect();
    json!({"messages": [{"role": "user", "content": parts}]})
}

/// An engine for at most four images of at most `max_media_tokens`, and 256 tokens in all.
fn engine(max_media_tokens: usize) -> Arc<Fake> {
    Fake::with_limits(Script::Tokens(ids("a"), FinishReason::Length), |limits| {
        limits.max_media = 4;
        limits.max_media_tokens = max_media_tokens;
    })
}

#[tokio::test]
async fn images_that_cannot_fit_are_refused_before_any_is_decoded() {
    let engine = engine(64);
    let server = server(&engine);
    let broken = broken_png(256, 256);
    let refused = async |body: Value, param: &str| -> String {
        let (status, answer) = chat(&server, body).await;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{answer}");
        answer["error"]["message"].to_string()
    };
    refused(with_images(&vec![broken.clone(); 3]), "image_url").await;
    let message = refused(with_images(&vec![broken.clone(); 4]), "messages").await;
    assert!(message.contains("256 tokens") && message.contains("max_model_len"), "{message}");
    // Alone the image fits, and so does the text.
    let mut long = with_image(&broken);
    long["messages"][0]["content"][1]["text"] = json!("x".repeat(200));
    let message = refused(long.clone(), "messages").await;
    assert!(message.contains("max_model_len"), "{message}");
    long["messages"][0]["content"][0] = json!({"type": "text", "text": ""});
    assert_eq!(chat(&server, long).await.0, 200);
    assert_eq!(engine.num_requests(), 1);
}

#[tokio::test]
async fn one_image_over_the_limit_keeps_the_others_from_being_decoded() {
    let engine = engine(48);
    let images = with_images(&[broken_png(64, 64), broken_png(256, 256)]);
    let (status, answer) = chat(&server(&engine), images).await;
    assert_eq!(status, 400);
    assert!(answer["error"]["message"].as_str().unwrap().contains("the limit is 48"), "{answer}");
}

#[tokio::test]
async fn tokens_are_counted_without_decoding() {
    let server = server(&engine(64));
    let (_, whole) = ask(&server, "/tokenize", with_image(&png(64, 96))).await;
    let (status, answer) = ask(&server, "/tokenize", with_image(&broken_png(64, 96))).await;
    assert_eq!((status, &answer["tokens"]), (200, &whole["tokens"]));
}

/// Permits are counted in units of 64 KiB; a test image takes one.
const UNIT_BYTES: usize = 1 << 16;

/// A front end without a cache, whose requests may hold `num_images` images.
fn bounded(engine: &Arc<Fake>, num_images: usize) -> Arc<FrontEnd> {
    front_end(engine, |options| {
        options.max_media_bytes = num_images * UNIT_BYTES;
        options.mm_processor_cache_bytes = 0;
    })
}

/// Queues a chat that finds room, now or soon.
async fn queue(front_end: &FrontEnd, body: Value) -> Generation {
    let chat = tokio::time::timeout(Duration::from_secs(30), front_end.chat(body));
    chat.await.expect("there is no room for its images").unwrap()
}

#[tokio::test]
async fn an_image_waits_while_open_requests_hold_too_much() {
    let front_end = bounded(&Fake::new(Script::Hang(ids("a"))), 1);
    let first = queue(&front_end, with_image(&png(64, 96))).await;
    let mut second = Box::pin(front_end.chat(with_image(&png(96, 64))));
    for _ in 0..200 {
        // Text needs no such memory; it goes through the threads that the second request would use.
        let text = json!({"messages": [{"role": "user", "content": "x"}]});
        drop(front_end.chat(text).await.unwrap());
        assert!(second.as_mut().now_or_never().is_none(), "both images are held at the same time");
    }
    drop(first);
    drop(second.await.unwrap());
    // More than there may be is served alone.
    drop(queue(&front_end, with_images(&[png(64, 96), png(96, 64)])).await);
    // A refused request gives back what it had.
    assert!(front_end.chat(with_image(&broken_png(64, 96))).await.is_err());
    drop(queue(&front_end, with_image(&png(64, 96))).await);
}

#[tokio::test]
async fn requests_with_the_same_image_share_its_memory() {
    let engine = Fake::new(Script::Hang(ids("a")));
    let front_end = bounded(&engine, 2);
    let mut open = Vec::new();
    for url in [png(64, 96), png(64, 96), png(96, 64)] {
        open.push(queue(&front_end, with_image(&url)).await);
    }
    let requests = engine.requests.lock().unwrap();
    let patches: Vec<_> = requests.iter().map(|request| &request.media[0].patches).collect();
    assert!(Arc::ptr_eq(patches[0], patches[1]) && !Arc::ptr_eq(patches[0], patches[2]));
}

#[tokio::test]
async fn the_end_of_a_sequence_frees_its_images() {
    let front_end = bounded(&Fake::says("a"), 1);
    let mut first = queue(&front_end, with_image(&png(64, 96))).await;
    while first.next().await.is_some() {}
    queue(&front_end, with_image(&png(96, 64))).await;
    drop(first);
}
