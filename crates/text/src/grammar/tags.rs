//! Structural tags: free text with parts that have a form, as vLLM and xgrammar describe them. Written as Lark.
//!
//! Both spellings are read: `{"structures": [...], "triggers": [...]}`, and `{"format": {"type": ...}}`.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::compiler::{item as other_item, regex_item};
use super::lark::{Parts, escape, literal};
use super::{Grammar, SchemaOptions, refuse};
use crate::Result;

/// Deepest nesting of formats.
const MAX_DEPTH: usize = 24;
/// Most repetitions that can be asked for by a number.
const MAX_REPEAT: u64 = 1_000_000;

/// The reference to the grammar of `tag`.
///
/// # Errors
/// Names the place in the tag that is wrong or not supported.
pub(super) fn item(tag: &Value, parts: &mut Parts) -> Result<String> {
    let format = match (tag.get("format"), tag.get("structures")) {
        (Some(format), None) => format.clone(),
        (None, Some(structures)) => of_structures(structures, tag.get("triggers"))?,
        _ => return refuse("the structural tag", "needs `format`, or `structures` and `triggers`"),
    };
    let mut writer = Writer { parts, rules: String::new(), count: 0 };
    let start = writer.format(&format, "format", Position { is_last: true, depth: 0 })?;
    let source = format!("start: {start}\n{}", writer.rules);
    Ok(writer.parts.lark(source))
}

/// The older spelling in the newer one.
fn of_structures(structures: &Value, triggers: Option<&Value>) -> Result<Value> {
    let Value::Array(structures) = structures else {
        return refuse("the structural tag at structures", "must be a list");
    };
    let tags: Vec<Value> = structures
        .iter()
        .map(|structure| {
            let schema = structure.get("schema").cloned().unwrap_or_else(|| json!({}));
            let get = |name: &str| structure.get(name).cloned().unwrap_or_default();
            json!({
                "type": "tag",
                "begin": get("begin"),
                "content": {"type": "json_schema", "json_schema": schema},
                "end": get("end"),
            })
        })
        .collect();
    Ok(json!({"type": "triggered_tags", "tags": tags, "triggers": triggers.cloned().unwrap_or_default()}))
}

#[derive(Clone, Copy)]
struct Position {
    /// Nothing follows: free text may go on to the end.
    is_last: bool,
    depth: usize,
}

impl Position {
    fn inner(self, is_last: bool) -> Self {
        Self { is_last: self.is_last && is_last, depth: self.depth + 1 }
    }
}

/// A tag, taken apart.
struct Tag<'a> {
    begin: &'a str,
    content: &'a Value,
    ends: Vec<&'a str>,
    place: String,
}

struct Writer<'a> {
    parts: &'a mut Parts,
    rules: String,
    count: usize,
}

