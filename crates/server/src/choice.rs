//! One choice: the engine's events of one sequence become text, piece by piece. No JSON.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures_util::Stream;
use spark_api::{
    ConstraintError, Engine, Event, EventStream, FinishReason, Finished, Health, SubmitError, TokenEvent,
    TokenId, TokenLogprobs,
};
use spark_text::{Detokenizer, StopMatcher, StopOutput, Tokenizer};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::ApiError;
use crate::media::HeldMedium;
use crate::metrics::{Counts, Metrics, Outcome};
use crate::params::OutputParams;
use crate::parts::{AnswerPlan, Parts, ToolCallDelta};
use crate::summary::Summary;
use crate::timings::Timings;

/// What one event adds to a choice.
#[derive(Debug, Clone, Default)]
pub struct Delta {
    /// Which choice: `prompt_idx * n + i`.
    pub choice: usize,
    /// New text of the content; may be empty while a character, a stop string or a marker is incomplete.
    pub text: String,
    /// New text of the reasoning.
    pub reasoning: String,
    /// What is new of tool calls, in order.
    pub tool_calls: Vec<ToolCallDelta>,
    /// New tokens, the ending one included.
    pub tokens: Vec<TokenId>,
    /// How many of the new tokens are inside the reasoning.
    pub num_reasoning_tokens: usize,
    /// One per new token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// How many tokens of the prompt are done or under way, if that was asked for.
    pub progress: Option<usize>,
    /// Set once, before the first token.
    pub prompt: Option<PromptReport>,
    /// What it took so far; with tokens and at the end.
    pub timings: Option<Timings>,
    /// Set in the last delta.
    pub finish: Option<Finish>,
}

/// What the engine says about a prompt.
#[derive(Debug, Clone, Default)]
pub struct PromptReport {
    /// Prompt tokens taken from the prefix cache.
    pub num_cached_tokens: usize,
    /// One entry per prompt token, if asked for.
    pub logprobs: Option<Vec<Option<TokenLogprobs>>>,
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// `stop`, `length` or `tool_calls`.
    pub reason: &'static str,
    /// What stopped it, if that was one of the request's own stops.
    pub stop: Option<Stop>,
}

/// A stop that the request named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// One of `stop_token_ids`.
    Token(TokenId),
    /// One of `stop`.
    Text(String),
}

/// Everything that a choice needs to know about its sequence.
pub(crate) struct ChoiceSetup {
    pub(crate) index: usize,
    pub(crate) events: EventStream,
    /// Says how far the prompt has come.
    pub(crate) progress: Option<UnboundedReceiver<usize>>,
    /// Asked for its health if the events break off.
    pub(crate) engine: Arc<dyn Engine>,
    /// Images of the prompt, kept until the sequence has ended.
    pub(crate) images: Arc<[Arc<HeldMedium>]>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) summary: Arc<Summary>,
    /// When its request arrived.
    pub(crate) arrived: Instant,
    pub(crate) output: OutputParams,
    pub(crate) num_prompt_tokens: usize,
    /// `None`: all text is content.
    pub(crate) answer: Option<AnswerPlan>,
    /// The field whose grammar the sequence is held to.
    pub(crate) grammar_field: Option<&'static str>,
    /// Tokens that end the sequence and do not show in its text.
    pub(crate) ending_tokens: Arc<[TokenId]>,
    /// Only the echo is wanted (`echo` with `max_tokens: 0`): the one token that the engine makes is dropped.
    pub(crate) discard_output: bool,
}

impl ChoiceSetup {
    /// The tokens of the markers between the parts of the answer.
    fn marker_tokens(&self) -> Arc<[TokenId]> {
        let markers = self.answer.iter().flat_map(|plan| plan.options.markers());
        markers.filter_map(|marker| self.tokenizer.token_to_id(marker)).collect()
    }
}

/// The stream of deltas of one choice. Dropping it cancels the sequence.
pub(crate) struct Choice {
    setup: ChoiceSetup,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    parts: Parts,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// Without the tokens and the time from the first to the last, which are counted beside.
    timings: Timings,
    num_tokens: usize,
    ended: bool,
}

impl Choice {
    /// Starts to listen.
    pub(crate) fn new(setup: ChoiceSetup) -> Self {
        Self {
            detokenizer: Detokenizer::new(setup.tokenizer.clone(), setup.output.skip_special_tokens)
                .keeping(setup.marker_tokens()),
            stops: StopMatcher::new(setup.output.stop.clone(), setup.output.include_stop),
            parts: Parts::new(setup.answer.clone()),
            timings: Timings { num_prompt_tokens: setup.num_prompt_tokens, ..Timings::default() },
            setup,
            first_token: None,
            last_token: None,
            num_tokens: 0,
            ended: false,
        }
    }

    /// What is new of the prompt; the end of the channel is no news.
    fn poll_progress(&mut self, context: &mut Context<'_>) -> Option<Delta> {
        let receiver = self.setup.progress.as_mut()?;
        match receiver.poll_recv(context) {
            Poll::Pending => None,
            Poll::Ready(None) => {
                self.setup.progress = None;
                None
            }
            Poll::Ready(progress) => Some(Delta { choice: self.setup.index, progress, ..Delta::default() }),
        }
    }

