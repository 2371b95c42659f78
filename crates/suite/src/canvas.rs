//! A surface to draw on: tiny-skia with colours as three bytes, and the grain of a camera. No shapes, no letters.

use fastrand::Rng;
use tiny_skia::{Color, FillRule, Paint, Path, Pixmap, Stroke, Transform};

use crate::Picture;

/// Red, green, blue.
pub(crate) type Rgb = [u8; 3];

/// A picture being drawn. Coordinates are pixels from the top left.
pub(crate) struct Canvas {
    pixmap: Pixmap,
}

impl Canvas {
    /// A surface of one colour. `width` and `height` are at least 1.
    pub(crate) fn new(width: u32, height: u32, background: Rgb) -> Self {
        let mut pixmap =
            Pixmap::new(width, height).expect("a picture has at least one pixel and fits in memory");
        pixmap.fill(color(background));
        Self { pixmap }
    }

    /// Fills a path with anti-aliased edges.
    pub(crate) fn fill(&mut self, path: &Path, rgb: Rgb, transform: Transform) {
        self.pixmap.fill_path(path, &paint(rgb), FillRule::Winding, transform, None);
    }

    /// Draws the outline of a path, `width` pixels wide.
    pub(crate) fn stroke(&mut self, path: &Path, rgb: Rgb, width: f32, transform: Transform) {
        let stroke = Stroke { width, ..Stroke::default() };
        self.pixmap.stroke_path(path, &paint(rgb), &stroke, transform, None);
    }

    /// The picture, with up to `grain` added to or taken from every channel.
    pub(crate) fn into_picture(self, grain: u8, rng: &mut Rng) -> Picture {
        let (width, height) = (self.pixmap.width() as usize, self.pixmap.height() as usize);
        let opaque = self.pixmap.data().chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]);
        let mut rgb: Vec<u8> = opaque.collect();
        if grain > 0 {
            add_grain(&mut rgb, grain, rng);
        }
        Picture { width, height, rgb }
    }
}

/// Eight channels from one random number: the grain of a large picture is most of the work of drawing it.
fn add_grain(rgb: &mut [u8], grain: u8, rng: &mut Rng) {
    let span = 2 * u32::from(grain) + 1;
    for channels in rgb.chunks_mut(8) {
        let noise = rng.u64(..).to_le_bytes();
        for (channel, noise) in channels.iter_mut().zip(noise) {
            let offset = (u32::from(noise) * span) >> 8;
            *channel = u8::try_from((u32::from(*channel) + offset).saturating_sub(u32::from(grain)))
                .unwrap_or(u8::MAX);
        }
    }
}

fn color([r, g, b]: Rgb) -> Color {
    Color::from_rgba8(r, g, b, u8::MAX)
}

fn paint(rgb: Rgb) -> Paint<'static> {
    let mut paint = Paint { anti_alias: true, ..Paint::default() };
    paint.set_color(color(rgb));
    paint
}
