//! What an answer repeats of its request: its prompts as text. Bounded before any of it is written.

use spark_text::Tokenizer;

use crate::dialect::Form;
use crate::prompts::PromptTokens;
use crate::{ApiError, FrontEnd};

/// Most bytes of a request that its answer repeats, if it has several choices.
const MAX_REPEATED_BYTES: usize = 64 << 20;

impl FrontEnd {
    /// Prompts with their text, as the answer shows it.
    ///
    /// # Errors
    /// When a prompt has no room, or all choices together would repeat too much: a few bytes of ids can be much text.
    pub(crate) async fn with_echoes(
        &self,
        form: &Form,
        n: usize,
        mut prompts: Vec<PromptTokens>,
    ) -> Result<Vec<PromptTokens>, ApiError> {
        prompts.iter().try_for_each(|prompt| self.check_room("prompt", prompt.tokens.len()))?;
        let (tokenizer, own) = (self.tokenizer.clone(), form.repeated_bytes());
        let work = move || {
            check_repeats(own, n, &prompts, &tokenizer)?;
            for prompt in &mut prompts {
                let text = prompt.text.take();
                prompt.echo = text.unwrap_or_else(|| tokenizer.decode(&prompt.tokens, false));
            }
            Ok(prompts)
        };
        self.pool.run(work).await
    }
}

/// An answer that repeats its prompts does so for each choice, with `own` bytes more.
fn check_repeats(
    own: usize,
    n: usize,
    prompts: &[PromptTokens],
    tokenizer: &Tokenizer,
) -> Result<(), ApiError> {
    if prompts.len() * n == 1 {
        return Ok(());
    }
    let num_bytes: usize =
        prompts.iter().map(|prompt| num_bytes(prompt, tokenizer).saturating_add(own)).sum();
    let num_bytes = num_bytes.saturating_mul(n);
    if num_bytes <= MAX_REPEATED_BYTES {
        return Ok(());
    }
    let message = format!(
        "{} prompts x n {n}: the answer would repeat {num_bytes} bytes of the request; the limit is {MAX_REPEATED_BYTES}",
        prompts.len()
    );
    Err(ApiError::field("n", message))
}

/// Bytes of a prompt's text, which need not be there yet.
fn num_bytes(prompt: &PromptTokens, tokenizer: &Tokenizer) -> usize {
    match &prompt.text {
        Some(text) => text.len(),
        None => prompt.tokens.iter().map(|id| tokenizer.token_bytes(*id).len()).sum(),
    }
}
