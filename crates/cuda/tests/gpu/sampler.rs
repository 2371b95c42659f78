//! Sampling against the CPU backend: token by token, over every parameter, from histories, masks and prompts; and how long
//! it takes. What runs both is in `sampler_pair.rs`.

use half::bf16;
use spark_backend::{Backend, Bytes, Dtype, LinearWeight, Matrix, MatrixData, SlotParams, StepOutput};
use spark_cuda::{Event, Linear, MAX_ALTERNATIVES, MAX_NAMED_TOKENS, PackedHost, Sampler, StepView, Wanted};
use spark_testing::Random;

use super::cpu_tensor;
use super::sampler_pair::{Pair, Row, same_logprobs, sampled, warm};

const REAL_VOCAB: usize = 151_936;

#[test]
fn greedy_rows_take_the_lowest_of_the_highest() {
    let mut random = Random::new(61);
    for (rows, vocab, columns) in [
        (1, 5, 5),
        (3, 31, 37),
        (2, 128, 128),
        (7, 2047, 2048),
        (5, 2049, 2050),
        (5, 8193, 8196),
        (300, 900, 1000),
        (128, 16_001, 16_032),
        (1, REAL_VOCAB, REAL_VOCAB),
        (33, 151_669, REAL_VOCAB),
    ] {
        let mut pair = Pair::new(rows, vocab, columns);
        for slot in 0..rows {
            pair.admit(slot, &SlotParams::greedy());
        }
        for round in 0..3 {
            // Few distinct values: every row has ties. What is behind the vocabulary is never chosen.
            let mut logits = pair.random_logits(&mut random, rows, 3.0);
            for row in logits.chunks_exact_mut(columns) {
                row[..vocab].iter_mut().for_each(|x| *x = x.round().clamp(-6.0, 6.0));
                row[vocab..].fill(50.0);
            }
            let (first, last) = (&mut logits[..], rows - 1);
            match round {
                0 => (),
                1 => {
                    first[..vocab].fill(f32::NEG_INFINITY);
                    first[last * columns + vocab - 1] = 7.0;
                }
                _ => {
                    first[..vocab].fill(f32::NAN);
                    first[last * columns + vocab / 2] = f32::NAN;
                    first[last * columns] = -0.0;
                }
            }
            pair.step(&logits, &sampled(0..rows));
        }
        pair.expect_equal(0);
    }
}

/// Every parameter alone, then many together.
fn variants() -> Vec<SlotParams> {
    let many_biases: Vec<(u32, f32)> = (0..900).map(|i| (i, (i as f32 * 0.7).sin() * 4.0)).collect();
    let prompt: Vec<u32> = (0..500).map(|i| i * 7 % 997).collect();
    let mut variants = vec![
        SlotParams::greedy(),
        warm(1),
        SlotParams { temperature: 0.05, ..warm(2) },
        SlotParams { temperature: 5.0, ..warm(3) },
        SlotParams { top_k: 1, ..warm(4) },
        SlotParams { top_k: 20, ..warm(5) },
        SlotParams { top_k: 5000, ..warm(6) },
        SlotParams { top_p: 0.0, ..warm(7) },
        SlotParams { top_p: 0.8, ..warm(8) },
        SlotParams { top_p: 0.9999, ..warm(9) },
        SlotParams { min_p: 0.05, ..warm(10) },
        SlotParams { min_p: 1.0, ..warm(11) },
        SlotParams { top_k: 20, top_p: 0.8, ..warm(12) },
        SlotParams { top_k: 50, top_p: 0.95, min_p: 0.02, ..warm(13) },
        SlotParams { top_p: 0.5, min_p: 0.2, ..warm(14) },
        SlotParams { logit_bias: vec![(3, 5.0), (996, 100.0), (5000, 9.0)], ..SlotParams::greedy() },
        SlotParams { logit_bias: many_biases.clone(), ..warm(15) },
        SlotParams { stop_token_ids: (0..300).collect(), min_tokens: 5, ..SlotParams::greedy() },
        SlotParams { stop_token_ids: vec![1, 900, 4000], min_tokens: 1000, ..warm(16) },
        SlotParams { repetition_penalty: 1.3, prompt: prompt.clone(), ..SlotParams::greedy() },
        SlotParams { presence_penalty: 1.5, ..SlotParams::greedy() },
        SlotParams { frequency_penalty: 0.7, ..SlotParams::greedy() },
        SlotParams { frequency_penalty: -0.5, output: vec![5, 5, 5, 996], ..warm(17) },
    ];
    variants.push(SlotParams {
        top_k: 40,
        top_p: 0.9,
        min_p: 0.01,
        repetition_penalty: 1.1,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        logit_bias: many_biases,
        stop_token_ids: vec![0, 1, 2],
        min_tokens: 3,
        logprobs: Some(3),
        prompt,
        output: vec![9, 9, 8],
        ..warm(18)
    });
    variants
}

