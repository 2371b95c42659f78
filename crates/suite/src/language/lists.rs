//! Lists and letters: sort, reverse, count. Written steps are in `thinking`.

use fastrand::Rng;

use super::exercise;
use super::phrase::{COMMON, chance, distinct, pick, say, spelled};
use crate::Sample;

const SORT_NUMBERS: [&str; 6] = [
    "Sort these numbers: {list}.",
    "Sort {list}.",
    "Put these numbers in order: {list}.",
    "Sort from small to large: {list}.",
    "Arrange {list} from smallest to largest.",
    "Sort these numbers in ascending order: {list}.",
];
const SORT_NUMBERS_DOWN: [&str; 5] = [
    "Sort these numbers from large to small: {list}.",
    "Sort {list} in descending order.",
    "Put these numbers in order, largest first: {list}.",
    "Arrange {list} from largest to smallest.",
    "Sort these numbers in descending order: {list}.",
];
const SORT_WORDS: [&str; 5] = [
    "Sort these words: {list}.",
    "Sort these words from a to z: {list}.",
    "Put these words in alphabetical order: {list}.",
    "Sort alphabetically: {list}.",
    "Arrange {list} in alphabetical order.",
];
const SORT_WORDS_DOWN: [&str; 4] = [
    "Sort these words from z to a: {list}.",
    "Sort {list} from z to a.",
    "Put these words in reverse alphabetical order: {list}.",
    "Arrange {list} in reverse alphabetical order.",
];
const REVERSE: [&str; 6] = [
    "Reverse this list: {list}.",
    "Reverse {list}.",
    "Say this backwards: {list}.",
    "Write this list in reverse: {list}.",
    "Turn this list around: {list}.",
    "What is {list} backwards?",
];
const REVERSE_LETTERS: [&str; 5] = [
    "Reverse these letters: {list}.",
    "Reverse the letters {list}.",
    "Write the letters {list} backwards.",
    "Say these letters backwards: {list}.",
    "Spell {list} backwards.",
];
const COUNT: [&str; 6] = [
    "How many {letter} in {word}?",
    "How many times is {letter} in {word}?",
    "Count the letter {letter} in {word}.",
    "How often is the letter {letter} in {word}?",
    "How many {letter} are in the word {word}?",
    "How many times does {letter} appear in {word}?",
];

/// Numbers or words to be sorted.
pub(super) struct Sorting {
    /// In the order of the question.
    pub(super) entries: Vec<String>,
    /// In the order of the answer.
    pub(super) sorted: Vec<String>,
    /// Of the list without its order: one list is on one side of the split however it is shuffled.
    pub(super) content: String,
    /// The question.
    pub(super) question: String,
}

impl Sorting {
    pub(super) fn draw(rng: &mut Rng, words: bool) -> Self {
        let mut sorted = if words { words_to_sort(rng) } else { numbers_to_sort(rng) };
        let content = sorted.join(", ");
        let down = chance(rng, 35);
        if down {
            sorted.reverse();
        }
        let mut entries = sorted.clone();
        rng.shuffle(&mut entries);
        let wordings: &[&str] = match (words, down) {
            (false, false) => &SORT_NUMBERS,
            (false, true) => &SORT_NUMBERS_DOWN,
            (true, false) => &SORT_WORDS,
            (true, true) => &SORT_WORDS_DOWN,
        };
        let question = say(rng, wordings, &[("list", &entries.join(", "))]);
        Self { entries, sorted, content, question }
    }
}

fn numbers_to_sort(rng: &mut Rng) -> Vec<String> {
    let all: Vec<u32> = (0..100).collect();
    let count = rng.usize(3..=6);
    let mut numbers = distinct(rng, &all, count);
    numbers.sort_unstable();
    numbers.iter().map(u32::to_string).collect()
}

/// Initials differ: the spelling of a word beyond its first letter is no part of this task.
fn words_to_sort(rng: &mut Rng) -> Vec<String> {
    let count = rng.usize(3..=5);
    let mut words: Vec<&str> = Vec::with_capacity(count);
    while words.len() < count {
        let word = pick(rng, &COMMON);
        if words.iter().all(|other| other.as_bytes()[0] != word.as_bytes()[0]) {
            words.push(word);
        }
    }
    words.sort_unstable();
    words.into_iter().map(String::from).collect()
}

pub(super) fn sort(rng: &mut Rng) -> Sample {
    let words = chance(rng, 40);
    let sorting = Sorting::draw(rng, words);
    exercise(sorting.content, &sorting.question, &sorting.sorted.join(", "))
}

pub(super) fn reverse(rng: &mut Rng) -> Sample {
    let letters = chance(rng, 40);
    let (entries, separator, wordings) = if letters {
        (letters_to_reverse(rng), " ", REVERSE_LETTERS.as_slice())
    } else {
        (entries_to_reverse(rng), ", ", REVERSE.as_slice())
    };
    let list = entries.join(separator);
    let question = say(rng, wordings, &[("list", &list)]);
    let reversed: Vec<&str> = entries.iter().rev().map(String::as_str).collect();
    exercise(list, &question, &reversed.join(separator))
}

fn letters_to_reverse(rng: &mut Rng) -> Vec<String> {
    loop {
        let word = pick(rng, &COMMON);
        if (3..=7).contains(&word.len()) {
            return word.chars().map(String::from).collect();
        }
    }
}

fn entries_to_reverse(rng: &mut Rng) -> Vec<String> {
    let count = rng.usize(3..=6);
    if chance(rng, 50) {
        return (0..count).map(|_| rng.u32(..100).to_string()).collect();
    }
    distinct(rng, &COMMON, count).into_iter().map(String::from).collect()
}

/// A letter to be counted in a word.
pub(super) struct Counting {
    pub(super) word: &'static str,
    pub(super) letter: char,
    pub(super) count: usize,
}

impl Counting {
    /// The count is drawn before the word: most letters of most words are there once.
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let count = match rng.u32(..100) {
            0..15 => 0,
            15..50 => 1,
            50..88 => 2,
            _ => 3,
        };
        loop {
            let word = pick(rng, &COMMON);
            // A letter of the word, unless none is wanted: there are three times as many that are not in it.
            let letter = match count {
                0 => char::from(rng.u8(b'a'..=b'z')),
                _ => char::from(pick(rng, word.as_bytes())),
            };
            if word.chars().filter(|other| *other == letter).count() == count {
                return Self { word, letter, count };
            }
        }
    }

    pub(super) fn content(&self) -> String {
        format!("{} in {}", self.letter, self.word)
    }

    /// The question, with the word as it is or spelled.
    pub(super) fn question(&self, rng: &mut Rng, as_letters: bool) -> String {
        let word = if as_letters { spelled(self.word) } else { self.word.to_owned() };
        say(rng, &COUNT, &[("letter", &self.letter.to_string()), ("word", &word)])
    }
}

pub(super) fn count_letters(rng: &mut Rng) -> Sample {
    let counting = Counting::draw(rng);
    let as_letters = chance(rng, 30);
    let question = counting.question(rng, as_letters);
    exercise(counting.content(), &question, &counting.count.to_string())
}
