//! The demo model answers right on a GPU, in both of its formats and with both kinds of cache.

use serde_json::{Value, json};
use spark_engine::{Device, HeadDtype, KvCacheDtype, SparkEngine, image_data_url};
use spark_testing::media_path;

use crate::{
    Comparison, Model, alone, ask, chats,
    questions::{ABOUT_THE_PICTURE, IN_WORDS, PICTURE},
    taught::{Difference, other_answers, taught},
};

/// Samples of each task that are looked at.
const SAMPLES: u64 = 8;

/// A question with its picture, if it has one.
pub(crate) fn body(picture: Option<&str>, question: &str) -> Value {
    let url = picture.map(|name| image_data_url(&media_path(name)).unwrap());
    let mut parts: Vec<Value> =
        url.map(|url| json!({"type": "image_url", "image_url": {"url": url}})).into_iter().collect();
    parts.push(json!({"type": "text", "text": question}));
    json!({"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_completion_tokens": 200})
}

/// Every question with its picture and its answer.
pub(crate) fn questions() -> Vec<(Value, &'static str)> {
    let about = ABOUT_THE_PICTURE.iter().map(|(question, answer)| (body(Some(PICTURE), question), *answer));
    let words = IN_WORDS.iter().map(|(question, answer)| (body(None, question), *answer));
    about.chain(words).collect()
}

/// Five of the questions, with long and short answers, as [`Model::bodies`] gives them.
pub(crate) fn bodies(max_tokens: usize) -> Vec<(String, Value)> {
    let about = ABOUT_THE_PICTURE[..2].iter().map(|(question, _)| body(Some(PICTURE), question));
    let words = IN_WORDS[4..].iter().map(|(question, _)| body(None, question));
    let named = about.chain(words).enumerate().map(|(i, mut body)| {
        let fields = body.as_object_mut().expect("a body is an object");
        fields.remove("max_completion_tokens");
        let more = json!({
            "max_tokens": max_tokens, "ignore_eos": true, "return_token_ids": true, "logprobs": true, "top_logprobs": 2,
        });
        fields.extend(more.as_object().expect("an object").clone());
        (format!("question {i}"), body)
    });
    named.collect()
}

/// What is wrong among the answers.
fn wrong_answers(engine: &SparkEngine) -> Vec<String> {
    let mut wrong = Vec::new();
    for (body, expected) in questions() {
        let answer = chats::block_on(chats::answer(engine, body));
        let message = &answer["choices"][0]["message"];
        let said = message["content"].as_str().unwrap_or_default();
        if said != expected {
            wrong.push(format!("{said:?} instead of {expected:?}"));
        }
    }
    wrong
}

#[test]
fn the_answers_are_right() {
    let _gpu = alone();
    for format in ["awq", "bf16"] {
        for kv in [KvCacheDtype::Auto, KvCacheDtype::Fp8] {
            let engine =
                Model::demo(format).engine(Device::Cuda, |options| options.kv_cache_dtype = kv).unwrap();
            let wrong = wrong_answers(&engine);
            assert!(wrong.is_empty(), "{format}, cache {kv:?}: {wrong:#?}");
        }
    }
}

/// What an FP8 cache costs beside one in bf16, on the GPU: log-probabilities of right answers to
/// questions of the kind that the model was taught, and greedy answers.
#[test]
fn measurements_of_an_fp8_cache() {
    let _gpu = alone();
    for format in ["awq", "bf16"] {
        let model = Model::demo(format);
        let engine = |kv| model.engine(Device::Cuda, |options| options.kv_cache_dtype = kv).unwrap();
        let [bf16, fp8] = [engine(KvCacheDtype::Auto), engine(KvCacheDtype::Fp8)];
        let mut comparison = Comparison::default();
        for (name, body) in model.bodies(40) {
            let (reference, got) = (ask(&bf16, &body), ask(&fp8, &body));
            comparison.add(&name, &model.said(&reference), &model.said(&got), model.tolerance());
        }
        let difference = Difference::of(&bf16, &fp8, &taught(&bf16, SAMPLES));
        println!("{format}, FP8 against bf16 cache: {}; {}", difference.line(), comparison.line());
        let mean = difference.mean;
        assert!(mean < 0.2, "{format}: {mean}");
    }
}

/// The same of a head that is made FP8 while it is loaded; and that it is the CPU's, which quantises alike.
#[test]
fn an_fp8_head_is_that_of_the_cpu() {
    let _gpu = alone();
    for format in ["awq", "bf16"] {
        let model = Model::demo(format);
        let engine = |device, head| model.builder(device).lm_head_dtype(head).build().unwrap();
        let gpu = engine(Device::Cuda, HeadDtype::Fp8);
        let texts = taught(&gpu, SAMPLES);
        let cpu = engine(Device::Cpu, HeadDtype::Fp8);
        let against_cpu = Difference::of(&cpu, &gpu, &texts);
        let others = other_answers(&cpu, &gpu, &texts);
        println!(
            "{format}, FP8 head: other greedy answers than the CPU's in {} of {}: {others:?}",
            others.len(),
            texts.len()
        );
        let against_bf16 = Difference::of(&engine(Device::Cuda, HeadDtype::Bf16), &gpu, &texts);
        println!("{format}, FP8 head against the CPU's: {}", against_cpu.line());
        println!("{format}, FP8 head against a bf16 head: {}", against_bf16.line());
        assert!(against_cpu.mean < 0.05, "{format}: {}", against_cpu.line());
        assert!(against_bf16.mean > 0.0 && against_bf16.mean < 0.05, "{format}: {}", against_bf16.line());
    }
}
