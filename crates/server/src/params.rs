//! The fields that chats and completions share, read and resolved against the defaults of the model. No prompt.

use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use spark_api::{Limits, MAX_LOGPROB_TOKEN_IDS, SamplingParams, TokenId};
use spark_text::StopStrings;

use crate::ApiError;
use crate::allowed::AllowedTokens;
use crate::body::{Body, as_float, strings, wrong_type};
use crate::fields::Endpoint;
use crate::ids::random_id;
use crate::options::{Options, SamplingDefaults};
use crate::prompts::refuse_text;
use crate::structured::{self, Wanted};

/// Most choices of one prompt. vLLM allows 16,384; a client that wants more can send more requests.
const MAX_N: usize = 128;
/// Most entries of `logit_bias` and of `stop_token_ids`: they are copied to every rank at admission.
pub(crate) const MAX_TOKEN_ENTRIES: usize = 1024;
/// Most wrong keys of `logit_bias` that a refusal names.
const MAX_SHOWN: usize = 8;
/// Most bytes of `cache_salt`, `request_id` and of a model name.
const MAX_LABEL_BYTES: usize = 1024;
/// Temperatures below this are greedy, as in vLLM: the division would only add rounding.
const MIN_TEMPERATURE: f32 = 1e-5;

/// What a request asks for, besides its prompt.
pub(crate) struct Params {
    /// When its body was read: before images and text are processed, so that measured latencies contain that.
    pub(crate) arrived: Instant,
    /// Choices per prompt.
    pub(crate) n: usize,
    /// `None`: endpoint's default (rest of the context for chat, 16 for completions).
    pub(crate) max_tokens: Option<usize>,
    /// Everything for the sampler; `max_tokens` and `seed` are set per choice.
    pub(crate) sampling: SamplingParams,
    /// Choice `i` of each prompt is drawn with `seed + i`; `None` draws every choice of every prompt differently.
    pub(crate) seed: Option<u64>,
    pub(crate) priority: i32,
    pub(crate) cache_salt: Option<String>,
    pub(crate) output: OutputParams,
    /// Of the answer: `request_id` of the body, without the prefix of the endpoint.
    pub(crate) request_id: Option<String>,
    pub(crate) stream: StreamParams,
    /// What the text of the answer has to look like.
    pub(crate) structured: Option<Wanted>,
    /// The only tokens that the answer may have.
    pub(crate) allowed: Option<AllowedTokens>,
    /// Prompts may be cut to this.
    pub(crate) truncation: Option<Truncation>,
}

/// How tokens become text and JSON.
#[derive(Clone)]
pub(crate) struct OutputParams {
    pub(crate) stop: Arc<StopStrings>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special_tokens: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) tokens_as_ids: bool,
    /// Alternatives per token to show; `None` shows no log-probabilities.
    pub(crate) logprobs: Option<usize>,
    pub(crate) prompt_logprobs: Option<usize>,
    /// Completions: the answer begins with the prompt.
    pub(crate) echo: bool,
    /// Tokens before which a stop string does not count.
    pub(crate) min_tokens: usize,
    /// `--enable-per-request-metrics`: the answer says what it took, in vLLM's words too.
    pub(crate) metrics: bool,
}

/// `truncate_prompt_tokens` and `truncation_side`: what is kept of a prompt that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Truncation {
    pub(crate) max_tokens: usize,
    /// Whether the beginning goes; else the end does.
    pub(crate) is_left: bool,
}

impl Truncation {
    /// Reads both fields. -1 leaves room for one token of an answer, and the beginning goes unless the side is said, as in
    /// vLLM.
    ///
    /// # Errors
    /// When a value is out of its range, or the end of a conversation would go, with which the answer begins.
    pub(crate) fn read(
        body: &mut Body,
        is_chat: bool,
        max_model_len: usize,
    ) -> Result<Option<Self>, ApiError> {
        const SIDE: &str = "truncation_side";
        let is_left = match body.string(SIDE, MAX_LABEL_BYTES)?.as_deref() {
            None | Some("left") => true,
            Some("right") if !is_chat => false,
            Some("right") => {
                let message =
                    "truncation_side \"right\" would cut off where a chat's answer begins; use \"left\"";
                return Err(ApiError::field(SIDE, message));
            }
            Some(_) => return Err(ApiError::field(SIDE, "truncation_side must be \"left\" or \"right\"")),
        };
        let name = "truncate_prompt_tokens";
        let max_tokens = match body.integer(name, -1, i64::try_from(max_model_len).unwrap_or(i64::MAX))? {
            None => return Ok(None),
            Some(0) => {
                return Err(ApiError::field(name, format!("{name} is 0; it must be -1 or at least 1")));
            }
            Some(count) => usize::try_from(count).unwrap_or(max_model_len.saturating_sub(1)),
        };
        Ok(Some(Self { max_tokens, is_left }))
    }

