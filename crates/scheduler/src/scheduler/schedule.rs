//! Planning a step: running decodes, then running prefills, then waiting sequences, under one token budget.
//!
//! Two rules keep every sequence moving. The first sequence in order is never preempted, so it always finishes; and the
//! head of the waiting queue is never overtaken, so it always gets its turn. A sequence is admitted only if the blocks
//! of all its known tokens are free, and takes them at once: only decodes can run out of blocks later.

use super::{InFlightRows, InFlightStep, MAX_IN_FLIGHT, Scheduler};
use crate::block_manager::PrefixHit;
use crate::encoder_cache::{Acquired, EncodeBudget};
use crate::sequence::{Phase, Rank, Sequence};
use crate::{EncodeMedia, MediaRows, PlanToken, PlannedSeq, Policy, SeqId, StepId, StepPlan};

/// A step that is being planned.
struct Draft {
    /// Rows that may still be added.
    budget: usize,
    /// Rows of prompts whose log-probabilities are wanted that may still be added.
    prompt_logprob_budget: usize,
    encode_budget: EncodeBudget,
    seqs: Vec<PlannedSeq>,
    encode: Vec<EncodeMedia>,
    /// Blocks that this step's sequences lack and that steps in flight will give back.
    num_blocks_awaited: usize,
}

