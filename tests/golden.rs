//! Every fixture in every format against transformers: intermediate results layer by layer, then greedy ids through the
//! whole engine (template, tokenizer, image processing, scheduler, sampler).

use spark_engine::{
    Dtype,
    api::{Event, SamplingParams},
};
use spark_testing::{
    Case, Oracle, kl_divergence, model_names, rel_err,
    tolerance::{BFLOAT16, BFLOAT16_MOE_LOGPROB, FLOAT32, ModelTolerance},
};

use crate::support::{self, forward::Forward};

/// Worst relative error of each kind of intermediate result of `case`, and of the logits.
fn layer_errors(forward: &mut Forward, case: &Case) -> Vec<(String, f64)> {
    let taps = forward.run(case);
    let mut errors = Vec::new();
    let mut compare =
        |name: &str, got: &[f32], expected: &[f32]| errors.push((name.to_owned(), rel_err(got, expected)));
    for (name, (values, _)) in taps.iter().filter(|(name, _)| case.has(name) && *name != "logits") {
        compare(name, values, case.tensor(name).unwrap().0);
    }
    let mut layer = 0;
    while case.has(&format!("layer{layer}_out")) {
        let (out, shape) = case.tensor(&format!("layer{layer}_out")).unwrap();
        let after = taps.get(&format!("layer{}_in", layer + 1)).or(taps.get("norm_in")).unwrap();
        let expected = with_deepstack(out.to_vec(), shape[1], case, layer);
        compare(&format!("layer{layer}_out"), &after.0, &expected);
        layer += 1;
    }
    assert!(layer > 0, "{}: the oracle has no layers to compare with", case.name);
    let (logits, shape) = case.tensor("logits").unwrap();
    let ours = &taps["logits"].0;
    compare("logits", &ours[ours.len() - shape[0] * shape[1]..], logits);
    errors
}

/// The oracle's layer output is from before the deepstack rows; the next layer's input has them.
fn with_deepstack(mut out: Vec<f32>, hidden: usize, case: &Case, layer: usize) -> Vec<f32> {
    let name = format!("deepstack{layer}");
    if case.media.is_empty() || !case.has(&name) {
        return out;
    }
    let (rows, _) = case.tensor(&name).unwrap();
    let placeholder = support::placeholder(case);
    let positions = case.prompt_ids.iter().enumerate().filter(|(_, id)| **id == placeholder).map(|(i, _)| i);
    for (row, position) in rows.chunks(hidden).zip(positions) {
        for (value, add) in out[position * hidden..].iter_mut().zip(row) {
            *value += add;
        }
    }
    out
}

fn check_layers(prefix: &str, dtype: Dtype, tolerance: ModelTolerance) {
    let mut num_cases = 0;
    let mut worst: Vec<(String, f64)> = Vec::new();
    for model in model_names(prefix).unwrap() {
        let oracle = Oracle::load(&model).unwrap();
        let mut forward = Forward::load(&model, dtype);
        for case in oracle.cases.values().filter(|case| case.has("layer0_out")) {
            for (name, error) in layer_errors(&mut forward, case) {
                let limit = if name == "logits" { tolerance.logits } else { tolerance.hidden };
                if error > limit {
                    worst.push((format!("{model}/{}: {name}", case.name), error));
                }
            }
            num_cases += 1;
        }
    }
    assert!(num_cases > 0, "no fixture starts with {prefix}");
    assert!(worst.is_empty(), "over the tolerance: {worst:#?}");
}

#[test]
fn float32_layers_of_moe_vl() {
    check_layers("moe_vl", Dtype::F32, FLOAT32);
}

#[test]
fn float32_layers_of_dense_vl() {
    check_layers("dense_vl", Dtype::F32, FLOAT32);
}

#[test]
fn float32_layers_of_text_models() {
    check_layers("text", Dtype::F32, FLOAT32);
}

