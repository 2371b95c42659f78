//! The same tokens whatever happens around a request: alone, batched, chunked, after a prefix hit, preempted, at either
//! depth, with each KV type. On the CPU backend even the log-probabilities are equal to the last bit.

use futures_util::future::join_all;
use serde_json::{Value, json};
use spark_engine::{Dtype, EngineOptions, KvCacheDtype, SparkEngine, image_data_url};
use spark_testing::{Oracle, media_path, tolerance::BFLOAT16};

use crate::support;

const MODELS: [&str; 3] = ["moe_vl_bf16", "dense_vl_awq", "text_moe_fp8_block"];

/// What must not change: generated ids with their log-probabilities.
type Answer = (Vec<u32>, Value);

fn engine(model: &str, kv: KvCacheDtype, change: impl FnOnce(&mut EngineOptions)) -> SparkEngine {
    let builder = support::builder(model, Dtype::F32).engine(|options| {
        options.kv_cache_dtype = kv;
        change(options);
    });
    builder.build().unwrap()
}

/// Chats of different lengths: greedy ones from the oracle and sampled ones with a seed.
fn bodies(model: &str) -> Vec<Value> {
    bodies_of(model, 12)
}

/// The shortest answer has `shortest` tokens, each further one 4 more.
fn bodies_of(model: &str, shortest: usize) -> Vec<Value> {
    let oracle = Oracle::load(model).unwrap();
    let mut bodies = Vec::new();
    for (i, case) in oracle.cases.values().cycle().take(8).enumerate() {
        let mut body = support::chat_body(case, shortest + 4 * i);
        body["logprobs"] = true.into();
        body["top_logprobs"] = 2.into();
        if i >= oracle.cases.len() {
            body["temperature"] = json!(1.0);
            body["seed"] = json!(i);
            body["repetition_penalty"] = json!(1.1);
        }
        bodies.push(body);
    }
    bodies
}

async fn answer(engine: &SparkEngine, body: &Value) -> Answer {
    let answer = support::answer(engine, body.clone()).await;
    let choice = &answer["choices"][0];
    (support::ids(&choice["token_ids"]), choice["logprobs"]["content"].clone())
}

fn each_alone(engine: &SparkEngine, bodies: &[Value]) -> Vec<Answer> {
    support::block_on(async {
        let mut answers = Vec::new();
        for body in bodies {
            answers.push(answer(engine, body).await);
        }
        answers
    })
}

fn all_at_once(engine: &SparkEngine, bodies: &[Value]) -> Vec<Answer> {
    support::block_on(join_all(bodies.iter().map(|body| answer(engine, body))))
}

/// Alone, without cache, chunks or overlap: what everything else is compared with.
fn reference(model: &str, kv: KvCacheDtype, bodies: &[Value]) -> Vec<Answer> {
    let plain = engine(model, kv, |options| {
        options.enable_prefix_caching = false;
        options.async_scheduling = false;
    });
    let answers = each_alone(&plain, bodies);
    assert!(answers.iter().zip(bodies).all(|((ids, _), body)| ids.len() as u64 == body["max_tokens"]));
    answers
}

fn check(kv: KvCacheDtype) {
    for model in MODELS {
        let bodies = bodies(model);
        let expected = reference(model, kv, &bodies);
        for async_scheduling in [false, true] {
            let batched = engine(model, kv, |options| options.async_scheduling = async_scheduling);
            assert_eq!(all_at_once(&batched, &bodies), expected, "{model}: batch, async {async_scheduling}");
            for chunk in [1, 7, 64] {
                let chunked = engine(model, kv, |options| {
                    options.async_scheduling = async_scheduling;
                    options.long_prefill_token_threshold = Some(chunk);
                });
                let got = all_at_once(&chunked, &bodies);
                assert_eq!(got, expected, "{model}: chunks of {chunk}, async {async_scheduling}");
            }
        }
    }
}

#[test]
fn batches_and_chunks_do_not_change_answers() {
    check(KvCacheDtype::Auto);
}

#[test]
fn batches_and_chunks_do_not_change_answers_over_fp8_kv() {
    check(KvCacheDtype::Fp8);
}

#[test]
fn fp8_kv_is_close_to_full_precision() {
    let model = "dense_vl_bf16";
    let fp8 = engine(model, KvCacheDtype::Fp8, |_| {});
    let mut compared = 0;
    for case in Oracle::load(model).unwrap().cases.values() {
        let (ids, _) = support::block_on(answer(&fp8, &support::chat_body(case, 40)));
        // An 8-bit cache is about as coarse as bf16 activations: equal up to the first tie of that size.
        compared += case.check_greedy(&ids, BFLOAT16.logprob).unwrap();
    }
    assert!(compared > 5, "only {compared} ids were compared");
}

