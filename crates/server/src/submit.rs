//! The last step before the engine: prompts and parameters become requests, one per choice.

use std::sync::Arc;

use spark_api::{Request, SamplingParams, TokenId};

use crate::answer::Shape;
use crate::choice::{Choice, ChoiceSetup};
use crate::fields::Endpoint;
use crate::front_end::Prompt;
use crate::generation::PromptInfo;
use crate::grammars::AnswerGrammar;
use crate::ids::{random_id, unix_seconds};
use crate::params::Params;
use crate::{ApiError, FrontEnd, Generation};

/// `max_tokens` of a completion that does not say: OpenAI's.
const DEFAULT_COMPLETION_TOKENS: usize = 16;
/// Most log-probabilities of prompt tokens in one answer. Each takes some hundred bytes as JSON; a long prompt with many
/// alternatives would otherwise take gigabytes.
const MAX_PROMPT_LOGPROBS: usize = 1 << 20;

impl FrontEnd {
    /// Queues all choices. If one is refused, those before it are cancelled by being dropped.
    pub(crate) fn submit(
        &self,
        endpoint: Endpoint,
        model: String,
        params: Params,
        prompts: Vec<Prompt>,
    ) -> Result<Generation, ApiError> {
        check_prompt_logprobs(&params, &prompts)?;
        let reasons = prompts.iter().flat_map(|prompt| &prompt.answer).any(|plan| plan.form.thinks);
        let prefix = if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{}", params.request_id.clone().unwrap_or_else(random_id));
        let ending_tokens = self.ending_tokens(&params.sampling);
        let echo_alone = params.output.echo && params.max_tokens == Some(0);
        let first_seed = params.seed.unwrap_or_else(|| self.seeds.next());
        let mut choices = Vec::with_capacity(prompts.len() * params.n);
        let mut infos = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let max_tokens =
                if echo_alone { 1 } else { self.max_tokens(endpoint, &params, prompt.tokens.len()) };
            let constraint = prompt.grammar.as_ref().map(AnswerGrammar::constraint);
            for i in 0..params.n {
                // As vLLM: a seed that was asked for begins anew with each prompt; else no two choices share one.
                let offset = if params.seed.is_some() { i } else { choices.len() };
                let seed = first_seed.wrapping_add(offset as u64);
                let sampling = SamplingParams { seed, max_tokens, ..params.sampling.clone() };
                let mut request = self.request(endpoint, &prompt, &params, &id, sampling)?;
                request.constraint = constraint.clone().map(|constraint| Box::new(constraint) as _);
                self.metrics.submitted(params.n, max_tokens);
                choices.push(Choice::new(ChoiceSetup {
                    index: choices.len(),
                    events: self.engine.submit(request)?,
                    engine: self.engine.clone(),
                    images: prompt.images.clone(),
                    tokenizer: self.tokenizer.clone(),
                    metrics: self.metrics.clone(),
                    arrived: params.arrived,
                    output: params.output.clone(),
                    num_prompt_tokens: prompt.tokens.len(),
                    answer: prompt.answer.clone(),
                    grammar_field: prompt.grammar.as_ref().map(|grammar| grammar.field),
                    ending_tokens: ending_tokens.clone(),
                    discard_output: echo_alone,
                }));
            }
            infos.push(PromptInfo { tokens: prompt.tokens.into(), echo: prompt.echo });
        }
        let shape = Shape {
            endpoint,
            id,
            created: unix_seconds(),
            model,
            prompts: infos,
            n: params.n,
            reasons,
            output: params.output,
            stream: params.stream,
            tokenizer: self.tokenizer.clone(),
        };
        Ok(Generation { shape, choices: choices.into_iter().collect() })
    }

    fn request(
        &self,
        endpoint: Endpoint,
        prompt: &Prompt,
        params: &Params,
        id: &str,
        sampling: SamplingParams,
    ) -> Result<Request, ApiError> {
        let limits = &self.engine.info().limits;
        let request = Request::new(prompt.tokens.clone(), prompt.media.clone(), sampling, limits);
        let mut request = request.map_err(|error| match (endpoint, error.param) {
            // A chat has no field of that name.
            (Endpoint::Chat, "prompt") => ApiError::field("messages", error.message),
            _ => error.into(),
        })?;
        request.priority = params.priority;
        request.cache_salt.clone_from(&params.cache_salt);
        // Names end up in logs, and the client may have chosen this one.
        request.name = id.chars().map(|char| if char.is_control() { '?' } else { char }).collect();
        Ok(request)
    }

    /// What was asked for, else the endpoint's default; too much is refused with the request.
    fn max_tokens(&self, endpoint: Endpoint, params: &Params, num_prompt_tokens: usize) -> usize {
        let room = self.engine.info().limits.max_model_len.saturating_sub(num_prompt_tokens).max(1);
        params.max_tokens.unwrap_or_else(|| match endpoint {
            Endpoint::Chat => self.options.sampling_defaults.max_tokens.unwrap_or(room).min(room),
            Endpoint::Completions => DEFAULT_COMPLETION_TOKENS.min(room),
        })
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
