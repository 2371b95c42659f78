//! The data of a step on the device: how `StepInputs` become the bytes of one copy, and where the kernels find them. Plans
//! and packs; the buffers and the copy are the backend's.
//!
//! Everything lies in one buffer, at offsets that depend on the step's key alone, so that a recorded graph finds the
//! data of every later step with its key. Only block tables and masks have a size of their own: they come last, and
//! what refers to them (`blocks_start`, `mask_rows`) is data.

use spark_backend::{SeqInput, StepInputs, StepKey, TokenInput};

use crate::{DeviceSlice, Error, Result, Stream};

/// What a u32 of the step data says where there is nothing: no slot, no mask, no target.
pub const PADDING: u32 = u32::MAX;
/// Set in a token that the host does not know yet; the other bits are the slot that sampled it.
pub const PENDING: u32 = 1 << 31;

const OP: &str = "step";
/// Every part starts at a multiple of this, for loads of 16 bytes.
const PART_ALIGNMENT: usize = 16;
/// Words of a sequence: slot, query start, query length, context length, start in the block tables, three unused.
const SEQ_WORDS: usize = 8;

/// Bounds of all steps: they size the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens of a step.
    pub max_num_tokens: usize,
    /// Sequences of a step.
    pub num_slots: usize,
    /// Rows with logits.
    pub max_logit_rows: usize,
    /// Blocks of a sequence.
    pub max_blocks_per_seq: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
}

impl StepLimits {
    /// Bytes that hold the largest step.
    pub fn num_bytes(&self) -> usize {
        let key = StepKey {
            num_tokens: self.max_num_tokens,
            num_seqs: self.num_slots,
            num_logit_rows: self.max_logit_rows,
        };
        let tables = 4 * self.num_slots * self.max_blocks_per_seq;
        // Masks start at a whole number of their rows: one more.
        Layout::new(key).tables + tables + (self.num_slots + 1) * 4 * mask_words(self.vocab_size)
    }
}

/// Words of a mask.
fn mask_words(vocab_size: usize) -> usize {
    vocab_size.div_ceil(32)
}

/// A step as the kernels see it: sizes for the grids, and data on the device.
#[derive(Debug, Clone)]
pub struct StepView {
    /// Rows of the activations, padding included.
    pub num_tokens: usize,
    /// Sequences, padding included.
    pub num_seqs: usize,
    /// Rows with logits, padding included.
    pub num_logit_rows: usize,
    /// `[4]` u32: tokens, sequences and rows with logits without padding, and 0.
    pub counts: DeviceSlice,
    /// `[num_tokens]` u32; with bit 31 set the token that the slot in the other bits sampled last.
    pub tokens: DeviceSlice,
    /// `[num_tokens][3]` u32: time, height, width.
    pub positions: DeviceSlice,
    /// `[num_tokens]` u64: `block * block_size + offset`; all bits set for padding, whose K and V go nowhere.
    pub slot_mapping: DeviceSlice,
    /// `[num_tokens]` u32: index of the token's sequence in the step.
    pub token_seqs: DeviceSlice,
    /// `[num_seqs][8]` u32: slot, query start, query length, context length, index of the first block in `block_tables`, 0,
    /// 0, 0. Padding has no query.
    pub seqs: DeviceSlice,
    /// `[num_logit_rows]` u32: rows of the activations.
    pub logit_rows: DeviceSlice,
    /// `[num_logit_rows]` u32: the slot that samples, or [`PADDING`].
    pub sample_slots: DeviceSlice,
    /// `[num_logit_rows]` u32: row in `masks`, or [`PADDING`].
    pub mask_rows: DeviceSlice,
    /// `[num_logit_rows]` u32: the token whose log-probability is wanted, or [`PADDING`].
    pub prompt_targets: DeviceSlice,
    /// u32: the blocks of all sequences, one after the other. To the end of the buffer.
    pub block_tables: DeviceSlice,
    /// `[rows][ceil(vocab / 32)]` u32, bit set = allowed. The whole buffer: `mask_rows` counts from its start.
    pub masks: DeviceSlice,
    /// Words of a mask: `ceil(vocab / 32)`.
    pub mask_words: usize,
    /// Query and context lengths of each sequence, for the choice of kernels; in a decode step contexts are not used.
    pub host_seqs: Vec<(usize, usize)>,
    /// Every sequence has one row, in order, and logits: what a graph is recorded for.
    pub is_decode: bool,
}

/// Where the parts begin in the buffer, in bytes.
struct Layout {
    tokens: usize,
    positions: usize,
    slot_mapping: usize,
    token_seqs: usize,
    seqs: usize,
    logit_rows: usize,
    sample_slots: usize,
    mask_rows: usize,
    prompt_targets: usize,
    tables: usize,
}

