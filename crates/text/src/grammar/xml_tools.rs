//! A call in the XML form (`<function=f>`, `<parameter=p>`) as a grammar.
//!
//! Parameters come in the order of the schema, the required ones always. A string stands there bare, up to the tag
//! behind it; every other value is JSON. [`AnswerParser`](crate::AnswerParser) tells the two apart by the same schema.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::lark::{Parts, escape, literal};
use super::refuse;
use super::schema::prepare;
use super::tools::{ToolFunction, object_schema, options};
use crate::Result;

/// Keywords of the parameters' own object that are obeyed, or say nothing about values.
const KNOWN: [&str; 10] = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "title",
    "description",
];
/// Keywords of a string that may stand bare.
const STRING_KEYWORDS: [&str; 8] =
    ["type", "title", "description", "default", "examples", "enum", "const", "$comment"];
/// What ends a value.
const VALUE_END: &str = "\n</parameter>\n";
/// What a bare string cannot contain, because the parser ends it there.
const TAGS: [&str; 3] = ["</parameter>", "<parameter=", "</function>"];

/// The Lark expression of what stands between `<tool_call>` and `</tool_call>`.
pub(super) fn body(function: &ToolFunction, parts: &mut Parts) -> Result<String> {
    let place = format!("{}.parameters", function.place);
    let schema = object_schema(function, &place)?;
    let Value::Object(schema) = schema else { return refuse(place, "a JSON schema must be an object") };
    if let Some(keyword) = schema.keys().find(|name| !KNOWN.contains(&name.as_str()))
        && function.strict
    {
        let rule = format!("the keyword `{keyword}` is not supported beside properties in this tool format");
        return refuse(format!("{place} at #/{keyword}"), rule);
    }
    let empty = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    let required: Vec<&str> = match schema.get("required") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    if let Some(name) = required.iter().find(|name| !properties.contains_key(**name)) {
        return refuse(format!("{place} at #/required"), format!("there is no property {name:?}"));
    }
    let mut source = String::new();
    let mut start = format!("start: {}", literal(&format!("<function={}>\n", function.name)));
    for (i, (name, property)) in properties.iter().enumerate() {
        if name.is_empty() || name.contains(['<', '>', '\n']) {
            return refuse(
                format!("{place} at #/properties"),
                format!("the name {name:?} cannot stand in a tag"),
            );
        }
        let value = value(function, &schema, name, property, parts)?;
        let _ = writeln!(source, "p{i}: {} {value}", literal(&format!("<parameter={name}>\n")));
        let _ = write!(start, " p{i}{}", if required.contains(&name.as_str()) { "" } else { "?" });
    }
    let _ = writeln!(start, " {}", literal("</function>"));
    source.push_str(&start);
    Ok(parts.lark(source))
}

/// A value and the tag behind it.
fn value(
    function: &ToolFunction,
    root: &Map<String, Value>,
    name: &str,
    property: &Value,
    parts: &mut Parts,
) -> Result<String> {
    let place = format!("{}.parameters at #/properties/{name}", function.place);
    if property.get("type").is_some_and(|kind| kind == "string") {
        let known = |name: &String| STRING_KEYWORDS.contains(&name.as_str());
        if function.strict && !property.as_object().is_some_and(|fields| fields.keys().all(known)) {
            let rule = "beside the type of a string only enum and const are supported in this tool format";
            return refuse(place, rule);
        }
        return Ok(bare_string(property, parts));
    }
    let value = parts.schema(with_definitions(root, property, function, &place)?);
    Ok(format!("{value} {}", literal(VALUE_END)))
}

/// A string without quotes, and the tag behind it.
fn bare_string(property: &Value, parts: &mut Parts) -> String {
    let texts = match (property.get("const"), property.get("enum")) {
        (Some(text), _) => std::slice::from_ref(text),
        (None, Some(Value::Array(texts))) => texts.as_slice(),
        _ => &[],
    };
    let texts: Vec<String> =
        texts.iter().filter_map(Value::as_str).map(|text| literal(&format!("{text}{VALUE_END}"))).collect();
    if !texts.is_empty() {
        return format!("({})", texts.join(" | "));
    }
    let tags = TAGS.map(escape).join("|");
    // The text and its end as one terminal: where the text stops is decided by its end alone.
    let text = format!("(/(?s:.*)/ & ~/(?s:.*)({tags})(?s:.*)/)");
    parts.lark(format!("start: TEXT\nTEXT: {text} {}\n", literal(VALUE_END)))
}

/// The schema of one property, with the definitions that it may refer to.
fn with_definitions(
    root: &Map<String, Value>,
    property: &Value,
    function: &ToolFunction,
    place: &str,
) -> Result<Value> {
    let mut schema = property.clone();
    if let Value::Object(fields) = &mut schema {
        for name in ["$defs", "definitions"] {
            if let Some(definitions) = root.get(name) {
                fields.insert(name.to_owned(), definitions.clone());
            }
        }
    }
    prepare(&schema, options(function), place)
}
