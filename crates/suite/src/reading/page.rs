//! A sheet to write on: its size, where things fit, letters that stay large enough to be read. No task's layout.

use fastrand::Rng;
use serde_json::Map;
use tiny_skia::{Path, PathBuilder, Rect, Transform};

use super::font::Line;
use crate::canvas::{Canvas, Rgb};
use crate::message::{assistant, user_with_pictures};
use crate::{Sample, Scoring};

/// Pixels of the shortest and the longest side of a picture.
pub(crate) const SIDES: [f32; 2] = [96.0, 768.0];
/// Pictures of more pixels are scaled down before the model sees them.
const SEEN_AREA: f32 = 262_144.0;
/// Pixels of a capital's height that the model must still see.
pub(crate) const LEGIBLE: f32 = 13.0;
/// Cap height of the smallest letters drawn, in pixels: legible with something to spare for scaling.
pub(crate) const SMALLEST_CAP: f32 = 14.0;

/// Size of a picture, and the corner of the part that is used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) width: f32,
    pub(crate) height: f32,
    pub(crate) left: f32,
    pub(crate) top: f32,
}

impl Frame {
    /// A picture around content of this size, with up to `blank` pixels more a side, somewhere.
    pub(crate) fn around([width, height]: [f32; 2], blank: f32, rng: &mut Rng) -> Self {
        let [shortest, longest] = SIDES;
        let mut side = |length: f32| {
            let roomy = (length + blank * rng.f32()).min(longest.max(length));
            roomy.max(shortest).ceil()
        };
        let (wide, high) = (side(width), side(height));
        let (wide, high) = (wide.max((high / 4.0).ceil()), high.max((wide / 4.0).ceil()));
        let (left, top) = ((wide - width) * rng.f32(), (high - height) * rng.f32());
        Self { width: wide, height: high, left, top }
    }

    /// A cap height between `caps` pixels, rather a small one, and the picture around content of the size that `size`
    /// gives for it. Letters shrink until the picture is allowed.
    pub(crate) fn fit(
        rng: &mut Rng,
        caps: [f32; 2],
        blank: f32,
        size: impl Fn(f32) -> [f32; 2],
    ) -> (f32, Self) {
        let share = rng.f32();
        let mut cap = caps[0] + (caps[1] - caps[0]) * share * share;
        loop {
            let frame = Self::around(size(cap), blank, rng);
            if frame.allows(cap) || cap <= SMALLEST_CAP {
                return (cap, frame);
            }
            cap = (cap * 0.85).max(SMALLEST_CAP);
        }
    }

    /// Whether the sides are in range and capitals of `cap` pixels can still be read when the model sees them.
    pub(crate) fn allows(&self, cap: f32) -> bool {
        self.width.max(self.height) <= SIDES[1] && cap * self.scale() >= LEGIBLE
    }

    /// By how much the picture is scaled before the model sees it; at most 1.
    pub(crate) fn scale(&self) -> f32 {
        (SEEN_AREA / (self.width * self.height)).sqrt().min(1.0)
    }
}

/// Which part of a line its point is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Center,
    Right,
}

/// How a line is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pen {
    /// Height of a capital in pixels.
    pub(crate) cap: f32,
    pub(crate) ink: Rgb,
    /// Applied after the line was placed.
    pub(crate) turn: Transform,
}

/// A line that stands on a page.
#[derive(Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "tests check where letters are"))]
pub(crate) struct Written {
    pub(crate) text: String,
    pub(crate) bounds: Rect,
    pub(crate) cap: f32,
}

/// A picture being drawn, with a record of what was written where.
pub(crate) struct Page {
    pub(crate) canvas: Canvas,
    pub(crate) frame: Frame,
    pub(crate) written: Vec<Written>,
}

