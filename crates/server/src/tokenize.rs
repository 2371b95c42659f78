//! `/tokenize` and `/detokenize`: what a prompt becomes, without running it. Shapes are vLLM's.

use serde_json::{Value, json};
use spark_text::TokenText;

use crate::body::Body;
use crate::completion_request::PromptInput;
use crate::fields::{Endpoint, refuse_unsupported};
use crate::params::read_model;
use crate::{ApiError, FrontEnd};

impl FrontEnd {
    /// Tokens of a `prompt` or of `messages`.
    ///
    /// # Errors
    /// As those of the completions.
    pub async fn tokenize(&self, body: Value) -> Result<Value, ApiError> {
        let mut body = Body::new(body)?;
        refuse_unsupported(Endpoint::Chat, body.fields())?;
        read_model(&mut body, &self.options)?;
        body.boolean("add_special_tokens", true)?;
        let with_texts = body.boolean("return_token_strs", false)?;
        let tokens = if body.fields().contains_key("messages") {
            self.chat_tokens(&mut body, None).await?.tokens
        } else {
            let text = body.string("prompt", usize::MAX)?;
            let text = text.ok_or_else(|| ApiError::field("prompt", "prompt or messages is missing"))?;
            self.completion_prompt(PromptInput::Text(text), false).await?.tokens
        };
        let texts = with_texts.then(|| {
            let text = |id: &u32| TokenText::new(&self.tokenizer, *id, false).token;
            tokens.iter().map(text).collect::<Vec<_>>()
        });
        Ok(json!({
            "count": tokens.len(),
            "max_model_len": self.engine.info().limits.max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }))
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
        Ok(json!({"prompt": prompt}))
    }
}
