//! Drives a scheduler and the simulated device side by side, and checks every plan against the rules of a plan.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use spark_api::TokenId;
use spark_scheduler::{
    AddError, Finish, NewSequence, PlanToken, PlannedSeq, Policy, Scheduler, SchedulerConfig, SeqId, StepPlan,
};

use crate::device::{Device, EOS, Reference};

/// A small configuration that tests change where they need to.
pub(crate) fn config() -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        block_size: 4,
        num_blocks: 16,
        max_model_len: 64,
        enable_prefix_caching: true,
        policy: Policy::Fcfs,
        eos_token_ids: vec![EOS],
        encoder_cache_tokens: 16,
        max_encoder_tokens_per_step: 16,
        cache_key: [7; 32],
        max_chunk_tokens: None,
        max_prompt_logprob_tokens: 64,
    }
}

/// A text sequence that runs to `max_tokens`.
pub(crate) fn text(prompt: Vec<TokenId>, max_tokens: usize) -> NewSequence {
    NewSequence {
        prompt,
        output: Vec::new(),
        media: Vec::new(),
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        ignore_eos: true,
        priority: 0,
        cache_salt: None,
        constrained: false,
        prompt_logprobs: false,
    }
}

/// What the device gives back for the first sampled sequence of a step, instead of its one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sampling {
    One,
    /// Nothing: to be sampled again.
    None,
    /// The token and the one after it.
    Two,
}

pub(crate) struct Tracked {
    pub(crate) new: NewSequence,
    pub(crate) reference: Reference,
    pub(crate) output: Vec<TokenId>,
    pub(crate) finish: Option<Finish>,
    pub(crate) cancelled: bool,
    pub(crate) prompt_done: Option<usize>,
    pub(crate) num_preemptions: usize,
    /// Where its next rows must start, unless they follow an admission.
    next_start: usize,
    /// It was sampled from since its last admission.
    decoding: bool,
}

impl Tracked {
    fn known_len(&self) -> usize {
        self.new.prompt.len() + self.output.len()
    }
}

/// Events that histories are meant to bring about.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) hits_inside_media: u64,
    pub(crate) media_evictions: u64,
    pub(crate) pending_tokens: u64,
}

/// Scheduler, device, and what the test knows about both.
pub(crate) struct Driver {
    pub(crate) config: SchedulerConfig,
    pub(crate) scheduler: Scheduler,
    pub(crate) seqs: BTreeMap<SeqId, Tracked>,
    pub(crate) seen: Seen,
    device: Device,
    in_flight: VecDeque<StepPlan>,
    /// Decodes that the last plan left out: they must have been preempted.
    left_out: BTreeSet<SeqId>,
    /// Constrained sequences whose next token may not be sampled yet.
    unsettled: BTreeSet<SeqId>,
    /// The test says when they may; else at once.
    pub(crate) settles_late: bool,
    /// Some sequence was given other than one token: a step may then lack budget for all decodes.
    irregular: bool,
}

impl Driver {
    pub(crate) fn new(config: SchedulerConfig) -> Self {
        let (slots, encoder) = (config.max_num_seqs, config.encoder_cache_tokens);
        Self {
            scheduler: Scheduler::new(config.clone()).expect("the test's configuration is valid"),
            device: Device::new(config.num_blocks, config.block_size, slots, encoder),
            config,
            seqs: BTreeMap::new(),
            seen: Seen::default(),
            in_flight: VecDeque::new(),
            left_out: BTreeSet::new(),
            unsettled: BTreeSet::new(),
            settles_late: false,
            irregular: false,
        }
    }

    pub(crate) fn add(&mut self, new: NewSequence) -> Result<SeqId, AddError> {
        let id = self.scheduler.add(new.clone())?;
        let tracked = Tracked {
            reference: Reference::new(&new, self.config.max_model_len),
            output: new.output.clone(),
            finish: None,
            cancelled: false,
            prompt_done: (!new.output.is_empty()).then_some(0),
            new,
            num_preemptions: 0,
            next_start: 0,
            decoding: false,
        };
        self.seqs.insert(id, tracked);
        self.unsettle(id);
        self.check();
        Ok(id)
    }

