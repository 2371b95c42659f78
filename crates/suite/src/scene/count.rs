//! How many: zero to five objects that fit a description, among others that do not.

use fastrand::Rng;

use super::{
    object::{Kind, Object, ask, key, number, pick, rivals, sentence, shuffled_places},
    stage::{Stage, sample},
};
use crate::Sample;

/// Largest answer.
const MOST: usize = 5;

/// Most objects that do not count.
const OTHERS: usize = 4;

const WORDINGS: &[&str] = &[
    "How many {} are there?",
    "How many {} do you see?",
    "Count the {}.",
    "How many {} are in the picture?",
    "What is the number of {}?",
];

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    All,
    Shape,
    Colour,
    Kind,
}

impl Class {
    /// Whether `kind` counts where objects like `wanted` do.
    fn holds(self, wanted: Kind, kind: Kind) -> bool {
        match self {
            Self::All => true,
            Self::Shape => kind.shape == wanted.shape,
            Self::Colour => kind.colour == wanted.colour,
            Self::Kind => kind == wanted,
        }
    }

    fn name(self, wanted: Kind) -> String {
        match self {
            Self::All => "objects".to_owned(),
            Self::Shape => wanted.shape.plural(),
            Self::Colour => format!("{} objects", wanted.colour.name()),
            Self::Kind => format!("{} {}", wanted.colour.name(), wanted.shape.plural()),
        }
    }

    /// A kind that counts.
    fn member(self, wanted: Kind, rng: &mut Rng) -> Kind {
        let any = Kind::any(rng);
        match self {
            Self::All => any,
            Self::Shape => Kind { shape: wanted.shape, ..any },
            Self::Colour => Kind { colour: wanted.colour, ..any },
            Self::Kind => wanted,
        }
    }
}

pub(super) fn count(rng: &mut Rng) -> Sample {
    let count = rng.usize(0..=MOST);
    // Of nothing at all there is only one picture.
    let classes = [Class::Shape, Class::Colour, Class::Kind, Class::All];
    let class = pick(rng, if count == 0 { &classes[..3] } else { &classes });
    let wanted = Kind::any(rng);
    let mut kinds: Vec<Kind> = (0..count).map(|_| class.member(wanted, rng)).collect();
    if class != Class::All {
        let others = rng.usize(usize::from(count == 0)..=OTHERS);
        kinds.extend(rivals(wanted, others, |kind| !class.holds(wanted, kind), rng));
    }
    let question = ask(rng, WORDINGS, &class.name(wanted));
    let answer = sentence(number(count));
    let stage = Stage::any(rng);
    let free = if rng.bool() { stage.scattered(&kinds, rng) } else { None };
    let actors = free.unwrap_or_else(|| {
        let places = shuffled_places(rng);
        let objects: Vec<_> = kinds.iter().zip(places).map(|(&kind, place)| Object { kind, place }).collect();
        stage.actors(&objects, rng)
    });
    let objects: Vec<_> =
        actors.iter().map(|actor| Object { kind: actor.kind, place: stage.place(actor) }).collect();
    let content = format!("{} | {}", key(&objects), class.name(wanted));
    sample(content, vec![stage.picture(&actors, rng)], &question, &answer)
}
