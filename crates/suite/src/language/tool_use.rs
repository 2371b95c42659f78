//! Conversations with tools: one call, several, none, and the answer from their results.

use fastrand::Rng;
use serde_json::json;

use super::phrase::{chance, enumerated, pick, say};
use super::toolbox::{Need, calls, definitions};
use super::{conversation, greeting, lists};
use crate::message::{assistant, user};
use crate::{Sample, Scoring};

const TOGETHER: [&str; 6] = [
    "What is {all}?",
    "Tell me {all}.",
    "I need {all}.",
    "Please find {all}.",
    "Give me {all}.",
    "Can you tell me {all}?",
];

pub(super) fn tool_call(rng: &mut Rng) -> Sample {
    if chance(rng, 25) {
        return without_call(rng);
    }
    let need = Need::draw(rng);
    let question = need.question(rng);
    let needs = [need];
    Sample {
        tools: definitions(rng, &needs),
        scoring: Scoring::ToolCalls,
        ..conversation(needs[0].content(), vec![user(&question)], calls(&needs))
    }
}

/// A question that the model answers itself: the answer is text, and a call is wrong.
fn without_call(rng: &mut Rng) -> Sample {
    let sample = match rng.u32(..3) {
        0 => greeting::greeting(rng),
        1 => lists::sort(rng),
        _ => lists::reverse(rng),
    };
    Sample { tools: definitions(rng, &[]), content: format!("no call: {}", sample.content), ..sample }
}

pub(super) fn tool_parallel(rng: &mut Rng) -> Sample {
    let (needs, question) = several(rng);
    Sample {
        tools: definitions(rng, &needs),
        scoring: Scoring::ToolCalls,
        ..conversation(content(&needs), vec![user(&question)], calls(&needs))
    }
}

pub(super) fn tool_result(rng: &mut Rng) -> Sample {
    let (needs, question) = if chance(rng, 60) {
        let need = Need::draw(rng);
        let question = need.question(rng);
        (vec![need], question)
    } else {
        several(rng)
    };
    let mut messages = vec![user(&question), calls(&needs)];
    let mut sentences = Vec::new();
    for (index, need) in needs.iter().enumerate() {
        let (result, sentence) = need.outcome(rng);
        messages.push(json!({ "role": "tool", "tool_call_id": format!("call_{index}"), "content": result }));
        sentences.push(sentence);
    }
    let answer = sentences.join(" ");
    Sample { tools: definitions(rng, &needs), ..conversation(answer.clone(), messages, assistant(&answer)) }
}

/// Two or three different needs and one question for all.
fn several(rng: &mut Rng) -> (Vec<Need>, String) {
    let count = if chance(rng, 65) { 2 } else { 3 };
    let mut needs: Vec<Need> = Vec::with_capacity(count);
    while needs.len() < count {
        let need = Need::draw(rng);
        if !needs.contains(&need) {
            needs.push(need);
        }
    }
    let question = if chance(rng, 30) {
        let questions: Vec<String> = needs.iter().map(|need| need.question(rng)).collect();
        questions.join(pick(rng, &[" ", "\n"]))
    } else {
        let nouns: Vec<String> = needs.iter().map(Need::noun).collect();
        say(rng, &TOGETHER, &[("all", &enumerated(&nouns))])
    };
    (needs, question)
}

fn content(needs: &[Need]) -> String {
    let contents: Vec<String> = needs.iter().map(Need::content).collect();
    contents.join(" | ")
}
