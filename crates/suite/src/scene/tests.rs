//! Tests of the scene tasks: answers are found again in the pixels, without the code that drew them.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    TASKS,
    colour::{Colour, Rgb, distance_squared},
    object::{Place, number, sentence},
    shape::Shape,
};
use crate::{Answer, Picture, Sample, Split, Task};

const SAMPLES: u64 = 200;

/// A blot of one colour in a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Blot {
    place: Place,
    colour: Colour,
    pixels: usize,
    /// Percent of the smallest circle around its middle that it fills.
    fill: u32,
}

fn task(name: &str) -> &'static Task {
    TASKS.iter().find(|task| task.name == name).unwrap()
}

fn samples(name: &str) -> impl Iterator<Item = Sample> {
    (0..SAMPLES).map(move |index| {
        task(name).sample(if index % 4 == 0 { Split::HeldOut } else { Split::Train }, index)
    })
}

fn question(sample: &Sample) -> &str {
    sample.messages[0]["content"].as_array().unwrap().last().unwrap()["text"].as_str().unwrap()
}

fn answer(sample: &Sample) -> &str {
    sample.answer["content"].as_str().unwrap()
}

fn at(picture: &Picture, index: usize) -> Rgb {
    [picture.rgb[3 * index], picture.rgb[3 * index + 1], picture.rgb[3 * index + 2]]
}

/// Connected areas that stand out from the top left pixel, with the colour that most of each has, row by row of thirds.
fn blots(picture: &Picture) -> Vec<Blot> {
    let (width, height) = (picture.width, picture.height);
    let mut open: Vec<bool> = (0..width * height)
        .map(|index| distance_squared(at(picture, index), at(picture, 0)) > 52 * 52)
        .collect();
    let mut blots = Vec::new();
    for start in 0..open.len() {
        let (mut todo, mut area) = (vec![start], Vec::new());
        while let Some(index) = todo.pop() {
            if !std::mem::take(&mut open[index]) {
                continue;
            }
            area.push(index);
            let (x, y) = (index % width, index / width);
            assert!(x > 0 && y > 0 && x < width - 1 && y < height - 1, "an object touches the edge");
            todo.extend([index - 1, index + 1, index - width, index + width]);
        }
        if area.len() > 20 {
            blots.push(blot(picture, &area));
        }
    }
    blots.sort_unstable();
    blots
}

fn blot(picture: &Picture, area: &[usize]) -> Blot {
    let mut votes: BTreeMap<Colour, usize> = BTreeMap::new();
    for &index in area {
        let nearest =
            Colour::ALL.into_iter().min_by_key(|colour| distance_squared(colour.rgb(), at(picture, index)));
        *votes.entry(nearest.unwrap()).or_default() += 1;
    }
    let (colour, _) = votes.into_iter().max_by_key(|(_, pixels)| *pixels).unwrap();
    let mean = |part: fn(usize, usize) -> usize| {
        area.iter().map(|&index| part(index, picture.width)).sum::<usize>() as f64 / area.len() as f64
    };
    let (x, y) = (mean(|index, width| index % width), mean(|index, width| index / width));
    let third = |at: f64, side: usize| ((at + 0.5) * 3.0 / side as f64) as usize;
    let place = Place { row: third(y, picture.height), column: third(x, picture.width) };
    let square = |index: usize| {
        ((index % picture.width) as f64 - x).powi(2) + ((index / picture.width) as f64 - y).powi(2)
    };
    let reach = area.iter().map(|&index| square(index)).fold(0.0, f64::max).sqrt() + 0.3;
    let fill = (100.0 * area.len() as f64 / (std::f64::consts::PI * reach * reach)).round() as u32;
    Blot { place, colour, pixels: area.len(), fill }
}

/// The colours that `text` names, in its order.
fn colours(text: &str) -> Vec<Colour> {
    let words = text.split(|letter: char| !letter.is_alphabetic());
    words
        .filter_map(|word| Colour::ALL.into_iter().find(|colour| colour.name() == word.to_lowercase()))
        .collect()
}

