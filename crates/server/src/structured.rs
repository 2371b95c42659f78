//! The fields that hold the text of an answer to a form: `response_format`, `structured_outputs`, and the plain ones of
//! llama-server (`grammar`, `json_schema`) and SGLang (`regex`, `ebnf`). Compiles nothing.

use serde_json::{Map, Value};
use spark_text::{Grammar, SchemaOptions};

use crate::ApiError;
use crate::body::{Body, kind, strings, wrong_type};

const FORMAT: &str = "response_format";
const OUTPUTS: &str = "structured_outputs";
const SCHEMA: &str = "json_schema";

/// A form that an answer is held to, and the field that asks for it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) grammar: Grammar,
    pub(crate) field: &'static str,
}

/// Reads all of these fields, of which one may ask for something.
///
/// # Errors
/// Names the field with a wrong type, an unknown key, or a demand that cannot be met.
pub(crate) fn read(body: &mut Body) -> Result<Option<Wanted>, ApiError> {
    let asked = [
        (FORMAT, read_format(body)?),
        (OUTPUTS, read_outputs(body)?),
        (SCHEMA, read_schema(body)?),
        ("grammar", read_text(body, "grammar")?.map(Grammar::Ebnf)),
        ("ebnf", read_text(body, "ebnf")?.map(Grammar::Ebnf)),
        ("regex", read_text(body, "regex")?.map(Grammar::Regex)),
    ];
    let mut wanted =
        asked.into_iter().filter_map(|(field, grammar)| Some(Wanted { grammar: grammar?, field }));
    let first = wanted.next();
    match (&first, wanted.next()) {
        (Some(first), Some(Wanted { field, .. })) => {
            refuse(field, format!("{field} cannot be combined with {}: send one of them", first.field))
        }
        _ => Ok(first),
    }
}

/// llama-server's `json_schema`; an empty one means any object there.
fn read_schema(body: &mut Body) -> Result<Option<Grammar>, ApiError> {
    let schema = match body.take(SCHEMA) {
        None => return Ok(None),
        Some(Value::Object(fields)) if fields.is_empty() => return Ok(Some(Grammar::json_object())),
        Some(schema @ (Value::Object(_) | Value::Bool(_))) => schema,
        Some(other) => return Err(wrong_type(SCHEMA, "an object", &other)),
    };
    Ok(Some(Grammar::JsonSchema { schema, options: SchemaOptions::default() }))
}

/// A text; an empty one asks for nothing.
fn read_text(body: &mut Body, field: &'static str) -> Result<Option<String>, ApiError> {
    Ok(body.string(field, usize::MAX)?.filter(|text| !text.is_empty()))
}

fn refuse<T>(field: &'static str, message: impl Into<String>) -> Result<T, ApiError> {
    Err(ApiError::field(field, message))
}

/// Refuses keys that nobody reads. What is null was not sent.
fn check_keys(
    fields: &Map<String, Value>,
    known: &[&str],
    field: &'static str,
    place: &str,
) -> Result<(), ApiError> {
    match fields.iter().find(|(name, value)| !known.contains(&name.as_str()) && !value.is_null()) {
        Some((name, _)) => {
            let name: String = name.chars().take(64).collect();
            refuse(field, format!("{place} has the key {name:?}; known here: {}", known.join(", ")))
        }
        None => Ok(()),
    }
}

