//! Files of results: that one can be written is known before anything is measured, and it appears whole or not at all.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde_json::Value;

/// Fails if results could not be written to `path`, which `flag` gave. What is there stays as it is, and nothing is left beside it.
///
/// # Errors
/// It is a folder, or may not be written.
pub(super) fn check(flag: &str, path: &Path) -> anyhow::Result<()> {
    let tried = match fs::metadata(path) {
        // Whoever is at the other end of a pipe would see it opened and closed.
        Ok(found) if !found.is_file() && !found.is_dir() => Ok(()),
        Ok(_) => File::options().write(true).open(path).map(drop),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let unfinished = unfinished(path);
            File::create(&unfinished).and_then(|_| fs::remove_file(&unfinished))
        }
        Err(error) => Err(error),
    };
    tried.with_context(|| format!("{flag} {}: results could not be written there", path.display()))
}

/// Writes `results` to `path`, which `flag` gave.
///
/// # Errors
/// As for [`check`], and a full disk.
pub(super) fn write(flag: &str, path: &Path, results: &Value) -> anyhow::Result<()> {
    let text = format!("{results:#}\n");
    let is_ordinary = fs::metadata(path).map_or(true, |found| found.is_file());
    let whole = if is_ordinary { replace(path, &text) } else { Err(io::ErrorKind::Unsupported.into()) };
    // A folder may take no new file where the file itself can be written.
    let written = whole.or_else(|_| fs::write(path, &text));
    written.with_context(|| format!("{flag} {}", path.display()))
}

/// Beside the file first, then in its place; of a link, in the place that it leads to.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let unfinished = unfinished(&path);
    let replaced = fs::write(&unfinished, text).and_then(|()| fs::rename(&unfinished, &path));
    replaced.inspect_err(|_| {
        // What it could not be renamed to is written without it.
        let _ = fs::remove_file(&unfinished);
    })
}

fn unfinished(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.unfinished", std::process::id()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_check_changes_nothing_and_a_file_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("results.json"), folder.path().join("link.json"));
        let check_it = |path: &Path| check("--output-json", path);
        check_it(&path).unwrap();
        assert!(!path.exists());
        fs::write(&path, "earlier results, which are longer than those that come now").unwrap();
        check_it(&path).unwrap();
        assert!(fs::read_to_string(&path).unwrap().starts_with("earlier"));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        write("--output-json", &link, &json!({"a": 1})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\n  \"a\": 1\n}\n");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside them");
        for wrong in [folder.path(), &folder.path().join("missing/results.json"), &path.join("below")] {
            let error = format!("{:#}", check_it(wrong).unwrap_err());
            assert!(error.starts_with(&format!("--output-json {}: ", wrong.display())), "{error}");
            assert!(write("--output-json", wrong, &json!(1)).is_err());
        }
    }

    #[test]
    fn what_is_no_file_is_written_to_and_not_replaced() {
        let path = Path::new("/dev/null");
        check("--output-json", path).unwrap();
        write("--output-json", path, &json!(1)).unwrap();
        assert!(!fs::metadata(path).unwrap().is_file());
    }
}
