//! A folder of compiled kernels. Files are named by what they were made from and end with a checksum, so that nothing old,
//! cut or changed is ever loaded. Tools that read cubins ignore what follows the code.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Arch, Error, ModuleSource, Result, Version};

/// Bytes behind the code: checksum over key and code, and a mark.
const CHECKSUM_BYTES: usize = blake3::OUT_LEN;
const MARK: &[u8; 8] = b"SPKCUBN1";

/// A folder of compiled kernels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CubinCache {
    folder: PathBuf,
}

/// Everything that a cubin depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CubinKey {
    module: &'static str,
    arch: Arch,
    hash: blake3::Hash,
}

/// What a folder has for a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// The code.
    Cubin(Vec<u8>),
    /// No file.
    Missing,
    /// A file that is not what was written.
    Corrupt,
}

impl CubinKey {
    /// The key of a module with its resolved `text`. `nvrtc` is `None` in a folder for machines without the compiler, where
    /// any version's code is welcome.
    pub fn new(module: &ModuleSource, text: &str, arch: Arch, nvrtc: Option<Version>) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut add = |part: &str| {
            // With its length, so that no text can pass for two others.
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        };
        add(module.name);
        add(text);
        module.options().iter().for_each(|option| add(option));
        add(arch.name());
        add(&nvrtc.map_or_else(|| "any".to_owned(), |version| version.to_string()));
        Self { module: module.name, arch, hash: hasher.finalize() }
    }

    /// Its file.
    pub fn file_name(&self) -> String {
        format!("{}-{}-{}.cubin", self.module, self.arch, &self.hash.to_hex()[..16])
    }

    fn checksum(&self, cubin: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.hash.as_bytes());
        hasher.update(cubin);
        hasher.finalize()
    }
}

impl CubinCache {
    /// The cache in `folder`, which may be missing.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Where kernels are kept if nobody says: `spark-engine/kernels` in the user's cache folder. `None` without a home.
    pub fn user_folder() -> Option<PathBuf> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let caches = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
        Some(caches.join("spark-engine").join("kernels"))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the folder has for `key`.
    ///
    /// # Errors
    /// [`Error::Io`] when a file is there and cannot be read.
    pub fn read(&self, key: &CubinKey) -> Result<Entry> {
        let path = self.folder.join(key.file_name());
        let mut bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Entry::Missing),
            Err(source) => return Err(Error::Io { what: "reading the compiled kernel", path, source }),
        };
        let Some(len) = bytes.len().checked_sub(CHECKSUM_BYTES + MARK.len()) else {
            return Ok(Entry::Corrupt);
        };
        let (cubin, rest) = bytes.split_at(len);
        let (checksum, mark) = rest.split_at(CHECKSUM_BYTES);
        if mark != MARK || key.checksum(cubin).as_bytes() != checksum {
            return Ok(Entry::Corrupt);
        }
        bytes.truncate(len);
        Ok(Entry::Cubin(bytes))
    }

    /// Writes the code for `key`, all of it or nothing: other processes may read and write the same folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, key: &CubinKey, cubin: &[u8]) -> Result<PathBuf> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let error = |what, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { what, path, source }
        };
        std::fs::create_dir_all(&self.folder).map_err(error("making the folder", &self.folder))?;
        let path = self.folder.join(key.file_name());
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let partial = self.folder.join(format!(".{}.{count}.{}", std::process::id(), key.file_name()));
        let mut bytes = Vec::with_capacity(cubin.len() + CHECKSUM_BYTES + MARK.len());
        bytes.extend_from_slice(cubin);
        bytes.extend_from_slice(key.checksum(cubin).as_bytes());
        bytes.extend_from_slice(MARK);
        let written = std::fs::write(&partial, &bytes)
            .map_err(error("writing the compiled kernel", &partial))
            .and_then(|()| std::fs::rename(&partial, &path).map_err(error("renaming to", &path)));
        if written.is_err() {
            // Leaves no half file behind; the first error is the one to report.
            let _ = std::fs::remove_file(&partial);
        }
        written.map(|()| path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MODULES;

    const V13: Option<Version> = Some(Version { major: 13, minor: 0 });

    fn key(text: &str) -> CubinKey {
        CubinKey::new(&MODULES[0], text, Arch::Sm90, V13)
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CubinCache::new(folder.path().join("new"));
        assert_eq!(cache.read(&key("a")).unwrap(), Entry::Missing);
        cache.write(&key("a"), b"code").unwrap();
        cache.write(&key("a"), b"newer code").unwrap();
        assert_eq!(cache.read(&key("a")).unwrap(), Entry::Cubin(b"newer code".to_vec()));
        assert_eq!(cache.read(&key("b")).unwrap(), Entry::Missing);
        let files = std::fs::read_dir(cache.folder()).unwrap().count();
        assert_eq!(files, 1, "no partial file is left");
    }

    #[test]
    fn every_input_makes_another_key() {
        let base = key("a");
        let others = [
            CubinKey::new(&MODULES[1], "a", Arch::Sm90, V13),
            CubinKey::new(&MODULES[0], "b", Arch::Sm90, V13),
            CubinKey::new(&MODULES[0], "a", Arch::Sm80, V13),
            CubinKey::new(&MODULES[0], "a", Arch::Sm90, Some(Version { major: 13, minor: 1 })),
            CubinKey::new(&MODULES[0], "a", Arch::Sm90, None),
        ];
        assert!(others.iter().all(|other| other.file_name() != base.file_name()));
        assert_eq!(key("a"), base);
        assert!(base.file_name().starts_with(&format!("{}-sm_90-", MODULES[0].name)));
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CubinCache::new(folder.path());
        let path = cache.write(&key("a"), b"code").unwrap();
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(cache.read(&key("a")).unwrap(), Entry::Corrupt, "byte {at}");
            std::fs::write(&path, &good[..at]).unwrap();
            assert_eq!(cache.read(&key("a")).unwrap(), Entry::Corrupt, "cut at {at}");
        }
        std::fs::copy(write_other(&cache), &path).unwrap();
        assert_eq!(cache.read(&key("a")).unwrap(), Entry::Corrupt, "the file of another key");
    }

    fn write_other(cache: &CubinCache) -> PathBuf {
        cache.write(&key("b"), b"code").unwrap()
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_with_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let error = CubinCache::new(&file).write(&key("a"), b"code").unwrap_err().to_string();
        assert!(error.starts_with("making the folder ") && error.contains("file"), "{error}");
    }
}
