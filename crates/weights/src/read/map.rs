//! The `lazy` strategy: ranges of memory-mapped files, without copies where alignment allows.

use std::fs::File;
use std::path::PathBuf;

use bytes::Bytes;
use memmap2::Mmap;

use super::{Deliver, Progress, Request, run};
use crate::error::{Error, Result};

/// Alignment that a delivered buffer has, as one from the allocator would.
const ALIGN: usize = 4;

/// A mapped file.
pub(crate) struct Mapped {
    path: PathBuf,
    bytes: Bytes,
}

impl Mapped {
    pub(super) fn open(path: &PathBuf) -> Result<Self> {
        Ok(Self { path: path.clone(), bytes: map(path)? })
    }
}

/// Delivers the ranges.
pub(super) fn read(
    maps: &[Mapped],
    requests: &[Request],
    threads: usize,
    progress: &Progress,
    deliver: Deliver<'_>,
) -> Result<()> {
    run(
        threads,
        requests.len(),
        || (),
        |(), index| {
            let request = &requests[index];
            let Mapped { path, bytes: whole } = &maps[request.file];
            let end = usize::try_from(request.offset)
                .ok()
                .and_then(|begin| Some((begin, begin.checked_add(request.len)?)));
            let Some((begin, end)) = end.filter(|&(_, end)| end <= whole.len()) else {
                return Err(Error::ShortRead {
                    path: path.clone(),
                    offset: request.offset,
                    wanted: request.len,
                    got: (whole.len() as u64).saturating_sub(request.offset) as usize,
                });
            };
            let mut bytes = whole.slice(begin..end);
            if bytes.as_ptr().align_offset(ALIGN) != 0 {
                bytes = Bytes::copy_from_slice(&bytes);
            }
            deliver(request, bytes)?;
            progress.add(request.len);
            Ok(())
        },
    )
}

#[expect(unsafe_code, reason = "mapping a file is the one thing here that needs it")]
fn map(path: &PathBuf) -> Result<Bytes> {
    let io = |action| move |source| Error::Io { path: path.clone(), action, offset: None, source };
    let file = File::open(path).map_err(io("cannot open"))?;
    // SAFETY: the map is read-only and lives as long as any `Bytes` of it. Another process that truncates the file in
    // the meantime would make reads fault; that is the stated condition of `LoadStrategy::Lazy`, which is not the
    // default. Changed contents are as harmless as any other file contents: bytes, never references or lengths.
    let map = unsafe { Mmap::map(&file) }.map_err(io("cannot map"))?;
    Ok(Bytes::from_owner(map))
}
