//! llama-server's own completions: what goes in by its names, what comes out in its shapes, what is refused by name.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, header};
use serde_json::{Value, json};
use spark_api::FinishReason;
use spark_server::{ApiKeys, HttpState, Options, router};

use crate::chat::png;
use crate::fake::{EOS, Fake, IMAGE, MAX_MODEL_LEN, Script};
use crate::{ask, front_end, ids, post, send, server, server_with, text};

const PATH: &str = "/completion";
/// Ids of `a` and `b` in the fixture tokenizer.
const A: u32 = 64;
const B: u32 = 65;

async fn complete(server: &Router, body: Value) -> (u16, Value) {
    ask(server, PATH, body).await
}

/// A body that asks for `extra` after the prompt `Say`.
fn say(extra: Value) -> Value {
    let mut body = extra;
    body["prompt"] = json!("Say");
    body
}

/// The events of a stream, the last of which says that it is.
async fn chunks(server: &Router, body: Value) -> Vec<Value> {
    let response = send(server, post(PATH, &body)).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
    let text = text(response).await;
    let events = text.split("\n\n").filter(|event| !event.is_empty());
    events.map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
}

fn server_of(engine: &std::sync::Arc<Fake>, change: impl FnOnce(&mut Options)) -> Router {
    let front_end = front_end(engine, change);
    router(HttpState { front_end, api_keys: ApiKeys::default(), max_body_bytes: 1 << 20 })
}

#[tokio::test]
async fn an_answer_has_the_documented_shape() {
    let engine = Fake::says("a\nb");
    let (status, mut answer) = complete(&server(&engine), say(json!({"seed": 7, "temperature": 0.7}))).await;
    assert_eq!(status, 200);
    let fields = answer.as_object_mut().unwrap();
    let timings = fields.remove("timings").unwrap();
    assert_eq!((&timings["predicted_n"], &timings["cache_n"]), (&json!(4), &json!(4)));
    let settings = fields.remove("generation_settings").unwrap();
    assert_eq!((&settings["seed"], &settings["temperature"]), (&json!(7), &json!(0.7)));
    assert_eq!((&settings["n_predict"], &settings["adaptive_target"]), (&json!(-1), &json!(-1.0)));
    let expected = json!({
        "index": 0,
        "content": "a\nb",
        "tokens": [],
        "id_slot": -1,
        "stop": true,
        "model": "tiny",
        "tokens_predicted": 4,
        "tokens_evaluated": 3,
        "prompt": "Say",
        "has_new_line": true,
        "truncated": false,
        "stop_type": "eos",
        "stopping_word": "",
        "tokens_cached": 4,
    });
    assert_eq!(answer, expected);
    // Without a word about it the answer may go on to the end of the context.
    engine.last(|request| assert_eq!(request.sampling.max_tokens, MAX_MODEL_LEN - 3));
}

#[tokio::test]
async fn both_paths_are_this_dialect_and_need_the_key() {
    let server = server_with(&Fake::says("x"), &["secret"], 1 << 20);
    for path in [PATH, "/completions"] {
        assert_eq!(ask(&server, path, say(json!({}))).await.0, 401);
        let mut request = post(path, &say(json!({})));
        request.headers_mut().insert(header::AUTHORIZATION, "Bearer secret".parse().unwrap());
        request.headers_mut().insert("x-request-id", "mine".parse().unwrap());
        let response = send(&server, request).await;
        assert_eq!(response.headers()["x-request-id"], "mine");
        let answer: Value = serde_json::from_str(&text(response).await).unwrap();
        assert_eq!(answer["content"], "x", "{path}");
    }
}

