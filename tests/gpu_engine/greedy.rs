//! Greedy answers on CUDA against the CPU backend: every fixture and both demo checkpoints, text and images, each format.

use spark_engine::Device;
use spark_testing::{Oracle, model_names};

use crate::{Comparison, Model, alone, ask, taught::logprobs};

/// Tokens of an answer.
const LEN: usize = 40;

/// Compares the answers of one model; `Err` says why it cannot run on a GPU.
fn compare(model: &Model) -> Result<Comparison, String> {
    let gpu = model.engine(Device::Cuda, |_| {}).map_err(|error| error.to_string())?;
    let cpu = model.engine(Device::Cpu, |_| {}).unwrap();
    let mut comparison = Comparison::default();
    for (name, body) in model.bodies(LEN) {
        let (reference, got) = (ask(&cpu, &body), ask(&gpu, &body));
        assert_eq!(got.ids.len(), LEN, "{}/{name}", model.name);
        comparison.add(
            &format!("{}/{name}", model.name),
            &model.said(&reference),
            &model.said(&got),
            model.tolerance(),
        );
    }
    Ok(comparison)
}

#[test]
fn greedy_ids_are_those_of_the_cpu() {
    let _gpu = alone();
    let mut models: Vec<Model> = model_names("").unwrap().iter().map(|name| Model::fixture(name)).collect();
    models.extend(["awq", "bf16"].map(Model::demo));
    let (mut all, mut outside) = (Comparison::default(), Vec::new());
    for model in &models {
        match compare(model) {
            Ok(comparison) => {
                println!("{:30} {}", model.name, comparison.line());
                all.join(comparison);
            }
            Err(reason) => {
                println!("{:30} outside the envelope: {reason}", model.name);
                outside.push(model.name.clone());
            }
        }
    }
    all.finish("greedy ids");
    assert!(outside.is_empty(), "these are inside the envelope: {outside:?}");
    assert!(2 * all.num_compared > all.num_ids, "only {} of {} ids are equal", all.num_compared, all.num_ids);
}

/// No tie can end this comparison: the text is given, not made.
#[test]
fn log_probabilities_along_a_text_are_those_of_the_cpu() {
    let _gpu = alone();
    let mut over = Vec::new();
    let mut num_models = 0;
    for name in model_names("text").unwrap() {
        let (model, oracle) = (Model::fixture(&name), Oracle::load(&name).unwrap());
        let case = &oracle.cases["text"];
        let text: Vec<u32> = case.prompt_ids.iter().chain(&case.greedy_ids).copied().collect();
        let ours = logprobs(&model.engine(Device::Cuda, |_| {}).unwrap(), &text);
        let theirs = logprobs(&model.engine(Device::Cpu, |_| {}).unwrap(), &text);
        let differences: Vec<f32> = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).collect();
        let mean = differences.iter().sum::<f32>() / differences.len() as f32;
        let largest = differences.iter().copied().fold(0.0, f32::max);
        println!("{name:30} {} tokens: mean difference {mean:.4}, largest {largest:.4}", text.len());
        // Two bf16 runs whose sums are in another order; against float32 the mean is below 0.1 too.
        if !(mean < 0.1 && ours.len() == text.len() - 1) {
            over.push(format!("{name}: mean {mean}, largest {largest}"));
        }
        num_models += 1;
    }
    assert!(over.is_empty(), "{over:#?}");
    assert!(num_models > 5, "only {num_models} models were compared");
}
