//! Input that is meant to break things: templates, checkpoints, arguments. Each is an error, none a crash.

use std::fs;

use serde_json::{Map, Value, json};
use spark_text::{RenderInput, TextError, Tokenizer};

use crate::{checkpoint, template};

fn render(source: &str, kwargs: &Value) -> Result<usize, TextError> {
    let messages = json!([{"role": "user", "content": "a|b"}]);
    let kwargs = kwargs.as_object().unwrap();
    let input = RenderInput { messages: &messages, tools: None, kwargs, add_generation_prompt: true };
    Ok(template(source)?.render(input)?.len())
}

#[test]
fn templates_that_do_not_end_are_stopped() {
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
        "{% for i in range(1000000000) %}{% endfor %}",
    ] {
        let error = render(source, &json!({})).unwrap_err();
        assert!(
            matches!(&error, TextError::Template { .. }) && error.is_request_error(),
            "{source}: {error}"
        );
    }
    let long = "{% set x = 'y' * 1000000 %}{% for i in range(100) %}{{ x }}{% endfor %}";
    let error = render(long, &json!({})).unwrap_err();
    assert!(matches!(error, TextError::RenderedTooLong { .. } | TextError::Template { .. }), "{error}");
}

#[test]
fn templates_that_overflow_a_parser_are_refused_or_work() {
    let nested =
        |open: &str, close: &str, n: usize| format!("{{{{ {}1{} }}}}", open.repeat(n), close.repeat(n));
    for source in [
        nested("(", ")", 50_000),
        nested("[", "]", 50_000),
        nested("-", "", 50_000),
        nested("not ", "", 50_000),
        nested("1", "|abs", 50_000),
        nested("1", "+1", 100_000),
        format!("{}{}", "{% if 1 %}".repeat(10_000), "{% endif %}".repeat(10_000)),
    ] {
        // Which of the two it is depends on the engine's own limits; a crash would end this process.
        let outcome = render(&source, &json!({}));
        assert!(outcome.as_ref().is_ok_and(|&n| n <= 1) || outcome.is_err(), "{}", &source[..40]);
    }
    let error = template(&"x".repeat(300 << 10)).err().unwrap();
    assert!(matches!(error, TextError::Checkpoint { .. }) && !error.is_request_error());
}

#[test]
fn errors_say_what_the_template_says() {
    let error =
        render("{{ raise_exception('No ' ~ messages[0].content ~ ' here') }}", &json!({})).unwrap_err();
    assert_eq!(error.to_string(), "the chat template refused the conversation: No a|b here");
    let error = render("{{ messages[0].content.nothing.more }}", &json!({})).unwrap_err();
    assert!(matches!(error, TextError::Template { .. }), "{error}");
    for source in ["{% if %}", "{{ 1", "{% endfor %}"] {
        assert!(matches!(template(source).err(), Some(TextError::Checkpoint { .. })), "{source}");
    }
}

#[test]
fn reserved_arguments_are_refused() {
    for name in [
        "messages",
        "tools",
        "add_generation_prompt",
        "tokenize",
        "chat_template",
        "bos_token",
        "raise_exception",
    ] {
        let mut kwargs = Map::new();
        kwargs.insert(name.into(), json!("x"));
        let error = render("x", &Value::Object(kwargs)).unwrap_err();
        assert!(matches!(&error, TextError::ReservedArgument { name: got } if got == name), "{error}");
    }
    assert_eq!(render("{{ enable_thinking }}", &json!({"enable_thinking": false})).unwrap(), 1);
}

#[test]
fn broken_checkpoints_are_errors() {
    let dir = checkpoint("merges", &[]);
    let path = dir.path().join("tokenizer.json");
    let good: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let load = |text: &str| {
        fs::write(&path, text).unwrap();
        Tokenizer::from_dir(dir.path()).err().map(|error| error.to_string())
    };
    let changed = |pointer: &str, value: Value| {
        let mut json = good.clone();
        *json.pointer_mut(pointer).unwrap() = value;
        load(&json.to_string()).unwrap_or_else(|| panic!("{pointer} was accepted"))
    };
    assert!(changed("/added_tokens/0/id", json!(4_294_967_295_u32)).contains("4294967295 is over 4194304"));
    assert!(changed("/added_tokens/0/id", json!(-1)).contains("no id"));
    assert!(changed("/model/vocab", json!({"a": 1e12})).contains("no id"));
    assert!(changed("/model/vocab", json!([["a", 0.0]])).contains("not a table"));
    assert!(changed("/decoder/type", json!("Metaspace")).contains("byte-level"));
    changed("/model/merges", json!([["no", "such"]]));
    changed("/model/type", json!("Unigram"));
    changed("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!("(unclosed"));
    assert!(load("{").is_some_and(|error| error.contains("tokenizer.json")));
    assert!(load(&"[".repeat(100_000)).is_some());
    assert_eq!(load(&good.to_string()), None);

    for decoder in [json!({"x": {"content": "a"}}), json!({"3": {}}), json!({"1256": {"content": "other"}})] {
        fs::write(
            dir.path().join("tokenizer_config.json"),
            json!({"added_tokens_decoder": decoder}).to_string(),
        )
        .unwrap();
        assert!(Tokenizer::from_dir(dir.path()).is_err());
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(Tokenizer::from_dir(dir.path()).err(), Some(TextError::Io { .. })));
}
