//! Anthropic's messages: shapes of answers, events and errors; what bodies become as prompts.

use std::sync::Arc;

use serde_json::{Value, json};
use spark_api::{FinishReason, SubmitError};

use crate::chat::png;
use crate::fake::{EOS, Fake, IMAGE, Script};
use crate::tools::{CALL, caller, roomy, says, thinker};
use crate::{ask, events, ids, post, send, server, server_with, tokenizer};

const PATH: &str = "/v1/messages";

fn hello(extra: &Value) -> Value {
    let mut body =
        json!({"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello!"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn weather() -> Value {
    json!([{"name": "get_weather", "description": "Looks out.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}])
}

fn prompt_text(engine: &Arc<Fake>) -> String {
    tokenizer().decode(&engine.last(|request| request.prompt.clone()), false)
}

fn types(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn an_answer_has_the_documented_shape() {
    let engine = Fake::says("Hé!");
    let (status, answer) = ask(&server(&engine), PATH, hello(&json!({"request_id": "r"}))).await;
    let expected = json!({
        "id": "msg_r",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hé!"}],
        "stop_reason": "end_turn",
        "stop_sequence": null,
        "usage": {"input_tokens": 21, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4,
            "output_tokens": 5},
    });
    assert_eq!((status, answer), (200, expected));
}

#[tokio::test]
async fn a_stream_has_anthropics_events_in_their_order() {
    let text = format!("<think>hm</think>So: {CALL}");
    let got = events(&thinker(&says(&text)), PATH, hello(&json!({"stream": true, "tools": weather()}))).await;
    let mut kinds = types(&got);
    kinds.dedup();
    let block = ["content_block_start", "content_block_delta", "content_block_stop"];
    let first = ["message_start", "content_block_start", "ping", "content_block_delta", "content_block_stop"];
    let end = ["message_delta", "message_stop"];
    let expected = [&first[..], &block, &block, &end].concat();
    assert_eq!(kinds, expected);

    let start = &got[0]["message"];
    assert_eq!((&start["content"], &start["stop_reason"]), (&json!([]), &Value::Null));
    assert_eq!(
        (&start["usage"]["cache_read_input_tokens"], &start["usage"]["output_tokens"]),
        (&json!(4), &json!(0))
    );
    let starts: Vec<_> = got.iter().filter(|event| event["type"] == "content_block_start").collect();
    assert_eq!(starts[0]["content_block"], json!({"type": "thinking", "thinking": "", "signature": ""}));
    assert_eq!(starts[1]["content_block"], json!({"type": "text", "text": ""}));
    let call = &starts[2]["content_block"];
    assert_eq!(
        (&call["type"], &call["name"], &call["input"]),
        (&json!("tool_use"), &json!("get_weather"), &json!({}))
    );
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    let joined = |kind: &str, key: &str| -> String {
        let deltas = got.iter().filter(|event| event["delta"]["type"] == kind);
        deltas.map(|event| event["delta"][key].as_str().unwrap()).collect()
    };
    assert_eq!(joined("thinking_delta", "thinking"), "hm");
    assert_eq!(joined("text_delta", "text"), "So:");
    assert_eq!(joined("input_json_delta", "partial_json"), "{\"city\": \"Köln\"}");
    assert_eq!(got.iter().filter(|event| event["delta"]["type"] == "signature_delta").count(), 1);
    let end = &got[got.len() - 2];
    assert_eq!(end["delta"], json!({"stop_reason": "tool_use", "stop_sequence": null}));
    assert_eq!(end["usage"]["output_tokens"], ids(&text).len() + 1);
}

#[tokio::test]
async fn a_whole_answer_has_the_blocks_of_the_stream() {
    let text = format!("<think>hm</think>So: {CALL}");
    let (_, answer) = ask(&thinker(&says(&text)), PATH, hello(&json!({"tools": weather()}))).await;
    let content = answer["content"].as_array().unwrap();
    assert_eq!(content[0], json!({"type": "thinking", "thinking": "hm", "signature": ""}));
    assert_eq!(content[1], json!({"type": "text", "text": "So:"}));
    assert_eq!(content[2]["input"], json!({"city": "Köln"}));
    assert_eq!(answer["stop_reason"], "tool_use");

    let broken = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Kö";
    let (_, answer) = ask(&caller(&says(broken)), PATH, hello(&json!({"tools": weather()}))).await;
    assert_eq!(answer["content"][0]["input"], json!({"unreadable": "{\"city\": \"Kö"}));
}

#[tokio::test]
async fn every_end_has_its_reason() {
    let stopped = roomy(Script::Tokens(ids("one END two"), FinishReason::Eos));
    for (engine, extra, reason, sequence) in [
        (stopped, json!({"stop_sequences": ["END"]}), "stop_sequence", json!("END")),
        (says("abc"), json!({"max_tokens": 2}), "max_tokens", Value::Null),
        (says("abc"), json!({}), "end_turn", Value::Null),
    ] {
        let (_, answer) = ask(&caller(&engine), PATH, hello(&extra)).await;
        assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!(reason), &sequence));
    }
}

#[tokio::test]
async fn a_conversation_with_tools_becomes_the_prompt_of_the_same_chat() {
    let engine = says("x");
    let blocks = json!([{"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Köln"}}]);
    let results = json!([{"type": "tool_result", "tool_use_id": "c1", "is_error": true,
        "content": [{"type": "text", "text": "no window"}]}, {"type": "text", "text": "And now?"}]);
    let body = json!({"max_tokens": 9, "tools": weather(), "system": [{"type": "text", "text": "Be brief.",
    "cache_control": {"type": "ephemeral"}}], "messages": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": results},
    ]});
    let server = caller(&engine);
    let (status, count) = ask(&server, "/v1/messages/count_tokens", body.clone()).await;
    assert_eq!(status, 200);
    assert_eq!(ask(&server, PATH, body).await.0, 200);
    let from_message = engine.last(|request| request.prompt.clone());
    assert_eq!(count, json!({"input_tokens": from_message.len()}));

    let call = json!({"id": "c1", "type": "function",
        "function": {"name": "get_weather", "arguments": "{\"city\": \"Köln\"}"}});
    let tools = json!([{"type": "function", "function": {"name": "get_weather", "description": "Looks out.",
        "parameters": weather()[0]["input_schema"]}}]);
    let chat = json!({"max_tokens": 9, "tools": tools, "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Error: no window"},
        {"role": "user", "content": "And now?"},
    ]});
    assert_eq!(crate::chat(&server, chat).await.0, 200);
    assert_eq!(tokenizer().decode(&from_message, false), prompt_text(&engine));
}

#[tokio::test]
async fn images_come_as_base64() {
    let engine = Fake::says("a cat");
    let url = png(64, 96);
    let data = url.split_once(',').unwrap().1;
    let source = json!({"type": "base64", "media_type": "image/png", "data": data});
    let content = json!([{"type": "image", "source": source}, {"type": "text", "text": "What?"}]);
    let body = json!({"max_tokens": 9, "messages": [{"role": "user", "content": content}]});
    let (status, answer) = ask(&server(&engine), PATH, body).await;
    assert_eq!((status, &answer["content"][0]["text"]), (200, &json!("a cat")));
    engine.last(|request| assert_eq!(request.prompt.iter().filter(|id| **id == IMAGE).count(), 6));
}

#[tokio::test]
async fn a_last_turn_of_the_assistant_is_continued() {
    let engine = says("!");
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]);
    assert_eq!(ask(&caller(&engine), PATH, json!({"max_tokens": 5, "messages": messages})).await.0, 200);
    assert!(prompt_text(&engine).ends_with("<|im_start|>assistant\nWell"));
}

