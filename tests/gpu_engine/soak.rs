//! Many requests of all kinds at once on a GPU for a while: every known answer is right, some go away early, and nothing grows.

use std::time::{Duration, Instant};

use serde_json::json;
use spark_cuda::Driver;
use spark_engine::{Device, SparkEngine, api::Health};
use spark_testing::Random;

use crate::{Model, alone, chats, demo};

/// Names how long to run, in seconds.
const SECONDS_VARIABLE: &str = "SPARK_SOAK_SECONDS";
const SECONDS: u64 = 15;
const WORKERS: u64 = 64;

/// Asks until `end`: questions with known answers, long random texts, and both cancelled halfway. Returns how many
/// answers were checked.
async fn work(engine: &SparkEngine, worker: u64, end: Instant) -> usize {
    let (questions, mut random) = (demo::questions(), Random::new(worker));
    let mut num_checked = 0;
    while Instant::now() < end {
        let (body, expected) = &questions[random.below(questions.len())];
        match random.below(4) {
            0 => {
                let mut generation = engine.chat(body.clone()).await.expect("the question is valid");
                let _ = generation.next().await;
                // Dropped: cancelled after the first piece.
            }
            1 => {
                let len = 20 + random.below(600);
                let text: Vec<String> = (0..len / 4).map(|_| random.below(100).to_string()).collect();
                let body = json!({"prompt": text.join(" "), "max_tokens": 1 + random.below(60), "temperature": 1.0,
                                  "seed": random.below(1000), "ignore_eos": true});
                let generation = engine.completion(body).await.expect("the prompt is valid");
                generation.into_response().await.expect("the engine runs");
            }
            _ => {
                let answer = chats::answer(engine, body.clone()).await;
                let said = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default();
                assert_eq!(said, *expected, "among {WORKERS} requests: {}", body["messages"]);
                num_checked += 1;
            }
        }
    }
    num_checked
}

/// Bytes of this process in memory.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_soak_changes_no_answer_and_grows_nothing() {
    let _gpu = alone();
    let seconds = std::env::var(SECONDS_VARIABLE).ok().map_or(SECONDS, |text| text.parse().unwrap());
    let device = Driver::open().unwrap().device(0).unwrap();
    let engine = Model::demo("awq").engine(Device::Cuda, |options| {
        options.max_num_seqs = 64;
        options.max_num_batched_tokens = Some(512);
    });
    let engine = engine.unwrap();
    let run = |seconds: u64| {
        let end = Instant::now() + Duration::from_secs(seconds);
        chats::block_on(async {
            let workers = (0..WORKERS).map(|worker| work(&engine, worker, end));
            futures_util::future::join_all(workers).await.iter().sum::<usize>()
        })
    };
    // Caches fill up first.
    run(seconds.div_ceil(5));
    let before = (device.memory().unwrap().available, resident_bytes());
    let num_checked = run(seconds);
    let after = (device.memory().unwrap().available, resident_bytes());
    assert_eq!(engine.health(), Health::Ready);
    let stats = engine.stats();
    println!(
        "soak: {num_checked} answers checked in {seconds} s, {} steps, {} preemptions; resident {} -> {} MB, device free \
         {} -> {} MB",
        stats.num_steps,
        stats.num_preemptions,
        before.1 >> 20,
        after.1 >> 20,
        before.0 >> 20,
        after.0 >> 20
    );
    assert!(num_checked > WORKERS as usize, "only {num_checked} answers were checked");
    assert_eq!(before.0, after.0, "device memory in use has changed");
    assert!(after.1 < before.1 + (64 << 20), "host memory grows: {} to {} bytes", before.1, after.1);
    wait_until_idle(&engine);
}

fn wait_until_idle(engine: &SparkEngine) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut stats = engine.stats();
    while stats.num_running + stats.num_waiting > 0 || stats.kv_cache_usage > 0.0 {
        assert!(Instant::now() < deadline, "requests are left: {stats:?}");
        std::thread::yield_now();
        stats = engine.stats();
    }
}
