//! Completion of a step: sampled tokens become known, full blocks enter the prefix cache, ended sequences leave.

use std::collections::BTreeMap;

use super::{InFlightRows, Scheduler};
use crate::sequence::{Phase, Sequence};
use crate::{SeqId, SeqUpdate, StepId};
use spark_api::TokenId;

impl Scheduler {
    /// Takes the results of the oldest step in flight; `sampled` has the tokens of each sequence that it sampled.
    ///
    /// A sampled sequence gets 0 to k tokens. More than one (a draft was accepted, or a grammar leaves no choice) are
    /// computed by its next step; none means that the position is sampled again. In both cases what a later step in
    /// flight samples for it is dropped. Tokens past the end of a sequence, and those of one that has ended, too.
    ///
    /// A step that is not the oldest one in flight is refused: nothing changes and nothing is returned.
    pub fn complete(&mut self, step: StepId, sampled: &[(SeqId, Vec<TokenId>)]) -> Vec<SeqUpdate> {
        let is_oldest = self.in_flight.front().is_some_and(|oldest| oldest.id == step);
        debug_assert!(
            is_oldest,
            "steps complete in the order of their plans; {step:?} is not the oldest in flight"
        );
        let Some(step) = self.in_flight.pop_front_if(|oldest| oldest.id == step) else { return Vec::new() };
        let sampled: BTreeMap<SeqId, &[TokenId]> =
            sampled.iter().map(|(id, tokens)| (*id, &tokens[..])).collect();
        let tokens_of = |id: &SeqId| sampled.get(id).copied().unwrap_or_default();
        step.rows.iter().filter_map(|rows| self.complete_rows(rows, tokens_of(&rows.seq))).collect()
    }

    fn complete_rows(&mut self, rows: &InFlightRows, sampled: &[TokenId]) -> Option<SeqUpdate> {
        let seq = self.seqs.get_mut(&rows.seq).expect("a sequence stays until no step in flight uses it");
        seq.num_in_flight -= 1;
        seq.num_pending -= usize::from(rows.samples);
        if seq.phase == Phase::Ended {
            self.settle(rows.seq);
            return None;
        }
        let mut update = SeqUpdate {
            seq: rows.seq,
            tokens: Vec::new(),
            prompt_done: None,
            finish: None,
            num_preemptions: seq.num_preemptions,
        };
        if rows.end >= seq.num_prompt_tokens && !seq.prompt_reported {
            seq.prompt_reported = true;
            update.prompt_done = seq.first_cached_tokens;
            self.counters.num_prompt_tokens += seq.num_prompt_tokens as u64;
        }
        if rows.samples && rows.end == seq.tokens.len() {
            (update.tokens, update.finish) = seq.accept(sampled);
            self.counters.num_generation_tokens += update.tokens.len() as u64;
            if update.tokens.is_empty() {
                seq.num_computed = seq.tokens.len() - 1;
            }
            seq.out_of_step = update.tokens.len() != 1;
        }
        self.confirm(rows);
        self.after_rows(rows.seq, update.finish.is_some());
        let says_something = update.prompt_done.is_some() || !update.tokens.is_empty();
        says_something.then_some(update)
    }

    /// Rows that are computed for good: their media are no longer needed, their full blocks can be shared.
    fn confirm(&mut self, rows: &InFlightRows) {
        let seq = self.seqs.get_mut(&rows.seq).expect("its rows have just completed");
        let held = seq.media_released..seq.media_acquired;
        for span in seq.media[held].iter().take_while(|span| span.end() <= rows.end) {
            self.encoder.release(&span.hash);
            seq.media_released += 1;
        }
        // A position that is sampled again has its token computed again.
        seq.num_confirmed = rows.end.min(seq.num_computed);
        if !self.config.enable_prefix_caching {
            return;
        }
        let num_full = seq.num_confirmed.min(seq.tokens.len()) / self.config.block_size;
        if num_full > seq.num_registered {
            seq.extend_hashes(&self.config);
            for i in seq.num_registered..num_full {
                self.blocks.register(seq.block_table[i], seq.hashes[i]);
            }
            seq.num_registered = num_full;
        }
    }

    fn after_rows(&mut self, id: SeqId, has_ended: bool) {
        if has_ended {
            self.end(id);
            return;
        }
        let seq = self.seqs.get_mut(&id).expect("its rows have just completed");
        if seq.num_in_flight == 0 && seq.out_of_step {
            rejoin(seq);
        }
        self.settle(id);
    }
}

/// No step in flight: what is known is what is computed, and the sequence can go on from there.
fn rejoin(seq: &mut Sequence) {
    seq.out_of_step = false;
    // A sample comes after all media, so none is held; but a token to be computed again may be the last one of a medium.
    seq.media_released = seq.media_from(seq.num_computed);
    seq.media_acquired = seq.media_released;
}