impl Layout {
    fn new(key: StepKey) -> Self {
        let mut end = 0;
        let mut part = |num_bytes: usize| {
            let start = end;
            end = (start + num_bytes).next_multiple_of(PART_ALIGNMENT);
            start
        };
        // The counts are at the start.
        part(16);
        Self {
            tokens: part(4 * key.num_tokens),
            positions: part(12 * key.num_tokens),
            slot_mapping: part(8 * key.num_tokens),
            token_seqs: part(4 * key.num_tokens),
            seqs: part(4 * SEQ_WORDS * key.num_seqs),
            logit_rows: part(4 * key.num_logit_rows),
            sample_slots: part(4 * key.num_logit_rows),
            mask_rows: part(4 * key.num_logit_rows),
            prompt_targets: part(4 * key.num_logit_rows),
            tables: part(0),
        }
    }
}

impl StepView {
    /// A step with `key` in `buffer`; `host_seqs` of the sequences without padding. `is_decode` for what `is_decode` says of
    /// the inputs, and for a key that a graph is recorded for.
    ///
    /// # Errors
    /// [`Error::Shape`] when the buffer is too small for the key.
    pub fn new(
        buffer: &DeviceSlice,
        key: StepKey,
        vocab_size: usize,
        host_seqs: Vec<(usize, usize)>,
        is_decode: bool,
    ) -> Result<Self> {
        let StepKey { num_tokens, num_seqs, num_logit_rows } = key;
        let layout = Layout::new(key);
        let part = |offset: usize, num_bytes: usize| buffer.slice(offset as u64, num_bytes as u64);
        let tables = layout.tables as u64;
        let Some(rest) = buffer.num_bytes().checked_sub(tables) else {
            return Err(Error::shape(OP, format!("a buffer of {tables} bytes"), buffer.num_bytes()));
        };
        if is_decode && [num_seqs, num_logit_rows] != [num_tokens; 2] {
            return Err(Error::shape(OP, "a row for each sequence of a decode step", key));
        }
        Ok(Self {
            num_tokens,
            num_seqs,
            num_logit_rows,
            counts: part(0, 16)?,
            tokens: part(layout.tokens, 4 * num_tokens)?,
            positions: part(layout.positions, 12 * num_tokens)?,
            slot_mapping: part(layout.slot_mapping, 8 * num_tokens)?,
            token_seqs: part(layout.token_seqs, 4 * num_tokens)?,
            seqs: part(layout.seqs, 4 * SEQ_WORDS * num_seqs)?,
            logit_rows: part(layout.logit_rows, 4 * num_logit_rows)?,
            sample_slots: part(layout.sample_slots, 4 * num_logit_rows)?,
            mask_rows: part(layout.mask_rows, 4 * num_logit_rows)?,
            prompt_targets: part(layout.prompt_targets, 4 * num_logit_rows)?,
            block_tables: buffer.slice(tables, rest)?,
            masks: buffer.clone(),
            mask_words: mask_words(vocab_size),
            host_seqs,
            is_decode,
        })
    }

    /// `inputs`, padded to `key`, in `buffer`: packs them, copies them with `stream` and waits. For tests; a backend packs
    /// into memory that needs no waiting.
    ///
    /// # Errors
    /// As `pack`; [`Error::Driver`].
    pub fn upload(
        stream: &Stream,
        buffer: &DeviceSlice,
        inputs: &StepInputs,
        key: StepKey,
        vocab_size: usize,
    ) -> Result<Self> {
        let mut bytes = vec![0; usize::try_from(buffer.num_bytes()).unwrap_or(usize::MAX)];
        let len = pack(inputs, key, vocab_size, &mut bytes)?;
        stream.upload(buffer, bytes.get(..len).unwrap_or_default())?;
        let is_decode = is_decode(inputs) && [key.num_seqs, key.num_logit_rows] == [key.num_tokens; 2];
        Self::new(buffer, key, vocab_size, host_seqs(inputs), is_decode)
    }
}

/// Whether every sequence has one row, in order, and logits.
pub(crate) fn is_decode(inputs: &StepInputs) -> bool {
    let key = inputs.key();
    [key.num_seqs, key.num_logit_rows] == [key.num_tokens; 2]
        && inputs.seqs.iter().all(|seq| seq.query_len == 1)
        && inputs.logit_rows.iter().zip(0..).all(|(&row, i)| row == i)
}

