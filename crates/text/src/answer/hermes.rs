//! One call in the JSON form: `{"name": "f", "arguments": {...}}`. The markers around it are the caller's.

use serde_json::Value;

use super::json::{JsonScanner, State as Json};
use super::output::Output;
use super::{CALL_CLOSE, CALL_OPEN, Progress, is_space, partial_suffix};

/// A call whose opening marker was just read.
#[derive(Default)]
pub(super) struct HermesCall {
    /// What was consumed before the arguments began: content, if it turns out to be no call.
    raw: String,
    scanner: JsonScanner,
    /// Where in `raw` the last key or value of the call's own object begins.
    start: usize,
    key: String,
    name: Option<String>,
    /// Where in `raw` an object of arguments lies that came before the name.
    early_arguments: Option<(usize, usize)>,
    place: Place,
    /// What was consumed behind the arguments.
    tail: String,
}

#[derive(Default, Clone, Copy, PartialEq)]
enum Place {
    /// Before the arguments of a call with a known name.
    #[default]
    Head,
    /// Inside the arguments of the call of this index, which are streamed.
    Arguments(usize),
    /// Inside arguments that are no JSON.
    Broken(usize),
    /// Behind the arguments.
    Tail(usize),
}

impl HermesCall {
    /// Writes what was consumed of something that is no call.
    pub(super) fn give_up(&self, output: &mut Output) {
        output.content(CALL_OPEN);
        output.content(&self.raw);
    }

    /// Reads on.
    pub(super) fn push(&mut self, text: &str, output: &mut Output) -> Progress {
        let mut consumed = 0;
        loop {
            let rest = &text[consumed..];
            consumed += match self.place {
                Place::Head => match self.head(rest, output) {
                    Ok(num_bytes) => num_bytes,
                    Err(num_bytes) => return Progress::Unreadable(consumed + num_bytes),
                },
                Place::Arguments(index) => self.arguments(index, rest, output),
                Place::Broken(index) => return self.broken(index, rest, consumed, output),
                Place::Tail(index) => return self.tail(index, rest, consumed, output),
            };
            if consumed == text.len() {
                return Progress::Needs(consumed);
            }
        }
    }

    /// The output ends inside the call.
    pub(super) fn finish(&mut self, rest: &str, output: &mut Output) {
        // A call needs no closing marker if all else is there.
        if self.place == Place::Head && self.scanner.state() == Json::Done {
            self.emit_whole(output);
        }
        match self.place {
            Place::Head => {
                self.give_up(output);
                output.content(rest);
            }
            Place::Arguments(index) | Place::Broken(index) => {
                output.arguments(index, rest);
                output.end_call(index);
            }
            Place::Tail(index) => {
                self.tail.push_str(rest);
                self.end_tail(index, output);
            }
        }
    }

    /// Reads up to the arguments. `Err`: what comes after so many bytes fits no call.
    fn head(&mut self, text: &str, output: &mut Output) -> Result<usize, usize> {
        for (at, char) in text.char_indices() {
            if self.scanner.state() == Json::Done {
                if is_space(char) {
                    self.raw.push(char);
                    continue;
                }
                // The call came in an unusual order; here it must end.
                return if self.emit_whole(output) { Ok(at) } else { Err(at) };
            }
            let (state, depth) = (self.scanner.state(), self.scanner.depth());
            let outside = depth == 0 && char != '{' && !is_space(char);
            if outside || !self.scanner.push(char) {
                return Err(at);
            }
            self.raw.push(char);
            let end = at + char.len_utf8();
            if depth == 1 && self.follow_member(state, char) {
                let index = output.start_call(self.name.clone().unwrap_or_default());
                output.arguments(index, "{");
                self.place = Place::Arguments(index);
                return Ok(end);
            }
            if depth == 2 && self.scanner.depth() == 1 && self.key == "arguments" && char == '}' {
                self.early_arguments = Some((self.start, self.raw.len()));
            }
        }
        Ok(text.len())
    }

