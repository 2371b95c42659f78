//! `eval --compare`: saved results side by side, as a Markdown table and as a chart. Asks nobody.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;

use super::{plot, report::Report};

/// A result under the name that tables show.
pub(crate) struct Labelled {
    /// Name of the file without its extension.
    pub(crate) label: String,
    pub(crate) report: Report,
}

/// Prints the table, and draws the chart if asked to.
///
/// # Errors
/// When a file is no result, or cannot be read or written.
pub(crate) fn run(files: &[PathBuf], plot: Option<&Path>) -> anyhow::Result<()> {
    if let Some(path) = plot {
        let is_svg = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
        anyhow::ensure!(is_svg, "--plot {}: only .svg can be written", path.display());
    }
    let results = files.iter().map(|path| read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    write_table(&mut std::io::stdout().lock(), &results)?;
    if let Some(path) = plot {
        std::fs::write(path, plot::svg(&results)).with_context(|| format!("--plot {}", path.display()))?;
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Labelled> {
    let context = || format!("--compare {}", path.display());
    let text = std::fs::read_to_string(path).with_context(context)?;
    let report = Report::parse(&text).with_context(context)?;
    let label = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Labelled { label, report })
}

/// Names of all tasks, in the order in which they first appear.
pub(crate) fn task_names(results: &[Labelled]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for task in results.iter().flat_map(|result| &result.report.tasks) {
        if !names.contains(&task.name.as_str()) {
            names.push(&task.name);
        }
    }
    names
}

/// Accuracies in percent; the last row is the difference of the means to the first result, in points.
fn write_table(out: &mut impl Write, results: &[Labelled]) -> std::io::Result<()> {
    let row = |out: &mut dyn Write, name: &str, cell: &dyn Fn(&Labelled) -> String| {
        let cells: Vec<_> = results.iter().map(cell).collect();
        writeln!(out, "| {name} | {} |", cells.join(" | "))
    };
    row(out, "task", &|result| result.label.clone())?;
    writeln!(out, "|---|{}", "---|".repeat(results.len()))?;
    for name in task_names(results) {
        row(out, name, &|result| {
            let task = result.report.tasks.iter().find(|task| task.name == name && task.samples > 0);
            task.map_or("-".to_owned(), |task| {
                let (low, high) = task.interval();
                format!("{:.1} ({:.1} to {:.1})", task.accuracy() * 1e2, low * 1e2, high * 1e2)
            })
        })?;
    }
    row(out, "mean", &|result| format!("{:.1}", result.report.mean() * 1e2))?;
    let first = results.first().map_or(0.0, |result| result.report.mean());
    row(out, "difference", &|result| format!("{:+.1}", (result.report.mean() - first) * 1e2))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::super::report::TaskResult;
    use super::*;

    /// A result with these right answers out of 10 each.
    pub(crate) fn result(label: &str, tasks: &[(&str, u64)]) -> Labelled {
        let task = |(name, right): &(&str, u64)| TaskResult {
            name: (*name).into(),
            samples: 10,
            right: *right,
            errors: 0,
        };
        let report = Report {
            model: label.into(),
            tasks: tasks.iter().map(task).collect(),
            offset: 0,
            elapsed: Duration::from_secs(1),
            prompt_tokens: 0,
            output_tokens: 0,
            is_complete: true,
        };
        Labelled { label: label.into(), report }
    }

    #[test]
    fn results_stand_side_by_side() {
        let results =
            [result("bf16", &[("add", 10), ("sort", 8)]), result("awq", &[("sort", 7), ("count", 9)])];
        let mut table = Vec::new();
        write_table(&mut table, &results).unwrap();
        let table = String::from_utf8(table).unwrap();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[0], "| task | bf16 | awq |");
        assert_eq!(lines[2], "| add | 100.0 (72.2 to 100.0) | - |");
        assert!(lines[3].starts_with("| sort | 80.0 (") && lines[3].contains("| 70.0 ("), "{table}");
        assert_eq!(lines[5..], ["| mean | 90.0 | 80.0 |", "| difference | +0.0 | -10.0 |"]);
    }

    #[test]
    fn what_is_no_result_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let [good, bad] = ["good.json", "bad.json"].map(|name| folder.path().join(name));
        std::fs::write(&good, format!("table\n{}\n", result("m", &[("add", 1)]).report.to_json())).unwrap();
        std::fs::write(&bad, "{}").unwrap();
        let read_good = read(&good).unwrap();
        assert_eq!((read_good.label.as_str(), read_good.report.mean()), ("good", 0.1));
        for files in [vec![good.clone(), bad], vec![folder.path().join("none.json")]] {
            assert!(run(&files, None).unwrap_err().to_string().contains("--compare"));
        }
        let message = run(&[good], Some(Path::new("x.png"))).unwrap_err().to_string();
        assert!(message.contains(".svg"), "{message}");
    }
}