fn read_format(body: &mut Body) -> Result<Option<Grammar>, ApiError> {
    let Some(mut fields) = body.object(FORMAT)? else { return Ok(None) };
    let kind = match fields.get("type") {
        Some(Value::String(kind)) => kind.clone(),
        _ => return refuse(FORMAT, format!("{FORMAT}.type must be a string")),
    };
    match kind.as_str() {
        "text" => {
            check_keys(&fields, &["type"], FORMAT, FORMAT)?;
            Ok(None)
        }
        "json_object" => {
            // The schema is llama-server's addition.
            check_keys(&fields, &["type", "schema"], FORMAT, FORMAT)?;
            match fields.get_mut("schema").map(Value::take) {
                None | Some(Value::Null) => Ok(Some(Grammar::json_object())),
                Some(Value::Object(schema)) if schema.is_empty() => Ok(Some(Grammar::json_object())),
                Some(schema @ (Value::Object(_) | Value::Bool(_))) => {
                    Ok(Some(Grammar::JsonSchema { schema, options: SchemaOptions::default() }))
                }
                Some(other) => {
                    refuse(FORMAT, format!("{FORMAT}.schema must be an object, not {}", self::kind(&other)))
                }
            }
        }
        "json_schema" => {
            check_keys(&fields, &["type", "json_schema"], FORMAT, FORMAT)?;
            match fields.get_mut("json_schema").map(Value::take) {
                Some(Value::Object(wrapper)) => read_json_schema(wrapper).map(Some),
                other => {
                    let kind = self::kind(&other.unwrap_or_default());
                    refuse(
                        FORMAT,
                        format!("{FORMAT}.json_schema must be an object with a schema, not {kind}"),
                    )
                }
            }
        }
        "structural_tag" => Ok(Some(Grammar::StructuralTag(Value::Object(fields)))),
        _ => refuse(
            FORMAT,
            format!("{FORMAT}.type must be \"text\", \"json_object\", \"json_schema\" or \"structural_tag\""),
        ),
    }
}

/// `{"name": ..., "schema": {...}, "strict": ...}`. What is not strict at its own word is enforced as far as that goes.
fn read_json_schema(mut wrapper: Map<String, Value>) -> Result<Grammar, ApiError> {
    let place = "response_format.json_schema";
    check_keys(&wrapper, &["name", "description", "schema", "strict"], FORMAT, place)?;
    for name in ["name", "description"] {
        if !matches!(wrapper.get(name), None | Some(Value::Null | Value::String(_))) {
            return refuse(FORMAT, format!("{place}.{name} must be a string"));
        }
    }
    let best_effort = match wrapper.get("strict") {
        None | Some(Value::Null | Value::Bool(true)) => false,
        Some(Value::Bool(false)) => true,
        Some(other) => {
            return refuse(FORMAT, format!("{place}.strict must be a boolean, not {}", kind(other)));
        }
    };
    match wrapper.get_mut("schema").map(Value::take).filter(|schema| !schema.is_null()) {
        Some(schema) => {
            let options = SchemaOptions { best_effort, ..SchemaOptions::default() };
            Ok(Grammar::JsonSchema { schema, options })
        }
        None => refuse(FORMAT, format!("{place}.schema is missing")),
    }
}

/// The constraints of `structured_outputs`, of which there is one.
pub(crate) const CONSTRAINTS: [&str; 6] =
    ["json", "regex", "choice", "grammar", "json_object", "structural_tag"];
const OTHER_KEYS: [&str; 4] =
    ["disable_any_whitespace", "disable_fallback", "disable_additional_properties", "whitespace_pattern"];

fn read_outputs(body: &mut Body) -> Result<Option<Grammar>, ApiError> {
    let Some(mut fields) = body.object(OUTPUTS)? else { return Ok(None) };
    // vLLM's client library sends what is not wanted too, as null or false.
    fields.retain(|_, value| !(value.is_null() || *value == false));
    check_keys(&fields, &[&CONSTRAINTS[..], &OTHER_KEYS].concat(), OUTPUTS, OUTPUTS)?;
    for name in ["disable_additional_properties", "whitespace_pattern"] {
        if fields.contains_key(name) {
            return refuse(OUTPUTS, format!("{OUTPUTS}.{name} is not supported; leave it out"));
        }
    }
    let compact = flag(&fields, "disable_any_whitespace")?;
    // There is one implementation: nothing falls back to another.
    flag(&fields, "disable_fallback")?;
    let mut found = CONSTRAINTS.into_iter().filter(|name| fields.contains_key(*name));
    let constraint = match (found.next(), found.next()) {
        (Some(name), None) => name,
        (None, _) if fields.is_empty() => return Ok(None),
        _ => {
            let all = CONSTRAINTS.join(", ");
            return refuse(OUTPUTS, format!("{OUTPUTS} must have exactly one of {all}"));
        }
    };
    let value = fields.get_mut(constraint).map(Value::take).unwrap_or_default();
    let options = SchemaOptions { compact, ..SchemaOptions::default() };
    read_constraint(constraint, value, options).map(Some)
}

