//! Compares everything the scheduler believes with everything else it believes. For tests, and for an idle engine.

use std::collections::BTreeMap;

use super::Scheduler;
use crate::SeqId;
use crate::sequence::{Phase, Sequence};

impl Scheduler {
    /// Checks every invariant of the bookkeeping; linear in sequences, blocks and tokens in flight.
    ///
    /// # Errors
    /// The first broken invariant, in words. It is always a bug of this crate.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.blocks.check(self.seqs.values().map(|seq| &seq.block_table[..]))?;
        let held = |seq: &'_ Sequence| seq.media[seq.media_released..seq.media_acquired].to_vec();
        self.encoder.check(self.seqs.values().flat_map(held).map(|span| span.hash))?;
        self.check_queues()?;
        self.check_slots()?;
        self.check_sharing()?;
        let mut in_flight: BTreeMap<SeqId, (usize, usize)> = BTreeMap::new();
        for rows in self.in_flight.iter().flat_map(|step| &step.rows) {
            let (num_steps, num_samples) = in_flight.entry(rows.seq).or_default();
            *num_steps += 1;
            *num_samples += usize::from(rows.samples);
        }
        if let Some(id) = in_flight.keys().find(|id| !self.seqs.contains_key(id)) {
            return Err(format!("{id:?} is gone while a step in flight uses it"));
        }
        for (id, seq) in &self.seqs {
            let expect = in_flight.get(id).copied().unwrap_or_default();
            if (seq.num_in_flight, seq.num_pending) != expect {
                let counts = (seq.num_in_flight, seq.num_pending);
                return Err(format!(
                    "{id:?} counts {counts:?} steps and samples in flight; there are {expect:?}"
                ));
            }
            self.check_seq(seq).map_err(|text| format!("{id:?} ({:?}): {text}", seq.phase))?;
        }
        Ok(())
    }

    fn check_seq(&self, seq: &Sequence) -> Result<(), String> {
        let holds_something = seq.slot.is_some() || !seq.block_table.is_empty() || seq.num_in_flight > 0;
        if seq.phase == Phase::Waiting && (holds_something || seq.num_computed > 0) {
            return Err("waits and holds something".into());
        }
        if matches!(seq.phase, Phase::Preempting | Phase::Ended) && seq.num_in_flight == 0 {
            return Err("should have given back what it holds".into());
        }
        if self.blocks.blocks_for(seq.num_computed) > seq.block_table.len() {
            return Err(format!("{} blocks for {} tokens", seq.block_table.len(), seq.num_computed));
        }
        if seq.num_confirmed > seq.num_computed
            || seq.num_registered * self.config.block_size > seq.num_confirmed
        {
            let counts = (seq.num_registered, seq.num_confirmed, seq.num_computed);
            return Err(format!("registered blocks, confirmed and computed tokens are {counts:?}"));
        }
        if !seq.out_of_step && seq.phase != Phase::Ended && seq.num_computed >= seq.len() {
            return Err(format!(
                "{} of {} tokens are computed: nothing to sample from",
                seq.num_computed,
                seq.len()
            ));
        }
        if seq.tokens.len() - seq.num_prompt_tokens > seq.rules.max_tokens {
            return Err("has more output than it asked for".into());
        }
        Ok(())
    }

    fn check_queues(&self) -> Result<(), String> {
        for (queue, phase) in [(&self.waiting, Phase::Waiting), (&self.running, Phase::Running)] {
            let expect = self.seqs.values().filter(|seq| seq.phase == phase).count();
            let found = |rank: &crate::sequence::Rank| {
                self.seqs.get(&rank.id).is_some_and(|seq| seq.phase == phase && seq.rank == *rank)
            };
            if queue.len() != expect || !queue.iter().all(found) {
                return Err(format!(
                    "the {phase:?} queue is {queue:?}; {expect} sequences are in that phase"
                ));
            }
        }
        Ok(())
    }

    fn check_slots(&self) -> Result<(), String> {
        let mut slots: Vec<usize> =
            self.seqs.values().filter_map(|seq| seq.slot).chain(self.free_slots.iter().copied()).collect();
        slots.sort_unstable();
        match slots.iter().copied().eq(0..self.config.max_num_seqs) {
            true => Ok(()),
            false => Err(format!("slots in use and free ones together are {slots:?}")),
        }
    }

    /// Two sequences share a block only as the same registered block of a common prefix.
    fn check_sharing(&self) -> Result<(), String> {
        let mut users: BTreeMap<u32, (usize, &Sequence)> = BTreeMap::new();
        for seq in self.seqs.values() {
            for (i, &block) in seq.block_table.iter().enumerate() {
                let Some((j, other)) = users.insert(block, (i, seq)) else { continue };
                let is_prefix = i == j && i < seq.num_registered && i < other.num_registered;
                if !is_prefix || seq.hashes[i] != other.hashes[i] {
                    let ids = (other.rank.id, seq.rank.id);
                    return Err(format!(
                        "block {block} is entry {j} and {i} of the tables of {ids:?}, unequal"
                    ));
                }
            }
        }
        Ok(())
    }
}
