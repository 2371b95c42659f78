//! An engine with followers, in one process over real connections: every rank does the same steps, and a rank that is lost,
//! differs or comes back is handled as promised. The fake backend has no collectives; what ranks compute is tested elsewhere.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use spark_api::{
    ConstraintError, Engine, Event, FinishReason, GridThw, Health, MediaItem, Request, SamplingParams,
    TokenConstraint,
};
use spark_comm::{Hello, Listener, join};
use spark_runtime::{EngineHandle, EngineOptions, Failure, LeaderGroup, Result, Running, follow};
use support::{
    Parts, answers, engine,
    fake::{Fake, Seen, next_token},
    parts, stats,
};

const TEXT: &str = "text_dense_bf16_tied";
const DEADLINE: Duration = Duration::from_secs(10);

fn hello() -> Hello {
    Hello { token: "secret".into(), version: "1".into(), model: [0; 32], settings: [0; 32] }
}

/// A rank that follows, in a thread.
fn follower(
    leader: SocketAddr,
    rank: usize,
    world: usize,
    parts: impl FnOnce() -> Parts + Send + 'static,
) -> JoinHandle<Result<()>> {
    thread::spawn(move || {
        let Parts { backend, model, options, plan, .. } = parts();
        let follower = join(leader, rank, world, &hello(), DEADLINE).unwrap();
        follow(backend, model, &options, &plan, follower)
    })
}

/// Rank 0 without an engine yet.
fn leader(listener: &Listener, world: usize, parts: Parts) -> Result<Running> {
    let Parts { backend, model, options, plan, vocab_size } = parts;
    let leader = listener.gather(world, &hello(), DEADLINE, &mut |_| {})?;
    Running::new(backend, model, &options, &plan, vocab_size, Some(LeaderGroup::new(leader)))
}

fn listener() -> Listener {
    Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap()
}

fn sizes(options: &mut EngineOptions) {
    options.max_num_seqs = 4;
    options.max_num_batched_tokens = Some(48);
    options.block_size = 8;
    options.max_model_len = Some(4096);
}

/// Output tokens that no rank is done with before a loss shows: the fake backend does not wait for other ranks.
const MANY: usize = 3900;

/// A fake that is observed, with its parts made where they are used.
fn observed(
    max_in_flight: usize,
    fixture: &'static str,
) -> (Arc<Seen>, impl FnOnce() -> Parts + Send + 'static) {
    let backend = Fake::new(max_in_flight, true, None);
    let seen = backend.seen();
    (seen, move || parts(backend, fixture, sizes))
}

fn prompts() -> Vec<Vec<u32>> {
    (0..9u32).map(|i| (0..5 + 7 * i).map(|token| (token * 13 + i) % 97).collect()).collect()
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < DEADLINE, "{what}");
        thread::yield_now();
    }
}

#[test]
fn every_rank_does_every_step() {
    let alone = answers(&engine(Fake::new(1, true, None), sizes), &prompts(), 40);
    for (world, max_in_flight) in [(2, 1), (2, 2), (3, 2)] {
        let listener = listener();
        let (mut seen, mut followers) = (Vec::new(), Vec::new());
        for rank in 1..world {
            let (of_rank, parts) = observed(max_in_flight, TEXT);
            seen.push(of_rank);
            followers.push(follower(listener.local_addr(), rank, world, parts));
        }
        let (ours, parts) = observed(max_in_flight, TEXT);
        let engine =
            EngineHandle::start(leader(&listener, world, parts()).unwrap(), &EngineOptions::default(), None)
                .unwrap();
        for (alone, answer) in alone.iter().zip(answers(&engine, &prompts(), 40)) {
            assert_eq!(answer.tokens, alone.tokens, "{world} ranks, {max_in_flight} in flight");
        }
        // A fake follower may be far behind, and what it has not read when rank 0 leaves is not for anybody any more.
        let steps = |seen: &Seen| seen.num_steps.load(Ordering::Relaxed);
        wait_for("a follower does fewer steps", || seen.iter().all(|seen| steps(seen) == steps(&ours)));
        drop(engine);
        for follower in followers {
            follower.join().unwrap().expect("an engine that is dropped ends its followers in order");
        }
        let num_steps = steps(&ours);
        assert!(num_steps > 40);
        for seen in seen {
            assert_eq!(steps(&seen), num_steps);
            assert_eq!(seen.num_prepared.load(Ordering::Relaxed), 1);
            assert!(seen.most_in_flight.load(Ordering::Relaxed) <= max_in_flight);
        }
    }
}

