//! A request: one prompt, one sequence of output tokens. Validated at construction.

use tokio::sync::mpsc::UnboundedSender;

use crate::{
    Limits, MAX_LOGPROB_TOKEN_IDS, MediaGeometry, MediaItem, SamplingParams, TokenConstraint, TokenId,
};

/// One sequence to generate. Front ends turn `n` choices into `n` requests.
#[non_exhaustive]
pub struct Request {
    /// Prompt tokens; placeholder runs are already as long as their media need.
    pub prompt: Vec<TokenId>,
    /// Media in the order of their placeholder runs.
    pub media: Vec<MediaItem>,
    /// How to sample.
    pub sampling: SamplingParams,
    /// Lower is served first (under the priority policy).
    pub priority: i32,
    /// Separates prefix caches: requests share cached blocks only with equal salts.
    pub cache_salt: Option<String>,
    /// Grammar, if output is constrained.
    pub constraint: Option<Box<dyn TokenConstraint>>,
    /// Told, while the prompt is computed, how many of its tokens are done or under way.
    pub progress: Option<UnboundedSender<usize>>,
    /// For logs and traces; need not be unique.
    pub name: String,
}

/// Why a request was refused. The text names the rule and the value; `param` names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// The field at fault, by its API name.
    pub param: &'static str,
    /// Rule and value.
    pub message: String,
}

impl Request {
    /// A request that the engine can run.
    ///
    /// # Errors
    /// Names the first field that breaks a rule of `limits`.
    pub fn new(
        prompt: Vec<TokenId>,
        media: Vec<MediaItem>,
        sampling: SamplingParams,
        limits: &Limits,
    ) -> Result<Self, RequestError> {
        check_prompt(&prompt, &sampling, limits)?;
        check_media(&prompt, &media, limits)?;
        check_sampling(&sampling, limits)?;
        Ok(Self {
            prompt,
            media,
            sampling,
            priority: 0,
            cache_salt: None,
            constraint: None,
            progress: None,
            name: String::new(),
        })
    }
}

fn refuse(param: &'static str, message: String) -> Result<(), RequestError> {
    Err(RequestError { param, message })
}

fn check_prompt(prompt: &[TokenId], sampling: &SamplingParams, limits: &Limits) -> Result<(), RequestError> {
    if prompt.is_empty() {
        return refuse("prompt", "the prompt is empty: at least one token is needed".into());
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= limits.vocab_size) {
        return refuse(
            "prompt",
            format!("token id {id} is outside the vocabulary (0..{})", limits.vocab_size),
        );
    }
    if prompt.len() + 1 > limits.max_model_len {
        return refuse(
            "prompt",
            format!(
                "the prompt has {} tokens; with at least one output token that is over max_model_len ({})",
                prompt.len(),
                limits.max_model_len
            ),
        );
    }
    if sampling.max_tokens == 0 {
        return refuse("max_tokens", "max_tokens is 0; it must be at least 1".into());
    }
    if sampling.max_tokens > limits.max_model_len - prompt.len() {
        return refuse(
            "max_tokens",
            format!(
                "prompt ({} tokens) + max_tokens ({}) is over max_model_len ({})",
                prompt.len(),
                sampling.max_tokens,
                limits.max_model_len
            ),
        );
    }
    Ok(())
}

/// Every placeholder token belongs to exactly one medium, and every medium to one run of placeholders.
fn check_media(prompt: &[TokenId], media: &[MediaItem], limits: &Limits) -> Result<(), RequestError> {
    if media.len() > limits.max_media {
        return refuse(
            "messages",
            format!("{} media in one prompt; the limit is {}", media.len(), limits.max_media),
        );
    }
    let is_placeholder =
        |id: &TokenId| Some(*id) == limits.image_token_id || Some(*id) == limits.video_token_id;
    let mut end = 0;
    for (i, item) in media.iter().enumerate() {
        if item.num_tokens > limits.max_media_tokens {
            return refuse(
                "messages",
                format!(
                    "medium {i} needs {} tokens; the encoder's memory is planned for {} a medium",
                    item.num_tokens, limits.max_media_tokens
                ),
            );
        }
        if !fits_geometry(item, limits) {
            let problem =
                format!("medium {i}: its pixels, its grid and its number of tokens do not fit together");
            return refuse("messages", problem);
        }
        let run = prompt.get(item.offset..).and_then(|rest| rest.get(..item.num_tokens));
        let fits = item.offset >= end && item.num_tokens > 0;
        if !fits || !run.is_some_and(|ids| ids.iter().all(is_placeholder)) {
            return refuse("messages", format!("medium {i} does not match its run of placeholder tokens"));
        }
        end = item.offset + item.num_tokens;
    }
    let (filled, found) = (
        media.iter().map(|m| m.num_tokens).sum::<usize>(),
        prompt.iter().filter(|id| is_placeholder(id)).count(),
    );
    if filled != found {
        return refuse(
            "prompt",
            format!(
                "the prompt has {found} placeholder tokens, but its media fill {filled}: use message parts for media"
            ),
        );
    }
    Ok(())
}

