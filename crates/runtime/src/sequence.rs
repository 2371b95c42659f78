//! What the engine keeps about a sequence besides the scheduler's view: its client, sampling, media and times.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use spark_api::{
    Event, FinishReason, Finished, MediaItem, RankedToken, Request, RequestTimings, SamplingParams,
    TokenEvent, TokenId, TokenLogprobs,
};
use spark_backend::{SampledToken, SlotParams, TokenLogprob};
use spark_scheduler::{MediaSpan, NewSequence, PlannedSeq};
use tokio::sync::mpsc::UnboundedSender;

use crate::{SequenceRecord, admission::Admission, masks::Constraint, wire::Pixels};

/// A live sequence.
pub(crate) struct Sequence {
    /// Its request's, for people.
    name: String,
    events: UnboundedSender<Event>,
    sampling: SamplingParams,
    stop_token_ids: Vec<TokenId>,
    prompt: Arc<[TokenId]>,
    media: Arc<[MediaItem]>,
    priority: i32,
    cache_salt: Option<String>,
    pub(crate) constraint: Constraint,
    progress: Option<UnboundedSender<usize>>,
    /// Under which number the other ranks have its pixels.
    pub(crate) upload: Option<u64>,
    /// Nobody has seen anything of its answer: it can begin anew.
    pub(crate) is_untouched: bool,
    output: Vec<TokenId>,
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    arrived: Instant,
    first_scheduled: Option<Instant>,
    first_token: Option<Instant>,
    num_preemptions: usize,
    /// Those that its present scheduler does not know of.
    num_earlier_preemptions: usize,
    has_prompt_sent: bool,
}

impl Sequence {
    /// Of a request; `eos_token_ids` are the model's.
    pub(crate) fn new(
        request: Request,
        events: UnboundedSender<Event>,
        eos_token_ids: &[TokenId],
        arrived: Instant,
    ) -> Self {
        let Request { name, prompt, media, sampling, priority, cache_salt, constraint, progress, .. } =
            request;
        let mut stop_token_ids = sampling.stop_token_ids.clone();
        if !sampling.ignore_eos {
            stop_token_ids.extend(eos_token_ids);
        }
        let prompt_logprobs = vec![None; if sampling.prompt_logprobs.is_some() { prompt.len() } else { 0 }];
        Self {
            name,
            events,
            stop_token_ids,
            prompt: prompt.into(),
            media: media.into(),
            sampling,
            priority,
            cache_salt,
            constraint: Constraint::new(constraint),
            progress,
            upload: None,
            is_untouched: true,
            output: Vec::new(),
            prompt_logprobs,
            arrived,
            first_scheduled: None,
            first_token: None,
            num_preemptions: 0,
            num_earlier_preemptions: 0,
            has_prompt_sent: false,
        }
    }

    /// Its group is gone: what was computed of it has to be computed anew, and what its client has seen stays.
    pub(crate) fn preempt(&mut self) {
        self.upload = None;
        self.num_preemptions += usize::from(self.first_scheduled.is_some());
        self.num_earlier_preemptions = self.num_preemptions;
    }

    /// What a scheduler needs to know of it, before its first token or after some that another scheduler planned.
    pub(crate) fn to_schedule(&self) -> NewSequence {
        let span = |m: &MediaItem| MediaSpan { hash: m.hash, offset: m.offset, num_tokens: m.num_tokens };
        NewSequence {
            prompt: self.prompt.to_vec(),
            output: self.output.clone(),
            media: self.media.iter().map(span).collect(),
            max_tokens: self.sampling.max_tokens,
            min_tokens: self.sampling.min_tokens,
            stop_token_ids: self.sampling.stop_token_ids.clone(),
            ignore_eos: self.sampling.ignore_eos,
            priority: self.priority,
            cache_salt: self.cache_salt.clone(),
            constrained: self.constraint.is_some(),
            prompt_logprobs: self.sampling.prompt_logprobs.is_some(),
        }
    }

    /// What a report says of it.
    pub(crate) fn record(&self) -> SequenceRecord {
        SequenceRecord {
            name: self.name.clone(),
            age: self.arrived.elapsed(),
            is_scheduled: self.first_scheduled.is_some(),
            num_prompt_tokens: self.prompt.len(),
            num_output_tokens: self.output.len(),
            num_media: self.media.len(),
            num_preemptions: self.num_preemptions,
        }
    }

    /// The pixels of its media, in order; empty for text.
    pub(crate) fn pixels(&self) -> Vec<Pixels> {
        self.media.iter().map(|item| Pixels(item.patches.clone())).collect()
    }

