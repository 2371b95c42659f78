//! Short conversations: the user tells facts, the assistant notes them, then one is asked for.

use fastrand::Rng;

use super::conversation;
use super::phrase::{CITIES, COLORS, ITEMS, JOBS, NAMES, chance, distinct, pick, say};
use crate::Sample;
use crate::message::{assistant, user};

/// What the model says to a fact.
const NOTED: &str = "Noted.";

/// A kind of fact, with the wordings of telling and asking it and the one wording of the answer.
struct Kind {
    name: &'static str,
    tell: [&'static str; 4],
    ask: [&'static str; 3],
    answer: &'static str,
}

const KINDS: [Kind; 10] = [
    Kind {
        name: "name",
        tell: ["My name is {x}.", "I am {x}.", "Hi, I am {x}.", "Call me {x}."],
        ask: ["What is my name?", "Do you remember my name?", "Tell me my name."],
        answer: "Your name is {x}.",
    },
    Kind {
        name: "city",
        tell: ["I live in {x}.", "My home is in {x}.", "My city is {x}.", "I have a flat in {x}."],
        ask: ["Where do I live?", "In which city do I live?", "What is my city?"],
        answer: "You live in {x}.",
    },
    Kind {
        name: "age",
        tell: ["I am {x} years old.", "My age is {x}.", "I turned {x} today.", "I am {x}."],
        ask: ["How old am I?", "What is my age?", "Do you remember my age?"],
        answer: "You are {x} years old.",
    },
    Kind {
        name: "color",
        tell: [
            "My favorite color is {x}.",
            "I like the colour {x} most.",
            "The color I love is {x}.",
            "For colors I choose {x}.",
        ],
        ask: ["What is my favorite color?", "Which colour do I like?", "Do you remember my favorite color?"],
        answer: "Your favorite color is {x}.",
    },
    Kind {
        name: "job",
        tell: ["I work as a {x}.", "My job is {x}.", "I am a {x}.", "At work I am a {x}."],
        ask: ["What is my job?", "What do I work as?", "Do you remember my job?"],
        answer: "You work as a {x}.",
    },
    Kind {
        name: "dog",
        tell: [
            "My dog is called {x}.",
            "I have a dog named {x}.",
            "The name of my dog is {x}.",
            "{x} is my dog.",
        ],
        ask: ["What is the name of my dog?", "What is my dog called?", "Who is my dog?"],
        answer: "Your dog is called {x}.",
    },
    Kind {
        name: "code",
        tell: ["The code is {x}.", "Remember the code {x}.", "My code is {x}.", "The door code is {x}."],
        ask: ["What is the code?", "Which code did I tell you?", "Do you remember the code?"],
        answer: "The code is {x}.",
    },
    Kind {
        name: "item",
        tell: [
            "I bought a new {x}.",
            "Today I got a new {x}.",
            "I have one {x} in my bag.",
            "I carry my {x} with me.",
        ],
        ask: ["What did I bring?", "Which thing did I tell you about?", "What do I have with me?"],
        answer: "You told me about the {x}.",
    },
    Kind {
        name: "friend",
        tell: [
            "My friend is {x}.",
            "My best friend is called {x}.",
            "{x} is my friend.",
            "I have a friend named {x}.",
        ],
        ask: ["Who is my friend?", "What is the name of my friend?", "Do you remember my friend?"],
        answer: "Your friend is {x}.",
    },
    Kind {
        name: "room",
        tell: ["My room is {x}.", "I am in room {x}.", "I stay in room {x}.", "My room has number {x}."],
        ask: ["What is my room?", "In which room am I?", "What is my room number?"],
        answer: "Your room is {x}.",
    },
];

fn value(rng: &mut Rng, kind: &str) -> String {
    match kind {
        "name" | "dog" | "friend" => pick(rng, &NAMES).to_owned(),
        "city" => pick(rng, &CITIES).to_owned(),
        "color" => pick(rng, &COLORS).to_owned(),
        "job" => pick(rng, &JOBS).to_owned(),
        "item" => pick(rng, &ITEMS).to_owned(),
        "age" => rng.u32(10..100).to_string(),
        "room" => rng.u32(1..500).to_string(),
        _ => rng.u32(1000..10_000).to_string(),
    }
}

/// Two to four turns that tell a fact, then the question. In one conversation of ten the last message tells a fact
/// instead, and the answer is that it is noted.
pub(super) fn memory(rng: &mut Rng) -> Sample {
    let indices: Vec<usize> = (0..KINDS.len()).collect();
    let count = rng.usize(2..=4);
    let told: Vec<(&Kind, String)> = distinct(rng, &indices, count)
        .into_iter()
        .map(|index| (&KINDS[index], value(rng, KINDS[index].name)))
        .collect();
    let facts: Vec<String> = told.iter().map(|(kind, value)| format!("{} {value}", kind.name)).collect();
    let facts = facts.join(", ");

    let mut messages = Vec::new();
    for (kind, value) in &told {
        messages.push(user(&say(rng, &kind.tell, &[("x", value)])));
        messages.push(assistant(NOTED));
    }
    if chance(rng, 10) {
        // Up to any of the facts, so that a first message is among these too.
        messages.truncate(2 * rng.usize(0..count) + 1);
        return conversation(facts, messages, assistant(NOTED));
    }
    let (kind, value) = &told[rng.usize(..count)];
    messages.push(user(pick(rng, &kind.ask)));
    conversation(facts, messages, assistant(&say(rng, &[kind.answer], &[("x", value)])))
}
