//! Two pictures of one scene, of which one object is moved, recoloured, reshaped, added or removed in the second.

use fastrand::Rng;

use super::{
    colour::Colour,
    object::{Kind, Object, key, more_kinds, pick, shuffled_places},
    shape::Shape,
    stage::{Actor, Stage, sample},
};
use crate::Sample;

const WORDINGS: &[&str] = &[
    "What changed?",
    "What is different in the second picture?",
    "What changed from the first picture to the second?",
    "Name the change.",
    "Compare the two pictures. What changed?",
];

/// What happened to the last object of a scene.
#[derive(Debug, Clone, Copy)]
enum Change {
    Moved,
    Recoloured,
    Reshaped,
    Added,
    Removed,
}

impl Change {
    const ALL: [Self; 5] = [Self::Moved, Self::Recoloured, Self::Reshaped, Self::Added, Self::Removed];
}

pub(super) fn change(rng: &mut Rng) -> Sample {
    let change = pick(rng, &Change::ALL);
    let places = shuffled_places(rng);
    // Where an object comes or goes, another stays.
    let least = if matches!(change, Change::Added | Change::Removed) { 2 } else { 1 };
    let count = rng.usize(least..=4);
    let kinds = more_kinds(&[], count, rng);
    let mut objects: Vec<_> =
        kinds.iter().zip(&places).map(|(&kind, &place)| Object { kind, place }).collect();
    let before = objects[count - 1];
    let after = match change {
        Change::Moved => Object { place: places[count], ..before },
        Change::Recoloured | Change::Reshaped => Object { kind: altered(change, &kinds, rng), ..before },
        Change::Added | Change::Removed => before,
    };

    let stage = Stage::small(rng);
    let mut actors = stage.actors(&objects, rng);
    let first = actors[count - 1];
    let second = match change {
        Change::Moved => stage.actor(&after, rng),
        Change::Recoloured => Actor { tint: after.kind.colour.tint(rng), kind: after.kind, ..first },
        _ => Actor { kind: after.kind, ..first },
    };
    actors.push(second);
    let background = stage.background(&actors, rng);
    let others = count - 1;
    let with_first = [&actors[..others], &[first]].concat();
    let with_second = [&actors[..others], &[second]].concat();
    let (one, two) = match change {
        Change::Added => (&actors[..others], &with_second[..]),
        Change::Removed => (&with_first[..], &actors[..others]),
        _ => (&with_first[..], &with_second[..]),
    };
    let pictures = vec![stage.shoot(one, background, rng), stage.shoot(two, background, rng)];

    let answer = told(change, before, after);
    objects.pop();
    let content = format!("{} | {} at {} | {answer}", key(&objects), before.kind, before.place.name());
    sample(content, pictures, pick(rng, WORDINGS), &answer)
}

/// The last of `kinds` with another colour or shape, and still like none of the others.
fn altered(change: Change, kinds: &[Kind], rng: &mut Rng) -> Kind {
    let last = kinds[kinds.len() - 1];
    loop {
        let kind = match change {
            Change::Recoloured => Kind { colour: pick(rng, &Colour::ALL), ..last },
            _ => Kind { shape: pick(rng, &Shape::ALL), ..last },
        };
        if !kinds.contains(&kind) {
            return kind;
        }
    }
}

fn told(change: Change, before: Object, after: Object) -> String {
    let kind = before.kind;
    match change {
        Change::Moved => format!("The {kind} moved to the {}.", after.place.name()),
        Change::Recoloured => format!("The {kind} is now {}.", after.kind.colour.name()),
        Change::Reshaped => format!("The {kind} is now a {}.", after.kind.shape.name()),
        Change::Added => {
            let named = kind.with_article();
            format!("{}{} was added at the {}.", named[..1].to_uppercase(), &named[1..], after.place.name())
        }
        Change::Removed => format!("The {kind} was removed."),
    }
}
