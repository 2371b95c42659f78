//! An engine over the fake backend, at the size of a small fixture. No assertions.

pub(crate) mod fake;

use spark_api::{Engine, EngineStats, Event, FinishReason, Request, SamplingParams};
use spark_backend::{Backend, Memory};
use spark_models::{ModelConfig, Qwen3Vl};
use spark_runtime::{EngineHandle, EngineOptions, MemoryPlan, MemoryUse};

use fake::Fake;

/// A running engine over `backend`; `change` sets its sizes.
pub(crate) fn engine(backend: Fake, change: impl FnOnce(&mut EngineOptions)) -> EngineHandle {
    let config: serde_json::Value = spark_testing::read_json("models/text_dense_bf16_tied/config.json")
        .expect("the fixture is committed");
    let parsed = ModelConfig::parse(&config, None).expect("the fixture is right");
    let specs = parsed.specs(false);
    let mut params = spark_weights::dummy(&config, &specs, 0).expect("the fixture is small");
    let vocab_size = parsed.text.vocab_size;
    let mean_std = ([0.5; 3], [0.5; 3]);
    let model =
        Qwen3Vl::load(parsed, false, mean_std, &mut params, &backend).expect("every parameter is there");
    let mut options = EngineOptions { kv_cache_memory_bytes: Some(64 << 20), ..EngineOptions::default() };
    change(&mut options);
    let now = Memory { total: 1 << 30, available: 1 << 30, is_shared: false };
    let memory = MemoryUse { before: now, now };
    let plan = MemoryPlan::new(model.config(), &options, backend.dtype(), memory, |_| 0).expect("it fits");
    spark_runtime::start(backend, model, &options, &plan, vocab_size).expect("the options are right")
}

/// What became of a request.
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    pub(crate) reason: FinishReason,
}

/// Answers all prompts at once with `num_tokens` tokens each.
pub(crate) fn answers(engine: &EngineHandle, prompts: &[Vec<u32>], num_tokens: usize) -> Vec<Answer> {
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(num_tokens) };
    let request = |prompt: &Vec<u32>| {
        let request = Request::new(prompt.clone(), Vec::new(), sampling.clone(), &engine.info().limits);
        engine.submit(request.expect("the request is valid")).expect("the engine runs")
    };
    let streams: Vec<_> = prompts.iter().map(request).collect();
    let answer = |mut stream: spark_api::EventStream| {
        let mut tokens = Vec::new();
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
