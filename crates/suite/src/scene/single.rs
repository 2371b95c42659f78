//! Questions about one object of a scene: its shape, its colour, its place.

use fastrand::Rng;

use super::{
    object::{Kind, Object, ask, key, more_kinds, pick, rivals, sentence, shuffled_places},
    stage::{Stage, sample},
};
use crate::Sample;

/// Most objects beside the one in question.
const OTHERS: usize = 5;

/// `kind` at a random place, then `others` at other places.
fn scene(kind: Kind, others: &[Kind], rng: &mut Rng) -> Vec<Object> {
    let kinds = std::iter::once(&kind).chain(others);
    kinds.zip(shuffled_places(rng)).map(|(&kind, place)| Object { kind, place }).collect()
}

/// The question about a scene whose first object is in question.
fn seen(objects: &[Object], question: &str, answer: &str, rng: &mut Rng) -> Sample {
    let stage = Stage::any(rng);
    let actors = stage.actors(objects, rng);
    let picture = stage.picture(&actors, rng);
    sample(content(objects, answer), vec![picture], question, answer)
}

fn content(objects: &[Object], answer: &str) -> String {
    let asked = objects[0];
    format!("{} | {} at {} | {answer}", key(objects), asked.kind, asked.place.name())
}

/// A question about the only object, which now and then fills the picture.
fn alone(kind: Kind, question: &str, answer: &str, rng: &mut Rng) -> Sample {
    let objects = scene(kind, &[], rng);
    if rng.u8(0..4) > 0 {
        return seen(&objects, question, answer, rng);
    }
    let stage = Stage::any(rng);
    let actor = stage.close_up(kind, rng);
    let picture = stage.picture(&[actor], rng);
    // The place is drawn all the same: a close-up keeps to the split of its scene.
    sample(content(&objects, answer), vec![picture], question, answer)
}

/// Others of any kind, the asked-about one's included: for questions that give the place.
fn anything(kind: Kind, rng: &mut Rng) -> Vec<Kind> {
    let count = rng.usize(1..=OTHERS);
    rivals(kind, count, |_| true, rng)
}

pub(super) fn what(rng: &mut Rng) -> Sample {
    let kind = Kind::any(rng);
    let (shape, whole) = (sentence(&format!("a {}", kind.shape.name())), sentence(&kind.with_article()));
    match rng.u8(0..6) {
        0 => {
            let question = pick(rng, ONLY_SHAPE);
            alone(kind, question, &shape, rng)
        }
        1 => {
            let question = pick(rng, ONLY_OBJECT);
            alone(kind, question, &whole, rng)
        }
        2 | 3 => {
            let count = rng.usize(1..=OTHERS);
            let others = rivals(kind, count, |other| other.colour != kind.colour, rng);
            let objects = scene(kind, &others, rng);
            let question = ask(rng, SHAPE_BY_COLOUR, kind.colour.name());
            seen(&objects, &question, &shape, rng)
        }
        form => {
            let others = anything(kind, rng);
            let objects = scene(kind, &others, rng);
            let (wordings, answer) = if form == 4 { (SHAPE_AT, shape) } else { (OBJECT_AT, whole) };
            let question = ask(rng, wordings, objects[0].place.name());
            seen(&objects, &question, &answer, rng)
        }
    }
}

pub(super) fn colour(rng: &mut Rng) -> Sample {
    let kind = Kind::any(rng);
    let answer = sentence(kind.colour.name());
    match rng.u8(0..6) {
        0 => {
            let question = pick(rng, ONLY_COLOUR);
            alone(kind, question, &answer, rng)
        }
        1 | 2 => {
            let others = anything(kind, rng);
            let objects = scene(kind, &others, rng);
            let question = ask(rng, COLOUR_AT, objects[0].place.name());
            seen(&objects, &question, &answer, rng)
        }
        _ => {
            let count = rng.usize(1..=OTHERS);
            let others = rivals(kind, count, |other| other.shape != kind.shape, rng);
            let objects = scene(kind, &others, rng);
            let question = ask(rng, COLOUR_BY_SHAPE, kind.shape.name());
            seen(&objects, &question, &answer, rng)
        }
    }
}

pub(super) fn place(rng: &mut Rng) -> Sample {
    let kind = Kind::any(rng);
    let count = rng.usize(0..=OTHERS);
    let (others, name) = match rng.u8(0..4) {
        0 => {
            let others = rivals(kind, count, |other| other.shape != kind.shape, rng);
            (others, kind.shape.name().to_owned())
        }
        1 => {
            let others = rivals(kind, count, |other| other.colour != kind.colour, rng);
            (others, format!("{} object", kind.colour.name()))
        }
        _ => (more_kinds(&[kind], count, rng), kind.to_string()),
    };
    let objects = scene(kind, &others, rng);
    let question = ask(rng, WHERE, &name);
    let answer = sentence(&format!("at the {}", objects[0].place.name()));
    seen(&objects, &question, &answer, rng)
}

const ONLY_SHAPE: &[&str] = &[
    "What shape is in the picture?",
    "Which shape do you see?",
    "Name the shape.",
    "What shape is this?",
    "Which shape does the picture show?",
];

const ONLY_OBJECT: &[&str] = &[
    "What is in the picture?",
    "What do you see?",
    "Which object is in the picture?",
    "Name the object.",
    "What does the picture show?",
];

const SHAPE_BY_COLOUR: &[&str] = &[
    "What shape is the {} object?",
    "Which shape is {}?",
    "Name the shape of the {} object.",
    "What shape does the {} object have?",
    "What is the shape of the {} object?",
];

const SHAPE_AT: &[&str] = &[
    "What shape is at the {}?",
    "Which shape do you see at the {}?",
    "Name the shape at the {}.",
    "What is the shape of the object at the {}?",
];

const OBJECT_AT: &[&str] = &[
    "What is at the {}?",
    "What do you see at the {}?",
    "Name the object at the {}.",
    "Which object is at the {}?",
];

const ONLY_COLOUR: &[&str] = &[
    "What colour is the object?",
    "Which colour does the object have?",
    "Name the colour of the object.",
    "What is the color of the object?",
    "What color is it?",
];

const COLOUR_AT: &[&str] = &[
    "What colour is the object at the {}?",
    "Which colour does the object at the {} have?",
    "Name the colour of the object at the {}.",
    "What is the color of the object at the {}?",
];

const COLOUR_BY_SHAPE: &[&str] = &[
    "What colour is the {}?",
    "Which colour does the {} have?",
    "Name the colour of the {}.",
    "What is the color of the {}?",
    "What color is the {}?",
];

const WHERE: &[&str] = &[
    "Where is the {}?",
    "At which place is the {}?",
    "Where in the picture is the {}?",
    "Where do you see the {}?",
    "Say where the {} is.",
];
