//! The last step before the engine: prompts and parameters become requests, one per choice.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use spark_api::{EventStream, Request, SamplingParams, SubmitError, TokenConstraint, TokenId};
use spark_text::GrammarConstraint;
use tokio::sync::mpsc::unbounded_channel;

use crate::allowed::AllowedTokens;
use crate::answer::Shape;
use crate::choice::{Choice, ChoiceSetup};
use crate::dialect::Form;
use crate::generation::PromptInfo;
use crate::grammars::AnswerGrammar;
use crate::http::settle;
use crate::ids::{random_id, unix_seconds};
use crate::metrics::Rejection;
use crate::observe::current_trace;
use crate::params::Params;
use crate::parts::AnswerPlan;
use crate::prompts::Prompt;
use crate::summary::{About, Readers, Summary};
use crate::thinking::ThinkingBudget;
use crate::{ApiError, FrontEnd, Generation};

/// `max_tokens` of a completion that does not say: OpenAI's.
const DEFAULT_COMPLETION_TOKENS: usize = 16;
/// Most log-probabilities of prompt tokens in one answer. Each takes some hundred bytes as JSON; a long prompt with many
/// alternatives would otherwise take gigabytes.
const MAX_PROMPT_LOGPROBS: usize = 1 << 20;

/// What a sequence counts as at least when tokens are counted: it takes more memory than a short prompt.
const SEQUENCE_TOKENS: usize = 256;

/// A request's part of the tokens at work; given back when dropped.
pub(crate) struct HeldTokens {
    all: Arc<AtomicUsize>,
    tokens: usize,
}

impl Drop for HeldTokens {
    fn drop(&mut self) {
        self.all.fetch_sub(self.tokens, Relaxed);
    }
}

