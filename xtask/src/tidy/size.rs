//! Size limits: files, functions, documents, the tree. Over the limit is a problem, over the aim a note.

use super::source::Source;
use super::tree::File;
use super::{Problem, Report};

const RUST_FILE_AIM: usize = 300;
const RUST_FILE_LIMIT: usize = 600;
/// One architecture in one file: what does not fit belongs into a shared building block.
const MODEL_FILE_LIMIT: usize = 350;
const FUNCTION_AIM: usize = 40;
const FUNCTION_LIMIT: usize = 80;
const CUDA_FILE_LIMIT: usize = 600;
/// Longest documents, in lines.
const DOCUMENT_LIMITS: [(&str, usize); 6] = [
    ("README.md", 150),
    ("ARCHITECTURE.md", 400),
    ("CONTRIBUTING.md", 100),
    ("docs/glossary.md", 100),
    ("docs/add-a-model.md", 60),
    ("docs/add-a-kernel.md", 60),
];

const TREE_LIMIT: u64 = 40 << 20;
const FIXTURES_LIMIT: u64 = 16_000_000;
/// The demo model: its checkpoints are the only large files, because nothing can be downloaded where it is needed.
const DEMO_MODEL: &str = "models/spark-tiny-vl/";
const DEMO_MODEL_LIMIT: u64 = 24_000_000;
const FILE_LIMIT: u64 = 2 << 20;

/// Lines of a file and of its functions.
pub(crate) fn check_file(file: &File, report: &mut Report) {
    let Some(text) = &file.text else { return };
    let over = |num: usize, limit: usize, what: &str| {
        let message = format!("{num} lines; the limit for {what} is {limit}: split it");
        (num > limit).then(|| Problem::new("file-size", &file.path, message))
    };
    if file.path.ends_with(".cu") || file.path.ends_with(".cuh") {
        report.problems.extend(over(text.lines().count(), CUDA_FILE_LIMIT, "a CUDA file"));
    }
    if let Some((_, limit)) = DOCUMENT_LIMITS.iter().find(|(path, _)| *path == file.path) {
        report.problems.extend(over(text.lines().count(), *limit, "this document"));
    }
    if !file.path.ends_with(".rs") {
        return;
    }
    let source = Source::new(text);
    let num_lines = source.num_lines_without_tests();
    let (limit, what) = match file.path.starts_with("models/src/") {
        true => (MODEL_FILE_LIMIT, "a file of models/ (inline tests excluded)"),
        false => (RUST_FILE_LIMIT, "a Rust file (inline tests excluded)"),
    };
    match over(num_lines, limit, what) {
        Some(problem) => report.problems.push(problem),
        None if num_lines > RUST_FILE_AIM => {
            let message = format!("{num_lines} lines; the aim is {RUST_FILE_AIM}");
            report.notes.push(Problem::new("file-size", &file.path, message));
        }
        None => {}
    }
    for function in source.functions().into_iter().filter(|function| function.num_lines > FUNCTION_AIM) {
        let place = format!("{}:{}", file.path, function.line);
        let (name, num) = (&function.name, function.num_lines);
        if num > FUNCTION_LIMIT {
            let message =
                format!("`{name}` has {num} lines of code; the limit is {FUNCTION_LIMIT}: split it");
            report.problems.push(Problem::new("function-size", place, message));
        } else {
            let message = format!("`{name}` has {num} lines of code; the aim is {FUNCTION_AIM}");
            report.notes.push(Problem::new("function-size", place, message));
        }
    }
}

