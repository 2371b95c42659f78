//! An RGB image in memory, and the conversions that lead to it. No file format and no resizing here.

use image::metadata::Orientation;

use crate::decode::Alpha;

/// Pixels of one image, `[height, width, 3]` u8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    height: usize,
    width: usize,
    pixels: Vec<u8>, // [height, width, 3]
}

impl RgbImage {
    /// Wraps `pixels`, `[height, width, 3]`. `None` if a side is zero or the length is not `height * width * 3`.
    pub fn new(height: usize, width: usize, pixels: Vec<u8>) -> Option<Self> {
        let len = height.checked_mul(width)?.checked_mul(3)?;
        (len > 0 && len == pixels.len()).then_some(Self { height, width, pixels })
    }

    /// Height in pixels, at least 1.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Width in pixels, at least 1.
    pub fn width(&self) -> usize {
        self.width
    }

    /// `[height, width, 3]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The image as it should be looked at, after Pillow's `ImageOps.exif_transpose`.
    pub(crate) fn oriented(self, orientation: Orientation) -> Self {
        let (h, w) = (self.height, self.width);
        // Where output pixel (y, x) comes from.
        let source: fn(usize, usize, usize, usize) -> (usize, usize) = match orientation {
            Orientation::NoTransforms => return self,
            Orientation::FlipHorizontal => |y, x, _, w| (y, w - 1 - x),
            Orientation::FlipVertical => |y, x, h, _| (h - 1 - y, x),
            Orientation::Rotate180 => |y, x, h, w| (h - 1 - y, w - 1 - x),
            Orientation::Rotate90 => |y, x, h, _| (h - 1 - x, y),
            Orientation::Rotate270 => |y, x, _, w| (x, w - 1 - y),
            Orientation::Rotate90FlipH => |y, x, _, _| (x, y),
            Orientation::Rotate270FlipH => |y, x, h, w| (h - 1 - x, w - 1 - y),
        };
        let (out_h, out_w) = if swaps_sides(orientation) { (w, h) } else { (h, w) };
        let mut pixels = Vec::with_capacity(self.pixels.len());
        for y in 0..out_h {
            for x in 0..out_w {
                let (sy, sx) = source(y, x, h, w);
                pixels.extend_from_slice(&self.pixels[(sy * w + sx) * 3..][..3]);
            }
        }
        Self { height: out_h, width: out_w, pixels }
    }
}

/// Whether width and height trade places.
pub(crate) fn swaps_sides(orientation: Orientation) -> bool {
    matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    )
}

/// One pixel with alpha to RGB.
pub(crate) fn flatten([r, g, b, a]: [u8; 4], alpha: Alpha) -> [u8; 3] {
    match alpha {
        Alpha::Drop => [r, g, b],
        Alpha::OverWhite => [r, g, b].map(|value| over_white(value, a)),
    }
}

/// Pillow's `alpha_composite` on an opaque white background: `(value * a + 255 * (255 - a)) / 255`, rounded by the usual
/// shift-and-add division.
fn over_white(value: u8, a: u8) -> u8 {
    let (value, a) = (u32::from(value), u32::from(a));
    // Pillow carries 7 fraction bits; on an opaque background its two coefficients are exact multiples of 128.
    let sum = ((value * a + 255 * (255 - a)) << 7) + (0x80 << 7);
    u8::try_from((((sum >> 8) + sum) >> 8) >> 7).unwrap_or(u8::MAX)
}

/// Ink to light, Pillow's `CMYK` to `RGB`: `white - k`, less that share which the coloured ink takes.
pub(crate) fn cmyk_to_rgb([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let light = 255 - u32::from(k);
    [c, m, y].map(|ink| {
        let product = u32::from(ink) * light + 128;
        let taken = ((product >> 8) + product) >> 8;
        u8::try_from(light.saturating_sub(taken)).unwrap_or(u8::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_is_rounded_and_its_ends_are_exact() {
        for value in 0..=255u8 {
            assert_eq!(over_white(value, 255), value);
            assert_eq!(over_white(value, 0), 255);
            for a in 0..=255u8 {
                let exact = (f64::from(value) * f64::from(a) + 255.0 * (255.0 - f64::from(a))) / 255.0;
                assert!((f64::from(over_white(value, a)) - exact).abs() <= 0.5 + 1e-9, "{value} {a}");
            }
        }
    }

    #[test]
    fn every_orientation_moves_the_corners_as_exif_says() {
        // 2 rows, 3 columns; the value names the pixel.
        let image = RgbImage::new(2, 3, (0..6u8).flat_map(|v| [v, v, v]).collect()).unwrap();
        let check = |exif: u8, rows: &[&[u8]]| {
            let out = image.clone().oriented(Orientation::from_exif(exif).unwrap());
            let values: Vec<u8> = out.pixels().iter().step_by(3).copied().collect();
            assert_eq!((out.height(), out.width()), (rows.len(), rows[0].len()), "orientation {exif}");
            assert_eq!(values, rows.concat(), "orientation {exif}");
        };
        check(1, &[&[0, 1, 2], &[3, 4, 5]]);
        check(2, &[&[2, 1, 0], &[5, 4, 3]]);
        check(3, &[&[5, 4, 3], &[2, 1, 0]]);
        check(4, &[&[3, 4, 5], &[0, 1, 2]]);
        check(5, &[&[0, 3], &[1, 4], &[2, 5]]);
        check(6, &[&[3, 0], &[4, 1], &[5, 2]]);
        check(7, &[&[5, 2], &[4, 1], &[3, 0]]);
        check(8, &[&[2, 5], &[1, 4], &[0, 3]]);
    }

    #[test]
    fn a_wrong_length_is_no_image() {
        assert!(RgbImage::new(2, 2, vec![0; 11]).is_none());
        assert!(RgbImage::new(0, 2, vec![]).is_none());
        assert!(RgbImage::new(usize::MAX, 2, vec![0; 12]).is_none());
    }
}
