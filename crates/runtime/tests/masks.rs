//! Constrained sequences in the engine: their masks are computed beside the steps, and a late mask stops nobody else.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]

#[allow(dead_code, reason = "this program needs a part of what the tests share")]
mod support;

use std::{
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use spark_api::{
    ConstraintError, Engine, Event, EventStream, FinishReason, Request, SamplingParams, TokenConstraint,
};
use spark_runtime::{EngineHandle, EngineOptions};
use support::{
    Answer, answers, engine,
    fake::{Fake, first_allowed, next_token},
    stats,
};

/// What a mask waits for.
enum Gate {
    Open,
    /// A message for each mask.
    Messages(Receiver<()>),
    /// So long, as if there were so much to compute.
    Lasting(Duration, Receiver<()>),
}

/// Each token leaves another remainder than the one before it; the output is complete with the last token.
struct Remainders {
    last: u32,
    left: usize,
    gate: Gate,
    panics: bool,
}

/// The rule of [`Remainders`] as a mask.
fn rule(last: u32, num_words: usize) -> Vec<u32> {
    let word = |i: usize| (0..32).filter(move |bit| (i as u32 * 32 + bit) % 7 == (last + 1) % 7);
    (0..num_words).map(|i| word(i).fold(0, |word, bit| word | 1 << bit)).collect()
}

impl TokenConstraint for Remainders {
    fn mask(&mut self, allowed: &mut [u32]) -> Result<(), ConstraintError> {
        assert!(!self.panics, "as told");
        match &self.gate {
            Gate::Open => {}
            Gate::Messages(gate) => gate.recv().map_err(|_| ConstraintError("no gate".into()))?,
            Gate::Lasting(time, never) => drop(never.recv_timeout(*time)),
        }
        allowed.copy_from_slice(&rule(self.last, allowed.len()));
        Ok(())
    }

    fn commit(&mut self, token: u32) -> Result<bool, ConstraintError> {
        if token % 7 != (self.last + 1) % 7 {
            return Err(ConstraintError(format!("{token} after {}", self.last)));
        }
        self.last = token;
        self.left -= 1;
        Ok(self.left == 0)
    }
}

/// The constraint's tokens after `prompt`.
fn expected(prompt: &[u32], num_tokens: usize, vocab_size: u32) -> Vec<u32> {
    let (mut tokens, mut last) = (prompt.to_vec(), 0);
    for _ in 0..num_tokens {
        let mask = rule(last, vocab_size.div_ceil(32) as usize);
        last = first_allowed(next_token(&tokens, vocab_size), &mask, vocab_size);
        tokens.push(last);
    }
    tokens.split_off(prompt.len())
}

fn submit(engine: &EngineHandle, prompt: &[u32], num_tokens: usize, gate: Gate) -> EventStream {
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(120) };
    let mut request =
        Request::new(prompt.to_vec(), Vec::new(), sampling, &engine.info().limits).expect("it is valid");
    request.constraint = Some(Box::new(Remainders { last: 0, left: num_tokens, gate, panics: false }));
    engine.submit(request).unwrap()
}

/// Tokens and end of a stream.
fn read(mut stream: EventStream) -> (Vec<u32>, FinishReason) {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_recv().expect("a stream ends with its finish") {
            Event::Prompt { .. } => {}
            Event::Token(event) => tokens.push(event.token),
            Event::Finished(finished) => return (tokens, finished.reason),
        }
    }
}

fn sizes(options: &mut EngineOptions) {
    options.max_num_seqs = 6;
    options.max_num_batched_tokens = Some(48);
    options.block_size = 8;
    options.max_model_len = Some(512);
}

/// The next token of a stream.
fn next_of(stream: &mut EventStream) -> u32 {
    loop {
        match stream.blocking_recv().expect("a token follows") {
            Event::Token(event) => return event.token,
            Event::Prompt { .. } => {}
            Event::Finished(finished) => panic!("{finished:?}"),
        }
    }
}

#[test]
fn a_mask_that_is_not_there_stops_nobody_else() {
    let cases = [(1, false), (1, true), (2, true)];
    // Of a prompt of one token nothing can be computed before its mask is there.
    for ((max_in_flight, async_scheduling), prompt) in
        cases.into_iter().zip([vec![3, 1, 4, 1], vec![7], vec![8; 9]])
    {
        let engine = engine(Fake::new(max_in_flight, true, None), |options| {
            sizes(options);
            options.async_scheduling = async_scheduling;
        });
        let vocab_size = engine.info().limits.vocab_size as u32;
        let prompts = [vec![9; 20], vec![2, 6], vec![5; 3]];
        let whole = |answer: Answer| {
            assert!(matches!(answer.reason, FinishReason::Length), "{:?}", answer.reason);
            answer.tokens
        };
        let free: Vec<_> = answers(&engine, &prompts, 40).into_iter().map(whole).collect();
        let (gate, messages) = channel();
        let mut slow = submit(&engine, &prompt, 4, Gate::Messages(messages));
        let mut tokens = Vec::new();
        for i in 0..4 {
            // These end although the slow one has no mask.
            let beside = answers(&engine, &prompts, 40);
            assert!(beside.iter().map(|answer| &answer.tokens).eq(&free), "as without it");
            assert!(i > 0 || slow.try_recv().is_err(), "no token without a mask");
            gate.send(()).expect("the constraint waits at its gate");
            tokens.push(next_of(&mut slow));
            assert!(i == 3 || slow.try_recv().is_err(), "one mask is good for one token");
        }
        assert_eq!(tokens, expected(&prompt, 4, vocab_size));
        let Some(Event::Finished(finished)) = slow.blocking_recv() else { panic!("an end follows") };
        assert!(matches!(finished.reason, FinishReason::ConstraintComplete), "{finished:?}");
        // A mask has ended it, not a step: the numbers say so too, although no step follows.
        let begun = Instant::now();
        while engine.stats().num_running > 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", engine.stats());
            std::thread::yield_now();
        }
    }
}

