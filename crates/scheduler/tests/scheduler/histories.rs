//! Random histories: whatever is added, cancelled, preempted or cached, every sequence ends with its own tokens.

use std::cell::RefCell;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};
use spark_api::TokenId;
use spark_scheduler::{MediaSpan, NewSequence, Policy, SchedulerConfig};

use crate::device::{EOS, PLACEHOLDER};
use crate::driver::{Driver, Sampling};

/// A piece of a prompt. There are few different ones, so prompts often begin alike.
#[derive(Debug, Clone, Copy)]
enum Piece {
    Text { first: TokenId, len: usize },
    Image { kind: u8 },
}

#[derive(Debug, Clone)]
enum Op {
    Add(NewSequence),
    Cancel(usize),
    Schedule,
    Complete(Sampling),
    /// A constrained sequence may sample; in a history with such operations only then.
    Settle(usize),
}

#[derive(Debug, Clone)]
struct Shape {
    seqs_and_budget: (usize, usize),
    block_size: usize,
    num_blocks: usize,
    prefix_caching: bool,
    encoder: (usize, usize),
    max_chunk_tokens: Option<usize>,
    depth: usize,
}

/// Placeholders of an image of some kind.
fn image_tokens(kind: u8) -> usize {
    [1, 3, 6, 8][usize::from(kind)]
}

fn pieces(with_images: bool) -> impl Strategy<Value = Vec<Piece>> {
    let text = (0..2_u32, 1..7_usize).prop_map(|(first, len)| Piece::Text { first, len });
    let image = (0..4_u8).prop_map(|kind| Piece::Image { kind });
    let piece = if with_images { prop_oneof![text, image].boxed() } else { text.boxed() };
    vec(piece, 1..4)
}

fn assemble(pieces: &[Piece]) -> (Vec<TokenId>, Vec<MediaSpan>) {
    let (mut prompt, mut media) = (Vec::new(), Vec::new());
    for &piece in pieces {
        match piece {
            Piece::Text { first, len } => prompt.extend((0..len as u32).map(|i| 20 + first * 20 + i)),
            Piece::Image { kind } => {
                let num_tokens = image_tokens(kind);
                media.push(MediaSpan { hash: [kind; 32], offset: prompt.len(), num_tokens });
                prompt.extend(vec![PLACEHOLDER; num_tokens]);
            }
        }
    }
    (prompt, media)
}

fn sequence(with_images: bool) -> impl Strategy<Value = NewSequence> {
    let limits = (1..14_usize, 0..4_usize, any::<bool>());
    let rules = (
        prop::option::weighted(0.3, 0..11_u32),
        -1..3_i32,
        prop::option::weighted(0.15, Just("salt".to_owned())),
    );
    let flags = (prop::bool::weighted(0.15), prop::bool::weighted(0.1));
    (pieces(with_images), limits, rules, flags).prop_map(|(pieces, limits, rules, flags)| {
        let (prompt, media) = assemble(&pieces);
        NewSequence {
            prompt,
            output: Vec::new(),
            media,
            max_tokens: limits.0,
            min_tokens: limits.1.min(limits.0),
            ignore_eos: limits.2,
            stop_token_ids: rules.0.into_iter().collect(),
            priority: rules.1,
            cache_salt: rules.2,
            constrained: flags.0,
            prompt_logprobs: flags.1,
        }
    })
}

fn op(with_images: bool, regular: bool) -> impl Strategy<Value = Op> {
    let complete = move |i: u8| match i {
        0 if !regular => Op::Complete(Sampling::None),
        1 if !regular => Op::Complete(Sampling::Two),
        _ => Op::Complete(Sampling::One),
    };
    prop_oneof![
        4 => sequence(with_images).prop_map(Op::Add),
        1 => (0..16_usize).prop_map(Op::Cancel),
        6 => Just(Op::Schedule),
        6 => (0..10_u8).prop_map(complete),
    ]
}

fn shape(depth: usize) -> impl Strategy<Value = Shape> {
    let budget = (1..5_usize).prop_flat_map(|seqs| (Just(seqs), seqs..seqs + 14));
    let blocks = (1..6_usize, 6..16_usize, prop::bool::weighted(0.8));
    (budget, blocks, (8..20_usize, 1..12_usize), prop::option::weighted(0.3, 1..8_usize)).prop_map(
        move |(seqs_and_budget, (block_size, num_blocks, prefix_caching), encoder, max_chunk_tokens)| Shape {
            seqs_and_budget,
            block_size,
            num_blocks,
            prefix_caching,
            encoder,
            max_chunk_tokens,
            depth,
        },
    )
}