impl FrontEnd {
    /// Queues all choices. If one is refused, those before it are cancelled by being dropped.
    pub(crate) fn submit(
        &self,
        form: Form,
        model: String,
        params: Params,
        prompts: Vec<Prompt>,
    ) -> Result<Generation, ApiError> {
        check_prompt_logprobs(&params, &prompts)?;
        settle();
        let held = self.hold(&prompts, params.n)?;
        let reasons = prompts.iter().flat_map(|prompt| &prompt.answer).any(|plan| plan.form.thinks);
        let request_id = params.request_id.clone().unwrap_or_else(random_id);
        let id = form.id(&request_id);
        let is_chat = form.is_chat();
        let summary = Arc::new(self.summary(&id, &model, &form, (&params, &prompts)));
        let ending_tokens = self.ending_tokens(&params.sampling);
        // The engine makes one token at least; where none is wanted, it is not told of.
        let prompt_alone = params.max_tokens == Some(0) && (params.output.echo || form.shows_prompts());
        let first_seed = params.seed.unwrap_or_else(|| form.seed(self.seeds.next()));
        let mut seeds = Vec::with_capacity(prompts.len() * params.n);
        let mut choices = Vec::with_capacity(prompts.len() * params.n);
        let mut infos = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let max_tokens =
                if prompt_alone { 1 } else { self.max_tokens(&form, &params, prompt.tokens.len()) };
            let grammar = prompt.grammar.as_ref().map(AnswerGrammar::constraint);
            for i in 0..params.n {
                // As vLLM: a seed that was asked for begins anew with each prompt; else no two choices share one.
                let offset = if params.seed.is_some() { i } else { choices.len() };
                let seed = first_seed.wrapping_add(offset as u64);
                seeds.push(seed);
                let sampling = SamplingParams { seed, max_tokens, ..params.sampling.clone() };
                let mut request = self.request(is_chat, &prompt, &params, &id, sampling)?;
                request.constraint = self.constraint(&params, prompt.answer.as_ref(), grammar.clone())?;
                // One choice speaks for the prompt.
                let (sender, receiver) = unbounded_channel();
                let progress = (params.stream.progress && i == 0).then_some(receiver);
                request.progress = progress.is_some().then_some(sender);
                self.metrics.submitted(params.n, max_tokens);
                choices.push(Choice::new(ChoiceSetup {
                    index: choices.len(),
                    events: self.queue(request)?,
                    progress,
                    engine: self.engine.clone(),
                    images: prompt.images.clone(),
                    tokenizer: self.tokenizer.clone(),
                    metrics: self.metrics.clone(),
                    summary: summary.clone(),
                    arrived: params.arrived,
                    output: params.output.clone(),
                    num_prompt_tokens: prompt.tokens.len(),
                    answer: prompt.answer.clone(),
                    grammar_field: prompt.grammar.as_ref().map(|grammar| grammar.field),
                    ending_tokens: ending_tokens.clone(),
                    discard_output: prompt_alone,
                }));
            }
            infos.push(PromptInfo { tokens: prompt.tokens.into(), echo: prompt.echo });
        }
        let shape = Shape {
            form,
            request_id,
            id,
            created: unix_seconds(),
            model,
            arrived: params.arrived,
            prompts: infos,
            seeds,
            n: params.n,
            reasons,
            output: params.output,
            stream: params.stream,
            tokenizer: self.tokenizer.clone(),
        };
        Ok(Generation { shape, choices: choices.into_iter().collect(), load: self.load.clone(), held })
    }

    /// Of a request that is about to be queued.
    fn summary(
        &self,
        id: &str,
        model: &str,
        form: &Form,
        (params, prompts): (&Params, &[Prompt]),
    ) -> Summary {
        let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0);
        let about = About {
            id: id.to_owned(),
            model: model.to_owned(),
            arrived: params.arrived,
            n: params.n,
            max_tokens: self.max_tokens(form, params, longest),
            temperature: params.sampling.temperature,
            top_p: params.sampling.top_p,
            num_images: prompts.iter().map(|prompt| prompt.images.len()).sum(),
            trace: current_trace(),
        };
        let readers = Readers {
            is_logged: self.options.log_requests,
            observers: self.options.observers.clone(),
            metrics: self.metrics.clone(),
        };
        Summary::new(about, readers)
    }

    fn queue(&self, request: Request) -> Result<EventStream, ApiError> {
        let refused = |error: &SubmitError| {
            if let SubmitError::QueueFull { .. } = error {
                self.metrics.rejected(Rejection::QueuedRequests);
            }
        };
        Ok(self.engine.submit(request).inspect_err(refused)?)
    }

    /// Room for the prompts of all choices, which each have their own.
    fn hold(&self, prompts: &[Prompt], n: usize) -> Result<HeldTokens, ApiError> {
        let tokens: usize = prompts.iter().map(|prompt| prompt.tokens.len().max(SEQUENCE_TOKENS)).sum();
        let held = HeldTokens { all: self.held_tokens.clone(), tokens: tokens.saturating_mul(n) };
        let before = held.all.fetch_add(held.tokens, Relaxed);
        let limit = self.options.max_num_queued_tokens;
        // One request alone is always taken: the engine's own limits say what it may have.
        if before > 0 && before.saturating_add(held.tokens) > limit {
            self.metrics.rejected(Rejection::QueuedTokens);
            return Err(ApiError::TokensFull { limit });
        }
        Ok(held)
    }

    /// What holds a sequence to its grammar, its thoughts to their budget, its tokens to those that are allowed.
    fn constraint(
        &self,
        params: &Params,
        plan: Option<&AnswerPlan>,
        grammar: Option<GrammarConstraint>,
    ) -> Result<Option<Box<dyn TokenConstraint>>, ApiError> {
        let budget = plan.and_then(|plan| Some((plan.options.reasoning?, plan.form.thinking_budget?)));
        if let Some(allowed) = params.allowed.clone() {
            return match (grammar, budget) {
                (None, None) => Ok(Some(Box::new(allowed))),
                _ => Err(AllowedTokens::conflict()),
            };
        }
        match budget {
            None => Ok(grammar.map(|grammar| Box::new(grammar) as _)),
            Some((start, budget)) => {
                Ok(Some(Box::new(ThinkingBudget::new(&self.tokenizer, start, budget, grammar)?)))
            }
        }
    }

    fn request(
        &self,
        is_chat: bool,
        prompt: &Prompt,
        params: &Params,
        id: &str,
        sampling: SamplingParams,
    ) -> Result<Request, ApiError> {
        let limits = &self.engine.info().limits;
        let request = Request::new(prompt.tokens.clone(), prompt.media.clone(), sampling, limits);
        let mut request = request.map_err(|error| match (is_chat, error.param) {
            // A chat has no field of that name.
            (true, "prompt") => ApiError::field("messages", error.message),
            _ => error.into(),
        })?;
        request.priority = params.priority;
        request.cache_salt.clone_from(&params.cache_salt);
        // Names end up in logs, and the client may have chosen this one.
        request.name = id.chars().map(|char| if char.is_control() { '?' } else { char }).collect();
        Ok(request)
    }

    /// What was asked for, else the endpoint's default. Too much is refused with the request, but for llama-server's
    /// clients: their answers end where the context does, and say so.
    fn max_tokens(&self, form: &Form, params: &Params, num_prompt_tokens: usize) -> usize {
        let room = self.engine.info().limits.max_model_len.saturating_sub(num_prompt_tokens).max(1);
        match (params.max_tokens, form) {
            (Some(count), Form::Llama(_)) => count.min(room),
            (Some(count), _) => count,
            (None, Form::Completion) => DEFAULT_COMPLETION_TOKENS.min(room),
            (None, _) => self.options.sampling_defaults.max_tokens.unwrap_or(room).min(room),
        }
    }

    /// Tokens that end a sequence and do not show in its text.
    fn ending_tokens(&self, sampling: &SamplingParams) -> Arc<[TokenId]> {
        let eos: &[TokenId] =
            if sampling.ignore_eos { &[] } else { &self.engine.info().limits.eos_token_ids };
        sampling.stop_token_ids.iter().chain(eos).copied().collect()
    }
}

fn check_prompt_logprobs(params: &Params, prompts: &[Prompt]) -> Result<(), ApiError> {
    let Some(count) = params.sampling.prompt_logprobs else { return Ok(()) };
    let num_tokens: usize = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
    let num_logprobs = num_tokens.saturating_mul(params.n).saturating_mul(count + 1);
    if num_logprobs <= MAX_PROMPT_LOGPROBS {
        return Ok(());
    }
    let message = format!(
        "{num_tokens} prompt tokens x {} alternatives x n {} is over {MAX_PROMPT_LOGPROBS} log-probabilities",
        count + 1,
        params.n
    );
    Err(ApiError::field("prompt_logprobs", message))
}
