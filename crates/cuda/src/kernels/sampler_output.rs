//! What sampling leaves on the device for the host, and what the host makes of it. Decodes bytes; copies nothing.

use spark_backend::{SampledToken, StepInputs, StepOutput, TokenLogprob};

use super::Sampler;
use crate::{DeviceSlice, Error, Result};

const OP: &str = "sample output";
/// Most alternatives that a sequence may ask for.
pub const MAX_ALTERNATIVES: usize = 64;
/// Most tokens that a sequence may name, whose log-probabilities lie where other rows have alternatives.
pub const MAX_NAMED_TOKENS: usize = 128;
/// `Detail` and `Alternative` of `kernels/sample.cuh`.
const DETAIL_BYTES: usize = 32;
const ALTERNATIVE_BYTES: usize = 12;
const _: () = assert!(4 * MAX_NAMED_TOKENS <= MAX_ALTERNATIVES * ALTERNATIVE_BYTES);
/// Every part starts at a multiple of this.
const PART_ALIGNMENT: usize = 16;

/// Memory for the results of a step: tokens first, then log-probabilities, so that what a step needs is one piece.
#[derive(Debug, Clone)]
pub struct SampleOut {
    slice: DeviceSlice,
    layout: Layout,
}

/// Offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// Rows that fit.
    num_rows: usize,
    details: usize,
    alternatives: usize,
}

impl Layout {
    fn new(num_rows: usize) -> Self {
        let details = (4 * num_rows).next_multiple_of(PART_ALIGNMENT);
        Self { num_rows, details, alternatives: details + DETAIL_BYTES * num_rows }
    }

    /// Bytes of `num_rows` results, with or without log-probabilities.
    fn num_bytes(self, num_rows: usize, has_details: bool) -> usize {
        match has_details {
            true => self.alternatives + num_rows * MAX_ALTERNATIVES * ALTERNATIVE_BYTES,
            false => 4 * num_rows,
        }
    }
}

impl SampleOut {
    /// Bytes for the results of `num_rows` rows.
    pub fn num_bytes(num_rows: usize) -> u64 {
        Layout::new(num_rows).num_bytes(num_rows, true) as u64
    }

    /// Memory for `num_rows` rows at the start of `memory`.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is too small or not aligned to 16 bytes.
    pub fn new(memory: &DeviceSlice, num_rows: usize) -> Result<Self> {
        if !memory.address().is_multiple_of(PART_ALIGNMENT as u64) {
            return Err(Error::shape(OP, "memory aligned to 16 bytes", memory.address()));
        }
        Ok(Self { slice: memory.slice(0, Self::num_bytes(num_rows))?, layout: Layout::new(num_rows) })
    }

    /// What has to be copied to the host for `wanted`.
    ///
    /// # Errors
    /// [`Error::Shape`] when it has more rows.
    pub fn bytes(&self, wanted: &Wanted) -> Result<DeviceSlice> {
        let num_bytes = self.layout.num_bytes(wanted.num_rows, wanted.has_details());
        self.slice.slice(0, num_bytes as u64)
    }

    /// The results from a copy of [`SampleOut::bytes`].
    ///
    /// # Errors
    /// [`Error::Shape`] when it is shorter, or when a row that was to be sampled was not.
    pub fn decode(&self, bytes: &[u8], wanted: &Wanted) -> Result<StepOutput> {
        decode(self.layout, bytes, wanted)
    }

    /// Rows that fit.
    pub(super) fn num_rows(&self) -> usize {
        self.layout.num_rows
    }

    pub(super) fn slice(&self) -> &DeviceSlice {
        &self.slice
    }

    /// Addresses of tokens, details and alternatives of the rows from `row` on.
    pub(super) fn addresses(&self, row: usize) -> [u64; 3] {
        let Layout { details, alternatives, .. } = self.layout;
        let offsets = [
            4 * row,
            details + DETAIL_BYTES * row,
            alternatives + MAX_ALTERNATIVES * ALTERNATIVE_BYTES * row,
        ];
        offsets.map(|offset| self.slice.address() + offset as u64)
    }
}

/// What a step's rows are for, as it was when the step was launched: slots may be given away before its results are read.
#[derive(Debug, Clone)]
pub struct Wanted {
    num_rows: usize,
    sampled: Vec<WantedToken>,
    targets: Vec<WantedTarget>,
}

#[derive(Debug, Clone, Copy)]
struct WantedToken {
    row: usize,
    slot: usize,
    alternatives: Option<usize>,
    num_named: usize,
}

#[derive(Debug, Clone, Copy)]
struct WantedTarget {
    row: usize,
    logit_row: u32,
    token: u32,
    alternatives: usize,
}

