//! Getting byte ranges out of files: parallel large reads past the page cache, or memory maps. Knows ranges only, not
//! what is in them.

mod direct;
mod map;
mod pieces;
mod pool;
mod ring;

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
    /// Whether the bytes stay, as a part of the result; else they are soon dropped.
    pub(crate) stays: bool,
}

/// Called with each range that is complete, from several threads.
pub(crate) type Deliver<'a> = &'a (dyn Fn(&Request, Bytes) -> Result<()> + Sync);

/// Opened files, to be read in one go or bit by bit.
pub(crate) enum Reader {
    Eager(pieces::Files),
    Lazy(Vec<map::Mapped>),
}

impl Reader {
    pub(crate) fn open(files: &[PathBuf], strategy: LoadStrategy) -> Result<Self> {
        Ok(match strategy {
            LoadStrategy::Eager => Reader::Eager(pieces::Files::open(files)?),
            LoadStrategy::Lazy => Reader::Lazy(files.iter().map(map::Mapped::open).collect::<Result<_>>()?),
        })
    }

    /// Bytes that reading `requests` at once takes.
    pub(crate) fn num_bytes(&self, requests: &mut [Request]) -> u64 {
        sort(requests);
        match self {
            Reader::Eager(_) => pieces::num_bytes(requests),
            Reader::Lazy(_) => requests.iter().map(|request| request.len as u64).sum(),
        }
    }

    /// Reads all `requests` with `threads` threads and delivers each once; the first error stops everything.
    pub(crate) fn read(
        &self,
        mut requests: Vec<Request>,
        threads: usize,
        progress: &Progress,
        deliver: Deliver<'_>,
    ) -> Result<()> {
        sort(&mut requests);
        match self {
            Reader::Eager(files) => files.read(&requests, threads, progress, deliver),
            Reader::Lazy(maps) => map::read(maps, &requests, threads, progress, deliver),
        }
    }
}

/// Bytes that an eager reader reads for `requests`.
pub(crate) fn num_bytes(requests: &mut [Request]) -> u64 {
    sort(requests);
    pieces::num_bytes(requests)
}

fn sort(requests: &mut [Request]) {
    requests.sort_by_key(|request| (request.file, request.offset, request.len));
}

/// Threads that read and convert.
pub(crate) fn num_threads(options: &LoadOptions) -> usize {
    match options.threads {
        0 => std::thread::available_parallelism().map_or(4, |cores| cores.get().clamp(4, 16)),
        threads => threads.min(64),
    }
}

/// Counts bytes and tells the caller's function.
pub(crate) struct Progress {
    report: Option<ProgressFn>,
    read: AtomicU64,
    from_peers: AtomicU64,
    total: u64,
}

impl Progress {
    pub(crate) fn new(report: Option<ProgressFn>, total: u64) -> Self {
        Progress { report, read: AtomicU64::new(0), from_peers: AtomicU64::new(0), total }
    }

    fn add(&self, bytes: usize) {
        let bytes_read = self.read.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.tell(bytes_read);
    }

    /// Bytes that another rank has read.
    pub(crate) fn add_from_peers(&self, bytes: usize) {
        self.from_peers.fetch_add(bytes as u64, Ordering::Relaxed);
        self.add(bytes);
    }

    fn tell(&self, bytes_read: u64) {
        if let Some(report) = &self.report {
            report(LoadProgress {
                // Bit by bit, what lies between two ranges may be read where in one go it would not.
                bytes_read: bytes_read.min(self.total),
                bytes_from_peers: self.from_peers.load(Ordering::Relaxed),
                bytes_total: self.total,
            });
        }
    }

    /// Everything has been read, whatever was counted.
    pub(crate) fn finish(&self) {
        if self.read.swap(self.total, Ordering::Relaxed) < self.total {
            self.tell(self.total);
        }
    }
}

/// Runs `work(state, index)` for 0..count on `threads` threads, in order of starting; each thread has a state of its
/// own. Ends early at the first error, which it returns.
pub(crate) fn run<S>(
    threads: usize,
    count: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<()> {
    run_workers(threads, count, |next| {
        let mut state = state();
        while let Some(index) = next.take() {
            work(&mut state, index)?;
        }
        Ok(())
    })
}

/// The numbers 0..count, each given to one of several threads.
pub(crate) struct Next {
    next: AtomicUsize,
    count: usize,
    stop: AtomicBool,
}

impl Next {
    /// The next number; `None` when there is none left, or a thread has failed.
    pub(crate) fn take(&self) -> Option<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|&index| index < self.count)
    }
}

/// Runs `worker` on `threads` threads, which share the numbers 0..count. Returns the first error; the others end then.
pub(crate) fn run_workers(
    threads: usize,
    count: usize,
    worker: impl Fn(&Next) -> Result<()> + Sync,
) -> Result<()> {
    let next = Next { next: AtomicUsize::new(0), count, stop: AtomicBool::new(false) };
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(count) {
            scope.spawn(|| {
                if let Err(error) = worker(&next) {
                    next.stop.store(true, Ordering::Relaxed);
                    lock(&failure).get_or_insert(error);
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