#[test]
fn every_parameter_gives_the_cpu_backends_tokens() {
    // Rows that begin at any address, and rows of whole vectors.
    for (vocab, columns) in [(997, 1001), (997, 1024)] {
        let variants = variants();
        let mut pair = Pair::new(variants.len(), vocab, columns);
        let mut random = Random::new(62);
        for (slot, params) in variants.iter().enumerate() {
            pair.admit(slot, params);
        }
        for step in 0..60 {
            // Peaked, usual and flat distributions, and one with many ties.
            let std = [3.0, 8.0, 0.3, 1.0][step % 4];
            let mut logits = pair.random_logits(&mut random, variants.len(), std);
            if step % 4 == 3 {
                logits.iter_mut().for_each(|x| *x = (2.0 * *x).round() / 2.0);
            }
            pair.step(&logits, &sampled(0..variants.len()));
        }
        pair.expect_equal(1);
    }
}

/// Ranks that have a share of the tokens each: shares that begin anywhere, more ranks than tokens, masks that allow tokens of one
/// share or none.
#[test]
fn shares_give_the_tokens_of_the_whole() {
    let variants: Vec<SlotParams> = variants()
        .into_iter()
        .filter(|params| params.top_k == 0 && params.top_p >= 1.0 && params.min_p == 0.0)
        .map(|params| SlotParams { logprobs: None, ..params })
        .collect();
    assert!(variants.len() > 8);
    let mask = |vocab: usize, tokens: std::ops::Range<usize>| {
        let mut mask = vec![0u32; vocab.div_ceil(32)];
        tokens.for_each(|token| mask[token / 32] |= 1 << (token % 32));
        Some(mask)
    };
    let mut random = Random::new(69);
    for (vocab, columns, num_shares) in
        [(997, 1001, 2), (997, 1024, 2), (997, 1003, 3), (500, 1024, 2), (5, 6, 8), (151_669, REAL_VOCAB, 2)]
    {
        let mut pair = Pair::new(variants.len(), vocab, columns);
        pair.num_shares = num_shares;
        for (slot, params) in variants.iter().enumerate() {
            pair.admit(slot, params);
        }
        for step in 0..if vocab > 1000 { 4 } else { 40 } {
            let mut rows = sampled(0..variants.len());
            if step % 3 == 2 {
                rows[0].mask = mask(vocab, 0..vocab / 7);
                rows[1].mask = mask(vocab, vocab - 1..vocab);
                rows[2].mask = mask(vocab, 0..0);
                rows.swap(3, 4);
                rows.insert(2, Row::default());
            }
            let mut logits = pair.random_logits(&mut random, rows.len(), [3.0, 8.0, 0.3, 1.0][step % 4]);
            if step % 4 == 3 {
                logits.iter_mut().for_each(|x| *x = (2.0 * *x).round() / 2.0);
            }
            pair.step(&logits, &rows);
        }
        pair.expect_equal(1);
    }
    let mut pair = Pair::new(3, 100, 100);
    let asks = [
        SlotParams { logprobs: Some(0), ..SlotParams::greedy() },
        SlotParams { top_p: 0.9, ..warm(1) },
        SlotParams { top_p: 0.9, ..SlotParams::greedy() },
    ];
    for (slot, params) in asks.iter().enumerate() {
        pair.admit(slot, params);
    }
    let takes = |rows: &[Row]| pair.sampler.takes_shares(&pair.inputs(rows));
    assert_eq!([0, 1, 2].map(|slot| takes(&sampled(slot..slot + 1))), [false, false, true]);
    assert!(!takes(&[Row { target: Some((1, 0)), ..Row::default() }]) && takes(&[Row::default()]));
}

