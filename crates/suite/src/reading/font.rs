//! Letters as outlines: the fonts in `assets/fonts`, parsed once. Where a line of text goes is the page's business.

use std::sync::LazyLock;

use fastrand::Rng;
use tiny_skia::{Path, PathBuilder, Rect, Transform};
use ttf_parser::{Face, OutlineBuilder};

/// The characters that a font can draw.
const PRINTABLE: std::ops::RangeInclusive<u8> = b' '..=b'~';
/// Blank added after every letter, in cap heights: narrow fonts stay apart at small sizes.
const TRACKING: f32 = 0.05;

static FONTS: LazyLock<Vec<Font>> = LazyLock::new(|| {
    let files: [&[u8]; 6] = [
        include_bytes!("../../assets/fonts/sans.ttf"),
        include_bytes!("../../assets/fonts/slab.ttf"),
        include_bytes!("../../assets/fonts/serif.ttf"),
        include_bytes!("../../assets/fonts/mono.ttf"),
        include_bytes!("../../assets/fonts/condensed.ttf"),
        include_bytes!("../../assets/fonts/rounded.ttf"),
    ];
    files.into_iter().map(|file| Font::parse(file).expect("the fonts in assets hold all of ASCII")).collect()
});

/// Outlines of the printable ASCII characters. The unit is the height of a capital, so that fonts of one size look it.
pub(crate) struct Font {
    glyphs: Vec<Glyph>,
}

struct Glyph {
    outline: Option<Path>,
    advance: f32,
}

/// A line of text as one outline in cap heights: baseline at 0, downwards positive.
pub(crate) struct Line {
    pub(crate) text: String,
    pub(crate) outline: Path,
    /// The ink.
    pub(crate) bounds: Rect,
}

impl Font {
    /// Any of the fonts.
    pub(crate) fn any(rng: &mut Rng) -> &'static Self {
        &FONTS[rng.usize(..FONTS.len())]
    }

    fn parse(file: &[u8]) -> Option<Self> {
        let face = Face::parse(file, 0).ok()?;
        let capital = face.glyph_bounding_box(face.glyph_index('H')?)?.y_max;
        let unit = 1.0 / f32::from(capital);
        let glyph = |character: u8| {
            let id = face.glyph_index(char::from(character))?;
            let mut pen = Pen { path: PathBuilder::new(), unit };
            face.outline_glyph(id, &mut pen);
            let advance = f32::from(face.glyph_hor_advance(id)?) * unit + TRACKING;
            Some(Glyph { outline: pen.path.finish(), advance })
        };
        Some(Self { glyphs: PRINTABLE.map(glyph).collect::<Option<_>>()? })
    }

    /// Sets a line of printable ASCII with at least one letter. Other characters are left out.
    pub(crate) fn line(&self, text: &str) -> Line {
        let mut path = PathBuilder::new();
        let mut x = 0.0;
        for character in text.bytes().filter(|character| PRINTABLE.contains(character)) {
            let glyph = &self.glyphs[usize::from(character - PRINTABLE.start())];
            let moved =
                glyph.outline.clone().and_then(|path| path.transform(Transform::from_translate(x, 0.0)));
            if let Some(outline) = moved {
                path.push_path(&outline);
            }
            x += glyph.advance;
        }
        let outline = path.finish().expect("a line has at least one letter");
        Line { text: text.to_owned(), bounds: outline.bounds(), outline }
    }
}

/// Takes the parser's strokes, scaled to cap heights and turned downwards.
struct Pen {
    path: PathBuilder,
    unit: f32,
}

impl OutlineBuilder for Pen {
    fn move_to(&mut self, x: f32, y: f32) {
        self.path.move_to(x * self.unit, -y * self.unit);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        self.path.line_to(x * self.unit, -y * self.unit);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let unit = self.unit;
        self.path.quad_to(x1 * unit, -y1 * unit, x * unit, -y * unit);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let unit = self.unit;
        self.path.cubic_to(x1 * unit, -y1 * unit, x2 * unit, -y2 * unit, x * unit, -y * unit);
    }

    fn close(&mut self) {
        self.path.close();
    }
}
