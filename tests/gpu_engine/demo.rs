//! The demo model answers right on a GPU, in both of its formats and with both kinds of cache.

use serde_json::{Value, json};
use spark_engine::{Device, KvCacheDtype, SparkEngine, image_data_url};
use spark_testing::media_path;

use crate::{
    Model, alone, chats,
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
