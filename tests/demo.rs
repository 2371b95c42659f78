//! The demo model through the server and the command line: what is answered, not only that something is.
//!
//! A handful of questions, answered greedily; how often the model is right is what `spark-engine eval` measures. Where
//! nothing else is said the server runs as a user starts it: no MODEL, no `--dtype`.

use std::{
    path::PathBuf,
    process::Output,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use spark_engine::{EngineBuilder, find_demo_model, image_data_url};
use spark_testing::media_path;

use crate::{
    server::{CHAT, with},
    support::{
        self,
        questions::{ABOUT_THE_PICTURE, DESCRIPTION, IN_WORDS, PICTURE},
        server::{Events, Server, program},
    },
};

/// Little memory for a test machine. As arguments of `serve` and of `generate`.
const SMALL: [&str; 4] = ["--threads", "2", "--kv-cache-memory-bytes", "67108864"];

const SENTENCE: &str = "Emma is 90 years old and lives in Leipzig.\nGive name, city and age as JSON.";
const WEATHER: &str = "What is the weather in Oslo in celsius?";

/// The demo model as a server.
fn demo(arguments: &[&str]) -> Server {
    Server::serve(None, &[&SMALL, arguments].concat())
}

/// The folder of the demo model's checkpoint in a format that is committed.
fn folder(format: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "models/spark-tiny-vl", format].iter().collect()
}

/// A user's message with pictures of `media/`.
fn user(pictures: &[&str], text: &str) -> Value {
    let urls = pictures.iter().map(|name| image_data_url(&media_path(name)).unwrap());
    let mut parts: Vec<Value> =
        urls.map(|url| json!({"type": "image_url", "image_url": {"url": url}})).collect();
    parts.push(json!({"type": "text", "text": text}));
    json!({"role": "user", "content": parts})
}

/// The greedy answer to `messages` is wanted.
fn body(messages: &[Value]) -> Value {
    json!({"messages": messages, "temperature": 0, "max_completion_tokens": 200})
}

fn tools() -> Value {
    let tool = |name: &str, about: &str, properties: Value, required: &str| {
        let parameters = json!({"type": "object", "properties": properties, "required": [required]});
        json!({"type": "function", "function": {"name": name, "description": about, "parameters": parameters}})
    };
    let unit = json!({"type": "string", "enum": ["celsius", "fahrenheit"]});
    json!([
        tool(
            "calculator",
            "Calculates an expression.",
            json!({"expression": {"type": "string"}}),
            "expression"
        ),
        tool("weather", "The weather in a city.", json!({"city": {"type": "string"}, "unit": unit}), "city"),
    ])
}

/// An assistant's message and how it ended, the same for whole answers and for streams.
#[derive(Debug, Default, PartialEq)]
struct Said {
    content: String,
    reasoning: String,
    /// Names, and arguments as the model wrote them.
    calls: Vec<(String, String)>,
    finish: String,
}

impl Said {
    /// `content` to its end, and nothing else.
    fn text(content: &str) -> Self {
        Self { content: content.into(), finish: "stop".into(), ..Self::default() }
    }

    fn calls(calls: &[(&str, &str)]) -> Self {
        let calls = calls.iter().map(|&(name, arguments)| (name.into(), arguments.into())).collect();
        Self { calls, finish: "tool_calls".into(), ..Self::default() }
    }

    /// The first choice of a whole answer.
    fn whole(answer: &Value) -> Self {
        let mut said = Self::default();
        said.add(&answer["choices"][0], "message");
        said
    }

    /// The sum of a stream's deltas.
    fn streamed(events: Events) -> Self {
        let mut said = Self::default();
        for data in events.filter(|data| data != "[DONE]") {
            let chunk: Value = serde_json::from_str(&data).unwrap();
            said.add(&chunk["choices"][0], "delta");
        }
        said
    }

    fn add(&mut self, choice: &Value, key: &str) {
        let message = &choice[key];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        self.content += &text(&message["content"]);
        self.reasoning += &text(&message["reasoning"]);
        for (i, call) in message["tool_calls"].as_array().into_iter().flatten().enumerate() {
            // A whole answer lists its calls; a stream says which one it goes on with.
            let index = call["index"].as_u64().map_or(i, |index| index as usize);
            if index == self.calls.len() {
                assert_eq!((&call["type"], call["id"].is_string()), (&json!("function"), true), "{call}");
                self.calls.push(Default::default());
            }
            self.calls[index].0 += &text(&call["function"]["name"]);
            self.calls[index].1 += &text(&call["function"]["arguments"]);
        }
        self.finish += &text(&choice["finish_reason"]);
    }
}

