//! Word lists, choices from them, and sentences with gaps. What the sentences mean is the tasks' matter.

use std::sync::LazyLock;

use fastrand::Rng;

type Words = LazyLock<Vec<&'static str>>;

/// Common English words of lower-case letters.
pub(super) static COMMON: Words = LazyLock::new(|| split(include_str!("words/common.txt")));
/// First names.
pub(super) static NAMES: Words = LazyLock::new(|| split(include_str!("words/names.txt")));
/// Cities of one word.
pub(super) static CITIES: Words = LazyLock::new(|| split(include_str!("words/cities.txt")));
/// Things that can be bought, singular.
pub(super) static ITEMS: Words = LazyLock::new(|| split(include_str!("words/items.txt")));

pub(super) const COLORS: [&str; 10] =
    ["red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "pink"];
pub(super) const JOBS: [&str; 24] = [
    "baker", "teacher", "doctor", "nurse", "pilot", "farmer", "driver", "painter", "cook", "lawyer",
    "singer", "writer", "judge", "tailor", "dentist", "sailor", "miner", "gardener", "waiter", "plumber",
    "dancer", "guide", "clerk", "barber",
];

fn split(text: &'static str) -> Vec<&'static str> {
    text.split_whitespace().collect()
}

/// One entry of a list, which has at least one.
pub(super) fn pick<T: Copy>(rng: &mut Rng, list: &[T]) -> T {
    list[rng.usize(..list.len())]
}

/// `count` different entries of a list of more than that.
pub(super) fn distinct<T: Copy + PartialEq>(rng: &mut Rng, list: &[T], count: usize) -> Vec<T> {
    let mut chosen = Vec::with_capacity(count);
    while chosen.len() < count {
        let entry = pick(rng, list);
        if !chosen.contains(&entry) {
            chosen.push(entry);
        }
    }
    chosen
}

/// Whether something happens that happens in `percent` cases of a hundred.
pub(super) fn chance(rng: &mut Rng, percent: u32) -> bool {
    rng.u32(..100) < percent
}

/// A sentence with its gaps `{name}` filled.
pub(super) fn fill(sentence: &str, values: &[(&str, &str)]) -> String {
    values.iter().fold(sentence.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
}

/// One of several wordings, with its gaps filled.
pub(super) fn say(rng: &mut Rng, wordings: &[&str], values: &[(&str, &str)]) -> String {
    fill(pick(rng, wordings), values)
}

/// The letters of a word with spaces between them.
pub(super) fn spelled(word: &str) -> String {
    let letters: Vec<String> = word.chars().map(String::from).collect();
    letters.join(" ")
}

/// `a`, `a and b`, `a, b and c`.
pub(super) fn enumerated<T: AsRef<str>>(entries: &[T]) -> String {
    match entries {
        [] => String::new(),
        [only] => only.as_ref().to_owned(),
        [first @ .., last] => {
            let first: Vec<&str> = first.iter().map(AsRef::as_ref).collect();
            format!("{} and {}", first.join(", "), last.as_ref())
        }
    }
}
