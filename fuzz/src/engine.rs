//! An engine without a model behind the server: it answers at once, and keeps to constraints.

use std::time::{Duration, Instant};

use spark_api::{
    Engine, EngineInfo, EngineStats, Event, EventStream, FinishReason, Finished, Health, Limits,
    MediaGeometry, RankedToken, Request, RequestTimings, SubmitError, TokenEvent, TokenId, TokenLogprobs,
};
use tokio::sync::mpsc::unbounded_channel;

/// Tokens of an answer at most.
const MAX_TOKENS: usize = 12;

/// See the top of the file.
pub struct Instantly {
    info: EngineInfo,
}

impl Instantly {
    /// With the limits of the fixture.
    pub fn new() -> Self {
        let limits = Limits {
            max_model_len: 1024,
            vocab_size: 282,
            max_logprobs: 20,
            max_media_tokens: 64,
            media_geometry: Some(MediaGeometry { patch_size: 16, temporal_patch_size: 2, merge_size: 2 }),
            max_media: 2,
            image_token_id: Some(268),
            video_token_id: Some(269),
            eos_token_ids: vec![258, 256],
        };
        Self { info: EngineInfo { architecture: "none".into(), limits, num_kv_tokens: 3200, block_size: 32 } }
    }

    /// The next token: the text `<tool_call>...` has tokens, so has everything that a mask leaves.
    fn next(&self, request: &mut Request, i: usize) -> Result<(TokenId, bool), FinishReason> {
        let wanted = (request.prompt.len() * 7 + i * 31) as u32 % self.info.limits.vocab_size as u32;
        let Some(constraint) = &mut request.constraint else { return Ok((wanted, false)) };
        let vocab_size = self.info.limits.vocab_size as u32;
        let mut mask = vec![u32::MAX; vocab_size.div_ceil(32) as usize];
        constraint.mask(&mut mask).map_err(FinishReason::ConstraintFailed)?;
        let is_set = |id: &u32| mask[*id as usize / 32] >> (id % 32) & 1 == 1;
        let token = (0..vocab_size).map(|step| (wanted + step) % vocab_size).find(is_set);
        let token = token.expect("a mask allows something");
        let is_complete = constraint.commit(token).map_err(FinishReason::ConstraintFailed)?;
        Ok((token, is_complete))
    }
}

impl Engine for Instantly {
    fn submit(&self, mut request: Request) -> Result<EventStream, SubmitError> {
        let (sender, stream) = unbounded_channel();
        // A reader that is gone does not listen.
        let send = |event| drop(sender.send(event));
        let ranked = |id: TokenId, rank: usize| RankedToken { id, logprob: -(rank as f32), rank };
        let logprobs = |id: TokenId, count: usize| TokenLogprobs {
            token: ranked(id, 1),
            top: (1..=count).map(|rank| ranked(id, rank)).collect(),
            named: Vec::new(),
        };
        let prompt_logprobs = request.sampling.prompt_logprobs.map(|count| {
            let at = |(i, id): (usize, &TokenId)| (i > 0).then(|| logprobs(*id, count));
            request.prompt.iter().enumerate().map(at).collect()
        });
        let (queued, prefill) = (Duration::ZERO, Duration::ZERO);
        send(Event::Prompt { num_cached_tokens: 0, queued, prefill, logprobs: prompt_logprobs });
        let max_tokens = request.sampling.max_tokens.min(MAX_TOKENS);
        let (mut num_output_tokens, mut reason) = (0, FinishReason::Length);
        while num_output_tokens < max_tokens {
            let (token, is_complete) = match self.next(&mut request, num_output_tokens) {
                Ok(next) => next,
                Err(failed) => {
                    reason = failed;
                    break;
                }
            };
            num_output_tokens += 1;
            let mut logprobs = request.sampling.logprobs.map(|count| logprobs(token, count));
            if let Some(logprobs) = &mut logprobs {
                logprobs.named = request.sampling.logprob_token_ids.iter().map(|&id| (id, -1.0)).collect();
            }
            send(Event::Token(TokenEvent { token, logprobs }));
            if is_complete {
                reason = FinishReason::ConstraintComplete;
                break;
            }
            if self.info.limits.eos_token_ids.contains(&token) {
                reason = FinishReason::Eos;
                break;
            }
        }
        let timings = RequestTimings {
            arrived: Instant::now(),
            queued: Duration::ZERO,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
            num_preemptions: 0,
        };
        send(Event::Finished(Finished { reason, num_output_tokens, timings }));
        Ok(stream)
    }

    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    fn health(&self) -> Health {
        Health::Ready
    }
}
