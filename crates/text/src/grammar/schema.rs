//! A JSON schema before it is compiled: what cannot be enforced is refused with its place, and what asks for nothing is
//! taken out. Whether a schema can be met at all is the compiler's to find out.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::compiler::check_size;
use super::{pattern, refuse};
use crate::Result;

/// Deepest nesting of a schema. JSON itself stops at 128, and each level costs the compiler some stack.
const MAX_DEPTH: usize = 64;
/// Most properties of an object, and most definitions: each of a chain of references costs the compiler stack, and some
/// hundred optional properties are all that can be applied.
const MAX_TABLE: usize = 1_000;
/// White space between the tokens of JSON: bounded, so that a model cannot write it until its length is used up.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,64}";
/// Where `llguidance` reads options for a schema. Ours to set.
const OPTIONS_KEY: &str = "x-guidance";

/// How a schema is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchemaOptions {
    /// Ignore keywords and formats that a grammar cannot enforce (and take `oneOf` as `anyOf`), instead of refusing them.
    pub best_effort: bool,
    /// No white space between the tokens of the JSON.
    pub compact: bool,
}

/// Keywords with a meaning that no grammar here can enforce.
const UNSUPPORTED: [&str; 18] = [
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "uniqueItems",
    "propertyNames",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$dynamicAnchor",
    "$recursiveRef",
    "$recursiveAnchor",
];
const COUNTS: [&str; 6] =
    ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"];
/// Keywords with values in which nothing is a schema.
const VALUES: [&str; 4] = ["enum", "const", "default", "examples"];
const TYPES: [&str; 7] = ["null", "boolean", "integer", "number", "string", "array", "object"];

/// Formats whose expression in the compiler is too wide, with a pattern that closes the gap: days that exist, no leap
/// seconds, and the greatest lengths of names.
const NARROWER: [(&str, &str); 5] = [
    ("date", DAYS),
    ("date-time", DAYS_AND_SECONDS),
    ("time", SECONDS),
    ("email", r"^[^@]{1,64}@([^@.]{1,40}(\.[^@.]{1,40}){0,3}|\[.*\])$"),
    ("hostname", r"^.{1,253}$"),
];
const DAYS: &str = r"^(\d{4}-(0[13-9]|1[0-2])-|\d{4}-02-([01]|2[0-8])|(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)";
const SECONDS: &str = r":[0-5]\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)$";
const DAYS_AND_SECONDS: &str = r"^(\d{4}-(0[13-9]|1[0-2])-|\d{4}-02-([01]|2[0-8])|(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29).*:[0-5]\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)$";

/// The schema as the compiler takes it, with its options inside. `place` says whose schema it is.
///
/// # Errors
/// Names the first place that is not a schema, or asks for what cannot be enforced.
pub(super) fn prepare(schema: &Value, options: SchemaOptions, place: &str) -> Result<Value> {
    let mut schema = match schema {
        Value::Object(map) => map.clone(),
        Value::Bool(true) => Map::new(),
        Value::Bool(false) => return refuse(place, "the schema `false` accepts nothing"),
        _ => return refuse(place, "a JSON schema must be an object"),
    };
    if schema.contains_key(OPTIONS_KEY) {
        return refuse(format!("{place} at #"), format!("the keyword `{OPTIONS_KEY}` is not supported"));
    }
    check_size(place, Value::Object(schema.clone()).to_string().len())?;
    let mut walk = Walk { place, best_effort: options.best_effort, references: Vec::new(), has_ids: false };
    walk.object(&mut schema, "#", 0)?;
    let mut schema = Value::Object(schema);
    walk.referred(&mut schema)?;
    let mut settings = json!({"lenient": options.best_effort, "coerce_one_of": options.best_effort});
    match options.compact {
        true => settings["whitespace_flexible"] = json!(false),
        false => settings["whitespace_pattern"] = json!(WHITE_SPACE),
    }
    schema[OPTIONS_KEY] = settings;
    Ok(schema)
}

struct Walk<'a> {
    place: &'a str,
    best_effort: bool,
    /// Where references stand, and what to.
    references: Vec<(String, String)>,
    /// There are schemas inside with an `$id`: what references are relative to differs.
    has_ids: bool,
}