impl Writer<'_> {
    /// Adds a rule of its own; returns its name.
    fn rule(&mut self, attributes: &str, body: &str) -> String {
        self.count += 1;
        let name = format!("x{}", self.count);
        let _ = writeln!(self.rules, "{name}{attributes}: {body}");
        name
    }

    /// Adds a terminal; returns its name.
    fn terminal(&mut self, body: &str) -> String {
        self.count += 1;
        let name = format!("X{}", self.count);
        let _ = writeln!(self.rules, "{name}: {body}");
        name
    }

    /// The Lark expression of a format.
    fn format(&mut self, format: &Value, path: &str, position: Position) -> Result<String> {
        if position.depth > MAX_DEPTH {
            return fail(path, format!("formats are nested deeper than {MAX_DEPTH} levels"));
        }
        let Value::Object(fields) = format else { return fail(path, "must be an object with a type") };
        let kind = text(fields, "type", path)?;
        self.check_fields(fields, kind, path)?;
        match kind {
            "const_string" => Ok(literal(text(fields, "value", path)?)),
            "json_schema" | "regex" | "grammar" => self.leaf(fields, kind, path),
            "any_text" if position.is_last => Ok(self.free_text(&[])),
            "any_text" => fail(path, "any_text must be the content of a tag, or come last"),
            "sequence" | "or" => self.elements(fields, kind, path, position),
            "optional" | "star" | "plus" | "repeat" => self.repeated(fields, kind, path, position),
            "tag" => {
                let tag = tag_of(format, path)?;
                self.tag(&tag, "", position)
            }
            "triggered_tags" => self.triggered(fields, path, position),
            "tags_with_separator" => self.separated(fields, path, position),
            other => fail(path, format!("the format {other:?} is not supported")),
        }
    }

    /// A field that would change the meaning must not be passed over.
    fn check_fields(&self, fields: &Map<String, Value>, kind: &str, path: &str) -> Result<()> {
        let known: &[&str] = match kind {
            "const_string" => &["value"],
            "json_schema" => &["json_schema"],
            "regex" => &["pattern"],
            "grammar" => &["grammar"],
            "sequence" | "or" => &["elements"],
            "optional" | "star" | "plus" => &["content"],
            "repeat" => &["content", "min", "max"],
            "tag" => &["begin", "content", "end"],
            "triggered_tags" => &["triggers", "tags", "at_least_one", "stop_after_first"],
            "tags_with_separator" => &["tags", "separator", "at_least_one", "stop_after_first"],
            _ => &[],
        };
        let is_neutral = |name: &str, value: &Value| {
            let empty = value.is_null() || *value == json!([]) || *value == json!(false);
            name == "type" || empty || (name == "style" && value == "json")
        };
        let odd =
            fields.iter().find(|(name, value)| !known.contains(&name.as_str()) && !is_neutral(name, value));
        match odd {
            Some((name, _)) => fail(path, format!("`{name}` is not supported in the format {kind:?}")),
            None => Ok(()),
        }
    }

    fn leaf(&mut self, fields: &Map<String, Value>, kind: &str, path: &str) -> Result<String> {
        let grammar = match kind {
            "json_schema" => {
                let Some(schema) = fields.get("json_schema") else {
                    return fail(path, "json_schema is missing");
                };
                Grammar::JsonSchema { schema: schema.clone(), options: SchemaOptions::default() }
            }
            "regex" => Grammar::Regex(text(fields, "pattern", path)?.to_owned()),
            _ => Grammar::Ebnf(text(fields, "grammar", path)?.to_owned()),
        };
        other_item(&grammar, self.parts)
    }

    fn elements(
        &mut self,
        fields: &Map<String, Value>,
        kind: &str,
        path: &str,
        position: Position,
    ) -> Result<String> {
        let list = list(fields, "elements", path)?;
        let mut items = Vec::with_capacity(list.len());
        for (i, element) in list.iter().enumerate() {
            let is_last = kind == "or" || i + 1 == list.len();
            items.push(self.format(element, &format!("{path}.elements[{i}]"), position.inner(is_last))?);
        }
        let body = items.join(if kind == "or" { " | " } else { " " });
        Ok(self.rule("", &body))
    }

    fn repeated(
        &mut self,
        fields: &Map<String, Value>,
        kind: &str,
        path: &str,
        position: Position,
    ) -> Result<String> {
        let content = fields.get("content").unwrap_or(&Value::Null);
        let item = self.format(content, &format!("{path}.content"), position.inner(kind == "optional"))?;
        let operator = match kind {
            "optional" => "?".to_owned(),
            "star" => "*".to_owned(),
            "plus" => "+".to_owned(),
            _ => {
                let min = fields.get("min").and_then(Value::as_u64).filter(|&min| min <= MAX_REPEAT);
                let max = fields.get("max").and_then(Value::as_i64).filter(|&max| max <= MAX_REPEAT as i64);
                match (min, max) {
                    (Some(min), Some(-1)) => format!("{{{min},}}"),
                    (Some(min), Some(max)) if max > 0 && max.unsigned_abs() >= min => {
                        format!("{{{min},{max}}}")
                    }
                    _ => {
                        return fail(
                            path,
                            format!("min and max must be counts up to {MAX_REPEAT}, or max -1"),
                        );
                    }
                }
            }
        };
        Ok(self.rule("", &format!("({item}){operator}")))
    }

    /// What follows `trigger`, the beginning of the tag that is already written.
    fn tag(&mut self, tag: &Tag<'_>, trigger: &str, position: Position) -> Result<String> {
        let begin = &tag.begin[trigger.len()..];
        let begin = if begin.is_empty() { String::new() } else { literal(begin) };
        let place = format!("{}.content", tag.place);
        let kind = tag.content.get("type").and_then(Value::as_str).unwrap_or_default();
        if let ("any_text" | "regex", Value::Object(fields)) = (kind, tag.content) {
            self.check_fields(fields, kind, &place)?;
        }
        let ends = tag.ends.iter().map(|end| escape(end)).collect::<Vec<_>>().join("|");
        // One terminal with the end in it: text and regular expressions would run over an end of its own.
        let rest = match (kind, tag.content) {
            ("any_text", _) if ends.is_empty() => {
                return fail(&place, "any_text needs an end that is not empty");
            }
            ("any_text", _) => self.rule("[lazy]", &format!("/(?s:.*)({ends})/")),
            ("regex", Value::Object(fields)) => {
                let regex = regex_item(text(fields, "pattern", &place)?)?;
                match ends.is_empty() {
                    true => regex,
                    false => self.terminal(&format!("{regex} /({ends})/")),
                }
            }
            _ => {
                let content = self.format(tag.content, &place, position.inner(false))?;
                let ends = tag.ends.iter().filter(|end| !end.is_empty()).map(|end| literal(end));
                let ends: Vec<String> = ends.collect();
                let end = if ends.is_empty() { String::new() } else { format!("({})", ends.join(" | ")) };
                format!("{content} {end}")
            }
        };
        Ok(self.rule("", &format!("{begin} {rest}")))
    }

    fn triggered(&mut self, fields: &Map<String, Value>, path: &str, position: Position) -> Result<String> {
        let triggers: Vec<&str> = list(fields, "triggers", path)?
            .iter()
            .filter_map(Value::as_str)
            .filter(|text| !text.is_empty())
            .collect();
        let tags = tags_of(fields, path)?;
        let mut parts = Vec::new();
        let mut num_tags = 0;
        for trigger in &triggers {
            let mut bodies = Vec::new();
            for tag in tags.iter().filter(|tag| tag.begin.starts_with(trigger)) {
                bodies.push(self.tag(tag, trigger, position.inner(false))?);
            }
            num_tags += bodies.len();
            if bodies.is_empty() {
                return fail(path, format!("no tag begins with the trigger {trigger:?}"));
            }
            let found = self.rule("[lazy]", &format!("/(?s:.*){}/", escape(trigger)));
            parts.push(format!("{found} ({})", bodies.join(" | ")));
        }
        if num_tags != tags.len() || tags.is_empty() {
            return fail(path, "every tag must begin with exactly one of the triggers");
        }
        let once = parts.join(" | ");
        let flag = |name: &str| fields.get(name).and_then(Value::as_bool).unwrap_or(false);
        let (at_least_one, stop) = (flag("at_least_one"), flag("stop_after_first"));
        let has_end = at_least_one && stop;
        if !(position.is_last || has_end) {
            return fail(path, "triggered_tags must come last: free text goes on to the end");
        }
        let body = match (at_least_one, stop) {
            (true, true) => once,
            (false, true) => format!("{once} | {}", self.free_text(&triggers)),
            (true, false) => format!("({once})+ {}", self.free_text(&triggers)),
            (false, false) => format!("({once})* {}", self.free_text(&triggers)),
        };
        Ok(self.rule("", &body))
    }

    fn separated(&mut self, fields: &Map<String, Value>, path: &str, position: Position) -> Result<String> {
        let separator = match text(fields, "separator", path)? {
            "" => String::new(),
            separator => literal(separator),
        };
        let mut bodies = Vec::new();
        for tag in tags_of(fields, path)? {
            bodies.push(self.tag(&tag, "", position.inner(false))?);
        }
        if bodies.is_empty() {
            return fail(path, "there are no tags");
        }
        let one = self.rule("", &bodies.join(" | "));
        let flag = |name: &str| fields.get(name).and_then(Value::as_bool).unwrap_or(false);
        let body = if flag("stop_after_first") { one } else { format!("{one} ({separator} {one})*") };
        let body = self.rule("", &body);
        Ok(if flag("at_least_one") { body } else { format!("({body})?") })
    }

    /// Text up to the end of the output, perhaps empty, in which none of `triggers` occurs.
    fn free_text(&mut self, triggers: &[&str]) -> String {
        let excluded = triggers.iter().map(|trigger| escape(trigger)).collect::<Vec<_>>().join("|");
        let text = match triggers.is_empty() {
            true => self.terminal("/(?s:.+)/"),
            false => self.terminal(&format!("/(?s:.+)/ & ~/(?s:.*)({excluded})(?s:.*)/")),
        };
        format!("{text}?")
    }
}

