//! Grammars that hold a model's output to a form: JSON schemas, regular expressions, choices, Lark and EBNF grammars,
//! structural tags, tool calls. Compiled here, applied token by token; matching itself is the `llguidance` crate's.
//!
//! A [`Grammar`] is what a request asks for. [`GrammarCompiler`], one per tokenizer, makes a [`CompiledGrammar`] of it,
//! under limits on size and work, and that makes one [`GrammarConstraint`] per sequence. Nothing here falls back to free
//! text: what cannot be enforced is refused with its place, and a constraint that fails ends its sequence.
//!
//! - `schema` looks a JSON schema over before it is compiled, `pattern` and `pattern_class` its patterns; `ebnf` turns
//!   GBNF into Lark; `tags` and `tools` write Lark for structural tags and tool calls; `lark` has what they share.
//! - `compiler` compiles, `constraint` masks, `lesson` keeps what sequences learn, `marker` finds the ends of thinking and of
//!   free text, `environment` shows our tokenizer to `llguidance`.

mod compiler;
mod constraint;
mod ebnf;
mod environment;
mod lark;
mod lesson;
mod marker;
mod pattern;
mod pattern_class;
mod schema;
mod tags;
mod tools;
mod xml_tools;

use serde_json::Value;

pub use self::compiler::{CompiledGrammar, GrammarCompiler};
pub use self::constraint::{GrammarConstraint, GrammarStart};
pub use self::schema::SchemaOptions;
pub use self::tools::{ToolCalls, ToolFunction, ToolMode};
use crate::TextError;

/// What an output has to look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// JSON that a schema accepts.
    JsonSchema {
        /// The schema: an object or a boolean.
        schema: Value,
        /// How it is read.
        options: SchemaOptions,
    },
    /// Text that a regular expression matches from its first to its last character.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's notation, or in GBNF (`root ::= ...`), which is recognised by its `::=`.
    Ebnf(String),
    /// Free text with tagged parts, in vLLM's and xgrammar's form.
    StructuralTag(Value),
    /// Tool calls, and perhaps text.
    ToolCalls(ToolCalls),
}

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema { schema: serde_json::json!({"type": "object"}), options: SchemaOptions::default() }
    }
}

/// A grammar that is refused.
pub(crate) fn refuse<T>(place: impl Into<String>, rule: impl Into<String>) -> Result<T, TextError> {
    Err(TextError::Grammar { place: place.into(), rule: rule.into() })
}