    /// A token of the sequence is known, or it is new.
    fn unsettle(&mut self, id: SeqId) {
        if self.seqs[&id].new.constrained {
            self.unsettled.insert(id);
            if !self.settles_late {
                self.settle(0);
            }
        }
    }

    /// Lets the sequence sample that has waited for it `n`-th.
    pub(crate) fn settle(&mut self, n: usize) {
        if let Some(&id) = self.unsettled.iter().nth(n) {
            self.unsettled.remove(&id);
            self.scheduler.allow_sample(id);
        }
    }

    pub(crate) fn cancel(&mut self, id: SeqId) {
        self.scheduler.cancel(id);
        let seq = self.seqs.get_mut(&id).expect("tests cancel what they added");
        seq.cancelled |= seq.finish.is_none();
        self.check();
    }

    /// Plans a step and puts it in flight.
    pub(crate) fn schedule(&mut self) -> Option<StepPlan> {
        let plan = self.scheduler.schedule();
        self.check();
        let Some(plan) = plan else {
            let is_stuck = self.in_flight.is_empty() && self.scheduler.has_work();
            assert!(
                !is_stuck || !self.unsettled.is_empty(),
                "nothing is in flight and nothing can run: {:?}",
                self.scheduler.stats()
            );
            return None;
        };
        self.check_plan(&plan);
        self.check_decodes(&plan);
        for rows in &plan.seqs {
            self.check_rows(rows);
            let seq = self.seqs.get_mut(&rows.seq).expect("planned sequences were added");
            seq.next_start = rows.context_len;
            let is_inside =
                rows.media.first().is_some_and(|media| media.token_row == 0 && media.source_row > 0);
            self.seen.hits_inside_media += u64::from(rows.admit && is_inside);
            self.seen.pending_tokens += u64::from(rows.tokens.contains(&PlanToken::Pending));
            seq.decoding = rows.samples || (seq.decoding && !rows.admit);
        }
        self.seen.media_evictions += plan.evict_media.len() as u64;
        self.in_flight.push_back(plan.clone());
        Some(plan)
    }

    /// Executes the oldest step and completes it.
    pub(crate) fn complete(&mut self, sampling: Sampling) {
        let Some(plan) = self.in_flight.pop_front() else { return };
        let seqs = &self.seqs;
        let mut sampled = self.device.run(&plan, |id| (&seqs[&id].new, &seqs[&id].reference));
        if let Some((id, tokens)) = sampled.first_mut() {
            let seq = &self.seqs[id];
            match sampling {
                Sampling::One => (),
                Sampling::None => tokens.clear(),
                Sampling::Two => tokens.extend(seq.reference.output.get(seq.output.len() + 1)),
            }
            self.irregular |= sampling != Sampling::One;
        }
        let updates = self.scheduler.complete(plan.id, &sampled);
        let in_plan = |id: SeqId| plan.seqs.iter().any(|rows| rows.seq == id);
        for update in updates {
            let seq = self.seqs.get_mut(&update.seq).expect("updates are about added sequences");
            assert!(in_plan(update.seq) && !seq.cancelled && seq.finish.is_none(), "unexpected {update:?}");
            if let Some(num_cached_tokens) = update.prompt_done {
                assert_eq!(seq.prompt_done.replace(num_cached_tokens), None, "the prompt is done twice");
            }
            assert!(
                seq.prompt_done.is_some() || update.tokens.is_empty(),
                "a token before the prompt is done"
            );
            seq.output.extend(&update.tokens);
            seq.finish = update.finish;
            seq.num_preemptions = update.num_preemptions;
        }
        for (id, tokens) in &sampled {
            let seq = self.seqs.get_mut(id).expect("sampled sequences were added");
            if tokens.is_empty() {
                seq.next_start = seq.known_len() - 1;
            }
            self.unsettle(*id);
        }
        self.check();
    }

