//! The files of the repository as every check sees them: path, size and (for text) content.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};

/// A file that is tracked by git, or would be after `git add --all`.
pub(crate) struct File {
    /// Path from the root, with `/`.
    pub(crate) path: String,
    /// Size in bytes.
    pub(crate) num_bytes: u64,
    /// Content; `None` if it is not UTF-8.
    pub(crate) text: Option<String>,
}

/// Reads every file that git does not ignore, in path order.
///
/// # Errors
/// When git does not answer, or a file cannot be read.
pub(crate) fn read(root: &Path) -> anyhow::Result<Vec<File>> {
    let output = Command::new("git")
        .args(["-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .current_dir(root)
        .output()
        .context("cannot start git")?;
    if !output.status.success() {
        bail!("git ls-files failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let names = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
    let mut files = Vec::new();
    for path in names.split_terminator('\0') {
        let full = root.join(path);
        // A tracked file may be deleted in the working tree, and what a link leads to is counted where it lies: neither has
        // content.
        if !full.is_file() || full.is_symlink() {
            continue;
        }
        let bytes = std::fs::read(&full).with_context(|| format!("cannot read {path}"))?;
        let num_bytes = bytes.len() as u64;
        files.push(File { path: path.to_owned(), num_bytes, text: String::from_utf8(bytes).ok() });
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files.dedup_by(|a, b| a.path == b.path);
    Ok(files)
}

#[cfg(test)]
pub(crate) fn file(path: &str, text: &str) -> File {
    File { path: path.to_owned(), num_bytes: text.len() as u64, text: Some(text.to_owned()) }
}
