//! Where `unsafe` may stand, and what must stand beside it.

use super::Problem;
use super::manifest::Manifest;
use super::source::{Source, line_of, words};
use super::tree::File;

/// Crates that may use `unsafe`: device calls, library calls, direct file access.
const MAY_USE_UNSAFE: [&str; 3] = ["spark-comm", "spark-cuda", "spark-weights"];

/// Every other crate forbids `unsafe` in its root files; these explain each use.
pub(crate) fn check(manifests: &[Manifest], files: &[File], problems: &mut Vec<Problem>) {
    for manifest in manifests {
        let folder = manifest.folder();
        let may_use_unsafe = MAY_USE_UNSAFE.contains(&manifest.name.as_str());
        for file in files.iter().filter(|file| file.path.starts_with(folder) && file.path.ends_with(".rs")) {
            let Some(text) = &file.text else { continue };
            let is_root = ["src/lib.rs", "src/main.rs"].contains(&&file.path[folder.len()..]);
            if may_use_unsafe {
                problems.extend(unexplained(file, text));
            } else if is_root && !Source::new(text).code.contains("#![forbid(unsafe_code)]") {
                let message = format!("`{}` must have `#![forbid(unsafe_code)]`", manifest.name);
                problems.push(Problem::new("unsafe", &file.path, message));
            }
        }
    }
}

/// Blocks and implementations marked `unsafe` without a `SAFETY:` comment.
fn unexplained(file: &File, text: &str) -> Vec<Problem> {
    let source = Source::new(text);
    let (code, comments): (Vec<_>, Vec<_>) =
        (source.code.lines().collect(), source.comments.lines().collect());
    words(&source.code)
        .filter(|(_, word)| *word == "unsafe")
        .filter(|(at, word)| {
            let rest = source.code[at + word.len()..].trim_start();
            rest.starts_with('{') || rest.starts_with("impl ") || rest.starts_with("impl<")
        })
        .map(|(at, _)| line_of(&source.code, at))
        .filter(|&line| !is_explained(&code, &comments, line))
        .map(|line| {
            let message = "`unsafe` needs a `// SAFETY:` comment above it that says why it is sound";
            Problem::new("unsafe", format!("{}:{}", file.path, line + 1), message)
        })
        .collect()
}

/// Whether the statement around `line` has a `SAFETY:` comment on the line or directly above.
fn is_explained(code: &[&str], comments: &[&str], line: usize) -> bool {
    if comments[line].contains("SAFETY:") {
        return true;
    }
    for above in (0..line).rev() {
        if comments[above].contains("SAFETY:") {
            return true;
        }
        let is_blank = code[above].trim().is_empty() && comments[above].trim().is_empty();
        if is_blank || code[above].trim_end().ends_with([';', '{', '}']) {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::tree::file;
    use super::*;

    fn problems(crate_name: &str, path: &str, text: &str) -> Vec<String> {
        let manifest =
            Manifest { path: "crates/x/Cargo.toml".into(), name: crate_name.into(), ..Manifest::default() };
        let mut problems = Vec::new();
        check(&[manifest], &[file(path, text)], &mut problems);
        problems.into_iter().map(|problem| problem.place).collect()
    }

    #[test]
    fn crates_must_forbid_unsafe() {
        assert_eq!(problems("spark-text", "crates/x/src/lib.rs", "//! Text.\n").len(), 1);
        assert_eq!(problems("spark-text", "crates/x/src/lib.rs", "//! #![forbid(unsafe_code)]\n").len(), 1);
        assert!(
            problems("spark-text", "crates/x/src/lib.rs", "//! Text.\n#![forbid(unsafe_code)]\n").is_empty()
        );
        assert!(problems("spark-text", "crates/x/src/other.rs", "//! Text.\n").is_empty());
    }

    #[test]
    fn unsafe_needs_its_reason() {
        let check = |text: &str| problems("spark-weights", "crates/x/src/lib.rs", text);
        assert_eq!(check("fn f() {\n    unsafe { g() }\n}\n"), ["crates/x/src/lib.rs:2"]);
        assert_eq!(check("fn f() {\n    // SAFETY: g is fine.\n    g();\n    unsafe { g() }\n}\n").len(), 1);
        assert!(check("fn f() {\n    // SAFETY: g has no rules,\n    // none at all.\n    let x =\n        unsafe { g() };\n}\n").is_empty());
        assert_eq!(check("unsafe impl Send for X {}\n").len(), 1);
        assert!(
            check("/// # Safety\n/// None.\nunsafe fn f() {}\nconst S: &str = \"unsafe {\";\n").is_empty()
        );
    }
}
