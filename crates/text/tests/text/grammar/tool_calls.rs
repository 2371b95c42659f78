//! Tool calls as a grammar, in both formats, and what the parser makes of them.

use std::sync::Arc;

use serde_json::{Value, json};
use spark_text::{
    AnswerOptions, Grammar, GrammarStart, ToolCalls, ToolFormat, ToolFunction, ToolMode, parse_answer,
};

use super::walk::{EOS, Walk, accepts, compile, generate_towards, refusal, schema};

fn function(name: &str, parameters: Value, strict: bool) -> ToolFunction {
    ToolFunction { name: name.into(), parameters, strict, place: format!("tools[{name}].function") }
}

fn weather() -> ToolFunction {
    let unit = json!({"type": "string", "enum": ["celsius", "fahrenheit"]});
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}, "unit": unit, "days": {"type": "integer"}},
        "required": ["city"], "additionalProperties": false});
    function("weather", parameters, true)
}

fn calls(format: ToolFormat, mode: ToolMode) -> Grammar {
    let functions = vec![weather(), function("now", Value::Null, false)];
    Grammar::ToolCalls(ToolCalls { format, functions, mode })
}

const OSLO: &str = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";
const NOW: &str = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
const ODD: &str = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"town\": \"Oslo\"}}\n</tool_call>";

#[test]
fn how_many_calls_there_may_be() {
    let two = format!("{OSLO}\n{NOW}");
    let text = format!("Let me see. {OSLO}\nAnd: {NOW}\nDone < now.");
    let json = "{\"a\": 1}";
    let or =
        ToolMode::Or(Box::new(schema(json!({"type": "object", "properties": {"a": {"type": "integer"}},
        "required": ["a"], "additionalProperties": false}))));
    for (mode, good, bad) in [
        (ToolMode::One, vec![OSLO, NOW], vec!["", ODD, &two, "Hello", &text]),
        (ToolMode::Some, vec![OSLO, &two], vec!["", ODD, "Hello", json]),
        (ToolMode::Or(Box::new(Grammar::Choice(vec!["none".into()]))), vec![&two, "none"], vec!["some", ODD]),
        (or, vec![OSLO, &two, json], vec!["Hello", ODD, "{\"b\": 1}"]),
        (ToolMode::InText, vec!["", "Hello", OSLO, &text, &two], vec![ODD]),
    ] {
        let grammar = compile(&calls(ToolFormat::Hermes, mode.clone())).unwrap();
        for text in good {
            assert!(accepts(&grammar, text), "{mode:?} refuses {text:?}");
        }
        for text in bad {
            assert!(!accepts(&grammar, text), "{mode:?} lets {text:?} through");
        }
    }
}

#[test]
fn calls_in_text_after_thinking() {
    let grammar = compile(&calls(ToolFormat::Hermes, ToolMode::InText)).unwrap();
    let mut walk = Walk::new(&grammar, GrammarStart::Thinking);
    walk.write(&format!("I could write {ODD} here.</think>\n\nWell: ")).unwrap();
    assert!(walk.may_end());
    walk.write("<tool_call>").unwrap();
    assert!(!walk.may_end() && !walk.allowed().iter().any(|token| EOS.contains(token)), "a call is open");
    assert!(walk.write("\n{\"name\": \"rain\"").is_err());
}

