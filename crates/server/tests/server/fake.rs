//! An engine that answers from a script and remembers what it was asked.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use spark_api::{
    Engine, EngineInfo, EngineStats, Event, EventStream, FinishReason, Finished, Health, Limits,
    MediaGeometry, RankedToken, Request, RequestTimings, SubmitError, TokenEvent, TokenId, TokenLogprobs,
};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// `<|im_end|>` of the fixture tokenizer.
pub(crate) const EOS: TokenId = 258;
/// `<|image_pad|>` of the fixture tokenizer.
pub(crate) const IMAGE: TokenId = 268;
pub(crate) const MAX_MODEL_LEN: usize = 256;

/// What the engine does with a request.
pub(crate) enum Script {
    /// Generates these tokens and ends as `max_tokens` or the reason says.
    Tokens(Vec<TokenId>, FinishReason),
    /// Generates these tokens and then waits for ever.
    Hang(Vec<TokenId>),
    /// Drops the request without a word.
    Drop,
    /// Takes the request and drops it, since it has just come into this state.
    Stop(Health),
    /// Takes nothing.
    Refuse(SubmitError),
    /// Has a defect.
    Panic,
}

pub(crate) struct Fake {
    info: EngineInfo,
    script: Script,
    pub(crate) health: Mutex<Health>,
    pub(crate) requests: Mutex<Vec<Request>>,
    /// Senders of requests that hang: closed once their reader is gone.
    pub(crate) hanging: Mutex<Vec<UnboundedSender<Event>>>,
}

impl Fake {
    pub(crate) fn new(script: Script) -> Arc<Self> {
        Self::with_limits(script, |_| {})
    }

    /// `change` edits the limits.
    pub(crate) fn with_limits(script: Script, change: impl FnOnce(&mut Limits)) -> Arc<Self> {
        let mut limits = Limits {
            max_model_len: MAX_MODEL_LEN,
            vocab_size: 282,
            max_logprobs: 20,
            max_media_tokens: 64,
            media_geometry: Some(MediaGeometry { patch_size: 16, temporal_patch_size: 2, merge_size: 2 }),
            max_media: 2,
            image_token_id: Some(IMAGE),
            video_token_id: Some(269),
            eos_token_ids: vec![EOS, 256],
        };
        change(&mut limits);
        let info = EngineInfo { architecture: "fake".into(), limits, num_kv_tokens: 3200, block_size: 32 };
        Arc::new(Self {
            info,
            script,
            health: Mutex::new(Health::Ready),
            requests: Mutex::default(),
            hanging: Mutex::default(),
        })
    }

    /// Says `text` and ends as the model would.
    pub(crate) fn says(text: &str) -> Arc<Self> {
        let mut tokens = crate::ids(text);
        tokens.push(EOS);
        Self::new(Script::Tokens(tokens, FinishReason::Eos))
    }

    pub(crate) fn num_requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    /// Looks at the last request.
    pub(crate) fn last<T>(&self, look: impl FnOnce(&Request) -> T) -> T {
        look(self.requests.lock().unwrap().last().expect("no request arrived"))
    }
}

/// Made-up log-probabilities: -0.5 for the token, then one less per rank.
fn logprobs(id: TokenId, count: usize) -> TokenLogprobs {
    let at = |rank: usize| RankedToken { id: id + rank as u32 - 1, logprob: 0.5 - rank as f32, rank };
    TokenLogprobs { token: at(1), top: (1..=count).map(at).collect(), named: Vec::new() }
}

impl Engine for Fake {
    fn submit(&self, request: Request) -> Result<EventStream, SubmitError> {
        let (tokens, end) = match &self.script {
            Script::Tokens(tokens, reason) => (tokens.clone(), Some(reason.clone())),
            Script::Hang(tokens) => (tokens.clone(), None),
            Script::Drop => (Vec::new(), None),
            Script::Stop(health) => {
                *self.health.lock().unwrap() = health.clone();
                (Vec::new(), None)
            }
            Script::Refuse(error) => return Err(error.clone()),
            Script::Panic => panic!("a defect"),
        };
        let (sender, stream) = unbounded_channel();
        let send = |event| sender.send(event).unwrap();
        let sampling = &request.sampling;
        let prompt_logprobs = sampling.prompt_logprobs.map(|count| {
            let at = |(i, id): (usize, &TokenId)| (i > 0).then(|| logprobs(*id, count));
            request.prompt.iter().enumerate().map(at).collect()
        });
        if let Some(progress) = &request.progress {
            (4..request.prompt.len()).step_by(10).for_each(|num_tokens| progress.send(num_tokens).unwrap());
        }
        let (queued, prefill) = (Duration::from_millis(1), Duration::from_millis(2));
        send(Event::Prompt { num_cached_tokens: 4, queued, prefill, logprobs: prompt_logprobs });
        let cut = tokens.len() > sampling.max_tokens;
        let num_tokens = tokens.len().min(sampling.max_tokens);
        for token in &tokens[..num_tokens] {
            let logprobs = sampling.logprobs.map(|count| {
                let named = sampling.logprob_token_ids.iter().map(|&id| (id, -2.5)).collect();
                TokenLogprobs { named, ..logprobs(*token, count) }
            });
            send(Event::Token(TokenEvent { token: *token, logprobs }));
        }
        if let Some(reason) = end {
            let timings = RequestTimings {
                arrived: Instant::now(),
                queued: Duration::from_millis(1),
                prefill: Duration::from_millis(2),
                decode: Duration::from_millis(3),
                num_preemptions: 0,
            };
            let reason = if cut { FinishReason::Length } else { reason };
            send(Event::Finished(Finished { reason, num_output_tokens: num_tokens, timings }));
        }
        if matches!(self.script, Script::Hang(_)) {
            self.hanging.lock().unwrap().push(sender);
        }
        self.requests.lock().unwrap().push(request);
        Ok(stream)
    }

    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn stats(&self) -> EngineStats {
        EngineStats { num_running: 3, num_prompt_tokens: 40, kv_cache_usage: 0.25, ..EngineStats::default() }
    }

    fn health(&self) -> Health {
        self.health.lock().unwrap().clone()
    }
}
