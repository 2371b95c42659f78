//! The state of one sequence: its tokens, how far they are computed, and what it holds. The policy is elsewhere.

use spark_api::TokenId;

use crate::block_hash::{BlockHash, BlockHasher};
use crate::{Finish, MediaSpan, NewSequence, Policy, SchedulerConfig, SeqId};

/// Place in the order of the sequences: smaller goes first, the largest is preempted first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    /// `priority`, or 0 under FCFS.
    pub(crate) class: i32,
    /// Ids are in order of arrival. A preempted sequence therefore returns to the front of its class.
    pub(crate) id: SeqId,
}

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Holds nothing.
    Waiting,
    /// Holds a slot and blocks.
    Running,
    /// Holds them until no step in flight uses them, then waits again.
    Preempting,
    /// Holds them until no step in flight uses them, then is gone.
    Ended,
}

/// Bounds on the output, and what ends it.
pub(crate) struct StopRules {
    pub(crate) eos_token_ids: Vec<TokenId>,
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) min_tokens: usize,
    /// Most output tokens, by `max_tokens` and `max_model_len`.
    pub(crate) max_tokens: usize,
}

impl StopRules {
    /// Whether the output ends with `token`, its `num_output_tokens`-th (counted from 1).
    fn check(&self, token: TokenId, num_output_tokens: usize) -> Option<Finish> {
        if num_output_tokens > self.min_tokens {
            if self.eos_token_ids.contains(&token) {
                return Some(Finish::Eos);
            }
            if self.stop_token_ids.contains(&token) {
                return Some(Finish::StopToken(token));
            }
        }
        (num_output_tokens >= self.max_tokens).then_some(Finish::Length)
    }
}

/// One sequence.
pub(crate) struct Sequence {
    pub(crate) rank: Rank,
    pub(crate) phase: Phase,
    /// Prompt and known output.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) num_prompt_tokens: usize,
    /// Samples of steps in flight.
    pub(crate) num_pending: usize,
    /// Tokens whose KV is computed, or will be by a step in flight.
    pub(crate) num_computed: usize,
    /// Tokens whose KV is computed by completed steps.
    pub(crate) num_confirmed: usize,
    /// Steps in flight that use what the sequence holds.
    pub(crate) num_in_flight: usize,
    /// Its first sample since admission is planned: from here on it decodes.
    pub(crate) decoding: bool,
    /// A step in flight no longer continues the known tokens; not planned before that step is through.
    pub(crate) out_of_step: bool,
    pub(crate) rules: StopRules,
    pub(crate) constrained: bool,
    /// The next token of a constrained sequence may be sampled.
    pub(crate) may_sample: bool,

    pub(crate) slot: Option<usize>,
    /// `[>= ceil(num_computed / block_size)]`.
    pub(crate) block_table: Vec<u32>,
    /// Names of the full blocks of `tokens`, as far as they were needed.
    pub(crate) hashes: Vec<BlockHash>,
    /// Leading blocks that are registered in (or were taken from) the prefix cache.
    pub(crate) num_registered: usize,
    pub(crate) salt: Option<String>,
    pub(crate) skip_prefix_lookup: bool,
    /// Every prompt row costs a row of logits.
    pub(crate) prompt_logprobs: bool,

    pub(crate) media: Vec<MediaSpan>,
    /// Spans before this one need no encoder entry any more.
    pub(crate) media_released: usize,
    /// Spans from `media_released` up to this one hold a reference to their encoder entry.
    pub(crate) media_acquired: usize,

    /// Not planned since admission.
    pub(crate) admit: bool,
    /// Found in the prefix cache by this admission.
    pub(crate) num_cached_tokens: usize,
    /// Found in the prefix cache by the first admission; `None` before it.
    pub(crate) first_cached_tokens: Option<usize>,
    pub(crate) prompt_reported: bool,
    pub(crate) num_preemptions: usize,
}

