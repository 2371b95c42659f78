//! A running engine with its text and image front end. Everything here is a short way to a layer below.

use std::{path::Path, sync::Arc};

use serde_json::Value;
use spark_api::{Engine, EngineInfo, EngineStats, EventStream, Health, Request, RequestError, SubmitError};
use spark_runtime::{EngineHandle, Failure};
use spark_server::{ApiError, FrontEnd, Generation};
use spark_text::Tokenizer;

/// A loaded model, ready to answer. Cheap to clone; the engine stops when the last clone is dropped.
#[derive(Clone)]
pub struct SparkEngine {
    handle: EngineHandle,
    front_end: Arc<FrontEnd>,
    tokenizer: Arc<Tokenizer>,
}

impl SparkEngine {
    pub(crate) fn new(handle: EngineHandle, front_end: Arc<FrontEnd>, tokenizer: Arc<Tokenizer>) -> Self {
        Self { handle, front_end, tokenizer }
    }

    /// Answers a chat: the body of `POST /v1/chat/completions`, `model` optional. Read the answer piece by piece with
    /// [`Generation::next`]; drop it to cancel.
    ///
    /// # Errors
    /// The body breaks a rule (the error names the field), or the engine cannot take more.
    pub async fn chat(&self, body: Value) -> Result<Generation, ApiError> {
        self.front_end.chat(body).await
    }

    /// Continues a prompt: the body of `POST /v1/completions`, `model` optional.
    ///
    /// # Errors
    /// As for [`SparkEngine::chat`].
    pub async fn completion(&self, body: Value) -> Result<Generation, ApiError> {
        self.front_end.completion(body).await
    }

    /// Queues a request of token ids; its events arrive on the stream. Build it with [`Request::new`] and
    /// [`SparkEngine::info`]'s limits.
    ///
    /// # Errors
    /// The queue is full, or the engine is stopping.
    pub fn submit(&self, request: Request) -> Result<EventStream, SubmitError> {
        self.handle.submit(request)
    }

    /// A request of token ids with the engine's limits applied.
    ///
    /// # Errors
    /// Names the rule that `prompt` or `sampling` breaks.
    pub fn request(
        &self,
        prompt: Vec<u32>,
        sampling: spark_api::SamplingParams,
    ) -> Result<Request, RequestError> {
        Request::new(prompt, Vec::new(), sampling, &self.info().limits)
    }

    /// The OpenAI front end, to mount in a server of one's own ([`router`](spark_server::router)).
    pub fn front_end(&self) -> &Arc<FrontEnd> {
        &self.front_end
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// What was loaded.
    pub fn info(&self) -> &EngineInfo {
        self.handle.info()
    }

    /// Counters and gauges.
    pub fn stats(&self) -> EngineStats {
        self.handle.stats()
    }

    /// Whether it can serve.
    pub fn health(&self) -> Health {
        self.handle.health()
    }

    /// Why it has stopped by itself; `None` while it runs, and when it was told to stop.
    pub fn failure(&self) -> Option<Failure> {
        self.handle.failure()
    }

    /// Takes nothing new and finishes what is there. Returns at once; [`SparkEngine::join`] waits.
    pub fn drain(&self) {
        self.handle.drain();
    }

    /// Ends all requests before the next step.
    pub fn abort(&self) {
        self.handle.abort();
    }

    /// Blocks until the engine has stopped, after [`SparkEngine::drain`] or [`SparkEngine::abort`].
    pub fn join(&self) {
        self.handle.join();
    }
}

/// An image file as the `data:` URL that a message part takes.
///
/// # Errors
/// When the file cannot be read.
pub fn image_data_url(path: &Path) -> std::io::Result<String> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let bytes = std::fs::read(path)?;
    // The type is a formality: the decoder goes by the bytes.
    Ok(format!("data:image/*;base64,{}", STANDARD.encode(bytes)))
}
