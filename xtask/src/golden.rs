//! `cargo xtask golden`: makes the fixtures again with the pinned Python packages and says which files changed. The
//! script itself, and what a fixture holds, are described beside it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use crate::process;

const SCRIPT: &str = "tests/fixtures/make/make.py";
const REQUIREMENTS: &str = "tests/fixtures/make/requirements.txt";
const FIXTURES: &str = "tests/fixtures";

/// Runs the fixture script with `args` and compares the folder before and after.
///
/// # Errors
/// When the Python packages cannot be installed or the script fails.
pub(crate) fn run(root: &Path, args: &[String]) -> anyhow::Result<()> {
    let folder = root.join(FIXTURES);
    let before = contents(&folder)?;
    let python = process::python(root, "python-golden", &root.join(REQUIREMENTS))?;
    process::run(Command::new(python).current_dir(root).args([SCRIPT, "--out", FIXTURES]).args(args))?;
    let changes = changes(&before, &contents(&folder)?);
    for change in &changes {
        println!("{change}");
    }
    match changes.len() {
        0 => println!("golden: no fixture changed"),
        num => println!(
            "golden: {num} files changed; run the tests, and say in the commit why the answers moved"
        ),
    }
    Ok(())
}

/// All files below `folder`: path from there and content.
fn contents(folder: &Path) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let (mut files, mut folders) = (BTreeMap::new(), vec![folder.to_path_buf()]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).with_context(|| format!("cannot list {}", next.display()))? {
            let path = entry?.path();
            if path.is_dir() && !path.ends_with("__pycache__") {
                folders.push(path);
            } else if path.is_file() {
                let name = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
                files.insert(
                    name,
                    std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?,
                );
            }
        }
    }
    Ok(files)
}

fn changes(before: &BTreeMap<String, Vec<u8>>, after: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let removed =
        before.keys().filter(|name| !after.contains_key(*name)).map(|name| format!("removed {name}"));
    let other = after.iter().filter_map(|(name, content)| match before.get(name) {
        None => Some(format!("added {name}")),
        Some(old) if old != content => Some(format!("changed {name}")),
        Some(_) => None,
    });
    removed.chain(other).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_named() {
        let tree = |files: &[(&str, &str)]| {
            files.iter().map(|(name, content)| ((*name).to_owned(), content.as_bytes().to_vec())).collect()
        };
        let before = tree(&[("a", "1"), ("b", "1"), ("c", "1")]);
        let after = tree(&[("a", "1"), ("b", "2"), ("d", "1")]);
        assert_eq!(changes(&before, &after), ["removed c", "changed b", "added d"]);
        assert!(changes(&before, &before).is_empty());
    }
}
