//! Text in, token ids out, and back: tokenizer, chat template, incremental detokenizer, stop strings, the parser that
//! tells reasoning, content and tool calls of an output apart, and the grammars that hold an output to a form.
//!
//! Knows neither HTTP nor the engine: the server turns a conversation into [`Segment`]s with [`ChatTemplate`], these
//! into ids with [`Tokenizer`], and the generated ids into text with [`Detokenizer`] and [`StopMatcher`].
//! Special tokens in text that a user wrote are never special: the template keeps its own text and the user's apart.
#![forbid(unsafe_code)]

mod answer;
mod detokenizer;
mod error;
mod grammar;
mod logprob;
mod placeholder;
mod stop;
mod template;
mod tokenizer;
mod vocabulary;

pub use answer::{
    AnswerEvent, AnswerOptions, AnswerParser, ParsedAnswer, ParsedToolCall, ReasoningStart, THINK_CLOSE,
    THINK_OPEN, ToolFormat, parse_answer,
};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use grammar::{
    CompiledGrammar, Grammar, GrammarCompiler, GrammarConstraint, GrammarStart, SchemaOptions, ToolCalls,
    ToolFunction, ToolMode,
};
pub use logprob::TokenText;
pub use placeholder::{IMAGE_PLACEHOLDER, PlaceholderRun, expand_media, expand_placeholders, expand_videos};
pub use stop::{StopMatcher, StopOutput, StopStrings};
pub use template::{
    ChatTemplate, Conversation, MediaKind, MediaPart, RenderInput, THINKING_SWITCH, prepare_messages,
};
pub use tokenizer::{Segment, Tokenizer};

/// Result of this crate.
pub type Result<T, E = TextError> = std::result::Result<T, E>;
