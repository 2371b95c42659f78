//! What a scene means: objects of a shape and a colour at one of nine places, and the words for them. No pixels.

use std::fmt;

use fastrand::Rng;

use super::{colour::Colour, shape::Shape};

/// One of the nine thirds-by-thirds of a picture; ordered row by row, the order in which scenes are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) row: usize,
    pub(super) column: usize,
}

const PLACES: [[&str; 3]; 3] = [
    ["top left", "top", "top right"],
    ["left", "centre", "right"],
    ["bottom left", "bottom", "bottom right"],
];

impl Place {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        (0..9).map(|index| Self { row: index / 3, column: index % 3 })
    }

    pub(super) fn name(self) -> &'static str {
        PLACES[self.row][self.column]
    }
}

/// What an object is, wherever it is. Displayed as "red circle".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    pub(super) colour: Colour,
    pub(super) shape: Shape,
}

impl Kind {
    pub(super) fn any(rng: &mut Rng) -> Self {
        Self { colour: pick(rng, &Colour::ALL), shape: pick(rng, &Shape::ALL) }
    }

    /// A kind that often has the colour or the shape of this one: what one must look at to tell the two apart.
    pub(super) fn rival(self, rng: &mut Rng) -> Self {
        let any = Self::any(rng);
        match rng.u8(0..4) {
            0 => Self { colour: self.colour, ..any },
            1 => Self { shape: self.shape, ..any },
            _ => any,
        }
    }

    /// "a red circle"
    pub(super) fn with_article(self) -> String {
        let article = if self.colour == Colour::Orange { "an" } else { "a" };
        format!("{article} {self}")
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.colour.name(), self.shape.name())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) kind: Kind,
    pub(super) place: Place,
}

/// The meaning of a scene as text: equal for equal scenes, whatever the order of the list.
pub(super) fn key(objects: &[Object]) -> String {
    let mut objects: Vec<_> = objects.iter().map(|object| (object.place, object.kind)).collect();
    objects.sort_unstable();
    let names: Vec<_> = objects.iter().map(|(place, kind)| format!("{kind} at {}", place.name())).collect();
    names.join(", ")
}

/// All nine places in a random order.
pub(super) fn shuffled_places(rng: &mut Rng) -> Vec<Place> {
    let mut places: Vec<_> = Place::all().collect();
    rng.shuffle(&mut places);
    places
}

/// `count` kinds that are all different from `taken` and from one another, and often like one of these.
pub(super) fn more_kinds(taken: &[Kind], count: usize, rng: &mut Rng) -> Vec<Kind> {
    let mut kinds = taken.to_vec();
    while kinds.len() < taken.len() + count {
        let kind = if kinds.is_empty() { Kind::any(rng) } else { pick(rng, &kinds).rival(rng) };
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds.split_off(taken.len())
}

/// `count` rivals of `kind` that `allowed` lets through.
pub(super) fn rivals(kind: Kind, count: usize, allowed: impl Fn(Kind) -> bool, rng: &mut Rng) -> Vec<Kind> {
    std::iter::repeat_with(|| kind.rival(rng)).filter(|&kind| allowed(kind)).take(count).collect()
}

/// One of `choices`, which is not empty.
pub(super) fn pick<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
    choices[rng.usize(..choices.len())]
}

/// One of `wordings`, with `{}` replaced.
pub(super) fn ask(rng: &mut Rng, wordings: &[&str], about: &str) -> String {
    pick(rng, wordings).replace("{}", about)
}

/// `words` with a capital first letter and a full stop.
pub(super) fn sentence(words: &str) -> String {
    let mut letters = words.chars();
    let first = letters.next().map(|letter| letter.to_ascii_uppercase());
    format!("{}{}.", first.map(String::from).unwrap_or_default(), letters.as_str())
}

/// A number from zero to nine in letters.
pub(super) fn number(value: usize) -> &'static str {
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"][value]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_named_after_its_row_and_column() {
        for place in Place::all() {
            let row = ["top", "", "bottom"][place.row];
            let column = ["left", "", "right"][place.column];
            let name = [row, column].join(" ");
            assert_eq!(place.name(), if name == " " { "centre" } else { name.trim() });
        }
    }
}
