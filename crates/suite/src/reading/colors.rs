//! Colours of paper and ink that can be told apart.

use fastrand::Rng;

use crate::canvas::Rgb;

/// Difference in brightness (0..=255) between ink and paper.
const CONTRAST: i32 = 95;

/// A background: often light, sometimes dark, sometimes of a colour.
pub(crate) fn paper(rng: &mut Rng) -> Rgb {
    match rng.u8(..10) {
        0..=4 => within(rng, 205, 255),
        5..=6 => within(rng, 0, 65),
        _ => within(rng, 0, 255),
    }
}

/// A colour for letters on `paper`.
pub(crate) fn ink(paper: Rgb, rng: &mut Rng) -> Rgb {
    let plain = if brightness(paper) > 127 { within(rng, 0, 30) } else { within(rng, 225, 255) };
    if rng.bool() {
        return plain;
    }
    let colored = (0..8).map(|_| within(rng, 0, 255)).find(|ink| differ(*ink, paper, CONTRAST));
    colored.unwrap_or(plain)
}

/// A shade of `paper` for rules and frames: `percent` of the way to `ink`.
pub(crate) fn between(paper: Rgb, ink: Rgb, percent: i32) -> Rgb {
    std::array::from_fn(|channel| {
        let (from, to) = (i32::from(paper[channel]), i32::from(ink[channel]));
        u8::try_from(from + (to - from) * percent / 100).unwrap_or(u8::MAX)
    })
}

/// A colour for an area on `paper`, visible but not as strong as ink.
pub(crate) fn area(paper: Rgb, rng: &mut Rng) -> Rgb {
    let found = (0..16).map(|_| within(rng, 0, 255)).find(|area| differ(*area, paper, 45));
    found.unwrap_or(if brightness(paper) > 127 { [60; 3] } else { [190; 3] })
}

fn differ(one: Rgb, other: Rgb, at_least: i32) -> bool {
    (brightness(one) - brightness(other)).abs() >= at_least
}

fn brightness([r, g, b]: Rgb) -> i32 {
    (30 * i32::from(r) + 59 * i32::from(g) + 11 * i32::from(b)) / 100
}

fn within(rng: &mut Rng, low: u8, high: u8) -> Rgb {
    [rng.u8(low..=high), rng.u8(low..=high), rng.u8(low..=high)]
}