impl Walk<'_> {
    fn refuse<T>(&self, path: &str, rule: impl Into<String>) -> Result<T> {
        refuse(format!("{} at {path}", self.place), rule)
    }

    fn schema(&mut self, schema: &mut Value, path: &str, depth: usize) -> Result<()> {
        match schema {
            Value::Object(map) => self.object(map, path, depth),
            Value::Bool(_) => Ok(()),
            _ => self.refuse(path, "a JSON schema must be an object or a boolean"),
        }
    }

    fn object(&mut self, schema: &mut Map<String, Value>, path: &str, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return self.refuse(path, format!("the schema is nested deeper than {MAX_DEPTH} levels"));
        }
        if schema.contains_key("$ref") && (schema.contains_key("$id") || schema.contains_key("id")) {
            // What the reference is relative to depends on the draft.
            return self.refuse(path, "an $id beside a $ref is not supported");
        }
        self.has_ids |= depth > 0 && (schema.contains_key("$id") || schema.contains_key("id"));
        if let Some(Value::String(reference)) = schema.get("$ref") {
            self.references.push((path.to_owned(), reference.clone()));
        }
        schema.retain(|keyword, value| {
            !(UNSUPPORTED.contains(&keyword.as_str()) && is_neutral(keyword, value))
        });
        self.pattern(schema, path)?;
        for (keyword, value) in schema.iter_mut() {
            let path = below(path, keyword);
            match keyword.as_str() {
                name if UNSUPPORTED.contains(&name) && !self.best_effort => {
                    return self.refuse(&path, format!("the keyword `{name}` is not supported"));
                }
                "type" => self.types(value, &path)?,
                name if COUNTS.contains(&name) => whole(value),
                "properties" | "patternProperties" | "$defs" | "definitions" => {
                    self.table(value, &path, depth + 1)?;
                }
                "anyOf" | "oneOf" | "allOf" | "prefixItems" => self.list(value, &path, depth + 1)?,
                "items" if value.is_array() => self.list(value, &path, depth + 1)?,
                "items" | "additionalItems" | "additionalProperties" => {
                    self.schema(value, &path, depth + 1)?
                }
                _ => {}
            }
        }
        self.pattern_properties(schema, path)?;
        narrow_format(schema);
        self.least_properties(schema, path)
    }

    /// Goes on where references lead to that are no places of schemas by themselves: `#/components/schemas/Pet`.
    fn referred(&mut self, root: &mut Value) -> Result<()> {
        let mut walked: Vec<String> = vec![String::new()];
        while let Some((path, reference)) = self.references.pop() {
            let (base, fragment) = reference.split_once('#').unwrap_or((&reference, ""));
            let pointer = percent_decoded(fragment);
            let is_walked = |from: &String| pointer.strip_prefix(from.as_str()).is_some_and(is_schema_place);
            if !pointer.starts_with('/') || walked.iter().any(is_walked) {
                continue;
            }
            let is_value = pointer.split('/').any(|name| VALUES.contains(&name));
            if is_value || self.has_ids || !base.is_empty() {
                return self.refuse(&below(&path, "$ref"), "there is no schema where this leads to");
            }
            // What does not exist is the compiler's to refuse.
            if let Some(schema) = root.pointer_mut(&pointer) {
                self.schema(schema, &format!("#{pointer}"), 1)?;
            }
            walked.push(pointer);
        }
        Ok(())
    }

    /// Puts `pattern` into the compiler's notation.
    fn pattern(&self, schema: &mut Map<String, Value>, path: &str) -> Result<()> {
        let Some(Value::String(source)) = schema.get("pattern") else { return Ok(()) };
        match pattern::translate(source) {
            Ok(pattern) => drop(schema.insert("pattern".into(), pattern.into())),
            Err(_) if self.best_effort => drop(schema.shift_remove("pattern")),
            Err(reason) => return self.refuse_pattern(&below(path, "pattern"), &reason),
        }
        Ok(())
    }

    /// The same for the names in `patternProperties`.
    fn pattern_properties(&self, schema: &mut Map<String, Value>, path: &str) -> Result<()> {
        let Some(Value::Object(table)) = schema.get_mut("patternProperties") else { return Ok(()) };
        let path = below(path, "patternProperties");
        for (name, property) in std::mem::take(table) {
            match pattern::translate(&name) {
                Ok(pattern) if table.contains_key(&pattern) => {
                    return self.refuse(&below(&path, &name), "another pattern there means the same");
                }
                Ok(pattern) => drop(table.insert(pattern, property)),
                Err(_) if self.best_effort => {}
                Err(reason) => return self.refuse_pattern(&below(&path, &name), &reason),
            }
        }
        Ok(())
    }

    fn refuse_pattern<T>(&self, path: &str, reason: &str) -> Result<T> {
        self.refuse(path, format!("the pattern {reason}: that is not supported"))
    }

    /// A grammar cannot tell a second property from a repetition of the first. So it can ask for one besides those that
    /// have to be there, but not for two.
    fn least_properties(&self, schema: &Map<String, Value>, path: &str) -> Result<()> {
        let least = schema.get("minProperties").and_then(Value::as_u64).unwrap_or(0);
        let names = schema.get("required").and_then(Value::as_array).into_iter().flatten();
        let num_required = names.filter_map(Value::as_str).collect::<BTreeSet<_>>().len() as u64;
        match least > num_required + 1 && !self.best_effort {
            true => self.refuse(
                &format!("{path}/minProperties"),
                format!("minProperties is {least}; it is supported up to one more than are required ({num_required})"),
            ),
            false => Ok(()),
        }
    }

    fn types(&self, value: &Value, path: &str) -> Result<()> {
        let is_type = |value: &Value| value.as_str().is_some_and(|name| TYPES.contains(&name));
        let is_valid = match value {
            Value::Array(types) => !types.is_empty() && types.iter().all(is_type),
            other => is_type(other),
        };
        match is_valid {
            true => Ok(()),
            false => self.refuse(path, format!("a type is one of {}, or a list of them", TYPES.join(", "))),
        }
    }

    fn table(&mut self, value: &mut Value, path: &str, depth: usize) -> Result<()> {
        let Value::Object(table) = value else { return self.refuse(path, "must be an object of schemas") };
        if table.len() > MAX_TABLE {
            return self.refuse(path, format!("has {} entries; the limit is {MAX_TABLE}", table.len()));
        }
        for (name, schema) in table {
            self.schema(schema, &below(path, name), depth)?;
        }
        Ok(())
    }

    fn list(&mut self, value: &mut Value, path: &str, depth: usize) -> Result<()> {
        let Value::Array(list) = value else { return self.refuse(path, "must be a list of schemas") };
        for (i, schema) in list.iter_mut().enumerate() {
            self.schema(schema, &format!("{path}/{i}"), depth)?;
        }
        Ok(())
    }
}