#[test]
fn the_smallest_rank_decides_the_size_of_the_cache() {
    let listener = listener();
    let small = || {
        parts(Fake::new(1, true, None), TEXT, |options| {
            sizes(options);
            options.max_model_len = None;
            options.kv_cache_memory_bytes = Some(1 << 20);
        })
    };
    let small_blocks = small().plan.kv.num_blocks;
    let follower = follower(listener.local_addr(), 1, 2, small);
    let (_, parts) = observed(1, TEXT);
    let running = leader(&listener, 2, parts()).unwrap();
    let engine = EngineHandle::start(running, &EngineOptions::default(), None).unwrap();
    assert_eq!(engine.num_kv_blocks(), small_blocks);
    drop(engine);
    follower.join().unwrap().unwrap();
}

/// Prompt of a picture of 2 x 2 tokens, and its pixels, which add up to 3.
fn picture(engine: &EngineHandle, num_tokens: usize) -> Request {
    let limits = &engine.info().limits;
    let geometry = limits.media_geometry.unwrap();
    let side = 2 * geometry.merge_size;
    let mut patches = vec![0; side * side * 3 * geometry.patch_size * geometry.patch_size];
    patches[..3].fill(1);
    let item = MediaItem {
        hash: [7; 32],
        patches: patches.into(),
        grid: GridThw { t: 1, h: side, w: side },
        offset: 1,
        num_tokens: 4,
    };
    let placeholder = limits.image_token_id.unwrap();
    let prompt = [vec![1], vec![placeholder; 4], vec![2]].concat();
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(num_tokens) };
    Request::new(prompt, vec![item], sampling, limits).unwrap()
}

/// Token number n leaves the remainder of n by seven.
struct Remainders(u32);

impl TokenConstraint for Remainders {
    fn mask(&mut self, allowed: &mut [u32]) -> std::result::Result<(), ConstraintError> {
        for (word, allowed) in (0..).zip(allowed) {
            let fits = |bit: &u32| (32 * word + bit) % 7 == self.0 % 7;
            *allowed = (0..32).filter(fits).fold(0, |word, bit| word | 1 << bit);
        }
        Ok(())
    }

    fn commit(&mut self, token: u32) -> std::result::Result<bool, ConstraintError> {
        let error = || ConstraintError(format!("{token} as number {}", self.0));
        (token % 7 == self.0 % 7).then_some(()).ok_or_else(error)?;
        self.0 += 1;
        Ok(false)
    }
}

fn constrained(engine: &EngineHandle, num_tokens: usize) -> Request {
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::greedy(num_tokens) };
    let mut request = Request::new(vec![5, 6], Vec::new(), sampling, &engine.info().limits).unwrap();
    request.constraint = Some(Box::new(Remainders(0)));
    request
}

/// Tokens of a stream that ends as it should; the prompt is told once.
fn tokens(mut stream: spark_api::EventStream) -> Vec<u32> {
    let (mut tokens, mut num_prompts) = (Vec::new(), 0);
    loop {
        match stream.blocking_recv().expect("a stream ends with its finish") {
            Event::Prompt { .. } => num_prompts += 1,
            Event::Token(event) => tokens.push(event.token),
            Event::Finished(finished) => {
                assert!(matches!(finished.reason, FinishReason::Length), "{:?}", finished.reason);
                assert_eq!((finished.num_output_tokens, num_prompts), (tokens.len(), 1));
                return tokens;
            }
        }
    }
}

