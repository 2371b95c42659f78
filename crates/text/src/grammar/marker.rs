//! A marker in free text, such as `</think>`: found in the stream of tokens, and kept from being overrun by one.

use crate::Tokenizer;

/// A text that ends a stretch of free text, and the tokens that could run past it.
#[derive(Debug)]
pub(super) struct Marker {
    text: &'static [u8],
    /// `overruns[k]`: tokens that complete the marker when `k` bytes of it are there, and go on behind it.
    overruns: Vec<Vec<u32>>,
}

impl Marker {
    /// Looks through the vocabulary once.
    pub(super) fn new(text: &'static str, tokenizer: &Tokenizer) -> Self {
        let text = text.as_bytes();
        let mut overruns = vec![Vec::new(); text.len()];
        for id in 0..tokenizer.vocab_size() as u32 {
            let bytes = tokenizer.token_bytes(id);
            for (k, list) in overruns.iter_mut().enumerate() {
                let rest = &text[k..];
                let found = match k {
                    0 => bytes.windows(rest.len()).position(|window| window == rest),
                    _ => bytes.starts_with(rest).then_some(0),
                };
                if found.is_some_and(|at| at + rest.len() < bytes.len()) {
                    list.push(id);
                }
            }
        }
        Self { text, overruns }
    }

    /// Tokens that must not follow text which ends with `tail`: behind the marker another rule begins.
    pub(super) fn forbidden(&self, tail: &[u8]) -> impl Iterator<Item = u32> {
        let begun = |k: &usize| tail.ends_with(&self.text[..*k]);
        (0..self.text.len()).filter(begun).flat_map(|k| self.overruns[k].iter().copied())
    }

    /// Adds a token's bytes to `tail`, of which only what matters is kept. Returns whether the marker is complete.
    pub(super) fn push(&self, tail: &mut Vec<u8>, bytes: &[u8]) -> bool {
        tail.extend_from_slice(bytes);
        if tail.ends_with(self.text) {
            tail.clear();
            return true;
        }
        let surplus = tail.len().saturating_sub(self.text.len() - 1);
        tail.drain(..surplus);
        false
    }
}
