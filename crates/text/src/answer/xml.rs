//! One call in the XML form: `<function=f>` with `<parameter=p>` around each value. The markers around it are the
//! caller's.
//!
//! Values have no quotes, so their types come from the tools of the request. Where those say nothing, a value that is
//! JSON is taken as it is, and any other is a string.

use std::sync::Arc;

use serde_json::{Value, json};

use super::output::Output;
use super::{CALL_CLOSE, CALL_OPEN, Progress, is_space, partial_suffix};

pub(super) const FUNCTION_OPEN: &str = "<function=";
const FUNCTION_CLOSE: &str = "</function>";
const PARAMETER_OPEN: &str = "<parameter=";
const PARAMETER_CLOSE: &str = "</parameter>";
/// What ends a value. Models forget the first of these at times; the others cannot be part of one either.
const VALUE_ENDS: [&str; 3] = [PARAMETER_CLOSE, PARAMETER_OPEN, FUNCTION_CLOSE];
/// The same behind the newline that belongs to the tag.
const VALUE_ENDS_ON_A_LINE: [&str; 3] = ["\n</parameter>", "\n<parameter=", "\n</function>"];

/// A call whose opening marker was just read.
pub(super) struct XmlCall {
    tools: Arc<Value>,
    /// What was consumed before the function's name was known, marker included: content, if it turns out to be no call.
    raw: String,
    /// White space since the last tag: content, if text follows.
    spaces: String,
    place: Place,
    function: String,
    index: usize,
    num_parameters: usize,
    parameter: String,
    /// A value that has to be whole before it can be written.
    value: String,
    /// Whether some of a string has been read, so that no newline at its beginning is the tag's.
    has_begun: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before `<function=`.
    Open,
    FunctionName,
    /// Between parameters.
    Body,
    ParameterName,
    /// A string: written as it comes.
    Text,
    /// Any other value, or one of unknown type.
    Typed,
    /// Behind `</function>`.
    Closed,
}

/// What a place made of a text.
enum Step {
    /// Consumed so many bytes; go on.
    Go(usize),
    /// Consumed so many bytes, and needs more text.
    Wait(usize),
    /// The call ended after so many bytes.
    End(usize),
    /// What comes after so many bytes fits no call.
    Refuse(usize),
}

impl XmlCall {
    /// A call behind `<tool_call>`; `tools` have the types of parameters.
    pub(super) fn new(tools: Arc<Value>) -> Self {
        Self {
            tools,
            raw: CALL_OPEN.to_owned(),
            spaces: String::new(),
            place: Place::Open,
            function: String::new(),
            index: 0,
            num_parameters: 0,
            parameter: String::new(),
            value: String::new(),
            has_begun: false,
        }
    }

    /// Writes what was consumed of something that is no call.
    pub(super) fn give_up(&self, output: &mut Output) {
        output.content(&self.raw);
    }

    /// Reads on.
    pub(super) fn push(&mut self, text: &str, output: &mut Output) -> Progress {
        let mut consumed = 0;
        loop {
            let rest = &text[consumed..];
            let step = match self.place {
                Place::Open => self.open(rest),
                Place::FunctionName => self.function_name(rest, output),
                Place::Body => self.body(rest, output),
                Place::ParameterName => self.parameter_name(rest, output),
                Place::Text | Place::Typed => self.value(rest, output),
                Place::Closed => self.closed(rest, output),
            };
            match step {
                Step::Go(num_bytes) => consumed += num_bytes,
                Step::Wait(num_bytes) => return Progress::Needs(consumed + num_bytes),
                Step::End(num_bytes) => return Progress::Ended(consumed + num_bytes),
                Step::Refuse(num_bytes) => return Progress::Unreadable(consumed + num_bytes),
            }
        }
    }

