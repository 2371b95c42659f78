//! Words that must not stand in the repository: synonyms of glossary terms, unfinished work, names of one machine.
//! Also the first line of every Rust file.

use super::Problem;
use super::source::{Source, line_of, words};
use super::tree::File;

/// Identifiers that docs/glossary.md replaces. Only those that have no other meaning: `task` is tokio's, `swap` is
/// std's, `page cache` is the kernel's.
const SYNONYMS: &[(&str, &str)] = &[
    ("job", "request or sequence"),
    ("jobs", "requests or sequences"),
    ("Job", "Request or Sequence"),
    ("cached_len", "num_cached_tokens"),
    ("device_len", "num_cached_tokens + num_scheduled_tokens"),
    ("max_batch_total_tokens", "max_num_batched_tokens"),
    ("page_table", "block_table"),
    ("page_tables", "block tables"),
    ("PageTable", "block_table"),
    ("num_pages", "num_blocks"),
    ("KvPage", "block"),
    ("out_loc", "slot_mapping"),
    ("pos_ids", "positions"),
    ("indptr", "cu_seqlens_q or cu_seqlens_k"),
    ("cache_seqlens", "context_len"),
    ("kv_len", "context_len"),
    ("kv_lens", "context_lens"),
    ("RadixCache", "prefix cache"),
    ("radix_cache", "prefix cache"),
    ("n_heads", "num_heads"),
    ("n_kv_heads", "num_kv_heads"),
    ("n_layers", "num_layers"),
    ("d_model", "hidden_size"),
    ("wqkv", "qkv_proj"),
    ("w13", "gate_up_proj"),
    ("qparams", "scale, zeros"),
    ("gate_out", "router_logits"),
    ("active_experts", "num_experts_per_tok"),
];

/// Macros and attributes of unfinished work, in code.
const UNFINISHED: &[&str] = &["todo!(", "todo!{", "unimplemented!(", "unimplemented!{", "#[ignore", "dbg!("];

/// Folders that exist on one machine only, in any text. A path counts where it is absolute.
const MACHINE_FOLDERS: &[&str] = &["work", "root", "home", "Users", "tmp"];

/// Package registries: where packages come from is a matter of the machine, in any text.
const REGISTRIES: &[&str] = &["sparse+http", "--index-url", "--find-links"];

/// Checks one file.
pub(crate) fn check(file: &File, problems: &mut Vec<Problem>) {
    let Some(text) = &file.text else { return };
    let mut found = |line_idx: usize, message: String| {
        problems.push(Problem::new("words", format!("{}:{}", file.path, line_idx + 1), message));
    };
    check_text(text, &mut found);
    if file.path.ends_with(".rs") {
        if !text.starts_with("//! ") {
            found(0, "the first line must be `//!` and say what the file is, and what it is not".to_owned());
        }
        check_rust(&Source::new(text), &mut found);
    }
}

/// Names of one machine, anywhere.
fn check_text(text: &str, found: &mut dyn FnMut(usize, String)) {
    for path in MACHINE_FOLDERS.iter().map(|folder| format!("/{folder}/")) {
        for (at, _) in text.match_indices(&path).filter(|(at, _)| is_absolute(text, *at)) {
            let message =
                format!("`{path}` is a path of one machine: use a relative path or a temporary folder");
            found(line_of(text, at), message);
        }
    }
    for name in REGISTRIES {
        for (at, _) in text.match_indices(name) {
            let message =
                format!("`{name}` names a package registry: leave it to the machine's configuration");
            found(line_of(text, at), message);
        }
    }
}