fn tags_of<'a>(fields: &'a Map<String, Value>, path: &str) -> Result<Vec<Tag<'a>>> {
    let tags = list(fields, "tags", path)?;
    tags.iter().enumerate().map(|(i, tag)| tag_of(tag, &format!("{path}.tags[{i}]"))).collect()
}

fn tag_of<'a>(tag: &'a Value, path: &str) -> Result<Tag<'a>> {
    let Value::Object(fields) = tag else {
        return fail(path, "must be an object with begin, content and end");
    };
    let ends = match fields.get("end") {
        Some(Value::String(end)) => vec![end.as_str()],
        Some(Value::Array(ends)) if !ends.is_empty() && ends.iter().all(Value::is_string) => {
            ends.iter().filter_map(Value::as_str).collect()
        }
        _ => return fail(path, "end must be a text or a list of texts"),
    };
    let Some(content) = fields.get("content") else { return fail(path, "content is missing") };
    Ok(Tag { begin: text(fields, "begin", path)?, content, ends, place: path.to_owned() })
}

fn text<'a>(fields: &'a Map<String, Value>, name: &str, path: &str) -> Result<&'a str> {
    match fields.get(name) {
        Some(Value::String(text)) => Ok(text),
        _ => fail(path, format!("{name} must be a text")),
    }
}

fn list<'a>(fields: &'a Map<String, Value>, name: &str, path: &str) -> Result<&'a [Value]> {
    match fields.get(name) {
        Some(Value::Array(list)) if !list.is_empty() => Ok(list),
        _ => fail(path, format!("{name} must be a list that is not empty")),
    }
}

fn fail<T>(path: &str, rule: impl Into<String>) -> Result<T> {
    refuse(format!("the structural tag at {path}"), rule)
}
