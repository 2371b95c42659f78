//! The shapes: their names, their outlines and how far each may be turned and keep its name. No positions.

use tiny_skia::{Path, PathBuilder, Transform};

use super::colour::Rgb;
use crate::canvas::Canvas;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    Circle,
    Square,
    Triangle,
    Rectangle,
    Star,
    Hexagon,
    Cross,
    Ring,
    Heart,
    Diamond,
}

/// How an object is put on the surface, whatever its shape.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pose {
    /// Centre in pixels.
    pub(super) x: f32,
    pub(super) y: f32,
    /// Radius in pixels of a circle that holds every shape.
    pub(super) radius: f32,
    /// -1..1: share of the turn that the shape allows.
    pub(super) turn: f32,
    /// Whether a rectangle stands.
    pub(super) upright: bool,
}

/// A ring is a line of this width along a circle of this radius, for an outer radius of about one.
const RING: (f32, f32) = (0.78, 0.42);

// Outlines in a circle of radius one around the origin, y down. Tables instead of sines: equal on every machine.
const SQUARE: &[(f32, f32)] = &[(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)];
const TRIANGLE: &[(f32, f32)] = &[(0.0, -1.0), (0.866, 0.5), (-0.866, 0.5)];
const RECTANGLE: &[(f32, f32)] = &[(-0.88, -0.44), (0.88, -0.44), (0.88, 0.44), (-0.88, 0.44)];
const HEXAGON: &[(f32, f32)] =
    &[(1.0, 0.0), (0.5, 0.866), (-0.5, 0.866), (-1.0, 0.0), (-0.5, -0.866), (0.5, -0.866)];
const DIAMOND: &[(f32, f32)] = &[(0.0, -1.0), (0.62, 0.0), (0.0, 1.0), (-0.62, 0.0)];
const STAR: &[(f32, f32)] = &[
    (0.0, -1.0),
    (0.247, -0.34),
    (0.951, -0.309),
    (0.399, 0.13),
    (0.588, 0.809),
    (0.0, 0.42),
    (-0.588, 0.809),
    (-0.399, 0.13),
    (-0.951, -0.309),
    (-0.247, -0.34),
];
const CROSS: &[(f32, f32)] = &[
    (-0.28, -0.95),
    (0.28, -0.95),
    (0.28, -0.28),
    (0.95, -0.28),
    (0.95, 0.28),
    (0.28, 0.28),
    (0.28, 0.95),
    (-0.28, 0.95),
    (-0.28, 0.28),
    (-0.95, 0.28),
    (-0.95, -0.28),
    (-0.28, -0.28),
];

impl Shape {
    pub(super) const ALL: [Self; 10] = [
        Self::Circle,
        Self::Square,
        Self::Triangle,
        Self::Rectangle,
        Self::Star,
        Self::Hexagon,
        Self::Cross,
        Self::Ring,
        Self::Heart,
        Self::Diamond,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Circle => "circle",
            Self::Square => "square",
            Self::Triangle => "triangle",
            Self::Rectangle => "rectangle",
            Self::Star => "star",
            Self::Hexagon => "hexagon",
            Self::Cross => "cross",
            Self::Ring => "ring",
            Self::Heart => "heart",
            Self::Diamond => "diamond",
        }
    }

    pub(super) fn plural(self) -> String {
        let ending = if self == Self::Cross { "es" } else { "s" };
        format!("{}{ending}", self.name())
    }

    /// Tangent of half the largest turn: 0.1 is about 11 degrees. A square turned by 45 would be called a diamond.
    fn turn_limit(self) -> f32 {
        match self {
            Self::Circle | Self::Ring => 0.0,
            Self::Diamond => 0.07,
            Self::Square | Self::Rectangle | Self::Cross => 0.1,
            Self::Triangle | Self::Heart => 0.13,
            Self::Star => 0.158,
            Self::Hexagon => 0.268,
        }
    }

    pub(super) fn draw(self, canvas: &mut Canvas, pose: &Pose, rgb: Rgb) {
        let transform = self.transform(pose);
        match self {
            Self::Ring => canvas.stroke(&circle(RING.0), rgb, RING.1, transform),
            _ => canvas.fill(&self.outline(), rgb, transform),
        }
    }

    fn outline(self) -> Path {
        match self {
            Self::Circle | Self::Ring => circle(1.0),
            Self::Square => polygon(SQUARE),
            Self::Triangle => polygon(TRIANGLE),
            Self::Rectangle => polygon(RECTANGLE),
            Self::Star => polygon(STAR),
            Self::Hexagon => polygon(HEXAGON),
            Self::Cross => polygon(CROSS),
            Self::Diamond => polygon(DIAMOND),
            Self::Heart => heart(),
        }
    }

    /// Sine and cosine from the tangent of half the angle: only sums and quotients, so equal on every machine.
    fn transform(self, pose: &Pose) -> Transform {
        let half = pose.turn * self.turn_limit();
        let scale = pose.radius / (1.0 + half * half);
        let (sin, cos) = (2.0 * half * scale, (1.0 - half * half) * scale);
        let (sin, cos) = if self == Self::Rectangle && pose.upright { (cos, -sin) } else { (sin, cos) };
        Transform::from_row(cos, sin, -sin, cos, pose.x, pose.y)
    }
}

fn circle(radius: f32) -> Path {
    PathBuilder::from_circle(0.0, 0.0, radius).expect("the radius is positive and finite")
}

fn polygon(corners: &[(f32, f32)]) -> Path {
    let mut path = PathBuilder::new();
    for (index, &(x, y)) in corners.iter().enumerate() {
        if index == 0 {
            path.move_to(x, y);
        } else {
            path.line_to(x, y);
        }
    }
    path.close();
    path.finish().expect("every table has three corners or more")
}

fn heart() -> Path {
    let mut path = PathBuilder::new();
    path.move_to(0.0, 0.95);
    path.cubic_to(-0.5, 0.5, -0.95, 0.2, -0.95, -0.25);
    path.cubic_to(-0.95, -0.6, -0.7, -0.8, -0.48, -0.8);
    path.cubic_to(-0.25, -0.8, -0.08, -0.65, 0.0, -0.4);
    path.cubic_to(0.08, -0.65, 0.25, -0.8, 0.48, -0.8);
    path.cubic_to(0.7, -0.8, 0.95, -0.6, 0.95, -0.25);
    path.cubic_to(0.95, 0.2, 0.5, 0.5, 0.0, 0.95);
    path.close();
    path.finish().expect("the outline has an area")
}