#[test]
fn thousands_of_draws_are_the_cpu_backends() {
    let num_slots = 64;
    let mut pair = Pair::new(num_slots, 4000, 4096);
    let mut random = Random::new(63);
    for slot in 0..num_slots {
        let seed = random.next_u64();
        let filters = [(0, 1.0, 0.0), (20, 0.8, 0.0), (0, 0.95, 0.0), (0, 1.0, 0.05)][slot % 4];
        let (top_k, top_p, min_p) = filters;
        pair.admit(slot, &SlotParams { temperature: 1.0, top_k, top_p, min_p, ..warm(seed) });
    }
    for _ in 0..60 {
        let logits = pair.random_logits(&mut random, num_slots, 2.0);
        pair.step(&logits, &sampled(0..num_slots));
    }
    pair.expect_equal(2);
}

#[test]
fn filters_are_exact_over_a_real_vocabulary() {
    let filters = |seed| {
        vec![
            warm(seed),
            SlotParams { top_k: 20, top_p: 0.8, ..warm(seed) },
            SlotParams { top_p: 0.95, temperature: 1.0, ..warm(seed) },
            SlotParams { top_k: 3000, ..warm(seed) },
            SlotParams { top_k: 30_000, top_p: 0.5, ..warm(seed) },
            SlotParams { min_p: 0.001, temperature: 1.2, ..warm(seed) },
            SlotParams { top_p: 0.999, min_p: 1e-4, ..warm(seed) },
            SlotParams { top_k: 1, temperature: 0.01, ..warm(seed) },
            SlotParams { top_k: 70, temperature: 0.02, logprobs: Some(20), ..warm(seed) },
        ]
    };
    let num_slots = filters(0).len();
    let mut pair = Pair::new(num_slots, 151_669, REAL_VOCAB);
    for (slot, params) in filters(5).iter().enumerate() {
        pair.admit(slot, params);
    }
    let mut random = Random::new(64);
    // Usual; so flat that thousands lie near a threshold; nothing but ties; two values; one far above the others.
    for kind in 0..6 {
        let mut logits = pair.random_logits(&mut random, num_slots, [3.0, 1.0, 0.05, 0.0, 1.0, 1.0][kind]);
        match kind {
            3 => logits.fill(1.5),
            4 => logits.iter_mut().for_each(|x| *x = if *x > 0.0 { 2.0 } else { 1.0 }),
            5 => logits.iter_mut().step_by(1000).for_each(|x| *x += 60.0),
            _ => (),
        }
        pair.step(&logits, &sampled(0..num_slots));
    }
    pair.expect_equal(1);
}

#[test]
fn draws_follow_the_distribution() {
    let probabilities = [0.4f64, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01];
    let num_slots = 128;
    let mut pair = Pair::new(num_slots, probabilities.len(), 8);
    for slot in 0..num_slots {
        pair.admit(slot, &SlotParams { temperature: 1.0, ..warm(slot as u64 * 7919) });
    }
    let row: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).chain([30.0]).collect();
    let logits = row.repeat(num_slots);
    let (tensor, rows) = (pair.bed.tensor(&logits, [num_slots, 8], Dtype::F32), sampled(0..num_slots));
    let (mut counts, num_steps) = ([0f64; 7], 200);
    for _ in 0..num_steps {
        for token in pair.sample(&tensor, &pair.inputs(&rows)).sampled {
            counts[token.token as usize] += 1.0;
        }
    }
    let total = (num_slots * num_steps) as f64;
    let chi_square: f64 =
        counts.iter().zip(probabilities).map(|(n, p)| (n - p * total).powi(2) / (p * total)).sum();
    // Six degrees of freedom: above 27.9 once in ten thousand times.
    assert!(chi_square < 27.9, "{chi_square}: {counts:?}");
}

