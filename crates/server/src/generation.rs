//! A request at work: the choices of all its prompts, merged in the order in which their tokens come.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::{SelectAll, Stream};
use serde_json::Value;
use spark_api::TokenId;

use crate::answer::Shape;
use crate::choice::Choice;
use crate::dialect::{Framing, Whole, Writer};
use crate::submit::HeldTokens;
use crate::{ApiError, Delta};

/// One prompt of a request, for the parts of an answer that repeat it.
#[derive(Debug, Clone)]
pub(crate) struct PromptInfo {
    pub(crate) tokens: Arc<[TokenId]>,
    /// Its text, where the answer shows it; else empty.
    pub(crate) echo: String,
}

/// A request whose sequences are queued. Dropping it cancels them.
///
/// Read it once, in one of three ways: [`next`](Self::next) for text, [`into_response`](Self::into_response) for the
/// whole answer, [`into_chunks`](Self::into_chunks) for the chunks of a streamed one.
pub struct Generation {
    pub(crate) shape: Shape,
    pub(crate) choices: SelectAll<Choice>,
    /// Held as long as this is at work: how many hold it is the server's load.
    #[allow(dead_code, reason = "a guard: it is there to be dropped")]
    pub(crate) load: Arc<()>,
    /// Its part of the tokens at work.
    #[allow(dead_code, reason = "a guard: it is there to be dropped")]
    pub(crate) held: HeldTokens,
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

    /// What the events of the stream look like.
    pub(crate) fn framing(&self) -> Framing {
        self.shape.form.framing()
    }

    /// Tokens of all prompts together.
    pub fn num_prompt_tokens(&self) -> usize {
        self.shape.num_prompt_tokens()
    }

    /// What the request is called, in answers and logs.
    pub fn request_id(&self) -> &str {
        &self.shape.request_id
    }

    /// The whole answer as one body of the dialect that asked.
    ///
    /// # Errors
    /// When the engine stops or fails before all choices have ended.
    pub async fn into_response(mut self) -> Result<Value, ApiError> {
        let mut whole = Whole::new(&self.shape);
        while let Some(delta) = self.next().await {
            match delta {
                Ok(delta) => whole.add(&self.shape, delta),
                Err(error) => return Err(whole.fail(&self.shape, error)),
            }
        }
        Ok(whole.into_json(&self.shape))
    }

    /// The answer as chunks or events of the dialect that asked, in order. After an error nothing follows.
    pub fn into_chunks(self) -> impl Stream<Item = Value> + Send {
        let state = Streaming { writer: Writer::new(&self.shape), generation: Some(self) };
        futures_util::stream::unfold(state, Streaming::next).flat_map(futures_util::stream::iter)
    }
}

/// State of [`Generation::into_chunks`]; without a generation the last chunk has been written.
struct Streaming {
    generation: Option<Generation>,
    writer: Writer,
}

impl Streaming {
    async fn next(mut self) -> Option<(Vec<Value>, Self)> {
        let generation = self.generation.as_mut()?;
        let chunks = match generation.next().await {
            Some(Ok(delta)) => self.writer.write(&generation.shape, &delta),
            Some(Err(error)) => {
                let chunks = self.writer.fail(&generation.shape, &error);
                self.generation = None;
                chunks
            }
            None => {
                let chunks = self.writer.finish(&generation.shape);
                self.generation = None;
                chunks
            }
        };
        Some((chunks, self))
    }
}
