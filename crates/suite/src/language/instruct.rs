//! Instructions of the system prompt about how to answer, each with a question that is easy without it.

use fastrand::Rng;
use serde_json::json;

use super::conversation;
use super::phrase::{COLORS, COMMON, ITEMS, chance, distinct, pick, say};
use crate::Sample;
use crate::message::{assistant, user};

const CAPITALS: [&str; 5] = [
    "Answer in capitals.",
    "Write your answer in capital letters.",
    "Use capital letters only.",
    "Always answer in upper case.",
    "Answer in CAPITALS.",
];
const BEGIN: [&str; 5] = [
    "Begin every answer with: {text}",
    "Start each answer with the words: {text}",
    "Your answers begin with: {text}",
    "Always begin with: {text}",
    "Every answer starts with: {text}",
];
const END: [&str; 5] = [
    "End every answer with: {text}",
    "Finish each answer with the words: {text}",
    "Your answers end with: {text}",
    "Always end with: {text}",
    "The last words of every answer are: {text}",
];
const YES_NO: [&str; 5] = [
    "Answer only with yes or no.",
    "Say only yes or no.",
    "Your answer is yes or no.",
    "Reply with yes or no.",
    "Use one word: yes or no.",
];
const FIXED: [&str; 5] = [
    "Always answer: {text}",
    "Whatever the question, answer: {text}",
    "The only answer you give is: {text}",
    "Answer every message with: {text}",
    "Say nothing but: {text}",
];
const REFUSE: [&str; 4] = [
    "Do not talk about the {topic}. If asked, say: {text}",
    "When asked about the {topic}, say: {text}",
    "The {topic} is secret. If someone asks about it, say: {text}",
    "Never speak about the {topic}. Instead say: {text}",
];
const ABOUT_TOPIC: [&str; 5] = [
    "Tell me about the {topic}.",
    "What do you know about the {topic}?",
    "Where is the {topic}?",
    "Who has the {topic}?",
    "What colour is the {topic}?",
];
const REFUSALS: [&str; 8] = [
    "I can not talk about that.",
    "That is a secret.",
    "Please ask someone else.",
    "I have no answer to this.",
    "Sorry, not today.",
    "This is not for me to say.",
    "Let us talk about something else.",
    "No comment.",
];

/// A question that needs nothing but itself.
struct Easy {
    content: String,
    question: String,
    answer: String,
}

impl Easy {
    fn draw(rng: &mut Rng) -> Self {
        match rng.u32(..3) {
            0 => Self::sum(rng),
            1 => Self::color(rng),
            _ => Self::echo(rng),
        }
    }

    fn sum(rng: &mut Rng) -> Self {
        let (a, b) = (rng.u32(..20), rng.u32(..10));
        let wordings = ["What is {a} + {b}?", "{a} plus {b}", "Add {a} and {b}.", "What is {a} plus {b}?"];
        let question = say(rng, &wordings, &[("a", &a.to_string()), ("b", &b.to_string())]);
        Self { content: format!("{a} + {b}"), question, answer: (a + b).to_string() }
    }

    fn color(rng: &mut Rng) -> Self {
        let (item, color) = (pick(rng, &ITEMS), pick(rng, &COLORS));
        let wordings = [
            "The {item} is {color}. What color is the {item}?",
            "My {item} is {color}. What colour is my {item}?",
            "The {item} is {color}. Which colour does the {item} have?",
            "My new {item} is {color}. What color is it?",
        ];
        let question = say(rng, &wordings, &[("item", item), ("color", color)]);
        Self { content: format!("{item} {color}"), question, answer: color.to_owned() }
    }

    fn echo(rng: &mut Rng) -> Self {
        let count = rng.usize(1..=3);
        let text = distinct(rng, &ITEMS, count).join(" ");
        let question = say(
            rng,
            &["Repeat: {text}", "Say: {text}", "Echo: {text}", "Repeat after me: {text}"],
            &[("text", &text)],
        );
        Self { content: format!("echo {text}"), question, answer: text }
    }
}

fn sample(content: String, instruction: &str, question: &str, answer: &str) -> Sample {
    conversation(
        content,
        vec![json!({ "role": "system", "content": instruction }), user(question)],
        assistant(answer),
    )
}

