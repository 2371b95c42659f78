//! Tool calls and reasoning: from a request's tools to the prompt, from the model's text to the parts of the answer.

use std::sync::Arc;

use axum::Router;
use proptest::prelude::*;
use serde_json::{Value, json};
use spark_api::FinishReason;
use spark_server::{ApiKeys, HttpState, Options, ReasoningParser, ToolCallParser, router};
use spark_text::{ChatTemplate, Tokenizer, ToolFormat};

use crate::fake::{EOS, Fake, Script};
use crate::{chat, chunks, front_end_of, ids, model_folder, tokenizer};

const PATH: &str = "/v1/chat/completions";
pub(crate) const CALL: &str =
    "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>";
const ARGUMENTS: &str = "{\"city\": \"Köln\"}";

/// A thinking model: opens the block in the prompt, unless the request switches that off.
const THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
    {% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}\
    {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\
    {% if enable_thinking is defined %}{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}";

pub(crate) fn roomy(script: Script) -> Arc<Fake> {
    Fake::with_limits(script, |limits| limits.max_model_len = 4096)
}

pub(crate) fn says(text: &str) -> Arc<Fake> {
    let tokens = [ids(text), vec![EOS]].concat();
    roomy(Script::Tokens(tokens, FinishReason::Eos))
}

fn template(source: &str, tokenizer: &Tokenizer) -> ChatTemplate {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), source).unwrap();
    ChatTemplate::from_dir(folder.path(), tokenizer).unwrap()
}

fn serve(engine: &Arc<Fake>, template: ChatTemplate, change: impl FnOnce(&mut Options)) -> Router {
    let front_end = front_end_of(engine, tokenizer(), template, change);
    router(HttpState { front_end, api_keys: ApiKeys::new(&[] as &[&str]), max_body_bytes: 1 << 20 })
}

/// A server of the fixture model, which calls tools and does not think.
pub(crate) fn caller(engine: &Arc<Fake>) -> Router {
    let template = ChatTemplate::from_dir(&model_folder(), &tokenizer()).unwrap();
    serve(engine, template, |_| {})
}

/// A server of a model that thinks and calls tools.
pub(crate) fn thinker(engine: &Arc<Fake>) -> Router {
    serve(engine, template(THINKING, &tokenizer()), |_| {})
}

