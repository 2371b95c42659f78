//! One exercise: a conversation, the pictures in it, the answer that is right.

use serde_json::{Map, Value};

use crate::{Answer, Picture, Scoring};

/// One exercise of a task.
#[derive(Debug, Clone)]
pub struct Sample {
    /// What makes this content itself (operands, text in the picture, layout of the scene), without its styling. Decides
    /// the split: equal content is never in both.
    pub content: String,
    /// The messages up to the question, in OpenAI's form. A picture is the part `{"type": "image"}`, in the order of
    /// `pictures`.
    pub messages: Vec<Value>,
    /// Definitions of tools, in OpenAI's form; empty if the conversation has none.
    pub tools: Vec<Value>,
    /// Variables for the chat template: `{"enable_thinking": true}`, or nothing.
    pub template_kwargs: Map<String, Value>,
    /// Pictures in the order of their parts.
    pub pictures: Vec<Picture>,
    /// The assistant's message that is right, as a chat template takes it: `content`, and where they apply
    /// `reasoning_content` and `tool_calls` (with `arguments` as an object).
    pub answer: Value,
    /// How an answer is compared.
    pub scoring: Scoring,
}

impl Sample {
    /// Whether `answer` is right.
    pub fn is_right(&self, answer: &Answer) -> bool {
        self.scoring.is_right(&Answer::of_message(&self.answer), answer)
    }
}