#[tokio::test]
async fn a_stream_has_a_chunk_for_each_token_and_one_for_the_end() {
    let engine = Fake::says("ab");
    let got = chunks(&server(&engine), say(json!({"stream": true, "n_probs": 2}))).await;
    let [a, b, eos, last] = &got[..] else { panic!("{got:?}") };
    for (chunk, content, token) in [(a, "a", ids("a")[0]), (b, "b", ids("b")[0]), (eos, "", EOS)] {
        assert_eq!((&chunk["content"], &chunk["tokens"]), (&json!(content), &json!([token])));
        assert_eq!((&chunk["stop"], &chunk["tokens_evaluated"]), (&json!(false), &json!(3)));
        let probabilities = chunk["completion_probabilities"].as_array().unwrap();
        assert_eq!((probabilities.len(), &probabilities[0]["id"]), (1, &json!(token)));
        assert!(chunk.get("timings").is_none());
    }
    assert_eq!(b["tokens_predicted"], 2);
    assert_eq!((&last["stop"], &last["content"], &last["tokens"]), (&json!(true), &json!(""), &json!([])));
    assert_eq!((&last["stop_type"], &last["tokens_predicted"]), (&json!("eos"), &json!(3)));
    assert_eq!(last["timings"]["predicted_n"], 3);
    assert_eq!(last["generation_settings"]["stream"], true);

    let got = chunks(&server(&engine), say(json!({"stream": true, "timings_per_token": true}))).await;
    assert_eq!(got[1]["timings"]["predicted_n"], 2);
}

#[tokio::test]
async fn text_that_was_held_back_is_not_lost() {
    // "ab" might become the stop string until the answer ends.
    let engine = Fake::new(Script::Tokens(ids("xab"), FinishReason::Length));
    let body = json!({"stream": true, "stop": ["abc"], "n_predict": 3});
    let got = chunks(&server(&engine), say(body)).await;
    let content: String = got.iter().map(|chunk| chunk["content"].as_str().unwrap()).collect();
    assert_eq!((content.as_str(), got.len()), ("xab", 4));
    assert_eq!(got[3]["content"], "ab");
}

#[tokio::test]
async fn progress_comes_before_the_first_token() {
    let body =
        json!({"prompt": "x".repeat(30), "stream": true, "return_progress": true, "timings_per_token": true});
    let got = chunks(&server(&Fake::says("a")), body).await;
    let progress: Vec<_> = got.iter().filter(|chunk| chunk.get("prompt_progress").is_some()).collect();
    let processed: Vec<_> =
        progress.iter().map(|chunk| chunk["prompt_progress"]["processed"].clone()).collect();
    assert_eq!(processed, json!([4, 14, 24, 30]).as_array().unwrap()[..]);
    let first = &progress[0]["timings"];
    assert_eq!(
        (&first["prompt_n"], &first["prompt_ms"], &first["cache_n"]),
        (&json!(0), &json!(0.0), &json!(4))
    );
    assert_eq!(progress[3]["timings"]["prompt_n"], 26);
    assert!(progress[3]["timings"]["prompt_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(progress.len() + 3, got.len());
}

#[tokio::test]
async fn ends_are_told_apart() {
    let stopped = Fake::new(Script::Hang(ids("one</end>two")));
    let (_, answer) = complete(&server(&stopped), say(json!({"stop": ["</end>"]}))).await;
    assert_eq!((&answer["content"], &answer["stop_type"]), (&json!("one"), &json!("word")));
    assert_eq!(answer["stopping_word"], "</end>");
    assert!(stopped.hanging.lock().unwrap()[0].is_closed(), "the sequence is cancelled");

    let (_, cut) = complete(&server(&Fake::says("abcd")), say(json!({"n_predict": 2}))).await;
    assert_eq!(
        (&cut["content"], &cut["stop_type"], &cut["truncated"]),
        (&json!("ab"), &json!("limit"), &json!(false))
    );

    // More than there is room for ends where the context does.
    let room = MAX_MODEL_LEN - 3;
    let endless = Fake::new(Script::Tokens(ids(&"y".repeat(300)), FinishReason::Length));
    for (n_predict, truncated) in [(json!(1000), true), (json!(-1), true), (json!(room), false)] {
        let (_, full) = complete(&server(&endless), say(json!({"n_predict": n_predict}))).await;
        assert_eq!((&full["tokens_predicted"], &full["stop_type"]), (&json!(room), &json!("limit")));
        assert_eq!(full["truncated"], truncated, "{n_predict}");
        assert_eq!(full["generation_settings"]["n_predict"], n_predict);
    }
}

#[tokio::test]
async fn no_tokens_leave_the_prompt_alone() {
    let engine = Fake::says("abc");
    let (status, answer) =
        complete(&server(&engine), say(json!({"n_predict": 0, "return_tokens": true}))).await;
    assert_eq!((status, &answer["content"], &answer["tokens"]), (200, &json!(""), &json!([])));
    assert_eq!((&answer["tokens_predicted"], &answer["stop_type"]), (&json!(0), &json!("limit")));
    engine.last(|request| assert_eq!(request.sampling.max_tokens, 1));
    let got = chunks(&server(&engine), say(json!({"n_predict": 0, "stream": true}))).await;
    assert_eq!((got.len(), &got[0]["stop"]), (1, &json!(true)));
}

#[tokio::test]
async fn an_operators_limit_is_the_default_and_not_a_bound() {
    let engine = Fake::says("abc");
    let server = server_of(&engine, |options| options.sampling_defaults.max_tokens = Some(9));
    for (body, max_tokens) in
        [(json!({}), 9), (json!({"n_predict": -1}), MAX_MODEL_LEN - 3), (json!({"n_predict": 20}), 20)]
    {
        assert_eq!(complete(&server, say(body)).await.0, 200);
        engine.last(|request| assert_eq!(request.sampling.max_tokens, max_tokens));
    }
}

#[tokio::test]
async fn prompts_of_every_form_become_tokens() {
    let engine = Fake::says("x");
    let server = server(&engine);
    for (prompt, expected, shown) in [
        (json!("ab"), ids("ab"), "ab"),
        (json!([A, B]), vec![A, B], "ab"),
        (
            json!([A, "<|im_start|>", B, "c"]),
            vec![A, ids("<|im_start|>")[0], B, ids("c")[0]],
            "a<|im_start|>bc",
        ),
        (json!({"prompt_string": "ab"}), ids("ab"), "ab"),
        (json!(["ab"]), ids("ab"), "ab"),
    ] {
        let (status, answer) = complete(&server, json!({"prompt": prompt})).await;
        assert_eq!((status, &answer["prompt"]), (200, &json!(shown)), "{prompt}: {answer}");
        engine.last(|request| assert_eq!(request.prompt, expected, "{prompt}"));
    }
    let body = json!({"prompt": ["ab", [A], {"prompt_string": "c"}], "n_cmpl": 2});
    let (_, answers) = complete(&server, body).await;
    let answers = answers.as_array().unwrap();
    let shown: Vec<_> = answers.iter().map(|answer| answer["prompt"].as_str().unwrap()).collect();
    assert_eq!(shown, ["ab", "ab", "a", "a", "c", "c"]);
    assert!(answers.iter().enumerate().all(|(i, answer)| answer["index"] == i && answer["content"] == "x"));
    let (status, error) = complete(&server, json!({"prompt": vec!["a"; 9], "n_cmpl": 128})).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("n_cmpl")));
}