/// Whole merge blocks, as many tokens as there are of them, and pixels for every patch: of one frame for an image, of
/// all frames of a patch for a video.
fn fits_geometry(item: &MediaItem, limits: &Limits) -> bool {
    let Some(MediaGeometry { patch_size, temporal_patch_size, merge_size }) = limits.media_geometry else {
        return false;
    };
    let grid = item.grid;
    let num_patches = grid.t.checked_mul(grid.h).and_then(|n| n.checked_mul(grid.w));
    let pixels = num_patches.and_then(|n| n.checked_mul(3 * patch_size * patch_size));
    let (Some(num_patches), Some(pixels)) = (num_patches, pixels) else { return false };
    grid.h.is_multiple_of(merge_size)
        && grid.w.is_multiple_of(merge_size)
        && num_patches > 0
        && item.num_tokens == num_patches / (merge_size * merge_size)
        && (item.patches.len() == pixels
            || Some(item.patches.len()) == pixels.checked_mul(temporal_patch_size))
}

fn check_sampling(sampling: &SamplingParams, limits: &Limits) -> Result<(), RequestError> {
    let in_range = |param: &'static str, value: f32, low: f32, high: f32| match value >= low && value <= high
    {
        true => Ok(()),
        false => refuse(param, format!("{param} is {value}; it must be between {low} and {high}")),
    };
    in_range("temperature", sampling.temperature, 0.0, 2.0)?;
    in_range("min_p", sampling.min_p, 0.0, 1.0)?;
    in_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?;
    in_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?;
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return refuse("top_p", format!("top_p is {}; it must be above 0 and at most 1", sampling.top_p));
    }
    if !(sampling.repetition_penalty > 0.0 && sampling.repetition_penalty.is_finite()) {
        let value = sampling.repetition_penalty;
        return refuse("repetition_penalty", format!("repetition_penalty is {value}; it must be above 0"));
    }
    if sampling.min_tokens > sampling.max_tokens {
        let (min, max) = (sampling.min_tokens, sampling.max_tokens);
        return refuse("min_tokens", format!("min_tokens ({min}) is over max_tokens ({max})"));
    }
    let outside = |id: TokenId| id as usize >= limits.vocab_size;
    if let Some(id) = sampling.stop_token_ids.iter().copied().find(|&id| outside(id)) {
        let size = limits.vocab_size;
        return refuse("stop_token_ids", format!("stop token id {id} is outside the vocabulary (0..{size})"));
    }
    for &(id, bias) in &sampling.logit_bias {
        if outside(id) || !(-100.0..=100.0).contains(&bias) {
            let size = limits.vocab_size;
            return refuse(
                "logit_bias",
                format!("logit_bias {bias} of token {id}: ids are 0..{size}, values -100 to 100"),
            );
        }
    }
    check_named(sampling, limits)?;
    for (param, count) in [("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)] {
        if count.is_some_and(|n| n > limits.max_logprobs) {
            return refuse(
                param,
                format!("{param} asks for {count:?} alternatives; the limit is {}", limits.max_logprobs),
            );
        }
    }
    Ok(())
}

/// Tokens whose log-probabilities are asked for by name.
fn check_named(sampling: &SamplingParams, limits: &Limits) -> Result<(), RequestError> {
    const PARAM: &str = "logprob_token_ids";
    let (ids, size) = (&sampling.logprob_token_ids, limits.vocab_size);
    if ids.len() > MAX_LOGPROB_TOKEN_IDS {
        return refuse(PARAM, format!("{PARAM} has {} ids; the limit is {MAX_LOGPROB_TOKEN_IDS}", ids.len()));
    }
    if !ids.is_empty() && sampling.logprobs.is_none() {
        return refuse(PARAM, format!("{PARAM} needs logprobs: ask for both"));
    }
    match ids.iter().find(|&&id| id as usize >= size) {
        Some(id) => refuse(PARAM, format!("{PARAM} has the id {id}; the vocabulary has 0..{size}")),
        None => Ok(()),
    }
}
