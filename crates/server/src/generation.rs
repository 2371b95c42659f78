//! A request at work: the choices of all its prompts, merged in the order in which their tokens come.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::{SelectAll, Stream};
use serde_json::Value;
use spark_api::TokenId;

use crate::answer::{Answer, Shape};
use crate::choice::Choice;
use crate::chunks::ChunkWriter;
use crate::{ApiError, Delta};

/// One prompt of a request, for the parts of an answer that repeat it.
#[derive(Debug, Clone)]
pub(crate) struct PromptInfo {
    pub(crate) tokens: Arc<[TokenId]>,
    /// What `echo` puts before the text; empty without it.
    pub(crate) echo: String,
}

/// A request whose sequences are queued. Dropping it cancels them.
///
/// Read it once, in one of three ways: [`next`](Self::next) for text, [`into_response`](Self::into_response) for the
/// whole answer, [`into_chunks`](Self::into_chunks) for the chunks of a streamed one.
pub struct Generation {
    pub(crate) shape: Shape,
    pub(crate) choices: SelectAll<Choice>,
}

impl Generation {
    /// The next piece of any choice; `None` when all have ended.
    ///
    /// # Errors
    /// When the engine stops or fails. The other choices can still be read.
    pub async fn next(&mut self) -> Option<Result<Delta, ApiError>> {
        self.choices.next().await
    }

    /// Whether the body asked for a streamed answer.
    pub fn is_streamed(&self) -> bool {
        self.shape.stream.stream
    }

    /// Tokens of all prompts together.
    pub fn num_prompt_tokens(&self) -> usize {
        self.shape.num_prompt_tokens()
    }

    /// The whole answer as one OpenAI body.
    ///
    /// # Errors
    /// When the engine stops or fails before all choices have ended.
    pub async fn into_response(mut self) -> Result<Value, ApiError> {
        let mut answer = Answer::new(self.shape.num_choices());
        while let Some(delta) = self.next().await {
            answer.add(delta?);
        }
        Ok(answer.into_json(&self.shape))
    }

    /// The answer as OpenAI chunks, in order. After an error chunk nothing follows.
    pub fn into_chunks(self) -> impl Stream<Item = Value> + Send {
        let state = Streaming { writer: ChunkWriter::new(&self.shape), generation: Some(self) };
        futures_util::stream::unfold(state, Streaming::next).flat_map(futures_util::stream::iter)
    }
}

/// State of [`Generation::into_chunks`]; without a generation the last chunk has been written.
struct Streaming {
    generation: Option<Generation>,
    writer: ChunkWriter,
}

impl Streaming {
    async fn next(mut self) -> Option<(Vec<Value>, Self)> {
        let generation = self.generation.as_mut()?;
        let chunks = match generation.next().await {
            Some(Ok(delta)) => self.writer.write(&generation.shape, &delta),
            Some(Err(error)) => {
                self.generation = None;
                vec![error.to_json()]
            }
            None => {
                let usage = self.writer.usage(&generation.shape);
                self.generation = None;
                usage.into_iter().collect()
            }
        };
        Some((chunks, self))
    }
}
