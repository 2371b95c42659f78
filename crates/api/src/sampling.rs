//! How the next token is chosen. Names and meanings are vLLM's; validation happens in `request.rs`.

use crate::TokenId;

/// Most [`SamplingParams::logprob_token_ids`], as in vLLM: what a backend has room for beside a sampled token.
pub const MAX_LOGPROB_TOKEN_IDS: usize = 128;

/// Sampling parameters of one sequence.
///
/// Order of application: logit bias, minimum length, penalties, temperature, min-p, top-k, top-p, draw.
/// Reported log-probabilities are those of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches `top_p`, in (0, 1].
    pub top_p: f32,
    /// Drop tokens less likely than `min_p` times the most likely one, in [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of every token of prompt and output (CTRL paper); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token that occurs in the output.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token once per occurrence in the output.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Same seed, prompt and parameters: same tokens, whatever else is in the batch.
    pub seed: u64,
    /// Most tokens to generate, at least 1.
    pub max_tokens: usize,
    /// No end-of-sequence or stop token before this many tokens.
    pub min_tokens: usize,
    /// Tokens that end the sequence, besides the model's own end-of-sequence tokens.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Report the log-probability of each sampled token and of this many most likely ones.
    pub logprobs: Option<usize>,
    /// Report the log-probabilities of these tokens instead of those of the most likely ones: at most
    /// [`MAX_LOGPROB_TOKEN_IDS`], and only with `logprobs`, whose count then means nothing.
    pub logprob_token_ids: Vec<TokenId>,
    /// The same as `logprobs` for every prompt token but the first. Bypasses the prefix cache.
    pub prompt_logprobs: Option<usize>,
}

impl SamplingParams {
    /// Greedy decoding of `max_tokens` tokens with everything else neutral.
    pub fn greedy(max_tokens: usize) -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            logprob_token_ids: Vec::new(),
            prompt_logprobs: None,
        }
    }
}
