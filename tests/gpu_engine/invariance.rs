//! On a GPU the answers are the same whatever happens around a request, up to near ties (sums are made in another order for
//! another number of rows), and to the last bit where steps have equal shapes: graphs or none, a second hit of the cache.

use futures_util::future::join_all;
use serde_json::{Value, json};
use spark_engine::{Device, EngineOptions, KvCacheDtype, SparkEngine};

use crate::{Answer, Comparison, Model, alone, ask, chats, questions::IN_WORDS};

const FIXTURES: [&str; 4] =
    ["text_moe_bf16", "text_moe_fp8_block", "text_moe_nvfp4_ct", "text_dense_bf16_tied"];
const CACHES: [KvCacheDtype; 2] = [KvCacheDtype::Auto, KvCacheDtype::Fp8];

/// Text models, which are inside every envelope, and the demo model, which sees and is sure of what it says.
fn models() -> Vec<Model> {
    FIXTURES.map(Model::fixture).into_iter().chain([Model::demo("awq")]).collect()
}

/// Eight greedy chats; the shortest answer has `shortest` tokens, each further one 4 more.
fn bodies(model: &Model, shortest: usize) -> Vec<Value> {
    let bodies = model.bodies(shortest).into_iter().map(|(_, body)| body);
    let bodies: Vec<Value> = bodies.collect();
    let eight = bodies.iter().cycle().take(8).cloned().enumerate();
    eight
        .map(|(i, mut body)| {
            body["max_tokens"] = json!(shortest + 4 * i);
            body
        })
        .collect()
}

fn engine(model: &Model, kv: KvCacheDtype, change: impl FnOnce(&mut EngineOptions)) -> SparkEngine {
    let engine = model.engine(Device::Cuda, |options| {
        options.kv_cache_dtype = kv;
        change(options);
    });
    engine.unwrap()
}

fn each_alone(engine: &SparkEngine, bodies: &[Value]) -> Vec<Answer> {
    bodies.iter().map(|body| ask(engine, body)).collect()
}

fn all_at_once(engine: &SparkEngine, bodies: &[Value]) -> Vec<Answer> {
    let answers = bodies.iter().map(|body| chats::answer(engine, body.clone()));
    chats::block_on(join_all(answers)).iter().map(Answer::of).collect()
}

/// Alone, without cache, chunks or overlap: what everything else is compared with.
fn reference(model: &Model, kv: KvCacheDtype, bodies: &[Value]) -> Vec<Answer> {
    let plain = engine(model, kv, |options| {
        options.enable_prefix_caching = false;
        options.async_scheduling = false;
    });
    each_alone(&plain, bodies)
}

/// Adds the comparison of all answers of a run.
fn add(to: &mut Comparison, name: &str, model: &Model, expected: &[Answer], got: &[Answer]) {
    for (i, (expected, got)) in expected.iter().zip(got).enumerate() {
        assert_eq!(expected.ids.len(), got.ids.len(), "{name}: chat {i}");
        to.add(&format!("{name}, chat {i}"), &model.said(expected), &model.said(got), model.tolerance());
    }
}

#[test]
fn batches_and_chunks_do_not_change_answers() {
    let _gpu = alone();
    let mut comparison = Comparison::default();
    for model in models() {
        for kv in CACHES {
            let name = format!("{}, cache {kv:?}", model.name);
            let bodies = bodies(&model, 12);
            let expected = reference(&model, kv, &bodies);
            let overlapped =
                each_alone(&engine(&model, kv, |options| options.enable_prefix_caching = false), &bodies);
            assert_eq!(overlapped, expected, "{name}: steps of equal shapes, launched ahead");
            let got = all_at_once(&engine(&model, kv, |_| {}), &bodies);
            add(&mut comparison, &format!("{name}, batch"), &model, &expected, &got);
            for chunk in [7, 64] {
                let chunked =
                    engine(&model, kv, |options| options.long_prefill_token_threshold = Some(chunk));
                let got = all_at_once(&chunked, &bodies);
                add(&mut comparison, &format!("{name}, chunks of {chunk}"), &model, &expected, &got);
            }
        }
    }
    comparison.finish("batches and chunks");
}

