//! `cargo xtask ui`: the web page, from `ui/` to the files that the program embeds, and its tests in a browser. Needs node,
//! npm and (for the tests) Chromium; building the program needs none of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};

use crate::process;

/// Where the built page lies, and where cargo embeds it from.
const BUILT: &str = "crates/server/assets/ui";
/// vite 8 and playwright run on these.
const OLDEST_NODE: (u32, u32) = (20, 19);

/// What to do with a freshly built page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Page {
    /// Compare it with the committed one.
    Check,
    /// Put it in place of the committed one.
    Write,
}

/// Builds the page with the packages of its lock file.
///
/// # Errors
/// When node is missing or too old, the page does not build, or (for `Check`) any file differs from the committed ones.
pub(crate) fn build(root: &Path, page: Page) -> anyhow::Result<()> {
    check_node()?;
    let source = root.join("ui");
    install(&source)?;
    // Vite empties the folder that it writes to.
    let fresh = process::target(root).join("ui");
    process::run(
        Command::new("npm").args(["run", "build"]).current_dir(&source).env("SPARK_UI_OUT", &fresh),
    )?;
    let (built, committed) = (read(&fresh)?, read(&root.join(BUILT))?);
    let differences = differences(&built, &committed);
    match page {
        Page::Check => ensure!(
            differences.is_empty(),
            "{BUILT} is not what ui/ builds: {}; run `cargo xtask ui --write` and commit it",
            differences.join(", ")
        ),
        Page::Write => {
            let folder = root.join(BUILT);
            for gone in committed.keys().filter(|path| !built.contains_key(*path)) {
                std::fs::remove_file(folder.join(gone))?;
            }
            for (path, bytes) in &built {
                let path = folder.join(path);
                std::fs::create_dir_all(path.parent().unwrap_or(&folder))?;
                std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
    }
    println!("ui: {} files, {} bytes", built.len(), built.values().map(Vec::len).sum::<usize>());
    Ok(())
}

/// Runs the tests of the page in headless Chromium, against `program` with the demo model.
///
/// # Errors
/// When a test fails, or there is no Chromium.
pub(crate) fn test(root: &Path, program: &Path) -> anyhow::Result<()> {
    check_node()?;
    let tests = root.join("tests/ui");
    install(&tests)?;
    process::run(Command::new("npm").arg("test").current_dir(&tests).env("SPARK_ENGINE", program))
}

fn check_node() -> anyhow::Result<()> {
    let output = Command::new("node").arg("--version").output();
    let output = output.context("cannot start node: install nodejs and npm (see CONTRIBUTING.md)")?;
    let version = String::from_utf8_lossy(&output.stdout).trim().trim_start_matches('v').to_owned();
    let mut numbers = version.split('.').map_while(|number| number.parse::<u32>().ok());
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    ensure!(
        found >= OLDEST_NODE,
        "node {version}: the page needs {}.{} or newer",
        OLDEST_NODE.0,
        OLDEST_NODE.1
    );
    Ok(())
}

/// Exactly the packages of the lock file. Done once per content of it.
fn install(folder: &Path) -> anyhow::Result<()> {
    let lock = folder.join("package-lock.json");
    let wanted = std::fs::read(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
    let stamp = folder.join("node_modules/.installed");
    if std::fs::read(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    process::run(Command::new("npm").args(["ci", "--no-audit", "--no-fund"]).current_dir(folder))?;
    std::fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

/// Contents of all files below `folder`, by relative path; nothing if it is not there.
fn read(folder: &Path) -> anyhow::Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop().filter(|next| next.is_dir()) {
        for entry in std::fs::read_dir(&next).with_context(|| format!("cannot read {}", next.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let Ok(relative) = path.strip_prefix(folder) else { bail!("{} left its folder", path.display()) };
            files.insert(relative.to_owned(), bytes);
        }
    }
    Ok(files)
}

/// One line for each file that is missing, left over or different.
fn differences(built: &BTreeMap<PathBuf, Vec<u8>>, committed: &BTreeMap<PathBuf, Vec<u8>>) -> Vec<String> {
    let new = built.iter().filter_map(|(path, bytes)| match committed.get(path) {
        None => Some(format!("{} is missing", path.display())),
        Some(other) if other != bytes => Some(format!("{} differs", path.display())),
        Some(_) => None,
    });
    let old = committed.keys().filter(|path| !built.contains_key(*path));
    new.chain(old.map(|path| format!("{} is left over", path.display()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_difference_is_named() {
        let tree = |files: &[(&str, &str)]| {
            files.iter().map(|(path, text)| (PathBuf::from(path), text.as_bytes().to_vec())).collect()
        };
        let built = tree(&[("a.js", "1"), ("b.js", "2"), ("c.js", "3")]);
        let committed = tree(&[("b.js", "x"), ("c.js", "3"), ("d.js", "4")]);
        assert_eq!(differences(&built, &committed), ["a.js is missing", "b.js differs", "d.js is left over"]);
        assert!(differences(&built, &built).is_empty());
    }
}