/// The place that `text` ends with.
fn place(text: &str) -> Option<Place> {
    let text = text.trim_end_matches(['.', '?']);
    Place::all()
        .filter(|place| text.ends_with(&format!("at the {}", place.name())))
        .max_by_key(|p| p.name().len())
}

/// Percent of the circle around its middle that a shape fills: geometry, except for the heart, which is as drawn.
fn fill(shape: Shape) -> u32 {
    match shape {
        Shape::Circle => 100,
        Shape::Hexagon => 83,
        Shape::Ring => 67,
        Shape::Square => 64,
        Shape::Cross => 59,
        Shape::Heart => 71,
        Shape::Rectangle => 51,
        Shape::Triangle => 41,
        Shape::Star | Shape::Diamond => 39,
    }
}

fn shape(text: &str) -> Shape {
    Shape::ALL.into_iter().find(|shape| text.contains(shape.name())).unwrap()
}

fn only(blots: &[Blot], wanted: impl Fn(&Blot) -> bool) -> Option<&Blot> {
    let mut found = blots.iter().filter(|blot| wanted(blot));
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

#[test]
fn colours_are_those_of_the_pixels() {
    let mut by_place = 0;
    for sample in samples("shape_colour") {
        let colour = colours(answer(&sample))[0];
        let blots = blots(&sample.pictures[0]);
        match place(question(&sample)) {
            Some(place) => {
                by_place += 1;
                let blot = only(&blots, |blot| blot.place == place).unwrap();
                assert_eq!(blot.colour, colour, "{}", question(&sample));
            }
            None => assert!(blots.iter().any(|blot| blot.colour == colour), "{}", question(&sample)),
        }
    }
    assert!(by_place > 30);
}

#[test]
fn objects_asked_for_by_colour_or_place_are_there_once() {
    let mut seen = 0;
    for sample in samples("shape_what") {
        let (question, blots) = (question(&sample), blots(&sample.pictures[0]));
        if let Some(place) = place(question) {
            let blot = only(&blots, |blot| blot.place == place).unwrap();
            let told = colours(answer(&sample));
            assert!(told.is_empty() || told == [blot.colour], "{question} {}", answer(&sample));
        } else if let [colour] = colours(question)[..] {
            assert!(only(&blots, |blot| blot.colour == colour).is_some(), "{question}");
        } else {
            assert_eq!(blots.len(), 1, "{question}");
            continue;
        }
        seen += 1;
    }
    assert!(seen > 80);
}

#[test]
fn counts_are_those_of_the_pixels() {
    for sample in samples("shape_count") {
        let (question, blots) = (question(&sample), blots(&sample.pictures[0]));
        let count = match colours(question)[..] {
            [colour] if question.contains("objects") => {
                blots.iter().filter(|blot| blot.colour == colour).count()
            }
            [] if question.contains("objects") => blots.len(),
            _ => continue,
        };
        assert_eq!(answer(&sample), sentence(number(count)), "{question}");
    }
}

#[test]
fn places_are_those_of_the_pixels() {
    let mut told = 0;
    for sample in samples("shape_where") {
        let (question, blots) = (question(&sample), blots(&sample.pictures[0]));
        let place = place(answer(&sample).to_lowercase().as_str()).unwrap();
        let there = only(&blots, |blot| blot.place == place).unwrap();
        if let [colour] = colours(question)[..] {
            assert_eq!(there.colour, colour, "{question}");
            told += usize::from(only(&blots, |blot| blot.colour == colour).is_some());
        }
    }
    assert!(told > 80);
}

#[test]
fn relations_are_those_of_the_pixels() {
    let mut checked = 0;
    for sample in samples("shape_relation") {
        let (question, blots) = (question(&sample), blots(&sample.pictures[0]));
        let of = |colour: Colour| only(&blots, |blot| blot.colour == colour);
        let beyond = |a: &Blot, b: &Blot| match () {
            () if question.contains("left of") => a.place.column < b.place.column,
            () if question.contains("right of") => a.place.column > b.place.column,
            () if question.contains("above") => a.place.row < b.place.row,
            () => a.place.row > b.place.row,
        };
        match colours(question)[..] {
            [a, b] => {
                if let (Some(a), Some(b)) = (of(a), of(b)) {
                    assert_eq!(answer(&sample) == "Yes.", beyond(a, b), "{question}");
                    assert_ne!(beyond(a, b), beyond(b, a), "{question}");
                    checked += 1;
                }
            }
            [b] => {
                if let Some(b) = of(b) {
                    let a = only(&blots, |a| beyond(a, b)).unwrap();
                    assert_eq!(colours(answer(&sample)), [a.colour], "{question}");
                    checked += 1;
                }
            }
            _ => panic!("{question}"),
        }
    }
    assert!(checked > 60, "{checked}");
}

#[test]
fn descriptions_are_those_of_the_pixels() {
    let mut shaped = 0;
    for sample in samples("scene_describe") {
        let (count, list) = answer(&sample).split_once(": ").unwrap();
        let told: Vec<_> = list
            .split(", ")
            .flat_map(|part| part.split(" and "))
            .map(|part| (place(part), colours(part)))
            .collect();
        let seen: Vec<_> =
            blots(&sample.pictures[0]).iter().map(|b| (Some(b.place), vec![b.colour])).collect();
        assert_eq!(told, seen);
        let shapes = list.split(", ").flat_map(|part| part.split(" and ")).map(shape);
        for (shape, blot) in shapes.zip(blots(&sample.pictures[0])) {
            // Of a small blot the edge is too large a part.
            if blot.pixels > 500 {
                assert!(fill(shape).abs_diff(blot.fill) <= 6, "{shape:?} {blot:?}");
                shaped += 1;
            }
        }
        assert!(count.contains(number(seen.len())), "{count}");
    }
    assert!(shaped > 150, "{shaped}");
}

#[test]
fn changes_are_those_of_the_pixels() {
    let tell = |blots: &[Blot]| blots.iter().map(|blot| (blot.place, blot.colour)).collect::<BTreeSet<_>>();
    for sample in samples("two_pictures") {
        let (first, second) = (tell(&blots(&sample.pictures[0])), tell(&blots(&sample.pictures[1])));
        let gone: Vec<_> = first.difference(&second).collect();
        let came: Vec<_> = second.difference(&first).collect();
        let (text, named) = (answer(&sample), colours(answer(&sample)));
        match (&gone[..], &came[..]) {
            ([], [(place_, colour)]) => {
                assert!(
                    text.contains("was added") && place(text) == Some(*place_) && named == [*colour],
                    "{text}"
                );
            }
            ([(_, colour)], []) => assert!(text.ends_with("was removed.") && named == [*colour], "{text}"),
            ([], []) => assert!(text.contains("is now a ") && named.len() == 1, "{text}"),
            ([(here, old)], [(there, new)]) if here == there => assert_eq!(named, [*old, *new], "{text}"),
            ([(_, old)], [(there, new)]) => {
                assert!(old == new && named == [*old], "{text}");
                assert!(text.ends_with(&format!("moved to the {}.", there.name())), "{text}");
            }
            other => panic!("{other:?} {text}"),
        }
    }
}

#[test]
fn objects_are_large_enough_to_be_seen() {
    for task in TASKS {
        for sample in samples(task.name).take(40) {
            for picture in &sample.pictures {
                let area = picture.width * picture.height;
                let scale = (262_144.0 / area as f64).min(1.0);
                for blot in blots(picture) {
                    // The smallest star: a sixth of the square around its circle of 22 pixels.
                    assert!(blot.pixels as f64 * scale > 484.0 / 6.0, "{}: {blot:?}", task.name);
                }
            }
        }
    }
}

#[test]
fn pictures_are_of_many_sizes_and_mostly_small() {
    let pictures: Vec<Picture> =
        TASKS.iter().flat_map(|task| samples(task.name)).flat_map(|sample| sample.pictures).collect();
    let sides = || pictures.iter().flat_map(|picture| [picture.width, picture.height]);
    assert!(sides().all(|side| (96..=768).contains(&side)));
    assert!(sides().any(|side| side > 700) && sides().any(|side| side < 110));
    assert!(pictures.iter().all(|p| p.width.max(p.height) <= 3 * p.width.min(p.height) + 2));
    let mean = pictures.iter().map(|p| p.width * p.height).sum::<usize>() / pictures.len();
    assert!((40_000..70_000).contains(&mean), "{mean}");
    let large = pictures.iter().filter(|p| p.width * p.height > 512 * 512).count();
    assert!((1..=pictures.len() / 15).contains(&large), "{large} of {}", pictures.len());
}

#[test]
fn equal_numbers_give_equal_samples() {
    for task in TASKS {
        for split in [Split::Train, Split::HeldOut] {
            let (a, b) = (task.sample(split, 7), task.sample(split, 7));
            assert_eq!((&a.content, &a.messages, &a.answer), (&b.content, &b.messages, &b.answer));
            assert!(a.pictures == b.pictures);
            assert_ne!(a.content, task.sample(split, 8).content);
            assert!(a.is_right(&Answer::of_message(&a.answer)));
            let parts = a.messages[0]["content"].as_array().unwrap();
            assert_eq!(parts.iter().filter(|part| part["type"] == "image").count(), a.pictures.len());
        }
    }
}

#[test]
fn splits_share_no_content_and_both_are_rich() {
    for task in TASKS {
        let contents =
            |split| (0..SAMPLES / 2).map(|index| task.sample(split, index).content).collect::<BTreeSet<_>>();
        let (train, held_out) = (contents(Split::Train), contents(Split::HeldOut));
        assert!(train.is_disjoint(&held_out), "{}", task.name);
        assert!(train.len() > 80 && held_out.len() > 80, "{}: {} {}", task.name, train.len(), held_out.len());
    }
}

#[test]
fn answers_are_balanced() {
    let tally = |name: &str| {
        let mut tally: BTreeMap<String, usize> = BTreeMap::new();
        for index in 0..600 {
            *tally.entry(answer(&task(name).sample(Split::Train, index)).to_owned()).or_default() += 1;
        }
        tally
    };
    for (name, answers) in [("shape_count", 6), ("shape_where", 9), ("shape_colour", 10)] {
        let tally = tally(name);
        assert_eq!(tally.len(), answers, "{tally:?}");
        let fair = 600 / answers;
        assert!(tally.values().all(|count| (fair * 6 / 10..fair * 16 / 10).contains(count)), "{tally:?}");
    }
    let shapes = tally("shape_what");
    for shape in Shape::ALL {
        let count: usize =
            shapes.iter().filter(|(text, _)| text.contains(shape.name())).map(|(_, n)| n).sum();
        assert!((36..96).contains(&count), "{} {count}", shape.name());
    }
    let relations = tally("shape_relation");
    let (yes, no) = (relations["Yes."], relations["No."]);
    assert!(yes.abs_diff(no) < 60 && (300..420).contains(&(yes + no)), "{yes} {no}");
    let changes = tally("two_pictures");
    for change in ["moved to", "was added", "was removed", "is now a ", "is now "] {
        let count: usize = changes.iter().filter(|(text, _)| text.contains(change)).map(|(_, n)| n).sum();
        let fair = if change == "is now " { 240 } else { 120 };
        assert!(count.abs_diff(fair) < 40, "{change} {count}");
    }
}
