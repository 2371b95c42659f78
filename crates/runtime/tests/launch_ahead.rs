//! The engine over a backend that takes two steps at once: the right tokens, whatever is in flight.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]

mod support;

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use spark_api::{Engine, FinishReason, Health};
use spark_runtime::{Failure, FailureHook, FailureReport};
use spark_testing::Random;
use support::{
    answers, engine,
    fake::{Fake, next_token},
    stats,
};

/// Prompts of different lengths; some begin alike.
fn prompts(count: usize, vocab_size: usize) -> Vec<Vec<u32>> {
    let mut random = Random::new(7);
    let common: Vec<u32> = (0..40).map(|_| random.below(vocab_size) as u32).collect();
    let prompt = |i: usize| {
        let own = (0..3 + 5 * i).map(|_| random.below(vocab_size) as u32).collect::<Vec<_>>();
        if i.is_multiple_of(3) { [common.clone(), own].concat() } else { own }
    };
    (0..count).map(prompt).collect()
}

/// What the fake backend's tokens must be.
fn expected(prompt: &[u32], num_tokens: usize, vocab_size: u32) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..num_tokens {
        tokens.push(next_token(&tokens, vocab_size));
    }
    tokens.split_off(prompt.len())
}

#[test]
fn tokens_are_right_with_any_number_of_steps_in_flight() {
    for (max_in_flight, async_scheduling, most) in [(1, false, 1), (1, true, 1), (2, false, 1), (2, true, 2)]
    {
        let backend = Fake::new(max_in_flight, true, None);
        let seen = backend.seen();
        let engine = engine(backend, |options| {
            options.async_scheduling = async_scheduling;
            options.max_num_seqs = 6;
            options.max_num_batched_tokens = Some(48);
            options.block_size = 8;
            options.max_model_len = Some(512);
        });
        let vocab_size = engine.info().limits.vocab_size;
        let prompts = prompts(15, vocab_size);
        for _ in 0..2 {
            for (prompt, answer) in prompts.iter().zip(answers(&engine, &prompts, 30)) {
                assert_eq!(
                    answer.tokens,
                    expected(prompt, 30, vocab_size as u32),
                    "{max_in_flight}, {async_scheduling}"
                );
            }
        }
        assert!(stats(&engine).prefix_cache_hits > 0, "the second round finds the prompts");
        assert_eq!(seen.most_in_flight.load(Ordering::Relaxed), most, "{max_in_flight}, {async_scheduling}");
        assert_eq!(seen.num_prepared.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn tokens_are_right_when_sequences_are_preempted() {
    let engine = engine(Fake::new(2, true, None), |options| {
        options.block_size = 8;
        options.max_model_len = Some(160);
        // 20 blocks: one sequence of the longest kind, and not two.
        options.kv_cache_memory_bytes = Some(24 * 8 * bytes_per_token());
    });
    let vocab_size = engine.info().limits.vocab_size;
    let prompts = prompts(6, vocab_size);
    for (prompt, answer) in prompts.iter().zip(answers(&engine, &prompts, 90)) {
        assert_eq!(answer.tokens, expected(prompt, 90, vocab_size as u32));
    }
    assert!(stats(&engine).num_preemptions > 0, "the pool was not tight enough to preempt");
}

/// Of the fixture, with a bf16 cache.
fn bytes_per_token() -> u64 {
    let config: serde_json::Value =
        spark_testing::read_json("models/text_dense_bf16_tied/config.json").unwrap();
    let number = |name: &str| config[name].as_u64().unwrap();
    2 * number("num_hidden_layers") * number("num_key_value_heads") * number("head_dim") * 2
}

#[test]
fn a_step_that_fails_ends_the_engine_with_its_words() {
    for async_scheduling in [false, true] {
        let backend = Fake::new(2, true, Some(9));
        let engine = engine(backend, |options| options.async_scheduling = async_scheduling);
        let prompts = prompts(3, engine.info().limits.vocab_size);
        for answer in answers(&engine, &prompts, 50) {
            let FinishReason::EngineFailed(message) = &answer.reason else { panic!("{:?}", answer.reason) };
            assert!(message.contains("as told"), "{message}");
            assert!(answer.tokens.len() < 50);
        }
        assert!(matches!(engine.health(), Health::Failed(message) if message.contains("as told")));
    }
}

#[test]
fn a_step_that_hangs_ends_the_engine() {
    let backend = Fake::new(1, true, None);
    let seen = backend.seen();
    let engine = engine(backend, |options| options.step_timeout = Some(Duration::from_secs(1)));
    let prompts = prompts(2, engine.info().limits.vocab_size);
    assert!(answers(&engine, &prompts, 5).iter().all(|answer| answer.tokens.len() == 5));
    seen.hangs.store(true, Ordering::Relaxed);
    for answer in answers(&engine, &prompts, 5) {
        let FinishReason::EngineFailed(message) = &answer.reason else { panic!("{:?}", answer.reason) };
        assert!(message.contains("--step-timeout") && message.contains("1 s"), "{message}");
    }
    engine.join();
    assert!(matches!(engine.failure(), Some(Failure::Device(_))), "only a new process can go on");
    seen.hangs.store(false, Ordering::Relaxed);
}

#[test]
fn a_failure_is_reported_with_the_last_steps_and_the_requests() {
    let kept = Arc::new(Mutex::new(Vec::<FailureReport>::new()));
    let reports = kept.clone();
    let engine = engine(Fake::new(2, true, Some(9)), |options| {
        options.max_num_seqs = 2;
        options.on_failure = FailureHook::new(move |report| kept.lock().unwrap().push(report.clone()));
    });
    let prompts = prompts(3, engine.info().limits.vocab_size);
    for answer in answers(&engine, &prompts, 30) {
        assert!(matches!(answer.reason, FinishReason::EngineFailed(_)), "{:?}", answer.reason);
    }
    engine.join();
    let reports = reports.lock().unwrap();
    let [report] = &reports[..] else { panic!("{} reports", reports.len()) };
    assert_eq!((Some(&report.failure), report.may_recover), (engine.failure().as_ref(), false));
    let steps = &report.steps;
    assert!(steps.len() >= 9 && steps[0].num_prefills > 0 && steps[0].took.is_some(), "{steps:?}");
    assert!(steps.last().unwrap().took.is_none(), "the step that failed has no result: {steps:?}");
    assert!(steps.windows(2).all(|pair| pair[0].step < pair[1].step), "{steps:?}");
    let sequences = &report.sequences;
    assert_eq!(sequences.iter().filter(|sequence| sequence.is_scheduled).count(), 2, "{sequences:?}");
    assert_eq!(sequences.len(), 3, "{sequences:?}");
    assert!(sequences[0].num_output_tokens > 0 && sequences[2].num_output_tokens == 0, "{sequences:?}");
    assert_eq!(
        report.stats.step_times.counts.iter().sum::<u64>(),
        steps.iter().filter(|step| step.took.is_some()).count() as u64
    );
}
