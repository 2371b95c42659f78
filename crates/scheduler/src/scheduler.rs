//! The scheduler's state, and how sequences enter and leave it. Planning and completion are in the modules below it.

mod complete;
mod integrity;
mod schedule;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::block_manager::BlockManager;
use crate::encoder_cache::EncoderCache;
use crate::sequence::{Phase, Rank, Sequence};
use crate::{AddError, ConfigError, NewSequence, SchedulerConfig, SchedulerStats, SeqId, StepId};

/// Steps that may be planned and not completed: one executes, one waits behind it.
const MAX_IN_FLIGHT: usize = 2;

/// Decides what every step computes. See the crate's front page.
pub struct Scheduler {
    config: SchedulerConfig,
    /// All sequences, in order of arrival.
    seqs: BTreeMap<SeqId, Sequence>,
    waiting: BTreeSet<Rank>,
    running: BTreeSet<Rank>,
    blocks: BlockManager,
    encoder: EncoderCache,
    free_slots: BTreeSet<usize>,
    /// Constrained sequences that were admitted before their next token may be sampled.
    unsettled: Vec<SeqId>,
    /// Oldest first.
    in_flight: VecDeque<InFlightStep>,
    next_seq: u64,
    next_step: u64,
    /// Counters; the gauges are filled in when asked for.
    counters: SchedulerStats,
}

struct InFlightStep {
    id: StepId,
    rows: Vec<InFlightRows>,
}

/// What a step in flight computes for a sequence.
struct InFlightRows {
    seq: SeqId,
    /// Tokens with KV when it completes.
    end: usize,
    /// The step samples the token with index `end`.
    samples: bool,
}

