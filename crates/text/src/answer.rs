//! What a model wrote, told apart while it comes: reasoning, content and tool calls. Knows no JSON body and no ids.
//!
//! [`AnswerParser`] takes detokenised text in pieces of any size. How the text is cut does not change what the events
//! join to. No text is lost, except white space next to a marker, which is the template's and not the model's:
//!
//! - A tool call that cannot be read comes out as content, markers included.
//! - Once a call's name is known and its arguments have begun, they are handed on as written. If they turn out not to be
//!   JSON, or the output ends inside them, they stay what the model wrote: a client finds out by parsing them, as with
//!   every other server of this API.

mod hermes;
mod json;
mod output;
mod xml;

use std::sync::Arc;

use serde_json::Value;

use self::hermes::HermesCall;
use self::output::Output;
use self::xml::XmlCall;

/// Opens and closes a tool call, in both formats.
pub(crate) const CALL_OPEN: &str = "<tool_call>";
pub(crate) const CALL_CLOSE: &str = "</tool_call>";
/// What the XML form begins with inside the call.
pub(crate) const XML_FUNCTION: &str = xml::FUNCTION_OPEN;
/// Opens reasoning.
pub const THINK_OPEN: &str = "<think>";
/// Closes reasoning.
pub const THINK_CLOSE: &str = "</think>";

/// How a model writes a tool call between `<tool_call>` and `</tool_call>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `{"name": "f", "arguments": {...}}`: Qwen2.5, Qwen3, Qwen3-VL, Hermes.
    Hermes,
    /// `<function=f>`, then `<parameter=p>` and `</parameter>` around each value: Qwen3-Coder, Qwen3.5.
    Xml,
}

/// Where an output begins, for a model that thinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningStart {
    /// The prompt ended inside the block: all text up to `</think>` is reasoning.
    Inside,
    /// The model opens the block itself, or does not think: the output is reasoning if it begins with `<think>`.
    Outside,
}

/// What an [`AnswerParser`] looks for.
#[derive(Debug, Clone, Default)]
pub struct AnswerOptions {
    /// `None`: tool calls stay text.
    pub tool_format: Option<ToolFormat>,
    /// `None`: reasoning stays text.
    pub reasoning: Option<ReasoningStart>,
    /// The `tools` of the request, or null. The XML format has no types of its own: they come from the parameters here.
    pub tools: Arc<Value>,
}

impl AnswerOptions {
    /// The markers that a parser looks for. Where a tokenizer has them as special tokens, their text must be kept for it
    /// (see [`Detokenizer::keeping`](crate::Detokenizer::keeping)).
    pub fn markers(&self) -> impl Iterator<Item = &'static str> {
        let calls = self.tool_format.map(|_| [CALL_OPEN, CALL_CLOSE]);
        let thoughts = self.reasoning.map(|_| [THINK_OPEN, THINK_CLOSE]);
        calls.into_iter().chain(thoughts).flatten()
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnswerEvent {
    /// Text inside the thinking block.
    Reasoning(String),
    /// Text for the user.
    Content(String),
    /// A call begins.
    ToolCallStart {
        /// Counts the calls of the answer from 0.
        index: usize,
        /// The function's name.
        name: String,
    },
    /// The next piece of a call's arguments, which join to a JSON text.
    ToolCallArguments {
        /// As in the start.
        index: usize,
        /// Never empty.
        delta: String,
    },
    /// The call has ended, or the output inside it.
    ToolCallEnd {
        /// As in the start.
        index: usize,
    },
}

/// Reads one output, piece by piece. The cost is linear in the text.
pub struct AnswerParser {
    options: AnswerOptions,
    state: State,
    /// Text that the state has not consumed: the possible beginning of a marker.
    buffer: String,
    output: Output,
}

enum State {
    /// Only white space so far, and the output may begin with `<think>`.
    Start,
    Reasoning,
    Content,
    Hermes(HermesCall),
    Xml(XmlCall),
}

/// What a call's parser made of a text.
enum Progress {
    /// So many bytes are consumed; more are needed.
    Needs(usize),
    /// The call ended after so many bytes.
    Ended(usize),
    /// This is no call: what was consumed in all, this text included, is content.
    Unreadable(usize),
}

impl AnswerParser {
    /// A parser at the start of an output.
    pub fn new(options: AnswerOptions) -> Self {
        let state = match options.reasoning {
            None => State::Content,
            Some(ReasoningStart::Inside) => State::Reasoning,
            Some(ReasoningStart::Outside) => State::Start,
        };
        Self { options, state, buffer: String::new(), output: Output::default() }
    }

