//! `clock`: the time on a face with two hands.

use fastrand::Rng;
use tiny_skia::{PathBuilder, Transform};

use super::colors;
use super::font::Font;
use super::page::{Align, Drawn, Frame, LEGIBLE, Page, Pen, pick, polygon, sin_cos, turned};
use crate::Sample;
use crate::canvas::Rgb;

const QUESTIONS: &[&str] = &[
    "What time is it?",
    "What time does the clock show?",
    "Read the clock.",
    "What is the time on the clock?",
    "Which time do the hands show?",
];

pub(crate) fn generate(rng: &mut Rng) -> Sample {
    draw(rng).into_sample(rng)
}

pub(crate) fn draw(rng: &mut Rng) -> Drawn {
    let [hour, minute] = time(rng);
    let radius = radius(rng);
    let side = 2.0 * radius + 8.0;
    let blank = if rng.u8(..4) == 0 { 120.0 } else { 30.0 };
    let frame = Frame::around([side, side], blank, rng);
    let face = Face { center: [frame.left + side / 2.0, frame.top + side / 2.0], radius };

    let paper = colors::paper(rng);
    let dial = if rng.bool() { paper } else { colors::paper(rng) };
    let ink = colors::ink(dial, rng);
    let mut page = Page::new(frame, paper);
    face.dial(&mut page, dial, ink, rng);
    face.marks(&mut page, ink, rng);
    let hand = if rng.u8(..3) == 0 { colors::ink(dial, rng) } else { ink };
    let minutes = f32::from(minute);
    let thick = 0.085 + 0.03 * rng.f32();
    face.hand(&mut page, 30.0 * f32::from(hour) + minutes / 2.0, [0.46 + 0.06 * rng.f32(), thick], ink);
    face.hand(&mut page, 6.0 * minutes, [0.76 + 0.1 * rng.f32(), thick / 2.0], hand);
    face.disc(&mut page, 0.07, ink);
    let time = format!("{hour}:{minute:02}");
    Drawn { page, content: time.clone(), question: pick(QUESTIONS, rng).to_owned(), answer: time }
}

/// Hour and minute: one of 144.
pub(crate) fn time(rng: &mut Rng) -> [u8; 2] {
    [rng.u8(1..=12), 5 * rng.u8(..12)]
}

/// Mostly small; one in twenty is large.
fn radius(rng: &mut Rng) -> f32 {
    let share = rng.f32();
    if rng.u8(..20) == 0 { 180.0 + 190.0 * share } else { 46.0 + 130.0 * share * share }
}

struct Face {
    center: [f32; 2],
    radius: f32,
}

impl Face {
    /// The point at `share` of the radius in the direction of `degrees`, clockwise from twelve.
    fn point(&self, degrees: f32, share: f32) -> [f32; 2] {
        let [sin, cos] = sin_cos(degrees);
        let reach = self.radius * share;
        [self.center[0] + sin * reach, self.center[1] - cos * reach]
    }

    fn disc(&self, page: &mut Page, share: f32, rgb: Rgb) {
        let circle = PathBuilder::from_circle(self.center[0], self.center[1], self.radius * share);
        if let Some(circle) = circle {
            page.canvas.fill(&circle, rgb, Transform::identity());
        }
    }

    fn dial(&self, page: &mut Page, dial: Rgb, ink: Rgb, rng: &mut Rng) {
        if rng.u8(..5) == 0 {
            let [x, y] = [self.center[0] - self.radius, self.center[1] - self.radius];
            let side = 2.0 * self.radius;
            page.block([x, y, side, side], ink);
            let rim = (self.radius * 0.04).max(1.5);
            page.block([x + rim, y + rim, side - 2.0 * rim, side - 2.0 * rim], dial);
        } else {
            self.disc(page, 1.0, ink);
            self.disc(page, 0.93 + 0.04 * rng.f32(), dial);
        }
    }

    /// Numerals, ticks, or numerals at the quarters, as far as letters of that size can be read.
    fn marks(&self, page: &mut Page, ink: Rgb, rng: &mut Rng) {
        let cap = self.radius * 0.17;
        let legible = page.frame.allows(cap) && cap >= LEGIBLE;
        let style = rng.u8(..5);
        let font = Font::any(rng);
        for number in 1..=12_u8 {
            let degrees = 30.0 * f32::from(number);
            let quarter = number.is_multiple_of(3);
            if legible && (style <= 1 || style == 2 && quarter) {
                let [x, y] = self.point(degrees, 0.76);
                let pen = Pen { cap, ink, turn: Transform::identity() };
                page.write(&font.line(&number.to_string()), pen, [x, y + cap / 2.0], Align::Center);
            } else {
                let (inner, width) = if quarter { (0.78, 0.05) } else { (0.84, 0.025) };
                let width = (self.radius * width).max(1.2);
                page.rule(self.point(degrees, inner), self.point(degrees, 0.92), width, ink);
            }
        }
    }

    /// A hand of this length and width in radii, with a short tail.
    fn hand(&self, page: &mut Page, degrees: f32, [length, width]: [f32; 2], rgb: Rgb) {
        let [x, y] = self.center;
        let (half, reach) = ((self.radius * width / 2.0).max(1.0), self.radius * length);
        let tail = self.radius * 0.1;
        let points = [
            [x - half, y + tail],
            [x + half, y + tail],
            [x + half, y - reach * 0.9],
            [x, y - reach],
            [x - half, y - reach * 0.9],
        ];
        if let Some(path) = polygon(&points) {
            page.canvas.fill(&path, rgb, turned(degrees, self.center));
        }
    }
}
