//! Tables of small situations: what is added, and the plans that must come out.
//!
//! A plan is written as its rows: `a+[0..5]*` is sequence a (the first added), just admitted, computing tokens 0 to 4
//! and sampling from the last one; `~` instead of `*` says that the row's token was still pending, and it samples.

use spark_api::TokenId;
use spark_scheduler::{
    AddError, ConfigError, Finish, MediaSpan, NewSequence, PlanToken, Policy, SchedulerConfig, StepPlan,
};

use crate::device::{EOS, PLACEHOLDER, Reference};
use crate::driver::{Driver, Sampling, config, text};

/// A prompt unlike any other one.
fn prompt(family: u32, len: usize) -> Vec<TokenId> {
    (0..len as u32).map(|i| family * 1000 + 100 + i).collect()
}

/// An image of `num_tokens` between texts of the given lengths.
fn image(kind: u8, before: usize, num_tokens: usize, after: usize) -> NewSequence {
    let mut tokens = prompt(1, before);
    tokens.extend(vec![PLACEHOLDER; num_tokens]);
    tokens.extend(prompt(2, after));
    let media = vec![MediaSpan { hash: [kind; 32], offset: before, num_tokens }];
    NewSequence { media, ..text(tokens, 1) }
}

fn render(driver: &Driver, plan: Option<StepPlan>) -> String {
    let Some(plan) = plan else { return "-".into() };
    let rows = plan.seqs.iter().map(|rows| {
        let idx = driver.seqs.keys().position(|&id| id == rows.seq).expect("the test added it");
        let name = char::from(b'a' + idx as u8);
        let admit = if rows.admit { "+" } else { "" };
        let mark = match (rows.samples, rows.tokens.contains(&PlanToken::Pending)) {
            (true, true) => "~",
            (true, false) => "*",
            (false, _) => "",
        };
        format!("{name}{admit}[{}..{}]{mark}", rows.start, rows.context_len)
    });
    rows.collect::<Vec<_>>().join(" ")
}

/// Adds all sequences, then steps with `depth` steps in flight: the first plans must be these.
fn check(config: SchedulerConfig, depth: usize, seqs: Vec<NewSequence>, expect: &[&str]) -> Driver {
    let mut driver = Driver::new(config);
    for seq in seqs {
        driver.add(seq).expect("the table's sequences fit");
    }
    check_next(&mut driver, depth, expect);
    driver
}

fn check_next(driver: &mut Driver, depth: usize, expect: &[&str]) {
    for (i, expect) in expect.iter().enumerate() {
        let plan = driver.schedule();
        assert_eq!(render(driver, plan), *expect, "plan {i}");
        if driver.num_in_flight() > depth || *expect == "-" {
            driver.complete(Sampling::One);
        }
    }
}

#[test]
fn decodes_go_first_and_prefills_fill_the_budget() {
    let seqs = vec![text(prompt(1, 5), 4), text(prompt(2, 20), 2), text(prompt(3, 9), 2)];
    let expect = [
        "a+[0..5]* b+[0..11]",
        "a[5..6]* b[11..20]* c+[0..6]",
        "a[6..7]* b[20..21]* c[6..9]*",
        "a[7..8]* c[9..10]*",
    ];
    check(config(), 0, seqs, &expect).drain(0);
}

#[test]
fn chunks_are_bounded() {
    let config = SchedulerConfig { max_chunk_tokens: Some(7), ..config() };
    let seqs = vec![text(prompt(1, 15), 1), text(prompt(2, 8), 1)];
    check(config, 0, seqs, &["a+[0..7] b+[0..7]", "a[7..14] b[7..8]*", "a[14..15]*"]).drain(0);
}

#[test]
fn rows_with_prompt_logprobs_share_a_bound() {
    let config = SchedulerConfig { max_prompt_logprob_tokens: 4, ..config() };
    let wanted = |first| NewSequence { prompt_logprobs: true, ..text(prompt(first, 6), 2) };
    let seqs = vec![wanted(1), wanted(2), text(prompt(3, 6), 2)];
    let expect = ["a+[0..4] c+[0..6]*", "c[6..7]* a[4..6]* b+[0..2]", "a[6..7]* b[2..6]*", "b[6..7]*"];
    check(config, 0, seqs, &expect).drain(0);
}

