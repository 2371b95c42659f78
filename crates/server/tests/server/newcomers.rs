//! What clients of llama-server and vLLM find here beyond OpenAI's API: timings, their names of fields and routes, cut prompts.

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use spark_api::FinishReason;
use spark_server::{ApiKeys, HttpState, Options, router};

use crate::fake::{Fake, MAX_MODEL_LEN, Script};
use crate::{ask, chat, chunks, complete, front_end, ids, send, server, text};

const CHAT: &str = "/v1/chat/completions";

/// A chat with more fields.
fn hello(extra: Value) -> Value {
    let mut body = extra;
    body["messages"] = json!([{"role": "user", "content": "Hello!"}]);
    body
}

/// A server whose operator has changed options.
fn server_of(change: impl FnOnce(&mut Options)) -> Router {
    let front_end = front_end(&Fake::says("abc"), change);
    router(HttpState { front_end, api_keys: ApiKeys::default(), max_body_bytes: 1 << 20 })
}

async fn get(server: &Router, path: &str) -> (u16, Value) {
    let response = send(server, Request::get(path).body(Body::empty()).unwrap()).await;
    (response.status().as_u16(), serde_json::from_str(&text(response).await).unwrap())
}

#[tokio::test]
async fn an_answer_of_one_choice_says_what_it_took() {
    let server = server(&Fake::says("abc"));
    let (_, answer) = chat(&server, hello(json!({}))).await;
    let timings = &answer["timings"];
    // The engine's script: 4 tokens of the prompt were cached, and computing the others took 2 ms.
    assert_eq!((&timings["cache_n"], &timings["prompt_n"]), (&json!(4), &json!(21)));
    assert_eq!((&timings["prompt_ms"], &timings["predicted_n"]), (&json!(2.0), &json!(4)));
    assert!(timings["predicted_ms"].as_f64().unwrap() >= 0.0);
    assert!(answer.get("metrics").is_none(), "only where the operator says so");

    let (_, answer) = complete(&server, json!({"prompt": "Say", "stop": "b"})).await;
    assert_eq!(answer["timings"]["predicted_n"], 2, "also when a stop string ends it");
    let (_, several) = chat(&server, hello(json!({"n": 2}))).await;
    assert!(several.get("timings").is_none());
}

#[tokio::test]
async fn streamed_timings_come_last_or_with_every_token() {
    let server = server(&Fake::says("abc"));
    let counts = async |extra: Value| {
        let mut body = hello(extra);
        body["stream"] = json!(true);
        let got = chunks(&server, CHAT, body).await;
        got.iter().map(|chunk| chunk["timings"]["predicted_n"].clone()).collect::<Vec<_>>()
    };
    let with_usage = json!({"include_usage": true});
    // The role, three characters, the end token with the end, and the usage.
    assert_eq!(counts(json!({})).await, json!([null, null, null, null, 4]).as_array().unwrap()[..]);
    let last = counts(json!({"stream_options": with_usage})).await;
    assert_eq!(last, json!([null, null, null, null, null, 4]).as_array().unwrap()[..]);
    let all = counts(json!({"stream_options": with_usage, "timings_per_token": true})).await;
    assert_eq!(all, json!([null, 1, 2, 3, 4, 4]).as_array().unwrap()[..]);
}

#[tokio::test]
async fn an_operator_can_have_metrics_and_usage_in_every_answer() {
    let server = server_of(|options| {
        (options.per_request_metrics, options.force_include_usage) = (true, true);
    });
    let (_, answer) = chat(&server, hello(json!({}))).await;
    assert_eq!(
        (&answer["metrics"]["time_to_first_token_ms"], &answer["metrics"]["queue_time_ms"]),
        (&json!(2.0), &json!(1.0))
    );
    let got = chunks(&server, CHAT, hello(json!({"stream": true}))).await;
    assert!(got.iter().all(|chunk| chunk["usage"]["prompt_tokens"] == 25));
    let (last, others) = got.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert!(last["metrics"]["tokens_per_second"].is_number());
    assert!(others.iter().all(|chunk| chunk.get("metrics").is_none()));
}

#[tokio::test]
async fn a_long_prompt_is_cut_where_that_is_asked_for() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let prompt = ids("abcdefgh");
    for (extra, kept) in [
        (json!({"truncate_prompt_tokens": 3}), "fgh"),
        (json!({"truncate_prompt_tokens": 3, "truncation_side": "right"}), "abc"),
        (json!({"truncate_prompt_tokens": 8}), "abcdefgh"),
        (json!({"truncation_side": "right"}), "abcdefgh"),
    ] {
        for prompt in [json!("abcdefgh"), json!(prompt)] {
            let mut body = extra.clone();
            (body["prompt"], body["echo"]) = (prompt, json!(true));
            let (status, answer) = complete(&server, body).await;
            assert_eq!((status, &answer["choices"][0]["text"]), (200, &json!(format!("{kept}x"))), "{extra}");
            engine.last(|request| assert_eq!(request.prompt, ids(kept), "{extra}"));
        }
    }
    // More text than can be tokenised at all; -1 leaves room for a token.
    let long = "0123456789".repeat(100_000) + "end";
    let (status, _) = complete(&server, json!({"prompt": long, "truncate_prompt_tokens": -1})).await;
    assert_eq!(status, 200);
    engine.last(|request| {
        assert_eq!(request.prompt.len(), MAX_MODEL_LEN - 1);
        assert!(request.prompt.ends_with(&ids("9end")));
    });
    let (_, tokens) =
        ask(&server, "/tokenize", json!({"prompt": "abcdef", "truncate_prompt_tokens": 2})).await;
    assert_eq!(tokens["tokens"], json!(ids("ef")));
    assert_eq!(chat(&server, hello(json!({"truncate_prompt_tokens": 10}))).await.0, 200);
    engine
        .last(|request| assert!(request.prompt.len() == 10 && request.prompt.ends_with(&ids("assistant\n"))));
}