#[tokio::test]
async fn pictures_stand_where_their_marks_are() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let picture = png(64, 64);
    let (_, data) = picture.split_once(',').unwrap();
    let prompt =
        |text: &str, data: Value| json!({"prompt": {"prompt_string": text, "multimodal_data": data}});
    let (status, answer) = complete(&server, prompt("a <__media__> b", json!([data]))).await;
    assert_eq!((status, &answer["content"]), (200, &json!("x")), "{answer}");
    engine.last(|request| {
        let num_tokens = request.media[0].num_tokens;
        assert_eq!(request.media.len(), 1);
        let placeholders = request.prompt.iter().filter(|&&id| id == IMAGE).count();
        assert_eq!((placeholders, request.prompt[request.media[0].offset]), (num_tokens, IMAGE));
        assert!(request.prompt.starts_with(&ids("a <|vision_start|>")));
        assert!(request.prompt.ends_with(&ids("<|vision_end|> b")));
    });
    for (text, data) in [
        ("a", json!([data])),
        ("<__media__><__media__>", json!([data])),
        ("<__media__>", json!([])),
        ("<__media__>", json!(["malformed"])),
        ("<__media__>", json!(["http://127.0.0.1/x.png"])),
        ("<__media__><|image_pad|>", json!([data])),
        (&format!("<__media__>{}", "x".repeat(MAX_MODEL_LEN - 3)), json!([data])),
    ] {
        let (status, error) = complete(&server, prompt(text, data)).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!("prompt")), "{text}: {error}");
    }
    let blind = Fake::with_limits(Script::Hang(Vec::new()), |limits| limits.image_token_id = None);
    let (status, error) = complete(&crate::server(&blind), prompt("<__media__>", json!([data]))).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("prompt")));
    assert!(error["error"]["message"].as_str().unwrap().contains("does not take images"), "{error}");
}

