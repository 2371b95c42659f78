//! `allowed_token_ids`: a constraint that allows the same tokens at every place of an answer. Knows no text.

use std::sync::Arc;

use serde_json::Value;
use spark_api::{ConstraintError, TokenConstraint, TokenId};

use crate::ApiError;
use crate::body::Body;

const FIELD: &str = "allowed_token_ids";

/// The tokens that an answer may have. As in vLLM nothing is added to them: without a token that ends a sequence the answer
/// goes on until its limit.
#[derive(Debug, Clone)]
pub(crate) struct AllowedTokens {
    /// Bit `i` of word `i / 32` is token `i`.
    words: Arc<[u32]>,
}

impl AllowedTokens {
    /// Reads the field; `None` if absent.
    ///
    /// # Errors
    /// An empty list, an id outside the vocabulary, or what is no list of ids.
    pub(crate) fn read(body: &mut Body, vocab_size: usize) -> Result<Option<Self>, ApiError> {
        if body.fields().get(FIELD).is_none_or(Value::is_null) {
            return Ok(None);
        }
        Self::new(&body.token_ids(FIELD, vocab_size)?, vocab_size).map(Some)
    }

    fn new(ids: &[TokenId], vocab_size: usize) -> Result<Self, ApiError> {
        if ids.is_empty() {
            return Err(ApiError::field(FIELD, format!("{FIELD} is empty: no token could follow")));
        }
        let mut words = vec![0u32; vocab_size.div_ceil(32)];
        for &id in ids {
            if id as usize >= vocab_size {
                let message = format!("{FIELD} has the id {id}; the vocabulary has 0..{vocab_size}");
                return Err(ApiError::field(FIELD, message));
            }
            words[id as usize / 32] |= 1 << (id % 32);
        }
        Ok(Self { words: words.into() })
    }

    /// What allows single tokens may allow none that something else allows.
    pub(crate) fn conflict() -> ApiError {
        let message = format!(
            "{FIELD} cannot be combined with a form of the answer, with tools that must be called, or with a thinking budget"
        );
        ApiError::field(FIELD, message)
    }
}

impl TokenConstraint for AllowedTokens {
    fn mask(&mut self, allowed: &mut [u32]) -> Result<(), ConstraintError> {
        let words = self.words.iter().copied().chain(std::iter::repeat(0));
        allowed.iter_mut().zip(words).for_each(|(allowed, word)| *allowed &= word);
        Ok(())
    }

    fn commit(&mut self, token: TokenId) -> Result<bool, ConstraintError> {
        let word = self.words.get(token as usize / 32).copied().unwrap_or(0);
        match word >> (token % 32) & 1 {
            1 => Ok(false),
            _ => Err(ConstraintError(format!("token {token} is not among {FIELD}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_listed_is_allowed() {
        let mut allowed = AllowedTokens::new(&[0, 33, 33, 69], 70).unwrap();
        // The engine's mask may be longer than the vocabulary's.
        let mut mask = [u32::MAX; 4];
        allowed.mask(&mut mask).unwrap();
        assert_eq!(mask, [1, 2, 1 << 5, 0]);
        assert!(matches!(allowed.commit(33), Ok(false)));
        assert!(allowed.commit(1).is_err() && allowed.commit(9999).is_err());
        assert!(AllowedTokens::new(&[70], 70).is_err() && AllowedTokens::new(&[], 70).is_err());
    }
}
