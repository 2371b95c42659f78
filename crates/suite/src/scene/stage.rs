//! From a scene's meaning to its pixels: size of the picture, position and size of every object, background, grain.

use fastrand::Rng;
use serde_json::Map;

use super::{
    colour::{Rgb, background},
    object::{Kind, Object, Place},
    shape::Pose,
};
use crate::{Picture, Sample, Scoring, canvas::Canvas, message};

/// Sides of a picture in pixels.
const SIDES: (f32, f32) = (96.0, 768.0);

/// Pixels that a vision tower is given at most: a larger picture is made smaller before it is seen.
const SEEN: f32 = 512.0 * 512.0;

/// Least radius of an object in pixels of the picture as it is seen. A square of this radius is 15 pixels wide.
const LEAST_RADIUS: f32 = 11.0;

/// Share of a third that an object may fill.
const FILL: f32 = 0.94;

/// Share of a third that the centre of an object may be from the middle of its third towards another one.
const CLEAR: f32 = 0.28;

/// An object on the surface.
#[derive(Debug, Clone, Copy)]
pub(super) struct Actor {
    pub(super) kind: Kind,
    pub(super) tint: Rgb,
    pub(super) pose: Pose,
}

/// A surface of one size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stage {
    width: f32,
    height: f32,
}

impl Stage {
    /// Mostly small, now and then larger than what is seen; as wide as high, or up to three times one way.
    pub(super) fn any(rng: &mut Rng) -> Self {
        let large = rng.u8(0..20) == 0;
        let side = if large { 530.0 + 100.0 * rng.f32() } else { 112.0 + 330.0 * cube(rng.f32()) };
        Self::of_side(side, rng)
    }

    /// For samples of several pictures: never large.
    pub(super) fn small(rng: &mut Rng) -> Self {
        let side = 112.0 + 200.0 * cube(rng.f32());
        Self::of_side(side, rng)
    }

    fn of_side(side: f32, rng: &mut Rng) -> Self {
        let stretch = (1.0 + 2.0 * rng.f32() * rng.f32()).sqrt();
        let (short, long) =
            ((side / stretch).clamp(SIDES.0, SIDES.1), (side * stretch).clamp(SIDES.0, SIDES.1));
        let (short, long) = (short.round(), long.round());
        if rng.bool() { Self { width: short, height: long } } else { Self { width: long, height: short } }
    }

    fn short(&self) -> f32 {
        self.width.min(self.height)
    }

    /// Least radius in pixels of this picture.
    fn least_radius(&self) -> f32 {
        LEAST_RADIUS * (self.width * self.height / SEEN).sqrt().max(1.0)
    }

    /// The object wholly inside its place.
    pub(super) fn actor(&self, object: &Object, rng: &mut Rng) -> Actor {
        let third = (self.width / 3.0, self.height / 3.0);
        let most = FILL * self.short() / 6.0;
        let radius = self.radius(most, rng);
        let mut along = |place: usize, third: f32| {
            let free = FILL * third / 2.0 - radius;
            // Not towards another third, only towards the edge of the picture.
            let clear = free.min(CLEAR * third);
            let (down, up) = (if place == 0 { free } else { clear }, if place == 2 { free } else { clear });
            (place as f32 + 0.5) * third - down + (down + up) * rng.f32()
        };
        let (x, y) = (along(object.place.column, third.0), along(object.place.row, third.1));
        self.posed(object.kind, (x, y, radius), rng)
    }

    pub(super) fn actors(&self, objects: &[Object], rng: &mut Rng) -> Vec<Actor> {
        objects.iter().map(|object| self.actor(object, rng)).collect()
    }

    /// One object that fills much of the picture.
    pub(super) fn close_up(&self, kind: Kind, rng: &mut Rng) -> Actor {
        let radius = self.short() * (0.2 + 0.24 * rng.f32());
        let mut along = |side: f32| {
            let free = (side * 0.48 - radius).min(side / 8.0);
            side / 2.0 + (2.0 * rng.f32() - 1.0) * free
        };
        let (x, y) = (along(self.width), along(self.height));
        self.posed(kind, (x, y, radius), rng)
    }

    /// Objects anywhere, none touching another. `None` if that many found no room.
    pub(super) fn scattered(&self, kinds: &[Kind], rng: &mut Rng) -> Option<Vec<Actor>> {
        let most = FILL * self.short() / 6.0;
        let mut actors: Vec<Actor> = Vec::with_capacity(kinds.len());
        for &kind in kinds {
            let actor = (0..60).find_map(|_| {
                let radius = self.radius(most, rng);
                let mut along = |side: f32| radius + 2.0 + (side - 2.0 * radius - 4.0) * rng.f32();
                let (x, y) = (along(self.width), along(self.height));
                let apart = |other: &Actor| {
                    let (dx, dy) = (other.pose.x - x, other.pose.y - y);
                    let least = other.pose.radius + radius + (0.02 * self.short()).max(4.0);
                    dx * dx + dy * dy >= least * least
                };
                actors.iter().all(apart).then(|| self.posed(kind, (x, y, radius), rng))
            })?;
            actors.push(actor);
        }
        Some(actors)
    }

    /// The third of the picture that has the actor's centre.
    pub(super) fn place(&self, actor: &Actor) -> Place {
        let third = |at: f32, side: f32| ((at * 3.0 / side) as usize).min(2);
        Place { row: third(actor.pose.y, self.height), column: third(actor.pose.x, self.width) }
    }

    /// A radius up to `most`.
    fn radius(&self, most: f32, rng: &mut Rng) -> f32 {
        let least = self.least_radius().max(self.short() * 0.06).min(most);
        least + (most - least) * rng.f32()
    }

    fn posed(&self, kind: Kind, (x, y, radius): (f32, f32, f32), rng: &mut Rng) -> Actor {
        let pose = Pose { x, y, radius, turn: 2.0 * rng.f32() - 1.0, upright: rng.bool() };
        Actor { kind, tint: kind.colour.tint(rng), pose }
    }

    /// A background that suits all of `actors`.
    pub(super) fn background(&self, actors: &[Actor], rng: &mut Rng) -> Rgb {
        let tints: Vec<Rgb> = actors.iter().map(|actor| actor.tint).collect();
        background(&tints, rng)
    }

    /// The picture of `actors` on `background`; every other one is grainy.
    pub(super) fn shoot(&self, actors: &[Actor], background: Rgb, rng: &mut Rng) -> Picture {
        let mut canvas = Canvas::new(self.width as u32, self.height as u32, background);
        for actor in actors {
            actor.kind.shape.draw(&mut canvas, &actor.pose, actor.tint);
        }
        let grain = if rng.bool() { rng.u8(2..=14) } else { 0 };
        canvas.into_picture(grain, rng)
    }

    /// The picture of `actors` on a background that suits them.
    pub(super) fn picture(&self, actors: &[Actor], rng: &mut Rng) -> Picture {
        let background = self.background(actors, rng);
        self.shoot(actors, background, rng)
    }
}

/// Small far more often than large, for a number from zero to one.
fn cube(share: f32) -> f32 {
    share * share * share
}

/// One question about `pictures` and its answer.
pub(super) fn sample(content: String, pictures: Vec<Picture>, question: &str, answer: &str) -> Sample {
    Sample {
        content,
        messages: vec![message::user_with_pictures(question, pictures.len())],
        tools: Vec::new(),
        template_kwargs: Map::new(),
        pictures,
        answer: message::assistant(answer),
        scoring: Scoring::Text,
    }
}