    /// Notes keys and values of the call's own object; true when the arguments of a known name begin with `char`.
    fn follow_member(&mut self, before: Json, char: char) -> bool {
        let after = self.scanner.state();
        let begin = self.raw.len() - char.len_utf8();
        match (before, after) {
            (Json::Key | Json::KeyOrEnd, Json::String { .. }) => self.start = begin,
            (Json::String { is_key: true }, Json::Colon) => {
                self.key = serde_json::from_str(&self.raw[self.start..]).unwrap_or_default();
            }
            (Json::Value, _) if before != after => {
                self.start = begin;
                return char == '{' && self.key == "arguments" && self.name.is_some();
            }
            (Json::String { is_key: false }, Json::CommaOrEnd) if self.key == "name" => {
                self.name = serde_json::from_str(&self.raw[self.start..]).ok();
            }
            _ => {}
        }
        false
    }

    /// Emits a call that was read to its end in one piece; false if it is none.
    fn emit_whole(&mut self, output: &mut Output) -> bool {
        let Ok(Value::Object(call)) = serde_json::from_str(&self.raw) else { return false };
        let Some(name) = call.get("name").and_then(Value::as_str) else { return false };
        let arguments = match (self.early_arguments, call.get("arguments")) {
            (Some((start, end)), _) => self.raw[start..end].to_owned(),
            (None, None | Some(Value::Null)) => "{}".to_owned(),
            // JSON inside JSON is what the API wants.
            (None, Some(Value::String(text))) => text.clone(),
            (None, Some(other)) => other.to_string(),
        };
        let index = output.start_call(name.to_owned());
        output.arguments(index, &arguments);
        self.place = Place::Tail(index);
        self.tail.push('}');
        true
    }

    fn arguments(&mut self, index: usize, text: &str, output: &mut Output) -> usize {
        for (at, char) in text.char_indices() {
            if !self.scanner.push(char) {
                output.arguments(index, &text[..at]);
                self.place = Place::Broken(index);
                return at;
            }
            if self.scanner.depth() == 1 {
                let end = at + char.len_utf8();
                output.arguments(index, &text[..end]);
                self.place = Place::Tail(index);
                return end;
            }
        }
        output.arguments(index, text);
        text.len()
    }

    /// Nothing tells where broken arguments end but the marker.
    fn broken(&self, index: usize, text: &str, consumed: usize, output: &mut Output) -> Progress {
        let Some(at) = text.find(CALL_CLOSE) else {
            let num_bytes = text.len() - partial_suffix(text, &[CALL_CLOSE]);
            output.arguments(index, &text[..num_bytes]);
            return Progress::Needs(consumed + num_bytes);
        };
        output.arguments(index, &text[..at]);
        output.end_call(index);
        Progress::Ended(consumed + at + CALL_CLOSE.len())
    }

    /// A model that forgets to close a call begins the next one.
    fn tail(&mut self, index: usize, text: &str, consumed: usize, output: &mut Output) -> Progress {
        let found =
            [CALL_CLOSE, CALL_OPEN].into_iter().filter_map(|marker| Some((text.find(marker)?, marker)));
        let Some((at, marker)) = found.min() else {
            let num_bytes = text.len() - partial_suffix(text, &[CALL_CLOSE, CALL_OPEN]);
            self.tail.push_str(&text[..num_bytes]);
            return Progress::Needs(consumed + num_bytes);
        };
        self.tail.push_str(&text[..at]);
        self.end_tail(index, output);
        let num_marker_bytes = if marker == CALL_CLOSE { marker.len() } else { 0 };
        Progress::Ended(consumed + at + num_marker_bytes)
    }

    /// Braces too many or too few, and further members, say nothing to the client; all else is text.
    fn end_tail(&mut self, index: usize, output: &mut Output) {
        output.end_call(index);
        let only_braces = self.tail.chars().all(|char| is_space(char) || char == '}');
        let members = || serde_json::from_str::<Value>(&format!("{{\"arguments\": 0{}", self.tail)).is_ok();
        if !only_braces && !members() {
            output.content(&self.tail);
        }
    }
}