/// Query and context lengths.
pub(crate) fn host_seqs(inputs: &StepInputs) -> Vec<(usize, usize)> {
    inputs.seqs.iter().map(|seq| (seq.query_len, seq.context_len)).collect()
}

/// Writes `inputs`, padded to `key`, to the start of `bytes` as a [`StepView`] has them: how many bytes that took.
///
/// # Errors
/// [`Error::Shape`] when inputs contradict each other, are larger than `key`, or do not fit.
pub(crate) fn pack(inputs: &StepInputs, key: StepKey, vocab_size: usize, bytes: &mut [u8]) -> Result<usize> {
    check(inputs, key, vocab_size)?;
    let layout = Layout::new(key);
    let mut writer = Writer { bytes, end: 0 };
    let real = inputs.key();
    writer.words(0, [real.num_tokens, real.num_seqs, real.num_logit_rows, 0].map(|n| n as u32))?;
    let tokens = inputs.tokens.iter().map(|token| match *token {
        TokenInput::Known(token) => token,
        TokenInput::Pending(slot) => slot as u32 | PENDING,
    });
    writer.padded(layout.tokens, key.num_tokens, tokens, |_| 0)?;
    writer.padded(layout.positions, 3 * key.num_tokens, inputs.positions.iter().flatten().copied(), |_| 0)?;
    let halves = inputs.slot_mapping.iter().flat_map(|&slot| [slot as u32, (slot >> 32) as u32]);
    writer.padded(layout.slot_mapping, 2 * key.num_tokens, halves, |_| u32::MAX)?;
    let token_seqs = inputs.seqs.iter().zip(0..).flat_map(|(seq, i)| std::iter::repeat_n(i, seq.query_len));
    // A padding row belongs to a padding sequence where there is one for each, as in a decode step.
    let last = key.num_seqs.saturating_sub(1);
    writer.padded(layout.token_seqs, key.num_tokens, token_seqs, |row| row.min(last) as u32)?;
    writer.words(layout.seqs, seq_words(inputs, key))?;
    writer.padded(layout.logit_rows, key.num_logit_rows, inputs.logit_rows.iter().copied(), |i| {
        i.min(key.num_tokens.saturating_sub(1)) as u32
    })?;
    let slots = inputs.sample_slots.iter().map(|slot| slot.map_or(PADDING, |slot| slot as u32));
    writer.padded(layout.sample_slots, key.num_logit_rows, slots, |_| PADDING)?;
    let targets = inputs.prompt_targets.iter().map(|target| target.map_or(PADDING, |(token, _)| token));
    writer.padded(layout.prompt_targets, key.num_logit_rows, targets, |_| PADDING)?;
    let mut table = layout.tables;
    for seq in &inputs.seqs {
        writer.copy(table, &seq.block_table)?;
        table += 4 * seq.block_table.len();
    }
    writer.end = writer.end.max(layout.tables);
    let first_mask = writer.end.div_ceil(4 * mask_words(vocab_size).max(1));
    let mask_rows = inputs.sample_slots.iter().map(|slot| {
        let mask = slot.and_then(|slot| inputs.masks.iter().position(|&(masked, _)| masked == slot));
        mask.map_or(PADDING, |mask| (first_mask + mask) as u32)
    });
    writer.padded(layout.mask_rows, key.num_logit_rows, mask_rows, |_| PADDING)?;
    for ((_, mask), i) in inputs.masks.iter().zip(first_mask..) {
        writer.copy(i * 4 * mask_words(vocab_size), mask)?;
    }
    Ok(writer.end)
}

/// The words of all sequences and of the padding behind them.
fn seq_words(inputs: &StepInputs, key: StepKey) -> impl Iterator<Item = u32> {
    let mut blocks_start = 0;
    let real = inputs.seqs.iter().map(move |seq| {
        let start = blocks_start;
        blocks_start += seq.block_table.len();
        [seq.slot, seq.query_start, seq.query_len, seq.context_len, start, 0, 0, 0].map(|n| n as u32)
    });
    let num_tokens = inputs.tokens.len() as u32;
    let padding = [PADDING, num_tokens, 0, 0, 0, 0, 0, 0];
    real.chain(std::iter::repeat_n(padding, key.num_seqs - inputs.seqs.len())).flatten()
}