/// 200 ms for each mask beside sequences that get their tokens as ever: none of those waits for a whole mask.
#[test]
fn slow_masks_do_not_show_in_the_times_of_others() {
    const MASK: Duration = Duration::from_millis(200);
    let engine = engine(Fake::new(2, true, None), sizes);
    let vocab_size = engine.info().limits.vocab_size as u32;
    let (_keep, never) = channel();
    let mut slow = submit(&engine, &[1, 2, 3], 3, Gate::Lasting(MASK, never));
    let (mut num_beside, mut longest, mut tokens) = (0, Duration::ZERO, Vec::new());
    let finished = loop {
        let prompt = vec![num_beside % 100, 4];
        let mut beside = submit(&engine, &prompt, 60, Gate::Open);
        let mut free = engine_stream(&engine, &prompt, 60);
        let (_, mut last) = (next_of(&mut free), Instant::now());
        for _ in 1..60 {
            next_of(&mut free);
            longest = longest.max(last.elapsed());
            last = Instant::now();
            num_beside += 1;
        }
        assert_eq!(
            (0..60).map(|_| next_of(&mut beside)).collect::<Vec<_>>(),
            expected(&prompt, 60, vocab_size)
        );
        let event = std::iter::from_fn(|| slow.try_recv().ok()).find_map(|event| match event {
            Event::Token(event) => {
                tokens.push(event.token);
                None
            }
            Event::Prompt { .. } => None,
            Event::Finished(finished) => Some(finished),
        });
        if let Some(finished) = event {
            break finished;
        }
    };
    assert!(matches!(finished.reason, FinishReason::ConstraintComplete), "{finished:?}");
    assert_eq!(tokens, expected(&[1, 2, 3], 3, vocab_size));
    assert!(finished.timings.prefill + finished.timings.decode >= MASK, "{:?}", finished.timings);
    assert!(
        longest < MASK / 2,
        "a token waited {longest:?} for the one before it, {num_beside} were measured"
    );
}

/// A stream of tokens without a constraint.
fn engine_stream(engine: &EngineHandle, prompt: &[u32], num_tokens: usize) -> EventStream {
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(num_tokens) };
    let request = Request::new(prompt.to_vec(), Vec::new(), sampling, &engine.info().limits);
    engine.submit(request.expect("it is valid")).unwrap()
}

/// More sequences than slots, and not enough blocks: they are queued and preempted, and some wait for masks meanwhile.
#[test]
fn constrained_tokens_are_right_however_sequences_are_scheduled() {
    const POOL: u64 = 16 << 20;
    let large = engine(Fake::new(1, true, None), |options| options.kv_cache_memory_bytes = Some(POOL));
    let bytes_per_token = POOL / large.info().num_kv_tokens as u64;
    for async_scheduling in [false, true] {
        let engine = engine(Fake::new(2, true, None), |options| {
            sizes(options);
            options.async_scheduling = async_scheduling;
            options.max_model_len = Some(160);
            options.kv_cache_memory_bytes = Some(24 * 8 * bytes_per_token);
        });
        let vocab_size = engine.info().limits.vocab_size as u32;
        let prompts: Vec<Vec<u32>> = (0..20).map(|i| vec![i; 1 + i as usize]).collect();
        let gate = |i: usize| match i % 3 {
            0 => Gate::Lasting(Duration::from_millis(1), channel().1),
            _ => Gate::Open,
        };
        let streams: Vec<_> =
            prompts.iter().enumerate().map(|(i, prompt)| submit(&engine, prompt, 90, gate(i))).collect();
        for (stream, prompt) in streams.into_iter().zip(&prompts) {
            let (tokens, reason) = read(stream);
            assert!(matches!(reason, FinishReason::ConstraintComplete), "{reason:?}");
            assert_eq!(tokens, expected(prompt, 90, vocab_size), "{prompt:?}");
        }
        assert!(stats(&engine).num_preemptions > 0, "the pool was not tight enough to preempt");
    }
}

#[test]
fn what_goes_wrong_with_a_constraint_is_its_own_requests() {
    let engine = engine(Fake::new(2, true, None), sizes);
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(120) };
    let mut request = Request::new(vec![1, 2], Vec::new(), sampling, &engine.info().limits).unwrap();
    request.constraint = Some(Box::new(Remainders { last: 0, left: 9, gate: Gate::Open, panics: true }));
    let (tokens, reason) = read(engine.submit(request).unwrap());
    assert!(tokens.is_empty(), "{tokens:?}");
    assert!(
        matches!(&reason, FinishReason::ConstraintFailed(error) if error.0.contains("panicked")),
        "{reason:?}"
    );

    // A client that leaves while its mask is computed, and the next one.
    let (gate, messages) = channel();
    drop(submit(&engine, &[1, 2, 3], 5, Gate::Messages(messages)));
    let [answer] = &answers(&engine, &[vec![4, 4]], 30)[..] else { panic!("one answer") };
    assert_eq!(answer.tokens.len(), 30);
    // Gone although its mask is still being computed; else this has no end.
    while stats(&engine).num_running > 0 {
        std::thread::yield_now();
    }
    let _ = gate.send(());

    // The engine ends although a mask is being computed.
    let (gate, messages) = channel();
    let stream = submit(&engine, &[1, 2, 3], 5, Gate::Messages(messages));
    engine.abort();
    engine.join();
    let (_, reason) = read(stream);
    assert!(matches!(reason, FinishReason::Cancelled), "{reason:?}");
    drop(gate);
}
