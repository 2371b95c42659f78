//! What request fields mean, on the whole engine: choices, seeds, log-probabilities, stops, forms of prompts.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use spark_testing::tolerance::FLOAT32;

use crate::{
    server::{CHAT, COMPLETIONS, MODEL, case, endless, with},
    support::{
        chat_body, ids,
        server::{Server, Streamed},
    },
};

fn texts(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect()
}

#[test]
fn seeds_fix_every_choice() {
    let server = Server::start(MODEL, &[]);
    let body = with(endless(12), json!({"n": 3, "seed": 7, "temperature": 1.2, "top_k": 0, "top_p": 1}));
    let first = server.ask(COMPLETIONS, &body);
    let again = server.ask(COMPLETIONS, &body);
    assert_eq!(first["choices"], again["choices"]);
    let indices: Vec<_> =
        first["choices"].as_array().unwrap().iter().map(|choice| choice["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2]);
    let distinct: BTreeSet<_> = texts(&first).into_iter().collect();
    assert_eq!(distinct.len(), 3, "choices are drawn apart: {distinct:?}");
    assert_eq!(first["usage"]["completion_tokens"], 36);
    for i in 0..3 {
        let alone = server.ask(COMPLETIONS, &with(body.clone(), json!({"n": 1, "seed": 7 + i})));
        assert_eq!(
            alone["choices"][0]["token_ids"], first["choices"][i]["token_ids"],
            "choice {i} has seed 7 + {i}"
        );
    }
    let unseeded = with(body, json!({"seed": null, "n": 1}));
    let draws = [server.ask(COMPLETIONS, &unseeded), server.ask(COMPLETIONS, &unseeded)];
    assert_ne!(texts(&draws[0]), texts(&draws[1]), "requests without a seed differ");
}

#[test]
fn log_probabilities_are_those_of_the_oracle() {
    let server = Server::start(MODEL, &[]);
    let case = case("text");
    let num_tokens = 20;
    let asked = json!({"logprobs": true, "top_logprobs": 3, "return_tokens_as_token_ids": true});
    let answer = server.ask(CHAT, &with(chat_body(&case, num_tokens), asked));
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), num_tokens);
    for (entry, expected) in content.iter().zip(&case.steps) {
        assert_eq!(entry["token"], entry["top_logprobs"][0]["token"], "greedy takes the most likely token");
        assert_eq!(entry["logprob"], entry["top_logprobs"][0]["logprob"]);
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(entry["token"], format!("token_id:{}", expected.ids[0]));
        for (rank, top) in entry["top_logprobs"].as_array().unwrap().iter().enumerate() {
            let error = top["logprob"].as_f64().unwrap() - f64::from(expected.logprobs[rank]);
            assert!(error.abs() < f64::from(FLOAT32.logprob), "rank {rank}: off by {error}");
        }
    }
    let named = server.ask(CHAT, &with(chat_body(&case, num_tokens), json!({"logprobs": true})));
    let entry = &named["choices"][0]["logprobs"]["content"][0];
    assert_eq!(entry["top_logprobs"], json!([]));
    assert!(!entry["token"].as_str().unwrap().starts_with("token_id:"));
}

