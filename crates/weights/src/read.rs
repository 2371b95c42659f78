//! Getting byte ranges out of files: parallel large reads past the page cache, or memory maps. Knows ranges only, not
//! what is in them.

mod direct;
mod map;
mod pieces;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::load::{LoadOptions, LoadProgress, LoadStrategy, ProgressFn, lock};

/// A wanted byte range and whom it is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    /// Position in the list of files.
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) len: usize,
    /// For the caller: the item and the place in it.
    pub(crate) item: usize,
    pub(crate) position: usize,
}

/// Called with each range that is complete, from several threads.
pub(crate) type Deliver<'a> = &'a (dyn Fn(&Request, Bytes) -> Result<()> + Sync);

/// Reads all `requests` and delivers each once; the first error stops everything.
pub(crate) fn read_all(
    files: &[PathBuf],
    mut requests: Vec<Request>,
    options: &LoadOptions,
    deliver: Deliver<'_>,
) -> Result<()> {
    requests.sort_by_key(|request| (request.file, request.offset, request.len));
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(4, |cores| cores.get().clamp(4, 16)),
        threads => threads.min(64),
    };
    match options.strategy {
        LoadStrategy::Eager => pieces::read(files, &requests, threads, options.progress.as_ref(), deliver),
        LoadStrategy::Lazy => map::read(files, &requests, threads, options.progress.as_ref(), deliver),
    }
}

/// Counts bytes and tells the caller's function.
struct Progress<'a> {
    report: Option<&'a ProgressFn>,
    read: AtomicU64,
    total: u64,
}

impl<'a> Progress<'a> {
    fn new(report: Option<&'a ProgressFn>, total: u64) -> Self {
        Progress { report, read: AtomicU64::new(0), total }
    }

    fn add(&self, bytes: usize) {
        let bytes_read = self.read.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if let Some(report) = self.report {
            report(LoadProgress { bytes_read, bytes_total: self.total });
        }
    }
}

/// Runs `work(state, index)` for 0..count on `threads` threads, in order of starting; each thread has a state of its
/// own. Ends early at the first error, which it returns.
fn run<S>(
    threads: usize,
    count: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(count) {
            scope.spawn(|| {
                let mut state = state();
                while !stop.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    if let Err(error) = work(&mut state, index) {
                        stop.store(true, Ordering::Relaxed);
                        lock(&failure).get_or_insert(error);
                    }
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
