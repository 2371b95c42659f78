//! What a rank holds, kept as it is in memory (`--weight-cache`): the next start reads a rank's shards and nothing else, in one
//! run, and converts nothing. A cache is found by what it was made of; one that is of something else, or damaged, is made
//! anew from the checkpoint, which a start with a cache therefore needs as well.

mod file;
mod form;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use spark_backend::Rank;

use self::file::{Entry, Hash, Writer};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::load::{LoadOptions, LoadStrategy, NUM_WORKERS, Parts, lock};
use crate::read::{Progress, Reader, Request, num_threads};
use crate::spec::ParamSpec;
use crate::stream::{Give, Source};

/// The bytes of a parameter that have come.
type Arrived = Mutex<Vec<Option<Bytes>>>;

/// The parameters of `parts`: from the cache in `folder`, or from the checkpoint and into the cache.
pub(crate) fn through(
    folder: &Path,
    checkpoint: &Checkpoint,
    specs: &[ParamSpec],
    options: &LoadOptions,
    mut parts: Parts,
) -> Result<Box<dyn Source>> {
    let names = Names::new(folder, checkpoint, specs, options.rank)?;
    let path = names.path();
    match file::open(&path, names.key) {
        Ok(entries) if entries.len() == specs.len() => {
            tracing::info!("weights come from the cache {}", path.display());
            parts.join(options, false)?;
            return Ok(Box::new(Cached::new(path, entries, options, parts)?));
        }
        Ok(_) => tracing::warn!("the weight cache {} has other parameters; it is made anew", path.display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!("the weight cache {} {error}; it is made anew", path.display()),
    }
    parts.join(options, true)?;
    let writer = std::fs::create_dir_all(folder).and_then(|()| {
        names.remove_others();
        Writer::create(&path, names.key, specs.len())
    });
    Ok(match writer {
        Ok(writer) => Box::new(Caching { parts, writer, has_failed: AtomicBool::new(false) }),
        Err(error) => {
            tracing::warn!("no weight cache in {}: {error}", folder.display());
            Box::new(parts)
        }
    })
}

/// What caches are called: after the checkpoint's place and the rank, then after what they are made of.
struct Names {
    folder: PathBuf,
    prefix: String,
    key: Hash,
}

impl Names {
    fn new(folder: &Path, checkpoint: &Checkpoint, specs: &[ParamSpec], rank: Rank) -> Result<Self> {
        let mut key = blake3::Hasher::new();
        key.update(format!("{rank:?} {specs:?}").as_bytes());
        for path in &checkpoint.files {
            let io = |source| Error::Io { path: path.clone(), action: "cannot stat", offset: None, source };
            let file = std::fs::metadata(path).map_err(io)?;
            let time = file.modified().map_err(io)?.duration_since(UNIX_EPOCH).unwrap_or_default();
            key.update(format!("{:?} {} {time:?}", path.file_name(), file.len()).as_bytes());
        }
        for tensor in &checkpoint.tensors {
            key.update(format!("{:?} {}", tensor.info, tensor.file).as_bytes());
        }
        let dir = checkpoint.dir();
        let place = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let place = blake3::hash(place.as_os_str().as_encoded_bytes()).to_hex();
        let prefix = format!("{}-{}of{}-", &place[..16], rank.index(), rank.world());
        Ok(Self { folder: folder.to_owned(), prefix, key: *key.finalize().as_bytes() })
    }

    fn path(&self) -> PathBuf {
        let key = blake3::Hash::from_bytes(self.key).to_hex();
        self.folder.join(format!("{}{}.weights", self.prefix, &key[..32]))
    }

    /// Removes caches of the same rank of what was in the same place before, which nobody will ask for, and what processes left
    /// that did not finish.
    fn remove_others(&self) {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_stale = name.to_string_lossy().strip_prefix(&self.prefix).is_some_and(|rest| {
                let process =
                    rest.split_once(".unfinished-").map(|(_, process)| Path::new("/proc").join(process));
                process.map_or(rest.ends_with(".weights"), |process| !process.exists())
            });
            if is_stale {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// Parameters of the checkpoint on their way into a cache as well.
struct Caching {
    parts: Parts,
    writer: Writer,
    has_failed: AtomicBool,
}

impl Source for Caching {
    fn sizes(&self) -> Vec<u64> {
        self.parts.sizes()
    }

    fn make(&self, indices: Range<usize>, give: Give<'_>) -> Result<()> {
        self.parts.make(indices, &|index, param| {
            if !self.has_failed.load(Ordering::Relaxed) {
                let kept = self.writer.put(index, &param);
                let kept = kept.and_then(|is_last| if is_last { self.writer.finish() } else { Ok(()) });
                if let Err(error) = kept {
                    // The start does not need it; the disk may be full.
                    self.has_failed.store(true, Ordering::Relaxed);
                    tracing::warn!("the weight cache is given up: {error}");
                }
            }
            give(index, param)
        })
    }

    fn stop(&self) {
        self.parts.stop();
    }
}

/// Parameters of a cache, and the checkpoint for those that are damaged.
struct Cached {
    path: PathBuf,
    entries: Vec<Entry>,
    reader: Reader,
    threads: usize,
    progress: Progress,
    parts: Parts,
    has_damage: AtomicBool,
    /// Parameters that have not been made.
    missing: AtomicUsize,
}

impl Cached {
    fn new(path: PathBuf, entries: Vec<Entry>, options: &LoadOptions, parts: Parts) -> Result<Self> {
        let reader = Reader::open(std::slice::from_ref(&path), LoadStrategy::Eager)?;
        let num_bytes = reader.num_bytes(&mut requests(&entries));
        let progress = Progress::new(options.progress.clone(), num_bytes);
        let threads = num_threads(options).div_ceil(NUM_WORKERS);
        let (has_damage, missing) = (AtomicBool::new(false), AtomicUsize::new(entries.len()));
        Ok(Self { path, entries, reader, threads, progress, parts, has_damage, missing })
    }

    /// Gives what can be read of `indices` and is right; notes in `given` what that was.
    fn give_right(&self, indices: Range<usize>, given: &[AtomicBool], give: Give<'_>) -> Result<()> {
        let entries = &self.entries[indices.clone()];
        let arrived: Vec<Arrived> =
            entries.iter().map(|entry| Mutex::new(vec![None; entry.blobs.len()])).collect();
        let deliver = |request: &Request, bytes: Bytes| {
            let entry = &entries[request.item];
            if !file::is_right(&entry.blobs[request.position], &bytes) {
                return Ok(());
            }
            let whole = {
                let mut arrived = lock(&arrived[request.item]);
                arrived[request.position] = Some(bytes);
                arrived.iter().all(Option::is_some).then(|| std::mem::take(&mut *arrived))
            };
            let param =
                whole.and_then(|blobs| form::together(&entry.form, blobs.into_iter().flatten().collect()));
            let Some(param) = param else { return Ok(()) };
            given[request.item].store(true, Ordering::Relaxed);
            give(indices.start + request.item, param)
        };
        self.reader.read(requests(entries), self.threads, &self.progress, &deliver)
    }
}

impl Source for Cached {
    fn sizes(&self) -> Vec<u64> {
        let size = |entry: &Entry| entry.blobs.iter().map(|blob| blob.len as u64).sum();
        self.entries.iter().map(size).collect()
    }

    fn make(&self, indices: Range<usize>, give: Give<'_>) -> Result<()> {
        let given: Vec<AtomicBool> = indices.clone().map(|_| AtomicBool::new(false)).collect();
        let is_refused = AtomicBool::new(false);
        let read = self.give_right(indices.clone(), &given, &|index, param| {
            give(index, param).inspect_err(|_| is_refused.store(true, Ordering::Relaxed))
        });
        if is_refused.into_inner() {
            return read;
        }
        let count = indices.len();
        let missing = indices.zip(&given).filter(|(_, given)| !given.load(Ordering::Relaxed));
        for (index, _) in missing {
            if !self.has_damage.swap(true, Ordering::Relaxed) {
                let reason =
                    read.as_ref().err().map_or("bytes that were not written so".to_owned(), Error::to_string);
                let path = self.path.display();
                tracing::warn!("the weight cache {path} is damaged ({reason}); the next start makes it anew");
                let _ = std::fs::remove_file(&self.path);
            }
            self.parts.make(index..index + 1, give)?;
        }
        if self.missing.fetch_sub(count, Ordering::Relaxed) == count {
            self.progress.finish();
        }
        Ok(())
    }
}

/// The byte ranges of some parameters.
fn requests(entries: &[Entry]) -> Vec<Request> {
    let blobs = entries.iter().enumerate().flat_map(|(item, entry)| {
        entry.blobs.iter().enumerate().map(move |(position, blob)| (item, position, blob))
    });
    let request = |(item, position, blob): (usize, usize, &file::Blob)| Request {
        file: 0,
        offset: blob.offset,
        len: blob.len,
        item,
        position,
        stays: true,
    };
    blobs.map(request).collect()
}
