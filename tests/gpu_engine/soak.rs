//! Many requests of all kinds at once on a GPU for a while: every known answer is right, some go away early, and nothing grows.

use std::{
    fmt,
    time::{Duration, Instant},
};

use serde_json::json;
use spark_cuda::Driver;
use spark_engine::{
    Device, SparkEngine,
    api::{EngineStats, Health},
};
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

/// How long a soak is asked to be.
pub(crate) fn seconds() -> u64 {
    std::env::var(SECONDS_VARIABLE).ok().map_or(SECONDS, |text| text.parse().unwrap())
}

pub(crate) fn after(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

/// What is in use: free bytes of the device, bytes of this process in memory.
#[derive(Debug)]
pub(crate) struct Memory {
    device_free: u64,
    resident: u64,
}

impl Memory {
    pub(crate) fn now() -> Self {
        let device = Driver::open().unwrap().device(0).unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let resident = line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024;
        Self { device_free: device.memory().unwrap().available, resident }
    }

    pub(crate) fn assert_flat(&self, after: &Self) {
        assert_eq!(self.device_free, after.device_free, "device memory in use has changed");
        assert!(after.resident < self.resident + (64 << 20), "host memory grows: {self} to {after}");
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "resident {} MB, device free {} MB", self.resident >> 20, self.device_free >> 20)
    }
}

#[test]
fn a_soak_changes_no_answer_and_grows_nothing() {
    let _gpu = alone();
    let seconds = seconds();
    let engine = Model::demo("awq").engine(Device::Cuda, |options| {
        options.max_num_seqs = 64;
        options.max_num_batched_tokens = Some(512);
    });
    let engine = engine.unwrap();
    let run = |seconds: u64| {
        let end = after(seconds);
        chats::block_on(async {
            let workers = (0..WORKERS).map(|worker| work(&engine, worker, end));
            futures_util::future::join_all(workers).await.iter().sum::<usize>()
        })
    };
    // Caches fill up first.
    run(seconds.div_ceil(5));
    let before = Memory::now();
    let num_checked = run(seconds);
    let after = Memory::now();
    assert_eq!(engine.health(), Health::Ready);
    let stats = engine.stats();
    println!(
        "soak: {num_checked} answers checked in {seconds} s, {} steps, {} preemptions; {before} -> {after}",
        stats.num_steps, stats.num_preemptions
    );
    assert!(num_checked > WORKERS as usize, "only {num_checked} answers were checked");
    before.assert_flat(&after);
    wait_until_idle(|| engine.stats());
}

pub(crate) fn wait_until_idle(stats: impl Fn() -> EngineStats) {
    let deadline = after(10);
    let mut now = stats();
    while now.num_running + now.num_waiting > 0 || now.kv_cache_usage > 0.0 {
        assert!(Instant::now() < deadline, "requests are left: {now:?}");
        std::thread::yield_now();
        now = stats();
    }
}
