//! `cargo xtask tidy`: the rules of this repository that neither compiler nor clippy knows. Reads every file that git
//! does not ignore, once; each check is a function from those files to problems, so that tests feed it strings.

mod docs;
mod exceptions;
mod layers;
mod manifest;
mod safety;
mod size;
mod source;
mod tree;
mod words;

use std::path::Path;

use anyhow::bail;

use exceptions::Exception;
use manifest::Manifest;
use tree::File;

/// A broken rule, or (as a note) an aim that is missed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Name of the rule, as exceptions name it.
    rule: &'static str,
    /// File, with line where there is one: `path` or `path:line`.
    place: String,
    /// Rule, value and what to do.
    message: String,
}

impl Problem {
    fn new(rule: &'static str, place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { rule, place: place.into(), message: message.into() }
    }

    fn path(&self) -> &str {
        self.place.split(':').next().unwrap_or(&self.place)
    }
}

/// What the checks found.
#[derive(Debug, Default)]
struct Report {
    problems: Vec<Problem>,
    notes: Vec<Problem>,
}

/// Checks the repository at `root` and prints what is wrong; with `show_notes` also what is over an aim.
///
/// # Errors
/// When a rule is broken.
pub(crate) fn run(root: &Path, show_notes: bool) -> anyhow::Result<()> {
    println!("\n$ cargo xtask tidy");
    let files = tree::read(root)?;
    let mut report = check(&files);
    report.problems = without_exceptions(report.problems, exceptions::EXCEPTIONS);

    if show_notes {
        for note in &report.notes {
            println!("note: {}: {} [{}]", note.place, note.message, note.rule);
        }
    }
    for problem in &report.problems {
        println!("{}: {} [{}]", problem.place, problem.message, problem.rule);
    }
    println!(
        "tidy: {} files, {} problems, {} notes{}",
        files.len(),
        report.problems.len(),
        report.notes.len(),
        if show_notes || report.notes.is_empty() { "" } else { " (shown with --notes)" }
    );
    if !report.problems.is_empty() {
        bail!("tidy found {} problems", report.problems.len());
    }
    Ok(())
}

/// All checks over `files`.
fn check(files: &[File]) -> Report {
    let mut report = Report::default();
    for file in files {
        size::check_file(file, &mut report);
        words::check(file, &mut report.problems);
    }
    size::check_tree(files, &mut report.problems);

    let manifests: Vec<Manifest> = files
        .iter()
        // A workspace of its own: what it depends on is no dependency of the product.
        .filter(|file| file.path != "fuzz/Cargo.toml")
        .filter(|file| file.path == "Cargo.toml" || file.path.ends_with("/Cargo.toml"))
        .map(Manifest::parse)
        .collect();
    layers::check(&manifests, &mut report.problems);
    safety::check(&manifests, files, &mut report.problems);
    docs::check(&manifests, files, &mut report.problems);
    report
}

/// Removes the problems that an exception covers. An exception that covers none is a problem itself: it is out of date.
fn without_exceptions(problems: Vec<Problem>, exceptions: &[Exception]) -> Vec<Problem> {
    let covers = |exception: &Exception, problem: &Problem| {
        exception.rule == problem.rule && exception.path == problem.path()
    };
    let stale: Vec<Problem> = exceptions
        .iter()
        .filter(|exception| !problems.iter().any(|problem| covers(exception, problem)))
        .map(|exception| {
            let message = format!("no problem of rule `{}` is left: remove the exception", exception.rule);
            Problem::new("exceptions", exception.path, message)
        })
        .collect();
    problems
        .into_iter()
        .filter(|problem| !exceptions.iter().any(|exception| covers(exception, problem)))
        .chain(stale)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_cover_their_rule_and_file_only() {
        let problems = vec![Problem::new("file-size", "a.rs", ""), Problem::new("words", "a.rs:3", "")];
        let exceptions = [Exception { rule: "words", path: "a.rs", reason: "test" }];
        assert_eq!(without_exceptions(problems, &exceptions), [Problem::new("file-size", "a.rs", "")]);
    }

    #[test]
    fn an_exception_without_its_problem_is_reported() {
        let exceptions = [Exception { rule: "words", path: "a.rs", reason: "test" }];
        let left = without_exceptions(Vec::new(), &exceptions);
        assert_eq!(left.len(), 1);
        assert_eq!((left[0].rule, left[0].path()), ("exceptions", "a.rs"));
    }

    #[test]
    fn every_exception_has_a_reason() {
        assert!(exceptions::EXCEPTIONS.iter().all(|exception| exception.reason.len() > 20));
    }
}
