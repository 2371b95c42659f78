//! The transfer of one file: continues what is there, hashes every byte on its way, and gives the file its name when
//! its content is proven. Not which files, and not the requests themselves.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use super::Meter;
use super::cache::{Repository, has_size, remove};
use super::hub::{Digest, Fault, Hub, RemoteFile, RemoteModel};
use crate::error::{Error, Result};

/// Bytes that are read, hashed and written at once.
const CHUNK: usize = 1 << 20;
/// Longest pause between attempts.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// What every transfer of a run needs.
pub(super) struct Transfer<'a> {
    pub(super) hub: &'a Hub,
    pub(super) repository: &'a Repository,
    pub(super) remote: &'a RemoteModel,
    pub(super) retries: u32,
    pub(super) meter: &'a Meter,
}

impl Transfer<'_> {
    /// Brings `file` into the cache as a blob.
    pub(super) fn run(&self, file: &RemoteFile) -> Result<()> {
        let _lock = self.repository.lock(file)?;
        let blob = self.repository.blob(file);
        // Another process may have been faster.
        if has_size(&blob, file.size) {
            self.meter.add(file.size);
            return Ok(());
        }
        let mut part = Part::open(self.repository.part(file), file)?;
        self.meter.add(part.len);
        let mut failures = 0;
        while part.len < file.size {
            let before = part.len;
            let reason = match self.attempt(&mut part, file) {
                Ok(()) => continue,
                Err(Fault::Final(error)) => return Err(error),
                Err(Fault::Passing(reason)) => reason,
            };
            failures = if part.len > before { 0 } else { failures + 1 };
            if failures > self.retries || self.meter.is_stopped() {
                return Err(Error::Interrupted {
                    file: file.name.clone(),
                    got: part.len,
                    size: file.size,
                    attempts: failures,
                    reason,
                });
            }
            if failures > 0 {
                std::thread::sleep(Duration::from_secs(1 << (failures - 1).min(10)).min(MAX_PAUSE));
            }
        }
        part.finish(file, &blob)
    }

    /// One request and what comes of it.
    fn attempt(&self, part: &mut Part, file: &RemoteFile) -> Result<(), Fault> {
        let (body, from) = self.hub.file(self.remote, file, part.len)?;
        if from != part.len {
            // The server cannot continue and starts at the beginning.
            self.meter.take_back(part.len);
            part.clear(file).map_err(Fault::Final)?;
        }
        // More than was announced is not even read.
        let mut body = body.into_reader().take(file.size - part.len);
        let mut chunk = vec![0; CHUNK];
        while part.len < file.size {
            if self.meter.is_stopped() {
                return Err(Fault::Passing("another file failed".to_owned()));
            }
            let count = match body.read(&mut chunk) {
                Ok(0) => return Err(Fault::Passing("the connection ended early".to_owned())),
                Ok(count) => count,
                Err(error) => return Err(Fault::Passing(error.to_string())),
            };
            part.append(&chunk[..count]).map_err(Fault::Final)?;
            self.meter.receive(count as u64);
        }
        Ok(())
    }
}

/// The beginning of a file and the state of its digest.
struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Context,
}

impl Part {
    /// Opens what an earlier download left, or nothing, and hashes it.
    fn open(path: PathBuf, remote: &RemoteFile) -> Result<Self> {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = file.map_err(|source| Error::Io {
            path: path.clone(),
            action: "cannot open for writing",
            offset: None,
            source,
        })?;
        let mut part = Part { path, file, len: 0, hash: begin(remote) };
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = part.file.read(&mut chunk).map_err(|source| part.wrong("cannot read", source))?;
            part.hash.update(&chunk[..count]);
            part.len += count as u64;
            if part.len > remote.size {
                // Longer than the whole: not the beginning of this file.
                part.clear(remote)?;
                return Ok(part);
            }
            if count == 0 {
                return Ok(part);
            }
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|source| self.wrong("cannot write", source))?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Starts from nothing.
    fn clear(&mut self, remote: &RemoteFile) -> Result<()> {
        use std::io::Seek;
        let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
        emptied.map_err(|source| self.wrong("cannot truncate", source))?;
        self.len = 0;
        self.hash = begin(remote);
        Ok(())
    }

    /// Compares the digest and gives the file its name; a wrong one is deleted.
    fn finish(self, remote: &RemoteFile, blob: &std::path::Path) -> Result<()> {
        // Presence is judged by size later, and a power cut may leave size without content.
        self.file.sync_data().map_err(|source| self.wrong("cannot flush", source))?;
        let got: String = self.hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        if got != remote.digest.hex() {
            remove(&self.path)?;
            let kind = match remote.digest {
                Digest::Sha256(_) => "sha256",
                Digest::Git(_) => "git hash",
            };
            let expected = remote.digest.hex().to_owned();
            return Err(Error::Digest { file: remote.name.clone(), kind, expected, got });
        }
        std::fs::rename(&self.path, blob).map_err(|source| Error::Io {
            path: blob.to_owned(),
            action: "cannot move the download here",
            offset: None,
            source,
        })
    }

    fn wrong(&self, action: &'static str, source: std::io::Error) -> Error {
        Error::Io { path: self.path.clone(), action, offset: Some(self.len), source }
    }
}

/// An empty digest of the right kind.
fn begin(remote: &RemoteFile) -> Context {
    match remote.digest {
        Digest::Sha256(_) => Context::new(&SHA256),
        Digest::Git(_) => {
            // Git's own identity of content; nothing here relies on SHA-1 against an attacker.
            let mut hash = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            hash.update(format!("blob {}\0", remote.size).as_bytes());
            hash
        }
    }
}