/// Named tokens have the log-probabilities that they have among the most likely ones, also where they are not among them; alone
/// and on several ranks.
#[test]
fn named_tokens_have_the_log_probabilities_that_they_have_among_the_best() {
    let asked = |extra: Value| {
        with(endless(4), with(json!({"logprobs": 20, "return_tokens_as_token_ids": true}), extra))
    };
    let tops = |answer: &Value| answer["choices"][0]["logprobs"]["top_logprobs"].clone();
    let mut seen = Vec::new();
    for flags in [&[][..], &["--tp", "2"]] {
        let server = Server::start(MODEL, flags);
        let best = tops(&server.ask(COMPLETIONS, &asked(json!({}))));
        let id = |name: &String| name.strip_prefix("token_id:").unwrap().parse::<u32>().unwrap();
        let mut named: Vec<u32> = best[0].as_object().unwrap().keys().map(id).collect();
        named.extend([0, 258]);
        let got = tops(&server.ask(COMPLETIONS, &asked(json!({"logprob_token_ids": named}))));
        for (best, got) in best.as_array().unwrap().iter().zip(got.as_array().unwrap()) {
            let (best, got) = (best.as_object().unwrap(), got.as_object().unwrap());
            let mut wanted: BTreeSet<u32> = named.iter().copied().collect();
            let both: Vec<_> = best.keys().filter(|name| got.contains_key(*name)).collect();
            assert!(both.iter().all(|name| best[*name] == got[*name]), "{best:?} {got:?}");
            assert!(!both.is_empty());
            // The sampled token is the most likely one, and always shown.
            let (first, _) =
                best.iter().max_by(|a, b| a.1.as_f64().unwrap().total_cmp(&b.1.as_f64().unwrap())).unwrap();
            wanted.insert(id(first));
            assert_eq!(got.keys().map(id).collect::<BTreeSet<_>>(), wanted);
        }
        seen.push(got);
    }
    for (alone, ranks) in seen[0].as_array().unwrap().iter().zip(seen[1].as_array().unwrap()) {
        for (name, value) in alone.as_object().unwrap() {
            let error = value.as_f64().unwrap() - ranks[name].as_f64().unwrap();
            assert!(error.abs() < f64::from(FLOAT32.logprob), "{name}: off by {error}");
        }
    }
}

#[test]
fn only_allowed_tokens_are_sampled() {
    let server = Server::start(MODEL, &[]);
    let hot =
        json!({"allowed_token_ids": [65, 66, 200], "temperature": 2, "seed": 1, "top_k": 0, "top_p": 1});
    let answer = server.ask(COMPLETIONS, &with(endless(40), hot));
    let got: BTreeSet<u32> = ids(&answer["choices"][0]["token_ids"]).into_iter().collect();
    assert_eq!(got, BTreeSet::from([65, 66, 200]));
    // No other token ends it; one that is allowed does.
    let body = json!({"prompt": "x", "max_tokens": 9, "allowed_token_ids": [66], "return_token_ids": true});
    let held = server.ask(COMPLETIONS, &body);
    assert_eq!(
        (ids(&held["choices"][0]["token_ids"]), &held["choices"][0]["finish_reason"]),
        (vec![66; 9], &json!("length"))
    );
    let ended = server.ask(COMPLETIONS, &with(body, json!({"allowed_token_ids": [258]})));
    assert_eq!(ended["choices"][0]["finish_reason"], "stop");
}

#[test]
fn streamed_log_probabilities_are_those_of_the_whole_answer() {
    let server = Server::start(MODEL, &[]);
    let chat = with(chat_body(&case("text"), 12), json!({"logprobs": true, "top_logprobs": 2}));
    let completion = with(endless(12), json!({"logprobs": 2, "echo": true}));
    for (path, body, lists) in [
        (CHAT, chat, &["content"][..]),
        (COMPLETIONS, completion, &["tokens", "token_logprobs", "top_logprobs", "text_offset"]),
    ] {
        let whole = server.ask(path, &body)["choices"][0]["logprobs"].clone();
        let events: Vec<String> = server.stream(path, &body).filter(|data| data != "[DONE]").collect();
        let chunks: Vec<Value> = events.iter().map(|data| serde_json::from_str(data).unwrap()).collect();
        for list in lists {
            let joined =
                chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"][list].as_array()).flatten();
            assert_eq!(
                &joined.cloned().collect::<Vec<_>>(),
                whole[list].as_array().unwrap(),
                "{path}: {list}"
            );
        }
    }
}

