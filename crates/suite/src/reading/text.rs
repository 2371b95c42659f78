//! `read_text`: a word, a number or a serial somewhere in a picture.

use std::sync::LazyLock;

use fastrand::Rng;
use tiny_skia::{PathBuilder, Rect};

use super::colors;
use super::font::{Font, Line};
use super::page::{Align, Drawn, Frame, Page, Pen, SMALLEST_CAP, pick, sin_cos, turned};
use crate::Sample;
use crate::canvas::Rgb;

/// Characters of serials: nothing that looks like a neighbour (O and 0, I and 1, S and 5, Z and 2).
const SERIAL_LETTERS: &[u8] = b"ABCDEFGHJKLMNPQRTUVWXY";
const SERIAL_DIGITS: &[u8] = b"0123456789";
/// Lower-case letters of meaningless words.
const SMALL_LETTERS: &[u8] = b"abcdefghkmnpqrtuvwxyz";

const QUESTIONS: &[&str] =
    &["What does it say?", "Read the text.", "What is written here?", "What text is in the picture?"];
const NUMBER_QUESTIONS: &[&str] =
    &["What number is this?", "Read the number.", "Which number is in the picture?", "What does it say?"];
const SERIAL_QUESTIONS: &[&str] = &[
    "What is the serial number?",
    "Read the serial number.",
    "Which serial number is in the picture?",
    "What is the code?",
    "What does it say?",
    "Read the text.",
];

static WORDS: LazyLock<Vec<&'static str>> =
    LazyLock::new(|| include_str!("../../assets/words.txt").split_whitespace().collect());

pub(crate) fn generate(rng: &mut Rng) -> Sample {
    draw(rng).into_sample(rng)
}

pub(crate) fn draw(rng: &mut Rng) -> Drawn {
    let (text, questions) = text(rng);
    let line = Font::any(rng).line(&text);
    let angle = if rng.u8(..5) < 2 { 0.0 } else { 16.0 * rng.f32() - 8.0 };
    let plate = rng.u8(..10);
    let border = if plate < 5 { 0.5 } else { 0.15 };
    let size = |cap: f32| {
        let [sin, cos] = sin_cos(angle);
        let (width, height) = (line.bounds.width() + 2.0 * border, line.bounds.height() + 2.0 * border);
        let (wide, high) = (width * cos + height * sin.abs(), width * sin.abs() + height * cos);
        [wide * cap + 6.0, high * cap + 6.0]
    };
    let (caps, blank) = if rng.u8(..20) == 0 { ([30.0, 150.0], 800.0) } else { ([SMALLEST_CAP, 56.0], 90.0) };
    let (cap, frame) = Frame::fit(rng, caps, blank, size);
    let [wide, high] = size(cap);
    let center = [frame.left + wide / 2.0, frame.top + high / 2.0];

    let paper = colors::paper(rng);
    let mut page = Page::new(frame, paper);
    distract(&mut page, [frame.top, frame.top + high], paper, rng);
    let pen = Pen { cap, ink: colors::ink(paper, rng), turn: turned(angle, center) };
    let pen = match plate {
        0..=2 => filled_plate(&mut page, &line, pen, center, rng),
        3..=4 => outlined_plate(&mut page, &line, pen, center),
        _ => pen,
    };
    let middle = f32::midpoint(line.bounds.top(), line.bounds.bottom());
    page.write(&line, pen, [center[0], center[1] - middle * cap], Align::Center);
    // Equal but for case is equal, and a number after a word does not count: a word that is held out is never seen in
    // capitals or in company either.
    let content = text.split(' ').next().unwrap_or_default().to_lowercase();
    Drawn { page, content, question: pick(questions, rng).to_owned(), answer: text }
}

/// What is written, and the ways to ask for it.
fn text(rng: &mut Rng) -> (String, &'static [&'static str]) {
    match rng.u8(..20) {
        0..=4 => {
            let length = length(rng, 8);
            (random(SERIAL_DIGITS, length, rng), NUMBER_QUESTIONS)
        }
        5..=10 => (serial(rng), SERIAL_QUESTIONS),
        11..=13 => {
            let word = WORDS[rng.usize(..WORDS.len())];
            (in_any_case(word, rng), QUESTIONS)
        }
        14..=16 => {
            let word = made_up(rng);
            (in_any_case(&word, rng), QUESTIONS)
        }
        17 => {
            let short: Vec<&str> = WORDS.iter().copied().filter(|word| word.len() <= 5).collect();
            (format!("{} {}", in_any_case(pick(&short, rng), rng), rng.u8(1..100)), QUESTIONS)
        }
        18 => {
            let length = length(rng, 6);
            (random(SERIAL_LETTERS, length, rng), QUESTIONS)
        }
        _ => {
            let length = rng.usize(3..=6);
            (random(SMALL_LETTERS, length, rng), QUESTIONS)
        }
    }
}