fn play(shape: &Shape, policy: Policy, ops: Vec<Op>) -> Driver {
    let mut driver = Driver::new(SchedulerConfig {
        max_num_seqs: shape.seqs_and_budget.0,
        max_num_batched_tokens: shape.seqs_and_budget.1,
        block_size: shape.block_size,
        num_blocks: shape.num_blocks,
        max_model_len: 30,
        enable_prefix_caching: shape.prefix_caching,
        policy,
        eos_token_ids: vec![EOS],
        encoder_cache_tokens: shape.encoder.0,
        max_encoder_tokens_per_step: shape.encoder.1,
        cache_key: [3; 32],
        max_chunk_tokens: shape.max_chunk_tokens,
        max_prompt_logprob_tokens: 5,
    });
    driver.settles_late = ops.iter().any(|op| matches!(op, Op::Settle(_)));
    for op in ops {
        match op {
            Op::Settle(n) => driver.settle(n),
            Op::Add(new) => {
                let num_tokens = (new.prompt.len() + new.max_tokens).min(30);
                let fits = new.prompt.len() < 30 && num_tokens <= driver.scheduler.max_tokens_that_fit();
                assert_eq!(driver.add(new).is_ok(), fits);
            }
            Op::Cancel(i) => {
                if let Some(&id) = driver.seqs.keys().rev().nth(i) {
                    driver.cancel(id);
                }
            }
            Op::Schedule if driver.num_in_flight() <= shape.depth => {
                driver.schedule();
            }
            Op::Schedule => (),
            Op::Complete(sampling) => driver.complete(sampling),
        }
    }
    driver.drain(shape.depth);
    driver
}

/// What some histories went through: a history that never gets there tests nothing.
#[derive(Debug, Default)]
struct Reached {
    preemptions: u64,
    prefix_hits: u64,
    hits_inside_media: u64,
    media_hits: u64,
    media_evictions: u64,
    pending_tokens: u64,
}

/// Plays `cases` histories from a fixed seed: the same ones everywhere. A failure shows its history, shrunk.
fn check(
    cases: u32,
    depths: std::ops::Range<usize>,
    policy: Policy,
    ops: impl Strategy<Value = Op>,
) -> Reached {
    let config = ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(u64::from(cases)),
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let reached = RefCell::new(Reached::default());
    let histories = (depths.prop_flat_map(shape), vec(ops, 1..80));
    let result = TestRunner::new(config).run(&histories, |(shape, ops)| {
        let driver = play(&shape, policy, ops);
        let (stats, seen, mut sum) = (driver.scheduler.stats(), &driver.seen, reached.borrow_mut());
        sum.preemptions += stats.num_preemptions;
        sum.prefix_hits += stats.prefix_cache_hits;
        sum.media_hits += stats.mm_cache_hits;
        sum.hits_inside_media += seen.hits_inside_media;
        sum.media_evictions += seen.media_evictions;
        sum.pending_tokens += seen.pending_tokens;
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
    reached.into_inner()
}

#[test]
fn text_one_step_at_a_time() {
    let reached = check(3000, 0..1, Policy::Fcfs, op(false, true));
    assert!(reached.preemptions > 1000 && reached.prefix_hits > 1000, "{reached:?}");
    assert_eq!(reached.pending_tokens, 0, "nothing is pending when no step is in flight");
}

#[test]
fn images_with_a_step_in_flight() {
    let reached = check(3001, 1..2, Policy::Fcfs, op(true, true));
    assert!(reached.preemptions > 1000 && reached.pending_tokens > 1000, "{reached:?}");
    assert!(reached.hits_inside_media > 100, "{reached:?}");
    assert!(reached.media_hits > 1000 && reached.media_evictions > 1000, "{reached:?}");
}

#[test]
fn priorities() {
    let reached = check(3002, 0..2, Policy::Priority, op(true, true));
    assert!(reached.preemptions > 1000 && reached.prefix_hits > 1000, "{reached:?}");
}

#[test]
fn none_or_two_tokens_a_sample() {
    let reached = check(3003, 0..2, Policy::Priority, op(true, false));
    assert!(reached.preemptions > 1000 && reached.pending_tokens > 1000, "{reached:?}");
}

#[test]
fn constrained_sequences_that_may_sample_late() {
    let constrain = |op| match op {
        Op::Add(new) if new.prompt.len() % 2 == 0 => Op::Add(NewSequence { constrained: true, ..new }),
        op => op,
    };
    let ops = prop_oneof![3 => op(true, true).prop_map(constrain), 1 => (0..3_usize).prop_map(Op::Settle)];
    let reached = check(3004, 0..2, Policy::Priority, ops);
    assert!(reached.preemptions > 1000 && reached.pending_tokens > 1000, "{reached:?}");
}