#[test]
fn what_another_scheduler_has_planned_is_computed_anew_and_goes_on() {
    let new = text(prompt(1, 5), 5);
    let output = Reference::new(&new, config().max_model_len).output;
    let begun = NewSequence { output: output[..3].to_vec(), ..new.clone() };
    check(config(), 0, vec![begun], &["a+[0..8]*", "a[8..9]*", "-"]).drain(0);
    let mut driver = Driver::new(config());
    let whole = NewSequence { output, ..new };
    let error = driver.add(whole).unwrap_err();
    assert!(matches!(error, AddError::Complete { num_output_tokens: 5, max_tokens: 5 }), "{error}");
}

#[test]
fn a_step_in_flight_leaves_its_token_pending() {
    let seqs = vec![text(prompt(1, 5), 3)];
    // The third sample is the last one: nothing is planned on top of it.
    check(config(), 1, seqs, &["a+[0..5]*", "a[5..6]~", "a[6..7]~", "-"]).drain(1);
}

#[test]
fn a_constrained_sequence_waits_for_its_token_and_the_others_do_not() {
    let seqs = vec![NewSequence { constrained: true, ..text(prompt(1, 5), 3) }, text(prompt(2, 5), 5)];
    let expect =
        ["a+[0..5]* b+[0..5]*", "b[5..6]~", "a[5..6]* b[6..7]~", "b[7..8]~", "a[6..7]* b[8..9]~", "-"];
    check(config(), 1, seqs, &expect).drain(1);
}

#[test]
fn a_sequence_that_may_not_sample_yet_sits_out_and_the_others_do_not() {
    let constrained = |prompt| NewSequence { constrained: true, ..text(prompt, 3) };
    let mut driver = Driver::new(config());
    driver.settles_late = true;
    let seqs = [constrained(prompt(1, 5)), text(prompt(2, 5), 5), constrained(prompt(3, 1))];
    let ids: Vec<_> = seqs.into_iter().map(|seq| driver.add(seq).unwrap()).collect();
    let plan = |driver: &mut Driver| {
        let plan = driver.schedule().map(|plan| plan.seqs).unwrap_or_default();
        driver.complete(Sampling::One);
        plan.iter().map(|rows| (rows.seq, rows.context_len, rows.samples)).collect::<Vec<_>>()
    };
    // All but the last token of a prompt can be computed: of a prompt of one token nothing.
    assert_eq!(plan(&mut driver), [(ids[0], 4, false), (ids[1], 5, true)]);
    assert_eq!(driver.scheduler.take_unsettled(), [ids[0], ids[2]], "both hold a slot and wait");
    assert_eq!(plan(&mut driver), [(ids[1], 6, true)]);
    driver.settle(1);
    assert_eq!(plan(&mut driver), [(ids[1], 7, true), (ids[2], 1, true)]);
    driver.settle(0);
    assert_eq!(plan(&mut driver), [(ids[1], 8, true), (ids[0], 5, true)]);
    assert_eq!(plan(&mut driver), [(ids[1], 9, true)]);
    assert_eq!(plan(&mut driver), [], "two sequences wait for what they may sample");
    assert!(driver.scheduler.has_work() && driver.scheduler.take_unsettled().is_empty());
    driver.drain(0);
}

#[test]
fn nothing_is_planned_over_two_steps_in_flight() {
    let mut driver = check(config(), 2, vec![text(prompt(1, 3), 9)], &["a+[0..3]*", "a[3..4]~"]);
    assert_eq!(driver.scheduler.num_in_flight(), 2);
    assert_eq!(driver.scheduler.schedule(), None);
    driver.drain(1);
}

