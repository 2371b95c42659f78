//! A cache on disk: a page that says what it is, the bytes of every parameter, an index of them, and a trailer that finds the
//! index. It is written under another name and renamed when it is whole, so a file of the right name is whole.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rustix::fs::{Advice, fadvise};
use serde::{Deserialize, Serialize};

use super::form::{Form, apart};
use crate::load::lock;
use crate::params::Param;

/// Changes with the layout of the file and of anything in it.
const MAGIC: [u8; 16] = *b"spark-weights-01";
/// Bytes before the first parameter.
const HEAD: u64 = 4096;
/// Where the bytes of a matrix may begin.
const ALIGN: u64 = 64;
/// Bytes of a parameter that are brought to the disk at once.
const SYNCED: u64 = 16 << 20;
/// Bytes of the trailer: the index's offset, length and hash, and the magic.
const TRAILER: usize = 8 + 8 + 32 + 16;
/// Largest index: a 4-bit 235B rank has some 100,000 entries of about 100 bytes.
const MAX_INDEX: u64 = 1 << 30;

/// A hash of whatever it names.
pub(super) type Hash = [u8; 32];

/// Bytes in the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Blob {
    pub(super) offset: u64,
    pub(super) len: usize,
    /// Of the bytes.
    pub(super) hash: Hash,
}

/// A parameter in the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) form: Form,
    pub(super) blobs: Vec<Blob>,
}

/// A cache that is being written.
pub(super) struct Writer {
    file: File,
    unfinished: PathBuf,
    path: PathBuf,
    key: Hash,
    /// Where the next parameter goes.
    end: AtomicU64,
    entries: Mutex<Vec<Option<Entry>>>,
}

impl Writer {
    /// Begins the cache of `count` parameters that will be at `path`.
    pub(super) fn create(path: &Path, key: Hash, count: usize) -> Result<Self> {
        let unfinished = path.with_extension(format!("unfinished-{}", std::process::id()));
        let file = File::create(&unfinished)?;
        let entries = Mutex::new(vec![None; count]);
        Ok(Self { file, unfinished, path: path.to_owned(), key, end: AtomicU64::new(HEAD), entries })
    }

    /// Writes a parameter; true if it was the last.
    pub(super) fn put(&self, index: usize, param: &Param) -> Result<bool> {
        let (form, bytes) = apart(param);
        let len = bytes.iter().map(|bytes| (bytes.len() as u64).next_multiple_of(ALIGN)).sum();
        let begin = self.end.fetch_add(len, Ordering::Relaxed);
        let mut offset = begin;
        let mut blobs = Vec::with_capacity(bytes.len());
        for bytes in bytes {
            self.file.write_all_at(&bytes, offset)?;
            blobs.push(Blob { offset, len: bytes.len(), hash: hash(&bytes) });
            offset += (bytes.len() as u64).next_multiple_of(ALIGN);
        }
        if let Some(len) = NonZeroU64::new(len).filter(|len| len.get() >= SYNCED) {
            // Else the machine would fill with pages to be written, and then with a model that nobody reads there.
            self.file.sync_data()?;
            let _ = fadvise(&self.file, begin, Some(len), Advice::DontNeed);
        }
        let mut entries = lock(&self.entries);
        if let Some(entry) = entries.get_mut(index) {
            *entry = Some(Entry { form, blobs });
        }
        Ok(entries.iter().all(Option::is_some))
    }

    /// Writes the index and gives the file its name.
    pub(super) fn finish(&self) -> Result<()> {
        let entries: Vec<Entry> = std::mem::take(&mut *lock(&self.entries)).into_iter().flatten().collect();
        let index = serde_json::to_vec(&entries)?;
        let at = self.end.load(Ordering::Relaxed);
        let mut trailer = Vec::with_capacity(TRAILER);
        trailer.extend_from_slice(&at.to_le_bytes());
        trailer.extend_from_slice(&(index.len() as u64).to_le_bytes());
        trailer.extend_from_slice(&hash(&index));
        trailer.extend_from_slice(&MAGIC);
        self.file.write_all_at(&index, at)?;
        self.file.write_all_at(&trailer, at + index.len() as u64)?;
        self.file.write_all_at(&[&MAGIC[..], &self.key].concat(), 0)?;
        self.file.sync_all()?;
        std::fs::rename(&self.unfinished, &self.path)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After a `finish` it is not there.
        let _ = std::fs::remove_file(&self.unfinished);
    }
}

/// Reads what a cache holds; an error says why it cannot be used.
pub(super) fn open(path: &Path, key: Hash) -> Result<Vec<Entry>> {
    let wrong = |what: &str| Error::new(ErrorKind::InvalidData, what.to_owned());
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut head = [0; 16 + 32];
    let mut trailer = [0; TRAILER];
    let Some(trailer_at) = size.checked_sub(TRAILER as u64).filter(|&at| at >= HEAD) else {
        return Err(wrong("is too short"));
    };
    file.read_exact_at(&mut head, 0)?;
    file.read_exact_at(&mut trailer, trailer_at)?;
    if head[..16] != MAGIC || trailer[48..] != MAGIC {
        return Err(wrong("is not a cache of this version"));
    }
    if head[16..] != key {
        return Err(wrong("is of other weights"));
    }
    let number =
        |at: usize| trailer[at..at + 8].iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte));
    let (at, len) = (number(0), number(8));
    if len > MAX_INDEX || at.checked_add(len) != Some(trailer_at) {
        return Err(wrong("has an index outside of the file"));
    }
    let mut index = vec![0; usize::try_from(len).map_err(|_| wrong("has too large an index"))?];
    file.read_exact_at(&mut index, at)?;
    if hash(&index) != trailer[16..48] {
        return Err(wrong("has a damaged index"));
    }
    let entries: Vec<Entry> = serde_json::from_slice(&index)?;
    let fits = |blob: &Blob| blob.offset.checked_add(blob.len as u64).is_some_and(|end| end <= at);
    if entries.iter().flat_map(|entry| &entry.blobs).all(fits) {
        return Ok(entries);
    }
    Err(wrong("names bytes outside of the file"))
}

/// The hash of some bytes.
pub(super) fn hash(bytes: &[u8]) -> Hash {
    *blake3::hash(bytes).as_bytes()
}

/// Whether the bytes of a blob are those that were written.
pub(super) fn is_right(blob: &Blob, bytes: &Bytes) -> bool {
    hash(bytes) == blob.hash
}
