//! A device without arithmetic: it executes plans and remembers, for every KV position, what it was computed from.
//!
//! The content of a position is a digest of everything before it, so one wrong token, block, medium or order anywhere
//! in a sequence's past changes it. The "model" samples a token from the digest of the last position.

use std::collections::BTreeMap;

use spark_api::{MediaHash, TokenId};
use spark_scheduler::{Finish, NewSequence, PlanToken, SeqId, StepPlan};

/// Tokens that the model samples; 0 is end-of-sequence.
pub(crate) const VOCAB: u64 = 11;
pub(crate) const EOS: TokenId = 0;
/// Stands for embeddings in prompts.
pub(crate) const PLACEHOLDER: TokenId = 99;

fn mix(state: u64, value: u64) -> u64 {
    let x = (state ^ value.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 29)
}

fn seed(salt: Option<&str>) -> u64 {
    salt.map_or(1, |salt| salt.bytes().fold(2, |state, byte| mix(state, u64::from(byte) + 1)))
}

fn embed_token(token: TokenId) -> u64 {
    u64::from(token) + 1
}

fn embed_medium(hash: &MediaHash, row: usize) -> u64 {
    mix(u64::from(hash[0]) + 1000, row as u64 + 1)
}

fn sample(content: u64) -> TokenId {
    ((content >> 32) % VOCAB) as TokenId
}

/// What a sequence must become, computed alone and from the beginning.
pub(crate) struct Reference {
    /// Digest of each position of prompt and output.
    pub(crate) contents: Vec<u64>,
    pub(crate) output: Vec<TokenId>,
    pub(crate) finish: Finish,
}

impl Reference {
    pub(crate) fn new(seq: &NewSequence, max_model_len: usize) -> Self {
        let mut contents = Vec::new();
        let mut state = seed(seq.cache_salt.as_deref());
        for (i, &token) in seq.prompt.iter().enumerate() {
            let span =
                seq.media.iter().find(|span| (span.offset..span.offset + span.num_tokens).contains(&i));
            state =
                mix(state, span.map_or(embed_token(token), |span| embed_medium(&span.hash, i - span.offset)));
            contents.push(state);
        }
        let mut output = Vec::new();
        let finish = loop {
            let token = sample(state);
            state = mix(state, embed_token(token));
            contents.push(state);
            output.push(token);
            let may_stop = output.len() > seq.min_tokens;
            if may_stop && token == EOS && !seq.ignore_eos {
                break Finish::Eos;
            }
            if may_stop && seq.stop_token_ids.contains(&token) {
                break Finish::StopToken(token);
            }
            if output.len() == seq.max_tokens || contents.len() == max_model_len {
                break Finish::Length;
            }
        };
        Self { contents, output, finish }
    }
}

/// KV pool, slots and encoder cache.
pub(crate) struct Device {
    block_size: usize,
    // [num_blocks * block_size]
    kv: Vec<Option<u64>>,
    // [num_slots] last sampled token
    slots: Vec<Option<TokenId>>,
    /// Tokens of each encoded medium.
    encoder: BTreeMap<MediaHash, usize>,
    encoder_capacity: usize,
}

impl Device {
    pub(crate) fn new(
        num_blocks: usize,
        block_size: usize,
        num_slots: usize,
        encoder_capacity: usize,
    ) -> Self {
        let kv = vec![None; num_blocks * block_size];
        Self { block_size, kv, slots: vec![None; num_slots], encoder: BTreeMap::new(), encoder_capacity }
    }

    /// Executes a plan and gives what it samples. `of` leads to the sequences; panics when anything is not as it must be.
    pub(crate) fn run<'a>(
        &mut self,
        plan: &StepPlan,
        of: impl Fn(SeqId) -> (&'a NewSequence, &'a Reference),
    ) -> Vec<(SeqId, Vec<TokenId>)> {
        for hash in &plan.evict_media {
            assert!(self.encoder.remove(hash).is_some(), "evicts a medium that is not there");
        }
        for medium in &plan.encode {
            let previous = self.encoder.insert(medium.hash, medium.num_tokens);
            assert_eq!(previous, None, "encodes a medium that is there already");
        }
        assert!(self.encoder.values().sum::<usize>() <= self.encoder_capacity, "the encoder cache overflows");

        let mut sampled = Vec::new();
        for rows in &plan.seqs {
            let (seq, reference) = of(rows.seq);
            let at = |pos: usize| {
                rows.block_table[pos / self.block_size] as usize * self.block_size + pos % self.block_size
            };
            let mut inputs: Vec<u64> =
                rows.tokens.iter().map(|token| embed_token(self.resolve(*token, rows.slot))).collect();
            for media in &rows.media {
                let num_tokens =
                    *self.encoder.get(&media.hash).expect("rows of a medium that is not encoded");
                assert!(media.source_row + media.rows <= num_tokens, "rows past the end of a medium");
                for i in 0..media.rows {
                    inputs[media.token_row + i] = embed_medium(&media.hash, media.source_row + i);
                }
            }
            let mut state = match rows.start {
                0 => seed(seq.cache_salt.as_deref()),
                start => self.kv[at(start - 1)].expect("the position before the first row was computed"),
            };
            for (i, input) in inputs.into_iter().enumerate() {
                state = mix(state, input);
                self.kv[at(rows.start + i)] = Some(state);
            }
            for pos in 0..rows.context_len {
                assert_eq!(
                    self.kv[at(pos)],
                    Some(reference.contents[pos]),
                    "{:?}: wrong KV at {pos}",
                    rows.seq
                );
            }
            if rows.samples {
                self.slots[rows.slot] = Some(sample(state));
                sampled.push((rows.seq, vec![sample(state)]));
            }
        }
        sampled
    }

    fn resolve(&self, token: PlanToken, slot: usize) -> TokenId {
        match token {
            PlanToken::Known(id) => id,
            PlanToken::Pending => self.slots[slot].expect("the slot has sampled a token"),
        }
    }
}