#[test]
fn masks_win_and_a_row_without_candidates_still_has_a_token() {
    let vocab = 70usize;
    let allow = |tokens: &[usize]| {
        let mut mask = vec![0u32; vocab.div_ceil(32)];
        tokens.iter().for_each(|token| mask[token / 32] |= 1 << (token % 32));
        Some(mask)
    };
    let stopped = SlotParams { stop_token_ids: vec![1, 69], min_tokens: 100, ..SlotParams::greedy() };
    let params = [
        SlotParams::greedy(),
        warm(3),
        SlotParams { top_k: 5, top_p: 0.9, ..warm(4) },
        stopped.clone(),
        stopped,
        SlotParams { logprobs: Some(2), ..warm(5) },
        SlotParams { logit_bias: (0..70).map(|i| (i, f32::NEG_INFINITY)).collect(), ..warm(6) },
    ];
    let masks = [
        allow(&[5, 31, 69]),
        allow(&[0, 33, 64]),
        allow(&[2, 3, 32, 40, 41, 68]),
        allow(&[1, 69]),
        None,
        allow(&[]),
        allow(&[8, 9]),
    ];
    let mut pair = Pair::new(params.len(), vocab, 72);
    for (slot, params) in params.iter().enumerate() {
        pair.admit(slot, params);
    }
    let mut random = Random::new(65);
    for _ in 0..40 {
        let logits = pair.random_logits(&mut random, params.len(), 2.0);
        let rows: Vec<Row> = masks
            .iter()
            .enumerate()
            .map(|(slot, mask)| Row { slot: Some(slot), mask: mask.clone(), target: None })
            .collect();
        pair.step(&logits, &rows);
    }
    pair.expect_equal(0);
}

#[test]
fn a_history_survives_preemption_and_slots_forget_their_predecessors() {
    let (vocab, num_slots) = (50, 6);
    let params = |slot: usize| SlotParams {
        repetition_penalty: 1.2,
        presence_penalty: 0.1 * slot as f32,
        frequency_penalty: 0.05,
        temperature: if slot.is_multiple_of(2) { 0.0 } else { 0.7 },
        prompt: vec![1, 2, 3, slot as u32],
        ..warm(slot as u64)
    };
    let mut pair = Pair::new(num_slots, vocab, 52);
    for slot in 0..num_slots {
        pair.admit(slot, &params(slot));
    }
    let mut random = Random::new(66);
    for step in 0..400 {
        if step % 37 == 0 {
            // Preempted and resumed, in another slot.
            let (from, to) = (random.below(num_slots), random.below(num_slots));
            let resumed = SlotParams { output: pair.outputs[from].clone(), ..pair.params[from].clone() };
            pair.admit(to, &resumed);
        }
        if step % 53 == 0 {
            pair.admit(random.below(num_slots), &SlotParams::greedy());
        }
        let logits = pair.random_logits(&mut random, num_slots, 0.7);
        pair.step(&logits, &sampled(0..num_slots));
    }
    pair.expect_equal(1);
}

#[test]
fn log_probabilities_and_ranks_are_those_of_the_whole_head() {
    let mut random = Random::new(67);
    for (vocab, columns) in [(30, 33), (1000, 1024), (151_669, REAL_VOCAB)] {
        let num_slots = 5;
        let mut pair = Pair::new(num_slots, vocab, columns);
        let asked = [None, Some(0), Some(1), Some(20), Some(MAX_ALTERNATIVES)];
        for (slot, logprobs) in asked.into_iter().enumerate() {
            let base = if slot == 3 { SlotParams { top_k: 10, ..warm(1) } } else { SlotParams::greedy() };
            pair.admit(slot, &SlotParams { logprobs, ..base });
        }
        let mut rows = sampled(0..num_slots);
        // Rows of a prompt: a likely target, an unlikely one, and one beside a sampled token.
        rows.insert(2, Row { target: Some((7, 5)), ..Row::default() });
        rows.push(Row { target: Some((vocab as u32 - 1, 0)), ..Row::default() });
        rows[0].target = Some((0, MAX_ALTERNATIVES));
        rows.push(Row::default());
        for std in [2.0, 0.01] {
            let mut logits = pair.random_logits(&mut random, rows.len(), std);
            // Ties around the best, and padding above them.
            for row in logits.chunks_exact_mut(columns) {
                row[..vocab].iter_mut().step_by(3).for_each(|x| *x = (*x * 4.0).round() / 4.0);
                row[vocab..].fill(2.0);
            }
            logits[2 * columns + 7] = 11.0;
            pair.step(&logits, &rows);
        }
        pair.expect_equal(0);
    }
}

