//! The engine as a library: two engines in one process, cancellation by drop, token-level requests.

use spark_engine::{
    Dtype, SparkEngine,
    api::{ConstraintError, Event, FinishReason, SamplingParams, TokenConstraint},
};

use crate::support;

#[test]
fn two_engines_live_side_by_side() {
    let first = support::builder("text_moe_bf16", Dtype::F32).build().unwrap();
    let second = support::builder("text_dense_bf16_tied", Dtype::F32).build().unwrap();
    support::block_on(async {
        for engine in [&first, &second] {
            let request = engine.request(vec![72, 105], SamplingParams::greedy(4)).unwrap();
            let mut events = engine.submit(request).unwrap();
            let mut num_tokens = 0;
            while let Some(event) = events.recv().await {
                num_tokens += usize::from(matches!(event, Event::Token(_)));
            }
            assert!((1..=4).contains(&num_tokens));
        }
    });
    drop(first);
    let request = second.request(vec![72], SamplingParams::greedy(1)).unwrap();
    assert!(second.submit(request).is_ok(), "the second engine does not need the first");
}

#[test]
fn dropping_a_stream_cancels_its_request() {
    let engine = support::builder("text_moe_bf16", Dtype::F32).build().unwrap();
    support::block_on(async {
        let endless = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(1000) };
        let request = engine.request(vec![72, 105], endless).unwrap();
        let mut events = engine.submit(request).unwrap();
        while !matches!(events.recv().await, Some(Event::Token(_))) {}
        drop(events);
        // A request that runs to its end after the drop: by then the engine has seen it.
        let request = engine.request(vec![72], SamplingParams::greedy(2)).unwrap();
        let mut events = engine.submit(request).unwrap();
        while events.recv().await.is_some() {}
        let mut stats = engine.stats();
        while stats.num_running + stats.num_waiting > 0 || stats.kv_cache_usage > 0.0 {
            tokio::task::yield_now().await;
            stats = engine.stats();
        }
        assert!(stats.num_generation_tokens < 1000, "the cancelled request ran on: {stats:?}");
    });
}

#[test]
fn a_drained_engine_refuses_and_ends() {
    let engine = support::builder("text_moe_bf16", Dtype::F32).build().unwrap();
    support::block_on(async {
        let request = engine.request(vec![72], SamplingParams::greedy(50)).unwrap();
        let mut events = engine.submit(request).unwrap();
        engine.drain();
        let late = engine.request(vec![72], SamplingParams::greedy(1)).unwrap();
        assert!(engine.submit(late).is_err());
        let mut finished = false;
        while let Some(event) = events.recv().await {
            finished |= matches!(event, Event::Finished(_));
        }
        assert!(finished, "what was running ends properly");
    });
    engine.join();
}

/// Allows one fixed token after the other, then says that it is complete.
struct Fixed {
    tokens: Vec<u32>,
    next: usize,
}

impl TokenConstraint for Fixed {
    fn mask(&mut self, allowed: &mut [u32]) -> Result<(), ConstraintError> {
        let token =
            *self.tokens.get(self.next).ok_or_else(|| ConstraintError("nothing may follow".into()))?;
        allowed.fill(0);
        allowed[token as usize / 32] = 1 << (token % 32);
        Ok(())
    }

    fn commit(&mut self, token: u32) -> Result<bool, ConstraintError> {
        if self.tokens[self.next] != token {
            return Err(ConstraintError(format!("token {token} was not allowed")));
        }
        self.next += 1;
        Ok(self.next == self.tokens.len())
    }
}

/// Tokens and end of a request with `constraint`.
async fn constrained(engine: &SparkEngine, constraint: Fixed, max_tokens: usize) -> (Vec<u32>, FinishReason) {
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(max_tokens) };
    let mut request = engine.request(vec![72, 105], sampling).unwrap();
    request.constraint = Some(Box::new(constraint));
    let mut events = engine.submit(request).unwrap();
    let mut tokens = Vec::new();
    loop {
        match events.recv().await.expect("a stream ends with Finished") {
            Event::Prompt { .. } => {}
            Event::Token(event) => tokens.push(event.token),
            Event::Finished(finished) => return (tokens, finished.reason),
        }
    }
}

#[test]
fn a_constraint_decides_every_token_and_the_end() {
    let engine = support::builder("text_moe_bf16", Dtype::F32).build().unwrap();
    support::block_on(async {
        let tokens = vec![7, 200, 33, 33, 5];
        let free = engine.request(vec![72, 105], SamplingParams::greedy(30)).unwrap();
        let mut beside = engine.submit(free).unwrap();
        let (got, reason) = constrained(&engine, Fixed { tokens: tokens.clone(), next: 0 }, 30).await;
        assert_eq!(got, tokens);
        assert!(matches!(reason, FinishReason::ConstraintComplete), "{reason:?}");
        let (got, reason) = constrained(&engine, Fixed { tokens: tokens.clone(), next: 0 }, 2).await;
        assert_eq!(got, tokens[..2]);
        assert!(matches!(reason, FinishReason::Length), "{reason:?}");
        while beside.recv().await.is_some() {}
    });
}

#[test]
fn a_constraint_that_fails_ends_its_request_alone() {
    let engine = support::builder("text_moe_bf16", Dtype::F32).build().unwrap();
    support::block_on(async {
        let (got, reason) = constrained(&engine, Fixed { tokens: Vec::new(), next: 0 }, 5).await;
        assert!(got.is_empty() && matches!(reason, FinishReason::ConstraintFailed(_)), "{got:?} {reason:?}");
        let (got, _) = constrained(&engine, Fixed { tokens: vec![9], next: 0 }, 5).await;
        assert_eq!(got, [9], "the engine goes on");
    });
}

#[test]
fn a_published_shape_needs_no_files() {
    let files = spark_engine::ModelFiles::open_config("Qwen3-VL-30B-A3B", None, None).unwrap();
    assert!(files.has_lm_head && files.config.text.num_hidden_layers == 48);
    let error = spark_engine::ModelFiles::open_config("qwen3-vl-31b", None, None).err().unwrap().to_string();
    assert!(error.contains("qwen3-vl-31b"), "{error}");
}