impl Scheduler {
    /// A scheduler without sequences.
    ///
    /// # Errors
    /// When a size is 0, or the token budget cannot hold a decode of every running sequence.
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            seqs: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            blocks: BlockManager::new(config.num_blocks, config.block_size),
            encoder: EncoderCache::new(config.encoder_cache_tokens),
            free_slots: (0..config.max_num_seqs).collect(),
            unsettled: Vec::new(),
            in_flight: VecDeque::new(),
            next_seq: 0,
            next_step: 0,
            counters: SchedulerStats::default(),
            config,
        })
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// When it could never finish here: it would block the queue behind it for ever. See [`AddError`].
    pub fn add(&mut self, seq: NewSequence) -> Result<SeqId, AddError> {
        self.check_fits(&seq)?;
        let id = SeqId(self.next_seq);
        self.next_seq += 1;
        let seq = Sequence::new(id, seq, &self.config);
        self.waiting.insert(seq.rank);
        self.seqs.insert(id, seq);
        Ok(id)
    }

    /// Most tokens of prompt and output together that one sequence may ever have.
    pub fn max_tokens_that_fit(&self) -> usize {
        self.config.max_model_len.min(self.config.num_kv_tokens())
    }

    /// Ends a sequence without an update. What it holds is free for the next step, or, if a step in flight uses it,
    /// once that step completes. An id that has ended already is ignored.
    pub fn cancel(&mut self, id: SeqId) {
        if self.seqs.get(&id).is_some_and(|seq| seq.phase != Phase::Ended) {
            self.end(id);
        }
    }

    /// Ends a sequence for a reason that only the caller knows (a constraint is complete or failed), like
    /// [`cancel`](Self::cancel). The tokens it has so far are what it generated.
    pub fn finish(&mut self, id: SeqId) {
        self.cancel(id);
    }

    /// Lets the next token of a constrained sequence be sampled: what it may be is known. Until then the sequence sits out
    /// (only what is known of its prompt is computed), and the others go on. An id that has ended is ignored.
    pub fn allow_sample(&mut self, id: SeqId) {
        if let Some(seq) = self.seqs.get_mut(&id) {
            seq.may_sample = true;
        }
    }

    /// Constrained sequences that have been admitted since the last call, and whose next token may not be sampled yet.
    pub fn take_unsettled(&mut self) -> Vec<SeqId> {
        std::mem::take(&mut self.unsettled)
    }

    /// Whether any sequence has not ended, or any step is in flight.
    pub fn has_work(&self) -> bool {
        !self.seqs.is_empty() || !self.in_flight.is_empty()
    }

    /// Steps that were planned and are not completed: 0, 1 or 2.
    pub fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Gauges and counters, as of now.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            num_running: self.running.len(),
            num_waiting: self
                .seqs
                .values()
                .filter(|seq| matches!(seq.phase, Phase::Waiting | Phase::Preempting))
                .count(),
            num_blocks: self.blocks.num_blocks(),
            num_free_blocks: self.blocks.num_free(),
            encoder_cache_tokens: self.encoder.num_tokens(),
            ..self.counters.clone()
        }
    }

    fn check_fits(&self, seq: &NewSequence) -> Result<(), AddError> {
        let (num_prompt_tokens, max_model_len) = (seq.prompt.len(), self.config.max_model_len);
        if num_prompt_tokens == 0 || seq.max_tokens == 0 {
            return Err(AddError::Empty { num_prompt_tokens, max_tokens: seq.max_tokens });
        }
        if num_prompt_tokens >= max_model_len {
            return Err(AddError::PromptTooLong { num_prompt_tokens, max_model_len });
        }
        let num_tokens = num_prompt_tokens.saturating_add(seq.max_tokens).min(max_model_len);
        let num_output_tokens = seq.output.len();
        if num_output_tokens >= num_tokens - num_prompt_tokens {
            return Err(AddError::Complete { num_output_tokens, max_tokens: num_tokens - num_prompt_tokens });
        }
        let capacity = self.max_tokens_that_fit();
        if num_tokens > capacity {
            return Err(AddError::OverKvCache { num_tokens, capacity });
        }
        let mut previous_end = 0;
        for (media_idx, span) in seq.media.iter().enumerate() {
            let (offset, num_tokens, capacity) =
                (span.offset, span.num_tokens, self.config.encoder_cache_tokens);
            let end = offset.saturating_add(num_tokens);
            if offset < previous_end || num_tokens == 0 || end > num_prompt_tokens {
                return Err(AddError::BadSpan { media_idx, offset, end, num_prompt_tokens });
            }
            if num_tokens > capacity {
                return Err(AddError::OverEncoderCache { media_idx, num_tokens, capacity });
            }
            previous_end = end;
        }
        Ok(())
    }

    /// A live sequence leaves the queues for good.
    fn end(&mut self, id: SeqId) {
        let seq = self.seqs.get_mut(&id).expect("callers pass the id of a live sequence");
        self.waiting.remove(&seq.rank);
        self.running.remove(&seq.rank);
        seq.phase = Phase::Ended;
        self.settle(id);
    }

    /// A running sequence loses its turn: it waits again as soon as its last token is known.
    fn preempt(&mut self, rank: Rank) {
        let seq = self.seqs.get_mut(&rank.id).expect("a running sequence exists");
        self.running.remove(&rank);
        seq.phase = Phase::Preempting;
        seq.num_preemptions += 1;
        self.counters.num_preemptions += 1;
        self.settle(rank.id);
    }

    /// Takes back what an ended or preempted sequence holds, if no step in flight uses it.
    fn settle(&mut self, id: SeqId) {
        let seq = self.seqs.get_mut(&id).expect("callers pass the id of a live sequence");
        if seq.num_in_flight > 0 || matches!(seq.phase, Phase::Waiting | Phase::Running) {
            return;
        }
        self.blocks.release(&mut seq.block_table);
        for span in &seq.media[seq.media_released..seq.media_acquired] {
            self.encoder.release(&span.hash);
        }
        self.free_slots.extend(seq.slot.take());
        if seq.phase == Phase::Ended {
            self.seqs.remove(&id);
            return;
        }
        seq.phase = Phase::Waiting;
        (seq.num_computed, seq.num_confirmed, seq.num_registered) = (0, 0, 0);
        (seq.media_released, seq.media_acquired) = (0, 0);
        (seq.decoding, seq.out_of_step) = (false, false);
        self.waiting.insert(seq.rank);
    }
}
