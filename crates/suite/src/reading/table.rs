//! `table_cell`: a grid with names of rows and columns.

use fastrand::Rng;
use tiny_skia::Transform;

use super::font::{Font, Line};
use super::page::{Align, Drawn, Frame, Page, Pen, SMALLEST_CAP, pick, pick_several};
use super::{ITEMS, NAMES, colors, in_sentence};
use crate::Sample;

/// Questions with the row in a sentence at `#`, the row as printed at `%`, the column in a sentence at `@` and as
/// printed at `&`.
const QUESTIONS: &[&str] = &[
    "What is the @ of #?",
    "What is in row %, column &?",
    "What does the table say for % under &?",
    "What @ does # have?",
    "Read the cell in row % and column &.",
];
/// Columns of numbers, for things and for people.
const NUMBERS: [&[&str]; 2] = [
    &["Price", "Stock", "Weight", "Count", "Size", "Cost"],
    &["Age", "Score", "Room", "Level", "Rank", "Number"],
];
/// Columns of words, with their words.
const THINGS: &[(&str, &[&str])] = &[
    ("Color", &["red", "blue", "green", "black", "white", "pink", "gray", "brown"]),
    ("Shelf", &["top", "left", "right", "back", "front", "low", "high"]),
    ("Shop", &["north", "south", "east", "west", "main", "old", "new"]),
];
const PEOPLE: &[(&str, &[&str])] = &[
    ("City", &["Rome", "Paris", "Bonn", "Oslo", "Cairo", "Lima", "Kyoto", "Bern"]),
    ("Team", &["red", "blue", "green", "black", "white", "gold"]),
    ("Pet", &["cat", "dog", "bird", "fish", "horse", "none", "frog"]),
];
/// Height of a row and blank beside a cell's text, in cap heights.
const ROW: f32 = 2.1;
const BESIDE: f32 = 0.55;

pub(crate) fn generate(rng: &mut Rng) -> Sample {
    draw(rng).into_sample(rng)
}

/// What is in a table: a heading and one cell a row.
struct Column {
    heading: &'static str,
    cells: Vec<String>,
}

pub(crate) fn draw(rng: &mut Rng) -> Drawn {
    let people = rng.bool();
    let count = rng.usize(2..=5);
    let rows = pick_several(if people { NAMES } else { ITEMS }, count, rng);
    let columns = columns(people, rows.len(), rng);
    let grid = Grid::new(&rows, &columns, if people { "Name" } else { "Item" }, Font::any(rng));
    let caps = if rng.u8(..20) == 0 { [26.0, 60.0] } else { [SMALLEST_CAP, 19.0] };
    let (cap, frame) = Frame::fit(rng, caps, 40.0, |cap| grid.size(cap));
    let mut page = Page::new(frame, [0; 3]);
    grid.draw(&mut page, cap, rng);

    let (row, column) = (rng.usize(..rows.len()), &columns[rng.usize(..columns.len())]);
    let question = pick(QUESTIONS, rng)
        .replace('#', &in_sentence(rows[row]))
        .replace('%', rows[row])
        .replace('@', &column.heading.to_lowercase())
        .replace('&', column.heading);
    let listed = columns.iter().map(|column| format!("{}: {}", column.heading, column.cells.join(" ")));
    let content = format!("{}; {}", rows.join(" "), listed.collect::<Vec<_>>().join("; "));
    Drawn { page, content, question, answer: column.cells[row].clone() }
}

/// One to three columns, at most one of words.
fn columns(people: bool, rows: usize, rng: &mut Rng) -> Vec<Column> {
    let count = rng.usize(1..=3);
    let headings = pick_several(NUMBERS[usize::from(people)], count, rng);
    let number = |rng: &mut Rng| match rng.u8(..3) {
        0 => rng.u16(..10),
        1 => rng.u16(10..100),
        _ => rng.u16(100..1000),
    };
    let mut columns: Vec<Column> = Vec::with_capacity(count);
    for heading in headings {
        let cells = (0..rows).map(|_| number(rng).to_string()).collect();
        columns.push(Column { heading, cells });
    }
    if rng.u8(..5) < 2 {
        let kinds = if people { PEOPLE } else { THINGS };
        let (heading, words) = kinds[rng.usize(..kinds.len())];
        let cells = (0..rows).map(|_| pick(words, rng).to_owned()).collect();
        let place = rng.usize(..columns.len());
        columns[place] = Column { heading, cells };
    }
    columns
}

/// A table before it is drawn: lines by column, with the heading first, and widths in cap heights.
struct Grid {
    columns: Vec<Vec<Line>>,
    widths: Vec<f32>,
}

impl Grid {
    fn new(rows: &[&str], columns: &[Column], corner: &str, font: &Font) -> Self {
        let mut grid =
            vec![std::iter::once(&corner).chain(rows).map(|text| font.line(text)).collect::<Vec<_>>()];
        for column in columns {
            let cells = column.cells.iter().map(|cell| font.line(cell));
            grid.push(std::iter::once(font.line(column.heading)).chain(cells).collect());
        }
        let widest = |lines: &Vec<Line>| lines.iter().map(|line| line.bounds.width()).fold(1.0, f32::max);
        let widths = grid.iter().map(|lines| widest(lines) + 2.0 * BESIDE).collect();
        Self { columns: grid, widths }
    }

    #[expect(clippy::cast_precision_loss, reason = "at most six rows")]
    fn size(&self, cap: f32) -> [f32; 2] {
        let width: f32 = self.widths.iter().sum();
        [width * cap + 8.0, self.columns[0].len() as f32 * ROW * cap + 8.0]
    }

    #[expect(clippy::cast_precision_loss, reason = "at most six rows")]
    fn draw(&self, page: &mut Page, cap: f32, rng: &mut Rng) {
        let paper = colors::paper(rng);
        let ink = colors::ink(paper, rng);
        let (left, top) = (page.frame.left + 4.0, page.frame.top + 4.0);
        let [wide, high] = self.size(cap);
        let (right, bottom) = (left + wide - 8.0, top + high - 8.0);
        page.block([0.0, 0.0, page.frame.width, page.frame.height], paper);
        let head = if rng.bool() { colors::between(paper, ink, 15) } else { paper };
        page.block([left, top, right - left, ROW * cap], head);

        let (vertical, horizontal) = (rng.u8(..3) > 0, rng.u8(..4) > 0);
        let shade = colors::between(paper, ink, 30 + rng.i32(0..60));
        let width = 1.0 + rng.f32();
        let align = if rng.bool() { Align::Center } else { Align::Left };
        let pen = Pen { cap, ink, turn: Transform::identity() };
        let mut x = left;
        for (lines, column) in self.columns.iter().zip(&self.widths) {
            for (row, line) in lines.iter().enumerate() {
                let baseline = top + (row as f32 + 0.5) * ROW * cap + cap / 2.0;
                let at = if align == Align::Center { x + column * cap / 2.0 } else { x + BESIDE * cap };
                page.write(line, pen, [at, baseline], align);
            }
            if vertical && x > left {
                page.rule([x, top], [x, bottom], width, shade);
            }
            x += column * cap;
        }
        for row in 0..=self.columns[0].len() {
            let y = top + row as f32 * ROW * cap;
            if horizontal || row <= 1 || row == self.columns[0].len() {
                page.rule([left, y], [right, y], width, shade);
            }
        }
        if vertical {
            page.rule([left, top], [left, bottom], width, shade);
            page.rule([right, top], [right, bottom], width, shade);
        }
    }
}