    /// Steps with `depth` steps in flight at the time of planning, until nothing is left; fails if that takes too long.
    pub(crate) fn drain(&mut self, depth: usize) {
        // Every step computes a token; a sequence is preempted only for one before it, and that one then finishes.
        let num_tokens: usize =
            self.seqs.values().map(|seq| seq.new.prompt.len() + seq.new.max_tokens + 2).sum();
        let max_turns = 8 + 4 * num_tokens * (1 + self.seqs.len());
        for _ in 0..max_turns {
            if !self.scheduler.has_work() {
                return self.check_end();
            }
            let planned = self.in_flight.len() <= depth && self.schedule().is_some();
            if !planned {
                self.settle(0);
                self.complete(Sampling::One);
            }
        }
        panic!("not finished after {max_turns} plans and completions: {:?}", self.scheduler.stats());
    }

    pub(crate) fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn check(&self) {
        if let Err(text) = self.scheduler.check_integrity() {
            panic!("{text}");
        }
    }

    fn check_plan(&self, plan: &StepPlan) {
        let num_rows: usize = plan.seqs.iter().map(|rows| rows.tokens.len()).sum();
        assert_eq!(plan.num_tokens, num_rows);
        assert!(num_rows > 0 && num_rows <= self.config.max_num_batched_tokens, "{num_rows} rows");
        let wants_logprobs = |rows: &&PlannedSeq| {
            let seq = &self.seqs[&rows.seq];
            seq.new.prompt_logprobs && rows.start < seq.new.prompt.len()
        };
        let num_logprob_rows: usize =
            plan.seqs.iter().filter(wants_logprobs).map(|rows| rows.tokens.len()).sum();
        assert!(
            num_logprob_rows <= self.config.max_prompt_logprob_tokens,
            "{num_logprob_rows} rows of logits"
        );
        let slots: BTreeSet<usize> = plan.seqs.iter().map(|rows| rows.slot).collect();
        let ids: BTreeSet<SeqId> = plan.seqs.iter().map(|rows| rows.seq).collect();
        assert_eq!(
            (slots.len(), ids.len()),
            (plan.seqs.len(), plan.seqs.len()),
            "a slot or a sequence twice"
        );
        assert!(slots.iter().all(|&slot| slot < self.config.max_num_seqs));
        let num_encoded: usize = plan.encode.iter().map(|medium| medium.num_tokens).sum();
        assert!(plan.encode.len() <= 1 || num_encoded <= self.config.max_encoder_tokens_per_step);
        let used_in_flight: Vec<&PlannedSeq> = self.in_flight.iter().flat_map(|step| &step.seqs).collect();
        for other in &used_in_flight {
            assert!(
                other.media.iter().all(|media| !plan.evict_media.contains(&media.hash)),
                "evicts what a step in flight reads"
            );
            for rows in plan.seqs.iter().filter(|rows| rows.seq != other.seq) {
                assert_ne!(rows.slot, other.slot, "takes the slot of {:?} from a step in flight", other.seq);
                let written = &rows.block_table[rows.start / self.config.block_size..];
                let is_written = other.block_table.iter().any(|block| written.contains(block));
                assert!(!is_written, "{:?} writes a block of {:?} in flight", rows.seq, other.seq);
            }
        }
        for (i, rows) in plan.seqs.iter().enumerate() {
            let written = &rows.block_table[rows.start / self.config.block_size..];
            let others = plan.seqs.iter().enumerate().filter(|(j, _)| *j != i);
            let shared =
                others.flat_map(|(_, other)| &other.block_table).any(|block| written.contains(block));
            assert!(!shared, "{:?} writes a block that another sequence of the step uses", rows.seq);
        }
    }

