//! Tool calls as a grammar: which functions, with which arguments, in the format that the model writes and
//! [`AnswerParser`](crate::AnswerParser) reads.

use serde_json::{Value, json};

use super::compiler::item;
use super::lark::{Parts, literal};
use super::schema::{SchemaOptions, prepare};
use super::{Grammar, refuse, xml_tools};
use crate::answer::{CALL_CLOSE, CALL_OPEN};
use crate::{Result, ToolFormat};

/// Most functions of one grammar: each has a schema of its own.
const MAX_FUNCTIONS: usize = 512;

/// Tool calls that are held to a form.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCalls {
    /// How the model writes them.
    pub format: ToolFormat,
    /// What may be called, at least one.
    pub functions: Vec<ToolFunction>,
    /// What is in the output besides.
    pub mode: ToolMode,
}

/// A function that may be called.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolFunction {
    /// Its name.
    pub name: String,
    /// The JSON schema of its arguments; null: there are none.
    pub parameters: Value,
    /// Refuse a schema that cannot be enforced in full. Otherwise it is enforced as far as that goes.
    pub strict: bool,
    /// Where it stands in the request, for messages: `tools[0].function`.
    pub place: String,
}

/// What an output with tool calls consists of.
#[derive(Debug, Clone, PartialEq)]
pub enum ToolMode {
    /// Exactly one call.
    One,
    /// One call or more, and nothing else.
    Some,
    /// Free text in which there may be calls.
    InText,
    /// Calls as in [`Some`](Self::Some), or instead of them what this grammar says.
    Or(Box<Grammar>),
}

/// Lark source of the calls, and whether it is for what follows `<tool_call>` in free text.
///
/// # Errors
/// Names the function whose parameters cannot be enforced.
pub(super) fn lark(calls: &ToolCalls, parts: &mut Parts) -> Result<(String, bool)> {
    if calls.functions.is_empty() {
        return refuse("the tools", "there is no function to call");
    }
    if calls.functions.len() > MAX_FUNCTIONS {
        let rule = format!("there are {} functions; the limit is {MAX_FUNCTIONS}", calls.functions.len());
        return refuse("the tools", rule);
    }
    let bodies = calls.functions.iter().map(|function| match calls.format {
        ToolFormat::Hermes => hermes_body(function, parts),
        ToolFormat::Xml => xml_tools::body(function, parts),
    });
    let bodies: Vec<String> = bodies.collect::<Result<_>>()?;
    let (open, close) = (format!("{CALL_OPEN}\n"), format!("\n{CALL_CLOSE}"));
    let rules =
        format!("call: {} body {}\nbody: {}\n", literal(&open), literal(&close), bodies.join("\n | "));
    let many = format!("call ({} call)*", literal("\n"));
    Ok(match &calls.mode {
        ToolMode::One => (format!("start: call\n{rules}"), false),
        ToolMode::Some => (format!("start: {many}\n{rules}"), false),
        ToolMode::Or(other) => {
            let other = item(other, parts)?;
            (format!("start: {many} | {other}\n{rules}"), false)
        }
        ToolMode::InText => {
            let start = format!("start: {} body {}\n", literal("\n"), literal(&close));
            (format!("{start}body: {}\n", bodies.join("\n | ")), true)
        }
    })
}

/// `{"name": "f", "arguments": {...}}`, with the spaces that templates show to models.
fn hermes_body(function: &ToolFunction, parts: &mut Parts) -> Result<String> {
    let arguments = parts.schema(arguments_schema(function)?);
    let head = format!("{{\"name\": {}, \"arguments\": ", Value::from(function.name.as_str()));
    Ok(format!("{} {arguments} {}", literal(&head), literal("}")))
}

/// The schema of a function's arguments: always of an object.
fn arguments_schema(function: &ToolFunction) -> Result<Value> {
    let place = format!("{}.parameters", function.place);
    let schema = object_schema(function, &place)?;
    prepare(&schema, options(function), &place)
}

/// How the schemas of a function are read.
pub(super) fn options(function: &ToolFunction) -> SchemaOptions {
    SchemaOptions { best_effort: !function.strict, compact: false }
}

/// The parameters of a function, with the type that they have even where they do not say it.
pub(super) fn object_schema(function: &ToolFunction, place: &str) -> Result<Value> {
    let mut schema = match &function.parameters {
        Value::Null => return Ok(json!({"type": "object", "properties": {}, "additionalProperties": false})),
        Value::Object(schema) => schema.clone(),
        _ => return refuse(place, "a JSON schema must be an object"),
    };
    match schema.get("type") {
        None => drop(schema.insert("type".into(), json!("object"))),
        Some(kind) if kind == "object" => {}
        Some(_) => return refuse(place, "arguments are an object: type must be \"object\""),
    }
    Ok(Value::Object(schema))
}
