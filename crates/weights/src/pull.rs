//! Fetching a checkpoint from a Hugging Face hub into the local cache: which files, in which order, and when they
//! become visible. Not the HTTP (`hub`), not one file's transfer (`transfer`), not the folder layout (`cache`).

mod cache;
mod hub;
mod transfer;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ureq::tls::TlsConfig;

use crate::checkpoint::{INDEX, SINGLE, read_index};
use crate::error::{Error, Result};
use crate::locate::{check_id, check_revision, default_cache, is_inside};
use cache::Repository;
use hub::{Hub, RemoteFile, RemoteModel};
use transfer::Transfer;

/// The public hub.
const ENDPOINT: &str = "https://huggingface.co";
/// Side files of a checkpoint that the engine (or a tool beside it) reads; weights are chosen separately.
const SIDE_FILES: [&str; 16] = [
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
];

/// How far a download is.
#[derive(Debug, Clone, Copy)]
pub struct PullProgress {
    /// Bytes in place: from this run or an earlier one.
    pub bytes_done: u64,
    /// Bytes of all files that the model needs, as far as they are known: the weights join after the index.
    pub bytes_total: u64,
}

/// Called from downloading threads after each read.
pub type PullProgressFn = Arc<dyn Fn(PullProgress) + Send + Sync>;

/// From where, to where and how to download. [`Default`] asks no environment variable but the cache's.
#[derive(Clone)]
pub struct PullOptions {
    /// Branch, tag or commit; `main` if `None`.
    pub revision: Option<String>,
    /// The Hugging Face cache; `None` asks `HF_HUB_CACHE`, `HF_HOME` and the home folder.
    pub cache_dir: Option<PathBuf>,
    /// `http://` or `https://` address of the hub.
    pub endpoint: String,
    /// Whom connections trust; by default the public authorities.
    pub tls: TlsConfig,
    /// Access token; goes to the endpoint only, never to a server that it redirects to.
    pub token: Option<String>,
    /// Files that are fetched at the same time, at least 1.
    pub connections: usize,
    /// Failed attempts in a row, without one new byte, after which a file is given up. Attempts are 1 s, 2 s, 4 s...
    /// apart; after a connection that brought bytes the next follows at once.
    pub retries: u32,
    /// Told about progress.
    pub progress: Option<PullProgressFn>,
}

impl Default for PullOptions {
    fn default() -> Self {
        PullOptions {
            revision: None,
            cache_dir: None,
            endpoint: ENDPOINT.to_owned(),
            tls: TlsConfig::default(),
            token: None,
            connections: 4,
            retries: 5,
            progress: None,
        }
    }
}

impl PullOptions {
    /// The defaults with what `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` and the token file of the Hugging Face tools
    /// say.
    pub fn from_env() -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        PullOptions {
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()),
            token: variable("HF_TOKEN")
                .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
                .or_else(|| std::fs::read_to_string(token_path()?).ok())
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty()),
            ..PullOptions::default()
        }
    }
}

impl fmt::Debug for PullOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullOptions")
            .field("revision", &self.revision)
            .field("cache_dir", &self.cache_dir)
            .field("endpoint", &self.endpoint)
            // A token must not get into a log.
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("connections", &self.connections)
            .field("retries", &self.retries)
            .finish_non_exhaustive()
    }
}

/// Where the token file of the Hugging Face tools is.
fn token_path() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("HF_TOKEN_PATH")
        .or_else(|| variable("HF_HOME").map(|home| home.join("token")))
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/token")))
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache/huggingface/token")))
}

/// What [`pull`] did.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// The snapshot folder; [`crate::Checkpoint::open`] finds it by the model id.
    pub dir: PathBuf,
    /// The commit that the revision stands for.
    pub commit: String,
    /// Files of the checkpoint.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that came over the network; 0 when everything was there.
    pub bytes_downloaded: u64,
}

/// Downloads the checkpoint `model` (`owner/name`) into the Hugging Face cache, in the layout that every tool of it
/// shares: configurations, tokenizer, templates, processor settings and the safetensors files that the index names.
///
/// Every file is checked against its digest (sha256 of large files, the git hash of small ones) before it gets its
/// name. A download that stops leaves `.incomplete` files, from which the next one continues; the snapshot and its
/// reference appear when all files are there. Blocks; a second run downloads nothing.
///
/// # Errors
/// When the hub refuses or cannot be reached, a file is not what the hub announced, a file name would leave the
/// folder, or the file system has no room.
pub fn pull(model: &str, options: &PullOptions) -> Result<Pulled> {
    check_id(model)?;
    let revision = options.revision.as_deref().unwrap_or("main");
    check_revision(revision)?;
    let cache = options.cache_dir.clone().or_else(default_cache).ok_or_else(|| Error::Option {
        option: "HF_HOME",
        reason: "no cache folder is known: neither HF_HUB_CACHE nor HF_HOME nor a home folder is set"
            .to_owned(),
    })?;
    let hub = Hub::new(&options.endpoint, options.token.as_deref(), options.tls.clone())?;
    let remote = hub.model(model, revision)?;
    let repository = Repository::create(&cache, model)?;
    let run =
        Run { hub: &hub, remote: &remote, repository: &repository, options, meter: Meter::new(options) };

    let mut files: Vec<&RemoteFile> = SIDE_FILES.iter().filter_map(|name| remote.files.get(*name)).collect();
    run.fetch(&files)?;
    let weights = run.weights()?;
    run.fetch(&weights)?;

    files.extend(weights);
    for file in &files {
        repository.link(&remote.commit, file)?;
    }
    repository.refer(revision, &remote.commit)?;
    Ok(Pulled {
        dir: repository.snapshot(&remote.commit),
        commit: remote.commit.clone(),
        files: files.len(),
        bytes: files.iter().map(|file| file.size).sum(),
        bytes_downloaded: run.meter.received.load(Ordering::Relaxed),
    })
}