impl Scheduler {
    /// Plans the next step. `None` if nothing can run before a step in flight completes, or nothing is there to run.
    ///
    /// One step may be in flight; with two the answer is `None`.
    pub fn schedule(&mut self) -> Option<StepPlan> {
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return None;
        }
        let mut draft = Draft {
            budget: self.config.max_num_batched_tokens,
            prompt_logprob_budget: self.config.max_prompt_logprob_tokens,
            encode_budget: EncodeBudget::new(self.config.max_encoder_tokens_per_step),
            seqs: Vec::new(),
            encode: Vec::new(),
            num_blocks_awaited: 0,
        };
        self.preempt_for_urgent();
        let running: Vec<Rank> = self.running.iter().copied().collect();
        let (decodes, prefills): (Vec<Rank>, Vec<Rank>) =
            running.into_iter().partition(|rank| self.seqs.get(&rank.id).is_some_and(|seq| seq.decoding));
        for rank in decodes {
            self.plan_decode(rank, &mut draft);
        }
        for rank in prefills {
            self.plan_rows(rank.id, &mut draft);
        }
        self.admit_waiting(&mut draft);
        self.launch(draft)
    }

    fn launch(&mut self, draft: Draft) -> Option<StepPlan> {
        if draft.seqs.is_empty() {
            return None;
        }
        let id = StepId(self.next_step);
        self.next_step += 1;
        let rows =
            |seq: &PlannedSeq| InFlightRows { seq: seq.seq, end: seq.context_len, samples: seq.samples };
        self.in_flight.push_back(InFlightStep { id, rows: draft.seqs.iter().map(rows).collect() });
        let num_tokens = self.config.max_num_batched_tokens - draft.budget;
        self.counters.num_steps += 1;
        self.counters.tokens_per_step.observe(num_tokens);
        let evict_media = draft.encode_budget.evicted;
        Some(StepPlan { id, seqs: draft.seqs, encode: draft.encode, evict_media, num_tokens })
    }

    /// Plans a running decode, preempting from the end of the order if it lacks a block.
    fn plan_decode(&mut self, rank: Rank, draft: &mut Draft) {
        loop {
            let Some(seq) = self.seqs.get_mut(&rank.id).filter(|seq| seq.is_ready()) else { return };
            let num_rows = seq.num_plannable().min(draft.budget);
            let num_blocks = self.blocks.blocks_for(seq.num_computed + num_rows);
            if self.blocks.grow(&mut seq.block_table, num_blocks) {
                break;
            }
            let num_lacking = num_blocks - seq.block_table.len();
            // Blocks that are about to come back are as good as a victim's, and cost nothing to wait for.
            if draft.num_blocks_awaited + num_lacking <= self.blocks.num_free() + self.num_blocks_returning()
            {
                draft.num_blocks_awaited += num_lacking;
                return;
            }
            let victim = *self.running.last().expect("the sequence that is being planned is running");
            self.preempt(victim);
        }
        self.plan_rows(rank.id, draft);
    }

    /// Blocks that come back when the steps in flight complete.
    fn num_blocks_returning(&self) -> usize {
        let leaving = self.seqs.values().filter(|seq| matches!(seq.phase, Phase::Preempting | Phase::Ended));
        leaving.flat_map(|seq| &seq.block_table).filter(|&&block| self.blocks.is_exclusive(block)).count()
    }

    /// Plans as many rows of a running sequence as budget, chunk size and encoder allow, in the blocks that it has.
    fn plan_rows(&mut self, id: SeqId, draft: &mut Draft) {
        let Some(seq) = self.seqs.get_mut(&id).filter(|seq| seq.is_ready()) else { return };
        let mut max_rows = draft.budget.min(self.config.max_chunk_tokens.unwrap_or(usize::MAX));
        let wants_logprobs = seq.prompt_logprobs && !seq.decoding;
        if wants_logprobs {
            max_rows = max_rows.min(draft.prompt_logprob_budget);
        }
        if max_rows == 0 {
            return;
        }
        let start = seq.num_computed;
        let mut end = start + seq.num_plannable().min(max_rows);
        while let Some(span) = seq.media.get(seq.media_acquired).filter(|span| span.offset < end) {
            let Some(acquired) = self.encoder.acquire(span.hash, span.num_tokens, &mut draft.encode_budget)
            else {
                end = span.offset.max(start);
                break;
            };
            self.counters.mm_cache_queries += 1;
            match acquired {
                Acquired::Hit => self.counters.mm_cache_hits += 1,
                Acquired::Encode => draft.encode.push(EncodeMedia {
                    seq: id,
                    media_idx: seq.media_acquired,
                    hash: span.hash,
                    num_tokens: span.num_tokens,
                }),
            }
            seq.media_acquired += 1;
        }
        if end > start {
            draft.budget -= end - start;
            if wants_logprobs {
                draft.prompt_logprob_budget -= end - start;
            }
            draft.seqs.push(take_rows(seq, end, self.blocks.blocks_for(end)));
        }
    }

    /// Admits from the head of the queue until one does not fit.
    fn admit_waiting(&mut self, draft: &mut Draft) {
        while draft.budget > 0 && !self.free_slots.is_empty() {
            let Some(&rank) = self.waiting.first() else { return };
            let hit = self.look_up(rank.id);
            let seq = &self.seqs[&rank.id];
            let num_free = self.blocks.num_free();
            if self.num_blocks_to_admit(seq, hit) > num_free || !self.can_start(seq, hit, draft) {
                return;
            }
            self.admit(rank, hit);
            self.plan_rows(rank.id, draft);
        }
    }

    fn look_up(&mut self, id: SeqId) -> PrefixHit {
        let seq = self.seqs.get_mut(&id).expect("a waiting sequence exists");
        if !seq.skip_prefix_lookup {
            seq.extend_hashes(&self.config);
        }
        self.blocks.lookup(seq.hashes_to_look_up(self.config.block_size))
    }

    /// Free blocks that a sequence needs to be admitted: those of its known tokens, and one for each running sequence
    /// that will still grow, else the newcomer would soon be preempted again.
    fn num_blocks_to_admit(&self, seq: &Sequence, hit: PrefixHit) -> usize {
        let num_growing = self.running.iter().filter(|rank| self.grows(rank.id)).count();
        self.blocks.blocks_for(seq.tokens.len()) - hit.num_blocks + hit.num_free + num_growing
    }

    /// Whether a sequence may need more blocks than it has.
    fn grows(&self, id: SeqId) -> bool {
        let seq = &self.seqs[&id];
        seq.block_table.len() < self.blocks.blocks_for(seq.max_kv_tokens())
    }

    /// Whether the first row has its embedding: a sequence that could not compute anything is not admitted.
    fn can_start(&self, seq: &Sequence, hit: PrefixHit, draft: &Draft) -> bool {
        let start = hit.num_blocks * self.config.block_size;
        match seq.media.get(seq.media_from(start)).filter(|span| span.offset <= start) {
            Some(span) => self.encoder.can_acquire(&span.hash, span.num_tokens, &draft.encode_budget),
            None => true,
        }
    }

    fn admit(&mut self, rank: Rank, hit: PrefixHit) {
        let seq = self.seqs.get_mut(&rank.id).expect("a waiting sequence exists");
        self.blocks.share(&seq.hashes[..hit.num_blocks], &mut seq.block_table);
        let num_blocks = self.blocks.blocks_for(seq.tokens.len());
        let grown = self.blocks.grow(&mut seq.block_table, num_blocks);
        assert!(grown, "the caller has counted the free blocks");
        seq.slot = self.free_slots.pop_first();
        let num_cached_tokens = hit.num_blocks * self.config.block_size;
        (seq.num_computed, seq.num_confirmed, seq.num_cached_tokens) =
            (num_cached_tokens, num_cached_tokens, num_cached_tokens);
        seq.num_registered = hit.num_blocks;
        seq.media_released = seq.media_from(num_cached_tokens);
        seq.media_acquired = seq.media_released;
        seq.first_cached_tokens.get_or_insert(num_cached_tokens);
        seq.admit = true;
        seq.phase = Phase::Running;
        if seq.constrained && !seq.may_sample {
            self.unsettled.push(rank.id);
        }
        if !seq.skip_prefix_lookup {
            self.counters.prefix_cache_queries += seq.tokens.len() as u64;
            self.counters.prefix_cache_hits += num_cached_tokens as u64;
        }
        self.waiting.remove(&rank);
        self.running.insert(rank);
    }

    /// Preempts running sequences for the head of the queue, if it is of a more urgent class and that makes it fit.
    fn preempt_for_urgent(&mut self) {
        let (Some(&head), Some(&last)) = (self.waiting.first(), self.running.last()) else { return };
        if self.config.policy != Policy::Priority || last.class <= head.class {
            return;
        }
        let hit = self.look_up(head.id);
        let num_blocks = self.num_blocks_to_admit(&self.seqs[&head.id], hit);
        let leaving = self.seqs.values().filter(|seq| matches!(seq.phase, Phase::Preempting | Phase::Ended));
        let mut num_slots = self.free_slots.len() + leaving.count();
        let mut num_free = self.blocks.num_free() + self.num_blocks_returning();
        let mut victims = Vec::new();
        for &victim in self.running.iter().rev().take_while(|victim| victim.class > head.class) {
            if num_slots > 0 && num_free >= num_blocks {
                break;
            }
            let table = &self.seqs[&victim.id].block_table;
            num_free += table.iter().filter(|&&block| self.blocks.is_exclusive(block)).count();
            num_free += usize::from(self.grows(victim.id));
            num_slots += 1;
            victims.push(victim);
        }
        if num_slots > 0 && num_free >= num_blocks {
            victims.into_iter().for_each(|victim| self.preempt(victim));
        }
    }
}

