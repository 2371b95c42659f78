//! Completions: shapes, prompts of all kinds, stop strings, log-probabilities, echo.

use serde_json::{Value, json};
use spark_api::FinishReason;

use crate::fake::{EOS, Fake, Script};
use crate::{chunks, complete, ids, server};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn an_answer_has_the_documented_shape() {
    let engine = Fake::says("ok");
    let body = json!({"model": "tiny", "prompt": "Say", "request_id": "r"});
    let (status, mut answer) = complete(&server(&engine), body).await;
    assert_eq!(status, 200);
    answer["created"].take();
    answer["system_fingerprint"].take();
    assert_eq!(answer.as_object_mut().unwrap().remove("timings").unwrap()["predicted_n"], 3);
    let expected = json!({
        "id": "cmpl-r",
        "object": "text_completion",
        "created": null,
        "model": "tiny",
        "system_fingerprint": null,
        "choices": [{"index": 0, "text": "ok", "logprobs": null, "finish_reason": "stop", "stop_reason": null,
            "prompt_logprobs": null, "token_ids": null, "prompt_token_ids": null}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    });
    assert_eq!(answer, expected);
    engine
        .last(|request| assert_eq!((request.prompt.clone(), request.sampling.max_tokens), (ids("Say"), 16)));
}

#[tokio::test]
async fn prompts_come_as_text_or_ids_one_or_many() {
    for (prompt, num_prompts) in
        [(json!("ab"), 1), (json!(["ab", "c"]), 2), (json!([65, 66]), 1), (json!([[65], [66, 67], [68]]), 3)]
    {
        let engine = Fake::says("x");
        let (status, answer) = complete(&server(&engine), json!({"prompt": prompt, "n": 2})).await;
        assert_eq!(status, 200, "{prompt}");
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!((choices.len(), engine.num_requests()), (2 * num_prompts, 2 * num_prompts));
        assert!(choices.iter().enumerate().all(|(i, choice)| choice["index"] == i && choice["text"] == "x"));
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 4 * num_prompts);
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_text_and_the_sequence() {
    let engine = Fake::new(Script::Hang(ids("one</end>two")));
    let server = server(&engine);
    let (_, answer) = complete(&server, json!({"prompt": "x", "max_tokens": 99, "stop": ["</end>"]})).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("one"), &json!("stop")));
    assert_eq!(choice["stop_reason"], "</end>");
    assert_eq!(answer["usage"]["completion_tokens"], 9);
    assert!(engine.hanging.lock().unwrap()[0].is_closed(), "the sequence is cancelled");

    let included =
        json!({"prompt": "x", "max_tokens": 99, "stop": "</end>", "include_stop_str_in_output": true});
    assert_eq!(complete(&server, included).await.1["choices"][0]["text"], "one</end>");
    let later = json!({"prompt": "x", "max_tokens": 12, "stop": "o", "min_tokens": 1});
    assert_eq!(complete(&server, later).await.1["choices"][0]["text"], "one</end>tw");
}

