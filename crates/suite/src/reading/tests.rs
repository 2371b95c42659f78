//! What holds for every reading task: letters are whole, large enough and apart, and the answer can be read.

use std::collections::HashSet;

use fastrand::Rng;

use super::page::{Drawn, LEGIBLE, SIDES};
use super::{TASKS, capitalised, chart, clock, in_sentence, price, table, text};
use crate::{Answer, Split};

const SAMPLES: u64 = 200;
type Draw = fn(&mut Rng) -> Drawn;

const DRAW: [(&str, Draw); 5] = [
    ("read_text", text::draw),
    ("price_tag", price::draw),
    ("clock", clock::draw),
    ("bar_chart", chart::draw),
    ("table_cell", table::draw),
];

#[test]
fn drawings_are_whole_legible_and_small() {
    for (name, draw) in DRAW {
        let mut area = 0.0;
        for seed in 0..SAMPLES {
            let drawn = draw(&mut Rng::with_seed(seed));
            let about = format!("{name} {seed}");
            letters_are_inside(&drawn, &about);
            letters_are_legible(&drawn, &about);
            lines_are_apart(&drawn, &about);
            sides_are_in_range(&drawn, &about);
            let there = drawn.page.written.iter().any(|written| written.text == drawn.answer);
            assert!(there || name == "clock", "{about}: the answer {} is not written", drawn.answer);
            area += drawn.page.frame.width * drawn.page.frame.height / 200.0;
        }
        assert!(area < 300.0 * 300.0, "{name}: {area} pixels on average");
    }
}

fn letters_are_inside(drawn: &Drawn, about: &str) {
    let (width, height) = (drawn.page.frame.width, drawn.page.frame.height);
    for written in &drawn.page.written {
        let ink = written.bounds;
        let inside = ink.left() >= 0.0 && ink.top() >= 0.0 && ink.right() <= width && ink.bottom() <= height;
        assert!(inside, "{about}: {written:?} in {width} x {height}");
    }
}

fn letters_are_legible(drawn: &Drawn, about: &str) {
    for written in &drawn.page.written {
        let seen = written.cap * drawn.page.frame.scale();
        assert!(seen >= LEGIBLE - 0.01, "{about}: {} has capitals of {seen} pixels", written.text);
    }
}

/// Turned lines have boxes that reach into each other: those of tags are left out.
fn lines_are_apart(drawn: &Drawn, about: &str) {
    for (index, one) in drawn.page.written.iter().enumerate() {
        for other in &drawn.page.written[..index] {
            let overlap = one.bounds.intersect(&other.bounds);
            assert!(
                overlap.is_none() || about.starts_with("price"),
                "{about}: {} on {}",
                one.text,
                other.text
            );
        }
    }
}

fn sides_are_in_range(drawn: &Drawn, about: &str) {
    let frame = drawn.page.frame;
    let (short, long) = (frame.width.min(frame.height), frame.width.max(frame.height));
    assert!(short >= SIDES[0] && long <= SIDES[1] && long <= 4.0 * short, "{about}: {frame:?}");
}

#[test]
fn equal_seeds_give_equal_samples() {
    for task in TASKS {
        for index in 0..SAMPLES / 10 {
            let (one, other) = (task.sample(Split::Train, index), task.sample(Split::Train, index));
            assert_eq!(one.pictures, other.pictures, "{}", task.name);
            assert_eq!(one.messages, other.messages, "{}", task.name);
            assert_eq!(one.answer, other.answer, "{}", task.name);
        }
    }
}

#[test]
fn no_content_is_in_both_splits() {
    for task in TASKS {
        let contents = |split, count| -> HashSet<String> {
            (0..count).map(|index| task.sample(split, index).content).collect()
        };
        // A held-out sample is the eighth that is drawn: fewer of them.
        let (train, held_out) = (contents(Split::Train, SAMPLES), contents(Split::HeldOut, SAMPLES / 5));
        assert!(train.is_disjoint(&held_out), "{}", task.name);
        assert!(
            train.len() > 60 && held_out.len() >= 12,
            "{}: {} and {}",
            task.name,
            train.len(),
            held_out.len()
        );
    }
}

#[test]
fn the_right_answer_is_right_and_another_is_not() {
    for task in TASKS {
        let sample = task.sample(Split::HeldOut, 0);
        assert!(sample.is_right(&Answer::of_message(&sample.answer)));
        assert!(!sample.is_right(&Answer { content: "?".to_owned(), tool_calls: Vec::new() }));
        assert_eq!(sample.pictures.len(), 1);
        assert_eq!(sample.messages[0]["content"][0]["type"], "image");
    }
}

#[test]
fn read_text_is_one_to_eight_characters() {
    for seed in 0..SAMPLES {
        let answer = text::draw(&mut Rng::with_seed(seed)).answer;
        assert!((1..=8).contains(&answer.len()), "{seed}: {answer}");
    }
}

#[test]
fn bars_differ_visibly_and_the_largest_is_the_answer() {
    for seed in 0..SAMPLES {
        let drawn = chart::draw(&mut Rng::with_seed(seed));
        let mut bars: Vec<(u32, &str)> = drawn.content.split(", ").map(bar).collect();
        bars.sort_unstable();
        assert!(bars.windows(2).all(|pair| pair[1].0 - pair[0].0 >= 8), "{seed}: {bars:?}");
        if ["largest", "tallest", "highest"].iter().any(|word| drawn.question.contains(word)) {
            assert_eq!(drawn.answer, bars[bars.len() - 1].1, "{seed}");
        }
        if ["smallest", "shortest", "lowest"].iter().any(|word| drawn.question.contains(word)) {
            assert_eq!(drawn.answer, bars[0].1, "{seed}");
        }
    }
}

fn bar(text: &str) -> (u32, &str) {
    let (name, value) = text.split_once(' ').unwrap();
    (value.parse().unwrap(), name)
}

#[test]
fn a_clock_shows_each_of_144_times() {
    let mut rng = Rng::with_seed(1);
    let times: HashSet<[u8; 2]> = (0..3000).map(|_| clock::time(&mut rng)).collect();
    assert_eq!(times.len(), 144);
    let right = |time: &[u8; 2]| (1..=12).contains(&time[0]) && time[1] < 60 && time[1].is_multiple_of(5);
    assert!(times.iter().all(right));
}

#[test]
fn names_keep_their_capital_in_a_sentence() {
    assert_eq!(in_sentence("Kim"), "Kim");
    assert_eq!(in_sentence("Tea"), "the tea");
    assert_eq!(capitalised("tea"), "Tea");
}