/// The rows up to `end` of a sequence, which counts them as computed from now on.
fn take_rows(seq: &mut Sequence, end: usize, num_blocks: usize) -> PlannedSeq {
    let start = seq.num_computed;
    let samples = end == seq.len();
    let planned = PlannedSeq {
        seq: seq.rank.id,
        slot: seq.slot.expect("a running sequence has a slot"),
        admit: std::mem::take(&mut seq.admit),
        num_output_tokens: seq.num_output_tokens(),
        start,
        tokens: (start..end)
            .map(|i| seq.tokens.get(i).map_or(PlanToken::Pending, |&id| PlanToken::Known(id)))
            .collect(),
        context_len: end,
        block_table: seq.block_table[..num_blocks].to_vec(),
        samples,
        media: media_rows(seq, start, end),
        num_cached_tokens: seq.num_cached_tokens,
    };
    seq.num_computed = end;
    seq.num_in_flight += 1;
    seq.num_pending += usize::from(samples);
    seq.may_sample &= !samples;
    seq.decoding |= samples;
    planned
}

fn media_rows(seq: &Sequence, start: usize, end: usize) -> Vec<MediaRows> {
    let held = seq.media_released..seq.media_acquired;
    let rows = |media_idx: usize| {
        let span = &seq.media[media_idx];
        let (first, last) = (span.offset.max(start), span.end().min(end));
        (first < last).then(|| MediaRows {
            media_idx,
            hash: span.hash,
            token_row: first - start,
            source_row: first - span.offset,
            rows: last - first,
        })
    };
    held.filter_map(rows).collect()
}
