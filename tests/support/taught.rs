//! Conversations of the kind that the demo model was taught, as token ids, and what engines make of their answers: log-probabilities that
//! mean something, because the model knows what comes next. No assertions about results.

use serde_json::json;
use spark_engine::{
    SparkEngine,
    api::{Event, SamplingParams},
};
use spark_suite::{Split, tasks};

use super::chats;

/// A conversation with its right answer.
pub(crate) struct Taught {
    /// Task and number of the sample.
    name: String,
    pub(crate) ids: Vec<u32>,
    /// How many of them are not the answer.
    prompt_len: usize,
}

/// Held-out samples of every task without pictures, tools and thinking; `count` of each.
pub(crate) fn taught(engine: &SparkEngine, count: u64) -> Vec<Taught> {
    let mut found = Vec::new();
    for (task, index) in tasks().flat_map(|task| (0..count).map(move |index| (task, index))) {
        let sample = task.sample(Split::HeldOut, index);
        let Some(answer) = sample.answer["content"].as_str() else { continue };
        let is_plain =
            sample.pictures.is_empty() && sample.tools.is_empty() && sample.template_kwargs.is_empty();
        if !is_plain || answer.is_empty() || !sample.answer["tool_calls"].is_null() {
            continue;
        }
        let body =
            json!({"messages": sample.messages, "max_tokens": 1, "temperature": 0, "return_token_ids": true});
        let reply = chats::block_on(chats::answer(engine, body));
        let mut ids = chats::ids(&reply["prompt_token_ids"]);
        let prompt_len = ids.len();
        ids.extend(
            engine.tokenizer().encode_trusted(&format!("{answer}<|im_end|>")).expect("an answer is text"),
        );
        found.push(Taught { name: format!("{} {index}", task.name), ids, prompt_len });
    }
    found
}

/// Log-probabilities of the tokens of a text, each under the text before it.
pub(crate) fn logprobs(engine: &SparkEngine, text: &[u32]) -> Vec<f32> {
    let sampling = SamplingParams { prompt_logprobs: Some(0), ..SamplingParams::greedy(1) };
    let request = engine.request(text.to_vec(), sampling).expect("the text fits");
    let mut events = engine.submit(request).expect("the engine runs");
    let logprobs = chats::block_on(async {
        while let Some(event) = events.recv().await {
            if let Event::Prompt { logprobs, .. } = event {
                return logprobs;
            }
        }
        None
    });
    let logprobs = logprobs.expect("prompt log-probabilities were asked for");
    logprobs[1..].iter().map(|entry| entry.as_ref().expect("every token has one").token.logprob).collect()
}

/// Two engines over the answers of the same texts.
pub(crate) struct Difference {
    pub(crate) num_tokens: usize,
    /// Of log-probabilities, absolute.
    pub(crate) mean: f32,
    pub(crate) largest: f32,
    /// Of the second engine and of the first, the reference.
    pub(crate) perplexity: [f32; 2],
}

impl Difference {
    pub(crate) fn of(reference: &SparkEngine, other: &SparkEngine, texts: &[Taught]) -> Self {
        let answers = |engine: &SparkEngine| -> Vec<f32> {
            texts.iter().flat_map(|text| logprobs(engine, &text.ids).split_off(text.prompt_len - 1)).collect()
        };
        let (want, got) = (answers(reference), answers(other));
        let differences: Vec<f32> = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).collect();
        let mean = |values: &[f32]| values.iter().sum::<f32>() / values.len() as f32;
        Self {
            num_tokens: differences.len(),
            mean: mean(&differences),
            largest: differences.iter().copied().fold(0.0, f32::max),
            perplexity: [&got, &want].map(|logprobs| (-mean(logprobs)).exp()),
        }
    }

    pub(crate) fn line(&self) -> String {
        let Self { num_tokens, mean, largest, perplexity: [got, want] } = self;
        format!(
            "log-probabilities of {num_tokens} tokens of answers: mean difference {mean:.4}, largest {largest:.4}, perplexity {got:.4} \
             instead of {want:.4}"
        )
    }
}

/// The samples whose greedy answers differ, by name.
pub(crate) fn other_answers(reference: &SparkEngine, other: &SparkEngine, texts: &[Taught]) -> Vec<String> {
    let differs = |text: &&Taught| greedy(reference, text) != greedy(other, text);
    texts.iter().filter(differs).map(|text| text.name.clone()).collect()
}

/// The greedy answer behind the question of `text`, up to its end.
fn greedy(engine: &SparkEngine, text: &Taught) -> Vec<u32> {
    let prompt = text.ids[..text.prompt_len].to_vec();
    let request = engine.request(prompt, SamplingParams::greedy(64)).expect("the prompt fits");
    let mut events = engine.submit(request).expect("the engine runs");
    chats::block_on(async {
        let mut ids = Vec::new();
        while let Some(event) = events.recv().await {
            if let Event::Token(token) = event {
                ids.push(token.token);
            }
        }
        ids
    })
}
