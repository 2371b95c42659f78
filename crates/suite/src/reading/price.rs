//! `price_tag`: one or two tags with an item and its price.

use fastrand::Rng;
use tiny_skia::PathBuilder;

use super::font::{Font, Line};
use super::page::{
    Align, Drawn, Frame, Page, Pen, SMALLEST_CAP, pick, pick_several, polygon, sin_cos, turned,
};
use super::{ITEMS, colors, in_sentence};
use crate::Sample;
use crate::canvas::Rgb;

/// Questions about the only tag.
const ANONYMOUS: &[&str] = &["What is the price?", "What does it cost?", "How much is it?"];
/// Questions with the item's name at `#`.
const NAMED: &[&str] =
    &["What does # cost?", "How much is #?", "What is the price of #?", "How much does # cost?"];
/// Blank inside of a tag in cap heights: left (with the hole), right, above and below.
const PADDING: [f32; 3] = [1.7, 0.8, 0.8];
/// From the item's baseline to the price's top, in cap heights.
const GAP: f32 = 0.75;

pub(crate) fn generate(rng: &mut Rng) -> Sample {
    draw(rng).into_sample(rng)
}

/// A tag before it is drawn. Sizes are in cap heights of its item.
struct Tag {
    item: Line,
    price: Line,
    /// Height of the price's digits.
    price_cap: f32,
    /// Price beside the item instead of under it.
    beside: bool,
    width: f32,
    height: f32,
}

pub(crate) fn draw(rng: &mut Rng) -> Drawn {
    let font = Font::any(rng);
    let count = if rng.u8(..5) < 2 { 2 } else { 1 };
    let items = pick_several(ITEMS, count, rng);
    let price_cap = 1.0 + 0.6 * rng.f32();
    let beside = rng.u8(..4) == 0;
    let prices: Vec<String> = items.iter().map(|_| price(rng)).collect();
    let tags = items.iter().zip(&prices).map(|(item, price)| Tag::new(font, item, price, price_cap, beside));
    let tags: Vec<Tag> = tags.collect();
    let angle = if rng.u8(..5) < 2 { 0.0 } else { 12.0 * rng.f32() - 6.0 };
    let size = |cap: f32| {
        let boxes = tags.iter().map(|tag| tag.turned_box(angle, cap));
        boxes.fold([0.0, 0.0], |[wide, high]: [f32; 2], [width, height]| [wide.max(width), high + height])
    };
    let (caps, blank) = if rng.u8(..20) == 0 { ([36.0, 90.0], 300.0) } else { ([SMALLEST_CAP, 30.0], 70.0) };
    let (cap, frame) = Frame::fit(rng, caps, blank, size);

    let paper = colors::paper(rng);
    let mut page = Page::new(frame, paper);
    let color = colors::area(paper, rng);
    let ink = colors::ink(color, rng);
    let wide = size(cap)[0];
    let mut top = frame.top;
    for tag in &tags {
        let [width, height] = tag.turned_box(angle, cap);
        let center = [frame.left + width / 2.0 + (wide - width) * rng.f32(), top + height / 2.0];
        tag.draw(&mut page, Pen { cap, ink, turn: turned(angle, center) }, center, [color, paper]);
        top += height;
    }
    ask(page, &items, &prices, rng)
}

fn ask(page: Page, items: &[&str], prices: &[String], rng: &mut Rng) -> Drawn {
    let asked = rng.usize(..items.len());
    let question = if items.len() == 1 && rng.bool() {
        pick(ANONYMOUS, rng).to_owned()
    } else {
        pick(NAMED, rng).replace('#', &in_sentence(items[asked]))
    };
    let listed: Vec<String> =
        items.iter().zip(prices).map(|(item, price)| format!("{item} {price}")).collect();
    Drawn { page, content: listed.join(", "), question, answer: prices[asked].clone() }
}

/// From $0.25 to $99.99; cents of a shop.
fn price(rng: &mut Rng) -> String {
    let dollars = if rng.u8(..3) == 0 { rng.u8(10..100) } else { rng.u8(1..10) };
    match rng.u8(..4) {
        0 => format!("${dollars}.99"),
        1 => format!("$0.{:02}", rng.u8(5..20) * 5),
        _ => format!("${dollars}.{:02}", rng.u8(..20) * 5),
    }
}

impl Tag {
    fn new(font: &Font, item: &str, price: &str, price_cap: f32, beside: bool) -> Self {
        let (item, price) = (font.line(item), font.line(price));
        let (first, second) = (item.bounds.width(), price.bounds.width() * price_cap);
        let [left, right, end] = PADDING;
        let (width, height) = if beside {
            (first + 1.0 + second, price_cap)
        } else {
            (first.max(second), 1.0 + GAP + price_cap)
        };
        Self { item, price, price_cap, beside, width: left + width + right, height: height + 2.0 * end }
    }

    /// Width and height in pixels of the box around the turned tag, with a little blank.
    fn turned_box(&self, angle: f32, cap: f32) -> [f32; 2] {
        let [sin, cos] = sin_cos(angle);
        let (width, height) = (self.width * cap, self.height * cap);
        [width * cos + height * sin.abs() + 8.0, width * sin.abs() + height * cos + 8.0]
    }

    /// A card with cut corners and a hole on the left.
    fn draw(&self, page: &mut Page, pen: Pen, center: [f32; 2], [color, paper]: [Rgb; 2]) {
        let cap = pen.cap;
        let [left, top] = [center[0] - self.width * cap / 2.0, center[1] - self.height * cap / 2.0];
        let [right, bottom] = [left + self.width * cap, top + self.height * cap];
        let cut = 0.7 * cap;
        let outline = [
            [left + cut, top],
            [right, top],
            [right, bottom],
            [left + cut, bottom],
            [left, bottom - cut],
            [left, top + cut],
        ];
        if let Some(card) = polygon(&outline) {
            page.canvas.fill(&card, color, pen.turn);
            page.canvas.stroke(&card, pen.ink, 1.5, pen.turn);
        }
        if let Some(hole) = PathBuilder::from_circle(left + 0.8 * cap, center[1], 0.3 * cap) {
            page.canvas.fill(&hole, paper, pen.turn);
            page.canvas.stroke(&hole, pen.ink, 1.2, pen.turn);
        }
        self.letter(page, pen, [left + PADDING[0] * cap, top + PADDING[2] * cap], right - PADDING[1] * cap);
    }

    fn letter(&self, page: &mut Page, pen: Pen, [left, top]: [f32; 2], right: f32) {
        let large = Pen { cap: pen.cap * self.price_cap, turn: pen.turn, ink: pen.ink };
        if self.beside {
            let baseline = top + large.cap;
            page.write(&self.item, pen, [left, baseline], Align::Left);
            page.write(&self.price, large, [right, baseline], Align::Right);
        } else {
            let middle = f32::midpoint(left, right);
            page.write(&self.item, pen, [middle, top + pen.cap], Align::Center);
            page.write(&self.price, large, [middle, top + pen.cap * (1.0 + GAP) + large.cap], Align::Center);
        }
    }
}