/// Named tokens beside alternatives, after a predecessor in the slot that named more, and with filters, masks and ties.
#[test]
fn named_tokens_have_their_log_probabilities() {
    let mut random = Random::new(70);
    for (vocab, columns) in [(200, 203), (997, 1024), (151_669, REAL_VOCAB)] {
        let mut pair = Pair::new(5, vocab, columns);
        let mut some =
            |count: usize| -> Vec<u32> { (0..count).map(|_| random.below(vocab) as u32).collect() };
        let lists = [some(MAX_NAMED_TOKENS), vec![vocab as u32 - 1, 0], some(7), vec![3], Vec::new()];
        for step in 0..6 {
            for slot in 0..5 {
                let base =
                    if slot % 2 == 1 { SlotParams { top_p: 0.9, ..warm(1) } } else { SlotParams::greedy() };
                let named_tokens = lists[(slot + step) % 5].clone();
                pair.admit(slot, &SlotParams { logprobs: Some(4 * slot), named_tokens, ..base });
            }
            let mut rows = sampled(0..5);
            rows[2].mask = Some((0..vocab.div_ceil(32)).map(|word| u32::from(word == 0) << 5).collect());
            rows.push(Row { target: Some((1, 3)), ..Row::default() });
            let mut logits = pair.random_logits(&mut random, rows.len(), [2.0, 0.01][step % 2]);
            logits[..vocab].iter_mut().step_by(3).for_each(|x| *x = x.round());
            logits[columns] = f32::NEG_INFINITY;
            let output = pair.step(&logits, &rows);
            for sampled in &output.sampled {
                assert_eq!(sampled.named.len(), lists[(sampled.slot + step) % 5].len());
            }
        }
        pair.expect_equal(1);
        // Without log-probabilities nothing is reported, whatever is named.
        let silent = SlotParams { named_tokens: vec![1], ..SlotParams::greedy() };
        pair.admit(0, &silent);
        let logits = pair.random_logits(&mut random, 1, 1.0);
        assert!(pair.step(&logits, &sampled(0..1)).sampled[0].named.is_empty());
    }
}

#[test]
fn the_sampled_token_is_the_next_steps_pending_one() {
    let (vocab, hidden) = (300, 80);
    let mut pair = Pair::new(4, vocab, vocab);
    let mut random = Random::new(68);
    for slot in 0..4 {
        pair.admit(slot, &SlotParams { output: vec![slot as u32 + 40], ..warm(slot as u64) });
    }
    let values = random.bf16s(vocab * hidden, 1.0);
    let bytes: Bytes = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    let data = MatrixData::Dense { dtype: Dtype::Bf16, values: bytes };
    let parts = vec![Matrix { n: vocab, k: hidden, data }];
    let host = [PackedHost::pack(&LinearWeight { parts, bias: None }).unwrap()];
    let table = Linear::upload(&pair.bed.stream, &pair.bed.bytes(Linear::num_bytes(&host)), &host).unwrap();
    let ids = pair.bed.upload(&[1u32 << 31 | 2, 7, 1 << 31, 1 << 31 | 3, 1 << 31 | 9]);
    let embed = |pair: &Pair| {
        let out = pair.bed.empty([5, hidden], Dtype::Bf16);
        let (bed, last) = (&pair.bed, pair.sampler.last_tokens());
        bed.kernels.embed(&bed.stream, &ids, last, &table, 0, &out).unwrap();
        bed.values(&out)
    };
    let expect = |pair: &Pair, tokens: [u32; 4]| {
        let rows = tokens.iter().flat_map(|&token| &values[token as usize * hidden..][..hidden]);
        let want: Vec<f32> = rows.copied().chain(vec![0.0; hidden]).collect();
        assert_eq!(embed(pair), want, "{tokens:?}");
    };
    expect(&pair, [42, 7, 40, 43]);
    let logits = pair.random_logits(&mut random, 4, 3.0);
    let output = pair.step(&logits, &sampled(0..4));
    pair.expect_equal(0);
    let token = |slot: usize| output.sampled[slot].token;
    expect(&pair, [token(2), 7, token(0), token(3)]);
}