/// Rows of a bf16 run that may be off by their own size: those where some layer's router has its last chosen and its
/// first left-out expert so close that a rounding can swap them.
const ROUTER_GAP: f32 = 0.05;

/// Marks in `clear` the rows whose expert choice in `layer` a rounding may change.
fn mark_close_choices(case: &Case, layer: usize, top_k: usize, clear: &mut [bool]) {
    let name = format!("layer{layer}_router_logits");
    if !case.has(&name) {
        return;
    }
    let (logits, shape) = case.tensor(&name).unwrap();
    for (row, clear) in logits.chunks(shape[1]).zip(clear) {
        let mut sorted = row.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        *clear &= sorted[top_k - 1] - sorted[top_k] >= ROUTER_GAP;
    }
}

/// The rows of `values` that are marked.
fn marked_rows(values: &[f32], width: usize, marked: &[bool]) -> Vec<f32> {
    let rows = values.chunks(width).zip(marked).filter(|(_, marked)| **marked);
    rows.flat_map(|(row, _)| row.iter().copied()).collect()
}

/// Errors of independent roundings add in quadrature: after `n` layers, each below 1e-2, the sum is below
/// `1e-2 * sqrt(n)`. Checked over the rows whose routing a rounding cannot change.
#[test]
fn bfloat16_layers_stay_within_a_hundredth_each() {
    let (mut num_rows, mut num_clear, mut over) = (0, 0, Vec::new());
    for model in model_names("").unwrap() {
        let oracle = Oracle::load(&model).unwrap();
        let mut forward = Forward::load(&model, Dtype::Bf16);
        for case in oracle.cases.values().filter(|case| case.has("layer0_out")) {
            let taps = forward.run(case);
            let mut clear = vec![true; case.prompt_ids.len()];
            for layer in (0..).take_while(|layer| case.has(&format!("layer{layer}_out"))) {
                mark_close_choices(case, layer, forward.top_k(), &mut clear);
                let (out, shape) = case.tensor(&format!("layer{layer}_out")).unwrap();
                let after = taps.get(&format!("layer{}_in", layer + 1)).or(taps.get("norm_in")).unwrap();
                let expected = with_deepstack(out.to_vec(), shape[1], case, layer);
                let pick = |values: &[f32]| marked_rows(values, shape[1], &clear);
                let error = rel_err(&pick(&after.0), &pick(&expected));
                if error > 1e-2 * f64::from(layer as u32 + 1).sqrt() {
                    over.push(format!("{model}/{}: layer {layer}: {error}", case.name));
                }
            }
            num_rows += clear.len();
            num_clear += clear.iter().filter(|clear| **clear).count();
        }
    }
    assert!(over.is_empty(), "{over:#?}");
    assert!(num_clear * 10 > num_rows * 9, "only {num_clear} of {num_rows} rows were compared");
}

/// Greedy ids through the engine. Returns how many were compared.
fn check_greedy(model: &str, dtype: Dtype, tolerance: f32) -> usize {
    let oracle = Oracle::load(model).unwrap();
    let engine = support::builder(model, dtype).build().unwrap();
    support::block_on(async {
        let mut compared = 0;
        for case in oracle.cases.values() {
            let body = support::chat_body(case, case.greedy_ids.len());
            let answer = support::answer(&engine, body).await;
            let (prompt, output) = support::prompt_and_output(&answer);
            assert_eq!(prompt, case.prompt_ids, "{model}/{}: prompt", case.name);
            compared += case
                .check_greedy(&output, tolerance)
                .unwrap_or_else(|e| panic!("{model}/{}: {e}", case.name));
        }
        compared
    })
}

#[test]
fn float32_greedy_ids_equal_transformers() {
    for model in model_names("").unwrap() {
        let expected: usize =
            Oracle::load(&model).unwrap().cases.values().map(|case| case.greedy_ids.len()).sum();
        let compared = check_greedy(&model, Dtype::F32, FLOAT32.logprob);
        assert_eq!(compared, expected, "{model}: a float32 run is compared to its end");
    }
}