    /// The client has dropped its stream.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// What the runner needs when the sequence enters (or enters again) the slot of `planned`.
    pub(crate) fn admission(&mut self, planned: &PlannedSeq) -> Admission {
        self.first_scheduled.get_or_insert_with(Instant::now);
        let s = &self.sampling;
        let params = SlotParams {
            temperature: s.temperature,
            top_k: s.top_k,
            top_p: s.top_p,
            min_p: s.min_p,
            repetition_penalty: s.repetition_penalty,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            logit_bias: s.logit_bias.clone(),
            seed: s.seed,
            stop_token_ids: self.stop_token_ids.clone(),
            min_tokens: s.min_tokens,
            logprobs: s.logprobs,
            named_tokens: s.logprob_token_ids.clone(),
            // Only the repetition penalty looks at the prompt.
            prompt: if s.repetition_penalty == 1.0 { Vec::new() } else { self.prompt.to_vec() },
            output: self.output.clone(),
        };
        Admission {
            slot: planned.slot,
            params,
            prompt_len: self.prompt.len(),
            media: self.media.clone(),
            upload: self.upload,
            prompt_logprobs: s.prompt_logprobs.map(|n| (self.prompt.clone(), n)),
        }
    }

    /// Keeps the log-probabilities of prompt token `index`.
    pub(crate) fn keep_prompt_logprobs(&mut self, index: usize, token: TokenLogprob, top: &[TokenLogprob]) {
        if let Some(entry) = self.prompt_logprobs.get_mut(index) {
            *entry = Some(logprobs(token, top, Vec::new()));
        }
    }

    /// Tells how much of the prompt was planned before the step that is about to run.
    pub(crate) fn send_progress(&self, num_tokens: usize) {
        if let Some(progress) = self.progress.as_ref().filter(|_| num_tokens < self.prompt.len()) {
            // Whoever does not listen any more does not want to know.
            let _ = progress.send(num_tokens);
        }
    }

    /// The prompt is computed.
    pub(crate) fn send_prompt(&mut self, num_cached_tokens: usize) {
        if std::mem::replace(&mut self.has_prompt_sent, true) {
            return;
        }
        let logprobs = self.sampling.prompt_logprobs.map(|_| std::mem::take(&mut self.prompt_logprobs));
        let now = Instant::now();
        let scheduled = self.first_scheduled.unwrap_or(now);
        let queued = scheduled.saturating_duration_since(self.arrived);
        let prefill = now.saturating_duration_since(scheduled);
        self.send(Event::Prompt { num_cached_tokens, queued, prefill, logprobs });
    }

    /// A token is accepted.
    pub(crate) fn send_token(&mut self, token: TokenId, sampled: Option<&SampledToken>) {
        self.first_token.get_or_insert_with(Instant::now);
        self.output.push(token);
        let logprobs = sampled.and_then(|sampled| {
            let (token, top) = sampled.logprobs.as_ref()?;
            let named = self.sampling.logprob_token_ids.iter().copied().zip(sampled.named.iter().copied());
            Some(logprobs(*token, top, named.collect()))
        });
        self.send(Event::Token(TokenEvent { token, logprobs }));
    }

    pub(crate) fn set_preemptions(&mut self, num_preemptions: usize) {
        self.num_preemptions = self.num_earlier_preemptions + num_preemptions;
    }

    /// The end. Consumes the sequence, which closes the stream.
    pub(crate) fn send_finished(mut self, reason: FinishReason) {
        let now = Instant::now();
        let scheduled = self.first_scheduled.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        let timings = RequestTimings {
            arrived: self.arrived,
            queued: scheduled.saturating_duration_since(self.arrived),
            prefill: first_token.saturating_duration_since(scheduled),
            decode: self.first_token.map_or(Duration::ZERO, |t| now.saturating_duration_since(t)),
            num_preemptions: self.num_preemptions,
        };
        self.send(Event::Finished(Finished { reason, num_output_tokens: self.output.len(), timings }));
    }

    fn send(&mut self, event: Event) {
        self.is_untouched = false;
        // A closed stream means a cancelled request: the engine sees it before the next step.
        let _ = self.events.send(event);
    }
}

fn logprobs(token: TokenLogprob, top: &[TokenLogprob], named: Vec<(TokenId, f32)>) -> TokenLogprobs {
    let ranked = |t: &TokenLogprob| RankedToken { id: t.token, logprob: t.logprob, rank: t.rank };
    TokenLogprobs { token: ranked(&token), top: top.iter().map(ranked).collect(), named }
}