    /// What is kept of `text`, of which more than `max_bytes` bytes cannot be needed: a bound on the tokenizer's work.
    pub(crate) fn cut_text(self, text: &mut String, max_bytes: usize) {
        if text.len() <= max_bytes {
            return;
        }
        match self.is_left {
            true => drop(text.drain(..text.ceil_char_boundary(text.len() - max_bytes))),
            false => text.truncate(text.floor_char_boundary(max_bytes)),
        }
    }

    /// Cuts a prompt. Returns whether anything went.
    pub(crate) fn cut(self, tokens: &mut Vec<TokenId>) -> bool {
        let Some(surplus) = tokens.len().checked_sub(self.max_tokens).filter(|surplus| *surplus > 0) else {
            return false;
        };
        match self.is_left {
            true => drop(tokens.drain(..surplus)),
            false => tokens.truncate(self.max_tokens),
        }
        true
    }
}

/// `stream` and `stream_options`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StreamParams {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    /// `return_progress`: how far the prompt has come.
    pub(crate) progress: bool,
    /// `timings_per_token`: every token says what the answer took so far.
    pub(crate) timings: bool,
}

impl Params {
    /// Reads all shared fields. `limits` are the engine's.
    ///
    /// # Errors
    /// Names the first field with a wrong type or value. What the engine checks (ranges of sampling parameters, ids
    /// in the vocabulary, lengths) is left to `Request::new`.
    pub(crate) fn read(
        endpoint: Endpoint,
        body: &mut Body,
        options: &Options,
        limits: &Limits,
    ) -> Result<Self, ApiError> {
        let output = read_output(endpoint, body, options, limits)?;
        let stream = read_stream(body, options)?;
        if stream.stream && output.prompt_logprobs.is_some() {
            let message = "prompt_logprobs are not available with stream: true; ask without stream";
            return Err(ApiError::field("prompt_logprobs", message));
        }
        // The tokenizers of these models add none at the ends of a text, so either value is obeyed.
        body.boolean("add_special_tokens", true)?;
        let mut sampling = read_sampling(body, &options.sampling_defaults)?;
        sampling.min_tokens = output.min_tokens;
        sampling.logprobs = output.logprobs;
        sampling.logprob_token_ids = read_named(body, &output)?;
        if !sampling.logprob_token_ids.is_empty() {
            // They come in place of the most likely ones; an echoed prompt still has those.
            sampling.logprobs = output.logprobs.map(|_| 0);
        }
        // An echoed prompt shows the log-probabilities of its tokens too. Each list is cut to its own count later, and
        // `None` is less than any count.
        sampling.prompt_logprobs = output.prompt_logprobs.max(output.logprobs.filter(|_| output.echo));
        // llama-server's name comes last; its -1 sets no bound.
        let n_predict =
            body.integer("n_predict", -1, i64::MAX)?.and_then(|count| usize::try_from(count).ok());
        let max_tokens = body.count("max_tokens", 0, usize::MAX)?.or(n_predict);
        if output.echo && max_tokens == Some(0) && !sampling.logprob_token_ids.is_empty() {
            let message = "logprob_token_ids is about generated tokens, and max_tokens is 0";
            return Err(ApiError::field("logprob_token_ids", message));
        }
        let max_tokens = match endpoint == Endpoint::Completions {
            true => max_tokens,
            false => body.count("max_completion_tokens", 0, usize::MAX)?.or(max_tokens),
        };
        Ok(Self {
            arrived: Instant::now(),
            n: body.count("n", 1, MAX_N)?.unwrap_or(1),
            max_tokens,
            sampling,
            seed: body.integer("seed", i64::MIN, i64::MAX)?.map(i64::cast_unsigned),
            priority: read_priority(body)?,
            cache_salt: read_salt(body)?,
            output,
            request_id: body.string("request_id", MAX_LABEL_BYTES)?,
            stream,
            structured: structured::read(body)?,
            allowed: AllowedTokens::read(body, limits.vocab_size)?,
            truncation: Truncation::read(body, endpoint != Endpoint::Completions, limits.max_model_len)?,
        })
    }
}