impl Page {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "sides are whole numbers up to 768"
    )]
    pub(crate) fn new(frame: Frame, paper: Rgb) -> Self {
        let canvas = Canvas::new(frame.width as u32, frame.height as u32, paper);
        Self { canvas, frame, written: Vec::new() }
    }

    /// Writes a line with its baseline at `y`.
    pub(crate) fn write(&mut self, line: &Line, pen: Pen, [x, y]: [f32; 2], align: Align) {
        let anchor = match align {
            Align::Left => line.bounds.left(),
            Align::Center => f32::midpoint(line.bounds.left(), line.bounds.right()),
            Align::Right => line.bounds.right(),
        };
        let place =
            Transform::from_row(pen.cap, 0.0, 0.0, pen.cap, x - anchor * pen.cap, y).post_concat(pen.turn);
        if let Some(outline) = line.outline.clone().transform(place) {
            self.canvas.fill(&outline, pen.ink, Transform::identity());
            self.written.push(Written { text: line.text.clone(), bounds: outline.bounds(), cap: pen.cap });
        }
    }

    /// Draws a straight line.
    pub(crate) fn rule(&mut self, from: [f32; 2], to: [f32; 2], width: f32, rgb: Rgb) {
        let mut path = PathBuilder::new();
        path.move_to(from[0], from[1]);
        path.line_to(to[0], to[1]);
        if let Some(path) = path.finish() {
            self.canvas.stroke(&path, rgb, width, Transform::identity());
        }
    }

    /// Fills a rectangle: left, top, width, height.
    pub(crate) fn block(&mut self, [left, top, width, height]: [f32; 4], rgb: Rgb) {
        if let Some(rect) = Rect::from_xywh(left, top, width, height) {
            self.canvas.fill(&PathBuilder::from_rect(rect), rgb, Transform::identity());
        }
    }
}

/// A finished drawing and what is asked about it.
pub(crate) struct Drawn {
    pub(crate) page: Page,
    pub(crate) content: String,
    pub(crate) question: String,
    pub(crate) answer: String,
}

impl Drawn {
    /// The exercise, with grain on most pictures.
    pub(crate) fn into_sample(self, rng: &mut Rng) -> Sample {
        let grain = if rng.u8(..5) < 2 { 0 } else { rng.u8(2..=16) };
        Sample {
            content: self.content,
            messages: vec![user_with_pictures(&self.question, 1)],
            tools: Vec::new(),
            template_kwargs: Map::new(),
            pictures: vec![self.page.canvas.into_picture(grain, rng)],
            answer: assistant(&self.answer),
            scoring: Scoring::Text,
        }
    }
}

/// A turn by `degrees` clockwise about a point. In double precision: its sine is then the same on all machines.
pub(crate) fn turned(degrees: f32, [x, y]: [f32; 2]) -> Transform {
    let [sin, cos] = sin_cos(degrees);
    Transform::from_row(cos, sin, -sin, cos, x - x * cos + y * sin, y - x * sin - y * cos)
}

/// Sine and cosine of degrees.
#[expect(clippy::cast_possible_truncation, reason = "rounding to single precision is meant")]
pub(crate) fn sin_cos(degrees: f32) -> [f32; 2] {
    let (sin, cos) = f64::from(degrees).to_radians().sin_cos();
    [sin as f32, cos as f32]
}

/// A path around points, closed.
pub(crate) fn polygon(points: &[[f32; 2]]) -> Option<Path> {
    let mut path = PathBuilder::new();
    for (index, [x, y]) in points.iter().enumerate() {
        if index == 0 {
            path.move_to(*x, *y);
        } else {
            path.line_to(*x, *y);
        }
    }
    path.close();
    path.finish()
}

/// One of `items`, which are not empty.
pub(crate) fn pick<'a, T: ?Sized>(items: &[&'a T], rng: &mut Rng) -> &'a T {
    items[rng.usize(..items.len())]
}

/// `count` different of `items`, or all.
pub(crate) fn pick_several<'a>(items: &[&'a str], count: usize, rng: &mut Rng) -> Vec<&'a str> {
    let mut items = items.to_vec();
    rng.shuffle(&mut items);
    items.truncate(count);
    items
}