fn flag(fields: &Map<String, Value>, name: &str) -> Result<bool, ApiError> {
    match fields.get(name) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => refuse(OUTPUTS, format!("{OUTPUTS}.{name} must be a boolean, not {}", kind(other))),
    }
}

fn read_constraint(name: &str, value: Value, options: SchemaOptions) -> Result<Grammar, ApiError> {
    let wrong = |wanted: &str, value: &Value| {
        ApiError::field(OUTPUTS, format!("{OUTPUTS}.{name} must be {wanted}, not {}", kind(value)))
    };
    match (name, value) {
        ("json", value) => Ok(Grammar::JsonSchema { schema: parsed(name, value)?, options }),
        ("json_object", Value::Bool(_)) => {
            let schema = serde_json::json!({"type": "object"});
            Ok(Grammar::JsonSchema { schema, options })
        }
        ("json_object", other) => Err(wrong("a boolean", &other)),
        ("structural_tag", value) => Ok(Grammar::StructuralTag(parsed(name, value)?)),
        ("choice", Value::Array(items)) => {
            Ok(Grammar::Choice(strings(items, |item| wrong("a list of strings", item))?))
        }
        ("choice", other) => Err(wrong("a list of strings", &other)),
        ("regex", Value::String(regex)) => Ok(Grammar::Regex(regex)),
        (_, Value::String(source)) => Ok(Grammar::Ebnf(source)),
        (_, other) => Err(wrong("a string", &other)),
    }
}

