//! The demo model answers right on a GPU, in both of its formats and with both kinds of cache.

use serde_json::{Value, json};
use spark_engine::{Device, KvCacheDtype, SparkEngine, image_data_url};
use spark_testing::media_path;

use crate::{
    Comparison, Model, alone, ask, chats,
    greedy::logprobs,
    questions::{ABOUT_THE_PICTURE, IN_WORDS, PICTURE},
};

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

/// What an FP8 cache costs beside one in bf16, on the GPU: log-probabilities along texts of many tokens, each under those before
/// it, and greedy answers.
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
        let turn = |(question, answer): &(&str, &str)| {
            format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")
        };
        let text: String = IN_WORDS.iter().map(turn).collect();
        let mut text = bf16.tokenizer().encode_trusted(&text.repeat(8)).unwrap();
        text.truncate(900);
        let (want, got) = (logprobs(&bf16, &text), logprobs(&fp8, &text));
        let differences: Vec<f32> = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).collect();
        let mean = differences.iter().sum::<f32>() / differences.len() as f32;
        let largest = differences.iter().copied().fold(0.0, f32::max);
        let perplexity = |logprobs: &[f32]| (-logprobs.iter().sum::<f32>() / logprobs.len() as f32).exp();
        println!(
            "{format}, FP8 against bf16 cache: log-probabilities of {} tokens: mean difference {mean:.4}, largest {largest:.4}, \
             perplexity {:.4} and {:.4}; {}",
            differences.len(),
            perplexity(&got),
            perplexity(&want),
            comparison.line()
        );
        assert!(mean < 0.2, "{format}: {mean}");
    }
}
