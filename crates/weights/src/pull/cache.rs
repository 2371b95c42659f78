//! The folders of one model in the Hugging Face cache: blobs by digest, snapshots of links, references, locks. Not
//! what goes into the files.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::hub::RemoteFile;
use crate::error::{Error, Result};

/// `models--OWNER--NAME` of a cache. Layout: `blobs/DIGEST`, `snapshots/COMMIT/NAME` -> blob, `refs/REVISION`; locks
/// lie in `.locks/models--OWNER--NAME/DIGEST.lock` of the cache, as the Python tools have them.
pub(super) struct Repository {
    root: PathBuf,
    locks: PathBuf,
}

impl Repository {
    /// Makes the folders that are missing. `model` is a checked id.
    pub(super) fn create(cache: &Path, model: &str) -> Result<Self> {
        let name = format!("models--{}", model.replace('/', "--"));
        let repository = Repository { root: cache.join(&name), locks: cache.join(".locks").join(&name) };
        create_dir(&repository.root.join("blobs"))?;
        create_dir(&repository.locks)?;
        Ok(repository)
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.root.join("blobs").join(file.digest.hex())
    }

    /// Where an unfinished download waits for its continuation.
    pub(super) fn part(&self, file: &RemoteFile) -> PathBuf {
        self.root.join("blobs").join(format!("{}.incomplete", file.digest.hex()))
    }

    /// Bytes of an earlier, interrupted download.
    pub(super) fn part_len(&self, file: &RemoteFile) -> u64 {
        std::fs::metadata(self.part(file)).map_or(0, |metadata| metadata.len())
    }

    /// The complete file, if the cache has it: in the snapshot, perhaps as a copy, or as a blob that no snapshot links
    /// yet. Judged by its size; content was checked before a file got its name.
    pub(super) fn present(&self, commit: &str, file: &RemoteFile) -> Option<PathBuf> {
        let candidates = [self.snapshot(commit).join(&file.name), self.blob(file)];
        candidates.into_iter().find(|path| has_size(path, file.size))
    }

    /// Excludes other processes from the transfer of `file` until the lock is dropped.
    pub(super) fn lock(&self, file: &RemoteFile) -> Result<File> {
        let path = self.locks.join(format!("{}.lock", file.digest.hex()));
        let io = |action, source| Error::Io { path: path.clone(), action, offset: None, source };
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| io("cannot create the lock", source))?;
        match lock.try_lock() {
            Ok(()) => Ok(lock),
            Err(std::fs::TryLockError::WouldBlock) => Err(io(
                "another process is downloading this file; wait until it is done",
                ErrorKind::WouldBlock.into(),
            )),
            Err(std::fs::TryLockError::Error(source)) => Err(io("cannot lock", source)),
        }
    }

    /// Lets the snapshot of `commit` show `file`.
    pub(super) fn link(&self, commit: &str, file: &RemoteFile) -> Result<()> {
        let path = self.snapshot(commit).join(&file.name);
        if has_size(&path, file.size) {
            return Ok(());
        }
        let parent = path.parent().unwrap_or(&self.root);
        create_dir(parent)?;
        // snapshots/COMMIT and the folders of the name lie above the link; blobs lies beside snapshots.
        let up = "../".repeat(2 + file.name.matches('/').count());
        let target = format!("{up}blobs/{}", file.digest.hex());
        // A link appears whole or not at all, also over an older one.
        let fresh = parent.join(format!(".{}.{}.link", file.digest.hex(), std::process::id()));
        remove(&fresh)?;
        std::os::unix::fs::symlink(target, &fresh)
            .and_then(|()| std::fs::rename(&fresh, &path))
            .map_err(|source| Error::Io { path, action: "cannot link", offset: None, source })
    }

    /// Lets `revision` stand for `commit`.
    pub(super) fn refer(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        create_dir(path.parent().unwrap_or(&self.root))?;
        let fresh = self.root.join(format!("refs.{}.new", std::process::id()));
        File::create(&fresh)
            .and_then(|mut file| file.write_all(commit.as_bytes()))
            .and_then(|()| std::fs::rename(&fresh, &path))
            .map_err(|source| Error::Io { path, action: "cannot write the reference", offset: None, source })
    }

    /// Fails before the download rather than in its middle.
    pub(super) fn check_room(&self, needed: u64) -> Result<()> {
        let Ok(system) = rustix::fs::statvfs(&self.root) else {
            // Some network file systems do not say; writing will.
            return Ok(());
        };
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        if needed > free {
            return Err(Error::NoRoom { path: self.root.clone(), needed, free });
        }
        Ok(())
    }
}

/// Whether a file of `size` bytes is at `path`, links followed.
pub(super) fn has_size(path: &Path, size: u64) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
}

/// Removes a file that may not exist.
pub(super) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => {
            Err(Error::Io { path: path.to_owned(), action: "cannot remove", offset: None, source })
        }
        _ => Ok(()),
    }
}

fn create_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        action: "cannot create the folder",
        offset: None,
        source,
    })
}