#[test]
fn completions_have_log_probabilities_in_lists() {
    let server = Server::start(MODEL, &[]);
    let prompt = "The sky";
    let body = with(endless(5), json!({"prompt": prompt, "logprobs": 2, "return_tokens_as_token_ids": true}));
    let answer = server.ask(COMPLETIONS, &body);
    let choice = &answer["choices"][0];
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
    let expected: Vec<_> = ids(&choice["token_ids"]).iter().map(|id| format!("token_id:{id}")).collect();
    assert_eq!(tokens, &expected);
    for (i, top) in choice["logprobs"]["top_logprobs"].as_array().unwrap().iter().enumerate() {
        let top = top.as_object().unwrap();
        assert_eq!(top.len(), 2, "the greedy token is one of the two");
        let best = top.values().map(|value| value.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(choice["logprobs"]["token_logprobs"][i], best);
        assert_eq!(top[&expected[i]], best);
    }

    let echoed = server.ask(COMPLETIONS, &with(body.clone(), json!({"echo": true})));
    let echo = &echoed["choices"][0];
    assert_eq!(echo["text"], format!("{prompt}{}", choice["text"].as_str().unwrap()));
    let num_prompt = echo["prompt_token_ids"].as_array().unwrap().len();
    let logprobs = &echo["logprobs"];
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[key].as_array().unwrap().len(), num_prompt + 5, "{key}");
    }
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    let shown = &logprobs["token_logprobs"].as_array().unwrap()[num_prompt..];
    assert_eq!(shown, &choice["logprobs"]["token_logprobs"].as_array().unwrap()[..]);
    let only = server.ask(COMPLETIONS, &with(body, json!({"echo": true, "max_tokens": 0})));
    assert_eq!(only["choices"][0]["text"], prompt);
    assert_eq!(only["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), num_prompt);
}

#[test]
fn prompts_have_log_probabilities_by_id() {
    let server = Server::start(MODEL, &[]);
    let case = case("text");
    let last = case.prompt_ids.len();
    // The oracle's first two greedy tokens as the end of the prompt: their log-probabilities are known.
    let prompt: Vec<u32> = case.prompt_ids.iter().chain(&case.greedy_ids[..2]).copied().collect();
    let answer = server.ask(COMPLETIONS, &with(endless(1), json!({"prompt": prompt, "prompt_logprobs": 2})));
    let list = answer["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!(list.len(), prompt.len());
    assert_eq!(list[0], Value::Null);
    for (i, (id, entry)) in prompt.iter().zip(list).enumerate().skip(1) {
        let entry = entry.as_object().unwrap();
        assert!((2..=3).contains(&entry.len()), "position {i}: two and the token itself");
        let own = &entry[&id.to_string()];
        let (rank, logprob) = (own["rank"].as_u64().unwrap(), own["logprob"].as_f64().unwrap());
        assert!(rank >= 1 && logprob <= 0.0, "position {i}: {own}");
        let num_better =
            entry.values().filter(|other| other["logprob"].as_f64().unwrap() > logprob).count() as u64;
        assert_eq!(num_better, (rank - 1).min(2), "position {i}: {entry:?}");
        if i >= last {
            let error = logprob - f64::from(case.steps[i - last].logprobs[0]);
            assert!(
                rank == 1 && error.abs() < f64::from(FLOAT32.logprob),
                "position {i}: rank {rank}, off by {error}"
            );
        }
    }
    let chat = server.ask(CHAT, &with(chat_body(&case, 1), json!({"prompt_logprobs": 0})));
    let list = chat["prompt_logprobs"].as_array().unwrap();
    assert_eq!(list.len(), case.prompt_ids.len());
    assert!(list[1..].iter().all(|entry| entry.as_object().unwrap().len() == 1));
}

/// A character of `text` that stands alone in it from where it is first, with its place; not at the beginning.
fn stop_in(text: &str) -> (usize, String) {
    let stops = text.char_indices().skip(4).filter(|(_, c)| c.is_ascii_graphic());
    let mut stops = stops.filter(|(at, c)| text.find(*c) == Some(*at));
    let (at, c) = stops.next().unwrap_or_else(|| panic!("no character to stop at in {text:?}"));
    (at, c.to_string())
}

#[test]
fn stop_strings_cut_the_text() {
    let server = Server::start(MODEL, &[]);
    // Printable characters only, so that there is something to stop at.
    let bias: serde_json::Map<String, Value> = (33..127).map(|id: u32| (id.to_string(), json!(50))).collect();
    let body =
        with(endless(40), json!({"logit_bias": bias, "temperature": 1, "seed": 1, "top_k": 0, "top_p": 1}));
    let whole = server.ask(COMPLETIONS, &body);
    let text = texts(&whole)[0];
    let (at, stop) = stop_in(text);
    let cut = server.ask(COMPLETIONS, &with(body.clone(), json!({"stop": [stop, "not in the text"]})));
    let choice = &cut["choices"][0];
    assert_eq!(choice["text"], text[..at]);
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
    let with_stop = json!({"stop": stop, "include_stop_str_in_output": true});
    let kept = server.ask(COMPLETIONS, &with(body.clone(), with_stop));
    assert_eq!(kept["choices"][0]["text"], text[..=at]);
    let streamed = Streamed::read(server.stream(COMPLETIONS, &with(body.clone(), json!({"stop": stop}))));
    assert_eq!((streamed.text.as_str(), streamed.done), (&text[..at], true));
    let late = with(body, json!({"stop": stop, "min_tokens": 30}));
    let late = server.ask(COMPLETIONS, &late);
    assert!(
        late["usage"]["completion_tokens"].as_u64().unwrap() >= 30,
        "a stop before min_tokens does not count"
    );
    server.wait_until_idle();
}

#[test]
fn stop_tokens_and_min_tokens() {
    let server = Server::start(MODEL, &[]);
    let case = case("text");
    let first = case.greedy_ids[0];
    let body = with(chat_body(&case, 20), json!({"stop_token_ids": [first]}));
    let stopped = server.ask(CHAT, &body);
    assert_eq!(ids(&stopped["choices"][0]["token_ids"]), [first]);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["stop_reason"], first);
    let held = server.ask(CHAT, &with(body, json!({"min_tokens": 10})));
    let held = ids(&held["choices"][0]["token_ids"]);
    assert!(held.len() > 10 || !held.contains(&first), "{held:?}");
    assert!(
        held[..10].iter().all(|id| *id != first),
        "before min_tokens a stop token is not sampled: {held:?}"
    );
    let exact = server.ask(CHAT, &chat_body(&case, 3));
    assert_eq!(
        (&exact["choices"][0]["finish_reason"], &exact["usage"]["completion_tokens"]),
        (&json!("length"), &json!(3))
    );
}

#[test]
fn end_of_sequence_tokens_end_an_answer() {
    let server = Server::start(MODEL, &[]);
    let body = json!({"prompt": "x", "max_tokens": 9, "logit_bias": {"258": 100}, "return_token_ids": true});
    let ended = server.ask(COMPLETIONS, &body);
    let choice = &ended["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["text"]), (&json!("stop"), &json!("")));
    let ignored = server.ask(COMPLETIONS, &with(body, json!({"ignore_eos": true})));
    assert_eq!(ids(&ignored["choices"][0]["token_ids"]), [258; 9]);
}

#[test]
fn a_bias_forces_and_forbids() {
    let server = Server::start(MODEL, &[]);
    let forced = server.ask(COMPLETIONS, &with(endless(8), json!({"logit_bias": {"65": 100}})));
    assert_eq!(forced["choices"][0]["token_ids"], json!(vec![65; 8]));
    let free = server.ask(COMPLETIONS, &endless(1));
    let favourite = ids(&free["choices"][0]["token_ids"])[0];
    let forbidden = json!({"logit_bias": {favourite.to_string(): -100}});
    let forbidden = server.ask(COMPLETIONS, &with(endless(30), forbidden));
    assert!(!ids(&forbidden["choices"][0]["token_ids"]).contains(&favourite));
}

#[test]
fn prompts_come_in_four_forms() {
    let server = Server::start(MODEL, &[]);
    let prompts = ["First", "Second one", "Dritter Gruß"];
    let tokenise = |text: &str| server.ask("/tokenize", &json!({"prompt": text}))["tokens"].clone();
    let tokens: Vec<Value> = prompts.iter().map(|text| tokenise(text)).collect();
    let alone: Vec<Value> = prompts
        .iter()
        .map(|text| server.ask(COMPLETIONS, &with(endless(6), json!({"prompt": text})))["choices"][0].clone())
        .collect();
    for (prompt, token_ids) in alone.iter().zip(&tokens) {
        assert_eq!(&prompt["prompt_token_ids"], token_ids);
    }
    let n = 2;
    for form in [json!(prompts), json!(tokens)] {
        let many = server.ask(COMPLETIONS, &with(endless(6), json!({"prompt": form, "n": n})));
        let choices = many["choices"].as_array().unwrap();
        assert_eq!(choices.len(), prompts.len() * n);
        for (i, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], i);
            assert_eq!(choice["text"], alone[i / n]["text"]);
            assert_eq!(choice["token_ids"], alone[i / n]["token_ids"]);
        }
        let num_prompt: usize = tokens.iter().map(|ids| ids.as_array().unwrap().len()).sum();
        assert_eq!(many["usage"]["prompt_tokens"], num_prompt);
        assert_eq!(many["usage"]["completion_tokens"], 6 * prompts.len() * n);
    }
    let single = server.ask(COMPLETIONS, &with(endless(6), json!({"prompt": tokens[2]})));
    assert_eq!(single["choices"][0]["text"], alone[2]["text"]);
}

