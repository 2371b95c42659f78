//! `bar_chart`: upright bars with names under them, and sometimes values over them.

use fastrand::Rng;
use tiny_skia::Transform;

use super::font::{Font, Line};
use super::page::{Align, Drawn, Frame, Page, Pen, SMALLEST_CAP, pick, pick_several};
use super::{ITEMS, NAMES, colors};
use crate::Sample;
use crate::canvas::Rgb;

const LARGEST: &[&str] = &[
    "Which bar is the largest?",
    "Which bar is the tallest?",
    "Which bar is the highest?",
    "What has the largest bar?",
];
const SMALLEST: &[&str] = &[
    "Which bar is the smallest?",
    "Which bar is the shortest?",
    "Which bar is the lowest?",
    "What has the smallest bar?",
];
/// Questions for a printed value, with the name at `#`.
const VALUE: &[&str] =
    &["What is the value of #?", "What number is on the bar of #?", "What value does # have?"];
const TITLES: &[&str] = &["Sales", "Votes", "Points", "Stock", "Orders", "Score", "Count", "Visits"];
/// Two bars differ by this much of the scale at least: one can see which is larger.
const DIFFERENCE: u32 = 8;
/// Heights in cap heights: title and value lines, and the names under the bars.
const LINE: f32 = 1.7;

pub(crate) fn generate(rng: &mut Rng) -> Sample {
    draw(rng).into_sample(rng)
}

/// A chart before it is drawn. Sizes are in cap heights.
struct Chart {
    title: Option<Line>,
    names: Vec<Line>,
    values: Vec<u32>,
    /// Values as printed over the bars; none if they are not.
    printed: Vec<Line>,
    /// Numbers at the axis from the bottom up; none if it has none.
    ticks: Vec<Line>,
    /// Width for a bar with its blank.
    slot: f32,
    /// Height of a bar of 100.
    scale: f32,
    /// Share of the slot that is bar.
    fill: f32,
}

pub(crate) fn draw(rng: &mut Rng) -> Drawn {
    let count = rng.usize(3..=6);
    let names = pick_several(if rng.bool() { ITEMS } else { NAMES }, count, rng);
    let values = values(count, rng);
    let chart = Chart::new(&names, &values, rng);
    let caps = if rng.u8(..20) == 0 { [24.0, 50.0] } else { [SMALLEST_CAP, 17.0] };
    let (cap, frame) = Frame::fit(rng, caps, 40.0, |cap| chart.size(cap));

    let paper = colors::paper(rng);
    let ink = colors::ink(paper, rng);
    let one = colors::area(paper, rng);
    let bars: Vec<Rgb> =
        if rng.bool() { vec![one; count] } else { (0..count).map(|_| colors::area(paper, rng)).collect() };
    let mut page = Page::new(frame, paper);
    chart.draw(&mut page, Pen { cap, ink, turn: Transform::identity() }, &bars, paper);
    let printed = !chart.printed.is_empty();
    ask(page, &names, &values, printed, rng)
}

fn ask(page: Page, names: &[&str], values: &[u32], printed: bool, rng: &mut Rng) -> Drawn {
    let listed: Vec<String> =
        names.iter().zip(values).map(|(name, value)| format!("{name} {value}")).collect();
    let (question, answer) = match rng.u8(..6) {
        0..=1 if printed => {
            let asked = rng.usize(..names.len());
            (pick(VALUE, rng).replace('#', names[asked]), values[asked].to_string())
        }
        0..=3 => (pick(LARGEST, rng).to_owned(), extreme(names, values, u32::gt)),
        _ => (pick(SMALLEST, rng).to_owned(), extreme(names, values, u32::lt)),
    };
    Drawn { page, content: listed.join(", "), question, answer }
}

/// The name whose value is `beyond` all others.
fn extreme(names: &[&str], values: &[u32], beyond: fn(&u32, &u32) -> bool) -> String {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if beyond(value, &values[best]) {
            best = index;
        }
    }
    names[best].to_owned()
}

