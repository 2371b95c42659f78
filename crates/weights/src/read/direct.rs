//! Positioned reads of one file with O_DIRECT, falling back to buffered reads that leave nothing in the page cache.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, OFlags, fadvise};

use crate::error::{Error, Result};

/// Alignment of offsets, lengths and addresses; enough for every block device in use.
pub(crate) const ALIGN: usize = 4096;

/// A reusable buffer whose usable part begins at an aligned address.
pub(crate) struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    /// `len` bytes, rounded up to the alignment, and room for an unaligned beginning.
    pub(crate) fn new(len: usize) -> Self {
        let len = len.next_multiple_of(ALIGN) + ALIGN;
        let memory = vec![0; len + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        AlignedBuffer { memory, start }
    }

    /// The first `len` bytes from the aligned address on.
    pub(super) fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.memory[self.start..self.start + len]
    }
}

impl AsRef<[u8]> for AlignedBuffer {
    /// From the aligned address on.
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}

/// A file to be read at offsets, by several threads at once.
pub(crate) struct Source {
    path: PathBuf,
    buffered: File,
    direct: Option<File>,
    direct_works: AtomicBool,
}

impl Source {
    /// Opens `path`; `direct` says whether to try O_DIRECT.
    pub(crate) fn open(path: &Path, direct: bool) -> Result<Self> {
        let buffered = File::open(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            action: "cannot open",
            offset: None,
            source,
        })?;
        let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
        let unbuffered = OpenOptions::new().read(true).custom_flags(flags).open(path);
        // File systems without direct IO refuse the flag: that is an answer, not an error.
        let direct = if direct { unbuffered.ok() } else { None };
        Ok(Source {
            path: path.to_owned(),
            buffered,
            direct_works: AtomicBool::new(direct.is_some()),
            direct,
        })
    }

    /// The file to read from directly, unless that is known not to work.
    pub(super) fn direct(&self) -> Option<&File> {
        self.direct.as_ref().filter(|_| self.direct_works.load(Ordering::Relaxed))
    }

    /// Reads `len` bytes at `offset` into `buffer`, which must have been made for at least as many, and says at which place
    /// of it they begin.
    pub(crate) fn read(&self, buffer: &mut AlignedBuffer, offset: u64, len: usize) -> Result<usize> {
        let skip = (offset % ALIGN as u64) as usize;
        if let Some(file) = self.direct() {
            let aligned = (skip + len).next_multiple_of(ALIGN);
            match fill(file, buffer.bytes(aligned), offset - skip as u64, skip + len, true) {
                Ok(got) => {
                    self.check(offset, len, got.saturating_sub(skip))?;
                    return Ok(skip);
                }
                // Some file systems take the flag and refuse the read.
                Err(error) if error.kind() == ErrorKind::InvalidInput => {
                    self.direct_works.store(false, Ordering::Relaxed);
                }
                Err(source) => return Err(self.failed(offset, source)),
            }
        }
        let got = fill(&self.buffered, buffer.bytes(len), offset, len, false)
            .map_err(|source| self.failed(offset, source))?;
        // Advice only: where it is not taken, nothing is lost but cache.
        let _ = fadvise(&self.buffered, offset, std::num::NonZeroU64::new(len as u64), Advice::DontNeed);
        self.check(offset, len, got)?;
        Ok(0)
    }

    fn failed(&self, offset: u64, source: std::io::Error) -> Error {
        Error::Io { path: self.path.clone(), action: "cannot read", offset: Some(offset), source }
    }

    fn check(&self, offset: u64, wanted: usize, got: usize) -> Result<()> {
        if got >= wanted {
            return Ok(());
        }
        Err(Error::ShortRead { path: self.path.clone(), offset, wanted, got })
    }
}

/// Reads into `buffer` from `offset` until `need` bytes are there or the file ends; returns how many are.
fn fill(file: &File, buffer: &mut [u8], offset: u64, need: usize, direct: bool) -> std::io::Result<usize> {
    let mut got = 0;
    while got < need {
        match file.read_at(&mut buffer[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(more) => {
                let reached = got + more;
                // Direct reads go on at an aligned place; an unaligned short read is the end of the file.
                if direct && reached < need && reached % ALIGN != 0 {
                    return Ok(reached);
                }
                got = reached;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_ranges_direct_and_buffered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let data: Vec<u8> = (0..20_011_u32).map(|i| (i * 31 % 251) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        let mut buffer = AlignedBuffer::new(data.len());
        for direct in [true, false] {
            let source = Source::open(&path, direct).unwrap();
            for (offset, len) in
                [(0, data.len()), (1, 5), (4095, 2), (4096, 8192), (8193, 11_818), (20_010, 1)]
            {
                let begin = source.read(&mut buffer, offset as u64, len).unwrap();
                let read = &buffer.as_ref()[begin..begin + len];
                assert!(read == &data[offset..offset + len], "{offset} + {len}, direct {direct}");
            }
            let beyond = source.read(&mut buffer, 20_000, 12);
            let Err(Error::ShortRead { offset: 20_000, wanted: 12, got: 11, .. }) = beyond else {
                panic!("{beyond:?}");
            };
            assert!(matches!(source.read(&mut buffer, 90_000, 1), Err(Error::ShortRead { got: 0, .. })));
        }
    }
}
