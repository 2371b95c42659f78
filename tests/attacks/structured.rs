//! Groups 14 to 16: grammars and tools that ask too much, and outputs that are cut. How each of the hostile grammars compiles is
//! tested beside the compiler; here they come through the door.

use serde_json::{Value, json};

use super::{chat, completion, post, survives};
use crate::server::{CHAT, COMPLETIONS, with};

#[expect(clippy::needless_pass_by_value, reason = "every caller has just made it")]
fn schema(schema: Value) -> Value {
    json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": true}}})
}

fn objects(count: usize, value: &Value) -> Value {
    let properties: serde_json::Map<_, _> = (0..count).map(|i| (format!("p{i}"), value.clone())).collect();
    json!({"type": "object", "properties": properties, "additionalProperties": false})
}

/// Schemas, expressions and grammars that blow up a naive compiler.
fn hostile() -> Vec<(&'static str, Value)> {
    let deep = (0..100)
        .fold(json!({"type": "integer"}), |inner, _| json!({"type": "object", "properties": {"a": inner}}));
    let names: Vec<String> = (0..50_000).map(|i| format!("name {i}")).collect();
    let both = |i: usize| json!({"anyOf": [{"properties": {format!("a{i}"): {"type": "integer"}}}, {"properties": {format!("b{i}"): {"type": "string"}}}]});
    let choice = |i: usize| json!({"type": "object", "properties": {format!("k{i}"): {"const": i}}});
    let regex = |text: String| json!({"structured_outputs": {"regex": text}});
    let grammar = |text: String| json!({"structured_outputs": {"grammar": text}});
    vec![
        ("100 objects deep", schema(deep)),
        ("5,000 optional numbers", schema(objects(5000, &json!({"type": "integer"})))),
        ("200 optional texts", schema(objects(200, &json!({"type": "string", "maxLength": 50})))),
        ("50,000 names", schema(json!({"enum": names}))),
        ("2,000 choices", schema(json!({"anyOf": (0..2000).map(choice).collect::<Vec<_>>()}))),
        (
            "18 choices of two at once",
            schema(json!({"type": "object", "allOf": (0..18).map(both).collect::<Vec<_>>()})),
        ),
        ("a schema that is itself", schema(json!({"$ref": "#"}))),
        (
            "two that are each other",
            schema(
                json!({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}),
            ),
        ),
        (
            "a million items",
            schema(
                json!({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000, "maxItems": 2_000_000}),
            ),
        ),
        (
            "a text of a million",
            schema(json!({"type": "string", "minLength": 1_000_000, "maxLength": 1_000_000_000})),
        ),
        (
            "nested repeats",
            schema(json!({"type": "string", "pattern": "^((((a{0,100}){0,100}){0,100}){0,100})$"})),
        ),
        ("no expression", schema(json!({"type": "string", "pattern": "(["}))),
        ("looking back", schema(json!({"type": "string", "pattern": "^(?=a)(b)\\1$"}))),
        ("no type", schema(json!({"type": "smell"}))),
        (
            "a large range of sevens",
            schema(json!({"type": "integer", "minimum": -1e18, "maximum": 1e18, "multipleOf": 7})),
        ),
        ("multiples of nearly nothing", schema(json!({"type": "number", "multipleOf": 1e-300}))),
        ("60,000 brackets", regex("(".repeat(60_000) + "a" + &")".repeat(60_000))),
        ("repeats of repeats", regex("((a{0,1000}){0,1000}){0,1000}".to_owned())),
        (
            "1,500 words under a star",
            regex(format!("({})*", (0..1500).map(|i| format!("w{i}")).collect::<Vec<_>>().join("|"))),
        ),
        ("pluses of pluses", regex("((((a+)+)+)+)+b".to_owned())),
        ("any and 200", regex(".*a.{200}".to_owned())),
        ("letters of letters", regex("((\\w{1,50}\\s){1,50}){1,50}".to_owned())),
        ("left and ambiguous", grammar("start: e\ne: e e | e \"+\" e | \"a\" | ".to_owned())),
        (
            "60,000 brackets in a grammar",
            grammar(format!("start: {}\"a\"{}", "(".repeat(60_000), ")".repeat(60_000))),
        ),
    ]
}

#[test]
fn group_14_grammars_that_ask_too_much() {
    survives(&[], |server| {
        for (name, extra) in hostile() {
            let status = post(server, CHAT, name, with(chat("seed", json!(1)), extra).to_string().as_bytes());
            assert!(matches!(status, 200 | 400), "{name}: {status}");
        }
        let raw = format!(
            r#"{{"prompt": "x", "structured_outputs": {{"json": {}1{}}}}}"#,
            "[".repeat(5000),
            "]".repeat(5000)
        );
        assert_eq!(post(server, COMPLETIONS, "5,000 deep", raw.as_bytes()), 400);
    });
}

#[test]
fn group_15_tools_that_ask_too_much() {
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters, "strict": true}});
    let object = json!({"type": "object"});
    survives(&[], |server| {
        let many: Vec<Value> = (0..10_000).map(|i| tool(&format!("f{i}"), object.clone())).collect();
        for (name, extra) in [
            ("10,000 tools", json!({"tools": many})),
            ("no tools and a choice", json!({"tools": [], "tool_choice": "required"})),
            (
                "a tool that is not there",
                json!({"tools": [tool("f", object.clone())], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
            ),
            (
                "a pattern that is none",
                json!({"tools": [tool("f", json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "(["}}}))], "tool_choice": "required"}),
            ),
            (
                "a type that is none",
                json!({"tools": [tool("f", json!({"type": "smell"}))], "tool_choice": "required"}),
            ),
            ("a circle", json!({"tools": [tool("f", json!({"$ref": "#"}))], "tool_choice": "required"})),
            ("another alphabet", json!({"tools": [tool("погода", object.clone())]})),
            ("a number for a tool", json!({"tools": [7]})),
            ("parameters of another type", json!({"tools": [tool("f", json!([1]))]})),
        ] {
            let status = post(server, CHAT, name, with(chat("seed", json!(1)), extra).to_string().as_bytes());
            assert!(matches!(status, 200 | 400), "{name}: {status}");
        }
    });
}

#[test]
fn group_16_an_output_that_is_cut_says_so() {
    survives(&[], |server| {
        let text = json!({"type": "object", "properties": {"a": {"type": "string", "minLength": 40}}, "required": ["a"], "additionalProperties": false});
        let whole = json!({"structured_outputs": {"json": text}, "max_tokens": 8});
        let answer = server.ask(COMPLETIONS, &with(completion("seed", json!(1)), whole));
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "length", "{answer}");
        assert!(serde_json::from_str::<Value>(choice["text"].as_str().unwrap()).is_err(), "{answer}");
    });
}