fn said(server: &Server, body: &Value) -> Said {
    Said::whole(&server.ask(CHAT, body))
}

/// The text that answers a question about pictures.
fn about(server: &Server, pictures: &[&str], question: &str) -> Said {
    said(server, &body(&[user(pictures, question)]))
}

/// A bit of everything: what has to be right in any format and with any cache.
fn check_answers(server: &Server) {
    for (question, answer) in ABOUT_THE_PICTURE {
        assert_eq!(about(server, &[PICTURE], question), Said::text(answer), "{question}");
    }
    for (question, answer) in IN_WORDS {
        assert_eq!(about(server, &[], question), Said::text(answer), "{question}");
    }
    let extracted = about(server, &[], SENTENCE);
    assert_eq!(json_of(&extracted.content), json!({"name": "Emma", "city": "Leipzig", "age": 90}));
    let called = said(server, &with(body(&[user(&[], WEATHER)]), json!({"tools": tools()})));
    assert_eq!(called, Said::calls(&[("weather", r#"{"city": "Oslo", "unit": "celsius"}"#)]));
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn three_questions_about_a_picture_are_answered_at_once() {
    let start = Instant::now();
    let server = demo(&[]);
    for (question, answer) in &ABOUT_THE_PICTURE[..3] {
        assert_eq!(about(&server, &[PICTURE], question), Said::text(answer), "{question}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "three answers took {:?}", start.elapsed());
}

#[test]
fn the_answers_are_right() {
    check_answers(&demo(&[]));
}

#[test]
fn the_answers_are_right_in_float32() {
    check_answers(&demo(&["--dtype", "float32"]));
}

#[test]
fn the_answers_are_right_with_an_fp8_cache() {
    check_answers(&demo(&["--kv-cache-dtype", "fp8"]));
}

#[test]
fn the_answers_of_the_unquantised_model_are_right() {
    check_answers(&Server::serve(Some(&folder("bf16")), &SMALL));
}

#[test]
fn the_answers_are_right_after_quantize() {
    let target = tempfile::tempdir().unwrap();
    for format in ["nvfp4", "fp8"] {
        let made = target.path().join(format);
        let mut command = program(&["quantize", "--format", format]);
        let Output { status, stderr, .. } =
            command.arg(folder("bf16")).arg("--out").arg(&made).output().unwrap();
        assert!(status.success(), "{format}: {}", String::from_utf8_lossy(&stderr));
        check_answers(&Server::serve(Some(&made), &SMALL));
    }
}

/// Steps of 32 tokens divide pictures and prompts, and eight answers grow side by side while others wait.
#[test]
fn many_at_once_get_their_own_answers() {
    let arguments = ["--max-num-batched-tokens", "32", "--max-num-seqs", "8", "--max-model-len", "512"];
    let server = demo(&arguments);
    let pictured = ABOUT_THE_PICTURE.map(|(question, answer)| (vec![PICTURE], question, answer));
    let plain = IN_WORDS.map(|(question, answer)| (vec![], question, answer));
    std::thread::scope(|scope| {
        for (pictures, question, answer) in pictured.iter().chain(&plain).cycle().take(45) {
            let server = &server;
            scope.spawn(move || {
                assert_eq!(about(server, pictures, question), Said::text(answer), "{question}");
            });
        }
    });
    server.wait_until_idle();
}

#[test]
fn two_pictures_are_compared_in_their_order() {
    let server = demo(&[]);
    for (pictures, change) in [
        (["demo-before.png", "demo-after.png"], "The purple cross is now a star."),
        (["demo-after.png", "demo-before.png"], "The purple star is now a cross."),
    ] {
        assert_eq!(about(&server, &pictures, "What changed?"), Said::text(change));
    }
}

#[test]
fn tools_are_called_by_name() {
    let server = demo(&[]);
    let with_tools = |question: &str| with(body(&[user(&[], question)]), json!({"tools": tools()}));
    for (question, calls) in [
        ("What is 2662 - 860?", &[("calculator", r#"{"expression": "2662 - 860"}"#)][..]),
        (WEATHER, &[("weather", r#"{"city": "Oslo", "unit": "celsius"}"#)]),
        (
            "Tell me the weather in Moscow in celsius and 82 - 28.",
            &[
                ("weather", r#"{"city": "Moscow", "unit": "celsius"}"#),
                ("calculator", r#"{"expression": "82 - 28"}"#),
            ],
        ),
        (
            "What is 587 * 672 and the weather in Oslo?",
            &[("calculator", r#"{"expression": "587 * 672"}"#), ("weather", r#"{"city": "Oslo"}"#)],
        ),
    ] {
        let answer = server.ask(CHAT, &with_tools(question));
        assert_eq!(Said::whole(&answer), Said::calls(calls), "{question}");
        let message = &answer["choices"][0]["message"];
        assert_eq!(message["content"], Value::Null, "{question}");
        let ids = message["tool_calls"].as_array().unwrap().iter().map(|call| call["id"].as_str().unwrap());
        let distinct: std::collections::BTreeSet<_> = ids.collect();
        assert_eq!(distinct.len(), calls.len(), "every call has an id of its own: {message}");
    }
    // What needs no tool is answered, and so is everything where tools are forbidden.
    assert_eq!(said(&server, &with_tools("Sort 9, 4, 6.")), Said::text("4, 6, 9"));
    let forbidden = with(with_tools("What is 347 + 185?"), json!({"tool_choice": "none"}));
    assert_eq!(said(&server, &forbidden), Said::text("532"));
}

#[test]
fn the_results_of_tools_are_told() {
    let server = demo(&[]);
    let question = user(&[], WEATHER);
    let first = server.ask(CHAT, &with(body(std::slice::from_ref(&question)), json!({"tools": tools()})));
    let call = first["choices"][0]["message"].clone();
    for (sky, temperature) in [("rainy", 7), ("sunny", 21)] {
        // Written as the model has learnt it, with spaces.
        let result = format!(r#"{{"sky": "{sky}", "temperature": {temperature}, "unit": "celsius"}}"#);
        let result = json!({"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": result});
        let messages = [question.clone(), call.clone(), result];
        let told = said(&server, &with(body(&messages), json!({"tools": tools()})));
        assert_eq!(told, Said::text(&format!("It is {sky} in Oslo, {temperature} degrees celsius.")));
    }
}

#[test]
fn thoughts_are_apart_from_the_answer() {
    let server = demo(&[]);
    let thinking = json!({"chat_template_kwargs": {"enable_thinking": true}});
    for (question, steps, sum) in [
        (
            "What is 347 + 185?",
            "7 + 5 + 0 = 12: 2, carry 1\n4 + 8 + 1 = 13: 3, carry 1\n3 + 1 + 1 = 5: 5, carry 0\nResult: 532",
            "532",
        ),
        (
            "309 plus 2298",
            "9 + 8 + 0 = 17: 7, carry 1\n0 + 9 + 1 = 10: 0, carry 1\n3 + 2 + 1 = 6: 6, carry 0\n\
            0 + 2 + 0 = 2: 2, carry 0\nResult: 2607",
            "2607",
        ),
    ] {
        let answer = server.ask(CHAT, &with(body(&[user(&[], question)]), thinking.clone()));
        assert_eq!(Said::whole(&answer), Said { reasoning: steps.into(), ..Said::text(sum) });
        let usage = &answer["usage"];
        let count = |value: &Value| value.as_u64().unwrap();
        let thought = count(&usage["completion_tokens_details"]["reasoning_tokens"]);
        // The answer is some digits; everything before them is thought.
        assert!(thought > 50 && thought < count(&usage["completion_tokens"]), "{usage}");
    }
    let unasked = server.ask(CHAT, &body(&[user(&[], "What is 347 + 185?")]));
    assert_eq!(Said::whole(&unasked), Said::text("532"));
    assert!(unasked["usage"]["completion_tokens"].as_u64() < Some(10), "{}", unasked["usage"]);
}

#[test]
fn streams_say_what_whole_answers_say() {
    let server = demo(&[]);
    let describe = || body(&[user(&[PICTURE], "Describe the picture.")]);
    let parallel = body(&[user(&[], "Tell me the weather in Moscow in celsius and 82 - 28.")]);
    let sort = body(&[user(&[], "Sort 88, 14, 41, 55.")]);
    let thinking = json!({"chat_template_kwargs": {"enable_thinking": true}});
    let extract = with(body(&[user(&[], SENTENCE)]), json!({"max_completion_tokens": 5}));
    for (body, content, finish, num_calls) in [
        (describe(), DESCRIPTION, "stop", 0),
        (with(describe(), json!({"stop": " at"})), "There are four objects: a pink ring", "stop", 0),
        (with(parallel, json!({"tools": tools()})), "", "tool_calls", 2),
        (with(sort, thinking), "14, 41, 55, 88", "stop", 0),
        (extract, "{\"name\"", "length", 0),
    ] {
        let whole = said(&server, &body);
        assert_eq!(Said::streamed(server.stream(CHAT, &body)), whole);
        assert!(whole.content.starts_with(content), "{whole:?}");
        assert_eq!((whole.finish.as_str(), whole.calls.len()), (finish, num_calls));
    }
}

#[test]
fn a_conversation_is_remembered() {
    let server = demo(&[]);
    let mut messages = Vec::new();
    for (text, answer) in [
        ("My name is Clara.", "Noted."),
        ("I am in room 285.", "Noted."),
        ("What is my room number?", "Your room is 285."),
        ("What is my name?", "Your name is Clara."),
    ] {
        messages.push(json!({"role": "user", "content": text}));
        assert_eq!(said(&server, &body(&messages)), Said::text(answer), "{text}");
        messages.push(json!({"role": "assistant", "content": answer}));
    }
    let forgotten = body(&messages[6..7]);
    assert_ne!(said(&server, &forgotten).content, "Your name is Clara.", "nobody has said it");
}

#[test]
fn a_repeated_picture_is_found_and_gives_the_same_answers() {
    let server = demo(&[]);
    for round in 0..2 {
        for (question, answer) in ABOUT_THE_PICTURE {
            assert_eq!(about(&server, &[PICTURE], question), Said::text(answer), "{question}");
        }
        let hits = server.metric("vllm:prefix_cache_hits_total");
        assert!(hits > f64::from(round), "{hits} tokens were found");
    }
}

#[test]
fn the_demo_model_has_a_name_and_says_that_it_is_used() {
    let server = demo(&[]);
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"].as_array().unwrap().len(), 1);
    assert_eq!(models["data"][0]["id"], "spark-tiny-vl");
    let log = server.wait_for_log("using the demo model spark-tiny-vl (AWQ) at");
    assert_eq!(log.matches("demo model").count(), 1, "{log}");
    let named = with(body(&[user(&[], "347 + 185")]), json!({"model": "spark-tiny-vl"}));
    let answer = server.ask(CHAT, &named);
    assert_eq!((&answer["model"], Said::whole(&answer)), (&json!("spark-tiny-vl"), Said::text("532")));
    assert_eq!(server.post(CHAT, &with(named, json!({"model": "gpt-4o"}))).status, 404);
}

/// Standard output of `generate` without MODEL, and its messages.
fn generate(arguments: &[&str]) -> (String, String) {
    let Output { status, stdout, stderr } =
        program(&["generate"]).args(SMALL).args(arguments).output().unwrap();
    let messages = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{messages}");
    (String::from_utf8(stdout).unwrap(), messages)
}

#[test]
fn generate_answers_without_a_model() {
    let picture = media_path(PICTURE).display().to_string();
    for (question, answer) in &ABOUT_THE_PICTURE[..3] {
        let (out, messages) = generate(&["--image", &picture, question]);
        assert_eq!(out, format!("{answer}\n"), "{question}");
        assert!(messages.contains("using the demo model spark-tiny-vl"), "{messages}");
    }
    let pair = ["demo-before.png", "demo-after.png"].map(|name| media_path(name).display().to_string());
    let (out, _) = generate(&["--image", &pair[0], "--image", &pair[1], "What changed?"]);
    assert_eq!(out, "The purple cross is now a star.\n");
    let (out, _) = generate(&["What is 347 + 185?"]);
    assert_eq!(out, "532\n");
}

#[test]
fn the_library_answers_too() {
    let model = find_demo_model().unwrap().display().to_string();
    let engine = EngineBuilder::new(model).threads(2).build().unwrap();
    let (question, expected) = ABOUT_THE_PICTURE[0];
    let answer = support::block_on(support::answer(&engine, body(&[user(&[PICTURE], question)])));
    assert_eq!(Said::whole(&answer), Said::text(expected));
}

/// A few held-out samples of every task: far too few to measure, enough to see that a task is broken.
#[test]
fn most_of_the_suite_is_right() {
    let Output { status, stdout, stderr } =
        program(&["eval", "--samples", "3", "--json"]).args(SMALL).output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let table = String::from_utf8(stdout).unwrap();
    let results = json_of(table.lines().last().unwrap());
    assert!(results["mean"].as_f64() > Some(0.9), "{table}");
}
