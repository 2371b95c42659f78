//! What a prompt becomes, without running it: `/tokenize` and `/detokenize` in vLLM's shapes and llama-server's words,
//! `/apply-template`, counts.

use serde_json::{Value, json};
use spark_api::TokenId;
use spark_text::TokenText;

use crate::body::Body;
use crate::completion_request::PromptInput;
use crate::fields::{Endpoint, refuse_unsupported};
use crate::params::{Truncation, read_model};
use crate::{ApiError, FrontEnd};

impl FrontEnd {
    /// Tokens of a `prompt` or of `messages`; llama-server calls a prompt `content`.
    ///
    /// # Errors
    /// As those of the completions.
    pub async fn tokenize(&self, body: Value) -> Result<Value, ApiError> {
        let mut body = Body::new(body)?;
        refuse_unsupported(Endpoint::Chat, body.fields())?;
        read_model(&mut body, &self.options)?;
        for name in ["add_special_tokens", "add_special", "parse_special"] {
            // There are none to add, and those in a text count, as in that of a completion.
            body.boolean(name, true)?;
        }
        let with_texts = body.boolean("return_token_strs", false)?;
        let with_pieces = body.boolean("with_pieces", false)?;
        let is_chat = body.fields().contains_key("messages");
        let max_model_len = self.engine.info().limits.max_model_len;
        let truncation = Truncation::read(&mut body, is_chat, max_model_len)?;
        let tokens = if is_chat {
            self.chat_tokens(&mut body, None, truncation).await?.tokens
        } else {
            let name = if body.fields().contains_key("content") { "content" } else { "prompt" };
            let text = body.string(name, usize::MAX)?;
            let text = text.ok_or_else(|| ApiError::field("prompt", "prompt or messages is missing"))?;
            self.completion_tokens(PromptInput::Text(text), truncation).await?.tokens
        };
        let texts = with_texts.then(|| {
            let text = |id: &u32| TokenText::new(&self.tokenizer, *id, false).token;
            tokens.iter().map(text).collect::<Vec<_>>()
        });
        let shown = if with_pieces { self.pieces(&tokens) } else { json!(tokens) };
        Ok(json!({
            "count": tokens.len(),
            "max_model_len": max_model_len,
            "tokens": shown,
            "token_strs": texts,
        }))
    }

    /// Tokens with what they stand for: a text, or bytes that are none.
    fn pieces(&self, tokens: &[TokenId]) -> Value {
        let piece = |id: &TokenId| {
            let bytes = self.tokenizer.token_bytes(*id);
            let piece = std::str::from_utf8(bytes).map_or_else(|_| json!(bytes), |text| json!(text));
            json!({"id": id, "piece": piece})
        };
        tokens.iter().map(piece).collect()
    }

    /// The prompt of a conversation as text, as the template writes it: each picture is still one placeholder.
    ///
    /// # Errors
    /// As those of a chat.
    pub async fn apply_template(&self, body: Value) -> Result<Value, ApiError> {
        let mut body = self.open(Endpoint::Chat, body)?;
        read_model(&mut body, &self.options)?;
        let prompt = self.chat_text(&mut body).await?;
        Ok(json!({"prompt": prompt}))
    }

    /// How many tokens a chat would send to the model (the body of `POST /v1/chat/completions/input_tokens`).
    ///
    /// # Errors
    /// As those of a chat.
    pub async fn count_chat_tokens(&self, body: Value) -> Result<Value, ApiError> {
        let mut body = self.open(Endpoint::Chat, body)?;
        read_model(&mut body, &self.options)?;
        let truncation = Truncation::read(&mut body, true, self.engine.info().limits.max_model_len)?;
        let tokens = self.chat_tokens(&mut body, None, truncation).await?.tokens;
        Ok(json!({"input_tokens": tokens.len()}))
    }

    /// The text of `tokens`, special tokens included.
    ///
    /// # Errors
    /// When `tokens` is not a list of ids of the vocabulary.
    pub async fn detokenize(&self, body: Value) -> Result<Value, ApiError> {
        let mut body = Body::new(body)?;
        read_model(&mut body, &self.options)?;
        if !body.fields().contains_key("tokens") {
            return Err(ApiError::field("tokens", "tokens is missing"));
        }
        let tokens = body.token_ids("tokens", usize::MAX)?;
        let vocab_size = self.engine.info().limits.vocab_size;
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
            let message = format!("token id {id} is outside the vocabulary (0..{vocab_size})");
            return Err(ApiError::field("tokens", message));
        }
        let tokenizer = self.tokenizer.clone();
        let prompt = self.pool.run(move || Ok(tokenizer.decode(&tokens, false))).await?;
        // llama-server's name beside vLLM's.
        Ok(json!({"prompt": prompt, "content": prompt}))
    }
}