#[tokio::test]
async fn the_images_of_all_prompts_get_their_memory_together() {
    // There is room for two, whatever is remembered: a prompt that held one while it waited could wait for one that does the same.
    let server = server_of(&Fake::says("x"), |options| {
        options.max_media_bytes = 2 << 16;
        options.mm_processor_cache_bytes = 0;
    });
    let prompts = |sizes: &[(u32, u32)]| {
        let prompt = |&(width, height): &(u32, u32)| {
            let picture = png(width, height);
            let (_, data) = picture.split_once(',').unwrap();
            json!({"prompt_string": "<__media__>", "multimodal_data": [data]})
        };
        json!({"prompt": sizes.iter().map(prompt).collect::<Vec<_>>()})
    };
    let both = futures_util::future::join(
        complete(&server, prompts(&[(64, 96), (96, 64)])),
        complete(&server, prompts(&[(64, 64), (64, 128)])),
    );
    let (one, two) = tokio::time::timeout(Duration::from_secs(30), both).await.unwrap();
    for (status, answers) in [one, two] {
        assert_eq!((status, answers.as_array().unwrap().len()), (200, 2), "{answers}");
    }
    // What would never have room together is refused.
    let (status, error) = complete(&server, prompts(&[(64, 96), (96, 64), (64, 64)])).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("prompt")), "{error}");
}

#[tokio::test]
async fn a_temperature_below_zero_is_greedy_as_there() {
    let engine = Fake::says("x");
    let server = server(&engine);
    for temperature in [json!(-1), json!(-0.5), json!(0)] {
        let (status, answer) = complete(&server, say(json!({"temperature": temperature}))).await;
        assert_eq!((status, &answer["generation_settings"]["temperature"]), (200, &json!(0.0)), "{answer}");
        engine.last(|request| assert_eq!(request.sampling.temperature, 0.0));
    }
    let (status, error) = complete(&server, say(json!({"temperature": "-1"}))).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("temperature")));
}

#[tokio::test]
async fn prompts_of_ids_are_judged_by_the_text_that_they_are() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let too_long = json!({"prompt": vec![A; MAX_MODEL_LEN], "n_predict": 0});
    let (status, error) = complete(&server, too_long).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("prompt")), "{error}");
    let (status, answer) = complete(&server, json!({"prompt": [[A, B], [B, "a"]], "n_predict": 0})).await;
    assert_eq!((status, &answer[0]["prompt"], &answer[1]["prompt"]), (200, &json!("ab"), &json!("ba")));
}

#[tokio::test]
async fn sampling_fields_reach_the_engine_by_their_names_here() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let body = json!({"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.5,
        "repeat_last_n": -1, "presence_penalty": 0.25, "frequency_penalty": 0.75, "seed": 11, "ignore_eos": true,
        "n_probs": 4, "cache_prompt": true, "priority": 3, "samplers": "edskypmxt", "mirostat": 0, "typical_p": 1.0,
        "dry_multiplier": 0, "dry_base": 1.75, "xtc_probability": 0, "dynatemp_range": 0, "id_slot": -1, "n_keep": 0,
        "post_sampling_probs": false, "lora": [], "t_max_predict_ms": 0});
    let (status, answer) = complete(&server, say(body)).await;
    assert_eq!(status, 200, "{answer}");
    engine.last(|request| {
        let sampling = &request.sampling;
        assert_eq!(
            (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p),
            (0.5, 3, 0.9, 0.1)
        );
        assert_eq!((sampling.repetition_penalty, sampling.presence_penalty), (1.5, 0.25));
        assert_eq!((sampling.frequency_penalty, sampling.seed, sampling.ignore_eos), (0.75, 11, true));
        assert_eq!((sampling.logprobs, request.priority, request.cache_salt.clone()), (Some(4), 3, None));
    });
    let settings = &answer["generation_settings"];
    assert_eq!((&settings["repeat_penalty"], &settings["n_probs"]), (&json!(1.5), &json!(4)));
    let first = &answer["completion_probabilities"][0];
    let x = ids("x")[0];
    assert_eq!((&first["id"], &first["token"], &first["bytes"]), (&json!(x), &json!("x"), &json!([120])));
    assert_eq!((first["top_logprobs"].as_array().unwrap().len(), &first["logprob"]), (4, &json!(-0.5)));
    assert_eq!(first["top_logprobs"][1]["id"], x + 1);

    // No sampler but top_k, and no penalties.
    let body =
        json!({"temperature": 0.5, "top_k": 3, "min_p": 0.1, "repeat_penalty": 1.5, "samplers": ["top_k"]});
    complete(&server, say(body)).await;
    engine.last(|request| {
        let sampling = &request.sampling;
        assert_eq!((sampling.temperature, sampling.top_k, sampling.min_p), (1.0, 3, 0.0));
        assert_eq!(sampling.repetition_penalty, 1.0);
    });
    complete(&server, say(json!({"repeat_penalty": 1.5, "repeat_last_n": 0, "n_probs": 0}))).await;
    engine.last(|request| {
        assert_eq!((request.sampling.repetition_penalty, request.sampling.logprobs), (1.0, None));
    });
}

