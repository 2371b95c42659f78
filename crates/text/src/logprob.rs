//! A token as OpenAI log-probabilities show it.

use crate::Tokenizer;

/// `token` and `bytes` of one entry of `logprobs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenText {
    /// The token's text; U+FFFD stands for bytes that are not whole characters. Special tokens show their text.
    pub token: String,
    /// The token's bytes. The bytes of consecutive tokens join to the bytes of the text.
    pub bytes: Vec<u8>,
}

impl TokenText {
    /// What log-probabilities show for `id`. With `as_token_id`, `token` is `token_id:N` (vLLM's
    /// `return_tokens_as_token_ids`).
    pub fn new(tokenizer: &Tokenizer, id: u32, as_token_id: bool) -> Self {
        let bytes = tokenizer.token_bytes(id).to_vec();
        let token = match as_token_id {
            true => format!("token_id:{id}"),
            false => String::from_utf8_lossy(&bytes).into_owned(),
        };
        Self { token, bytes }
    }
}
