//! Ids to text, one token at a time. Holds back the bytes of an unfinished character and nothing else.

use std::sync::Arc;

use crate::Tokenizer;

/// Turns the generated ids of one sequence into text as they come.
///
/// What [`push`](Self::push) and [`finish`](Self::finish) return joins to exactly what decoding all ids at once gives
/// (bytes that are not UTF-8 become U+FFFD as soon as that is certain). Each call costs the length of its token, and
/// needs no ids from before: the tokens of a byte-level vocabulary are pieces of one byte string.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    /// Special tokens whose text stays all the same.
    kept: Arc<[u32]>,
    /// Bytes of a character that is not complete yet, at most 3.
    pending: Vec<u8>,
    text: String,
}

impl Detokenizer {
    /// A detokenizer at the start of an output. `skip_special_tokens` leaves out the text of special tokens (added
    /// tokens that are not special, like those around tool calls, always stay).
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        Self {
            tokenizer,
            skip_special_tokens,
            kept: Arc::default(),
            pending: Vec::new(),
            text: String::new(),
        }
    }

    /// Keeps the text of `ids` whatever they are: an [`AnswerParser`](crate::AnswerParser) needs its markers also where
    /// a vocabulary has them as special tokens.
    pub fn keeping(mut self, ids: Arc<[u32]>) -> Self {
        self.kept = ids;
        self
    }

    /// The text that `id` completes; often a whole word, empty inside a character. Ids outside the vocabulary (padding
    /// rows of the model) have no text.
    pub fn push(&mut self, id: u32) -> &str {
        self.text.clear();
        if !self.skip_special_tokens || !self.tokenizer.is_special(id) || self.kept.contains(&id) {
            self.pending.extend_from_slice(self.tokenizer.token_bytes(id));
            drain_characters(&mut self.pending, &mut self.text);
        }
        &self.text
    }

    /// The end of the output: U+FFFD if it stops inside a character, else empty. The detokenizer is then as new.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        self.text.push_str(&String::from_utf8_lossy(&self.pending));
        self.pending.clear();
        &self.text
    }
}

/// Moves all complete characters from `pending` to `text`; invalid bytes become U+FFFD as `from_utf8_lossy` does it.
fn drain_characters(pending: &mut Vec<u8>, text: &mut String) {
    let mut done = 0;
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        done += chunk.valid().len();
        let invalid = chunk.invalid();
        // Only the last chunk can be the beginning of a character that the next token completes.
        let may_continue = done + invalid.len() == pending.len()
            && matches!(std::str::from_utf8(invalid), Err(error) if error.error_len().is_none());
        if invalid.is_empty() || may_continue {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        done += invalid.len();
    }
    pending.drain(..done);
}