/// Bytes of the tree, of the fixtures and of single files.
pub(crate) fn check_tree(files: &[File], problems: &mut Vec<Problem>) {
    let sum =
        |prefix: &str| files.iter().filter(|f| f.path.starts_with(prefix)).map(|f| f.num_bytes).sum::<u64>();
    for (prefix, limit) in
        [("", TREE_LIMIT), ("tests/fixtures/", FIXTURES_LIMIT), (DEMO_MODEL, DEMO_MODEL_LIMIT)]
    {
        let bytes = sum(prefix);
        if bytes > limit {
            let place = if prefix.is_empty() { "." } else { prefix };
            problems.push(Problem::new("tree-size", place, format!("{bytes} bytes; the limit is {limit}")));
        }
    }
    let large = |file: &&File| file.num_bytes > FILE_LIMIT && !file.path.starts_with(DEMO_MODEL);
    for file in files.iter().filter(large) {
        let message = format!("{} bytes; the limit for one file is {FILE_LIMIT}", file.num_bytes);
        problems.push(Problem::new("large-file", &file.path, message));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::file;
    use super::*;

    fn report(path: &str, text: &str) -> Report {
        let mut report = Report::default();
        check_file(&file(path, text), &mut report);
        report
    }

    #[test]
    fn a_rust_file_fails_over_600_lines_and_is_noted_over_300() {
        assert_eq!(report("src/a.rs", &"a;\n".repeat(601)).problems.len(), 1);
        let noted = report("src/a.rs", &"a;\n".repeat(600));
        assert_eq!((noted.problems.len(), noted.notes.len()), (0, 1));
        assert!(report("src/a.rs", &"a;\n".repeat(300)).notes.is_empty());
    }

    #[test]
    fn inline_tests_are_free() {
        let text = format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", "a;\n".repeat(300), "b;\n".repeat(400));
        let report = report("src/a.rs", &text);
        assert!(report.problems.is_empty() && report.notes.is_empty());
    }

    #[test]
    fn a_model_file_fails_over_350_lines() {
        assert_eq!(report("models/src/qwen3_vl.rs", &"a;\n".repeat(351)).problems.len(), 1);
        assert!(report("models/src/qwen3_vl.rs", &"a;\n".repeat(350)).problems.is_empty());
    }

    #[test]
    fn a_function_fails_over_80_lines() {
        let text = |lines| format!("fn long() {{\n{}}}\n", "a();\n// why\n".repeat(lines));
        assert_eq!(report("src/a.rs", &text(81)).problems[0].rule, "function-size");
        assert_eq!(report("src/a.rs", &text(81)).problems[0].place, "src/a.rs:1");
        let noted = report("src/a.rs", &text(80));
        assert_eq!((noted.problems.len(), noted.notes.len()), (0, 1));
    }

    #[test]
    fn documents_and_cuda_files_have_limits() {
        assert_eq!(report("README.md", &"a\n".repeat(151)).problems.len(), 1);
        assert_eq!(report("kernels/gemm/awq.cu", &"a\n".repeat(601)).problems.len(), 1);
        assert!(report("docs/results/cpu.md", &"a\n".repeat(601)).problems.is_empty());
    }

    #[test]
    fn large_trees_and_files_fail() {
        let sized = |path: &str, num_bytes| File { path: path.into(), num_bytes, text: None };
        let check = |files: &[File]| {
            let mut problems = Vec::new();
            check_tree(files, &mut problems);
            problems.into_iter().map(|problem| problem.rule).collect::<Vec<_>>()
        };
        assert_eq!(check(&[sized("a", FILE_LIMIT + 1)]), ["large-file"]);
        assert!(check(&[sized("models/spark-tiny-vl/a", DEMO_MODEL_LIMIT)]).is_empty());
        assert_eq!(check(&[sized("models/spark-tiny-vl/a", DEMO_MODEL_LIMIT + 1)]), ["tree-size"]);
        let fixtures: Vec<File> = (0..16).map(|i| sized(&format!("tests/fixtures/{i}"), 1_000_001)).collect();
        assert_eq!(check(&fixtures), ["tree-size"]);
        let many: Vec<File> = (0..41).map(|i| sized(&format!("{i}"), 1 << 20)).collect();
        assert_eq!(check(&many), ["tree-size"]);
        assert!(check(&many[..40]).is_empty());
    }
}