    fn on_event(&mut self, event: Event) -> Result<Delta, ApiError> {
        let mut delta = Delta { choice: self.setup.index, ..Delta::default() };
        match event {
            Event::Prompt { num_cached_tokens, queued, prefill, logprobs } => {
                self.timings = Timings { num_cached_tokens, queued, prefill, ..self.timings };
                self.setup.metrics.prompt(self.setup.num_prompt_tokens, num_cached_tokens);
                self.setup.summary.prompt(self.setup.num_prompt_tokens, num_cached_tokens);
                delta.prompt = Some(PromptReport { num_cached_tokens, logprobs });
            }
            Event::Token(token) => self.on_token(token, &mut delta),
            Event::Finished(finished) => self.on_finished(&finished, &mut delta)?,
        }
        if !delta.tokens.is_empty() || delta.finish.is_some() {
            delta.timings = Some(self.timings());
        }
        Ok(delta)
    }

    fn timings(&self) -> Timings {
        let decode = self.last_token.zip(self.first_token).map(|(last, first)| last - first);
        Timings { num_output_tokens: self.num_tokens, decode: decode.unwrap_or_default(), ..self.timings }
    }

    fn on_token(&mut self, event: TokenEvent, delta: &mut Delta) {
        let now = Instant::now();
        self.setup.metrics.token(self.setup.arrived, self.last_token, now);
        if self.last_token.replace(now).is_none() {
            self.first_token = Some(now);
            self.setup.summary.first_token(now);
        }
        if self.setup.discard_output {
            return;
        }
        self.num_tokens += 1;
        delta.tokens.push(event.token);
        delta.logprobs.extend(event.logprobs);
        if self.setup.ending_tokens.contains(&event.token) && !self.setup.output.include_stop {
            return;
        }
        let text = self.detokenizer.push(event.token);
        let step = match self.num_tokens <= self.setup.output.min_tokens {
            true => self.stops.push_unstoppable(text),
            false => self.stops.push(text),
        };
        self.add(&step, delta);
    }

    /// A stop string ends the choice, and with it the sequence.
    fn add(&mut self, step: &StopOutput, delta: &mut Delta) {
        self.parts.push(&step.text, delta);
        if let Some(index) = step.stop {
            let text = self.setup.output.stop.get(index).unwrap_or_default();
            let stop = Some(Stop::Text(text.to_owned()));
            self.parts.finish(delta);
            delta.finish = Some(Finish { reason: self.stop_reason(), stop });
            self.end(Outcome::Stop, None);
        }
    }

    fn on_finished(&mut self, finished: &Finished, delta: &mut Delta) -> Result<(), ApiError> {
        if !self.setup.discard_output {
            // Half a character at the end ends no stop string.
            let rest = self.stops.push_unstoppable(self.detokenizer.finish());
            self.parts.push(&rest.text, delta);
            self.parts.push(&self.stops.finish(), delta);
            self.parts.finish(delta);
        }
        let (finish, outcome) = match &finished.reason {
            FinishReason::Eos | FinishReason::ConstraintComplete => {
                (Ok((self.stop_reason(), None)), Outcome::Stop)
            }
            FinishReason::StopToken(id) => (Ok((self.stop_reason(), Some(Stop::Token(*id)))), Outcome::Stop),
            FinishReason::Length => (Ok(("length", None)), Outcome::Length),
            FinishReason::Cancelled => (Err(ApiError::Cancelled), Outcome::Abort),
            FinishReason::EngineFailed(text) => (Err(ApiError::EngineFailed(text.clone())), Outcome::Error),
            FinishReason::ConstraintFailed(error) => (Err(self.grammar_error(error)), Outcome::Error),
        };
        self.end(outcome, Some(finished));
        let (reason, stop) = finish?;
        // Whatever the token was: the answer ends because it may have none.
        let (reason, stop) = if self.setup.discard_output { ("length", None) } else { (reason, stop) };
        delta.finish = Some(Finish { reason, stop });
        Ok(())
    }

    /// A grammar that is too much for a token is the request's, as one that does not compile.
    fn grammar_error(&self, error: &ConstraintError) -> ApiError {
        match self.setup.grammar_field {
            Some(field) => {
                ApiError::field(field, format!("{field}: the grammar cannot be applied: {}", error.0))
            }
            None => ApiError::internal(error),
        }
    }

    /// Why an answer ends that was not cut.
    fn stop_reason(&self) -> &'static str {
        if self.parts.has_calls() { "tool_calls" } else { "stop" }
    }

    fn end(&mut self, outcome: Outcome, finished: Option<&Finished>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        self.setup.events.close();
        self.setup.images = Arc::default();
        let counts = Counts {
            arrived: self.setup.arrived,
            num_prompt_tokens: self.setup.num_prompt_tokens,
            num_output_tokens: self.num_tokens,
        };
        self.setup.metrics.finished(outcome, counts, finished);
        self.setup.summary.ended(outcome, self.num_tokens, finished);
    }
}

impl Stream for Choice {
    type Item = Result<Delta, ApiError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        if let Some(progress) = this.poll_progress(context) {
            return Poll::Ready(Some(Ok(progress)));
        }
        let item = match ready!(this.setup.events.poll_recv(context)) {
            Some(event) => this.on_event(event),
            None => {
                this.end(Outcome::Error, None);
                Err(match this.setup.engine.health() {
                    // It took the request just before it stopped.
                    Health::Stopping => SubmitError::Stopping.into(),
                    Health::Failed(reason) => SubmitError::Failed(reason).into(),
                    Health::Ready => {
                        ApiError::EngineFailed("it dropped the request without an answer".into())
                    }
                })
            }
        };
        Poll::Ready(Some(item))
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        self.end(Outcome::Abort, None);
    }
}