impl Wanted {
    /// What `inputs` ask for, of the sequences that are in the slots now.
    ///
    /// # Errors
    /// [`Error::Shape`] when slots, targets and rows contradict each other, for a token outside the vocabulary, for more
    /// than [`MAX_ALTERNATIVES`] alternatives, and for a target in a row whose slot has named tokens.
    pub fn new(sampler: &Sampler, inputs: &StepInputs) -> Result<Self> {
        let num_rows = inputs.logit_rows.len();
        let got = [inputs.sample_slots.len(), inputs.prompt_targets.len()];
        if got != [num_rows; 2] {
            return Err(Error::shape(OP, format!("{num_rows} slots and targets"), got));
        }
        if let Some(slot) = inputs.sample_slots.iter().flatten().find(|&&slot| slot >= sampler.num_slots()) {
            return Err(Error::shape(OP, format!("slots under {}", sampler.num_slots()), slot));
        }
        let mut targets = Vec::new();
        for (row, target) in inputs.prompt_targets.iter().enumerate() {
            let Some((token, alternatives)) = *target else { continue };
            if token as usize >= sampler.vocab_size() || alternatives > MAX_ALTERNATIVES {
                let expected =
                    format!("a token under {}, up to {MAX_ALTERNATIVES} alternatives", sampler.vocab_size());
                return Err(Error::shape(OP, expected, (token, alternatives)));
            }
            targets.push(WantedTarget { row, logit_row: inputs.logit_rows[row], token, alternatives });
        }
        let slots = inputs.sample_slots.iter().enumerate();
        let sampled = slots.filter_map(|(row, slot)| {
            slot.map(|slot| {
                let (alternatives, num_named) = (sampler.logprobs(slot), sampler.num_named(slot));
                WantedToken { row, slot, alternatives, num_named }
            })
        });
        let sampled: Vec<_> = sampled.collect();
        let is_full = |row: &&WantedToken| row.num_named > 0 && inputs.prompt_targets[row.row].is_some();
        if let Some(row) = sampled.iter().find(is_full) {
            return Err(Error::shape(OP, "no target in a row with named tokens", row.row));
        }
        Ok(Self { num_rows, sampled, targets })
    }

    fn has_details(&self) -> bool {
        !self.targets.is_empty() || self.sampled.iter().any(|row| row.alternatives.is_some())
    }
}

fn decode(layout: Layout, bytes: &[u8], wanted: &Wanted) -> Result<StepOutput> {
    let words = Words { bytes, layout };
    let sampled = wanted.sampled.iter().map(|&WantedToken { row, slot, alternatives, num_named }| {
        let token = words.at(4 * row)?;
        let alternatives = if num_named > 0 { alternatives.map(|_| 0) } else { alternatives };
        if token == u32::MAX {
            return Err(Error::shape(OP, "a token for each row with a slot", (row, slot)));
        }
        let logprobs = match alternatives {
            None => None,
            Some(count) => Some((words.logprob(row, 0, token)?, words.alternatives(row, count)?)),
        };
        Ok(SampledToken { slot, token, logprobs, named: words.named(row, num_named)? })
    });
    let prompt = wanted.targets.iter().map(|&WantedTarget { row, logit_row, token, alternatives }| {
        Ok((logit_row, words.logprob(row, 8, token)?, words.alternatives(row, alternatives)?))
    });
    Ok(StepOutput {
        sampled: sampled.collect::<Result<_>>()?,
        prompt_logprobs: prompt.collect::<Result<_>>()?,
    })
}

/// A copy of the results.
struct Words<'a> {
    bytes: &'a [u8],
    layout: Layout,
}