/// Reads `model`; absent means the first served name.
///
/// # Errors
/// A name that is not served.
pub(crate) fn read_model(body: &mut Body, options: &Options) -> Result<String, ApiError> {
    match body.string("model", MAX_LABEL_BYTES)? {
        Some(model) if options.served_names.contains(&model) => Ok(model),
        Some(model) => Err(ApiError::ModelNotFound { model, served: options.served_names.clone() }),
        None => Ok(options.model_name().to_owned()),
    }
}

fn read_output(
    endpoint: Endpoint,
    body: &mut Body,
    options: &Options,
    limits: &Limits,
) -> Result<OutputParams, ApiError> {
    Ok(OutputParams {
        stop: read_stop(body)?,
        include_stop: body.boolean("include_stop_str_in_output", false)?,
        skip_special_tokens: body.boolean("skip_special_tokens", true)?,
        return_token_ids: body.boolean("return_token_ids", false)?,
        tokens_as_ids: body.boolean("return_tokens_as_token_ids", options.tokens_as_token_ids)?,
        logprobs: read_logprobs(endpoint, body, limits)?,
        prompt_logprobs: read_alternatives(body, "prompt_logprobs", limits)?,
        echo: endpoint == Endpoint::Completions && body.boolean("echo", false)?,
        min_tokens: body.count("min_tokens", 0, usize::MAX)?.unwrap_or(0),
        metrics: options.per_request_metrics,
    })
}

fn read_stream(body: &mut Body, server: &Options) -> Result<StreamParams, ApiError> {
    let stream = body.boolean("stream", false)?;
    // A body has its timings anyway.
    let timings = body.boolean("timings_per_token", false)?;
    let forced = server.force_include_usage;
    let progress = body.boolean("return_progress", false)?;
    if progress && !stream {
        return Err(ApiError::field("return_progress", "return_progress is only allowed with stream: true"));
    }
    let Some(options) = body.object("stream_options")? else {
        let (include_usage, continuous_usage) = (forced, forced);
        return Ok(StreamParams { stream, include_usage, continuous_usage, progress, timings });
    };
    if !stream {
        return Err(ApiError::field("stream_options", "stream_options is only allowed with stream: true"));
    }
    let flag = |name: &str| match options.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => {
            Err(wrong_type("stream_options", &format!("an object whose {name} is a boolean"), other))
        }
    };
    let include_usage = flag("include_usage")? || forced;
    // Without the first the second asks for nothing, as in vLLM.
    let continuous_usage = flag("continuous_usage_stats")? && include_usage || forced;
    Ok(StreamParams { stream, include_usage, continuous_usage, progress, timings })
}

/// How many alternatives a token has; -1 is the whole vocabulary, where the operator allows that many.
fn read_alternatives(
    body: &mut Body,
    name: &'static str,
    limits: &Limits,
) -> Result<Option<usize>, ApiError> {
    let low = if limits.max_logprobs >= limits.vocab_size { -1 } else { 0 };
    let high = i64::try_from(limits.max_logprobs).unwrap_or(i64::MAX);
    let value = body.integer(name, low, high)?;
    Ok(value.map(|count| usize::try_from(count).unwrap_or(limits.vocab_size)))
}

/// Chat: a boolean and a count beside it. Completions: the count alone.
fn read_logprobs(endpoint: Endpoint, body: &mut Body, limits: &Limits) -> Result<Option<usize>, ApiError> {
    if endpoint == Endpoint::Completions {
        return match body.take("logprobs") {
            // `false` is what OpenAI's own clients send to mean "none".
            None | Some(Value::Bool(false)) => Ok(None),
            Some(value) => {
                let mut one = Body::new(serde_json::json!({"logprobs": value}))?;
                read_alternatives(&mut one, "logprobs", limits)
            }
        };
    }
    let wanted = body.boolean("logprobs", false)?;
    match read_alternatives(body, "top_logprobs", limits)? {
        Some(count) if !wanted && count > 0 => {
            Err(ApiError::field("top_logprobs", format!("top_logprobs is {count}, but logprobs is not true")))
        }
        count => Ok(wanted.then(|| count.unwrap_or(0))),
    }
}