    /// The output ends inside the call.
    pub(super) fn finish(&mut self, rest: &str, output: &mut Output) {
        match self.place {
            Place::Open | Place::FunctionName => {
                self.give_up(output);
                output.content(rest);
                return;
            }
            Place::Text => output.arguments(self.index, &escaped(rest)),
            Place::Typed => {
                self.value.push_str(rest);
                output.arguments(self.index, &self.value);
            }
            Place::ParameterName => {
                output.content(PARAMETER_OPEN);
                output.content(&self.parameter);
                output.content(rest);
            }
            Place::Closed => {
                output.content(&self.spaces);
                output.content(rest);
                return;
            }
            Place::Body => {
                output.content(&self.spaces);
                output.content(rest);
            }
        }
        output.end_call(self.index);
    }

    fn open(&mut self, text: &str) -> Step {
        let tag = text.trim_start_matches(is_space);
        let num_spaces = text.len() - tag.len();
        self.raw.push_str(&text[..num_spaces]);
        if tag.starts_with(FUNCTION_OPEN) {
            self.raw.push_str(FUNCTION_OPEN);
            self.function.clear();
            self.place = Place::FunctionName;
            return Step::Go(num_spaces + FUNCTION_OPEN.len());
        }
        match FUNCTION_OPEN.starts_with(tag) {
            true => Step::Wait(num_spaces),
            false => Step::Refuse(num_spaces),
        }
    }

    fn function_name(&mut self, text: &str, output: &mut Output) -> Step {
        let Some(at) = text.find(['>', '<', '\n']) else {
            self.raw.push_str(text);
            self.function.push_str(text);
            return Step::Wait(text.len());
        };
        self.raw.push_str(&text[..at]);
        self.function.push_str(&text[..at]);
        if !text[at..].starts_with('>') || self.function.trim().is_empty() {
            return Step::Refuse(at);
        }
        self.index = output.start_call(self.function.trim().to_owned());
        output.arguments(self.index, "{");
        self.num_parameters = 0;
        self.place = Place::Body;
        Step::Go(at + 1)
    }

    fn body(&mut self, text: &str, output: &mut Output) -> Step {
        let tag = self.take_spaces(text);
        let num_spaces = text.len() - tag.len();
        if tag.starts_with(PARAMETER_OPEN) {
            self.spaces.clear();
            self.parameter.clear();
            self.place = Place::ParameterName;
            return Step::Go(num_spaces + PARAMETER_OPEN.len());
        }
        let ends = [(FUNCTION_CLOSE, FUNCTION_CLOSE.len()), (CALL_CLOSE, 0)];
        if let Some((_, num_bytes)) = ends.into_iter().find(|(end, _)| tag.starts_with(end)) {
            self.spaces.clear();
            output.arguments(self.index, "}");
            output.end_call(self.index);
            self.place = Place::Closed;
            return Step::Go(num_spaces + num_bytes);
        }
        if [PARAMETER_OPEN, FUNCTION_CLOSE, CALL_CLOSE].iter().any(|end| end.starts_with(tag)) {
            return Step::Wait(num_spaces);
        }
        // Text between parameters belongs to none, and is not lost either.
        let first = tag.chars().next().map_or(0, char::len_utf8);
        let ends_text = |char| char == '<' || is_space(char);
        let num_bytes = first + tag[first..].find(ends_text).unwrap_or(tag.len() - first);
        output.content(&std::mem::take(&mut self.spaces));
        output.content(&tag[..num_bytes]);
        Step::Go(num_spaces + num_bytes)
    }

