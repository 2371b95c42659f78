//! `cargo bench -p spark-runtime`: what the engine itself costs a step, with a device that takes no time: planning, inputs,
//! both threads, events.
#![expect(clippy::print_stdout, reason = "a benchmark prints its results")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{sync::atomic::Ordering, time::Instant};

use support::{answers, engine, fake::Fake, stats};

const OUTPUT: usize = 512;
const ROUNDS: usize = 5;

fn main() {
    println!("medians of {ROUNDS} rounds of {OUTPUT} steps");
    println!("| sequences | context | us a step |\n| --: | --: | --: |");
    for num_seqs in [1, 16, 64, 128] {
        for prompt_len in [128, 3500] {
            let backend = Fake::new(2, false, None);
            let seen = backend.seen();
            let engine = engine(backend, |options| {
                options.max_num_seqs = num_seqs;
                options.max_num_batched_tokens = Some(8192);
                options.enable_prefix_caching = false;
                options.max_model_len = Some(prompt_len + OUTPUT);
                options.kv_cache_memory_bytes = Some(1 << 30);
            });
            let prompts = vec![vec![1; prompt_len]; num_seqs];
            let mut times: Vec<f64> = (0..ROUNDS)
                .map(|_| {
                    let (start, steps) = (Instant::now(), stats(&engine).num_steps);
                    let answers = answers(&engine, &prompts, OUTPUT);
                    let ended = answers.iter().map(|answer| (answer.tokens.len(), &answer.reason));
                    assert!(ended.into_iter().all(|(len, _)| len == OUTPUT), "every answer is whole");
                    1e6 * start.elapsed().as_secs_f64() / (stats(&engine).num_steps - steps) as f64
                })
                .collect();
            assert_eq!(seen.most_in_flight.load(Ordering::Relaxed), 2, "steps are launched ahead");
            times.sort_by(f64::total_cmp);
            println!("| {num_seqs} | {prompt_len} | {:.1} |", times[ROUNDS / 2]);
        }
    }
}