#[test]
fn the_last_sequence_is_preempted_and_resumes_with_its_output() {
    let config = SchedulerConfig { num_blocks: 4, enable_prefix_caching: false, ..config() };
    let seqs = vec![text(prompt(1, 7), 5), text(prompt(2, 6), 4)];
    // b would fit into the two blocks that are left, but a will grow into one of them: b is not even admitted.
    let expect = ["a+[0..7]*", "a[7..8]*", "a[8..9]*", "a[9..10]*", "a[10..11]*", "b+[0..6]*"];
    check(config.clone(), 0, seqs, &expect).drain(0);

    // Here both may grow to three blocks, and there are five: b has to give up its own when a needs a third.
    let config = SchedulerConfig { num_blocks: 5, ..config };
    let seqs = vec![text(prompt(1, 4), 9), text(prompt(2, 4), 9)];
    let expect = ["a+[0..4]* b+[0..4]*", "a[4..5]* b[4..5]*", "a[5..6]* b[5..6]*", "a[6..7]* b[6..7]*"];
    let mut driver = check(config, 0, seqs, &expect);
    check_next(&mut driver, 0, &["a[7..8]* b[7..8]*", "a[8..9]*"]);
    driver.drain(0);
    let num_preemptions: Vec<usize> = driver.seqs.values().map(|seq| seq.num_preemptions).collect();
    assert_eq!(num_preemptions, [0, 1]);
}

#[test]
fn the_head_of_the_queue_is_not_overtaken() {
    let config = SchedulerConfig { num_blocks: 6, ..config() };
    let seqs = vec![text(prompt(1, 12), 3), text(prompt(2, 16), 1), text(prompt(3, 1), 1)];
    check(config, 0, seqs, &["a+[0..12]*", "a[12..13]*", "a[13..14]*", "b+[0..16]*", "c+[0..1]*"]).drain(0);
}

#[test]
fn an_urgent_sequence_takes_the_place_of_the_least_urgent_one() {
    let with = |policy| SchedulerConfig { max_num_seqs: 2, policy, ..config() };
    let seq = |family, priority| NewSequence { priority, ..text(prompt(family, 4), 3) };
    let late = || seq(3, -1);
    let first = || vec![seq(1, 0), seq(2, 1)];

    let mut driver = check(with(Policy::Priority), 0, first(), &["a+[0..4]* b+[0..4]*"]);
    driver.add(late()).unwrap();
    let expect = ["a[4..5]* c+[0..4]*", "c[4..5]* a[5..6]*", "c[5..6]* b+[4..5]*", "b[5..6]*"];
    check_next(&mut driver, 0, &expect);
    driver.drain(0);

    let mut driver = check(with(Policy::Fcfs), 0, first(), &["a+[0..4]* b+[0..4]*"]);
    driver.add(late()).unwrap();
    check_next(&mut driver, 0, &["a[4..5]* b[4..5]*", "a[5..6]* b[5..6]*", "c+[0..4]*"]);
    driver.drain(0);
}

#[test]
fn a_prefix_hit_leaves_at_least_the_last_token() {
    let cases = [(12, 8), (13, 12), (4, 0), (5, 4)];
    for (len, num_cached_tokens) in cases {
        let mut driver = check(config(), 0, vec![text(prompt(1, 16), 1)], &["a+[0..16]*"]);
        let id = driver.add(text(prompt(1, len), 1)).unwrap();
        check_next(&mut driver, 0, &[&format!("b+[{num_cached_tokens}..{len}]*")]);
        assert_eq!(driver.seqs[&id].prompt_done, Some(num_cached_tokens));
    }
}

#[test]
fn generated_blocks_are_cached() {
    let mut driver = Driver::new(config());
    let id = driver.add(text(prompt(1, 6), 7)).unwrap();
    driver.drain(0);
    let mut next = prompt(1, 6);
    next.extend(&driver.seqs[&id].output);
    // 12 of the 13 tokens had their keys and values computed.
    driver.add(text(next, 1)).unwrap();
    check_next(&mut driver, 0, &["b+[12..13]*"]);
}

#[test]
fn salts_and_prompt_logprobs_keep_out_of_the_prefix_cache() {
    let base = || text(prompt(1, 9), 1);
    let salted = || NewSequence { cache_salt: Some("mine".into()), ..base() };
    let logprobs = || NewSequence { prompt_logprobs: true, ..base() };
    let one_seq = || SchedulerConfig { max_num_seqs: 1, ..config() };
    check(one_seq(), 0, vec![base(), salted(), salted()], &["a+[0..9]*", "b+[0..9]*", "c+[8..9]*"]);
    check(one_seq(), 0, vec![base(), logprobs(), base()], &["a+[0..9]*", "b+[0..9]*", "c+[8..9]*"]);
    let off = SchedulerConfig { enable_prefix_caching: false, ..one_seq() };
    check(off, 0, vec![base(), base()], &["a+[0..9]*", "b+[0..9]*"]);
}

