//! Structured output: which grammar a request's sequences get, where in the output it begins, and what is refused.

use std::sync::Arc;

use axum::Router;
use serde_json::{Value, json};
use spark_api::{ConstraintError, FinishReason, TokenConstraint};
use spark_server::{ApiKeys, HttpState, router};
use spark_text::ChatTemplate;

use crate::fake::{EOS, Fake, Script};
use crate::{chat, complete, front_end_of, ids, model_folder, tokenizer};

/// Opens a thinking block in the prompt, closes one, or leaves the choice to the model.
const THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n\
    {% if enable_thinking is defined %}{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}";

fn engine() -> Arc<Fake> {
    let script = Script::Tokens(vec![EOS], FinishReason::Eos);
    Fake::with_limits(script, |limits| limits.max_model_len = 4096)
}

fn server(engine: &Arc<Fake>, template: ChatTemplate) -> Router {
    let front_end = front_end_of(engine, tokenizer(), template, |_| {});
    router(HttpState { front_end, api_keys: ApiKeys::new(&[] as &[&str]), max_body_bytes: 1 << 20 })
}

/// The fixture model: it calls tools and does not think.
fn caller(engine: &Arc<Fake>) -> Router {
    server(engine, ChatTemplate::from_dir(&model_folder(), &tokenizer()).unwrap())
}

fn thinker(engine: &Arc<Fake>) -> Router {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), THINKING).unwrap();
    server(engine, ChatTemplate::from_dir(folder.path(), &tokenizer()).unwrap())
}

fn ask(extra: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
    extra.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
    body
}

/// How much of `text` the constraint of request `index` lets through, and whether the output may end behind it.
fn let_through(engine: &Fake, index: usize, text: &str) -> (usize, bool) {
    let mut requests = engine.requests.lock().unwrap();
    let constraint = requests[index].constraint.as_mut().expect("the request has a constraint");
    let (mut num_bytes, mut is_complete) = (0, false);
    let mask = |constraint: &mut Box<dyn TokenConstraint>| {
        let mut allowed = vec![u32::MAX; 9];
        constraint.mask(&mut allowed).unwrap();
        move |id: u32| allowed[id as usize / 32] >> (id % 32) & 1 == 1
    };
    for id in ids(text) {
        if is_complete || !mask(constraint)(id) {
            return (num_bytes, false);
        }
        is_complete = constraint.commit(id).unwrap();
        num_bytes += tokenizer().token_bytes(id).len();
    }
    (num_bytes, is_complete || mask(constraint)(EOS))
}

/// Asks for one answer and says whether its constraint accepts exactly `text`.
async fn accepts(server: fn(&Arc<Fake>) -> Router, extra: &Value, text: &str) -> bool {
    let engine = engine();
    let (status, answer) = chat(&server(&engine), ask(extra)).await;
    assert_eq!(status, 200, "{answer}");
    let_through(&engine, 0, text) == (text.len(), true)
}

fn person() -> Value {
    let schema = json!({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"],
        "additionalProperties": false});
    json!({"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": true}})
}

fn tools(strict: bool) -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": false});
    json!([{"type": "function", "function": {"name": "weather", "parameters": parameters, "strict": strict}}])
}

const CALL: &str = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";
const ODD_CALL: &str =
    "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"town\": \"Oslo\"}}\n</tool_call>";