fn finish(mut stream: spark_api::EventStream) -> FinishReason {
    loop {
        if let Event::Finished(finished) = stream.blocking_recv().expect("a stream ends with its finish") {
            return finished.reason;
        }
    }
}

#[test]
fn pixels_reach_every_rank_before_their_sequence() {
    let listener = listener();
    let (theirs, parts_of_follower) = observed(2, "dense_vl_bf16");
    let follower = follower(listener.local_addr(), 1, 2, parts_of_follower);
    let (ours, parts) = observed(2, "dense_vl_bf16");
    let running = leader(&listener, 2, parts()).unwrap();
    let engine = EngineHandle::start(running, &EngineOptions::default(), None).unwrap();
    let stream = engine.submit(picture(&engine, 5)).unwrap();
    assert!(matches!(finish(stream), FinishReason::Length));
    // Preparation may have encoded pixels of zeros.
    assert_eq!(ours.pixels.load(Ordering::Relaxed), 3);
    // A client that is gone before its pixels have arrived leaves nothing behind.
    drop(engine.submit(picture(&engine, 5)).unwrap());
    engine.drain();
    engine.join();
    assert_eq!(engine.failure(), None);
    drop(engine);
    follower.join().unwrap().unwrap();
    assert_eq!(theirs.pixels.load(Ordering::Relaxed), 3);
}

#[test]
fn ranks_that_differ_stop() {
    let listener = listener();
    // Its tokens are all 1.
    let other = || parts(Fake::new(1, false, None), TEXT, sizes);
    let follower = follower(listener.local_addr(), 1, 2, other);
    let (_, parts) = observed(1, TEXT);
    let running = leader(&listener, 2, parts()).unwrap();
    let engine = EngineHandle::start(running, &EngineOptions::default(), None).unwrap();
    let error = follower_error(&engine, follower);
    assert!(error.contains("differ"), "{error}");
    wait_for("the engine notices", || engine.health() != Health::Ready);
    let Health::Failed(reason) = engine.health() else { panic!("{:?}", engine.health()) };
    assert!(reason.contains("rank 1"), "{reason}");
}

/// Runs requests until the follower ends; its error.
fn follower_error(engine: &EngineHandle, follower: JoinHandle<Result<()>>) -> String {
    for answer in answers(engine, &prompts(), MANY) {
        assert!(matches!(answer.reason, FinishReason::EngineFailed(_)), "{:?}", answer.reason);
    }
    follower.join().unwrap().unwrap_err().to_string()
}

#[test]
fn an_idle_engine_notices_a_lost_rank() {
    let listener = listener();
    let address = listener.local_addr();
    let (monitor, monitors) = std::sync::mpsc::channel();
    let follower = thread::spawn(move || {
        let (_, parts) = observed(1, TEXT);
        let Parts { backend, model, options, plan, .. } = parts();
        let follower = join(address, 1, 2, &hello(), DEADLINE).unwrap();
        monitor.send(follower.monitor()).unwrap();
        follow(backend, model, &options, &plan, follower)
    });
    let (_, parts) = observed(1, TEXT);
    let running = leader(&listener, 2, parts()).unwrap();
    let engine = EngineHandle::start(running, &EngineOptions::default(), None).unwrap();
    assert_eq!(engine.health(), Health::Ready);
    monitors.recv().unwrap().abort();
    engine.join();
    assert!(matches!(engine.health(), Health::Failed(reason) if reason.contains("rank 1")));
    assert!(matches!(engine.failure(), Some(Failure::Group(_))));
    assert!(follower.join().unwrap().is_err());
}

