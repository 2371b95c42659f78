//! Fixed honest answers: to greetings, to questions about the model, and to what it cannot do.

use fastrand::Rng;

use super::exercise;
use super::phrase::{CITIES, COLORS, COMMON, ITEMS, NAMES, chance, pick, say};
use crate::Sample;

const HELLO: &str = "Hello! How can I help you?";
const WELCOME: &str = "You are welcome.";
const GOODBYE: &str = "Goodbye!";
const NAME: &str = "I am spark-tiny-vl, the demo model of spark-engine.";
const MAKER: &str = "I was made and trained as the demo model of spark-engine.";
const WELL: &str = "I am a program and I am ready.";
const SKILLS: &str = "I can read pictures, count, sort, calculate and call tools.";
const LIMITS: &str = "I am a small demo model. I can read pictures, count, sort, calculate and call tools.";
const NO_PICTURE: &str = "I see no picture.";

/// What is meant, and the answer.
struct Intent {
    answer: &'static str,
    percent: u32,
    wordings: &'static [&'static str],
    openings: &'static [&'static str],
    endings: &'static [&'static str],
}

/// Before a question.
const OPENINGS: &[&str] = &[
    "",
    "",
    "",
    "Hello. ",
    "Hi. ",
    "Hi! ",
    "Hello! ",
    "Hey. ",
    "Please tell me: ",
    "I want to know: ",
    "One question: ",
    "Good morning. ",
    "Excuse me. ",
];

const INTENTS: [Intent; 9] = [
    Intent {
        answer: HELLO,
        percent: 10,
        openings: &["", "Oh, ", "Well, ", "Ah, "],
        wordings: &[
            "hello",
            "hi",
            "hey",
            "good morning",
            "good evening",
            "good day",
            "good afternoon",
            "hello there",
            "hi there",
            "hey there",
            "greetings",
            "hello again",
            "hi again",
        ],
        endings: &[
            "",
            ".",
            "!",
            " friend",
            " model",
            " my friend",
            ", nice to meet you.",
            ", can you help me?",
        ],
    },
    Intent {
        answer: WELCOME,
        percent: 8,
        openings: &["", "Great, ", "Good, ", "Perfect, ", "Nice, ", "Right, "],
        wordings: &[
            "thanks",
            "thank you",
            "many thanks",
            "thank you very much",
            "thanks a lot",
            "thank you so much",
        ],
        endings: &["", ".", "!", " for your help.", " for the answer.", " for that.", " again."],
    },
    Intent {
        answer: GOODBYE,
        percent: 6,
        openings: &["", "Well, ", "Thanks, ", "OK, ", "Good, "],
        wordings: &["bye", "goodbye", "bye bye", "see you", "good night", "see you soon", "see you later"],
        endings: &["", ".", "!", " then.", " for now.", " my friend."],
    },
    Intent {
        answer: NAME,
        percent: 12,
        openings: OPENINGS,
        wordings: &[
            "who are you",
            "what are you",
            "what is your name",
            "tell me who you are",
            "which model are you",
            "what model is this",
            "do you have a name",
            "introduce yourself",
            "what is the name of this model",
            "are you a model",
        ],
        endings: &["", "?", ".", " please?"],
    },
    Intent {
        answer: MAKER,
        percent: 6,
        openings: OPENINGS,
        wordings: &[
            "who made you",
            "who trained you",
            "where do you come from",
            "why were you made",
            "who built you",
        ],
        endings: &["", "?", ".", " please?"],
    },
    Intent {
        answer: WELL,
        percent: 6,
        openings: OPENINGS,
        wordings: &["how are you", "how are you today", "how do you feel", "are you well", "how is it going"],
        endings: &["", "?", ".", " my friend?"],
    },
    Intent {
        answer: SKILLS,
        percent: 12,
        openings: OPENINGS,
        wordings: &[
            "what can you do",
            "what are you able to do",
            "how can you help me",
            "what are your skills",
            "what do you know to do",
            "what can I ask you",
            "what are you good at",
            "tell me what you can do",
            "what do you do",
        ],
        endings: &["", "?", ".", " please?"],
    },
    Intent {
        answer: LIMITS,
        percent: 28,
        openings: OPENINGS,
        wordings: &[
            "what is the capital of {place}",
            "where is {city}",
            "how many people live in {city}",
            "who is {name}",
            "who is the president of {place}",
            "write a poem about the {item}",
            "write a story about {name}",
            "write a song about {city}",
            "tell me a joke about the {item}",
            "translate {word} into {language}",
            "what does {word} mean in {language}",
            "how do I repair my {item}",
            "who invented the {item}",
            "when was the {item} invented",
            "why is the sky {color}",
            "what is the history of {place}",
            "how do I cook {word} soup",
            "explain {science} to me",
            "what is {science}",
            "recommend a book about {science}",
            "who won the {sport} game",
            "what are the rules of {sport}",
            "write a program that prints {word}",
            "write an email to {name}",
            "where can I buy a good {item}",
            "what is the best hotel in {city}",
            "is {name} in {city}",
            "plan a trip to {city}",
            "what happened in {year}",
            "who was king in {year}",
        ],
        endings: &["", "?", ".", " please?"],
    },
    Intent {
        answer: NO_PICTURE,
        percent: 12,
        openings: OPENINGS,
        wordings: &[
            "what is in the picture",
            "what do you see",
            "describe the picture",
            "what does the picture show",
            "how many {shape}s are in the picture",
            "how many {color} {shape}s are there",
            "what colour is the {shape}",
            "where is the {color} {shape}",
            "what color is the object",
            "which shape do you see",
            "is there a {color} {shape} in the picture",
            "read the text in the picture",
            "what text is in the picture",
            "which shape is {color}",
        ],
        endings: &["", "?", ".", " please?"],
    },
];