#[tokio::test]
async fn a_seed_that_nobody_asked_for_is_shown_and_gives_the_same_again() {
    let engine = Fake::says("x");
    let server = server_of(&engine, |options| options.seed = Some(42));
    let (_, answer) = complete(&server, say(json!({}))).await;
    assert_eq!(answer["generation_settings"]["seed"], 42);
    for asked in [json!(-1), json!(4_294_967_295_u64), Value::Null] {
        let (_, drawn) = complete(&server, say(json!({"seed": asked, "n": 2}))).await;
        let seeds =
            [&drawn[0], &drawn[1]].map(|choice| choice["generation_settings"]["seed"].as_u64().unwrap());
        assert!(seeds[0] != 42 && seeds[1] == seeds[0] + 1 && seeds[0] <= u64::from(u32::MAX));
        complete(&server, say(json!({"seed": seeds[0]}))).await;
        engine.last(|request| assert_eq!(request.sampling.seed, seeds[0]));
    }
}

#[tokio::test]
async fn biases_come_as_pairs_or_objects_of_ids_or_texts() {
    let engine = Fake::says("x");
    let server = server(&engine);
    for (bias, expected) in [
        (json!([[A, 1.5], [B, false]]), vec![(A, 1.5), (B, -100.0)]),
        (json!([["ab", -2]]), vec![(A, -2.0), (B, -2.0)]),
        (json!({(A.to_string()): 1.5, "b": false}), vec![(A, 1.5), (B, -100.0)]),
        (json!([["aa", -80]]), vec![(A, -100.0)]),
        (json!([["1", 3]]), vec![(ids("1")[0], 3.0)]),
        (json!([]), vec![]),
    ] {
        let (status, answer) = complete(&server, say(json!({"logit_bias": bias}))).await;
        assert_eq!(status, 200, "{bias}: {answer}");
        engine.last(|request| {
            let mut got = request.sampling.logit_bias.clone();
            got.sort_by_key(|(id, _)| *id);
            assert_eq!(got, expected, "{bias}");
        });
    }
    for bias in [
        json!("a"),
        json!([[A]]),
        json!([[A, 1, 2]]),
        json!([A, 1]),
        json!([[A, true]]),
        json!([[A, "much"]]),
        json!([[1.5, 1]]),
        json!([[-1, 1]]),
        json!([[9999, 1]]),
        json!([[A, 101]]),
        json!([["x".repeat(70_000), 1]]),
    ] {
        let (status, error) = complete(&server, say(json!({"logit_bias": bias}))).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!("logit_bias")), "{error}");
    }
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_by_name() {
    let engine = Fake::says("x");
    let server = server(&engine);
    for body in [
        json!({"mirostat": 2}),
        json!({"typical_p": 0.9}),
        json!({"dry_multiplier": 0.8}),
        json!({"xtc_probability": 0.5}),
        json!({"dynatemp_range": 0.5}),
        json!({"top_n_sigma": 1.0}),
        json!({"adaptive_target": 0.5}),
        json!({"min_keep": 2}),
        json!({"post_sampling_probs": true}),
        json!({"id_slot": 2}),
        json!({"samplers": ["top_p", "top_k"]}),
        json!({"repeat_last_n": 64, "repeat_penalty": 1.1}),
        json!({"repeat_last_n": -2}),
        json!({"n_predict": -2}),
        json!({"n_predict": "many"}),
        json!({"max_tokens": 1.5}),
        json!({"n_probs": 21}),
        json!({"n_cmpl": 0}),
        json!({"repeat_penalty": 0}),
        json!({"grammar": "root ::= x"}),
        json!({"json_schema": 1}),
        json!({"lora": [{"id": 0, "scale": 1}]}),
        json!({"n_indent": 2}),
        json!({"t_max_predict_ms": 100}),
        json!({"response_fields": "content"}),
        json!({"response_fields": vec!["content"; 65]}),
        json!({"return_progress": true}),
        json!({"model": 1}),
        json!({"priority": "high"}),
    ] {
        let name = body.as_object().unwrap().keys().next().unwrap().clone();
        let (status, error) = complete(&server, say(body)).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!(name)), "{error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(&name), "{error}");
    }
    assert_eq!(engine.num_requests(), 0);
    for body in [json!({}), json!({"prompt": null}), json!({"prompt": ""})] {
        let (status, error) = complete(&server, body).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!("prompt")));
    }
}

