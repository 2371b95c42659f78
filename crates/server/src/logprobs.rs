//! Log-probabilities in all dialects: chat, completions, llama-server's, `prompt_logprobs`.

use serde_json::{Map, Value, json};
use spark_api::{RankedToken, TokenId, TokenLogprobs};
use spark_text::{TokenText, Tokenizer};

/// JSON has no infinity; this is what vLLM and OpenAI write instead.
const MIN_LOGPROB: f32 = -9999.0;

fn clamp(logprob: f32) -> f32 {
    logprob.max(MIN_LOGPROB)
}

fn pair(token: &RankedToken) -> (TokenId, f32) {
    (token.id, token.logprob)
}

/// The token itself, and those that the request named (`logprob_token_ids`), each once.
fn named(at: &TokenLogprobs) -> impl Iterator<Item = (TokenId, f32)> {
    let others = at.named.iter().copied().filter(|(id, _)| *id != at.token.id);
    std::iter::once(pair(&at.token)).chain(others)
}

/// How tokens are called in an answer.
#[derive(Clone, Copy)]
pub(crate) struct TokenNames<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// `return_tokens_as_token_ids`
    pub(crate) as_ids: bool,
}

impl TokenNames<'_> {
    /// The token's text, or `token_id:N`, and its bytes.
    fn text(&self, id: TokenId) -> TokenText {
        TokenText::new(self.tokenizer, id, self.as_ids)
    }

    /// `choices[].logprobs` of chat, with `count` alternatives per token.
    pub(crate) fn chat(&self, tokens: &[TokenLogprobs], count: usize) -> Value {
        json!({"content": self.entries(tokens, count, |_| Map::new())})
    }

    /// llama-server's `completion_probabilities`: as in a chat, with ids.
    pub(crate) fn llama(&self, tokens: &[TokenLogprobs], count: usize) -> Value {
        let with_id = |id| Map::from_iter([("id".to_owned(), json!(id))]);
        self.entries(tokens, count, with_id)
    }

    /// One object a token, with one for each of `count` alternatives. `begin` is what each begins with.
    fn entries(
        &self,
        tokens: &[TokenLogprobs],
        count: usize,
        begin: impl Fn(TokenId) -> Map<String, Value>,
    ) -> Value {
        let entry = |(id, logprob): (TokenId, f32)| {
            let TokenText { token: name, bytes } = self.text(id);
            let mut entry = begin(id);
            entry.insert("token".into(), json!(name));
            entry.insert("logprob".into(), json!(clamp(logprob)));
            entry.insert("bytes".into(), json!(bytes));
            entry
        };
        let content = tokens.iter().map(|at| {
            let mut token = entry(pair(&at.token));
            let top: Vec<_> = match at.named.is_empty() {
                true => at.top.iter().take(count).map(pair).map(entry).collect(),
                false => named(at).map(entry).collect(),
            };
            token.insert("top_logprobs".into(), json!(top));
            Value::Object(token)
        });
        content.collect()
    }

    /// `prompt_logprobs`: null for the first token, then objects by token id, with `count` alternatives per token.
    pub(crate) fn by_id(&self, tokens: &[Option<TokenLogprobs>], count: usize) -> Value {
        let position = |at: &Option<TokenLogprobs>| match at {
            None => Value::Null,
            Some(at) => {
                let named = std::iter::once(&at.token).chain(at.top.iter().take(count)).map(|token| {
                    let value = json!({"logprob": clamp(token.logprob), "rank": token.rank,
                        "decoded_token": TokenText::new(self.tokenizer, token.id, false).token});
                    (token.id.to_string(), value)
                });
                Value::Object(named.collect())
            }
        };
        Value::Array(tokens.iter().map(position).collect())
    }
}

/// `choices[].logprobs` of completions: four lists of equal length.
pub(crate) struct CompletionLogprobs<'a> {
    names: TokenNames<'a>,
    count: usize,
    /// Characters of the tokens so far.
    offset: usize,
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
}

impl<'a> CompletionLogprobs<'a> {
    /// Empty lists, with `count` alternatives per token.
    pub(crate) fn new(names: TokenNames<'a>, count: usize) -> Self {
        Self {
            names,
            count,
            offset: 0,
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
        }
    }

    /// Goes on after `offset` characters that earlier chunks have shown.
    pub(crate) fn after(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }

    /// Adds generated tokens.
    pub(crate) fn add(&mut self, tokens: &[TokenLogprobs]) {
        for at in tokens {
            self.push(at.token.id, Some(at));
        }
    }

    /// Adds the tokens of an echoed prompt; the first has no log-probability.
    pub(crate) fn add_prompt(&mut self, prompt: &[TokenId], report: &[Option<TokenLogprobs>]) {
        for (id, at) in prompt.iter().zip(report) {
            self.push(*id, at.as_ref());
        }
    }

    fn push(&mut self, id: TokenId, at: Option<&TokenLogprobs>) {
        let TokenText { token: name, bytes } = self.names.text(id);
        self.text_offset.push(json!(self.offset));
        self.offset += String::from_utf8_lossy(&bytes).chars().count();
        self.tokens.push(json!(name));
        self.token_logprobs.push(json!(at.map(|at| clamp(at.token.logprob))));
        self.top_logprobs.push(at.map_or(Value::Null, |at| {
            // The token itself is always there, as in vLLM: it comes first and may be one more than asked for.
            let shown = named(at).chain(at.top.iter().take(self.count).map(pair));
            Value::Object(
                shown.map(|(id, logprob)| (self.names.text(id).token, json!(clamp(logprob)))).collect(),
            )
        }));
    }

    /// Characters shown, these tokens included.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// The object.
    pub(crate) fn into_json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}