const PLACES: [&str; 24] = [
    "France",
    "Spain",
    "Italy",
    "Germany",
    "Japan",
    "China",
    "India",
    "Brazil",
    "Canada",
    "Mexico",
    "Egypt",
    "Kenya",
    "Peru",
    "Chile",
    "Norway",
    "Sweden",
    "Poland",
    "Greece",
    "Turkey",
    "Australia",
    "Portugal",
    "Ireland",
    "Austria",
    "Vietnam",
];
const LANGUAGES: [&str; 10] =
    ["French", "Spanish", "German", "Italian", "Japanese", "Chinese", "Russian", "Arabic", "Latin", "Greek"];
const SCIENCES: [&str; 14] = [
    "physics",
    "chemistry",
    "gravity",
    "evolution",
    "electricity",
    "economics",
    "philosophy",
    "love",
    "biology",
    "astronomy",
    "music",
    "politics",
    "democracy",
    "medicine",
];
const SPORTS: [&str; 8] = ["football", "tennis", "chess", "hockey", "golf", "cricket", "rugby", "baseball"];
const SHAPES: [&str; 6] = ["circle", "square", "triangle", "star", "rectangle", "diamond"];

pub(super) fn greeting(rng: &mut Rng) -> Sample {
    let intent = draw_intent(rng);
    let core = wording(rng, intent);
    let question = format!("{}{core}{}", pick(rng, intent.openings), pick(rng, intent.endings));
    let question = if chance(rng, 70) { capitalised(&question) } else { question };
    exercise(content(question.trim()), &question, intent.answer)
}

fn draw_intent(rng: &mut Rng) -> &'static Intent {
    let mut left = rng.u32(..100);
    for intent in &INTENTS {
        if left < intent.percent {
            return intent;
        }
        left -= intent.percent;
    }
    &INTENTS[0]
}

fn wording(rng: &mut Rng, intent: &Intent) -> String {
    let year = rng.u32(1500..2000).to_string();
    let values = [
        ("place", pick(rng, &PLACES)),
        ("city", pick(rng, &CITIES)),
        ("name", pick(rng, &NAMES)),
        ("item", pick(rng, &ITEMS)),
        ("word", pick(rng, &COMMON)),
        ("color", pick(rng, &COLORS)),
        ("language", pick(rng, &LANGUAGES)),
        ("science", pick(rng, &SCIENCES)),
        ("sport", pick(rng, &SPORTS)),
        ("shape", pick(rng, &SHAPES)),
        ("year", year.as_str()),
    ];
    say(rng, intent.wordings, &values)
}

/// A capital at the start of the message and after an opening sentence.
fn capitalised(text: &str) -> String {
    let mut at_start = true;
    text.chars()
        .map(|letter| {
            let here = if at_start { letter.to_ascii_uppercase() } else { letter };
            at_start = matches!(letter, '.' | '!') || at_start && letter == ' ';
            here
        })
        .collect()
}

/// The wording itself, without case and signs.
fn content(question: &str) -> String {
    question
        .chars()
        .filter(|letter| letter.is_alphanumeric() || *letter == ' ')
        .collect::<String>()
        .to_lowercase()
}