    fn check_rows(&self, rows: &PlannedSeq) {
        let seq = &self.seqs[&rows.seq];
        assert!(!seq.cancelled && seq.finish.is_none(), "plans an ended sequence");
        let num_samples_in_flight = self
            .in_flight
            .iter()
            .flat_map(|step| &step.seqs)
            .filter(|r| r.seq == rows.seq && r.samples)
            .count();
        if rows.admit {
            assert_eq!(rows.start, rows.num_cached_tokens);
            assert_eq!(rows.start % self.config.block_size, 0);
            assert_eq!(num_samples_in_flight, 0, "admitted with a token in flight");
            assert!(
                rows.num_cached_tokens == 0
                    || (self.config.enable_prefix_caching && !seq.new.prompt_logprobs)
            );
        } else {
            assert_eq!(rows.start, seq.next_start, "each token is computed once, in order");
        }
        let end = rows.start + rows.tokens.len();
        assert_eq!(rows.context_len, end);
        assert_eq!(rows.block_table.len(), end.div_ceil(self.config.block_size));
        let len = seq.known_len() + num_samples_in_flight;
        assert_eq!(rows.samples, end == len, "exactly the last token is sampled from");
        assert_eq!(rows.num_output_tokens, len - seq.new.prompt.len());
        assert!(rows.num_output_tokens < seq.new.max_tokens, "samples more than max_tokens");
        assert!(
            !seq.new.constrained || num_samples_in_flight == 0,
            "a constrained sequence with a token in flight"
        );
        assert!(!rows.samples || !self.unsettled.contains(&rows.seq), "samples before it may");
        assert!(rows.tokens.len() <= self.config.max_chunk_tokens.unwrap_or(usize::MAX));
        for (i, token) in rows.tokens.iter().enumerate() {
            let is_known = rows.start + i < seq.known_len();
            let expect = |pos: usize| match pos < seq.new.prompt.len() {
                true => seq.new.prompt[pos],
                false => seq.output[pos - seq.new.prompt.len()],
            };
            match token {
                PlanToken::Known(id) => assert_eq!(*id, expect(rows.start + i)),
                PlanToken::Pending => {
                    assert!(!is_known && i + 1 == rows.tokens.len(), "pending, but not the last")
                }
            }
        }
    }

    /// A sequence that decodes is in every plan, or was preempted. (With a step in flight it may also wait for that.)
    fn check_decodes(&mut self, plan: &StepPlan) {
        if self.irregular || !self.in_flight.is_empty() {
            self.left_out.clear();
            return;
        }
        for rows in &plan.seqs {
            assert!(!self.left_out.contains(&rows.seq) || rows.admit, "a decode was delayed");
        }
        let decodes = self.seqs.iter().filter(|(_, seq)| seq.decoding && seq.finish.is_none());
        let planned: BTreeSet<SeqId> = plan.seqs.iter().map(|rows| rows.seq).collect();
        let left_out = decodes.map(|(&id, _)| id).filter(|id| !planned.contains(id));
        self.left_out = left_out.filter(|id| !self.unsettled.contains(id)).collect();
    }

    fn check_end(&self) {
        let stats = self.scheduler.stats();
        assert_eq!((stats.num_running, stats.num_waiting, self.in_flight.len()), (0, 0, 0));
        assert_eq!(stats.num_free_blocks, stats.num_blocks, "blocks leak");
        for (id, seq) in &self.seqs {
            if seq.cancelled {
                assert!(
                    seq.reference.output.starts_with(&seq.output),
                    "{id:?}: wrong output before it was cancelled"
                );
            } else {
                assert_eq!(seq.output, seq.reference.output, "{id:?}: wrong output");
                assert_eq!(seq.finish, Some(seq.reference.finish), "{id:?}: ended otherwise");
            }
        }
    }
}