#[tokio::test]
async fn only_the_fields_that_were_asked_for_are_answered() {
    let server = server(&Fake::says("ab"));
    let fields = json!(["content", "generation_settings/n_predict", "prompt", "timings/none", "odd"]);
    let (_, answer) = complete(&server, say(json!({"n_predict": 8, "response_fields": fields}))).await;
    assert_eq!(answer, json!({"content": "ab", "generation_settings/n_predict": 8, "prompt": "Say"}));
    let body = json!({"stream": true, "response_fields": ["stop_type"]});
    let got = chunks(&server, say(body)).await;
    assert_eq!((&got[0]["content"], got.last().unwrap()), (&json!("a"), &json!({"stop_type": "eos"})));
}

#[tokio::test]
async fn tokens_are_returned_where_that_is_asked_for() {
    let (_, answer) = complete(&server(&Fake::says("ab")), say(json!({"return_tokens": true}))).await;
    assert_eq!(answer["tokens"], json!([A, B, EOS]));
}

#[tokio::test]
async fn a_grammar_holds_the_answer() {
    let engine = Fake::says("x");
    let server = server(&engine);
    for body in [json!({"grammar": "root ::= \"a\""}), json!({"json_schema": {"type": "integer"}})] {
        let (status, answer) = complete(&server, say(body.clone())).await;
        assert_eq!(status, 200);
        engine.last(|request| assert!(request.constraint.is_some()));
        let (name, value) = body.as_object().unwrap().iter().next().unwrap();
        assert_eq!(answer["generation_settings"][name], *value);
    }
}

#[tokio::test]
async fn an_answer_does_not_repeat_a_long_request_for_many_choices() {
    let engine = Fake::says("x");
    let server = server_with(&engine, &[], 4 << 20);
    let schema = json!({"type": "integer", "description": "d".repeat(600_000)});
    for (n, status) in [(1, 200), (100, 200), (128, 400)] {
        let (got, answer) = complete(&server, say(json!({"json_schema": schema, "n": n}))).await;
        assert_eq!(got, status, "{n}: {}", answer["error"]);
    }
}

#[tokio::test]
async fn without_the_cache_each_request_has_a_salt_of_its_own() {
    let engine = Fake::says("x");
    let server = server(&engine);
    let mut salts = Vec::new();
    for path in [PATH, PATH, "/v1/completions"] {
        ask(&server, path, say(json!({"cache_prompt": false, "cache_salt": "ours"}))).await;
        salts.push(engine.last(|request| request.cache_salt.clone().unwrap()));
        ask(&server, path, say(json!({"cache_prompt": true, "cache_salt": "ours"}))).await;
        engine.last(|request| assert_eq!(request.cache_salt.as_deref(), Some("ours")));
    }
    assert!(salts.iter().all(|salt| salt.len() == 32));
    assert!(salts[0] != salts[1] && salts[1] != salts[2]);
}

#[tokio::test]
async fn what_breaks_off_ends_the_stream_with_an_error() {
    let got = chunks(&server(&Fake::new(Script::Drop)), say(json!({"stream": true}))).await;
    assert_eq!((got.len(), &got[0]["error"]["code"]), (1, &json!(500)));
    let request = Request::get(PATH).body(Body::empty()).unwrap();
    assert_eq!(send(&server(&Fake::says("x")), request).await.status(), 405);
}
