//! OpenAI's responses: objects, events, the store, work in the background; what bodies become as prompts.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use spark_api::FinishReason;

use crate::chat::png;
use crate::fake::{EOS, Fake, IMAGE, Script};
use crate::tools::{CALL, caller, roomy, says, thinker};
use crate::{ask, events, ids, send, server, text, tokenizer};

const PATH: &str = "/v1/responses";

fn hello(extra: &Value) -> Value {
    let mut body = json!({"model": "tiny", "input": "Hello!"});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn weather() -> Value {
    json!([{"type": "function", "name": "get_weather", "description": "Looks out.", "strict": false,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}])
}

fn prompt_text(engine: &Arc<Fake>) -> String {
    tokenizer().decode(&engine.last(|request| request.prompt.clone()), false)
}

async fn request(server: &Router, method: &str, path: &str) -> (u16, Value) {
    let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
    let response = send(server, request).await;
    (response.status().as_u16(), serde_json::from_str(&text(response).await).unwrap())
}

#[tokio::test]
async fn an_answer_has_the_documented_shape() {
    let (status, mut answer) =
        ask(&caller(&says("Hé!")), PATH, hello(&json!({"metadata": {"a": "b"}, "temperature": 0.7}))).await;
    assert_eq!(status, 200);
    assert!(answer["id"].take().as_str().unwrap().starts_with("resp_"));
    assert!(answer["created_at"].take().as_u64() <= answer["completed_at"].take().as_u64());
    assert!(answer["output"][0]["id"].take().as_str().unwrap().starts_with("msg_"));
    let expected = json!({
        "id": null,
        "object": "response",
        "created_at": null,
        "status": "completed",
        "background": false,
        "completed_at": null,
        "error": null,
        "incomplete_details": null,
        "model": "tiny",
        "output": [{"id": null, "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "Hé!", "annotations": [], "logprobs": []}]}],
        "usage": {"input_tokens": 25, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 30},
        "service_tier": "default",
        "truncation": "disabled",
        "max_tool_calls": null,
        "user": null,
        "parallel_tool_calls": true,
        "store": true,
        "metadata": {"a": "b"},
        "top_logprobs": 0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": null, "summary": null},
        "tools": [],
        "tool_choice": "auto",
        "previous_response_id": null,
        "instructions": null,
        "temperature": 0.7,
        "top_p": 1.0,
        "max_output_tokens": null,
    });
    assert_eq!(answer, expected);
}

#[tokio::test]
async fn a_stream_has_all_events_in_their_order() {
    let text = format!("<think>hm</think>So: {CALL}");
    let body = hello(&json!({"stream": true, "tools": weather()}));
    let got = events(&thinker(&says(&text)), PATH, body.clone()).await;
    let mut kinds: Vec<&str> = got.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(kinds, expected);
    for (i, event) in got.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
    let response = &got.last().unwrap()["response"];
    assert_eq!(
        (&got[0]["response"]["status"], &response["status"]),
        (&json!("in_progress"), &json!("completed"))
    );
    let output = response["output"].as_array().unwrap();
    assert_eq!(output[0]["content"], json!([{"type": "reasoning_text", "text": "hm"}]));
    assert_eq!(output[1]["content"][0]["text"], "So:");
    assert_eq!(
        (&output[2]["name"], &output[2]["arguments"]),
        (&json!("get_weather"), &json!("{\"city\": \"Köln\"}"))
    );
    for (kind, pointer) in [
        ("response.reasoning_text.delta", "/0/content/0/text"),
        ("response.output_text.delta", "/1/content/0/text"),
        ("response.function_call_arguments.delta", "/2/arguments"),
    ] {
        let deltas = got.iter().filter(|event| event["type"] == kind);
        let joined: String = deltas.map(|event| event["delta"].as_str().unwrap()).collect();
        assert_eq!(json!(joined), *response["output"].pointer(pointer).unwrap());
    }
    // Begun empty, ended whole; parts and deltas name their item.
    let of = |kind: &str| got.iter().filter(|event| event["type"] == kind).collect::<Vec<_>>();
    for (i, (added, done)) in
        of("response.output_item.added").iter().zip(of("response.output_item.done")).enumerate()
    {
        assert_eq!((&added["output_index"], &added["item"]["id"]), (&json!(i), &output[i]["id"]));
        assert_eq!(done["item"], output[i]);
        assert_eq!(added["item"]["status"], "in_progress");
        assert!(added["item"].get("content").is_none_or(|content| *content == json!([])));
    }
    assert_eq!(of("response.content_part.added")[1]["part"]["text"], "");
    assert_eq!(of("response.output_text.done")[0]["item_id"], output[1]["id"]);
    assert!(response["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 0);

    let mut whole = body;
    whole["stream"] = json!(false);
    let (_, answer) = ask(&thinker(&says(&text)), PATH, whole).await;
    assert_eq!(answer["output"][1]["content"], output[1]["content"]);
    assert_eq!(answer["usage"], response["usage"]);
}

#[tokio::test]
async fn an_answer_that_is_cut_is_incomplete_and_one_that_breaks_off_has_failed() {
    let (_, answer) = ask(&caller(&says("abcdef")), PATH, hello(&json!({"max_output_tokens": 2}))).await;
    assert_eq!((&answer["status"], &answer["max_output_tokens"]), (&json!("incomplete"), &json!(2)));
    assert_eq!(answer["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(answer["output"][0]["status"], "incomplete");
    let cut = hello(&json!({"max_output_tokens": 2, "stream": true}));
    let got = events(&caller(&says("abcdef")), PATH, cut).await;
    assert_eq!(got.last().unwrap()["type"], "response.incomplete");

    let failing =
        roomy(Script::Tokens([ids("ab"), vec![EOS]].concat(), FinishReason::EngineFailed("lost".into())));
    let server = caller(&failing);
    let got = events(&server, PATH, hello(&json!({"stream": true}))).await;
    let last = got.last().unwrap();
    assert_eq!(
        (&last["type"], &last["response"]["error"]["code"]),
        (&json!("response.failed"), &json!("server_error"))
    );
    assert_eq!(ask(&server, PATH, hello(&json!({}))).await.0, 500);
}

#[tokio::test]
async fn logprobs_come_with_their_text() {
    let extra = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let server = caller(&says("é!"));
    let (_, answer) = ask(&server, PATH, hello(&extra)).await;
    let logprobs = answer["output"][0]["content"][0]["logprobs"].as_array().unwrap();
    assert_eq!((logprobs.len(), logprobs[0]["top_logprobs"].as_array().unwrap().len()), (3, 2));
    let mut streamed = hello(&extra);
    streamed["stream"] = json!(true);
    let got = events(&server, PATH, streamed).await;
    let deltas = got.iter().filter(|event| event["type"] == "response.output_text.delta");
    let joined: Vec<_> = deltas.flat_map(|event| event["logprobs"].as_array().unwrap().clone()).collect();
    assert_eq!(&joined, logprobs);
}

#[tokio::test]
async fn a_conversation_of_items_becomes_the_prompt_of_the_same_chat() {
    let engine = says("x");
    let server = thinker(&engine);
    let call = json!({"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{\"city\":\"Köln\"}"});
    let body = json!({"instructions": "Be brief.", "input": [
        {"role": "developer", "content": [{"type": "input_text", "text": "No jokes."}]},
        {"role": "user", "content": "Rain?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "m", "role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]});
    let (status, count) = ask(&server, "/v1/responses/input_tokens", body.clone()).await;
    assert_eq!(status, 200, "{count}");
    assert_eq!(ask(&server, PATH, body).await.0, 200);
    let prompt = engine.last(|request| request.prompt.clone());
    assert_eq!(count["input_tokens"], prompt.len());
    let call = json!({"id": "c1", "function": {"name": "get_weather", "arguments": "{\"city\":\"Köln\"}"}});
    let chat = json!({"messages": [
        {"role": "system", "content": "Be brief.\n\nNo jokes."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "reasoning": "hm", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]});
    assert_eq!(crate::chat(&server, chat).await.0, 200);
    assert_eq!(tokenizer().decode(&prompt, false), prompt_text(&engine));
}

#[tokio::test]
async fn images_and_forms_of_the_answer_reach_the_engine() {
    let engine = Fake::says("a cat");
    let image = json!({"type": "input_image", "image_url": png(64, 96), "detail": "auto"});
    let content = json!([image, {"type": "input_text", "text": "What?"}]);
    let (status, _) =
        ask(&server(&engine), PATH, json!({"input": [{"role": "user", "content": content}]})).await;
    assert_eq!(status, 200);
    engine.last(|request| assert_eq!(request.prompt.iter().filter(|id| **id == IMAGE).count(), 6));

    let engine = says("{}");
    let schema = json!({"type": "object", "properties": {}, "additionalProperties": false});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true});
    for (extra, is_constrained) in [
        (json!({"text": {"format": format}}), true),
        (json!({"text": {"format": {"type": "json_object"}}}), true),
        (json!({"text": {"format": {"type": "text"}}}), false),
        (json!({"tools": weather(), "tool_choice": "required"}), true),
        (json!({"tools": weather(), "tool_choice": {"type": "function", "name": "get_weather"}}), true),
        (json!({"tools": weather()}), false),
    ] {
        let (status, answer) = ask(&caller(&engine), PATH, hello(&extra)).await;
        assert_eq!(status, 200, "{answer}");
        engine.last(|request| assert_eq!(request.constraint.is_some(), is_constrained, "{extra}"));
        for (name, value) in extra.as_object().unwrap().iter().filter(|(name, _)| *name != "text") {
            assert_eq!(answer[name], *value);
        }
    }
}

#[tokio::test]
async fn reasoning_efforts_switch_the_thoughts() {
    let engine = says("x");
    for (effort, end) in [("none", "<think>\n\n</think>\n\n"), ("low", "<think>\n")] {
        let (status, answer) =
            ask(&thinker(&engine), PATH, hello(&json!({"reasoning": {"effort": effort}}))).await;
        assert_eq!((status, &answer["reasoning"]["effort"]), (200, &json!(effort)));
        assert!(prompt_text(&engine).ends_with(end));
    }
}

#[tokio::test]
async fn a_response_goes_on_from_the_one_before() {
    let engine = says("I am fine.");
    let server = caller(&engine);
    let (_, first) = ask(&server, PATH, hello(&json!({"instructions": "Be brief."}))).await;
    let id = first["id"].as_str().unwrap();
    assert_eq!(request(&server, "GET", &format!("{PATH}/{id}")).await, (200, first.clone()));
    for (query, status) in [("stream=false", 200), ("stream=true", 400), ("include[]=x", 400)] {
        assert_eq!(request(&server, "GET", &format!("{PATH}/{id}?{query}")).await.0, status, "{query}");
    }
    let (status, second) = ask(&server, PATH, json!({"input": "And you?", "previous_response_id": id})).await;
    assert_eq!((status, &second["previous_response_id"]), (200, &json!(id)));
    let turns = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nI am fine.<|im_end|>\n<|im_start|>user\nAnd \
        you?<|im_end|>\n<|im_start|>assistant\n";
    // Instructions are those of each request.
    assert_eq!(prompt_text(&engine), turns);

    let (status, answer) = request(&server, "DELETE", &format!("{PATH}/{id}")).await;
    assert_eq!((status, &answer["deleted"]), (200, &json!(true)));
    assert_eq!(request(&server, "GET", &format!("{PATH}/{id}")).await.0, 404);
    let (status, error) = ask(&server, PATH, json!({"input": "x", "previous_response_id": id})).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("previous_response_id")));
    let (_, hidden) = ask(&server, PATH, hello(&json!({"store": false}))).await;
    assert_eq!(request(&server, "GET", &format!("{PATH}/{}", hidden["id"].as_str().unwrap())).await.0, 404);
}

#[tokio::test]
async fn the_store_forgets_the_oldest() {
    let engine = says("x");
    let front_end = crate::front_end(&engine, |options| options.max_response_bytes = 8 << 10);
    let mut ids = Vec::new();
    for _ in 0..8 {
        let answer =
            front_end.response(json!({"input": "Hello!"})).await.unwrap().into_response().await.unwrap();
        ids.push(answer["id"].as_str().unwrap().to_owned());
    }
    assert!(front_end.stored_response(&ids[0]).is_err());
    assert!(front_end.stored_response(&ids[7]).is_ok());
}

#[tokio::test]
async fn work_in_the_background_can_be_asked_for_and_cancelled() {
    let hanging = roomy(Script::Hang(ids("ab")));
    let server = caller(&hanging);
    let (status, started) = ask(&server, PATH, hello(&json!({"background": true}))).await;
    assert_eq!((status, &started["status"], &started["background"]), (200, &json!("queued"), &json!(true)));
    let path = format!("{PATH}/{}", started["id"].as_str().unwrap());
    let mut now = started.clone();
    while now["status"] == "queued" {
        tokio::task::yield_now().await;
        now = request(&server, "GET", &path).await.1;
    }
    assert_eq!(now["status"], "in_progress");
    now["status"] = json!("queued");
    assert_eq!(now, started, "nothing else has changed");
    let next = json!({"input": "x", "previous_response_id": started["id"]});
    assert_eq!(ask(&server, PATH, next).await.0, 400);
    let (status, cancelled) = request(&server, "POST", &format!("{path}/cancel")).await;
    assert_eq!((status, &cancelled["status"]), (200, &json!("cancelled")));
    assert_eq!(request(&server, "GET", &path).await, (200, cancelled));
    while !hanging.hanging.lock().unwrap()[0].is_closed() {
        tokio::task::yield_now().await;
    }

    let server = caller(&says("done"));
    let (_, started) = ask(&server, PATH, hello(&json!({"background": true}))).await;
    let path = format!("{PATH}/{}", started["id"].as_str().unwrap());
    let mut now = started;
    while now["status"] == "queued" || now["status"] == "in_progress" {
        tokio::task::yield_now().await;
        now = request(&server, "GET", &path).await.1;
    }
    assert_eq!(
        (&now["status"], &now["output"][0]["content"][0]["text"]),
        (&json!("completed"), &json!("done"))
    );

    let (_, plain) = ask(&server, PATH, hello(&json!({}))).await;
    let path = format!("{PATH}/{}/cancel", plain["id"].as_str().unwrap());
    assert_eq!(request(&server, "POST", &path).await.0, 400);
    assert_eq!(request(&server, "POST", "/v1/responses/resp_none/cancel").await.0, 404);
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let server = caller(&says("x"));
    for (extra, param, rule) in [
        (json!({"input": null}), "input", "input is missing"),
        (json!({"input": 7}), "input", "a string or a list of items"),
        (json!({"input": []}), "input", "at least one item"),
        (json!({"input": [{"type": "web_search_call"}]}), "input", "input[0] has the type"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}),
            "input",
            "input[0].content[0] has",
        ),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}),
            "input",
            "file_id",
        ),
        (
            json!({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]}),
            "input",
            "is not JSON",
        ),
        (json!({"max_output_tokens": 0}), "max_output_tokens", "between 1"),
        (json!({"tools": [{"type": "web_search"}]}), "tools", "only \"function\""),
        (json!({"tool_choice": "required"}), "tool_choice", "no tools"),
        (json!({"include": ["file_search_call.results"]}), "include", "not supported"),
        (json!({"text": {"format": {"type": "xml"}}}), "text", "text.format must have the type"),
        (json!({"text": {"verbosity": "low"}}), "text", "verbosity"),
        (json!({"text": {"format": {"type": "json_schema", "name": "n"}}}), "text", "schema is missing"),
        (json!({"reasoning": {"effort": "low"}}), "reasoning", "does not think"),
        (json!({"reasoning": {"summary": "detailed"}}), "reasoning", "summary"),
        (json!({"background": true, "store": false}), "background", "store"),
        (json!({"truncation": "auto"}), "truncation", "not supported"),
        (json!({"conversation": "c"}), "conversation", "not supported"),
        (json!({"metadata": {"a": 1}}), "metadata", "strings"),
        (json!({"previous_response_id": "resp_x"}), "previous_response_id", "stored"),
        (json!({"temperature": 9}), "temperature", "temperature"),
    ] {
        let (status, error) = ask(&server, PATH, hello(&extra)).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!(param)), "{extra} {error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(rule), "{error} / {rule}");
    }
}

/// How the tokens come changes nothing: the object at the end of a stream is the whole answer's.
#[tokio::test]
async fn a_stream_ends_with_the_whole_answer() {
    let pieces =
        ["<think>hm", "</think>", "So", CALL, "\n<tool_call>\n{\"name\": \"f\"", "é</think>", "<tool_call>"];
    for (i, first) in pieces.iter().enumerate() {
        for second in &pieces[i..] {
            let text = format!("{first}{second}");
            let body = |stream: bool| hello(&json!({"tools": weather(), "stream": stream}));
            let (_, whole) = ask(&thinker(&says(&text)), PATH, body(false)).await;
            let last = events(&thinker(&says(&text)), PATH, body(true)).await.pop().unwrap();
            let told = |response: &Value| {
                let items = response["output"].as_array().unwrap().iter();
                items
                    .map(|item| json!([item["type"], item["content"], item["name"], item["arguments"]]))
                    .collect::<Vec<_>>()
            };
            assert_eq!(told(&last["response"]), told(&whole), "{text}");
            assert_eq!(last["response"]["usage"], whole["usage"], "{text}");
        }
    }
}
