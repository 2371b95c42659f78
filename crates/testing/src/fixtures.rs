//! Where the fixtures are. Paths and bytes only; `oracle.rs` and `tensors.rs` know what is in them.

use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Names the root of the repository for a test program that was built elsewhere.
const ROOT_VARIABLE: &str = "SPARK_ROOT";

/// The root of this repository: the folder that `SPARK_ROOT` names, where this was built, or the current folder.
#[must_use]
pub fn repository() -> PathBuf {
    if let Some(named) = std::env::var_os(ROOT_VARIABLE) {
        return named.into();
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    if built.join("tests/fixtures").is_dir() { built } else { PathBuf::from(".") }
}

/// `tests/fixtures` of this repository.
#[must_use]
pub fn fixtures_dir() -> PathBuf {
    repository().join("tests/fixtures")
}

/// The folder of one model fixture, such as `moe_vl_awq`.
#[must_use]
pub fn model_dir(name: &str) -> PathBuf {
    fixtures_dir().join("models").join(name)
}

/// Names of all model fixtures that start with `prefix` (`""` for all), sorted.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be listed.
pub fn model_names(prefix: &str) -> Result<Vec<String>> {
    let folder = fixtures_dir().join("models");
    let io = |source| Error::Io { path: folder.clone(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).map_err(io)? {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) && model_dir(&name).join("oracle.json").is_file() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Path of an image in `media/`, by the name that [`crate::Case::media`] gives.
#[must_use]
pub fn media_path(name: &str) -> PathBuf {
    fixtures_dir().join("media").join(name)
}

/// The encoded bytes of an image in `media/`.
///
/// # Errors
/// [`Error::Io`] when there is no such image.
pub fn media_bytes(name: &str) -> Result<Vec<u8>> {
    let path = media_path(name);
    fs::read(&path).map_err(|source| Error::Io { path, source })
}

/// Reads a JSON file below the fixtures folder, such as `vision/smart_resize.json`.
///
/// # Errors
/// [`Error::Io`] or [`Error::Json`].
pub fn read_json<T: DeserializeOwned>(relative: &str) -> Result<T> {
    json_file(&fixtures_dir().join(relative))
}

pub(crate) fn json_file<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_models_by_prefix() {
        let all = model_names("").unwrap();
        let vl = model_names("moe_vl_").unwrap();
        assert!(all.len() > vl.len() && vl.len() > 5, "{all:?}");
        assert!(vl.iter().all(|n| all.contains(n)));
        assert!(all.is_sorted());
        assert!(model_names("no such family").unwrap().is_empty());
    }

    #[test]
    fn names_the_missing_file() {
        let error = media_bytes("absent.png").unwrap_err();
        assert!(error.to_string().contains("absent.png"), "{error}");
        assert!(media_bytes("sky.png").unwrap().starts_with(b"\x89PNG"));
    }
}