/// Words of code and of comments.
fn check_rust(source: &Source, found: &mut dyn FnMut(usize, String)) {
    let (code, comments) = (&source.code, &source.comments);
    for word in UNFINISHED {
        for (at, _) in code.match_indices(word) {
            found(line_of(code, at), format!("`{word}`: finish it or leave it out"));
        }
    }
    for (at, word) in words(code) {
        if let Some((_, instead)) = SYNONYMS.iter().find(|(synonym, _)| *synonym == word) {
            found(line_of(code, at), format!("`{word}`: the glossary's word is {instead}"));
        }
    }
    for (at, word) in words(comments) {
        match word {
            "FIXME" | "XXX" => found(line_of(comments, at), format!("`{word}`: fix it, or file an issue")),
            "TODO" if !has_name(&comments[at + word.len()..]) => {
                found(line_of(comments, at), "`TODO` needs a name: `TODO(name): what`".to_owned());
            }
            _ => {}
        }
    }
}

/// Whether a path found at byte `at` starts there, and is not the middle of a relative path or an address.
fn is_absolute(text: &str, at: usize) -> bool {
    !text[..at].ends_with(|c: char| c.is_alphanumeric() || "._-/~})>*".contains(c))
}

/// Whether `rest`, which follows a TODO, begins with a name in parentheses.
fn has_name(rest: &str) -> bool {
    rest.strip_prefix('(').is_some_and(|rest| rest.starts_with(char::is_alphabetic) && rest.contains(')'))
}

#[cfg(test)]
mod tests {
    use super::super::tree::file;
    use super::*;

    fn lines(path: &str, text: &str) -> Vec<String> {
        let mut problems = Vec::new();
        check(&file(path, text), &mut problems);
        problems.into_iter().map(|problem| problem.place).collect()
    }

    #[test]
    fn a_rust_file_starts_with_what_it_is() {
        assert_eq!(lines("a.rs", "// Not a document comment.\n"), ["a.rs:1"]);
        assert_eq!(lines("a.rs", "use std::fmt;\n//! Too late.\n"), ["a.rs:1"]);
        assert!(lines("a.rs", "//! What it is.\n").is_empty());
        assert!(lines("a.md", "# Not Rust\n").is_empty());
    }

    #[test]
    fn synonyms_fail_as_whole_identifiers_in_code() {
        assert_eq!(lines("a.rs", "//! A.\nlet page_table = job;\n").len(), 2);
        assert!(
            lines("a.rs", "//! A job's page_table.\nlet x_page_table = \"job\"; let jobbing = 1;\n")
                .is_empty()
        );
    }

    #[test]
    fn unfinished_work_fails() {
        assert_eq!(lines("a.rs", "//! A.\nfn f() { todo!() }\n"), ["a.rs:2"]);
        assert_eq!(lines("a.rs", "//! A.\n#[test]\n#[ignore = \"slow\"]\nfn f() {}\n"), ["a.rs:3"]);
        assert_eq!(lines("a.rs", "//! A.\nfn f() { unimplemented!(\"later\") }\n"), ["a.rs:2"]);
        assert_eq!(
            lines("a.rs", "//! A.\n// FIXME: wrong\n// XXX\n// TODO: soon\n"),
            ["a.rs:2", "a.rs:3", "a.rs:4"]
        );
        assert!(lines("a.rs", "//! A.\n// TODO(ada): soon\nlet s = \"todo!( #[ignore TODO\";\n").is_empty());
    }

    #[test]
    fn paths_of_one_machine_fail_in_any_text() {
        assert_eq!(lines("a.rs", "//! A.\nlet path = \"/home/ada/models\";\n"), ["a.rs:2"]);
        assert_eq!(lines("a.py", "x = 1\nopen('/home/ada/x')\n"), ["a.py:2"]);
        assert!(lines("a.md", "see target/tmp/x, ../home/x and ${HOME}/work/x\n").is_empty());
    }

    #[test]
    fn registries_fail_in_any_text() {
        assert_eq!(lines("run", "pip install --index-url x\n"), ["run:1"]);
        assert_eq!(lines("a.toml", "a\nregistry = \"sparse+https://example.com\"\n"), ["a.toml:2"]);
    }
}