#[test]
fn penalties_and_filters_change_the_draw() {
    let server = Server::start(MODEL, &[]);
    let ask =
        |fields: Value| ids(&server.ask(COMPLETIONS, &with(endless(60), fields))["choices"][0]["token_ids"]);
    let distinct = |ids: &[u32]| ids.iter().collect::<BTreeSet<_>>().len();
    let greedy = ask(json!({}));
    assert_eq!(ask(json!({"temperature": 1, "top_k": 1})), greedy, "top_k 1 is greedy");
    assert_eq!(ask(json!({"temperature": 1, "top_k": 0, "top_p": 1e-6})), greedy, "a tiny top_p is greedy");
    assert_eq!(
        ask(json!({"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 1})),
        greedy,
        "min_p 1 is greedy"
    );
    let fresh = ask(json!({"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 5}));
    assert!(distinct(&fresh) > distinct(&greedy), "{} against {}", distinct(&fresh), distinct(&greedy));
}

#[test]
fn tools_reach_the_prompt_and_parsers_can_be_switched_off() {
    let function = json!({"name": "get_weather", "parameters": {"type": "object"}});
    let tools = json!([{"type": "function", "function": function}]);
    let body = chat_body(&case("text"), 4);
    let server = Server::start(MODEL, &[]);
    let count = |extra: Value| {
        let answer = server.ask(CHAT, &with(body.clone(), extra));
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let bare = count(json!({}));
    assert!(count(json!({"tools": tools})) > bare);
    assert_eq!(count(json!({"tools": tools, "tool_choice": "none"})), bare);
    drop(server);

    let server = Server::start(MODEL, &["--tool-call-parser", "none", "--reasoning-parser", "qwen3"]);
    let refused = server.post(CHAT, &with(body.clone(), json!({"tools": tools})));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tools")));
    let usage = server.ask(CHAT, &body)["usage"].clone();
    assert_eq!(usage["completion_tokens_details"], json!({"reasoning_tokens": 0}));
}

/// A prompt of several steps tells how far it is, a second time from where the prefix cache ends.
#[test]
fn a_long_prompt_shows_its_progress() {
    let arguments = ["--max-model-len", "1024", "--long-prefill-token-threshold", "64"];
    let server = Server::start(MODEL, &arguments);
    let prompt: Vec<u32> = (0..300).map(|i| 40 + i % 50).collect();
    let body = json!({"prompt": prompt, "max_tokens": 2, "temperature": 0, "return_progress": true});
    let shown = || -> Vec<[u64; 3]> {
        let chunks = server.stream(COMPLETIONS, &body).filter(|data| data != "[DONE]");
        let chunks = chunks.map(|data| serde_json::from_str::<Value>(&data).unwrap());
        let progress = chunks.filter_map(|mut chunk| chunk.get_mut("prompt_progress").map(Value::take));
        progress.map(|it| ["cache", "processed", "total"].map(|name| it[name].as_u64().unwrap())).collect()
    };
    let first = shown();
    let steps = [0, 64, 128, 192, 256, 300].map(|processed| [0, processed, 300]);
    assert_eq!(first, steps);
    let again = shown();
    let cached = again[0][0];
    assert!(cached >= 256, "{again:?}");
    assert_eq!((again[0], *again.last().unwrap()), ([cached, cached, 300], [cached, 300, 300]));
}

/// Another dialect, the same tokens; and what `cache_prompt` switches off is the cache.
#[test]
fn llama_servers_completions_are_those_of_the_same_model() {
    const PATH: &str = "/completion";
    let server = Server::start(MODEL, &["--max-model-len", "512"]);
    let prompt: Vec<u32> = (0..100).map(|i| 40 + i % 50).collect();
    let expected =
        server.ask(COMPLETIONS, &with(endless(8), json!({"prompt": prompt})))["choices"][0].clone();
    let body = json!({"prompt": prompt, "n_predict": 8, "temperature": 0, "ignore_eos": true, "return_tokens": true,
        "n_probs": 2, "cache_prompt": false});
    let alone = server.ask(PATH, &body);
    assert_eq!((&alone["tokens"], &alone["content"]), (&expected["token_ids"], &expected["text"]));
    assert_eq!((&alone["stop_type"], &alone["truncated"]), (&json!("limit"), &json!(false)));
    assert_eq!((&alone["tokens_evaluated"], &alone["tokens_cached"]), (&json!(100), &json!(0)));
    let cached = server.ask(PATH, &with(body.clone(), json!({"cache_prompt": true})));
    assert!(cached["tokens_cached"].as_u64().unwrap() >= 64, "{}", cached["tokens_cached"]);
    assert_eq!(cached["tokens"], alone["tokens"]);

    let chunks: Vec<Value> =
        server.stream(PATH, &body).map(|data| serde_json::from_str(&data).unwrap()).collect();
    let (last, tokens) = chunks.split_last().unwrap();
    assert_eq!((&last["stop"], &last["tokens_predicted"]), (&json!(true), &json!(8)));
    let streamed: Vec<Value> = tokens.iter().map(|chunk| chunk["tokens"][0].clone()).collect();
    assert_eq!(json!(streamed), alone["tokens"]);
    let ids =
        tokens.iter().map(|chunk| chunk["completion_probabilities"][0]["top_logprobs"][0]["id"].clone());
    assert_eq!(json!(ids.collect::<Vec<_>>()), alone["tokens"], "greedy takes the most likely token");

    // To the end of the context, which the answer says.
    let full = server.ask(PATH, &with(body, json!({"n_predict": -1})));
    assert_eq!((&full["tokens_predicted"], &full["truncated"]), (&json!(412), &json!(true)));
}

/// The demo model would think for longer.
#[test]
fn thoughts_are_cut_at_their_budget_and_the_answer_follows() {
    let server = Server::serve(None, &["--threads", "2", "--kv-cache-memory-bytes", "67108864"]);
    let ask = |extra: Value| {
        let body = json!({"messages": [{"role": "user", "content": "What is 347 + 185?"}], "temperature": 0,
            "max_completion_tokens": 200});
        server.ask(CHAT, &with(body, extra))
    };
    let thoughts = |answer: &Value| {
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap_or_default()
    };
    let free = ask(json!({"reasoning_effort": "high"}));
    assert!(thoughts(&free) > 20, "{free}");
    let cut = ask(json!({"reasoning_effort": "high", "thinking_token_budget": 7}));
    assert_eq!(thoughts(&cut), 7, "{cut}");
    let [message, whole] = [&cut, &free].map(|answer| &answer["choices"][0]["message"]);
    let [begun, whole] = [message, whole].map(|message| message["reasoning"].as_str().unwrap());
    assert!(whole.starts_with(begun) && begun.len() < whole.len(), "{cut}");
    assert!(!message["content"].as_str().unwrap().is_empty(), "{cut}");
    assert_eq!(thoughts(&ask(json!({"reasoning_effort": "none"}))), 0);
}