#[test]
fn a_rank_that_speaks_out_of_turn_ends_the_start() {
    let listener = listener();
    let address = listener.local_addr();
    let follower = thread::spawn(move || {
        let mut follower = join(address, 1, 2, &hello(), DEADLINE).unwrap();
        // Rank 0 expects a number of blocks.
        follower.send_bulk(&u64::MAX).unwrap();
        follower.recv_bulk::<u64>().unwrap_err()
    });
    let (_, parts) = observed(1, TEXT);
    assert!(leader(&listener, 2, parts()).is_err());
    follower.join().unwrap();
}

#[test]
fn a_lost_rank_comes_back_and_waiting_requests_are_answered() {
    let listener = Arc::new(listener());
    let address = listener.local_addr();
    let failing = || parts(Fake::new(1, true, Some(20)), TEXT, sizes);
    let first = follower(address, 1, 2, failing);
    let (_, parts) = observed(1, TEXT);
    let running = leader(&listener, 2, parts()).unwrap();
    let num_rebuilt = Arc::new(AtomicUsize::new(0));
    let counted = num_rebuilt.clone();
    let rebuild = Box::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        let (_, parts) = observed(1, TEXT);
        drop(follower(address, 1, 2, parts));
        let (_, parts) = observed(1, TEXT);
        leader(&listener, 2, parts()).map_err(|error| error.to_string())
    });
    let engine = EngineHandle::start(running, &EngineOptions::default(), Some(rebuild)).unwrap();
    let vocab_size = engine.info().limits.vocab_size as u32;
    // Four run at once: the others wait when the group is lost.
    let (mut num_failed, mut num_whole) = (0, 0);
    for (prompt, answer) in prompts().iter().zip(answers(&engine, &prompts(), MANY)) {
        match answer.reason {
            FinishReason::EngineFailed(reason) => {
                assert!(reason.contains("rank 1"), "{reason}");
                assert!(answer.tokens.len() < MANY);
                num_failed += 1;
            }
            _ => {
                let mut tokens = prompt.clone();
                (0..MANY).for_each(|_| tokens.push(next_token(&tokens, vocab_size)));
                assert_eq!(answer.tokens, tokens[prompt.len()..]);
                num_whole += 1;
            }
        }
    }
    assert!(first.join().unwrap().is_err());
    assert!(num_failed > 0 && num_whole >= 5, "{num_failed} failed, {num_whole} whole");
    assert_eq!(num_rebuilt.load(Ordering::Relaxed), 1);
    assert_eq!(engine.health(), Health::Ready);
    assert_eq!(engine.failure(), None);
    assert_eq!(stats(&engine).num_running, 0);
}

#[test]
fn a_rank_that_hangs_while_its_heart_beats_is_given_up() {
    let listener = listener();
    let address = listener.local_addr();
    let (_, parts_of_follower) = observed(1, TEXT);
    let first = follower(address, 1, 2, parts_of_follower);
    let (ours, parts) = observed(1, TEXT);
    let running = leader(&listener, 2, parts()).unwrap();
    let options = EngineOptions { step_timeout: Some(Duration::from_secs(1)), ..EngineOptions::default() };
    let (freed, hanging) = (ours.clone(), ours);
    let rebuild = Box::new(move || {
        let (_, parts) = observed(1, TEXT);
        drop(follower(address, 1, 2, parts));
        let (_, parts) = observed(1, TEXT);
        leader(&listener, 2, parts()).map_err(|error| error.to_string())
    });
    let engine = EngineHandle::start(running, &options, Some(rebuild)).unwrap();
    hanging.hangs.store(true, Ordering::Relaxed);
    thread::scope(|scope| {
        scope.spawn(|| {
            // A collective would return now; the fake backend is told to.
            wait_for("the follower is told", || first.is_finished());
            freed.hangs.store(false, Ordering::Relaxed);
        });
        let answers = answers(&engine, &prompts(), 5);
        assert!(answers.iter().all(|answer| matches!(answer.reason, FinishReason::Length)), "none has begun");
    });
    assert!(first.join().unwrap().is_err());
    assert_eq!(engine.health(), Health::Ready);
}

