//! What can go wrong with text. [`TextError::is_request_error`] tells a client's mistake from a broken checkpoint.

use std::path::PathBuf;

/// Error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file of the checkpoint cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file of the checkpoint is not what its format says.
    #[error("{path}: {reason}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks.
        reason: String,
    },
    /// The checkpoint has no chat template.
    #[error(
        "{dir} has no chat template (looked for chat_template.jinja, chat_template.json and the key chat_template of \
         tokenizer_config.json); send a plain prompt instead of messages"
    )]
    NoTemplate {
        /// The checkpoint folder.
        dir: PathBuf,
    },
    /// The tokenizer gave up on a text.
    #[error("the text cannot be tokenised: {reason}")]
    Encode {
        /// The tokenizer's reason.
        reason: String,
    },
    /// The template refused the conversation (`raise_exception`), or failed on it.
    #[error("the chat template refused the conversation: {reason}")]
    Template {
        /// The template's own text, or where it failed.
        reason: String,
    },
    /// A rendered prompt grew past the limit.
    #[error("the rendered prompt is over {limit} bytes")]
    RenderedTooLong {
        /// Most bytes that a rendering may have.
        limit: usize,
    },
    /// A template argument has a name that the renderer sets itself.
    #[error("chat_template_kwargs must not set `{name}`: the name is reserved")]
    ReservedArgument {
        /// The argument's name.
        name: String,
    },
    /// The messages are not in the form that chat completions have.
    #[error("messages{place}: {rule}")]
    Messages {
        /// Where, for example `[2].content[0]`.
        place: String,
        /// The rule that is broken.
        rule: String,
    },
    /// Media and their placeholders in the prompt do not pair up.
    #[error(
        "the rendered prompt has {found} media placeholders, but the request has {expected} media of that kind"
    )]
    Placeholders {
        /// Placeholder tokens in the prompt.
        found: usize,
        /// Media of the request.
        expected: usize,
    },
    /// A grammar for the output cannot be used.
    #[error("{place}: {rule}")]
    Grammar {
        /// What is wrong, for example `the JSON schema at #/properties/age`.
        place: String,
        /// The rule that it breaks, and the value.
        rule: String,
    },
    /// A list of stop strings breaks a limit.
    #[error("stop: {rule}")]
    Stop {
        /// The rule and the value.
        rule: String,
    },
}

impl TextError {
    /// Whether the request is at fault (a 400), rather than the checkpoint.
    pub fn is_request_error(&self) -> bool {
        !matches!(self, Self::Io { .. } | Self::Checkpoint { .. })
    }
}