/// Mostly 3 to 6 characters.
fn length(rng: &mut Rng, longest: usize) -> usize {
    if rng.u8(..5) == 0 { rng.usize(1..=longest) } else { rng.usize(3..=6) }
}

fn random(characters: &[u8], length: usize, rng: &mut Rng) -> String {
    (0..length).map(|_| char::from(characters[rng.usize(..characters.len())])).collect()
}

/// A word that nobody has seen, of 3 to 7 letters: with these a model must read and cannot guess.
fn made_up(rng: &mut Rng) -> String {
    const STARTS: &[&str] = &[
        "b", "bl", "br", "c", "ch", "cl", "cr", "d", "dr", "f", "fl", "fr", "g", "gl", "gr", "h", "j", "k",
        "l", "m", "n", "p", "ph", "pl", "pr", "qu", "r", "s", "sc", "sh", "sk", "sl", "sm", "sn", "sp", "st",
        "t", "th", "tr", "v", "w", "wh", "y", "z",
    ];
    const VOWELS: &[&str] = &["a", "e", "i", "o", "u", "ai", "ea", "ee", "ie", "oo", "ou", "y"];
    const ENDS: &[&str] = &[
        "", "b", "ck", "ct", "d", "er", "f", "g", "ght", "k", "l", "ll", "m", "n", "nd", "ng", "nt", "p",
        "r", "rk", "rn", "s", "ss", "st", "t", "w", "x", "y",
    ];
    loop {
        let mut word = String::new();
        for _ in 0..rng.u8(1..=2) {
            word += pick(STARTS, rng);
            word += pick(VOWELS, rng);
        }
        word += pick(ENDS, rng);
        if (3..=7).contains(&word.len()) {
            return word;
        }
    }
}

/// Letters (`A`), digits (`9`) and dashes after a pattern.
fn serial(rng: &mut Rng) -> String {
    let patterns = [
        "A9", "A99", "AA9", "A9-99", "AA-99", "A99A", "9A9", "A9-99A", "AA999", "99-AA", "A9A9A", "AAA-99",
        "99A9",
    ];
    let long = ["AA99AA", "AA-9999", "A99-A99", "999-AAA", "AA-99-AA", "A9999A"];
    let pattern = if rng.u8(..4) == 0 { pick(&long, rng) } else { pick(&patterns, rng) };
    let character = |kind| match kind {
        'A' => char::from(SERIAL_LETTERS[rng.usize(..SERIAL_LETTERS.len())]),
        '9' => char::from(SERIAL_DIGITS[rng.usize(..SERIAL_DIGITS.len())]),
        other => other,
    };
    pattern.chars().map(character).collect()
}

fn in_any_case(word: &str, rng: &mut Rng) -> String {
    match rng.u8(..3) {
        0 => word.to_owned(),
        1 => word.to_uppercase(),
        _ => super::capitalised(word),
    }
}

/// A plate under the text in a colour of its own; the pen gets ink that shows on it.
fn filled_plate(page: &mut Page, line: &Line, pen: Pen, center: [f32; 2], rng: &mut Rng) -> Pen {
    let color = colors::paper(rng);
    if let Some(rect) = plate(line, pen.cap, center) {
        page.canvas.fill(&PathBuilder::from_rect(rect), color, pen.turn);
    }
    Pen { ink: colors::ink(color, rng), ..pen }
}

fn outlined_plate(page: &mut Page, line: &Line, pen: Pen, center: [f32; 2]) -> Pen {
    if let Some(rect) = plate(line, pen.cap, center) {
        page.canvas.stroke(&PathBuilder::from_rect(rect), pen.ink, (pen.cap / 12.0).max(1.5), pen.turn);
    }
    pen
}

fn plate(line: &Line, cap: f32, [x, y]: [f32; 2]) -> Option<Rect> {
    let (width, height) = ((line.bounds.width() + 0.9) * cap, (line.bounds.height() + 0.9) * cap);
    Rect::from_xywh(x - width / 2.0, y - height / 2.0, width, height)
}

/// Faint lines above and below the band where the text is.
fn distract(page: &mut Page, band: [f32; 2], paper: Rgb, rng: &mut Rng) {
    if rng.u8(..3) > 0 {
        return;
    }
    let ink = colors::area(paper, rng);
    let faint = colors::between(paper, ink, 60);
    let frame = page.frame;
    for [top, bottom] in [[0.0, band[0]], [band[1], frame.height]] {
        if bottom - top >= 10.0 {
            let mut height = || top + 3.0 + (bottom - top - 6.0) * rng.f32();
            let (from, to) = (height(), height());
            page.rule([0.0, from], [frame.width, to], 1.0 + 2.0 * rng.f32(), faint);
        }
    }
}
