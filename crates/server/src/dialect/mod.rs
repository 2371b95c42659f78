//! The dialects of an answer. All requests become one kind of chat or completion and are answered by one stream of
//! deltas; a dialect is a translation of the body at the one end, and a writer of the deltas at the other.

mod blocks;
mod llama;
pub(crate) mod messages;
mod node;
pub(crate) mod responses;

use std::sync::Arc;

use serde_json::Value;

use self::llama::{LlamaHead, LlamaWriter};
use self::messages::MessageWriter;
use self::responses::{ResponseHead, ResponseWriter};
use crate::answer::{Answer, Shape};
use crate::chunks::ChunkWriter;
use crate::{ApiError, Delta};

/// What an answer looks like.
pub(crate) enum Form {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/chat/completions/batch`
    Batch,
    /// `/v1/completions`
    Completion,
    /// `/v1/messages`
    Message,
    /// `/v1/responses`
    Response(Box<ResponseHead>),
    /// `/completion`
    Llama(Arc<LlamaHead>),
}

/// How the events of a stream look, and how it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// Data alone, the last of it `[DONE]`.
    Done,
    /// Data named by its type.
    Named,
    /// Data alone, the last of which says that it is.
    Plain,
}

impl Form {
    /// Whether the prompt is a conversation.
    pub(crate) fn is_chat(&self) -> bool {
        !matches!(self, Self::Completion | Self::Llama(_))
    }

    /// The id of the answer to a request.
    pub(crate) fn id(&self, request_id: &str) -> String {
        match self {
            Self::Chat | Self::Batch => format!("chatcmpl-{request_id}"),
            Self::Completion | Self::Llama(_) => format!("cmpl-{request_id}"),
            Self::Message => format!("msg_{request_id}"),
            Self::Response(_) => format!("resp_{request_id}"),
        }
    }

    /// What the events of a stream look like.
    pub(crate) fn framing(&self) -> Framing {
        match self {
            Self::Chat | Self::Batch | Self::Completion => Framing::Done,
            Self::Message | Self::Response(_) => Framing::Named,
            Self::Llama(_) => Framing::Plain,
        }
    }

    /// A seed that nobody asked for. llama-server shows it, and its seeds have 32 bits.
    pub(crate) fn seed(&self, drawn: u64) -> u64 {
        if let Self::Llama(_) = self { drawn & u64::from(u32::MAX) } else { drawn }
    }

    /// Bytes of the request that each choice repeats, its prompt aside.
    pub(crate) fn repeated_bytes(&self) -> usize {
        if let Self::Llama(head) = self { head.settings_bytes() } else { 0 }
    }

    /// Whether the answer repeats its prompts.
    pub(crate) fn shows_prompts(&self) -> bool {
        matches!(self, Self::Llama(_))
    }
}

/// Writes the deltas of a streamed answer.
pub(crate) enum Writer {
    Chunks(ChunkWriter),
    Message(MessageWriter),
    Response(ResponseWriter),
    Llama(LlamaWriter),
}

impl Writer {
    pub(crate) fn new(shape: &Shape) -> Self {
        match &shape.form {
            Form::Chat | Form::Batch | Form::Completion => Self::Chunks(ChunkWriter::new(shape)),
            Form::Message => Self::Message(MessageWriter::default()),
            Form::Response(_) => Self::Response(ResponseWriter::default()),
            Form::Llama(head) => Self::Llama(LlamaWriter::new(head.clone(), shape)),
        }
    }

    /// What is sent of one delta.
    pub(crate) fn write(&mut self, shape: &Shape, delta: &Delta) -> Vec<Value> {
        match self {
            Self::Chunks(writer) => writer.write(shape, delta),
            Self::Message(writer) => writer.write(shape, delta),
            Self::Response(writer) => writer.write(shape, delta),
            Self::Llama(writer) => writer.write(shape, delta),
        }
    }

    /// What is sent when all choices have ended.
    pub(crate) fn finish(&mut self, shape: &Shape) -> Vec<Value> {
        match self {
            Self::Chunks(writer) => writer.usage(shape).into_iter().collect(),
            Self::Message(writer) => writer.finish(shape),
            Self::Response(writer) => writer.finish(shape),
            // Each choice has said that it ended.
            Self::Llama(_) => Vec::new(),
        }
    }

    /// What is sent when the answer breaks off.
    pub(crate) fn fail(&mut self, shape: &Shape, error: &ApiError) -> Vec<Value> {
        match self {
            Self::Chunks(_) | Self::Llama(_) => vec![error.to_json()],
            Self::Message(_) => vec![messages::error_json(error, Some(&shape.request_id))],
            Self::Response(writer) => writer.fail(shape, error),
        }
    }
}

/// Collects the deltas of an answer that is sent in one piece.
pub(crate) enum Whole {
    Answer(Answer),
    Message(MessageWriter),
    Response(ResponseWriter),
    Llama(Arc<LlamaHead>, Answer),
}

impl Whole {
    pub(crate) fn new(shape: &Shape) -> Self {
        match &shape.form {
            Form::Chat | Form::Batch | Form::Completion => Self::Answer(Answer::new(shape.num_choices())),
            Form::Message => Self::Message(MessageWriter::default()),
            Form::Response(_) => Self::Response(ResponseWriter::default()),
            Form::Llama(head) => Self::Llama(head.clone(), Answer::new(shape.num_choices())),
        }
    }

    pub(crate) fn add(&mut self, shape: &Shape, delta: Delta) {
        match self {
            Self::Answer(answer) | Self::Llama(_, answer) => answer.add(delta),
            Self::Message(writer) => writer.collect(&delta),
            Self::Response(writer) => writer.collect(shape, &delta),
        }
    }

    /// The answer has broken off. Returns the error as its client gets it.
    pub(crate) fn fail(&mut self, shape: &Shape, error: ApiError) -> ApiError {
        if let Self::Response(writer) = self {
            writer.keep_failure(shape, &error);
        }
        error
    }

    pub(crate) fn into_json(self, shape: &Shape) -> Value {
        match self {
            Self::Answer(answer) => answer.into_json(shape),
            Self::Message(writer) => writer.into_json(shape),
            Self::Response(writer) => writer.into_json(shape),
            Self::Llama(head, answer) => head.whole(shape, answer.into_choices()),
        }
    }
}
