//! `cargo bench --bench engine`: decode and prefill speed and the time to a first token behind an image, on fixtures,
//! through the whole engine on the CPU backend. The fixtures are tiny, so these numbers show the engine's own cost a
//! step more than any arithmetic.
#![expect(clippy::print_stdout, reason = "a benchmark prints its results")]

#[path = "support/measure.rs"]
mod measure;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use measure::{head, median, row, sorted};
use serde_json::json;
use spark_engine::{
    Device, EngineBuilder, SparkEngine,
    api::{Event, Finished, SamplingParams},
};
use spark_testing::{Random, model_dir};

const MODELS: [&str; 3] = ["moe_vl_awq", "moe_vl_bf16", "dense_vl_nvfp4_ct"];
/// Repetitions; medians are shown.
const ROUNDS: usize = 7;
/// Lengths of a decoding request.
const PROMPT: usize = 32;
const OUTPUT: usize = 256;
/// Length of a prompt whose prefill is measured.
const LONG_PROMPT: usize = 512;
/// Side of an image in pixels: the largest that the fixtures' processor leaves as it is, 64 tokens.
const SIDE: usize = 256;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!("medians of {ROUNDS} rounds; prompts of {PROMPT} tokens, {OUTPUT} tokens generated, greedy");
    head(&["model", "depth", "requests", "decode tok/s", "per step us"]);
    for model in MODELS {
        for depth in [0, 1] {
            let engine = engine(model, depth)?;
            for requests in [1, 4, 16] {
                let speed = runtime.block_on(decode(&engine, requests))?;
                row(&[
                    model.into(),
                    depth.to_string(),
                    requests.to_string(),
                    format!("{speed:.0}"),
                    format!("{:.0}", 1e6 * requests as f64 / speed),
                ]);
            }
        }
    }
    head(&["model", "prefill 1 x 512 tok/s", "4 x 512 tok/s", "new image TTFT ms", "same image TTFT ms"]);
    for model in MODELS {
        let engine = engine(model, 1)?;
        let one = runtime.block_on(prefill(&engine, 1))?;
        let four = runtime.block_on(prefill(&engine, 4))?;
        let (fresh, cached) = runtime.block_on(image(&engine))?;
        row(&[
            model.into(),
            format!("{one:.0}"),
            format!("{four:.0}"),
            format!("{:.2}", 1e3 * fresh),
            format!("{:.2}", 1e3 * cached),
        ]);
    }
    Ok(())
}

/// An engine on all cores, without a prefix cache: every prompt is computed. `depth` is the number of steps planned
/// ahead.
fn engine(model: &str, depth: usize) -> Result<SparkEngine> {
    let builder = EngineBuilder::new(model_dir(model).display().to_string()).device(Device::Cpu);
    let engine = builder.engine(|options| {
        options.max_model_len = Some(1024);
        options.max_num_seqs = 16;
        options.kv_cache_memory_bytes = Some(64 << 20);
        options.enable_prefix_caching = false;
        options.async_scheduling = depth > 0;
    });
    Ok(engine.build()?)
}

/// Random prompts of bytes, so no special tokens.
fn prompts(requests: usize, len: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut random = Random::new(seed);
    (0..requests).map(|_| (0..len).map(|_| random.below(256) as u32).collect()).collect()
}

/// Submits all prompts at once and waits for the ends.
async fn run(engine: &SparkEngine, prompts: Vec<Vec<u32>>, output: usize) -> Result<Vec<Finished>> {
    let mut streams = Vec::new();
    for prompt in prompts {
        let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(output) };
        streams.push(engine.submit(engine.request(prompt, sampling)?)?);
    }
    let mut ends = Vec::new();
    for mut stream in streams {
        while let Some(event) = stream.recv().await {
            if let Event::Finished(finished) = event {
                ends.push(finished);
            }
        }
    }
    Ok(ends)
}

/// Generated tokens a second, first tokens and prefill left out.
async fn decode(engine: &SparkEngine, requests: usize) -> Result<f64> {
    let mut speeds = Vec::new();
    for round in 0..=ROUNDS {
        let ends = run(engine, prompts(requests, PROMPT, round as u64), OUTPUT).await?;
        let tokens: usize = ends.iter().map(|end| end.num_output_tokens - 1).sum();
        let longest = ends.iter().map(|end| end.timings.decode).max().unwrap_or(Duration::ZERO);
        // The first round warms up.
        if round > 0 {
            speeds.push(tokens as f64 / longest.as_secs_f64());
        }
    }
    Ok(median(&sorted(speeds)))
}

/// Prompt tokens a second, from arrival to the first token of the last request.
async fn prefill(engine: &SparkEngine, requests: usize) -> Result<f64> {
    let mut speeds = Vec::new();
    for round in 0..=ROUNDS {
        let prompts = prompts(requests, LONG_PROMPT, 100 + round as u64);
        let start = Instant::now();
        run(engine, prompts, 1).await?;
        if round > 0 {
            speeds.push((requests * LONG_PROMPT) as f64 / start.elapsed().as_secs_f64());
        }
    }
    Ok(median(&sorted(speeds)))
}

/// Seconds from a chat with one image to its first token: for images never seen, and for one seen before (the encoder
/// does not run again).
async fn image(engine: &SparkEngine) -> Result<(f64, f64)> {
    let (mut fresh, mut cached) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let url = format!("data:image/bmp;base64,{}", STANDARD.encode(bitmap(200 + round as u64)));
        for times in [&mut fresh, &mut cached] {
            let start = Instant::now();
            let body = json!({
                "messages": [{"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "What is this?"},
                ]}],
                "max_tokens": 1,
                "temperature": 0,
                "ignore_eos": true,
            });
            let mut generation = engine.chat(body).await?;
            generation.next().await.context("the engine answers")??;
            if round > 0 {
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    Ok((median(&sorted(fresh)), median(&sorted(cached))))
}

/// A BMP file of random pixels, 24 bits each: no decoding worth the name, so the time is the engine's.
fn bitmap(seed: u64) -> Vec<u8> {
    let pixels = Random::new(seed).bytes(3 * SIDE * SIDE);
    let mut file = b"BM".to_vec();
    let side = SIDE as u32;
    for word in [54 + pixels.len() as u32, 0, 54, 40, side, side, 1 | 24 << 16, 0, 0, 0, 0, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(pixels);
    file
}