#[test]
fn bfloat16_greedy_ids_equal_up_to_ties() {
    let models = model_names("").unwrap();
    let tolerance = |model: &str| if model.contains("moe") { BFLOAT16_MOE_LOGPROB } else { BFLOAT16.logprob };
    let compared: usize = models.iter().map(|model| check_greedy(model, Dtype::Bf16, tolerance(model))).sum();
    // Near ties are frequent in random models: this only says that runs were compared at all. What bf16 does along a
    // whole answer is the business of `log_probabilities_along_an_answer`.
    assert!(compared > 2 * models.len(), "only {compared} ids over {} fixtures", models.len());
}

#[test]
fn bfloat16_logits_keep_the_distribution() {
    for model in model_names("").unwrap() {
        let oracle = Oracle::load(&model).unwrap();
        let mut forward = Forward::load(&model, Dtype::Bf16);
        let case = &oracle.cases["text"];
        let taps = forward.run(case);
        let (expected, shape) = case.tensor("logits").unwrap();
        let mut clear = vec![true; case.prompt_ids.len()];
        for layer in (0..).take_while(|layer| case.has(&format!("layer{layer}_out"))) {
            mark_close_choices(case, layer, forward.top_k(), &mut clear);
        }
        let rows = taps["logits"].0.chunks(shape[1]).zip(expected.chunks(shape[1])).zip(&clear);
        let rows = rows.filter(|(_, clear)| **clear).map(|((got, expected), _)| kl_divergence(got, expected));
        let kls: Vec<f64> = rows.collect();
        let mean = kls.iter().sum::<f64>() / kls.len() as f64;
        assert!(mean < BFLOAT16.kl / 3.0, "{model}: mean KL divergence {mean}");
        assert!(kls.iter().all(|kl| *kl < BFLOAT16.kl), "{model}: KL divergences {kls:?}");
    }
}

/// Feeds the oracle's own answer as a prompt and compares the log-probability of each of its tokens: no tie can stop it.
#[test]
fn log_probabilities_along_an_answer() {
    for model in model_names("").unwrap() {
        let oracle = Oracle::load(&model).unwrap();
        let case = &oracle.cases["text"];
        for (dtype, mean_limit) in [(Dtype::F32, 1e-4), (Dtype::Bf16, 0.1)] {
            let differences = logprob_differences(&model, dtype, case);
            assert_eq!(differences.len(), case.greedy_ids.len());
            let mean = differences.iter().sum::<f64>() / differences.len() as f64;
            assert!(mean < mean_limit, "{model}, {dtype:?}: mean difference {mean}, all {differences:?}");
        }
    }
}

fn logprob_differences(model: &str, dtype: Dtype, case: &Case) -> Vec<f64> {
    let engine = support::builder(model, dtype).build().unwrap();
    let prompt: Vec<u32> = case.prompt_ids.iter().chain(&case.greedy_ids).copied().collect();
    let sampling = SamplingParams { prompt_logprobs: Some(0), ..SamplingParams::greedy(1) };
    let mut events = engine.submit(engine.request(prompt, sampling).unwrap()).unwrap();
    let logprobs = support::block_on(async {
        while let Some(event) = events.recv().await {
            if let Event::Prompt { logprobs, .. } = event {
                return logprobs;
            }
        }
        None
    });
    let logprobs = logprobs.expect("prompt log-probabilities were asked for");
    let answer = &logprobs[case.prompt_ids.len()..];
    let pairs = answer.iter().zip(&case.steps).zip(&case.greedy_ids);
    let difference = pairs.map(|((ours, step), &id)| {
        let ours = ours.as_ref().expect("every token but the first has one").token;
        assert_eq!(ours.id, id);
        f64::from(ours.logprob - step.logprobs[0]).abs()
    });
    difference.collect()
}
