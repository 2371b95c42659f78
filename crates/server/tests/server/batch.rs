//! vLLM's batch of chats: one choice for each conversation, and what such a request cannot ask for.

use serde_json::{Value, json};
use spark_server::{ApiKeys, HttpState, router};

use crate::chat::{png, with_image};
use crate::fake::Fake;
use crate::{ask, front_end, ids, server, tokenizer};

const PATH: &str = "/v1/chat/completions/batch";

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

#[tokio::test]
async fn each_conversation_has_a_choice() {
    let engine = Fake::says("ok");
    let body = json!({"model": "tiny", "messages": [user("First"), user("Second one")], "request_id": "r",
        "logprobs": true, "return_token_ids": true, "prompt_logprobs": 0, "chat_template_kwargs": {"a": 1}});
    let (status, answer) = ask(&server(&engine), PATH, body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!((&answer["id"], &answer["object"]), (&json!("chatcmpl-r"), &json!("chat.completion")));
    assert_eq!((&answer["prompt_token_ids"], &answer["prompt_logprobs"]), (&Value::Null, &Value::Null));
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    let prompts: Vec<Vec<u32>> =
        engine.requests.lock().unwrap().iter().map(|request| request.prompt.clone()).collect();
    for (i, (choice, text)) in choices.iter().zip(["First", "Second one"]).enumerate() {
        assert_eq!((&choice["index"], &choice["message"]["content"]), (&json!(i), &json!("ok")));
        assert_eq!(choice["logprobs"]["content"].as_array().unwrap().len(), 3);
        assert_eq!(choice["prompt_token_ids"], json!(prompts[i]));
        assert_eq!(choice["prompt_logprobs"].as_array().unwrap().len(), prompts[i].len());
        let shown = tokenizer().decode(&prompts[i], false);
        assert_eq!(shown, format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"));
    }
    let lengths: usize = prompts.iter().map(Vec::len).sum();
    assert_eq!(
        (&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]),
        (&json!(lengths), &json!(6))
    );
    assert_eq!(choices[0]["token_ids"][0], ids("o")[0]);
}

#[tokio::test]
async fn pictures_stay_with_their_conversations() {
    let engine = Fake::says("x");
    let [one, two] = [png(64, 64), png(96, 64)].map(|url| with_image(&url)["messages"].clone());
    let body = json!({"messages": [one, user("none"), two]});
    let (status, answer) = ask(&server(&engine), PATH, body).await;
    assert_eq!(status, 200, "{answer}");
    let requests = engine.requests.lock().unwrap();
    let grids: Vec<Vec<usize>> =
        requests.iter().map(|request| request.media.iter().map(|item| item.num_tokens).collect()).collect();
    assert_eq!(grids.iter().map(Vec::len).collect::<Vec<_>>(), [1, 0, 1]);
    assert_ne!(grids[0], grids[2]);
}

#[tokio::test]
async fn what_a_batch_cannot_do_is_refused_by_name() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let tool = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let two = || json!([user("a"), user("b")]);
    for (param, body) in [
        ("n", json!({"messages": two(), "n": 2})),
        ("stream", json!({"messages": two(), "stream": true})),
        ("tools", json!({"messages": two(), "tools": tool})),
        ("tool_choice", json!({"messages": two(), "tool_choice": "auto"})),
        ("use_beam_search", json!({"messages": two(), "use_beam_search": true})),
        ("messages", json!({"messages": []})),
        ("messages", json!({})),
        ("messages", json!({"messages": "x"})),
        ("messages", json!({"messages": user("one conversation alone")})),
        ("messages", json!({"messages": [user("a"), []]})),
        ("messages", json!({"messages": [user("a"), [{"role": "poet", "content": "x"}]]})),
        ("messages", json!({"messages": vec![user("a"); 1025]})),
        (
            "messages",
            json!({"messages": vec![user("a"); 1000], "chat_template_kwargs": {"x": "y".repeat(100_000)}}),
        ),
    ] {
        let (status, answer) = ask(&server, PATH, body.clone()).await;
        let shown: String = body.to_string().chars().take(200).collect();
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{shown}: {answer}");
    }
    assert_eq!(engine.num_requests(), 0);
    let wrong = json!({"messages": [user("a"), [{"role": "poet", "content": "x"}]]});
    let (_, answer) = ask(&server, PATH, wrong).await;
    assert!(answer["error"]["message"].as_str().unwrap().starts_with("conversation 1: "), "{answer}");
    // What asks for nothing is taken.
    let neutral = json!({"messages": two(), "n": 1, "stream": false, "tools": [], "tool_choice": "none"});
    assert_eq!(ask(&server, PATH, neutral).await.0, 200);
}

#[tokio::test]
async fn pictures_of_all_conversations_have_room_together_and_each_counts_once() {
    let engine = Fake::says("x");
    // Patches of 64 x 64 pixels are 12,288 bytes; memory is counted in units of 64 KiB.
    let front_end = front_end(&engine, |options| options.max_media_bytes = 2 << 16);
    let server = router(HttpState { front_end, api_keys: ApiKeys::default(), max_body_bytes: 1 << 20 });
    let [one, two, three] =
        [png(64, 64), png(96, 64), png(64, 96)].map(|url| with_image(&url)["messages"].clone());
    let same = json!({"messages": [one, two, one, one, two, one]});
    let (status, answer) = ask(&server, PATH, same).await;
    assert_eq!((status, engine.num_requests()), (200, 6), "{answer}");
    {
        let requests = engine.requests.lock().unwrap();
        let patches = |i: usize| &requests[i].media[0].patches;
        for (i, other, is_same) in [(0, 2, true), (0, 5, true), (1, 4, true), (0, 1, false)] {
            assert_eq!(std::sync::Arc::ptr_eq(patches(i), patches(other)), is_same, "{i} {other}");
        }
    }
    let (status, answer) = ask(&server, PATH, json!({"messages": [one, two, three]})).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("messages")), "{answer}");
    assert_eq!(engine.num_requests(), 6);
}

#[tokio::test]
async fn conversations_have_no_more_tokens_together_than_may_be_queued() {
    let engine = Fake::says("x");
    let front_end = front_end(&engine, |options| options.max_num_queued_tokens = 100);
    let server = router(HttpState { front_end, api_keys: ApiKeys::default(), max_body_bytes: 1 << 20 });
    let (status, answer) = ask(&server, PATH, json!({"messages": vec![user("a word"); 20]})).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("messages")), "{answer}");
    assert_eq!(ask(&server, PATH, json!({"messages": [user("a")]})).await.0, 200);
}