#[tokio::test]
async fn a_cut_that_makes_no_sense_is_refused_by_name() {
    let server = server(&Fake::says("x"));
    for (extra, param) in [
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
        (json!({"truncate_prompt_tokens": -2}), "truncate_prompt_tokens"),
        (json!({"truncate_prompt_tokens": MAX_MODEL_LEN + 1}), "truncate_prompt_tokens"),
        (json!({"truncate_prompt_tokens": 5, "truncation_side": "up"}), "truncation_side"),
        (json!({"truncate_prompt_tokens": 5, "truncation_side": "right"}), "truncation_side"),
    ] {
        let (status, error) = chat(&server, hello(extra.clone())).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!(param)), "{extra}");
    }
}

#[tokio::test]
async fn names_of_llama_server_mean_what_they_mean_there() {
    let engine = Fake::says("x");
    let server = server(&engine);
    for (n_predict, max_tokens) in [(json!(3), 3), (json!(-1), 16), (Value::Null, 16)] {
        let body = json!({"prompt": "Say", "n_predict": n_predict, "cache_prompt": true, "id_slot": 0});
        assert_eq!(complete(&server, body).await.0, 200);
        engine.last(|request| assert_eq!(request.sampling.max_tokens, max_tokens));
    }
    let (_, answer) = complete(&server, json!({"prompt": "Say", "n_predict": 3, "max_tokens": 2})).await;
    assert_eq!(answer["object"], "text_completion");
    engine.last(|request| assert_eq!(request.sampling.max_tokens, 2));
    for body in [json!({"repeat_penalty": 1.1}), json!({"n_probs": 5}), json!({"reasoning_format": "none"})] {
        let name = body.as_object().unwrap().keys().next().unwrap().clone();
        let (status, error) = chat(&server, hello(body)).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!(name)));
    }
}

#[tokio::test]
async fn routes_are_found_without_their_version() {
    let server = server(&Fake::says("x"));
    let (status, answer) = ask(&server, "/chat/completions", hello(json!({}))).await;
    assert_eq!((status, &answer["object"]), (200, &json!("chat.completion")));
    assert_eq!(get(&server, "/models").await, get(&server, "/v1/models").await);
    for path in ["/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"] {
        assert_eq!(ask(&server, path, hello(json!({}))).await, (200, json!({"input_tokens": 25})));
    }
    let (status, counted) = ask(&server, "/responses/input_tokens", json!({"input": "Hello!"})).await;
    assert_eq!((status, &counted["input_tokens"]), (200, &json!(25)));
    // Without a version it is llama-server's own dialect, as there.
    assert_eq!(ask(&server, "/completions", json!({"prompt": "x"})).await.1["content"], "x");
}

#[tokio::test]
async fn prompts_are_shown_in_the_words_of_llama_server() {
    let server = server(&Fake::says("x"));
    let (_, answer) = ask(&server, "/tokenize", json!({"content": "h\u{e9}", "with_pieces": true})).await;
    let pieces =
        json!([{"id": ids("h")[0], "piece": "h"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]);
    assert_eq!(answer["tokens"].as_array().unwrap().len(), 3);
    assert_eq!(answer["tokens"][0], pieces[0]);
    assert!(
        answer["tokens"][1]["piece"] == pieces[1]["piece"]
            && answer["tokens"][2]["piece"] == pieces[2]["piece"]
    );
    let (status, answer) = ask(&server, "/apply-template", hello(json!({}))).await;
    let expected = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!((status, &answer["prompt"]), (200, &json!(expected)));
    let (status, error) = ask(&server, "/apply-template", json!({"prompt": "x"})).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("messages")));
}

#[tokio::test]
async fn what_is_served_is_told_and_the_template_only_where_the_operator_says_so() {
    let closed = server(&Fake::says("x"));
    let (status, props) = get(&closed, "/props").await;
    assert_eq!(
        (status, &props["model_alias"], &props["eos_token"]),
        (200, &json!("tiny"), &json!("<|im_end|>"))
    );
    assert_eq!(props["default_generation_settings"]["n_ctx"], MAX_MODEL_LEN);
    assert_eq!(props["modalities"], json!({"vision": true, "video": false, "audio": false}));
    assert!(props.get("chat_template").is_none());
    assert_eq!(get(&closed, "/tokenizer_info").await.0, 404);

    let open = server_of(|options| options.tokenizer_info = true);
    let (status, info) = get(&open, "/tokenizer_info").await;
    assert_eq!((status, &info["tokenizer_class"]), (200, &json!("Qwen2Tokenizer")));
    assert_eq!(info["added_tokens_decoder"]["258"], "<|im_end|>");
    assert!(info["chat_template"].as_str().unwrap().contains("<|im_start|>"));
    assert_eq!(get(&open, "/props").await.1["chat_template"], info["chat_template"]);
}

#[tokio::test]
async fn all_alternatives_of_a_token_are_those_of_the_vocabulary() {
    let asked = json!({"prompt": "x", "max_tokens": 1, "logprobs": -1});
    let wide = Fake::with_limits(Script::Tokens(ids("a"), FinishReason::Length), |limits| {
        limits.max_logprobs = 1000
    });
    let (status, _) = complete(&server(&wide), asked.clone()).await;
    assert_eq!(status, 200);
    wide.last(|request| assert_eq!(request.sampling.logprobs, Some(282)));
    let (status, error) = complete(&server(&Fake::says("x")), asked).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("logprobs")));
    assert!(error["error"]["message"].as_str().unwrap().contains("between 0 and 20"));
}
