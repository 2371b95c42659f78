//! The engine as a library: two engines in one process, cancellation by drop, token-level requests.

use spark_engine::{
    Dtype,
    api::{Event, SamplingParams},
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
