//! Which object is left of, right of, above or below which. Objects that are compared share no row or no column of thirds.

use fastrand::Rng;

use super::{
    object::{Kind, Object, Place, key, more_kinds, pick, sentence, shuffled_places},
    stage::{Stage, sample},
};
use crate::Sample;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Left,
    Right,
    Above,
    Below,
}

impl Direction {
    const ALL: [Self; 4] = [Self::Left, Self::Right, Self::Above, Self::Below];

    fn name(self) -> &'static str {
        match self {
            Self::Left => "left of",
            Self::Right => "right of",
            Self::Above => "above",
            Self::Below => "below",
        }
    }

    /// How many thirds `a` is beyond `b` in this direction; negative if it is on the other side.
    fn steps(self, a: Place, b: Place) -> isize {
        let difference = |a: usize, b: usize| a.cast_signed() - b.cast_signed();
        match self {
            Self::Left => difference(b.column, a.column),
            Self::Right => difference(a.column, b.column),
            Self::Above => difference(b.row, a.row),
            Self::Below => difference(a.row, b.row),
        }
    }
}

const YES_OR_NO: &[&str] = &[
    "Is the {a} {is} the {b}?",
    "Do you see the {a} {is} the {b}?",
    "Is it true that the {a} is {is} the {b}?",
    "Say yes or no: the {a} is {is} the {b}.",
];

const WHICH: &[&str] = &[
    "What is {is} the {b}?",
    "Which object is {is} the {b}?",
    "Name the object {is} the {b}.",
    "What do you see {is} the {b}?",
];

pub(super) fn relation(rng: &mut Rng) -> Sample {
    let direction = pick(rng, &Direction::ALL);
    if rng.u8(0..5) < 3 { yes_or_no(direction, rng) } else { which(direction, rng) }
}

/// Two to five objects, of which the first is or is not that way of the second.
fn yes_or_no(direction: Direction, rng: &mut Rng) -> Sample {
    let yes = rng.bool();
    let places = loop {
        let places = shuffled_places(rng);
        let steps = direction.steps(places[0], places[1]);
        if if yes { steps > 0 } else { steps < 0 } {
            break places;
        }
    };
    let count = rng.usize(2..=5);
    let kinds = more_kinds(&[], count, rng);
    let question = pick(rng, YES_OR_NO);
    let answer = if yes { "Yes." } else { "No." };
    asked(&kinds, &places, (question, direction), answer, rng)
}

/// Two to four objects; the first is the only one that way of the second, and all others are the other way.
fn which(direction: Direction, rng: &mut Rng) -> Sample {
    let places = loop {
        let places = shuffled_places(rng);
        // One step in most cases: two leave no room for others.
        let most = if rng.u8(0..4) == 0 { 2 } else { 1 };
        if (1..=most).contains(&direction.steps(places[0], places[1])) {
            break places;
        }
    };
    let others: Vec<_> = places[2..].iter().filter(|&&place| direction.steps(place, places[1]) < 0).collect();
    let count = rng.usize(0..=others.len().min(2));
    let places: Vec<_> = places[..2].iter().chain(others.into_iter().take(count)).copied().collect();
    let kinds = more_kinds(&[], places.len(), rng);
    let question = pick(rng, WHICH);
    asked(&kinds, &places, (question, direction), &sentence(&kinds[0].with_article()), rng)
}

fn asked(
    kinds: &[Kind],
    places: &[Place],
    (wording, direction): (&str, Direction),
    answer: &str,
    rng: &mut Rng,
) -> Sample {
    let objects: Vec<_> = kinds.iter().zip(places).map(|(&kind, &place)| Object { kind, place }).collect();
    let (a, b) = (kinds[0].to_string(), kinds[1].to_string());
    let question = wording.replace("{a}", &a).replace("{is}", direction.name()).replace("{b}", &b);
    let content = format!("{} | {a} {} {b} | {answer}", key(&objects), direction.name());
    let stage = Stage::any(rng);
    let actors = stage.actors(&objects, rng);
    sample(content, vec![stage.picture(&actors, rng)], &question, answer)
}
