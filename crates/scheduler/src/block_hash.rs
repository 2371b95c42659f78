//! Names for the content of KV blocks. Two blocks with the same name hold the same keys and values.
//!
//! The name of a block is a keyed BLAKE3 over everything that its keys and values depend on: the name of the block
//! before it, its tokens, the media whose placeholders it holds and where, and (in the first block) the cache salt.
//! The whole digest is the name, so equal names can be trusted without comparing tokens.

use spark_api::TokenId;

use crate::MediaSpan;

/// Name of a full block's content.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct BlockHash(pub(crate) [u8; 32]);

/// What the blocks of one sequence are named after.
pub(crate) struct BlockHasher<'a> {
    pub(crate) key: &'a [u8; 32],
    pub(crate) block_size: usize,
    /// Prompt and known output.
    pub(crate) tokens: &'a [TokenId],
    /// Ascending and disjoint.
    pub(crate) media: &'a [MediaSpan],
    pub(crate) salt: Option<&'a str>,
}

impl BlockHasher<'_> {
    /// Extends `hashes` to all full blocks of `tokens`.
    pub(crate) fn extend(&self, hashes: &mut Vec<BlockHash>) {
        while (hashes.len() + 1) * self.block_size <= self.tokens.len() {
            hashes.push(self.hash(hashes.len(), hashes.last()));
        }
    }

    /// Every part has a fixed length or is preceded by its count, so different content is different input.
    fn hash(&self, block_idx: usize, parent: Option<&BlockHash>) -> BlockHash {
        let (start, end) = (block_idx * self.block_size, (block_idx + 1) * self.block_size);
        let mut hasher = blake3::Hasher::new_keyed(self.key);
        match parent {
            Some(parent) => {
                hasher.update(&[1]).update(&parent.0);
            }
            None => {
                let salt = self.salt.unwrap_or_default();
                hasher.update(&[0, u8::from(self.salt.is_some())]);
                hasher.update(&(salt.len() as u64).to_le_bytes()).update(salt.as_bytes());
            }
        }
        for token in &self.tokens[start..end] {
            hasher.update(&token.to_le_bytes());
        }
        let first = self.media.partition_point(|span| span.end() <= start);
        for span in self.media[first..].iter().take_while(|span| span.offset < end) {
            // Where the block lies in the medium: negative if the medium starts inside the block.
            let offset = start as i64 - span.offset as i64;
            hasher
                .update(&span.hash)
                .update(&offset.to_le_bytes())
                .update(&(span.num_tokens as u64).to_le_bytes());
        }
        BlockHash(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        tokens: Vec<TokenId>,
        media: Vec<MediaSpan>,
        salt: Option<&'static str>,
    }

    fn hashes(case: &Case, key: u8) -> Vec<[u8; 32]> {
        let Case { tokens, media, salt } = case;
        let mut hashes = Vec::new();
        BlockHasher { key: &[key; 32], block_size: 4, tokens, media, salt: *salt }.extend(&mut hashes);
        hashes.into_iter().map(|hash| hash.0).collect()
    }

    /// Both have two full blocks; `equal` says which of them must be named alike.
    fn check(change: impl Fn(&mut Case), equal: [bool; 2]) {
        let span = MediaSpan { hash: [5; 32], offset: 2, num_tokens: 4 };
        let base = || Case { tokens: vec![1, 2, 9, 9, 9, 9, 3, 4, 5], media: vec![span], salt: None };
        let mut changed = base();
        change(&mut changed);
        let (a, b) = (hashes(&base(), 1), hashes(&changed, 1));
        assert_eq!((a.len(), b.len()), (2, 2));
        assert_eq!([a[0] == b[0], a[1] == b[1]], equal);
    }

    #[test]
    fn names_depend_on_all_that_the_content_depends_on() {
        check(|_| (), [true, true]);
        check(|case| case.tokens[8] = 6, [true, true]);
        check(|case| case.tokens[7] = 6, [true, false]);
        check(|case| case.tokens[0] = 6, [false, false]);
        check(|case| case.salt = Some(""), [false, false]);
        check(|case| case.media[0].hash = [6; 32], [false, false]);
        check(|case| case.media.clear(), [false, false]);
        check(|case| case.media[0].offset = 1, [false, false]);
        check(|case| case.media[0].num_tokens = 5, [false, false]);
    }

    #[test]
    fn names_depend_on_the_key() {
        let case = Case { tokens: vec![0; 8], media: Vec::new(), salt: None };
        assert_ne!(hashes(&case, 1), hashes(&case, 2));
        let equal_blocks = hashes(&case, 1);
        assert_ne!(equal_blocks[0], equal_blocks[1], "the same tokens at another place are other content");
    }
}