#[tokio::test]
async fn tool_choices_and_thinking_reach_the_chat() {
    let engine = says("<think>hm</think>x");
    let server = thinker(&engine);
    for (thinking, end) in [
        (json!({"type": "disabled"}), "assistant\n<think>\n\n</think>\n\n"),
        (json!({"type": "adaptive"}), "assistant\n<think>\n"),
        (json!({"type": "enabled", "budget_tokens": 2000}), "assistant\n<think>\n"),
    ] {
        let (status, answer) = ask(&server, PATH, hello(&json!({"thinking": thinking}))).await;
        assert_eq!(status, 200, "{answer}");
        assert!(prompt_text(&engine).ends_with(end));
        let is_bounded = thinking["type"] == "enabled";
        engine.last(|request| assert_eq!(request.constraint.is_some(), is_bounded));
    }
    for (choice, is_constrained) in [
        (json!({"type": "auto"}), false),
        (json!({"type": "none"}), false),
        (json!({"type": "any"}), true),
        (json!({"type": "tool", "name": "get_weather", "disable_parallel_tool_use": true}), true),
    ] {
        let (status, answer) =
            ask(&server, PATH, hello(&json!({"tools": weather(), "tool_choice": choice}))).await;
        assert_eq!(status, 200, "{answer}");
        engine.last(|request| assert_eq!(request.constraint.is_some(), is_constrained, "{choice}"));
    }
    let format = json!({"type": "json_schema", "schema": {"type": "object"}});
    assert_eq!(ask(&server, PATH, hello(&json!({"output_config": {"format": format}}))).await.0, 200);
    engine.last(|request| assert!(request.constraint.is_some()));
}