/// An error unless the inputs fit each other and the key.
fn check(inputs: &StepInputs, key: StepKey, vocab_size: usize) -> Result<()> {
    let real = inputs.key();
    if real.num_tokens > key.num_tokens
        || real.num_seqs > key.num_seqs
        || real.num_logit_rows > key.num_logit_rows
    {
        return Err(Error::shape(OP, format!("at most {key:?}"), real));
    }
    let per_token = [inputs.positions.len(), inputs.slot_mapping.len()];
    let per_row = [inputs.sample_slots.len(), inputs.prompt_targets.len()];
    if per_token != [real.num_tokens; 2] || per_row != [real.num_logit_rows; 2] {
        let expected = format!("{} values a token and {} a row", real.num_tokens, real.num_logit_rows);
        return Err(Error::shape(OP, expected, (per_token, per_row)));
    }
    let mut row = 0;
    for SeqInput { query_start, query_len, context_len, .. } in &inputs.seqs {
        if *query_start != row || query_len > context_len {
            let got = (query_start, query_len, context_len);
            return Err(Error::shape(
                OP,
                format!("a sequence at row {row}, not longer than its context"),
                got,
            ));
        }
        row += query_len;
    }
    if row != real.num_tokens || inputs.logit_rows.iter().any(|&i| i as usize >= row) {
        return Err(Error::shape(OP, format!("sequences and rows of {} tokens", real.num_tokens), row));
    }
    if let Some((_, mask)) = inputs.masks.iter().find(|(_, mask)| mask.len() != mask_words(vocab_size)) {
        return Err(Error::shape(OP, format!("masks of {} words", mask_words(vocab_size)), mask.len()));
    }
    Ok(())
}

/// Writes words into bytes.
struct Writer<'a> {
    bytes: &'a mut [u8],
    /// The first byte behind all that was written.
    end: usize,
}