/// One call of [`pull`].
struct Run<'a> {
    hub: &'a Hub,
    remote: &'a RemoteModel,
    repository: &'a Repository,
    options: &'a PullOptions,
    meter: Meter,
}

impl<'a> Run<'a> {
    /// The safetensors files that [`crate::Checkpoint::open`] will read: those of the index, else the single one.
    fn weights(&self) -> Result<Vec<&'a RemoteFile>> {
        let missing = |reason: String| Error::Hub { url: self.remote.url.clone(), reason };
        if !self.remote.files.contains_key("config.json") {
            return Err(missing("there is no `config.json`, so this is not a checkpoint".to_owned()));
        }
        let Some(index) = self.remote.files.get(INDEX) else {
            let single = self.remote.files.get(SINGLE).ok_or_else(|| {
                missing(format!("neither `{INDEX}` nor `{SINGLE}` is there; only safetensors can be read"))
            })?;
            return Ok(vec![single]);
        };
        let path = self.repository.present(&self.remote.commit, index).ok_or_else(|| Error::Index {
            path: self.repository.snapshot(&self.remote.commit).join(INDEX),
            reason: "vanished from the cache while its model was downloaded".to_owned(),
        })?;
        let shards: BTreeSet<String> = read_index(&path)?.into_iter().map(|(_, shard)| shard).collect();
        let wrong = |reason| Error::Index { path: path.clone(), reason };
        let mut weights = Vec::with_capacity(shards.len());
        for shard in &shards {
            if !is_inside(shard) || !shard.ends_with(".safetensors") {
                return Err(wrong(format!(
                    "`{shard}` is not the name of a safetensors file inside the folder"
                )));
            }
            let file = self.remote.files.get(shard);
            weights.push(file.ok_or_else(|| wrong(format!("shard `{shard}` is not in the repository")))?);
        }
        Ok(weights)
    }

    /// Brings `files` into the cache, several at a time. The first error stops the others.
    fn fetch(&self, files: &[&'a RemoteFile]) -> Result<()> {
        let mut total = 0_u64;
        for file in files {
            total = total.checked_add(file.size).ok_or_else(|| Error::Hub {
                url: self.remote.url.clone(),
                reason: "the sizes of the files exceed 64 bits".to_owned(),
            })?;
        }
        self.meter.total.fetch_add(total, Ordering::Relaxed);
        // Files of equal content share a blob: one transfer, not two that wait for each other.
        let mut seen = BTreeSet::new();
        let (mut wanted, mut bytes) = (Vec::new(), 0);
        for &file in files {
            let known = self.repository.present(&self.remote.commit, file).is_some()
                || !seen.insert((file.digest.hex(), file.size));
            if known {
                self.meter.add(file.size);
            } else {
                bytes += file.size.saturating_sub(self.repository.part_len(file));
                wanted.push(file);
            }
        }
        self.repository.check_room(bytes)?;
        let transfer = Transfer {
            hub: self.hub,
            repository: self.repository,
            remote: self.remote,
            retries: self.options.retries,
            meter: &self.meter,
        };
        let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
        let work = || {
            while let Some(file) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = transfer.run(file) {
                    self.meter.stop();
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.options.connections.min(wanted.len()) {
                scope.spawn(work);
            }
            work();
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

/// Counts bytes for all threads and carries the stop sign.
struct Meter {
    done: AtomicU64,
    total: AtomicU64,
    received: AtomicU64,
    stopped: std::sync::atomic::AtomicBool,
    report: Option<PullProgressFn>,
}

impl Meter {
    fn new(options: &PullOptions) -> Self {
        Meter {
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            received: AtomicU64::new(0),
            stopped: false.into(),
            report: options.progress.clone(),
        }
    }

    /// Bytes that are in place.
    fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).wrapping_add(bytes);
        if let Some(report) = &self.report {
            report(PullProgress { bytes_done: done, bytes_total: self.total.load(Ordering::Relaxed) });
        }
    }

    /// Bytes that were counted and have to come again.
    fn take_back(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes that came over the network.
    fn receive(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        self.add(bytes);
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}