#[tokio::test]
async fn each_field_holds_the_answer_to_its_form() {
    for (extra, good, bad) in [
        (json!({"response_format": person()}), "{\"name\": \"Ö\"}", "{\"nome\": \"Ö\"}"),
        (json!({"response_format": {"type": "json_object"}}), "{\"a\": [1]}", "[1]"),
        (json!({"structured_outputs": {"regex": "[a-c]+x"}}), "abcx", "abcd"),
        (json!({"structured_outputs": {"choice": ["yes", "no"]}}), "no", "nope"),
        (json!({"structured_outputs": {"grammar": "root ::= \"a\" | \"(\" root \")\""}}), "((a))", "((a)"),
        (json!({"structured_outputs": {"grammar": "start: \"a\" start | \"b\""}}), "aab", "aa"),
        (json!({"structured_outputs": {"json": {"type": "integer"}}}), "12", "1x"),
        (
            json!({"response_format": {"type": "structural_tag", "triggers": ["<f>"],
            "structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}]}}),
            "so <f>1</f>!",
            "so <f>a</f>",
        ),
    ] {
        assert!(accepts(caller, &extra, good).await, "{extra} {good}");
        assert!(!accepts(caller, &extra, bad).await, "{extra} {bad}");
    }
}

#[tokio::test]
async fn choices_and_prompts_have_constraints_of_their_own() {
    let engine = engine();
    let body = json!({"prompt": ["a", "b"], "n": 2, "structured_outputs": {"choice": ["yes", "no"]}});
    let (status, answer) = complete(&caller(&engine), body).await;
    assert_eq!((status, answer["choices"].as_array().unwrap().len()), (200, 4));
    for (index, text) in ["yes", "no", "no", "yes"].into_iter().enumerate() {
        assert_eq!(let_through(&engine, index, text), (text.len(), true));
    }
    let (status, _) = chat(&caller(&engine), ask(&json!({"response_format": {"type": "text"}}))).await;
    assert!(status == 200 && engine.last(|request| request.constraint.is_none()));
}

#[tokio::test]
async fn the_grammar_begins_behind_the_thoughts() {
    let thoughts = "Hm, {\"nome\"?</think>\n\n{\"name\": \"Ö\"}";
    let answer = "{\"name\": \"Ö\"}";
    let with = |kwargs: Value| json!({"response_format": person(), "chat_template_kwargs": kwargs});
    let [on, off, open] =
        [json!({"enable_thinking": true}), json!({"enable_thinking": false}), json!({})].map(with);
    assert!(accepts(thinker, &on, thoughts).await);
    assert!(!accepts(thinker, &on, answer).await, "the thoughts have not ended");
    assert!(!accepts(thinker, &on, "Hm.</think>\n\nWell: {}").await);
    assert!(accepts(thinker, &off, answer).await);
    assert!(!accepts(thinker, &off, thoughts).await);
    assert!(accepts(thinker, &open, answer).await);
    assert!(accepts(thinker, &open, &format!("<think>{thoughts}")).await);
    assert!(!accepts(thinker, &open, thoughts).await);
}

#[tokio::test]
async fn tools_are_forced_held_to_their_schemas_or_left_free() {
    let two = format!("{CALL}\n{CALL}");
    let text = format!("Well: {CALL}");
    let json = "{\"name\": \"Ö\"}";
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (extra, good, bad) in [
        (
            json!({"tools": tools(false), "tool_choice": "required"}),
            vec![CALL, &two],
            vec![ODD_CALL, "Hi", &text],
        ),
        (
            json!({"tools": tools(false), "tool_choice": "required", "parallel_tool_calls": false}),
            vec![CALL],
            vec![&two],
        ),
        (json!({"tools": tools(false), "tool_choice": named}), vec![CALL], vec![ODD_CALL, &two, "Hi"]),
        (json!({"tools": tools(true)}), vec![CALL, "Hi", &text], vec![ODD_CALL]),
        (json!({"tools": tools(false), "response_format": person()}), vec![CALL, json], vec![ODD_CALL, "Hi"]),
        (
            json!({"tools": tools(true), "tool_choice": "none", "response_format": person()}),
            vec![json],
            vec![CALL, "Hi"],
        ),
    ] {
        for text in good {
            assert!(accepts(caller, &extra, text).await, "{extra} {text}");
        }
        for text in bad {
            assert!(!accepts(caller, &extra, text).await, "{extra} {text}");
        }
    }
    let engine = engine();
    chat(&caller(&engine), ask(&json!({"tools": tools(false)}))).await;
    assert!(engine.last(|request| request.constraint.is_none()), "auto without strict is free text");
}

#[tokio::test]
async fn a_bad_grammar_is_refused_with_its_place() {
    let odd = json!([{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}, "strict": true}}]);
    for (extra, param, message) in [
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"items": {"not": {}}}}}}),
            "response_format",
            "response_format: the JSON schema at #/items/not: the keyword `not` is not supported",
        ),
        (
            json!({"structured_outputs": {"regex": "(a"}}),
            "structured_outputs",
            "structured_outputs: the regex: regex parse error",
        ),
        (
            json!({"structured_outputs": {"grammar": "root ::= a"}}),
            "structured_outputs",
            "the rule `a` is used",
        ),
        (json!({"structured_outputs": {"choice": []}}), "structured_outputs", "has 0 texts"),
        (json!({"tools": odd}), "tools", "tools: tools[0].function.parameters at #/properties/a/not"),
    ] {
        let engine = engine();
        let (status, answer) = chat(&caller(&engine), ask(&extra)).await;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{answer}");
        assert!(
            answer["error"]["message"].as_str().unwrap().starts_with(message)
                || answer["error"]["message"].as_str().unwrap().contains(message),
            "{answer}"
        );
        assert_eq!(engine.num_requests(), 0);
    }
}

#[tokio::test]
async fn a_grammar_that_fails_on_the_way_is_the_requests_error() {
    let reason = || FinishReason::ConstraintFailed(ConstraintError("too many items".into()));
    let engine = Fake::new(Script::Tokens(ids("{"), reason()));
    let (status, answer) =
        chat(&caller(&engine), ask(&json!({"response_format": {"type": "json_object"}}))).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("response_format")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("too many items"), "{answer}");
}

/// A second request with the same grammar is answered from memory: it gets a constraint that starts anew.
#[tokio::test]
async fn a_grammar_is_remembered() {
    let engine = engine();
    let server = caller(&engine);
    for index in 0..3 {
        chat(&server, ask(&json!({"structured_outputs": {"choice": ["yes", "no"]}}))).await;
        assert_eq!(let_through(&engine, index, "yes"), (3, true));
    }
}
