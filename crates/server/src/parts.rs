//! The text of one choice, divided into reasoning, content and tool calls as its request wants them.

use spark_text::{AnswerEvent, AnswerOptions, AnswerParser};

use crate::Delta;
use crate::ids::random_id;
use crate::tools::AnswerForm;

/// What a piece of output adds to one tool call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCallDelta {
    /// Counts the calls of the choice from 0.
    pub index: usize,
    /// Set in the first delta of a call.
    pub start: Option<ToolCallStart>,
    /// The next piece of the arguments, a JSON text as the model writes it; empty in the first delta.
    pub arguments: String,
}

/// The beginning of a tool call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCallStart {
    /// Made here: unique, and the same in all that is said about the call.
    pub id: String,
    /// The function's name.
    pub name: String,
}

/// How the outputs of a prompt are taken apart.
#[derive(Debug, Clone)]
pub(crate) struct AnswerPlan {
    pub(crate) options: AnswerOptions,
    pub(crate) form: AnswerForm,
}

/// Divides the text of one choice.
pub(crate) struct Parts {
    /// `None`: all text is content.
    parser: Option<(AnswerParser, AnswerForm)>,
    has_calls: bool,
}

impl Parts {
    pub(crate) fn new(plan: Option<AnswerPlan>) -> Self {
        Self { parser: plan.map(|plan| (AnswerParser::new(plan.options), plan.form)), has_calls: false }
    }

    /// Adds a piece of text to `delta`.
    pub(crate) fn push(&mut self, text: &str, delta: &mut Delta) {
        let Some((parser, _)) = &mut self.parser else {
            delta.text.push_str(text);
            return;
        };
        let was_reasoning = parser.is_reasoning();
        let events = parser.push(text);
        // The tokens of the markers themselves are not counted.
        if was_reasoning && parser.is_reasoning() {
            delta.num_reasoning_tokens += delta.tokens.len();
        }
        self.add(events, delta);
    }

    /// Adds what was held back.
    pub(crate) fn finish(&mut self, delta: &mut Delta) {
        if let Some((parser, _)) = &mut self.parser {
            let events = parser.finish();
            self.add(events, delta);
        }
    }

    /// Whether a tool call has begun.
    pub(crate) fn has_calls(&self) -> bool {
        self.has_calls
    }

    fn add(&mut self, events: Vec<AnswerEvent>, delta: &mut Delta) {
        let Some((_, form)) = &self.parser else { return };
        let is_dropped = |index: usize| form.only_first_call && index > 0;
        for event in events {
            match event {
                AnswerEvent::Reasoning(text) if form.include_reasoning => delta.reasoning.push_str(&text),
                AnswerEvent::Content(text) => delta.text.push_str(&text),
                AnswerEvent::ToolCallStart { index, name } if !is_dropped(index) => {
                    self.has_calls = true;
                    let start = Some(ToolCallStart { id: format!("call_{}", random_id()), name });
                    delta.tool_calls.push(ToolCallDelta { index, start, arguments: String::new() });
                }
                AnswerEvent::ToolCallArguments { index, delta: arguments } if !is_dropped(index) => {
                    delta.tool_calls.push(ToolCallDelta { index, start: None, arguments });
                }
                AnswerEvent::Reasoning(_)
                | AnswerEvent::ToolCallStart { .. }
                | AnswerEvent::ToolCallArguments { .. }
                | AnswerEvent::ToolCallEnd { .. } => {}
            }
        }
    }
}