    /// Sets the white space at the beginning of `text` aside; returns what follows.
    fn take_spaces<'a>(&mut self, text: &'a str) -> &'a str {
        let rest = text.trim_start_matches(is_space);
        self.spaces.push_str(&text[..text.len() - rest.len()]);
        rest
    }

    fn parameter_name(&mut self, text: &str, output: &mut Output) -> Step {
        let Some(at) = text.find(['>', '<', '\n']) else {
            self.parameter.push_str(text);
            return Step::Wait(text.len());
        };
        self.parameter.push_str(&text[..at]);
        if !text[at..].starts_with('>') {
            output.content(PARAMETER_OPEN);
            output.content(&self.parameter);
            self.place = Place::Body;
            return Step::Go(at);
        }
        let comma = if self.num_parameters == 0 { "" } else { ", " };
        self.num_parameters += 1;
        output.arguments(self.index, &format!("{comma}{}: ", json!(self.parameter.trim())));
        self.value.clear();
        self.has_begun = false;
        self.place = match self.wants_text() {
            Some(true) => {
                output.arguments(self.index, "\"");
                Place::Text
            }
            _ => Place::Typed,
        };
        Step::Go(at + 1)
    }

    fn value(&mut self, text: &str, output: &mut Output) -> Step {
        // The tag's own newline.
        if !self.has_begun && !text.is_empty() {
            self.has_begun = true;
            if text.starts_with('\n') {
                return Step::Go(1);
            }
        }
        let found = VALUE_ENDS.iter().filter_map(|end| Some((text.find(end)?, *end))).min();
        let Some((at, end)) = found else {
            let kept = partial_suffix(text, &VALUE_ENDS_ON_A_LINE).max(partial_suffix(text, &VALUE_ENDS));
            let num_bytes = text.len() - kept;
            self.add_to_value(&text[..num_bytes], output);
            return Step::Wait(num_bytes);
        };
        let value = &text[..at];
        self.add_to_value(value.strip_suffix('\n').unwrap_or(value), output);
        match self.place {
            Place::Text => output.arguments(self.index, "\""),
            _ => output.arguments(self.index, &typed(&self.value, self.wants_text())),
        }
        self.place = Place::Body;
        Step::Go(at + if end == PARAMETER_CLOSE { end.len() } else { 0 })
    }

    fn add_to_value(&mut self, text: &str, output: &mut Output) {
        match self.place {
            Place::Text => output.arguments(self.index, &escaped(text)),
            _ => self.value.push_str(text),
        }
    }

    /// A second function may follow in the same call.
    fn closed(&mut self, text: &str, output: &mut Output) -> Step {
        let tag = self.take_spaces(text);
        let num_spaces = text.len() - tag.len();
        if tag.starts_with(CALL_CLOSE) {
            return Step::End(num_spaces + CALL_CLOSE.len());
        }
        if tag.starts_with(FUNCTION_OPEN) {
            self.raw = std::mem::take(&mut self.spaces);
            self.place = Place::Open;
            return Step::Go(num_spaces);
        }
        if CALL_CLOSE.starts_with(tag) || FUNCTION_OPEN.starts_with(tag) {
            return Step::Wait(num_spaces);
        }
        output.content(&self.spaces);
        Step::End(num_spaces)
    }

    /// Whether the tools say that the parameter is a string; `None` where they say nothing.
    fn wants_text(&self) -> Option<bool> {
        let is_named = |tool: &&Value| {
            tool.pointer("/function/name").and_then(Value::as_str) == Some(self.function.trim())
        };
        let tool = self.tools.as_array()?.iter().find(is_named)?;
        let kind =
            tool.pointer("/function/parameters/properties")?.get(self.parameter.trim())?.get("type")?;
        match kind {
            Value::String(kind) => Some(kind == "string"),
            _ => None,
        }
    }
}

/// A text as the inside of a JSON string.
fn escaped(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// The JSON of a value that need not be a string. Python's words for three values are common.
fn typed(value: &str, wants_text: Option<bool>) -> String {
    let word = value.trim();
    match word {
        _ if serde_json::from_str::<Value>(word).is_ok() => word.to_owned(),
        "True" if wants_text == Some(false) => "true".to_owned(),
        "False" if wants_text == Some(false) => "false".to_owned(),
        "None" if wants_text == Some(false) => "null".to_owned(),
        _ => Value::from(value).to_string(),
    }
}
