//! Tasks of text alone: arithmetic, lists, extraction, tools, instructions, conversation. No pictures.

mod arithmetic;
mod dialogue;
mod extract;
mod greeting;
mod instruct;
mod lists;
mod phrase;
#[cfg(test)]
mod tests;
mod thinking;
mod tool_use;
mod toolbox;

use serde_json::{Map, Value};

use crate::message::{assistant, user};
use crate::{Sample, Scoring, Task};

/// The tasks of this module, in the order of tables.
pub(crate) const TASKS: &[Task] = &[
    Task {
        name: "add",
        about: "Addition of two numbers of up to three digits.",
        weight: 1.0,
        generate: arithmetic::add,
    },
    Task {
        name: "subtract",
        about: "Subtraction of numbers of up to three digits; the result is never negative.",
        weight: 1.0,
        generate: arithmetic::subtract,
    },
    Task {
        name: "multiply",
        about: "A number of up to three digits times one digit.",
        weight: 1.0,
        generate: arithmetic::multiply,
    },
    Task {
        name: "sort",
        about: "Three to six numbers, or three to five words with different initials, in either order.",
        weight: 1.0,
        generate: lists::sort,
    },
    Task {
        name: "reverse",
        about: "A list of three to six entries, or the letters of a word, backwards.",
        weight: 1.0,
        generate: lists::reverse,
    },
    Task {
        name: "count_letters",
        about: "How often a letter is in a word.",
        weight: 1.0,
        generate: lists::count_letters,
    },
    Task {
        name: "json_extract",
        about: "Two to four fields of a sentence as a JSON object.",
        weight: 1.0,
        generate: extract::json_extract,
    },
    Task {
        name: "tool_call",
        about: "One call of the tool that a question needs, or text when it needs none.",
        weight: 1.0,
        generate: tool_use::tool_call,
    },
    Task {
        name: "tool_parallel",
        about: "Two or three calls in one message.",
        weight: 1.0,
        generate: tool_use::tool_parallel,
    },
    Task {
        name: "tool_result",
        about: "A sentence made from the results of calls.",
        weight: 1.0,
        generate: tool_use::tool_result,
    },
    Task {
        name: "system_prompt",
        about: "An easy question under an instruction of the system prompt.",
        weight: 1.0,
        generate: instruct::system_prompt,
    },
    Task {
        name: "memory",
        about: "A fact that the user told some turns ago.",
        weight: 1.0,
        generate: dialogue::memory,
    },
    Task {
        name: "thinking",
        about: "Arithmetic, sorting and counting with written steps before the answer.",
        weight: 1.0,
        generate: thinking::thinking,
    },
    Task {
        name: "greeting",
        about: "Greetings, questions about the model, and what it cannot answer.",
        weight: 1.0,
        generate: greeting::greeting,
    },
];

/// A sample of one question and one answer, compared as text.
fn exercise(content: String, question: &str, answer: &str) -> Sample {
    conversation(content, vec![user(question)], assistant(answer))
}

/// A sample without tools and template variables, compared as text.
fn conversation(content: String, messages: Vec<Value>, answer: Value) -> Sample {
    Sample {
        content,
        messages,
        tools: Vec::new(),
        template_kwargs: Map::new(),
        pictures: Vec::new(),
        answer,
        scoring: Scoring::Text,
    }
}