/// Random calls, read by the parser that the server uses, against the schemas.
#[test]
fn random_calls_are_read_back_as_valid_arguments() {
    let filters = json!({"type": "object", "properties": {"limit": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2}, "since": {"type": ["integer", "null"]},
        "near": {"$ref": "#/$defs/point"}, "exact": {"type": "boolean"}}, "required": ["tags", "exact"],
        "additionalProperties": false,
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": false}}});
    let functions = vec![weather(), function("search", filters, true), function("now", Value::Null, true)];
    let tools: Vec<Value> = functions
        .iter()
        .map(|f| json!({"type": "function", "function": {"name": f.name, "parameters": f.parameters}}))
        .collect();
    let mut random = fastrand::Rng::with_seed(11);
    for format in [ToolFormat::Hermes, ToolFormat::Xml] {
        let grammar =
            Grammar::ToolCalls(ToolCalls { format, functions: functions.clone(), mode: ToolMode::Some });
        let grammar = compile(&grammar).unwrap();
        let options = AnswerOptions {
            tool_format: Some(format),
            reasoning: None,
            tools: Arc::new(tools.clone().into()),
        };
        for round in 0..200 {
            let text = generate_towards(&grammar, &mut random, 20 + round % 60, "\n</parameter>\n").unwrap();
            let answer = parse_answer(&text, options.clone());
            assert!(answer.content.trim().is_empty() && !answer.tool_calls.is_empty(), "{text}");
            for call in &answer.tool_calls {
                let arguments: Value = match serde_json::from_str(&call.arguments) {
                    Ok(value) => value,
                    Err(error) if error.to_string().contains("number out of range") => continue,
                    Err(error) => panic!("{error}: {} of {text}", call.arguments),
                };
                let function = functions.iter().find(|f| f.name == call.name).unwrap();
                let schema = if function.parameters.is_null() {
                    json!({"maxProperties": 0})
                } else {
                    function.parameters.clone()
                };
                assert!(jsonschema::is_valid(&schema, &arguments), "{} {arguments}: {text}", call.name);
            }
        }
    }
}

#[test]
fn xml_calls() {
    let grammar = compile(&calls(ToolFormat::Xml, ToolMode::Some)).unwrap();
    let call =
        |parameters: &str| format!("<tool_call>\n<function=weather>\n{parameters}</function>\n</tool_call>");
    let city = "<parameter=city>\nNew \"York\"\n</parameter>\n";
    for good in [
        call(city),
        call(&format!("{city}<parameter=unit>\ncelsius\n</parameter>\n<parameter=days>\n3\n</parameter>\n")),
    ] {
        assert!(accepts(&grammar, &good), "{good}");
    }
    for bad in [
        call(""),
        call(&format!("{city}<parameter=unit>\nkelvin\n</parameter>\n")),
        call(&format!("{city}<parameter=days>\nmany\n</parameter>\n")),
    ] {
        assert!(!accepts(&grammar, &bad), "{bad}");
    }
}

#[test]
fn tools_that_cannot_be_enforced() {
    let refused = |function: ToolFunction, format| {
        refusal(&Grammar::ToolCalls(ToolCalls { format, functions: vec![function], mode: ToolMode::Some }))
    };
    for (parameters, format, message) in [
        (json!({"not": {}}), ToolFormat::Hermes, "tools[f].function.parameters at #/not: the keyword `not`"),
        (json!({"type": "array"}), ToolFormat::Hermes, "arguments are an object"),
        (json!([]), ToolFormat::Hermes, "must be an object"),
        (
            json!({"properties": {"a": {"type": "string", "pattern": "b"}}}),
            ToolFormat::Xml,
            "at #/properties/a: beside the type",
        ),
        (json!({"minProperties": 2}), ToolFormat::Xml, "at #/minProperties"),
        (json!({"required": ["a"]}), ToolFormat::Xml, "there is no property \"a\""),
        (json!({"properties": {"a>b": {}}}), ToolFormat::Xml, "cannot stand in a tag"),
    ] {
        let found = refused(function("f", parameters.clone(), true), format);
        assert!(found.contains(message), "{parameters}: {found}");
    }
    // What is not strict is enforced as far as that goes.
    for format in [ToolFormat::Hermes, ToolFormat::Xml] {
        let parameters =
            json!({"not": {}, "properties": {"a": {"type": "string", "pattern": "b", "format": "odd"}}});
        let functions = vec![function("f", parameters, false)];
        compile(&Grammar::ToolCalls(ToolCalls { format, functions, mode: ToolMode::Some })).unwrap();
    }
    let none = ToolCalls { format: ToolFormat::Hermes, functions: Vec::new(), mode: ToolMode::Some };
    assert!(refusal(&Grammar::ToolCalls(none)).contains("there is no function"));
}