/// Chats that begin alike and differ after their image, in that order on one engine.
fn hit_inside_image(model: &str, kv: KvCacheDtype) {
    let oracle = Oracle::load(model).unwrap();
    let case = &oracle.cases["image0"];
    let num_image_tokens: u32 = case.grid_thw.iter().map(|[t, h, w]| t * h * w / 4).sum();
    let placeholder = support::placeholder(case);
    let first_row = case.prompt_ids.iter().position(|&id| id == placeholder).unwrap();
    let first = support::chat_body(case, 8);
    let mut second = support::chat_body(case, 8);
    let parts = second["messages"][0]["content"].as_array_mut().unwrap();
    parts.push(json!({"type": "text", "text": " Is it? Say more."}));
    // Differ right after the image, so that a block which ends behind it is not shared.
    let after = parts.iter().position(|part| part["type"] == "image_url").unwrap() + 1;
    parts.insert(after, json!({"type": "text", "text": "!"}));
    let expected = reference(model, kv, &[first.clone(), second.clone()]);
    let mut inside = 0;
    for block_size in 3..9 {
        let cached = engine(model, kv, |options| options.block_size = block_size);
        let answers = support::block_on(async {
            let first = answer(&cached, &first).await;
            let body = support::answer(&cached, second.clone()).await;
            let hit = body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() as usize;
            let choice = &body["choices"][0];
            inside += usize::from(hit > first_row && hit < first_row + num_image_tokens as usize);
            [first, (support::ids(&choice["token_ids"]), choice["logprobs"]["content"].clone())]
        });
        assert_eq!(answers[0].0, expected[0].0, "{model}: block size {block_size}, first");
        assert_eq!(answers[1].0, expected[1].0, "{model}: block size {block_size}, after the hit");
    }
    assert!(inside > 0, "{model}: no block size made the prefix end inside the image");
}

#[test]
fn a_prefix_hit_inside_an_image_does_not_change_answers() {
    hit_inside_image("moe_vl_bf16", KvCacheDtype::Auto);
    hit_inside_image("dense_vl_awq", KvCacheDtype::Fp8);
}

/// Pictures of equal size share a pass of the encoder when one step has several.
#[test]
fn pictures_are_encoded_together_as_they_are_alone() {
    let model = "moe_vl_bf16";
    let pictures = ["demo-before.png", "demo-after.png"];
    let url = |name: &str| image_data_url(&media_path(name)).unwrap();
    let mut parts: Vec<Value> =
        pictures.iter().map(|name| json!({"type": "image_url", "image_url": {"url": url(name)}})).collect();
    parts.push(json!({"type": "text", "text": "What changed?"}));
    let body = json!({"messages": [{"role": "user", "content": parts}], "max_tokens": 12, "temperature": 0,
                      "ignore_eos": true, "return_token_ids": true, "logprobs": true, "top_logprobs": 2});
    let answer_with = |tokens: usize| {
        let engine = engine(model, KvCacheDtype::Auto, |options| {
            options.max_encoder_tokens_per_step = tokens;
            options.max_num_batched_tokens = Some(4096);
        });
        let expected = each_alone(&engine, std::slice::from_ref(&body));
        (expected, engine.stats())
    };
    let ((together, few), (apart, many)) = (answer_with(16_384), answer_with(1));
    assert_eq!(together, apart);
    // A step encodes at least one picture, whatever its size: a step each.
    assert!(many.num_steps > few.num_steps, "{} and {} steps", many.num_steps, few.num_steps);
    assert_eq!(few.mm_cache_queries - few.mm_cache_hits, 2, "two different pictures");
}

#[test]
fn a_prefix_hit_does_not_change_answers() {
    for model in MODELS {
        let bodies = bodies(model);
        let expected = reference(model, KvCacheDtype::Auto, &bodies);
        let cached = engine(model, KvCacheDtype::Auto, |options| options.block_size = 4);
        for round in 0..2 {
            assert_eq!(all_at_once(&cached, &bodies), expected, "{model}: round {round}");
        }
        assert!(cached.stats().prefix_cache_hits > 0, "{model}: nothing was found in the cache");
    }
}

#[test]
fn preemption_does_not_change_answers() {
    for kv in [KvCacheDtype::Auto, KvCacheDtype::Fp8] {
        for model in MODELS {
            // Long answers, so that several are surely at work at once and outgrow the pool.
            let shortest = 150;
            let bodies = bodies_of(model, shortest);
            let expected = reference(model, kv, &bodies);
            let longest = longest_sequence(model, shortest);
            let tight = engine(model, kv, |options| {
                options.block_size = 4;
                // Room for one and a quarter of the longest sequences.
                options.max_model_len = Some(longest);
                options.kv_cache_memory_bytes = Some(kv_bytes(model, kv, longest + longest / 4));
            });
            assert_eq!(all_at_once(&tight, &bodies), expected, "{model}");
            assert!(tight.stats().num_preemptions > 0, "{model}: the pool was not tight enough to preempt");
        }
    }
}

fn longest_sequence(model: &str, shortest: usize) -> usize {
    let oracle = Oracle::load(model).unwrap();
    let prompt = oracle.cases.values().map(|case| case.prompt_ids.len()).max().unwrap();
    (prompt + shortest + 4 * 8).next_multiple_of(4)
}

fn kv_bytes(model: &str, kv: KvCacheDtype, num_tokens: usize) -> u64 {
    let files =
        spark_engine::ModelFiles::open(&spark_testing::model_dir(model).display().to_string(), None).unwrap();
    let text = &files.config.text;
    let per_vector = match kv {
        KvCacheDtype::Fp8 => text.head_dim + 2,
        _ => 4 * text.head_dim,
    };
    (2 * text.num_hidden_layers * text.num_key_value_heads * per_vector * num_tokens) as u64
}
