//! Many requests of all kinds at once over a model of a published size with random weights: no errors, and nothing grows. What
//! answers say means nothing here; `soak.rs` checks answers.

use std::{sync::Arc, time::Instant};

use spark_engine::{
    Device, Dtype, EngineBuilder, EngineHandle, LoadFormat, Quantization,
    api::{Engine, Event, FinishReason, GridThw, Health, MediaItem, Request, SamplingParams},
};
use spark_testing::Random;

use crate::{KERNEL_DIR_VARIABLE, alone, chats, soak};

const CONFIG: &str = "qwen3-vl-30b-a3b";
const WORKERS: u64 = 64;
const MAX_MODEL_LEN: usize = 16_384;

/// What a worker saw.
#[derive(Debug, Default)]
struct Seen {
    num_answers: usize,
    num_cancelled: usize,
    num_pictures: usize,
    num_prompt_tokens: usize,
    num_tokens: usize,
}

/// A request of one of the kinds: short, long, with pictures.
fn request(engine: &EngineHandle, random: &mut Random, seen: &mut Seen) -> Request {
    let limits = &engine.info().limits;
    let (mut prompt, mut media) = (Vec::new(), Vec::new());
    let text = |random: &mut Random, prompt: &mut Vec<u32>, len: usize| {
        // Special tokens are the last of the vocabulary.
        prompt.extend((0..len).map(|_| random.below(100_000) as u32));
    };
    match random.below(8) {
        0 => {
            let len = 1000 + random.below(MAX_MODEL_LEN - 1300);
            text(random, &mut prompt, len);
        }
        1 | 2 => {
            for _ in 0..1 + random.below(3) {
                let before = 1 + random.below(30);
                text(random, &mut prompt, before);
                media.push(picture(engine, random, &mut prompt));
            }
            text(random, &mut prompt, 10);
        }
        _ => {
            let len = 1 + random.below(300);
            text(random, &mut prompt, len);
        }
    }
    seen.num_pictures += media.len();
    seen.num_prompt_tokens += prompt.len();
    let sampling = SamplingParams {
        temperature: if random.below(3) == 0 { 0.0 } else { 0.9 },
        top_k: [0, 20][random.below(2)],
        top_p: [1.0, 0.8][random.below(2)],
        presence_penalty: [0.0, 1.5][random.below(2)],
        logprobs: (random.below(8) == 0).then_some(5),
        seed: random.below(1000) as u64,
        ignore_eos: true,
        ..SamplingParams::greedy(1 + random.below(200))
    };
    Request::new(prompt, media, sampling, limits).expect("the request keeps to the limits")
}

/// A picture of up to 768 x 768 pixels, of which some are seen more than once, and its placeholders at the end of `prompt`.
fn picture(engine: &EngineHandle, random: &mut Random, prompt: &mut Vec<u32>) -> MediaItem {
    let limits = &engine.info().limits;
    let geometry = limits.media_geometry.expect("a model with pictures");
    let id = limits.image_token_id.expect("a model with pictures");
    let side = |random: &mut Random| geometry.merge_size * (2 + random.below(23));
    // Equal numbers are equal pictures.
    let number = random.below(500);
    let mut own = Random::new(number as u64);
    let grid = GridThw { t: 1, h: side(&mut own), w: side(&mut own) };
    let num_bytes = grid.num_patches() * 3 * geometry.patch_size * geometry.patch_size;
    let (offset, num_tokens) =
        (prompt.len(), grid.num_patches() / (geometry.merge_size * geometry.merge_size));
    prompt.resize(offset + num_tokens, id);
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&(number as u64).to_le_bytes());
    MediaItem { hash, patches: Arc::from(own.bytes(num_bytes)), grid, offset, num_tokens }
}

/// Asks until `end`. Every eighth request is dropped before its answer is complete.
async fn work(engine: &EngineHandle, worker: u64, end: Instant) -> Seen {
    let (mut random, mut seen) = (Random::new(worker), Seen::default());
    while Instant::now() < end {
        let request = request(engine, &mut random, &mut seen);
        let (wanted, vocab_size) = (request.sampling.max_tokens, engine.info().limits.vocab_size);
        let cancel_after = (random.below(8) == 0).then(|| random.below(wanted));
        let mut events = engine.submit(request).expect("the engine takes requests");
        let mut num_tokens = 0;
        loop {
            if cancel_after == Some(num_tokens) {
                seen.num_cancelled += 1;
                break;
            }
            match events.recv().await.expect("an answer has an end") {
                Event::Prompt { .. } => {}
                Event::Token(token) => {
                    num_tokens += 1;
                    assert!((token.token as usize) < vocab_size, "token {}", token.token);
                    let top = token.logprobs.iter().flat_map(|logprobs| &logprobs.top);
                    assert!(top.clone().all(|ranked| ranked.logprob.is_finite()), "{:?}", token.logprobs);
                }
                Event::Finished(finished) => {
                    assert!(matches!(finished.reason, FinishReason::Length), "{:?}", finished.reason);
                    assert_eq!(num_tokens, wanted);
                    seen.num_answers += 1;
                    break;
                }
            }
        }
        seen.num_tokens += num_tokens;
    }
    seen
}

#[test]
fn a_soak_of_a_large_model_grows_nothing() {
    let _gpu = alone();
    let seconds = soak::seconds();
    let builder = EngineBuilder::new(CONFIG)
        .dtype(Dtype::Bf16)
        .device(Device::Cuda)
        .load_format(LoadFormat::Dummy)
        .quantization(Quantization::Awq)
        .engine(|options| {
            options.max_num_seqs = WORKERS as usize;
            options.max_model_len = Some(MAX_MODEL_LEN);
            // Less than all requests together may need: some are preempted.
            options.kv_cache_memory_bytes = Some(8 << 30);
        });
    let builder = match std::env::var_os(KERNEL_DIR_VARIABLE) {
        Some(folder) => builder.kernel_dir(folder),
        None => builder,
    };
    let engine = builder.start().unwrap().engine;
    let run = |seconds: u64| {
        let end = soak::after(seconds);
        chats::block_on(async {
            let workers = (0..WORKERS).map(|worker| work(&engine, worker + 1000 * seconds, end));
            let all = futures_util::future::join_all(workers).await;
            all.into_iter().fold(Seen::default(), |sum, seen| Seen {
                num_answers: sum.num_answers + seen.num_answers,
                num_cancelled: sum.num_cancelled + seen.num_cancelled,
                num_pictures: sum.num_pictures + seen.num_pictures,
                num_prompt_tokens: sum.num_prompt_tokens + seen.num_prompt_tokens,
                num_tokens: sum.num_tokens + seen.num_tokens,
            })
        })
    };
    // Caches fill up first.
    run(seconds.div_ceil(5));
    let before = soak::Memory::now();
    let seen = run(seconds);
    let after = soak::Memory::now();
    assert_eq!(engine.health(), Health::Ready);
    let stats = engine.stats();
    println!(
        "soak of {CONFIG}: {seconds} s, {seen:?}, {} steps, {} preemptions; {before} -> {after}",
        stats.num_steps, stats.num_preemptions
    );
    assert!(seen.num_answers > WORKERS as usize, "{seen:?}");
    assert!(seen.num_cancelled > 0 && seen.num_pictures > 0, "{seen:?}");
    before.assert_flat(&after);
    soak::wait_until_idle(|| engine.stats());
}
