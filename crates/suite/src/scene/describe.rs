//! A scene of one to four objects in words: how many, then each with its place, row by row.

use fastrand::Rng;

use super::{
    object::{Kind, Object, key, number, pick, shuffled_places},
    stage::{Stage, sample},
};
use crate::Sample;

const WORDINGS: &[&str] = &[
    "Describe the picture.",
    "Describe all objects.",
    "List all objects with their places.",
    "Which objects are in the picture, and where?",
    "Say what is where in the picture.",
    "Tell me about this picture.",
];

pub(super) fn describe(rng: &mut Rng) -> Sample {
    let mut places = shuffled_places(rng);
    places.truncate(rng.usize(1..=4));
    places.sort_unstable();
    let objects: Vec<_> = places.into_iter().map(|place| Object { kind: Kind::any(rng), place }).collect();
    let question = pick(rng, WORDINGS);
    let stage = Stage::any(rng);
    let actors = stage.actors(&objects, rng);
    sample(key(&objects), vec![stage.picture(&actors, rng)], question, &told(&objects))
}

/// "There are two objects: a red circle at the top left and a blue star at the right."
fn told(objects: &[Object]) -> String {
    let opening = if objects.len() == 1 {
        "There is one object".to_owned()
    } else {
        format!("There are {} objects", number(objects.len()))
    };
    let parts: Vec<_> = objects
        .iter()
        .map(|object| format!("{} at the {}", object.kind.with_article(), object.place.name()))
        .collect();
    let list = match parts.split_last() {
        Some((last, first)) if !first.is_empty() => format!("{} and {last}", first.join(", ")),
        _ => parts.concat(),
    };
    format!("{opening}: {list}.")
}
