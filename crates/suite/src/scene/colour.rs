//! The colours of objects and backgrounds: names, and variants of each that nobody would call by another's name.

use fastrand::Rng;

pub(super) use crate::canvas::Rgb;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Colour {
    Red,
    Green,
    Blue,
    Yellow,
    Orange,
    Purple,
    Pink,
    Brown,
    Black,
    White,
}

/// Most that an object is lighter or darker than its colour, and most that one channel differs beside that: hues stay.
const JITTER: (i32, i32) = (10, 4);

/// Least distance of a coloured background from every object on it.
const CONTRAST: i32 = 92;

impl Colour {
    pub(super) const ALL: [Self; 10] = [
        Self::Red,
        Self::Green,
        Self::Blue,
        Self::Yellow,
        Self::Orange,
        Self::Purple,
        Self::Pink,
        Self::Brown,
        Self::Black,
        Self::White,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Red => "red",
            Self::Green => "green",
            Self::Blue => "blue",
            Self::Yellow => "yellow",
            Self::Orange => "orange",
            Self::Purple => "purple",
            Self::Pink => "pink",
            Self::Brown => "brown",
            Self::Black => "black",
            Self::White => "white",
        }
    }

    pub(super) fn rgb(self) -> Rgb {
        match self {
            Self::Red => [218, 32, 38],
            Self::Green => [36, 160, 62],
            Self::Blue => [38, 84, 220],
            Self::Yellow => [246, 224, 40],
            Self::Orange => [246, 130, 20],
            Self::Purple => [136, 42, 172],
            Self::Pink => [250, 148, 196],
            Self::Brown => [118, 68, 30],
            Self::Black => [16, 16, 18],
            Self::White => [250, 250, 250],
        }
    }

    /// The colour as one object has it.
    pub(super) fn tint(self, rng: &mut Rng) -> Rgb {
        let light = rng.i32(-JITTER.0..=JITTER.0);
        self.rgb().map(|channel| {
            let channel = i32::from(channel) + light + rng.i32(-JITTER.1..=JITTER.1);
            u8::try_from(channel.clamp(0, 255)).unwrap_or(u8::MAX)
        })
    }
}

/// A background that every one of `tints` stands out from: light, dark, pale, or grey where nothing else does.
pub(super) fn background(tints: &[Rgb], rng: &mut Rng) -> Rgb {
    for _ in 0..12 {
        let range = match rng.u8(0..8) {
            0..=2 => 222..=252,
            3 | 4 => 180..=250,
            5 | 6 => 14..=58,
            _ => break,
        };
        let rgb: Rgb = std::array::from_fn(|_| rng.u8(range.clone()));
        if tints.iter().all(|&tint| distance_squared(tint, rgb) >= CONTRAST * CONTRAST) {
            return rgb;
        }
    }
    // At least 75 from every colour of an object, but plain.
    let grey = rng.u8(126..=140);
    [grey, grey, grey - rng.u8(0..8)]
}

/// Square of the distance of two colours in RGB.
pub(super) fn distance_squared(a: Rgb, b: Rgb) -> i32 {
    a.into_iter().zip(b).map(|(a, b)| (i32::from(a) - i32::from(b)).pow(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nearest(rgb: Rgb) -> Colour {
        Colour::ALL.into_iter().min_by_key(|colour| distance_squared(colour.rgb(), rgb)).unwrap()
    }

    #[test]
    fn a_tint_is_far_nearer_to_its_colour_than_to_any_other() {
        let mut rng = Rng::with_seed(1);
        for colour in Colour::ALL {
            for _ in 0..500 {
                let tint = colour.tint(&mut rng);
                assert_eq!(nearest(tint), colour);
                let others = Colour::ALL.into_iter().filter(|&other| other != colour);
                let other = others.map(|other| distance_squared(other.rgb(), tint)).min().unwrap();
                assert!(other > 4 * distance_squared(colour.rgb(), tint), "{colour:?} as {tint:?}");
            }
        }
    }

    #[test]
    fn a_background_stands_out_from_the_objects() {
        let mut rng = Rng::with_seed(2);
        for _ in 0..2000 {
            let tints: Vec<Rgb> =
                (0..rng.usize(1..9)).map(|_| rng.choice(Colour::ALL).unwrap().tint(&mut rng)).collect();
            let rgb = background(&tints, &mut rng);
            let nearest = tints.iter().map(|&tint| distance_squared(tint, rgb)).min().unwrap();
            assert!(nearest >= 75 * 75, "{rgb:?} under {tints:?}");
        }
    }
}