impl Writer<'_> {
    /// `words` from byte `offset` on.
    fn words(&mut self, offset: usize, words: impl IntoIterator<Item = u32>) -> Result<()> {
        let mut end = offset;
        for word in words {
            let Some(target) = self.bytes.get_mut(end..end + 4) else {
                return Err(Error::shape(OP, format!("at most {} bytes", self.bytes.len()), end + 4));
            };
            target.copy_from_slice(&word.to_le_bytes());
            end += 4;
        }
        self.end = self.end.max(end);
        Ok(())
    }

    /// All of `words` from byte `offset` on: tables and masks are long.
    fn copy(&mut self, offset: usize, words: &[u32]) -> Result<()> {
        let end = offset + size_of_val(words);
        let len = self.bytes.len();
        let Some(target) = self.bytes.get_mut(offset..end) else {
            return Err(Error::shape(OP, format!("at most {len} bytes"), end));
        };
        for (target, word) in target.chunks_exact_mut(4).zip(words) {
            target.copy_from_slice(&word.to_le_bytes());
        }
        self.end = self.end.max(end);
        Ok(())
    }

    /// `len` words, of which the values give the first and `padding` (of the index) the others.
    fn padded(
        &mut self,
        offset: usize,
        len: usize,
        values: impl Iterator<Item = u32>,
        padding: impl Fn(usize) -> u32,
    ) -> Result<()> {
        let mut values = values;
        self.words(offset, (0..len).map(|i| values.next().unwrap_or_else(|| padding(i))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: usize = 70;

    /// Two sequences: three rows of a prompt in slot 4, one pending token in slot 1 that samples under a mask.
    fn inputs() -> StepInputs {
        let seq = |slot, query_start, query_len, context_len, block_table: &[u32]| SeqInput {
            slot,
            query_start,
            query_len,
            context_len,
            block_table: block_table.into(),
        };
        StepInputs {
            tokens: vec![
                TokenInput::Known(7),
                TokenInput::Known(8),
                TokenInput::Known(9),
                TokenInput::Pending(1),
            ],
            positions: vec![[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 9, 9]],
            slot_mapping: vec![64, 65, 66, (1 << 40) + 5],
            seqs: vec![seq(4, 0, 3, 3, &[2]), seq(1, 3, 1, 40, &[11, 12])],
            logit_rows: vec![1, 3],
            sample_slots: vec![None, Some(1)],
            prompt_targets: vec![Some((9, 2)), None],
            masks: vec![(1, vec![1, 2, 3])],
            has_media: false,
        }
    }

    fn words(bytes: &[u8], offset: usize, len: usize) -> Vec<u32> {
        let word = |word: &[u8]| u32::from_le_bytes(word.try_into().unwrap());
        bytes[offset..offset + 4 * len].chunks(4).map(word).collect()
    }

    #[test]
    fn every_part_is_where_the_layout_says() {
        let inputs = inputs();
        let mut bytes = vec![0xee; 4096];
        let len = pack(&inputs, inputs.key(), VOCAB, &mut bytes).unwrap();
        let layout = Layout::new(inputs.key());
        assert_eq!(words(&bytes, 0, 4), [4, 2, 2, 0]);
        assert_eq!(words(&bytes, layout.tokens, 4), [7, 8, 9, PENDING + 1]);
        assert_eq!(words(&bytes, layout.positions, 12), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]);
        assert_eq!(words(&bytes, layout.slot_mapping, 8), [64, 0, 65, 0, 66, 0, 5, 256]);
        assert_eq!(words(&bytes, layout.token_seqs, 4), [0, 0, 0, 1]);
        assert_eq!(words(&bytes, layout.seqs, 16), [4, 0, 3, 3, 0, 0, 0, 0, 1, 3, 1, 40, 1, 0, 0, 0]);
        assert_eq!(words(&bytes, layout.logit_rows, 2), [1, 3]);
        assert_eq!(words(&bytes, layout.sample_slots, 2), [PADDING, 1]);
        assert_eq!(words(&bytes, layout.prompt_targets, 2), [9, PADDING]);
        assert_eq!(words(&bytes, layout.tables, 3), [2, 11, 12]);
        let mask_rows = words(&bytes, layout.mask_rows, 2);
        assert_eq!(mask_rows[0], PADDING);
        let mask = 12 * mask_rows[1] as usize;
        assert!(mask >= layout.tables + 12);
        assert_eq!((words(&bytes, mask, 3), len), (vec![1, 2, 3], mask + 12));
    }

    #[test]
    fn padding_reads_nothing_and_writes_nothing() {
        let mut inputs = inputs();
        (inputs.masks, inputs.seqs[0].query_len) = (Vec::new(), 1);
        inputs.tokens.drain(..2);
        inputs.positions.drain(..2);
        inputs.slot_mapping.drain(..2);
        inputs.seqs[1].query_start = 1;
        inputs.logit_rows = vec![0, 1];
        let key = StepKey { num_tokens: 4, num_seqs: 4, num_logit_rows: 4 };
        let mut bytes = vec![0xee; 4096];
        pack(&inputs, key, VOCAB, &mut bytes).unwrap();
        let layout = Layout::new(key);
        assert_eq!(words(&bytes, 0, 4), [2, 2, 2, 0]);
        assert_eq!(words(&bytes, layout.tokens, 4), [9, PENDING + 1, 0, 0]);
        assert_eq!(words(&bytes, layout.slot_mapping + 16, 4), [u32::MAX; 4]);
        assert_eq!(words(&bytes, layout.token_seqs, 4), [0, 1, 2, 3]);
        let padding = words(&bytes, layout.seqs + 64, 16);
        assert_eq!(padding[..8], [PADDING, 2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(padding[..8], padding[8..]);
        assert_eq!(words(&bytes, layout.logit_rows, 4), [0, 1, 2, 3]);
        for part in [layout.sample_slots, layout.mask_rows, layout.prompt_targets] {
            assert_eq!(words(&bytes, part + 8, 2), [PADDING; 2]);
        }
    }

    #[test]
    fn the_largest_step_fits_and_nothing_larger() {
        let inputs = inputs();
        let limits = StepLimits {
            max_num_tokens: 4,
            num_slots: 2,
            max_logit_rows: 2,
            max_blocks_per_seq: 2,
            vocab_size: VOCAB,
        };
        let mut bytes = vec![0; limits.num_bytes()];
        let len = pack(&inputs, inputs.key(), VOCAB, &mut bytes).unwrap();
        assert!(pack(&inputs, inputs.key(), VOCAB, &mut bytes[..len - 1]).is_err());
        let smaller = StepKey { num_tokens: 3, ..inputs.key() };
        assert!(pack(&inputs, smaller, VOCAB, &mut bytes).is_err());
    }

    #[test]
    fn contradictions_are_refused() {
        let is_refused = |change: &dyn Fn(&mut StepInputs)| {
            let mut inputs = inputs();
            change(&mut inputs);
            pack(&inputs, inputs.key(), VOCAB, &mut [0; 4096]).is_err()
        };
        assert!(!is_refused(&|_| ()));
        assert!(is_refused(&|inputs| inputs.seqs[1].query_start = 2));
        assert!(is_refused(&|inputs| inputs.seqs[1].query_len = 2));
        assert!(is_refused(&|inputs| inputs.seqs[0].context_len = 2));
        assert!(is_refused(&|inputs| inputs.logit_rows[1] = 4));
        assert!(is_refused(&|inputs| inputs.positions.truncate(3)));
        assert!(is_refused(&|inputs| inputs.sample_slots.truncate(1)));
        assert!(is_refused(&|inputs| inputs.masks[0].1.truncate(2)));
    }
}