#[test]
fn a_hit_inside_an_image_takes_the_rest_of_its_rows() {
    // Tokens 2..9 are the image: the hit ends at 8, one row short of it.
    let first = || image(1, 2, 7, 1);
    let mut driver = check(config(), 0, vec![first()], &["a+[0..10]*"]);
    driver.add(first()).unwrap();
    let plan = driver.schedule().unwrap();
    let rows = &plan.seqs[0];
    assert_eq!((rows.start, rows.media.len()), (8, 1));
    let media = rows.media[0];
    assert_eq!((media.token_row, media.source_row, media.rows), (0, 6, 1));
    assert!(plan.encode.is_empty(), "it is still in the encoder cache");
    driver.complete(Sampling::One);
    driver.add(image(2, 2, 7, 1)).unwrap();
    check_next(&mut driver, 0, &["c+[0..10]*"]);
}

#[test]
fn a_chunk_ends_before_a_medium_that_cannot_be_encoded_yet() {
    let config = SchedulerConfig { max_encoder_tokens_per_step: 6, ..config() };
    // The second image does not fit into the step's encoder budget, so b stops at it; the third is over
    // the budget of any step, and has one for itself.
    let seqs = vec![image(1, 1, 4, 1), image(2, 2, 3, 1), image(3, 1, 8, 0)];
    check(config, 0, seqs, &["a+[0..6]* b+[0..2] c+[0..1]", "b[2..6]*", "c[1..9]*"]).drain(0);
}

#[test]
fn the_encoder_cache_is_shared_and_evicted_when_unused() {
    let config = SchedulerConfig { encoder_cache_tokens: 8, enable_prefix_caching: false, ..config() };
    let mut driver = check(config, 0, vec![image(1, 1, 6, 1), image(1, 0, 6, 1)], &["a+[0..8]* b+[0..7]*"]);
    driver.add(image(2, 1, 3, 1)).unwrap();
    let plan = driver.schedule().unwrap();
    assert_eq!((plan.evict_media, plan.encode.len()), (vec![[1; 32]], 1));
    let stats = driver.scheduler.stats();
    assert_eq!((stats.mm_cache_queries, stats.mm_cache_hits, stats.encoder_cache_tokens), (3, 1, 3));
    driver.drain(0);
}

#[test]
fn cancelled_blocks_are_free_before_the_next_step_or_after_the_one_in_flight() {
    let free = |driver: &Driver| driver.scheduler.stats().num_free_blocks;
    let mut driver = check(config(), 0, vec![text(prompt(1, 8), 9)], &["a+[0..8]*"]);
    let id = *driver.seqs.keys().next().unwrap();
    assert_eq!(free(&driver), 14);
    driver.cancel(id);
    assert_eq!(free(&driver), 16);
    assert!(!driver.scheduler.has_work());

    let mut driver = check(config(), 1, vec![text(prompt(1, 8), 9)], &["a+[0..8]*"]);
    driver.cancel(id);
    assert_eq!(free(&driver), 14, "the step in flight still writes them");
    assert!(driver.scheduler.has_work());
    driver.complete(Sampling::One);
    assert_eq!(free(&driver), 16);
    driver.scheduler.finish(id);
    assert!(!driver.scheduler.has_work(), "ending what has ended changes nothing");
}

#[test]
fn a_step_in_flight_keeps_its_slot() {
    let config = SchedulerConfig { max_num_seqs: 1, ..config() };
    let mut driver = check(config, 1, vec![text(prompt(1, 4), 5), text(prompt(2, 4), 1)], &["a+[0..4]*"]);
    let id = *driver.seqs.keys().next().unwrap();
    driver.cancel(id);
    check_next(&mut driver, 1, &["-", "b+[0..4]*"]);
    driver.drain(1);
}