/// `logprob_token_ids`, each once.
fn read_named(body: &mut Body, output: &OutputParams) -> Result<Vec<TokenId>, ApiError> {
    const NAME: &str = "logprob_token_ids";
    let mut ids = Vec::new();
    for id in body.token_ids(NAME, MAX_LOGPROB_TOKEN_IDS)? {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    if !ids.is_empty() && output.logprobs.is_none() {
        return Err(ApiError::field(NAME, format!("{NAME} needs logprobs: ask for both")));
    }
    Ok(ids)
}

fn read_stop(body: &mut Body) -> Result<Arc<StopStrings>, ApiError> {
    let wrong = |value: &Value| wrong_type("stop", "a string or a list of strings", value);
    let texts = match body.take("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(items)) => strings(items, wrong)?,
        Some(other) => return Err(wrong(&other)),
    };
    StopStrings::new(texts).map_err(|error| refuse_text("stop", &error))
}

/// `cache_prompt: false` (llama-server's) takes nothing from the cache: under a salt of its own nothing is there.
fn read_salt(body: &mut Body) -> Result<Option<String>, ApiError> {
    let salt = body.string("cache_salt", MAX_LABEL_BYTES)?;
    Ok(if body.boolean("cache_prompt", true)? { salt } else { Some(random_id()) })
}

fn read_priority(body: &mut Body) -> Result<i32, ApiError> {
    let value = body.integer("priority", i64::from(i32::MIN), i64::from(i32::MAX))?;
    // Within the range of an i32 by the line above.
    Ok(value.and_then(|value| i32::try_from(value).ok()).unwrap_or(0))
}

fn read_sampling(body: &mut Body, defaults: &SamplingDefaults) -> Result<SamplingParams, ApiError> {
    let temperature = body.float("temperature")?.unwrap_or(defaults.temperature);
    let greedy = (0.0..MIN_TEMPERATURE).contains(&temperature);
    Ok(SamplingParams {
        temperature: if greedy { 0.0 } else { temperature },
        top_k: read_top_k(body)?.unwrap_or(defaults.top_k),
        top_p: body.float("top_p")?.unwrap_or(defaults.top_p),
        min_p: body.float("min_p")?.unwrap_or(defaults.min_p),
        repetition_penalty: body.float("repetition_penalty")?.unwrap_or(defaults.repetition_penalty),
        presence_penalty: body.float("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: body.float("frequency_penalty")?.unwrap_or(0.0),
        logit_bias: read_logit_bias(body)?,
        stop_token_ids: body.token_ids("stop_token_ids", MAX_TOKEN_ENTRIES)?,
        ignore_eos: body.boolean("ignore_eos", false)?,
        ..SamplingParams::greedy(1)
    })
}

/// -1 and 0 keep all tokens, as in vLLM.
fn read_top_k(body: &mut Body) -> Result<Option<u32>, ApiError> {
    let value = body.integer("top_k", -1, i64::from(u32::MAX))?;
    Ok(value.map(|value| u32::try_from(value).unwrap_or(0)))
}

fn read_logit_bias(body: &mut Body) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(map) = body.object("logit_bias")? else { return Ok(Vec::new()) };
    if map.len() > MAX_TOKEN_ENTRIES {
        let message = format!("logit_bias has {} entries; the limit is {MAX_TOKEN_ENTRIES}", map.len());
        return Err(ApiError::field("logit_bias", message));
    }
    let wrong: Vec<&String> = map.keys().filter(|key| key.parse::<TokenId>().is_err()).collect();
    if !wrong.is_empty() {
        let shown: Vec<String> =
            wrong.iter().take(MAX_SHOWN).map(|key| key.chars().take(32).collect()).collect();
        let message = format!("logit_bias has the keys {shown:?}; keys must be token ids");
        return Err(ApiError::field("logit_bias", message));
    }
    // All keys are ids by the check above.
    let entry = |(key, value): (&String, &Value)| {
        Ok((key.parse::<TokenId>().unwrap_or_default(), as_float("logit_bias", value)?))
    };
    map.iter().map(entry).collect()
}