#[tokio::test]
async fn what_is_wrong_is_named_in_anthropics_form() {
    let server = caller(&says("x"));
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    for (extra, rule) in [
        (json!({"max_tokens": null}), "max_tokens is missing"),
        (json!({"max_tokens": "a"}), "max_tokens must be an integer"),
        (json!({"messages": null}), "messages is missing"),
        (json!({"messages": [{"role": "system", "content": "x"}]}), "messages[0] must have the role"),
        (user(json!(7)), "messages[0].content must be a string or a list of blocks, not a number"),
        (user(json!([{"type": "document"}])), "messages[0].content[0] has the type \"document\""),
        (
            user(json!([{"type": "image", "source": {"type": "file"}}])),
            "messages[0].content[0].source must have",
        ),
        (user(json!([{"type": "text"}])), "messages[0].content[0] must have a string text"),
        (json!({"tools": [{"type": "web_search_20250305", "name": "w"}]}), "tools[0] has the type"),
        (json!({"tools": [{"name": "f"}]}), "tools[0] must have an input_schema"),
        (json!({"tool_choice": {"type": "tool", "name": "g"}}), "not among the tools"),
        (json!({"stop_sequences": "x"}), "stop_sequences must be a list"),
        (json!({"stop_sequences": [""]}), "stop_sequences"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 5}}), "this model does not think"),
        (json!({"thinking": {"type": "enabled"}}), "must have budget_tokens"),
        (json!({"output_config": {"effort": "low"}}), "output_config is \"low\"; this model does not think"),
        (json!({"mcp_servers": [{}]}), "mcp_servers is not supported"),
        (json!({"temperature": 9}), "temperature"),
    ] {
        let (status, error) = ask(&server, PATH, hello(&extra)).await;
        assert_eq!(
            (status, &error["type"], &error["error"]["type"]),
            (400, &json!("error"), &json!("invalid_request_error")),
            "{extra}"
        );
        assert!(error["error"]["message"].as_str().unwrap().contains(rule), "{error} / {rule}");
        assert!(error["request_id"].is_string());
    }
    let (status, error) = ask(&server, PATH, hello(&json!({"model": "claude"}))).await;
    assert_eq!((status, &error["error"]["type"]), (404, &json!("not_found_error")));
    let small = server_with(&says("x"), &[], 20);
    let (status, error) = ask(&small, PATH, hello(&json!({}))).await;
    assert_eq!((status, &error["error"]["type"]), (413, &json!("request_too_large")));
}

#[tokio::test]
async fn failures_of_the_engine_have_the_form_too() {
    let full = Fake::new(Script::Refuse(SubmitError::QueueFull { num_waiting: 9, limit: 9 }));
    let response = send(&server(&full), post(PATH, &hello(&json!({"max_tokens": 9})))).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["retry-after"]),
        (503, &"1".parse().unwrap())
    );
    assert_eq!(response.headers()["request-id"], response.headers()["x-request-id"]);
    let failing =
        roomy(Script::Tokens([ids("ab"), vec![EOS]].concat(), FinishReason::EngineFailed("lost".into())));
    let got = events(&caller(&failing), PATH, hello(&json!({"stream": true}))).await;
    let last = got.last().unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")));
}
