//! The bytes behind every token id of a byte-level BPE vocabulary, in one flat table. No merging, no matching.

/// Ids above this are refused: tables are indexed by id, and no published vocabulary comes near.
pub(crate) const MAX_TOKEN_ID: u32 = 1 << 22;

/// Bytes of every token by id, and which ids are special.
pub(crate) struct Vocabulary {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[offsets[id]..offsets[id + 1]]`; ids that the vocabulary skips are empty.
    offsets: Vec<u32>,
    special: Vec<bool>,
    max_token_bytes: usize,
}

impl Vocabulary {
    /// Builds the table of `num_ids` ids. `token(id)` is the token as the vocabulary spells it and whether it is special.
    pub(crate) fn new<'a>(num_ids: usize, token: impl Fn(u32) -> Option<(&'a str, bool)>) -> Self {
        let (mut bytes, mut offsets, mut special) = (Vec::new(), vec![0], Vec::with_capacity(num_ids));
        let mut max_token_bytes = 1;
        for id in 0..num_ids as u32 {
            let start = bytes.len();
            let found = token(id);
            if let Some((text, _)) = found {
                append_token_bytes(text, &mut bytes);
            }
            special.push(found.is_some_and(|(_, is_special)| is_special));
            max_token_bytes = max_token_bytes.max(bytes.len() - start);
            offsets.push(bytes.len() as u32);
        }
        Self { bytes, offsets, special, max_token_bytes }
    }

    /// Bytes of a token; empty for an id outside the vocabulary.
    pub(crate) fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.offsets.get(id), self.offsets.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// One past the highest id.
    pub(crate) fn num_ids(&self) -> usize {
        self.special.len()
    }

    pub(crate) fn max_token_bytes(&self) -> usize {
        self.max_token_bytes
    }
}

/// Appends the bytes of one token. A token with a character outside the byte alphabet (an added token in a script of
/// its own) stands for its own UTF-8 text, as in the ByteLevel decoder of Hugging Face tokenizers.
fn append_token_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for character in token.chars() {
        match byte_of(character) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The byte that a character of the GPT-2 alphabet stands for: printable Latin-1 characters are themselves, the other
/// 68 bytes are numbered from U+0100 on, in order.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut seen = [0; 256];
        for code in 0..0x200 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of) {
                seen[byte as usize] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
        assert_eq!(
            (byte_of('Ġ'), byte_of('Ċ'), byte_of('ł'), byte_of('中')),
            (Some(32), Some(10), Some(160), None)
        );
    }

    #[test]
    fn gaps_and_foreign_ids_are_empty() {
        let table =
            Vocabulary::new(4, |id| [Some(("Ġa", false)), None, Some(("中Ġ", true)), None][id as usize]);
        assert_eq!(table.token_bytes(0), b" a");
        assert_eq!(table.token_bytes(1), b"");
        assert_eq!(table.token_bytes(2), "中Ġ".as_bytes());
        assert_eq!(table.token_bytes(u32::MAX), b"");
        assert_eq!((table.is_special(0), table.is_special(2), table.is_special(9)), (false, true, false));
        assert_eq!((table.max_token_bytes(), table.num_ids()), (5, 4));
    }
}