impl Sequence {
    /// A waiting sequence. `new` was checked to be able to finish.
    pub(crate) fn new(id: SeqId, new: NewSequence, config: &SchedulerConfig) -> Self {
        let class = match config.policy {
            Policy::Fcfs => 0,
            Policy::Priority => new.priority,
        };
        let num_prompt_tokens = new.prompt.len();
        let rules = StopRules {
            eos_token_ids: if new.ignore_eos { Vec::new() } else { config.eos_token_ids.clone() },
            stop_token_ids: new.stop_token_ids,
            min_tokens: new.min_tokens,
            max_tokens: new.max_tokens.min(config.max_model_len - num_prompt_tokens),
        };
        Self {
            rank: Rank { class, id },
            phase: Phase::Waiting,
            prompt_reported: !new.output.is_empty(),
            tokens: [new.prompt, new.output].concat(),
            num_prompt_tokens,
            num_pending: 0,
            num_computed: 0,
            num_confirmed: 0,
            num_in_flight: 0,
            decoding: false,
            out_of_step: false,
            rules,
            constrained: new.constrained,
            may_sample: false,
            slot: None,
            block_table: Vec::new(),
            hashes: Vec::new(),
            num_registered: 0,
            salt: new.cache_salt,
            prompt_logprobs: new.prompt_logprobs,
            skip_prefix_lookup: new.prompt_logprobs || !config.enable_prefix_caching,
            media: new.media,
            media_released: 0,
            media_acquired: 0,
            admit: false,
            num_cached_tokens: 0,
            first_cached_tokens: None,
            num_preemptions: 0,
        }
    }

    /// Tokens, pending ones included.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len() + self.num_pending
    }

    /// Output tokens, pending ones included.
    pub(crate) fn num_output_tokens(&self) -> usize {
        self.len() - self.num_prompt_tokens
    }

    /// Tokens that have no KV yet.
    pub(crate) fn num_uncomputed(&self) -> usize {
        self.len() - self.num_computed
    }

    /// Rows that may be planned: not the one that is sampled, as long as it is not known what may be sampled.
    pub(crate) fn num_plannable(&self) -> usize {
        self.num_uncomputed().saturating_sub(usize::from(self.constrained && !self.may_sample))
    }

    /// Tokens whose KV is ever needed: the last output token's is not.
    pub(crate) fn max_kv_tokens(&self) -> usize {
        self.num_prompt_tokens + self.rules.max_tokens - 1
    }

    /// Whether a row of this running sequence may be planned now.
    pub(crate) fn is_ready(&self) -> bool {
        let waits_for_token = self.num_pending > 0 && self.constrained;
        let reaches_its_end = self.num_pending > 0 && self.num_output_tokens() >= self.rules.max_tokens;
        let runs = self.phase == Phase::Running && !self.out_of_step;
        runs && !waits_for_token && !reaches_its_end && self.num_plannable() > 0
    }

    /// Names all full blocks of known tokens.
    pub(crate) fn extend_hashes(&mut self, config: &SchedulerConfig) {
        let hasher = BlockHasher {
            key: &config.cache_key,
            block_size: config.block_size,
            tokens: &self.tokens,
            media: &self.media,
            salt: self.salt.as_deref(),
        };
        hasher.extend(&mut self.hashes);
    }

    /// Names of the leading blocks that may be taken from the prefix cache. The last token is left out: it is
    /// recomputed in any case, because its logits are needed.
    pub(crate) fn hashes_to_look_up(&self, block_size: usize) -> &[BlockHash] {
        match self.skip_prefix_lookup {
            true => &[],
            false => &self.hashes[..(self.tokens.len() - 1) / block_size],
        }
    }

    /// Index of the first medium that has rows at or after `token_idx`.
    pub(crate) fn media_from(&self, token_idx: usize) -> usize {
        self.media.partition_point(|span| span.end() <= token_idx)
    }

    /// Appends sampled tokens until one ends the sequence; gives the accepted ones and the end.
    pub(crate) fn accept(&mut self, sampled: &[TokenId]) -> (Vec<TokenId>, Option<Finish>) {
        let mut accepted = Vec::with_capacity(sampled.len());
        for &token in sampled {
            self.tokens.push(token);
            accepted.push(token);
            let finish = self.rules.check(token, self.tokens.len() - self.num_prompt_tokens);
            if finish.is_some() {
                return (accepted, finish);
            }
        }
        (accepted, None)
    }
}
