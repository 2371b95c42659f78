//! Our tokenizer as `llguidance` wants to see it: a trie over the bytes of all tokens, and canonical tokenisation.

use std::sync::Arc;

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::Tokenizer;
use crate::answer::{CALL_CLOSE, CALL_OPEN, THINK_CLOSE, THINK_OPEN};

/// Tokens that are text to a grammar even where a vocabulary calls them special: grammars write them out.
const ALWAYS_TEXT: [&str; 4] = [CALL_OPEN, CALL_CLOSE, THINK_OPEN, THINK_CLOSE];

struct Environment {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

/// The environment of `tokenizer`. Sequences may end with `eos`, those of which must be in the vocabulary.
pub(super) fn environment(tokenizer: Arc<Tokenizer>, eos: &[u32]) -> TokEnv {
    let num_ids = tokenizer.vocab_size();
    let is_text = |id: u32| {
        let bytes = tokenizer.token_bytes(id);
        !eos.contains(&id)
            && (!tokenizer.is_special(id) || ALWAYS_TEXT.iter().any(|text| text.as_bytes() == bytes))
    };
    let words: Vec<Vec<u8>> = (0..num_ids as u32)
        .map(|id| {
            let bytes = tokenizer.token_bytes(id);
            match is_text(id) || bytes.is_empty() {
                true => bytes.to_vec(),
                // No text contains this byte, so no text is mistaken for a special token.
                false => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
            }
        })
        .collect();
    let first_eos = eos.first().copied().unwrap_or(llguidance::toktrie::INVALID_TOKEN);
    let mut trie = TokTrie::from(&TokRxInfo::new(num_ids as u32, first_eos), &words);
    if !eos.is_empty() {
        trie = trie.with_eos_tokens(eos);
    }
    Arc::new(Environment { tokenizer, trie })
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// As the model has seen text in training, so that text which a grammar forces is made of usual tokens.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            let ids = self.tokenizer.encode_ordinary(text).unwrap_or_default();
            let joined = ids.iter().flat_map(|&id| self.tokenizer.token_bytes(id)).copied();
            // A normalising tokenizer may give other bytes than the ones that were asked for.
            match joined.eq(text.bytes()) {
                true => ids,
                false => self.trie.greedy_tokenize(text.as_bytes()),
            }
        })
    }
}
