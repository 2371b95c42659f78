//! Responses that somebody comes back to: their events once more, and what they were asked with.

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

use crate::fake::Script;
use crate::tools::{caller, roomy, says};
use crate::{ask, events, ids, send, text};

const PATH: &str = "/v1/responses";

async fn get(server: &Router, path: &str) -> (u16, Value) {
    let response = send(server, Request::get(path).body(Body::empty()).unwrap()).await;
    (response.status().as_u16(), serde_json::from_str(&text(response).await).unwrap())
}

/// The events of a GET.
async fn again(server: &Router, path: &str) -> Vec<Value> {
    let response = send(server, Request::get(path).body(Body::empty()).unwrap()).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["content-type"]),
        (200, &"text/event-stream".parse().unwrap())
    );
    let body = text(response).await;
    let data = body.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

#[tokio::test]
async fn a_stream_in_the_background_can_be_read_again_from_any_event() {
    let server = caller(&says("one two three"));
    let all = events(&server, PATH, json!({"input": "x", "background": true, "stream": true})).await;
    let numbers: Vec<_> = all.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..all.len() as u64).collect::<Vec<_>>());
    let response = &all[0]["response"];
    assert_eq!((&response["status"], &response["background"]), (&json!("in_progress"), &json!(true)));
    assert_eq!(all.last().unwrap()["type"], "response.completed");
    let path = format!("{PATH}/{}", response["id"].as_str().unwrap());
    assert_eq!(again(&server, &format!("{path}?stream=true")).await, all);
    for after in [0, 3, all.len() - 1] {
        let rest = again(&server, &format!("{path}?stream=true&starting_after={after}")).await;
        assert_eq!(rest, all[after + 1..], "{after}");
    }
    // The object is the stream's last.
    assert_eq!(get(&server, &path).await, (200, all.last().unwrap()["response"].clone()));
}

#[tokio::test]
async fn a_client_that_goes_away_stops_nothing_that_is_in_the_background() {
    let hanging = roomy(Script::Hang(ids("ab")));
    let server = caller(&hanging);
    let body = json!({"input": "x", "background": true, "stream": true});
    drop(send(&server, crate::post(PATH, &body)).await);
    assert!(!hanging.hanging.lock().unwrap()[0].is_closed());
    // A foreground stream is cancelled by the same.
    drop(send(&server, crate::post(PATH, &json!({"input": "x", "stream": true}))).await);
    assert!(hanging.hanging.lock().unwrap()[1].is_closed());
}

#[tokio::test]
async fn a_reader_of_cancelled_work_comes_to_an_end() {
    use futures_util::StreamExt;
    let hanging = roomy(Script::Hang(ids("ab")));
    let server = caller(&hanging);
    let body = json!({"input": "x", "background": true, "stream": true});
    let mut stream = send(&server, crate::post(PATH, &body)).await.into_body().into_data_stream();
    let first = stream.next().await.unwrap().unwrap();
    let data = std::str::from_utf8(&first).unwrap().split("data: ").nth(1).unwrap().trim();
    let id = serde_json::from_str::<Value>(data).unwrap()["response"]["id"].as_str().unwrap().to_owned();
    let (status, cancelled) = ask(&server, &format!("{PATH}/{id}/cancel"), json!({})).await;
    assert_eq!((status, &cancelled["status"]), (200, &json!("cancelled")));
    while let Some(piece) = stream.next().await {
        piece.unwrap();
    }
}

#[tokio::test]
async fn only_what_was_streamed_in_the_background_is_streamed_again() {
    let server = caller(&says("x"));
    let (_, plain) = ask(&server, PATH, json!({"input": "x"})).await;
    let path = format!("{PATH}/{}", plain["id"].as_str().unwrap());
    for (query, param) in [
        ("stream=true", "stream"),
        ("stream=1", "stream"),
        ("starting_after=0", "starting_after"),
        ("stream=true&starting_after=-1", "starting_after"),
        ("include[]=x", "include[]"),
        ("include_obfuscation=true", "include_obfuscation"),
    ] {
        let (status, error) = get(&server, &format!("{path}?{query}")).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!(param)), "{query}");
    }
    assert_eq!(get(&server, &format!("{path}?stream=false&include_obfuscation=false")).await, (200, plain));
    assert_eq!(get(&server, &format!("{PATH}/resp_none?stream=true")).await.0, 404);
}

#[tokio::test]
async fn input_items_are_shown_with_those_of_the_conversation_before() {
    let server = caller(&says("Hi."));
    let (_, first) = ask(&server, PATH, json!({"input": "Hello!"})).await;
    let items = json!([
        {"role": "assistant", "content": "Well?"},
        {"id": "msg_mine", "role": "user", "content": [
            {"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "7"},
    ]);
    let (_, second) = ask(&server, PATH, json!({"input": items, "previous_response_id": first["id"]})).await;
    let path = format!("{PATH}/{}/input_items", second["id"].as_str().unwrap());
    let (status, list) = get(&server, &format!("{path}?order=asc")).await;
    assert_eq!((status, &list["object"], &list["has_more"]), (200, &json!("list"), &json!(false)), "{list}");
    let data = list["data"].as_array().unwrap();
    let told: Vec<_> =
        data.iter().map(|item| (item["type"].as_str().unwrap(), item["role"].as_str())).collect();
    assert_eq!(
        told,
        [
            ("message", Some("user")),
            ("message", Some("assistant")),
            ("message", Some("assistant")),
            ("message", Some("user")),
            ("function_call", None),
            ("function_call_output", None),
        ]
    );
    assert_eq!(data[0]["content"], json!([{"type": "input_text", "text": "Hello!"}]));
    assert_eq!(data[1], first["output"][0], "the answer before");
    assert_eq!(data[2]["content"][0]["type"], "output_text");
    assert_eq!((&data[3]["id"], &data[3]["status"]), (&json!("msg_mine"), &json!("completed")));
    assert_eq!(data[5]["output"], "7");
    // Newest first, page by page.
    let mut pages = Vec::new();
    let mut query = "limit=4".to_owned();
    loop {
        let (_, page) = get(&server, &format!("{path}?{query}")).await;
        pages.extend(page["data"].as_array().unwrap().iter().cloned());
        assert_eq!(page["last_id"], pages.last().unwrap()["id"]);
        if page["has_more"] == false {
            break;
        }
        query = format!("limit=4&after={}", page["last_id"].as_str().unwrap());
    }
    let reversed: Vec<_> = data.iter().rev().cloned().collect();
    assert_eq!(pages, reversed);
    for query in ["limit=0", "limit=101", "order=up", "after=msg_none", "include[]=x", "before=msg_mine"] {
        assert_eq!(get(&server, &format!("{path}?{query}")).await.0, 400, "{query}");
    }
    assert_eq!(get(&server, &format!("{PATH}/resp_none/input_items")).await.0, 404);
    let (_, unstored) = ask(&server, PATH, json!({"input": "x", "store": false})).await;
    let path = format!("{PATH}/{}/input_items", unstored["id"].as_str().unwrap());
    assert_eq!(get(&server, &path).await.0, 404);
}