/// Brings tokens one by one to a sequence with these rules: the end must be this, after that many tokens.
fn check_stop(change: impl Fn(&mut NewSequence), tokens: &[TokenId], expect: (Option<Finish>, usize)) {
    let config = SchedulerConfig { max_model_len: 12, ..config() };
    let mut scheduler = spark_scheduler::Scheduler::new(config).expect("the configuration is valid");
    let mut seq = NewSequence { ignore_eos: false, ..text(prompt(1, 4), 5) };
    change(&mut seq);
    let id = scheduler.add(seq).expect("the sequence fits");
    let mut output = Vec::new();
    let mut finish = None;
    for &token in tokens {
        let Some(plan) = scheduler.schedule() else { break };
        for update in scheduler.complete(plan.id, &[(id, vec![token])]) {
            output.extend(update.tokens);
            finish = update.finish;
        }
        assert_eq!(scheduler.check_integrity(), Ok(()));
    }
    assert_eq!((finish, output.len()), expect);
    assert_eq!(scheduler.has_work(), finish.is_none());
}

#[test]
fn stop_rules() {
    check_stop(|_| (), &[5, EOS, 6], (Some(Finish::Eos), 2));
    check_stop(|seq| seq.ignore_eos = true, &[5, EOS, 6], (None, 3));
    check_stop(|seq| seq.stop_token_ids = vec![6], &[5, 6, 7], (Some(Finish::StopToken(6)), 2));
    check_stop(|seq| seq.stop_token_ids = vec![EOS], &[EOS], (Some(Finish::Eos), 1));
    check_stop(|seq| seq.min_tokens = 2, &[EOS, EOS, EOS], (Some(Finish::Eos), 3));
    check_stop(|_| (), &[5; 9], (Some(Finish::Length), 5));
    check_stop(|_| (), &[5, 5, 5, 5, EOS], (Some(Finish::Eos), 5));
    check_stop(|seq| seq.max_tokens = 100, &[5; 20], (Some(Finish::Length), 8));
}

#[test]
fn sequences_that_never_fit_are_refused() {
    let check = |seq: NewSequence, expect: AddError| {
        let small = SchedulerConfig { num_blocks: 4, max_model_len: 20, ..config() };
        let mut driver = Driver::new(small);
        assert_eq!(driver.scheduler.max_tokens_that_fit(), 16);
        assert_eq!(driver.add(seq).unwrap_err(), expect);
        driver.add(text(prompt(1, 12), 4)).unwrap();
        driver.drain(0);
    };
    check(text(vec![], 1), AddError::Empty { num_prompt_tokens: 0, max_tokens: 1 });
    check(text(vec![1], 0), AddError::Empty { num_prompt_tokens: 1, max_tokens: 0 });
    check(text(prompt(1, 20), 1), AddError::PromptTooLong { num_prompt_tokens: 20, max_model_len: 20 });
    check(text(prompt(1, 12), 5), AddError::OverKvCache { num_tokens: 17, capacity: 16 });
    check(text(prompt(1, 12), usize::MAX), AddError::OverKvCache { num_tokens: 20, capacity: 16 });
    let over = |media| NewSequence { media, ..image(1, 1, 4, 1) };
    let span = |offset, num_tokens| MediaSpan { hash: [1; 32], offset, num_tokens };
    let bad = |media_idx, offset, end| AddError::BadSpan { media_idx, offset, end, num_prompt_tokens: 6 };
    check(over(vec![span(1, 0)]), bad(0, 1, 1));
    check(over(vec![span(1, 3), span(3, 2)]), bad(1, 3, 5));
    check(over(vec![span(usize::MAX, 2)]), bad(0, usize::MAX, usize::MAX));
    let mut driver = Driver::new(SchedulerConfig { encoder_cache_tokens: 3, ..config() });
    let expect = AddError::OverEncoderCache { media_idx: 0, num_tokens: 4, capacity: 3 };
    assert_eq!(driver.add(image(1, 1, 4, 1)).unwrap_err(), expect);
}

#[test]
fn configurations_without_a_step_are_refused() {
    let check = |config: SchedulerConfig, expect: ConfigError| {
        assert_eq!(spark_scheduler::Scheduler::new(config).err(), Some(expect));
    };
    check(SchedulerConfig { block_size: 0, ..config() }, ConfigError::Zero { field: "block_size" });
    check(
        SchedulerConfig { max_chunk_tokens: Some(0), ..config() },
        ConfigError::Zero { field: "max_chunk_tokens" },
    );
    let expect = ConfigError::BudgetBelowSeqs { max_num_batched_tokens: 16, max_num_seqs: 17 };
    check(SchedulerConfig { max_num_seqs: 17, ..config() }, expect);
}