#[tokio::test]
async fn stop_tokens_and_length_are_told_apart() {
    let tokens = ids("abZ");
    let engine = Fake::new(Script::Tokens(tokens.clone(), FinishReason::StopToken(tokens[2])));
    let server = server(&engine);
    let body = json!({"prompt": "x", "stop_token_ids": [tokens[2]]});
    let choice = complete(&server, body.clone()).await.1["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["stop_reason"]), (&json!("ab"), &json!(tokens[2])));
    let mut shown = body;
    shown["include_stop_str_in_output"] = json!(true);
    assert_eq!(complete(&server, shown).await.1["choices"][0]["text"], "abZ");
    let choice = complete(&server, json!({"prompt": "x", "max_tokens": 2})).await.1["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("ab"), &json!("length")));
}

#[tokio::test]
async fn special_tokens_are_skipped_unless_wanted() {
    let engine = Fake::new(Script::Tokens(ids("a<|im_start|>b"), FinishReason::Length));
    let server = server(&engine);
    assert_eq!(complete(&server, json!({"prompt": "x"})).await.1["choices"][0]["text"], "ab");
    let (_, answer) = complete(&server, json!({"prompt": "x", "skip_special_tokens": false})).await;
    assert_eq!(answer["choices"][0]["text"], "a<|im_start|>b");
}

#[tokio::test]
async fn logprobs_are_four_lists_with_the_token_itself_among_the_best() {
    let engine = Fake::says("aé");
    let server = server(&engine);
    let (_, answer) = complete(&server, json!({"prompt": "x", "logprobs": 2})).await;
    let got = &answer["choices"][0]["logprobs"];
    assert_eq!(got["tokens"], json!(["a", "\u{fffd}", "\u{fffd}", "<|im_end|>"]));
    assert_eq!(got["token_logprobs"], json!([-0.5, -0.5, -0.5, -0.5]));
    assert_eq!(got["text_offset"], json!([0, 1, 2, 3]));
    assert_eq!(got["top_logprobs"][0], json!({"a": -0.5, "b": -1.5}));

    let (_, answer) = complete(&server, json!({"prompt": "x", "logprobs": 0})).await;
    assert_eq!(answer["choices"][0]["logprobs"]["top_logprobs"][0], json!({"a": -0.5}));

    let named = json!({"prompt": "x", "logprobs": 1, "return_tokens_as_token_ids": true});
    let got = complete(&server, named).await.1["choices"][0]["logprobs"].clone();
    let a = format!("token_id:{}", ids("a")[0]);
    assert_eq!((&got["tokens"][0], &got["tokens"][3]), (&json!(a), &json!(format!("token_id:{EOS}"))));
    assert_eq!(got["top_logprobs"][0], json!({a: -0.5}));
}

#[tokio::test]
async fn a_stream_joins_to_the_whole_answer() {
    let engine = Fake::says("aéb");
    let server = server(&engine);
    let body = json!({"prompt": "x", "logprobs": 1, "return_token_ids": true, "n": 2, "echo": true});
    let (_, whole) = complete(&server, body.clone()).await;
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let got = chunks(&server, PATH, streamed).await;
    assert!(got.iter().all(|chunk| chunk["object"] == "text_completion"));
    for index in 0..2 {
        let parts: Vec<&Value> =
            got.iter().map(|chunk| &chunk["choices"][0]).filter(|c| c["index"] == index).collect();
        let whole = &whole["choices"][index];
        let text: String = parts.iter().map(|part| part["text"].as_str().unwrap()).collect();
        assert_eq!(json!(text), whole["text"]);
        assert_eq!(parts[0]["prompt_token_ids"], whole["prompt_token_ids"]);
        assert_eq!(parts.last().unwrap()["finish_reason"], "stop");
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let joined: Vec<_> = parts
                .iter()
                .flat_map(|part| part["logprobs"][list].as_array().cloned().unwrap_or_default())
                .collect();
            assert_eq!(json!(joined), whole["logprobs"][list], "{list}");
        }
    }
}

#[tokio::test]
async fn an_echo_shows_the_prompt_and_its_logprobs() {
    let engine = Fake::says("z");
    let server = server(&engine);
    let (_, answer) =
        complete(&server, json!({"prompt": "pq", "echo": true, "logprobs": 1, "max_tokens": 0})).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("pq"), &json!("length")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["p", "q"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(choice["logprobs"]["top_logprobs"], json!([null, {"q": -0.5}]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);

    let (_, answer) = complete(&server, json!({"prompt": ids("pq"), "echo": true})).await;
    assert_eq!(answer["choices"][0]["text"], "pqz");
}

#[tokio::test]
async fn half_a_character_at_the_end_becomes_a_replacement() {
    let engine = Fake::new(Script::Tokens(ids("é")[..1].to_vec(), FinishReason::Length));
    let (_, answer) = complete(&server(&engine), json!({"prompt": "x"})).await;
    assert_eq!(answer["choices"][0]["text"], "\u{fffd}");
}

#[tokio::test]
async fn without_a_seed_every_choice_of_every_prompt_is_drawn_on_its_own() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let prompts = json!(["same", "same", "same"]);
    let seeds = |engine: &Fake| -> Vec<u64> {
        engine.requests.lock().unwrap().drain(..).map(|request| request.sampling.seed).collect()
    };
    assert_eq!(complete(&server, json!({"prompt": prompts, "n": 2})).await.0, 200);
    let distinct: std::collections::HashSet<u64> = seeds(&engine).into_iter().collect();
    assert_eq!(distinct.len(), 6);
    assert_eq!(complete(&server, json!({"prompt": prompts, "n": 2, "seed": 9})).await.0, 200);
    assert_eq!(seeds(&engine), [9, 10, 9, 10, 9, 10]);
}

#[tokio::test]
async fn an_echo_and_prompt_logprobs_each_show_as_many_alternatives_as_asked_for() {
    let server = server(&Fake::says("z"));
    for (echoed, prompt) in [(5, 1), (1, 5)] {
        let body = json!({"prompt": "pq", "echo": true, "logprobs": echoed, "prompt_logprobs": prompt});
        let choice = complete(&server, body).await.1["choices"][0].take();
        // Position 1 is that of "q": of the echo, and of the prompt.
        assert_eq!(choice["logprobs"]["top_logprobs"][1].as_object().unwrap().len(), echoed);
        assert_eq!(choice["prompt_logprobs"][1].as_object().unwrap().len(), prompt);
    }
}

#[tokio::test]
async fn the_engine_says_how_many_logprobs_there_may_be() {
    for limit in [3, 30] {
        let engine = Fake::with_limits(Script::Tokens(ids("a"), FinishReason::Length), |limits| {
            limits.max_logprobs = limit;
        });
        let server = server(&engine);
        for field in ["logprobs", "prompt_logprobs"] {
            assert_eq!(complete(&server, json!({"prompt": "x", field: limit})).await.0, 200, "{field}");
            let (status, answer) = complete(&server, json!({"prompt": "x", field: limit + 1})).await;
            assert_eq!((status, &answer["error"]["param"]), (400, &json!(field)));
        }
        engine.last(|request| assert_eq!(request.sampling.prompt_logprobs, Some(limit)));
        let messages = json!([{"role": "user", "content": "x"}]);
        for (count, code) in [(limit, 200), (limit + 1, 400)] {
            let body = json!({"messages": messages, "logprobs": true, "top_logprobs": count});
            assert_eq!(crate::chat(&server, body).await.0, code, "{count}");
        }
    }
}