pub(super) fn system_prompt(rng: &mut Rng) -> Sample {
    match rng.u32(..6) {
        0 => capitals(rng),
        1 => begin_or_end(rng, true),
        2 => begin_or_end(rng, false),
        3 => yes_or_no(rng),
        4 => fixed(rng),
        _ => refuse(rng),
    }
}

/// No sums: digits have no capitals.
fn capitals(rng: &mut Rng) -> Sample {
    let easy = if chance(rng, 40) { Easy::color(rng) } else { Easy::echo(rng) };
    let instruction = pick(rng, &CAPITALS);
    sample(format!("capitals: {}", easy.content), instruction, &easy.question, &easy.answer.to_uppercase())
}

fn begin_or_end(rng: &mut Rng, begin: bool) -> Sample {
    let easy = Easy::draw(rng);
    let count = rng.usize(1..=3);
    let text = distinct(rng, &COMMON, count).join(" ");
    let (wordings, answer) = match begin {
        true => (&BEGIN, format!("{text} {}", easy.answer)),
        false => (&END, format!("{} {text}", easy.answer)),
    };
    let instruction = say(rng, wordings, &[("text", &text)]);
    let place = if begin { "begin" } else { "end" };
    sample(format!("{place} {text}: {}", easy.content), &instruction, &easy.question, &answer)
}

/// Yes and no in equal shares.
fn yes_or_no(rng: &mut Rng) -> Sample {
    let yes = rng.bool();
    let (content, question) = if rng.bool() { compare_numbers(rng, yes) } else { compare_colors(rng, yes) };
    let instruction = pick(rng, &YES_NO);
    sample(format!("yes or no: {content}"), instruction, &question, if yes { "yes" } else { "no" })
}

fn compare_numbers(rng: &mut Rng, yes: bool) -> (String, String) {
    let all: Vec<u32> = (0..100).collect();
    let two = distinct(rng, &all, 2);
    let (low, high) = (two[0].min(two[1]).to_string(), two[0].max(two[1]).to_string());
    let wordings: [&str; 2] = if yes {
        ["Is {high} larger than {low}?", "Is {low} smaller than {high}?"]
    } else {
        ["Is {low} larger than {high}?", "Is {high} smaller than {low}?"]
    };
    let question = say(rng, &wordings, &[("low", &low), ("high", &high)]);
    (format!("{low} {high}"), question)
}

fn compare_colors(rng: &mut Rng, yes: bool) -> (String, String) {
    let item = pick(rng, &ITEMS);
    let two = distinct(rng, &COLORS, 2);
    let (is, asked) = if yes { (two[0], two[0]) } else { (two[0], two[1]) };
    let wordings = ["The {item} is {is}. Is the {item} {asked}?", "My {item} is {is}. Is my {item} {asked}?"];
    let question = say(rng, &wordings, &[("item", item), ("is", is), ("asked", asked)]);
    (format!("{item} {is} {asked}"), question)
}

fn fixed(rng: &mut Rng) -> Sample {
    let easy = Easy::draw(rng);
    let count = rng.usize(1..=4);
    let text = distinct(rng, &COMMON, count).join(" ");
    let instruction = say(rng, &FIXED, &[("text", &text)]);
    sample(format!("always {text}: {}", easy.content), &instruction, &easy.question, &text)
}

/// Half of the questions are about something else and get their answer.
fn refuse(rng: &mut Rng) -> Sample {
    let (topic, text) = (pick(rng, &ITEMS), pick(rng, &REFUSALS));
    let instruction = say(rng, &REFUSE, &[("topic", topic), ("text", text)]);
    let refused = format!("refuse {topic}");
    if rng.bool() {
        let question = say(rng, &ABOUT_TOPIC, &[("topic", topic)]);
        return sample(format!("{refused}: {text}"), &instruction, &question, text);
    }
    let easy = loop {
        let easy = Easy::draw(rng);
        if !easy.content.contains(topic) {
            break easy;
        }
    };
    sample(format!("{refused}: {}", easy.content), &instruction, &easy.question, &easy.answer)
}