/// A JSON value, or the text of one.
fn parsed(name: &str, value: Value) -> Result<Value, ApiError> {
    match value {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::field(OUTPUTS, format!("{OUTPUTS}.{name} is no JSON: {error}"))),
        Value::Object(_) | Value::Bool(_) => Ok(value),
        other => {
            Err(wrong_type(OUTPUTS, &format!("an object whose {name} is an object or a JSON text"), &other))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<Option<Wanted>, ApiError> {
        super::read(&mut Body::new(body)?)
    }

    fn grammar(body: Value) -> Option<Grammar> {
        read(body).unwrap().map(|wanted| wanted.grammar)
    }

    #[test]
    fn every_form_is_read() {
        let schema = || json!({"type": "integer"});
        let plain = |best_effort, compact| {
            let options = SchemaOptions { best_effort, compact };
            Some(Grammar::JsonSchema { schema: schema(), options })
        };
        let format = |strict: Value| {
            json!({"response_format": {"type": "json_schema",
                "json_schema": {"name": "n", "description": null, "schema": schema(), "strict": strict}}})
        };
        let outputs = |outputs: Value| json!({"structured_outputs": outputs});
        let tag = json!({"type": "structural_tag", "format": {"type": "any_text"}});
        for (body, wanted) in [
            (json!({}), None),
            (json!({"response_format": null, "structured_outputs": null}), None),
            (json!({"response_format": {"type": "text"}, "structured_outputs": {}}), None),
            (outputs(json!({"json": null, "json_object": false, "disable_fallback": false})), None),
            (json!({"response_format": {"type": "json_object"}}), Some(Grammar::json_object())),
            (format(json!(null)), plain(false, false)),
            (format(json!(true)), plain(false, false)),
            (format(json!(false)), plain(true, false)),
            (json!({"response_format": tag}), Some(Grammar::StructuralTag(tag.clone()))),
            (outputs(json!({"structural_tag": tag.to_string()})), Some(Grammar::StructuralTag(tag.clone()))),
            (outputs(json!({"json": schema()})), plain(false, false)),
            (
                outputs(json!({"json": schema().to_string(), "disable_any_whitespace": true})),
                plain(false, true),
            ),
            (outputs(json!({"json_object": true})), Some(Grammar::json_object())),
            (outputs(json!({"regex": "a+"})), Some(Grammar::Regex("a+".into()))),
            (outputs(json!({"choice": ["a", "b"]})), Some(Grammar::Choice(vec!["a".into(), "b".into()]))),
            (outputs(json!({"grammar": "root ::= \"a\""})), Some(Grammar::Ebnf("root ::= \"a\"".into()))),
            (json!({"response_format": {"type": "json_object", "schema": schema()}}), plain(false, false)),
            (json!({"response_format": {"type": "json_object", "schema": {}}}), Some(Grammar::json_object())),
            (json!({"json_schema": schema(), "grammar": "", "regex": null}), plain(false, false)),
            (json!({"json_schema": {}}), Some(Grammar::json_object())),
            (json!({"grammar": "root ::= \"a\""}), Some(Grammar::Ebnf("root ::= \"a\"".into()))),
            (json!({"ebnf": "root ::= \"a\""}), Some(Grammar::Ebnf("root ::= \"a\"".into()))),
            (json!({"regex": "a+"}), Some(Grammar::Regex("a+".into()))),
        ] {
            assert_eq!(grammar(body.clone()), wanted, "{body}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let schema =
            |wrapper: Value| json!({"response_format": {"type": "json_schema", "json_schema": wrapper}});
        let outputs = |outputs: Value| json!({"structured_outputs": outputs});
        for (body, field, rule) in [
            (json!({"response_format": "json"}), FORMAT, "must be an object"),
            (json!({"response_format": {}}), FORMAT, "response_format.type must be a string"),
            (json!({"response_format": {"type": "xml"}}), FORMAT, "must be \"text\""),
            (
                json!({"response_format": {"type": "json_object", "schema": 1}}),
                FORMAT,
                "schema must be an object",
            ),
            (json!({"response_format": {"type": "json_object", "odd": 1}}), FORMAT, "the key \"odd\""),
            (json!({"json_schema": 1}), SCHEMA, "json_schema must be an object"),
            (json!({"grammar": ["root"]}), "grammar", "grammar must be a string"),
            (
                json!({"grammar": "root ::= x", "json_schema": {}}),
                "grammar",
                "cannot be combined with json_schema",
            ),
            (
                json!({"regex": "a", "response_format": {"type": "json_object"}}),
                "regex",
                "cannot be combined",
            ),
            (json!({"response_format": {"type": "json_schema"}}), FORMAT, "with a schema, not null"),
            (schema(json!({"name": "n"})), FORMAT, "json_schema.schema is missing"),
            (schema(json!({"schema": {}, "name": 1})), FORMAT, "name must be a string"),
            (schema(json!({"schema": {}, "strict": 1})), FORMAT, "strict must be a boolean"),
            (schema(json!({"schema": {}, "odd": 1})), FORMAT, "the key \"odd\""),
            (outputs(json!([])), OUTPUTS, "must be an object"),
            (outputs(json!({"odd": 1})), OUTPUTS, "the key \"odd\""),
            (outputs(json!({"regex": "a", "choice": ["a"]})), OUTPUTS, "exactly one of"),
            (outputs(json!({"disable_any_whitespace": true})), OUTPUTS, "exactly one of"),
            (outputs(json!({"regex": 1})), OUTPUTS, "structured_outputs.regex must be a string"),
            (outputs(json!({"grammar": []})), OUTPUTS, "structured_outputs.grammar must be a string"),
            (outputs(json!({"choice": "a"})), OUTPUTS, "a list of strings"),
            (outputs(json!({"choice": [1]})), OUTPUTS, "a list of strings"),
            (outputs(json!({"json": "{"})), OUTPUTS, "is no JSON"),
            (outputs(json!({"json": 1})), OUTPUTS, "an object or a JSON text"),
            (outputs(json!({"json_object": 1})), OUTPUTS, "a boolean"),
            (outputs(json!({"regex": "a", "whitespace_pattern": " "})), OUTPUTS, "not supported"),
            (
                json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
                OUTPUTS,
                "cannot be combined",
            ),
        ] {
            let error = read(body.clone()).expect_err(&body.to_string());
            assert!(error.to_string().contains(rule), "{body}: {error}");
            assert_eq!(error.to_json()["error"]["param"], field, "{body}");
        }
    }
}