fn weather() -> Value {
    json!([{"type": "function", "function": {"name": "get_weather", "description": "Looks out.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}])
}

fn ask(extra: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Rain?"}], "tools": weather()});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

async fn choice(server: &Router, extra: &Value) -> Value {
    let (status, answer) = chat(server, ask(extra)).await;
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0].clone()
}

/// Joins the deltas of a streamed choice as clients do, and checks their form.
fn join(chunks: &[Value]) -> Value {
    let mut message = json!({"role": "assistant", "content": null});
    let mut calls: Vec<Value> = Vec::new();
    let mut finish = Value::Null;
    let append = |target: &mut Value, text: &Value| {
        if let Some(text) = text.as_str() {
            *target = json!(format!("{}{text}", target.as_str().unwrap_or_default()));
        }
    };
    for chunk in chunks {
        let choice = &chunk["choices"][0];
        assert!(finish.is_null(), "nothing follows the end");
        finish = choice["finish_reason"].clone();
        let delta = &choice["delta"];
        for name in ["content", "reasoning", "reasoning_content"] {
            append(&mut message[name], &delta[name]);
        }
        for entry in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = entry["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                assert_eq!(
                    (&entry["type"], &entry["function"]["arguments"]),
                    (&json!("function"), &json!(""))
                );
                assert!(entry["id"].is_string() && entry["function"]["name"].is_string());
                let mut call = entry.clone();
                call.as_object_mut().unwrap().remove("index");
                calls.push(call);
            } else {
                assert_eq!(index + 1, calls.len(), "calls come one after the other");
                assert_eq!(entry.as_object().unwrap().len(), 2, "an index and arguments: {entry}");
                append(&mut calls[index]["function"]["arguments"], &entry["function"]["arguments"]);
            }
        }
    }
    for name in ["reasoning", "reasoning_content"] {
        if message[name].is_null() {
            message.as_object_mut().unwrap().remove(name);
        }
    }
    if !calls.is_empty() {
        message["tool_calls"] = json!(calls);
    }
    json!({"message": message, "finish_reason": finish})
}

/// Calls have new ids in every answer.
fn without_ids(mut choice: Value) -> Value {
    for call in choice["message"]["tool_calls"].as_array_mut().into_iter().flatten() {
        assert!(call["id"].take().as_str().unwrap().starts_with("call_"));
    }
    // The first delta of a stream has an empty content, which says the same.
    if choice["message"]["content"] == "" {
        choice["message"]["content"] = Value::Null;
    }
    json!({"message": choice["message"], "finish_reason": choice["finish_reason"]})
}

#[tokio::test]
async fn a_call_has_the_documented_shape() {
    let engine = says(CALL);
    let mut choice = choice(&caller(&engine), &json!({})).await;
    let id = choice["message"]["tool_calls"][0]["id"].take();
    assert!(id.as_str().unwrap().len() > 20);
    let call =
        json!({"id": null, "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}});
    let expected = json!({
        "index": 0,
        "message": {"role": "assistant", "content": null, "tool_calls": [call]},
        "logprobs": null,
        "finish_reason": "tool_calls",
        "stop_reason": null,
        "token_ids": null,
    });
    assert_eq!(choice, expected);
    let prompt = tokenizer().decode(&engine.last(|request| request.prompt.clone()), false);
    assert!(prompt.contains("Looks out.") && prompt.contains("<tools>"), "{prompt}");
}

#[tokio::test]
async fn a_call_is_streamed_name_first_and_then_its_arguments() {
    let got = chunks(&caller(&says(CALL)), PATH, ask(&json!({"stream": true}))).await;
    let deltas: Vec<_> = got.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
    assert_eq!(*deltas[0], json!({"role": "assistant", "content": ""}));
    let mut first = deltas[1]["tool_calls"][0].clone();
    assert!(first["id"].take().is_string());
    let start = json!({"index": 0, "id": null, "type": "function", "function": {"name": "get_weather", "arguments": ""}});
    assert_eq!(first, start);
    assert_eq!(*deltas[2], json!({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}));
    assert_eq!(*deltas[3], json!({"tool_calls": [{"index": 0, "function": {"arguments": "\""}}]}));
    assert_eq!(got.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(join(&got)["message"]["tool_calls"][0]["function"]["arguments"], ARGUMENTS);
}

#[tokio::test]
async fn text_and_several_calls_keep_their_places() {
    let text = format!("I look.\n{CALL}\n{CALL}");
    let both = choice(&caller(&says(&text)), &json!({})).await;
    let message = &both["message"];
    assert_eq!(
        (&message["content"], message["tool_calls"].as_array().unwrap().len()),
        (&json!("I look."), 2)
    );
    assert_ne!(message["tool_calls"][0]["id"], message["tool_calls"][1]["id"]);

    let one = choice(&caller(&says(&text)), &json!({"parallel_tool_calls": false})).await;
    assert_eq!(one["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(one["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn what_is_no_call_is_content() {
    for text in [
        "<tool_call>\n{\"name\": 5}\n</tool_call>",
        "<tool_call>\nnot json\n</tool_call>",
        "<tool_call>{\"na",
        "Plain.",
    ] {
        let choice = choice(&caller(&says(text)), &json!({})).await;
        assert_eq!(choice["message"], json!({"role": "assistant", "content": text}));
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn a_call_that_is_cut_or_broken_shows_what_there_is() {
    let cut = choice(&caller(&says(CALL)), &json!({"max_tokens": ids(CALL).len() - 6})).await;
    assert_eq!(cut["finish_reason"], "length");
    let arguments = cut["message"]["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
    assert!(ARGUMENTS.starts_with(arguments) && arguments.len() > 5 && arguments != ARGUMENTS, "{arguments}");

    let broken = CALL.replace("\"Köln\"", "");
    let broken = choice(&caller(&says(&broken)), &json!({})).await;
    assert_eq!(broken["message"]["tool_calls"][0]["function"]["arguments"], "{\"city\": }}\n");
}

#[tokio::test]
async fn without_tools_calls_are_text() {
    for extra in [json!({"tools": null}), json!({"tools": []}), json!({"tool_choice": "none"})] {
        let engine = says(CALL);
        let choice = choice(&caller(&engine), &extra).await;
        assert_eq!(
            (&choice["message"]["content"], &choice["finish_reason"]),
            (&json!(CALL), &json!("stop")),
            "{extra}"
        );
        let prompt = tokenizer().decode(&engine.last(|request| request.prompt.clone()), false);
        assert!(!prompt.contains("get_weather"), "the model is shown no tools: {prompt}");
    }
}

#[tokio::test]
async fn flags_choose_the_parsers() {
    let fixture = || ChatTemplate::from_dir(&model_folder(), &tokenizer()).unwrap();
    let xml = "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call>";
    let format =
        |format| move |options: &mut Options| options.tool_call_parser = ToolCallParser::Format(format);
    let got = choice(&serve(&says(xml), fixture(), format(ToolFormat::Xml)), &json!({})).await;
    assert_eq!(
        got["message"]["tool_calls"][0]["function"],
        json!({"name": "get_weather", "arguments": ARGUMENTS})
    );
    let qwen = format!("{THINKING}{{# <function= #}}");
    let got = choice(&serve(&says(xml), template(&qwen, &tokenizer()), |_| {}), &json!({})).await;
    assert_eq!(got["message"]["tool_calls"][0]["function"]["arguments"], ARGUMENTS);

    let off = serve(&says("x"), fixture(), |options| options.tool_call_parser = ToolCallParser::None);
    let (status, error) = chat(&off, ask(&json!({}))).await;
    assert_eq!((status, &error["error"]["param"]), (400, &json!("tools")));

    let thought = "<think>\nhm\n</think>\n\nYes.";
    let raw = serve(&says(thought), template(THINKING, &tokenizer()), |options| {
        options.reasoning_parser = ReasoningParser::None;
    });
    assert_eq!(choice(&raw, &json!({})).await["message"]["content"], thought);
    let forced =
        serve(&says(thought), fixture(), |options| options.reasoning_parser = ReasoningParser::Qwen3);
    assert_eq!(choice(&forced, &json!({})).await["message"]["reasoning"], "hm");
    assert_eq!(choice(&caller(&says(thought)), &json!({})).await["message"]["content"], thought);
}

#[tokio::test]
async fn reasoning_is_apart_from_content_and_counted() {
    let inside = json!({"chat_template_kwargs": {"enable_thinking": true}, "tools": null});
    let off = json!({"chat_template_kwargs": {"enable_thinking": false}, "tools": null});
    let message = |reasoning: &str| json!({"role": "assistant", "content": "Yes.", "reasoning": reasoning, "reasoning_content": reasoning});
    for (text, extra, expected, count) in [
        ("hm <think>\n</think>\n\nYes.", &inside, message("hm <think>"), 4 + 1),
        ("<think>\nhm\n</think>\n\nYes.", &json!({"tools": null}), message("hm"), 4),
        ("Yes.", &off, json!({"role": "assistant", "content": "Yes."}), 0),
        ("Yes.", &json!({"tools": null}), json!({"role": "assistant", "content": "Yes."}), 0),
    ] {
        let (_, answer) = chat(&thinker(&says(text)), ask(extra)).await;
        assert_eq!(answer["choices"][0]["message"], expected);
        assert_eq!(
            answer["usage"]["completion_tokens_details"],
            json!({"reasoning_tokens": count}),
            "{text}"
        );
    }
    let hidden = json!({"include_reasoning": false, "chat_template_kwargs": {"enable_thinking": true}});
    let choice_of = choice(&thinker(&says("hm</think>Yes.")), &hidden).await;
    assert_eq!(choice_of["message"], json!({"role": "assistant", "content": "Yes."}));

    let cut = json!({"max_tokens": 2, "chat_template_kwargs": {"enable_thinking": true}});
    let cut = choice(&thinker(&says("hm</think>Yes.")), &cut).await;
    assert_eq!((&cut["message"]["content"], &cut["message"]["reasoning"]), (&Value::Null, &json!("hm")));
    assert_eq!(cut["finish_reason"], "length");
}

#[tokio::test]
async fn a_thinking_model_calls_tools_after_it_has_thought() {
    let engine = says(&format!("hm\n</think>\n\n{CALL}"));
    let inside = json!({"chat_template_kwargs": {"enable_thinking": true}});
    let choice = choice(&thinker(&engine), &inside).await;
    assert_eq!(
        (&choice["message"]["reasoning"], &choice["message"]["content"]),
        (&json!("hm"), &Value::Null)
    );
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["arguments"], ARGUMENTS);
    assert_eq!(choice["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn a_final_message_can_be_continued_inside_its_reasoning() {
    let messages =
        json!([{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>\nfirst,"}]);
    let body = json!({"messages": messages, "continue_final_message": true});
    let (_, answer) = chat(&thinker(&says(" then\n</think>\nYes.")), body).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["reasoning"], &message["content"]), (&json!("then"), &json!("Yes.")));
}

#[tokio::test]
async fn calls_and_their_results_are_rendered() {
    let engine = says("Wet.");
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}});
    let messages = json!([
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]);
    assert_eq!(chat(&caller(&engine), json!({"messages": messages, "tools": weather()})).await.0, 200);
    let prompt = tokenizer().decode(&engine.last(|request| request.prompt.clone()), false);
    let turns = format!(
        "<|im_start|>assistant\n{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n</tool_response>"
    );
    assert!(prompt.contains(&turns), "{prompt}");
}

#[tokio::test]
async fn markers_may_be_special_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::read_to_string(model_folder().join("tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&file).unwrap();
    for token in json["added_tokens"].as_array_mut().unwrap() {
        token["special"] = json!(true);
    }
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Arc::new(Tokenizer::from_dir(folder.path()).unwrap());
    let template = template(THINKING, &tokenizer);
    let engine = says(&format!("<think>hm</think><|fim_pad|>{CALL}"));
    let front_end = front_end_of(&engine, tokenizer, template, |_| {});
    let (_, answer) = front_end.handle(PATH, ask(&json!({}))).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["reasoning"], &message["content"]), (&json!("hm"), &Value::Null));
    assert_eq!(message["tool_calls"][0]["function"]["arguments"], ARGUMENTS);
}

#[tokio::test]
async fn log_probabilities_and_ids_are_those_of_all_tokens() {
    let text = format!("<think>hm</think>So: {CALL}");
    let extra = json!({"logprobs": true, "return_token_ids": true});
    let whole = choice(&thinker(&says(&text)), &extra).await;
    let streamed = json!({"logprobs": true, "return_token_ids": true, "stream": true});
    let got = chunks(&thinker(&says(&text)), PATH, ask(&streamed)).await;
    let all = |pointer: &str| -> Vec<Value> {
        got.iter().filter_map(|chunk| chunk.pointer(pointer)?.as_array()).flatten().cloned().collect()
    };
    assert_eq!(json!(all("/choices/0/token_ids")), whole["token_ids"]);
    assert_eq!(json!(all("/choices/0/logprobs/content")), whole["logprobs"]["content"]);
}

#[tokio::test]
async fn bad_tools_are_refused_by_place() {
    for (extra, param, rule) in [
        (json!({"tools": [{"type": "function"}]}), "tools", "tools[0].function"),
        (json!({"tool_choice": "required", "tools": null}), "tool_choice", "there are no tools"),
        (
            json!({"tool_choice": {"type": "function", "function": {"name": "g"}}}),
            "tool_choice",
            "not among the tools",
        ),
        (json!({"parallel_tool_calls": "no"}), "parallel_tool_calls", "a boolean"),
        (json!({"include_reasoning": 1}), "include_reasoning", "a boolean"),
        (json!({"thinking_token_budget": 10}), "thinking_token_budget", "does not think"),
    ] {
        let (status, error) = chat(&caller(&says("x")), ask(&extra)).await;
        assert_eq!((status, &error["error"]["param"]), (400, &json!(param)));
        assert!(error["error"]["message"].as_str().unwrap().contains(rule), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Where the tokens are cut (through markers too) and whether the answer is streamed changes nothing.
    #[test]
    fn a_stream_is_the_whole_answer_however_it_is_cut(
        pieces in proptest::collection::vec(prop::sample::select(vec![
            CALL, "<tool_call>{\"name\": \"f\"}", "<think>", "</think>", "<tool_call>", "</tool_call>", "{\"name\": \"f\", \"arguments\": {", "}", "\n", "Köln ", "\"",
        ]), 0..6),
        cuts in proptest::collection::vec(any::<usize>(), 0..6),
        is_inside in any::<bool>(),
    ) {
        let text = pieces.concat();
        let mut places: Vec<usize> = cuts.iter().map(|cut| text.floor_char_boundary(cut % (text.len() + 1))).collect();
        places.extend([0, text.len()]);
        places.sort_unstable();
        let tokens = places.windows(2).flat_map(|pair| ids(&text[pair[0]..pair[1]])).chain([EOS]).collect();
        let cut = roomy(Script::Tokens(tokens, FinishReason::Eos));
        let kwargs = json!({"chat_template_kwargs": {"enable_thinking": is_inside}});
        let mut streamed = kwargs.clone();
        streamed["stream"] = json!(true);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (whole, got) = runtime.block_on(async {
            (choice(&thinker(&says(&text)), &kwargs).await, chunks(&thinker(&cut), PATH, ask(&streamed)).await)
        });
        prop_assert_eq!(without_ids(join(&got)), without_ids(whole));
    }
}
