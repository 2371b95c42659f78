//! Accuracy by format as an SVG: a group of bars for the mean and for each task, with 95 % intervals. No input and output.

use std::fmt::Write;

use super::compare::{Labelled, task_names};

/// Sizes in pixels.
const LEFT: usize = 150;
const PLOT_WIDTH: usize = 520;
const RIGHT: usize = 60;
const BAR: usize = 13;
const GROUP_GAP: usize = 12;
const LEGEND_LINE: usize = 18;
const AXIS: usize = 34;
/// Apart also for people who see few colours; used again after the last.
const COLOURS: [&str; 6] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];

/// A bar of a group.
struct Bar<'a> {
    colour: &'a str,
    accuracy: f64,
    /// 95 % interval; the mean has none.
    interval: Option<(f64, f64)>,
}

/// The chart of some results. The mean comes first.
pub(crate) fn svg(results: &[Labelled]) -> String {
    let colours: Vec<_> = COLOURS.iter().copied().cycle().take(results.len()).collect();
    let mut groups = vec![("mean", means(results, &colours))];
    groups.extend(task_names(results).into_iter().map(|name| (name, bars(results, &colours, name))));
    let top = 16 + LEGEND_LINE * results.len();
    let group_height = |bars: &[Bar<'_>]| bars.len() * BAR + GROUP_GAP;
    let plot_height: usize = groups.iter().map(|(_, bars)| group_height(bars)).sum();
    let (width, height) = (LEFT + PLOT_WIDTH + RIGHT, top + plot_height + AXIS);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (i, (result, colour)) in results.iter().zip(&colours).enumerate() {
        let y = 12 + LEGEND_LINE * i;
        rect(&mut out, (LEFT, y), (12.0, 12), colour);
        let mean = result.report.mean() * 1e2;
        text(&mut out, (LEFT + 18, y + 11), "start", &format!("{} (mean {mean:.1} %)", result.label));
    }
    axis(&mut out, top, plot_height);
    let mut y = top;
    for (name, bars) in &groups {
        let middle = y + (GROUP_GAP + bars.len() * BAR) / 2;
        text(&mut out, (LEFT - 8, middle + 4), "end", name);
        for (i, bar) in bars.iter().enumerate() {
            draw(&mut out, bar, y + GROUP_GAP / 2 + i * BAR);
        }
        y += group_height(bars);
    }
    out + "</svg>\n"
}

fn means<'a>(results: &[Labelled], colours: &[&'a str]) -> Vec<Bar<'a>> {
    let bar = |(result, colour): (&Labelled, &&'a str)| Bar {
        colour,
        accuracy: result.report.mean(),
        interval: None,
    };
    results.iter().zip(colours).map(bar).collect()
}

/// One bar for each result that has the task.
fn bars<'a>(results: &[Labelled], colours: &[&'a str], name: &str) -> Vec<Bar<'a>> {
    let bar = |(result, colour): (&Labelled, &&'a str)| {
        let task = result.report.tasks.iter().find(|task| task.name == name)?;
        Some(Bar { colour, accuracy: task.accuracy(), interval: Some(task.interval()) })
    };
    results.iter().zip(colours).filter_map(bar).collect()
}

/// Lines at every 20 %, with their numbers below.
fn axis(out: &mut String, top: usize, height: usize) {
    for percent in (0..=100).step_by(20) {
        let x = LEFT + PLOT_WIDTH * percent / 100;
        line(out, (x as f64, top as f64), (x as f64, (top + height) as f64), "#dddddd");
        text(out, (x, top + height + 16), "middle", &format!("{percent} %"));
    }
}

fn draw(out: &mut String, bar: &Bar<'_>, y: usize) {
    let x = |share: f64| LEFT as f64 + PLOT_WIDTH as f64 * share;
    rect(out, (LEFT, y), (PLOT_WIDTH as f64 * bar.accuracy, BAR - 1), bar.colour);
    let end = bar.interval.map_or(bar.accuracy, |(_, high)| high);
    if let Some((low, high)) = bar.interval {
        let middle = y as f64 + (BAR - 1) as f64 / 2.0;
        line(out, (x(low), middle), (x(high), middle), "#333333");
    }
    text(out, (x(end) as usize + 4, y + BAR - 2), "start", &format!("{:.1}", bar.accuracy * 1e2));
}

fn rect(out: &mut String, (x, y): (usize, usize), (width, height): (f64, usize), colour: &str) {
    // Writing to a text cannot fail.
    let _ = writeln!(
        out,
        "<rect x=\"{x}\" y=\"{y}\" width=\"{width:.1}\" height=\"{height}\" fill=\"{colour}\"/>"
    );
}

fn line(out: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"/>",
        from.0, from.1, to.0, to.1
    );
}

fn text(out: &mut String, (x, y): (usize, usize), anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::super::compare::tests::result;
    use super::*;

    #[test]
    fn bars_are_as_long_as_accuracies() {
        let svg = svg(&[result("a<b", &[("add", 10), ("sort", 5)]), result("c", &[("add", 0)])]);
        let bars = |colour: &str| -> Vec<f64> {
            let rects = svg.lines().filter(|line| line.starts_with("<rect") && line.contains(colour));
            let width = |line: &str| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok();
            // The first is the legend's.
            rects.skip(1).map(|line| width(line).unwrap()).collect()
        };
        // Mean, add, sort.
        assert_eq!(bars(COLOURS[0]), [390.0, 520.0, 260.0]);
        assert_eq!(bars(COLOURS[1]), [0.0, 0.0], "it has no task `sort`");
        assert!(svg.contains("a&lt;b (mean 75.0 %)"), "{svg}");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }
}