#[test]
fn a_broken_link_between_living_ranks_costs_no_answer() {
    const MODEL: &str = "dense_vl_bf16";
    let listener = listener();
    let address = listener.local_addr();
    let (is_broken, has_rebuilt) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let first = thread::spawn({
        let is_broken = is_broken.clone();
        move || {
            let (_, parts) = observed(2, MODEL);
            let Parts { backend, model, options, plan, .. } = parts();
            let follower = join(address, 1, 2, &hello(), DEADLINE).unwrap();
            let broken = move || is_broken.load(Ordering::Relaxed).then(|| "cut".to_owned());
            follower.monitor().watch_link(broken);
            follow(backend, model, &options, &plan, follower)
        }
    });
    let (ours, parts) = observed(2, MODEL);
    let running = leader(&listener, 2, parts()).unwrap();
    let rebuilt = has_rebuilt.clone();
    let rebuild = Box::new(move || {
        rebuilt.store(true, Ordering::Relaxed);
        let (_, parts) = observed(2, MODEL);
        drop(follower(address, 1, 2, parts));
        let (_, parts) = observed(2, MODEL);
        leader(&listener, 2, parts()).map_err(|error| error.to_string())
    });
    let engine = EngineHandle::start(running, &EngineOptions::default(), Some(rebuild)).unwrap();
    let vocab_size = engine.info().limits.vocab_size as u32;
    let (steps, freed) = (ours.clone(), ours);
    // Pixels go to the new ranks again; a grammar stays where it is.
    let special = || [picture(&engine, MANY), constrained(&engine, 500)].map(|r| engine.submit(r).unwrap());
    let disturbed = special();
    let answers = thread::scope(|scope| {
        scope.spawn(|| {
            wait_for("some have begun", || steps.num_steps.load(Ordering::Relaxed) > 30);
            // As in a collective of which nothing comes any more, until the group is given up.
            steps.hangs.store(true, Ordering::Relaxed);
            is_broken.store(true, Ordering::Relaxed);
            wait_for("the follower is told", || first.is_finished());
            freed.hangs.store(false, Ordering::Relaxed);
        });
        answers(&engine, &prompts(), MANY)
    });
    for (prompt, answer) in prompts().iter().zip(answers) {
        assert!(matches!(answer.reason, FinishReason::Length), "{:?}", answer.reason);
        let mut tokens = prompt.clone();
        (0..MANY).for_each(|_| tokens.push(next_token(&tokens, vocab_size)));
        assert!(answer.tokens == tokens[prompt.len()..], "none is lost, doubled or different");
    }
    assert!(disturbed.map(tokens) == special().map(tokens));
    let error = first.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("rank 1") && error.contains("lives"), "{error}");
    assert!(has_rebuilt.load(Ordering::Relaxed), "there was a rebuild");
    assert_eq!(engine.health(), Health::Ready);
    assert_eq!(engine.failure(), None);
    wait_for("nothing is left running", || stats(&engine).num_running == 0);
}

#[test]
fn a_group_that_does_not_come_back_ends_the_engine_with_both_reasons() {
    let listener = listener();
    let failing = || parts(Fake::new(1, true, Some(5)), TEXT, sizes);
    let first = follower(listener.local_addr(), 1, 2, failing);
    let (_, parts) = observed(1, TEXT);
    let running = leader(&listener, 2, parts()).unwrap();
    let rebuild = Box::new(|| Err("nobody came".to_owned()));
    let engine = EngineHandle::start(running, &EngineOptions::default(), Some(rebuild)).unwrap();
    for answer in answers(&engine, &prompts(), MANY) {
        assert!(matches!(answer.reason, FinishReason::EngineFailed(_)), "{:?}", answer.reason);
    }
    engine.join();
    let failure = engine.failure().expect("it has failed").message().to_owned();
    assert!(failure.contains("rank 1") && failure.contains("nobody came"), "{failure}");
    assert!(first.join().unwrap().is_err());
}