    /// Whether the text so far ends inside the thinking block.
    pub fn is_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning)
    }

    /// The events of the next piece of text.
    pub fn push(&mut self, text: &str) -> Vec<AnswerEvent> {
        self.buffer.push_str(text);
        self.run();
        self.output.take()
    }

    /// The events of the end of the text. The parser is used up.
    pub fn finish(&mut self) -> Vec<AnswerEvent> {
        let rest = std::mem::take(&mut self.buffer);
        match &mut self.state {
            State::Start | State::Content => self.output.content(&rest),
            State::Reasoning => self.output.reasoning(&rest),
            State::Hermes(call) => call.finish(&rest, &mut self.output),
            State::Xml(call) => call.finish(&rest, &mut self.output),
        }
        self.output.finish(matches!(self.state, State::Reasoning));
        self.output.take()
    }

    fn run(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut rest = buffer.as_str();
        while let Some(next) = self.step(rest) {
            rest = next;
        }
    }

    /// Consumes what the state can decide. `Some`: the state has changed, go on with this text. `None`: what is left
    /// waits in the buffer.
    fn step<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        match &mut self.state {
            State::Start => self.start(text),
            State::Reasoning => {
                let Some(at) = text.find(THINK_CLOSE) else {
                    let (done, kept) = text.split_at(text.len() - partial_suffix(text, &[THINK_CLOSE]));
                    self.output.reasoning(done);
                    return self.keep(kept);
                };
                self.output.reasoning(&text[..at]);
                self.output.end_reasoning();
                self.state = State::Content;
                Some(&text[at + THINK_CLOSE.len()..])
            }
            State::Content => self.content(text),
            State::Hermes(call) => {
                let progress = call.push(text, &mut self.output);
                self.after_call(text, &progress)
            }
            State::Xml(call) => {
                let progress = call.push(text, &mut self.output);
                self.after_call(text, &progress)
            }
        }
    }

    fn keep(&mut self, text: &str) -> Option<&'static str> {
        self.buffer.push_str(text);
        None
    }

    fn start<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        let word = text.trim_start_matches(is_space);
        self.output.hold(&text[..text.len() - word.len()]);
        if let Some(rest) = word.strip_prefix(THINK_OPEN) {
            self.output.drop_held();
            self.state = State::Reasoning;
            return Some(rest);
        }
        if THINK_OPEN.starts_with(word) {
            return self.keep(word);
        }
        self.state = State::Content;
        Some(word)
    }

    fn content<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        let Some(format) = self.options.tool_format else {
            self.output.content(text);
            return None;
        };
        let Some(at) = text.find(CALL_OPEN) else {
            let (done, kept) = text.split_at(text.len() - partial_suffix(text, &[CALL_OPEN]));
            self.output.content(done);
            return self.keep(kept);
        };
        self.output.content(&text[..at]);
        self.state = match format {
            ToolFormat::Hermes => State::Hermes(HermesCall::default()),
            ToolFormat::Xml => State::Xml(XmlCall::new(self.options.tools.clone())),
        };
        Some(&text[at + CALL_OPEN.len()..])
    }

    fn after_call<'a>(&mut self, text: &'a str, progress: &Progress) -> Option<&'a str> {
        let consumed = match *progress {
            Progress::Needs(consumed) => return self.keep(&text[consumed..]),
            Progress::Ended(consumed) => consumed,
            Progress::Unreadable(consumed) => {
                match &self.state {
                    State::Hermes(call) => call.give_up(&mut self.output),
                    State::Xml(call) => call.give_up(&mut self.output),
                    State::Start | State::Reasoning | State::Content => {}
                }
                consumed
            }
        };
        self.state = State::Content;
        Some(&text[consumed..])
    }
}

/// White space around markers.
fn is_space(char: char) -> bool {
    matches!(char, ' ' | '\n' | '\r' | '\t')
}

/// Bytes at the end of `text` that one of `markers` may begin with.
fn partial_suffix(text: &str, markers: &[&str]) -> usize {
    let longest = markers.iter().map(|marker| marker.len() - 1).max().unwrap_or(0);
    let may_begin = |num_bytes: &usize| {
        let suffix = &text.as_bytes()[text.len() - num_bytes..];
        markers.iter().any(|marker| marker.len() > suffix.len() && marker.as_bytes().starts_with(suffix))
    };
    (1..=longest.min(text.len())).rev().find(may_begin).unwrap_or(0)
}

/// A whole answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParsedAnswer {
    /// The text of the thinking block; `None` if there is none, or it is empty.
    pub reasoning: Option<String>,
    /// The text outside of reasoning and calls.
    pub content: String,
    /// The calls in order.
    pub tool_calls: Vec<ParsedToolCall>,
}

/// One tool call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedToolCall {
    /// The function's name.
    pub name: String,
    /// A JSON text, as the model wrote it.
    pub arguments: String,
}

impl ParsedAnswer {
    /// Adds an event.
    pub fn add(&mut self, event: AnswerEvent) {
        match event {
            AnswerEvent::Reasoning(text) => self.reasoning.get_or_insert_default().push_str(&text),
            AnswerEvent::Content(text) => self.content.push_str(&text),
            AnswerEvent::ToolCallStart { name, .. } => {
                self.tool_calls.push(ParsedToolCall { name, arguments: String::new() });
            }
            AnswerEvent::ToolCallArguments { index, delta } => {
                if let Some(call) = self.tool_calls.get_mut(index) {
                    call.arguments.push_str(&delta);
                }
            }
            AnswerEvent::ToolCallEnd { .. } => {}
        }
    }
}

/// Reads a whole output: what the events of an [`AnswerParser`] join to.
pub fn parse_answer(text: &str, options: AnswerOptions) -> ParsedAnswer {
    let mut parser = AnswerParser::new(options);
    let mut answer = ParsedAnswer::default();
    parser.push(text).into_iter().for_each(|event| answer.add(event));
    parser.finish().into_iter().for_each(|event| answer.add(event));
    answer
}