impl Words<'_> {
    fn at(&self, offset: usize) -> Result<u32> {
        let word = self.bytes.get(offset..).and_then(|rest| rest.first_chunk::<4>());
        let missing = || Error::shape(OP, format!("more than {offset} bytes"), self.bytes.len());
        word.map(|&word| u32::from_le_bytes(word)).ok_or_else(missing)
    }

    /// A log-probability and its rank, `offset` bytes into the details of a row.
    fn logprob(&self, row: usize, offset: usize, token: u32) -> Result<TokenLogprob> {
        let at = self.layout.details + DETAIL_BYTES * row + offset;
        let (logprob, rank) = (f32::from_bits(self.at(at)?), self.at(at + 4)? as usize);
        Ok(TokenLogprob { token, logprob, rank })
    }

    /// The first `count` alternatives of a row, or as many as there are.
    fn alternatives(&self, row: usize, count: usize) -> Result<Vec<TokenLogprob>> {
        let found = self.at(self.layout.details + DETAIL_BYTES * row + 16)? as usize;
        let first = self.layout.alternatives + row * MAX_ALTERNATIVES * ALTERNATIVE_BYTES;
        let alternative = |i: usize| {
            let at = first + i * ALTERNATIVE_BYTES;
            let (token, logprob, rank) = (self.at(at)?, f32::from_bits(self.at(at + 4)?), self.at(at + 8)?);
            Ok(TokenLogprob { token, logprob, rank: rank as usize })
        };
        (0..count.min(found).min(MAX_ALTERNATIVES)).map(alternative).collect()
    }

    /// The log-probabilities of the first `count` named tokens of a row.
    fn named(&self, row: usize, count: usize) -> Result<Vec<f32>> {
        let first = self.layout.alternatives + row * MAX_ALTERNATIVES * ALTERNATIVE_BYTES;
        (0..count.min(MAX_NAMED_TOKENS)).map(|i| Ok(f32::from_bits(self.at(first + 4 * i)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three rows: a plain token, one with a log-probability and two alternatives, one of a prompt.
    fn wanted() -> Wanted {
        Wanted {
            num_rows: 3,
            sampled: vec![
                WantedToken { row: 0, slot: 4, alternatives: None, num_named: 0 },
                WantedToken { row: 1, slot: 2, alternatives: Some(2), num_named: 0 },
            ],
            targets: vec![WantedTarget { row: 2, logit_row: 70, token: 9, alternatives: 5 }],
        }
    }

    fn copy() -> Vec<u8> {
        let layout = Layout::new(4);
        let mut words = vec![0u32; layout.num_bytes(3, true) / 4];
        words[..3].copy_from_slice(&[11, 12, u32::MAX]);
        let detail = |row: usize| (layout.details + DETAIL_BYTES * row) / 4;
        words[detail(1)..][..5].copy_from_slice(&[(-0.5f32).to_bits(), 1, 0, 0, 3]);
        words[detail(2)..][..5].copy_from_slice(&[0, 0, (-2.5f32).to_bits(), 7, 1]);
        let list = |row: usize| layout.alternatives / 4 + row * MAX_ALTERNATIVES * 3;
        words[list(1)..][..6].copy_from_slice(&[12, (-0.5f32).to_bits(), 1, 8, (-0.5f32).to_bits(), 1]);
        words[list(2)..][..3].copy_from_slice(&[3, (-0.25f32).to_bits(), 1]);
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn rows_become_tokens_and_log_probabilities() {
        let output = decode(Layout::new(4), &copy(), &wanted()).unwrap();
        let tokens: Vec<_> = output.sampled.iter().map(|sampled| (sampled.slot, sampled.token)).collect();
        assert_eq!(tokens, [(4, 11), (2, 12)]);
        assert!(output.sampled[0].logprobs.is_none());
        let logprob = |token, logprob, rank| TokenLogprob { token, logprob, rank };
        let (chosen, alternatives) = output.sampled[1].logprobs.as_ref().unwrap();
        assert_eq!(*chosen, logprob(12, -0.5, 1));
        assert_eq!(*alternatives, [logprob(12, -0.5, 1), logprob(8, -0.5, 1)]);
        let (row, target, alternatives) = &output.prompt_logprobs[0];
        assert_eq!((*row, *target), (70, logprob(9, -2.5, 7)));
        assert_eq!(*alternatives, [logprob(3, -0.25, 1)], "there are fewer than were asked for");
    }

    #[test]
    fn named_tokens_lie_where_alternatives_would() {
        let mut named = wanted();
        named.sampled[1] = WantedToken { row: 1, slot: 2, alternatives: Some(2), num_named: 3 };
        let mut bytes = copy();
        let first = Layout::new(4).alternatives + MAX_ALTERNATIVES * ALTERNATIVE_BYTES;
        for (i, value) in [-1.5f32, -0.5, f32::NEG_INFINITY].into_iter().enumerate() {
            bytes[first + 4 * i..][..4].copy_from_slice(&value.to_le_bytes());
        }
        let output = decode(Layout::new(4), &bytes, &named).unwrap();
        assert_eq!(output.sampled[1].named, [-1.5, -0.5, f32::NEG_INFINITY]);
        let (chosen, alternatives) = output.sampled[1].logprobs.as_ref().unwrap();
        assert_eq!((chosen.token, chosen.logprob, alternatives.len()), (12, -0.5, 0));
        assert!(output.sampled[0].named.is_empty());
    }

    #[test]
    fn plain_steps_copy_tokens_alone_and_short_copies_are_refused() {
        let mut plain = wanted();
        plain.targets.clear();
        plain.sampled.truncate(1);
        assert!(!plain.has_details());
        assert_eq!(Layout::new(4).num_bytes(3, plain.has_details()), 12);
        assert_eq!(decode(Layout::new(4), &copy()[..4], &plain).unwrap().sampled[0].token, 11);
        assert!(decode(Layout::new(4), &copy()[..3], &plain).is_err());
        assert!(decode(Layout::new(4), &copy()[..100], &wanted()).is_err());
        plain.sampled[0].row = 2;
        let error = decode(Layout::new(4), &copy(), &plain).unwrap_err().to_string();
        assert!(error.starts_with("sample output: expected a token for each row"), "{error}");
    }
}