/// The path of an entry.
fn below(path: &str, name: &str) -> String {
    format!("{path}/{}", name.replace('~', "~0").replace('/', "~1"))
}

/// Whether a pointer leads through keywords of schemas only, which the walk has followed.
fn is_schema_place(pointer: &str) -> bool {
    let mut names = pointer.split('/').skip(1).peekable();
    while let Some(keyword) = names.next() {
        let is_place = match keyword {
            "properties" | "patternProperties" | "$defs" | "definitions" | "anyOf" | "oneOf" | "allOf"
            | "prefixItems" => names.next().is_some(),
            "items" => {
                names.next_if(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
                true
            }
            "additionalItems" | "additionalProperties" => true,
            _ => false,
        };
        if !is_place {
            return false;
        }
    }
    true
}

/// A fragment without its percent signs.
fn percent_decoded(fragment: &str) -> String {
    let mut bytes = Vec::with_capacity(fragment.len());
    let mut rest = fragment.as_bytes();
    while let [byte, after @ ..] = rest {
        let hex = after.first_chunk::<2>().and_then(|digits| std::str::from_utf8(digits).ok());
        let decoded = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| *byte == b'%');
        bytes.push(decoded.unwrap_or(*byte));
        rest = if decoded.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A count may be written as `2.0`.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "only counts below 2^53 are converted"
)]
fn whole(value: &mut Value) {
    let float = value.as_f64().filter(|_| value.is_f64());
    if let Some(count) = float.filter(|count| count.fract() == 0.0 && (0.0..9e15).contains(count)) {
        *value = json!(count as u64);
    }
}

/// Adds the pattern that a format needs besides its own.
fn narrow_format(schema: &mut Map<String, Value>) {
    let format = schema.get("format").and_then(Value::as_str);
    let Some((_, pattern)) = NARROWER.iter().find(|(name, _)| format == Some(name)) else { return };
    let all = schema.entry("allOf").or_insert_with(|| json!([]));
    if let Value::Array(all) = all {
        all.push(json!({"pattern": pattern}));
    }
}

/// Whether an unsupported keyword has a value that every instance meets.
fn is_neutral(keyword: &str, value: &Value) -> bool {
    match keyword {
        "uniqueItems" => *value == json!(false),
        "unevaluatedItems" | "unevaluatedProperties" => *value == json!(true),
        // Names are strings; generators of schemas for maps say so all the same.
        "propertyNames" => [json!(true), json!({}), json!({"type": "string"})].contains(value),
        "dependencies" | "dependentRequired" | "dependentSchemas" => *value == json!({}),
        // Only a `$dynamicRef` gives them a meaning.
        "$dynamicAnchor" => true,
        "$recursiveAnchor" => *value == json!(false),
        _ => false,
    }
}
