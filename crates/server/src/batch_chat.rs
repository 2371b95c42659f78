//! vLLM's batch of chats: several conversations in one request, one choice for each. What a conversation is, `chat_request.rs`
//! says; here they are taken apart.

use serde_json::Value;

use crate::body::{Body, wrong_type};
use crate::dialect::Form;
use crate::fields::{Endpoint, support};
use crate::front_end::MAX_CHOICES;
use crate::params::read_model;
use crate::{ApiError, FrontEnd, Generation};

const MESSAGES: &str = "messages";
/// Most bytes of the fields that all conversations share, counted once for each: every one of them is rendered with a copy.
const MAX_SHARED_BYTES: usize = 64 << 20;

impl FrontEnd {
    /// Queues the answers to several conversations (the body of `POST /v1/chat/completions/batch`).
    ///
    /// # Errors
    /// As [`chat`](Self::chat), with the number of the conversation that is wrong.
    pub async fn chat_batch(&self, body: Value) -> Result<Generation, ApiError> {
        let mut body = self.open(Endpoint::Batch, body)?;
        let model = read_model(&mut body, &self.options)?;
        let params = self.read_params(Endpoint::Batch, &mut body)?;
        let conversations = read_conversations(&mut body)?;
        let is_kept = |name: &str| support(Endpoint::Batch, name).is_some();
        check_shared(&body.with(is_kept, MESSAGES, Value::Null), conversations.len())?;
        let mut chats = Vec::with_capacity(conversations.len());
        let mut num_tokens = 0;
        for (i, messages) in conversations.into_iter().enumerate() {
            let mut one = body.with(is_kept, MESSAGES, messages);
            let chat = self.fitting_tokens(&mut one, &params).await;
            let chat = chat.map_err(|error| of_conversation(i, error))?;
            num_tokens += chat.tokens.len();
            self.check_tokens(num_tokens)?;
            chats.push(chat);
        }
        let prompts = self.with_media(chats).await?;
        self.submit(Form::Batch, model, params, prompts)
    }

    /// A name that leads to a large picture is short: a body can mean far more tokens than it has bytes.
    fn check_tokens(&self, num_tokens: usize) -> Result<(), ApiError> {
        let limit = self.options.max_num_queued_tokens;
        if num_tokens <= limit {
            return Ok(());
        }
        let message = format!(
            "the conversations have over {limit} tokens together, more than may be queued (--max-num-queued-tokens): send \
             fewer"
        );
        Err(ApiError::field(MESSAGES, message))
    }
}

/// The lists of messages; each has one at least.
fn read_conversations(body: &mut Body) -> Result<Vec<Value>, ApiError> {
    const WANTED: &str = "a list of conversations, which are lists of messages";
    let conversations = match body.take(MESSAGES) {
        Some(Value::Array(conversations)) => conversations,
        Some(other) => return Err(wrong_type(MESSAGES, WANTED, &other)),
        None => return Err(ApiError::field(MESSAGES, "messages is missing")),
    };
    if !(1..=MAX_CHOICES).contains(&conversations.len()) {
        let message =
            format!("messages has {} conversations; it must have 1 to {MAX_CHOICES}", conversations.len());
        return Err(ApiError::field(MESSAGES, message));
    }
    match conversations.iter().find(|messages| messages.as_array().is_none_or(Vec::is_empty)) {
        Some(Value::Array(_)) => {
            Err(ApiError::field(MESSAGES, "messages has a conversation without messages"))
        }
        Some(other) => Err(wrong_type(MESSAGES, WANTED, other)),
        None => Ok(conversations),
    }
}

fn check_shared(shared: &Body, num_conversations: usize) -> Result<(), ApiError> {
    let num_bytes: usize = shared.fields().values().map(|value| value.to_string().len()).sum();
    if num_bytes.saturating_mul(num_conversations) <= MAX_SHARED_BYTES {
        return Ok(());
    }
    let message = format!(
        "the fields beside messages have {num_bytes} bytes for each of {num_conversations} conversations; the limit is \
         {MAX_SHARED_BYTES} in all: send fewer conversations"
    );
    Err(ApiError::field(MESSAGES, message))
}

/// Says which conversation is wrong.
fn of_conversation(index: usize, error: ApiError) -> ApiError {
    match error {
        ApiError::Invalid { param, message } => {
            ApiError::Invalid { param, message: format!("conversation {index}: {message}") }
        }
        other => other,
    }
}
