//! An engine over the fake backend, at the size of a small fixture. No assertions.

pub(crate) mod fake;

use spark_api::{Engine, EngineStats, Event, FinishReason, Request, SamplingParams, SubmitError};
use spark_backend::{Backend, Memory, Rank};
use spark_models::{ModelConfig, Qwen3Vl};
use spark_runtime::{EngineHandle, EngineOptions, MemoryPlan, MemoryUse, Running};

use fake::Fake;

/// Everything that an engine, or a rank, is started with.
pub(crate) struct Parts {
    pub(crate) backend: Fake,
    pub(crate) model: Qwen3Vl<Fake>,
    pub(crate) options: EngineOptions,
    pub(crate) plan: MemoryPlan,
    pub(crate) vocab_size: usize,
}

/// Parts over `backend` with the configuration of `fixture`; `change` sets sizes.
pub(crate) fn parts(backend: Fake, fixture: &str, change: impl FnOnce(&mut EngineOptions)) -> Parts {
    let config: serde_json::Value =
        spark_testing::read_json(&format!("models/{fixture}/config.json")).expect("the fixture is committed");
    let parsed = ModelConfig::parse(&config, None).expect("the fixture is right");
    let has_lm_head = !parsed.tie_word_embeddings;
    let specs = parsed.specs(has_lm_head);
    let mut params = spark_weights::dummy(&config, &specs, 0, Rank::SINGLE).expect("the fixture is small");
    let vocab_size = parsed.text.vocab_size;
    let mean_std = ([0.5; 3], [0.5; 3]);
    let model = Qwen3Vl::load(parsed, has_lm_head, mean_std, &mut params, &backend)
        .expect("every parameter is there");
    let mut options = EngineOptions { kv_cache_memory_bytes: Some(64 << 20), ..EngineOptions::default() };
    change(&mut options);
    let now = Memory { total: 1 << 30, available: 1 << 30, is_shared: false };
    let memory = MemoryUse { before: now, now };
    let (dtype, rank) = (backend.dtype(), backend.rank());
    let plan = MemoryPlan::new(model.config(), &options, dtype, memory, rank, |_| 0).expect("it fits");
    Parts { backend, model, options, plan, vocab_size }
}

/// A running engine over `backend`; `change` sets its sizes.
pub(crate) fn engine(backend: Fake, change: impl FnOnce(&mut EngineOptions)) -> EngineHandle {
    let Parts { backend, model, options, plan, vocab_size } = parts(backend, "text_dense_bf16_tied", change);
    let running =
        Running::new(backend, model, &options, &plan, vocab_size, None).expect("the options are right");
    EngineHandle::start(running, &options, None).expect("the options are right")
}

/// What became of a request.
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    pub(crate) reason: FinishReason,
}

/// Answers all prompts at once with `num_tokens` tokens each. An engine that fails meanwhile is the reason of those that it does
/// not take.
pub(crate) fn answers(engine: &EngineHandle, prompts: &[Vec<u32>], num_tokens: usize) -> Vec<Answer> {
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(num_tokens) };
    let request = |prompt: &Vec<u32>| {
        let request = Request::new(prompt.clone(), Vec::new(), sampling.clone(), &engine.info().limits);
        engine.submit(request.expect("the request is valid"))
    };
    let streams: Vec<_> = prompts.iter().map(request).collect();
    let answer = |stream: Result<spark_api::EventStream, SubmitError>| {
        let mut tokens = Vec::new();
        let mut stream = match stream {
            Ok(stream) => stream,
            Err(error) => return Answer { tokens, reason: FinishReason::EngineFailed(error.to_string()) },
        };
        loop {
            match stream.blocking_recv().expect("a stream ends with its finish") {
                Event::Prompt { .. } => {}
                Event::Token(event) => tokens.push(event.token),
                Event::Finished(finished) => return Answer { tokens, reason: finished.reason },
            }
        }
    };
    streams.into_iter().map(answer).collect()
}

/// Counters of the engine.
pub(crate) fn stats(engine: &EngineHandle) -> EngineStats {
    engine.stats()
}
