//! What the engine reports about one request, in order: tokens, then exactly one end.

use std::time::{Duration, Instant};

use crate::{ConstraintError, TokenId};

/// One message of the stream that belongs to a request.
#[derive(Debug, Clone)]
pub enum Event {
    /// The prompt is computed. Comes before the first token.
    Prompt {
        /// Prompt tokens whose KV was reused from the prefix cache.
        num_cached_tokens: usize,
        /// From arrival until first scheduled.
        queued: Duration,
        /// From first scheduled until now.
        prefill: Duration,
        /// One entry a prompt token (`None` for the first), if `prompt_logprobs` was asked for.
        logprobs: Option<Vec<Option<TokenLogprobs>>>,
    },
    /// A generated token. End-of-sequence and stop tokens are delivered too.
    Token(TokenEvent),
    /// The end: nothing follows.
    Finished(Finished),
}

/// A generated token.
#[derive(Debug, Clone)]
pub struct TokenEvent {
    /// The token.
    pub token: TokenId,
    /// Present if `logprobs` was asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Log-probabilities (natural logarithm, of the raw logits) at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token that was sampled, or that stands in the prompt.
    pub token: RankedToken,
    /// The most likely tokens, best first; none where tokens were named.
    pub top: Vec<RankedToken>,
    /// The tokens of `logprob_token_ids` and their log-probabilities, in their order. Nobody counts their ranks.
    pub named: Vec<(TokenId, f32)>,
}

/// A token with its log-probability and rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankedToken {
    /// The token.
    pub id: TokenId,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1 for the most likely token.
    pub rank: usize,
}

/// How a request ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Generated tokens, the ending one included.
    pub num_output_tokens: usize,
    /// Where the time went.
    pub timings: RequestTimings,
}

/// Why a request ended.
#[derive(Debug, Clone)]
pub enum FinishReason {
    /// An end-of-sequence token of the model.
    Eos,
    /// One of the request's `stop_token_ids`.
    StopToken(TokenId),
    /// `max_tokens` or the model's length was reached.
    Length,
    /// The constraint was complete.
    ConstraintComplete,
    /// The constraint failed; what was generated is not valid output.
    ConstraintFailed(ConstraintError),
    /// The client went away.
    Cancelled,
    /// The engine failed; the text says how.
    EngineFailed(String),
}

/// When things happened to a request.
#[derive(Debug, Clone, Copy)]
pub struct RequestTimings {
    /// Submitted.
    pub arrived: Instant,
    /// From arrival until first scheduled.
    pub queued: Duration,
    /// From first scheduled until the first token.
    pub prefill: Duration,
    /// From the first token until the end.
    pub decode: Duration,
    /// Times that it was preempted and recomputed.
    pub num_preemptions: usize,
}