/// Values from 8 to 100 that differ enough from each other.
fn values(count: usize, rng: &mut Rng) -> Vec<u32> {
    let mut values: Vec<u32> = Vec::with_capacity(count);
    while values.len() < count {
        // Six values block at most 6 x 15 of the 93: there is always one left, and it is found soon.
        let value = rng.u32(8..=100);
        if values.iter().all(|other| other.abs_diff(value) >= DIFFERENCE) {
            values.push(value);
        }
    }
    values
}

impl Chart {
    fn new(names: &[&str], values: &[u32], rng: &mut Rng) -> Self {
        let font = Font::any(rng);
        let lines = |texts: &[&str]| -> Vec<Line> { texts.iter().map(|text| font.line(text)).collect() };
        let names = lines(names);
        let printed = rng.u8(..5) < 2;
        let printed = if printed {
            values.iter().map(|value| font.line(&value.to_string())).collect()
        } else {
            Vec::new()
        };
        let ticks = if rng.u8(..5) < 2 {
            lines(pick(&[&["0", "50", "100"][..], &["0", "25", "50", "75", "100"]], rng))
        } else {
            Vec::new()
        };
        let title = (rng.u8(..5) < 2).then(|| font.line(pick(TITLES, rng)));
        let widest = names.iter().chain(&printed).map(|line| line.bounds.width()).fold(1.5, f32::max);
        let scale = (6.5 + 3.0 * rng.f32()).max(LINE * 4.0 * f32::from(u8::from(!ticks.is_empty())));
        let fill = 0.5 + 0.35 * rng.f32();
        Self { title, names, values: values.to_vec(), printed, ticks, slot: widest + 0.7, scale, fill }
    }

    /// Left of the bars: the axis with its numbers.
    fn axis(&self) -> f32 {
        let widest = self.ticks.iter().map(|line| line.bounds.width()).fold(0.0, f32::max);
        if self.ticks.is_empty() { 0.4 } else { widest + 1.2 }
    }

    /// Above the bars: title and printed values.
    fn head(&self) -> f32 {
        let printed = if self.printed.is_empty() { 0.6 } else { LINE };
        let title = if self.title.is_some() { LINE } else { 0.0 };
        title + printed
    }

    #[expect(clippy::cast_precision_loss, reason = "at most six bars")]
    fn size(&self, cap: f32) -> [f32; 2] {
        let width = self.axis() + self.slot * self.names.len() as f32 + 0.6;
        let height = self.head() + self.scale + LINE + 0.6;
        [width * cap, height * cap]
    }

    #[expect(clippy::cast_precision_loss, reason = "at most six bars of at most 100")]
    fn draw(&self, page: &mut Page, pen: Pen, bars: &[Rgb], paper: Rgb) {
        let cap = pen.cap;
        let [wide, high] = self.size(cap);
        let (left, top) = (page.frame.left, page.frame.top);
        let start = left + self.axis() * cap;
        let (foot, end) = (top + high - (LINE + 0.6) * cap, left + wide - 0.3 * cap);
        if let Some(title) = &self.title {
            page.write(title, pen, [f32::midpoint(start, end), top + 1.3 * cap], Align::Center);
        }
        for (index, tick) in self.ticks.iter().enumerate() {
            let share = index as f32 / (self.ticks.len() - 1) as f32;
            let y = foot - share * self.scale * cap;
            page.rule([start - 0.3 * cap, y], [end, y], 1.0, colors::between(paper, pen.ink, 35));
            page.write(tick, pen, [start - 0.6 * cap, y + cap / 2.0], Align::Right);
        }
        for (index, (name, color)) in self.names.iter().zip(bars).enumerate() {
            let middle = start + (index as f32 + 0.5) * self.slot * cap;
            let (width, height) =
                (self.slot * self.fill * cap, self.values[index] as f32 / 100.0 * self.scale * cap);
            page.block([middle - width / 2.0, foot - height, width, height], *color);
            page.write(name, pen, [middle, foot + 1.5 * cap], Align::Center);
            if let Some(value) = self.printed.get(index) {
                page.write(value, pen, [middle, foot - height - 0.35 * cap], Align::Center);
            }
        }
        let stroke = (cap / 10.0).max(1.2);
        page.rule([start, foot], [end, foot], stroke, pen.ink);
        page.rule([start, foot - self.scale * cap], [start, foot], stroke, pen.ink);
    }
}
