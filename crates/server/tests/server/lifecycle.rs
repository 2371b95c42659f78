//! Clients that leave, and servers that stop. These tests use sockets.

use std::sync::Arc;

use futures_util::StreamExt;
use serde_json::json;
use spark_server::{ApiKeys, HttpState, ServeOptions, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::fake::{Fake, Script};
use crate::{front_end, ids, post, send, server};

/// Whether all sequences were cancelled; waits for it.
async fn cancelled(engine: &Fake, count: usize) {
    let senders = engine.hanging.lock().unwrap().clone();
    assert_eq!(senders.len(), count);
    for sender in senders {
        sender.closed().await;
    }
}

#[tokio::test]
async fn dropping_a_stream_cancels_all_its_choices() {
    let engine = Fake::new(Script::Hang(ids("ab")));
    let body = json!({"prompt": "x", "n": 3, "stream": true});
    let response = send(&server(&engine), post("/v1/completions", &body)).await;
    let mut stream = response.into_body().into_data_stream();
    assert!(stream.next().await.unwrap().unwrap().starts_with(b"data: "));
    assert!(engine.hanging.lock().unwrap().iter().all(|sender| !sender.is_closed()));
    drop(stream);
    cancelled(&engine, 3).await;
}

struct Running {
    address: std::net::SocketAddr,
    stop: oneshot::Sender<()>,
    done: tokio::task::JoinHandle<std::io::Result<()>>,
}

async fn start(engine: &Arc<Fake>) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let state = HttpState {
        front_end: front_end(engine, |_| {}),
        api_keys: ApiKeys::default(),
        max_body_bytes: 1 << 20,
    };
    let (stop, stopped) = oneshot::channel();
    let shutdown = async {
        let _ = stopped.await;
    };
    Running { address, stop, done: tokio::spawn(serve(listener, state, ServeOptions::default(), shutdown)) }
}

async fn open(server: &Running, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    stream
}

async fn read_until(stream: &mut TcpStream, mark: &str) -> String {
    let mut got = Vec::new();
    while !String::from_utf8_lossy(&got).contains(mark) {
        let mut buffer = [0; 4096];
        let num_read = stream.read(&mut buffer).await.unwrap();
        assert!(num_read > 0, "closed before {mark:?}");
        got.extend(&buffer[..num_read]);
    }
    String::from_utf8_lossy(&got).into_owned()
}

#[tokio::test]
async fn a_closed_connection_cancels_streamed_or_not() {
    for body in [r#"{"prompt": "x", "stream": true}"#, r#"{"prompt": "x"}"#] {
        let engine = Fake::new(Script::Hang(ids("ab")));
        let server = start(&engine).await;
        let mut client = open(&server, body).await;
        if body.contains("stream") {
            read_until(&mut client, "\"text\":\"b\"").await;
        }
        while engine.num_requests() == 0 {
            tokio::task::yield_now().await;
        }
        drop(client);
        cancelled(&engine, 1).await;
    }
}

#[tokio::test]
async fn a_stopping_server_finishes_its_streams() {
    let engine = Fake::new(Script::Hang(ids("ab")));
    let server = start(&engine).await;
    let mut client = open(&server, r#"{"prompt": "x", "stream": true}"#).await;
    read_until(&mut client, "\"text\":\"b\"").await;
    server.stop.send(()).unwrap();
    let sender = engine.hanging.lock().unwrap().pop().unwrap();
    let timings = spark_api::RequestTimings {
        arrived: std::time::Instant::now(),
        queued: std::time::Duration::ZERO,
        prefill: std::time::Duration::ZERO,
        decode: std::time::Duration::ZERO,
        num_preemptions: 0,
    };
    let end = spark_api::Finished { reason: spark_api::FinishReason::Length, num_output_tokens: 2, timings };
    sender.send(spark_api::Event::Finished(end)).unwrap();
    let rest = read_until(&mut client, "[DONE]").await;
    assert!(rest.contains("\"finish_reason\":\"length\""));
    server.done.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_batch_line_is_answered_without_http() {
    let engine = Fake::says("x");
    let front_end = front_end(&engine, |_| {});
    let (status, answer) = front_end.handle("/v1/completions", json!({"prompt": "x"})).await;
    assert_eq!((status, &answer["choices"][0]["text"]), (200, &json!("x")));
    assert_eq!(front_end.handle("/v1/embeddings", json!({})).await.0, 404);
    let (status, answer) = front_end.handle("/v1/completions", json!({"prompt": "x", "stream": true})).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("stream")));
}

#[tokio::test]
async fn text_can_be_read_piece_by_piece() {
    let engine = Fake::says("hey");
    let mut generation = front_end(&engine, |_| {}).completion(json!({"prompt": "x"})).await.unwrap();
    assert_eq!(generation.num_prompt_tokens(), 1);
    let mut text = String::new();
    let mut finish = None;
    while let Some(delta) = generation.next().await {
        let delta = delta.unwrap();
        text.push_str(&delta.text);
        finish = finish.or(delta.finish);
    }
    assert_eq!((text.as_str(), finish.unwrap().reason), ("hey", "stop"));
}

#[tokio::test]
async fn an_abandoned_request_counts_as_aborted() {
    let engine = Fake::new(Script::Hang(ids("ab")));
    let front_end = front_end(&engine, |_| {});
    drop(front_end.completion(json!({"prompt": "x"})).await.unwrap());
    let page = front_end.metrics();
    assert!(page.contains("finished_reason=\"abort\"} 1"), "{page}");
}

#[tokio::test]
async fn many_streams_at_once_lose_nothing() {
    let text = "0123456789 äöü ".repeat(12);
    let engine = Fake::says(&text);
    let server = server(&engine);
    let streams = (0..64).map(|_| async {
        let body = json!({"prompt": "x", "stream": true, "max_tokens": 250});
        let got = crate::chunks(&server, "/v1/completions", body).await;
        got.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect::<String>()
    });
    let texts = futures_util::future::join_all(streams).await;
    assert!(texts.iter().all(|got| *got == text));
    assert_eq!(engine.num_requests(), 64);
}