#[test]
fn graphs_do_not_change_a_bit() {
    let _gpu = alone();
    for model in models() {
        for kv in CACHES {
            let mut bodies = bodies(&model, 12);
            // Sampled ones too: equal logits and equal seeds give equal tokens.
            for (i, body) in bodies.iter_mut().enumerate().skip(4) {
                body["temperature"] = json!(1.0);
                body["seed"] = json!(i);
                body["repetition_penalty"] = json!(1.1);
            }
            let with_graphs = engine(&model, kv, |_| {});
            let eager = model.builder(Device::Cuda).enforce_eager(true);
            let eager = eager.engine(|options| options.kv_cache_dtype = kv).build().unwrap();
            let expected = each_alone(&with_graphs, &bodies);
            assert_eq!(each_alone(&eager, &bodies), expected, "{}, cache {kv:?}", model.name);
        }
    }
}

#[test]
fn a_prefix_hit_does_not_change_answers() {
    let _gpu = alone();
    let mut comparison = Comparison::default();
    for model in models() {
        for kv in CACHES {
            let name = format!("{}, cache {kv:?}", model.name);
            let mut bodies = bodies(&model, 12);
            // Long enough for whole blocks of 32 tokens.
            let turns = IN_WORDS[..4].iter().flat_map(|(question, answer)| {
                [
                    json!({"role": "user", "content": question}),
                    json!({"role": "assistant", "content": answer}),
                ]
            });
            let turns: Vec<Value> = turns.collect();
            for body in &mut bodies {
                let messages = body["messages"].as_array_mut().unwrap();
                let system = usize::from(messages[0]["role"] == "system");
                messages.splice(system..system, turns.iter().cloned());
            }
            let expected = reference(&model, kv, &bodies);
            let cached = engine(&model, kv, |_| {});
            let rounds = [0, 1, 2].map(|_| each_alone(&cached, &bodies));
            assert!(cached.stats().prefix_cache_hits > 0, "{name}: nothing was found in the cache");
            assert_eq!(rounds[1], rounds[2], "{name}: two hits are steps of equal shapes");
            for (i, round) in rounds.iter().enumerate() {
                add(&mut comparison, &format!("{name}, round {i}"), &model, &expected, round);
            }
        }
    }
    comparison.finish("prefix hits");
}

#[test]
fn preemption_does_not_change_answers() {
    let _gpu = alone();
    let mut comparison = Comparison::default();
    for model in models() {
        for kv in CACHES {
            let name = format!("{}, cache {kv:?}", model.name);
            // Long answers, so that several are surely at work at once and outgrow the pool.
            let bodies = bodies(&model, 150);
            let expected = reference(&model, kv, &bodies);
            let tight = engine(&model, kv, |options| {
                options.max_model_len = Some(MAX_LEN);
                options.kv_cache_memory_bytes = Some(kv_bytes(&model, kv, MAX_LEN + MAX_LEN / 4));
            });
            let got = all_at_once(&tight, &bodies);
            assert!(tight.stats().num_preemptions > 0, "{name}: the pool was not tight enough to preempt");
            add(&mut comparison, &name, &model, &expected, &got);
        }
    }
    comparison.finish("preemption");
}

/// Longer than the longest of the preempted chats, pictures included.
const MAX_LEN: usize = 512;

fn kv_bytes(model: &Model, kv: KvCacheDtype, num_tokens: usize) -> u64 {
    let files = spark_engine::ModelFiles::open(&model.folder.display().to_string(), None).unwrap();
    let text = &files.config.text;
    let per_vector = if kv == KvCacheDtype::Fp8 { text.head_dim + 2 } else { 2 * text.head_dim };
    (2 * text.num_hidden_layers * text.num_key_value_heads * per_vector * num_tokens) as u64
}
