//! Where a model is on this machine: a folder, or a snapshot in the Hugging Face cache. Not downloading it.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// The folder of `model`: itself if it is one, else the snapshot of `revision` in the Hugging Face cache.
///
/// The cache is `cache`, or what `HF_HUB_CACHE`, `HF_HOME` (its `hub`) or the home folder give, in this order; its
/// layout is `models--OWNER--NAME/{refs/REVISION, snapshots/COMMIT/}`.
pub(crate) fn locate(model: &str, revision: Option<&str>, cache: Option<&Path>) -> Result<PathBuf> {
    let folder = Path::new(model);
    if folder.is_dir() {
        return Ok(folder.to_owned());
    }
    let mut tried = vec![folder.to_owned()];
    // A path that is no folder is not an id either: say that it is not there.
    if folder.is_absolute() || model.starts_with('.') {
        return Err(Error::NotFound { model: model.to_owned(), tried });
    }
    check_id(model)?;
    let revision = revision.unwrap_or("main");
    check_revision(revision)?;
    let Some(cache) = cache.map(Path::to_owned).or_else(default_cache) else {
        return Err(Error::NotFound { model: model.to_owned(), tried });
    };
    let repository = cache.join(format!("models--{}", model.replace('/', "--")));
    let reference = repository.join("refs").join(revision);
    tried.push(reference.clone());
    let commit = match std::fs::read_to_string(&reference) {
        Ok(text) => text.trim().to_owned(),
        // A commit hash has a snapshot, but no reference.
        Err(_) => revision.to_owned(),
    };
    check_revision(&commit)?;
    let snapshot = repository.join("snapshots").join(commit);
    tried.push(snapshot.clone());
    if snapshot.is_dir() { Ok(snapshot) } else { Err(Error::NotFound { model: model.to_owned(), tried }) }
}

/// The cache folder of the Hugging Face tools.
pub(crate) fn default_cache() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache/huggingface/hub")))
}

/// `owner/name` (or an old-style `name`) of letters, digits, `-`, `_` and `.`.
pub(crate) fn check_id(model: &str) -> Result<()> {
    let wrong = |reason| Err(Error::BadModelId { value: model.to_owned(), reason });
    if model.len() > 192 {
        return wrong("longer than 192 characters");
    }
    let parts: Vec<&str> = model.split('/').collect();
    if parts.len() > 2 {
        return wrong("more than one `/`, and no such folder exists");
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if parts.iter().any(|part| part.is_empty() || part.starts_with('.') || !part.chars().all(allowed)) {
        return wrong(
            "an id is `owner/name` of letters, digits, `-`, `_` and `.`, and no such folder exists",
        );
    }
    if model.contains("--") || model.contains("..") {
        return wrong("`--` and `..` are not allowed in an id");
    }
    Ok(())
}

/// A revision is a relative path that stays below `refs`.
pub(crate) fn check_revision(revision: &str) -> Result<()> {
    if is_inside(revision) {
        return Ok(());
    }
    Err(Error::BadModelId {
        value: revision.to_owned(),
        reason: "a revision is a branch, a tag or a commit and may not leave its folder",
    })
}

/// Whether `path` names something below the folder it is joined to: not empty, relative, without `.` or `..`.
pub(crate) fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.contains('\0')
        && !path.contains('\\')
        && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_folder_branch_and_commit() {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--owner--name");
        std::fs::create_dir_all(repository.join("snapshots/abc123")).unwrap();
        std::fs::create_dir_all(repository.join("refs/pr")).unwrap();
        std::fs::write(repository.join("refs/main"), "abc123\n").unwrap();
        std::fs::write(repository.join("refs/pr/1"), "abc123").unwrap();
        let find = |revision| locate("owner/name", revision, Some(cache.path()));
        let snapshot = repository.join("snapshots/abc123");
        for revision in [None, Some("main"), Some("pr/1"), Some("abc123")] {
            assert_eq!(find(revision).unwrap(), snapshot);
        }
        assert!(matches!(find(Some("other")), Err(Error::NotFound { .. })));
        assert_eq!(locate(snapshot.to_str().unwrap(), None, None).unwrap(), snapshot);
    }

    #[test]
    fn nothing_leaves_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        for model in ["../x", "a/../b", "a/b/c", "", "a//b", "a/b--c", "a/.b", "a b/c", "a/b\0"] {
            assert!(locate(model, None, Some(cache.path())).is_err(), "{model}");
        }
        for revision in ["../../x", "/etc", "a/../b", "", "."] {
            let found = locate("a/b", Some(revision), Some(cache.path()));
            assert!(matches!(found, Err(Error::BadModelId { .. })), "{revision}");
        }
        // A reference file is data too.
        let refs = cache.path().join("models--a--b/refs");
        std::fs::create_dir_all(&refs).unwrap();
        std::fs::write(refs.join("main"), "../../..").unwrap();
        assert!(matches!(locate("a/b", None, Some(cache.path())), Err(Error::BadModelId { .. })));
    }
}
