//! Comparing answers. Exact by default: the model is taught one wording.

use serde_json::Value;

/// What a model said, in the parts that an API separates.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// Text outside of thinking and tool calls.
    pub content: String,
    /// Calls in the order they were made.
    pub tool_calls: Vec<ToolCall>,
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// The function.
    pub name: String,
    /// Its arguments, an object.
    pub arguments: Value,
}

/// How an answer is compared with the right one. White space at the ends never counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// The same text.
    Text,
    /// The same JSON value: order of keys and spaces do not count.
    Json,
    /// The same calls with equal names and arguments, in the same order.
    ToolCalls,
}

impl Scoring {
    /// Whether `given` is as good as `right`.
    pub(crate) fn is_right(self, right: &Answer, given: &Answer) -> bool {
        match self {
            Self::Text => given.tool_calls.is_empty() && given.content.trim() == right.content.trim(),
            Self::Json => match (parse(&right.content), parse(&given.content)) {
                (Some(right), Some(given)) => right == given,
                _ => false,
            },
            Self::ToolCalls => given.tool_calls == right.tool_calls,
        }
    }
}

fn parse(text: &str) -> Option<Value> {
    serde_json::from_str(text.trim()).ok()
}

impl Answer {
    /// The answer in an assistant's message in OpenAI's form (`arguments` as an object or as JSON text).
    pub fn of_message(message: &Value) -> Self {
        let content = message["content"].as_str().unwrap_or_default().to_owned();
        let calls = message["tool_calls"].as_array().map(Vec::as_slice).unwrap_or_default();
        Self { content, tool_calls: calls.iter().map(ToolCall::of_value).collect() }
    }
}

impl ToolCall {
    fn of_value(call: &Value) -> Self {
        let function = call.get("function").unwrap_or(call);
        let arguments = match &function["arguments"] {
            Value::String(text) => serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone())),
            value => value.clone(),
        };
        Self { name: function["name"].as_str().unwrap_or_default().to_owned(), arguments }
    }
}