#[test]
fn one_recorded_step_serves_every_mix() {
    let (num_slots, vocab) = (8, 5000);
    let mut pair = Pair::new(num_slots, vocab, 5024);
    let mut random = Random::new(69);
    let logits = pair.random_logits(&mut random, num_slots, 3.0);
    let tensor = pair.bed.tensor(&logits, [num_slots, 5024], Dtype::F32);
    for slot in 0..num_slots {
        pair.admit(slot, &SlotParams::greedy());
    }
    let mut rows = sampled(0..num_slots);
    // The key's padding: two rows of nobody.
    (rows[6].slot, rows[7].slot) = (None, None);
    let upload = |pair: &Pair, rows: &[Row]| {
        let inputs = pair.inputs(rows);
        let view = StepView::upload(&pair.bed.stream, &pair.step, &inputs, inputs.key(), vocab).unwrap();
        (view, Wanted::new(&pair.sampler, &inputs).unwrap(), inputs)
    };
    let (view, ..) = upload(&pair, &rows);
    let graph = pair
        .bed
        .stream
        .record(|| pair.bed.kernels.sample(&pair.bed.stream, &tensor, &view, &pair.sampler, &pair.out))
        .unwrap();
    assert_eq!(graph.num_nodes(), 4);
    let host = cpu_tensor(&pair.backend, &logits, [num_slots, 5024]);
    for step in 0..4u64 {
        if step > 0 {
            let many = SlotParams { top_k: 20, top_p: 0.9, logprobs: Some(3), ..warm(step) };
            pair.admit(step as usize, &many);
            pair.admit(7, &SlotParams { min_p: 0.1, frequency_penalty: 1.0, ..warm(step) });
            rows[7].slot = Some(7);
            rows[6].target = Some((17, 4));
        }
        let (_, wanted, inputs) = upload(&pair, &rows);
        graph.launch(&pair.bed.stream).unwrap();
        let got = pair.read(&wanted);
        pair.backend.step(&inputs, &mut |b| b.sample(&host)).unwrap();
        let want = pair.backend.output().unwrap();
        let tokens = |output: &StepOutput| -> Vec<u32> { output.sampled.iter().map(|s| s.token).collect() };
        assert_eq!(tokens(&got), tokens(&want), "step {step}");
        for (got, want) in got.prompt_logprobs.iter().zip(&want.prompt_logprobs) {
            same_logprobs(&(got.1, got.2.clone()), &(want.1, want.2.clone()));
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let mut pair = Pair::new(2, 100, 104);
    let stream = &pair.bed.stream;
    assert!(pair.bed.kernels.admit(stream, &mut pair.sampler, 2, &SlotParams::greedy()).is_err());
    let greedy = SlotParams { logprobs: Some(MAX_ALTERNATIVES + 1), ..SlotParams::greedy() };
    let error = pair.bed.kernels.admit(stream, &mut pair.sampler, 0, &greedy).unwrap_err().to_string();
    assert_eq!(error, "sampler: expected at most 64 alternatives, got Some(65)");
    for named_tokens in [vec![0; MAX_NAMED_TOKENS + 1], vec![100]] {
        let named = SlotParams { logprobs: Some(0), named_tokens, ..SlotParams::greedy() };
        assert!(pair.bed.kernels.admit(stream, &mut pair.sampler, 0, &named).is_err());
    }
    assert!(Sampler::new(stream, &pair.bed.bytes(1000), 2, 100).is_err());
    let memory = pair.bed.bytes(Sampler::num_bytes(1, 8));
    assert!(Sampler::new(stream, &memory, 1, 0).is_err());
    let inputs = pair.inputs(&sampled(0..2));
    let view = StepView::upload(stream, &pair.step, &inputs, inputs.key(), 100).unwrap();
    let sample = |shape, dtype| {
        let logits = pair.bed.empty(shape, dtype);
        pair.bed.kernels.sample(stream, &logits, &view, &pair.sampler, &pair.out)
    };
    assert!(sample([2, 100], Dtype::F32).is_ok());
    assert!(sample([2, 99], Dtype::F32).is_err());
    assert!(sample([3, 100], Dtype::F32).is_err());
    assert!(sample([2, 100], Dtype::Bf16).is_err());
    let mut wrong = inputs.clone();
    wrong.sample_slots[0] = Some(2);
    assert!(Wanted::new(&pair.sampler, &wrong).is_err());
    wrong.sample_slots[0] = None;
    wrong.prompt_targets[0] = Some((100, 0));
    assert!(Wanted::new(&pair.sampler, &wrong).is_err());
}

/// Not a bound on speed, which is the reader's.
#[test]
fn measurements_of_sampling() {
    let kinds: [(&str, SlotParams, f32); 8] = [
        ("greedy", SlotParams::greedy(), 3.0),
        ("temperature", warm(1), 3.0),
        ("top_k 20, top_p 0.8", SlotParams { top_k: 20, top_p: 0.8, ..warm(1) }, 3.0),
        ("top_p 0.95", SlotParams { top_p: 0.95, temperature: 1.0, ..warm(1) }, 3.0),
        (
            "top_k, penalties, min_p",
            SlotParams { top_k: 50, min_p: 0.01, frequency_penalty: 0.1, ..warm(1) },
            3.0,
        ),
        ("greedy, 20 logprobs", SlotParams { logprobs: Some(20), ..SlotParams::greedy() }, 3.0),
        ("top_p 0.95, logprobs", SlotParams { top_p: 0.95, logprobs: Some(5), ..warm(1) }, 3.0),
        ("flat, top_p 0.95", SlotParams { top_p: 0.95, temperature: 1.0, ..warm(1) }, 0.1),
    ];
    for num_rows in [1, 64, 128] {
        let mut pair = Pair::new(num_rows, 151_669, REAL_VOCAB);
        let rows = sampled(0..num_rows);
        for (name, params, std) in &kinds {
            // Many rows alike: the numbers do not matter to the time.
            let one = Random::new(70).normals(REAL_VOCAB, *std);
            let logits = pair.bed.tensor(&one.repeat(num_rows), [num_rows, REAL_VOCAB], Dtype::F32);
            (0..num_rows).for_each(|slot| pair.admit_gpu(slot, params));
            let inputs = pair.inputs(&rows);
            let stream = &pair.bed.stream;
            let view = StepView::upload(stream, &pair.step, &inputs, inputs.key(), 151_669).unwrap();
            let launches = 20;
            let graph = stream
                .record(|| {
                    (0..launches).try_for_each(|_| {
                        pair.bed.kernels.sample(stream, &logits, &view, &pair.sampler, &pair.out)
                    })
                })
                .unwrap();
            let (start, end) = (Event::new(stream.device()).unwrap(), Event::new(stream.device()).unwrap());
            let mut times: Vec<f64> = (0..5)
                .map(|_| {
                    start.record(stream).unwrap();
                    graph.launch(stream).unwrap();
                    end.record(stream).unwrap();
                    end.synchronize().unwrap();
                    end.micros_since(&start).unwrap() / f64::from(launches)
                })
                .collect();
            times.sort_by(f64::total_cmp);
            println!("sample {num_rows:4} x {REAL_VOCAB} {name:24} {:8.2} us", times[2]);
            assert!(times[2] > 0.0);
        }
    }
}
