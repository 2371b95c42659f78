//! Media of requests: from addresses to patches, once per content, within bounds of memory. What is behind an address is
//! found by `source.rs`, what a file becomes by `file.rs`.

mod address;
mod clip;
mod fetch;
mod file;
mod local;
mod names;
mod source;

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use futures_util::future::try_join_all;
use parking_lot::Mutex;
use spark_api::{GridThw, MediaHash, MediaItem};
use spark_vision::{ImageProcessor, VideoProcessor};
use tokio::sync::OwnedSemaphorePermit;

pub use self::address::{Network, NetworkError};
pub use self::clip::VideoDecoder;
pub use self::fetch::FetchPolicy;
pub(crate) use self::file::MediaFile;
pub use self::local::LocalMedia;
use self::names::{Name, Names};
use self::source::Sources;
pub(crate) use self::source::{Kind, MediaUrl, VideoOptions};
use crate::byte_bound::ByteBound;
use crate::lru::ByteLru;
use crate::pool::CpuPool;
use crate::{ApiError, Options};

/// The processors with their cache (`--mm-processor-cache-gb`) and their bounds.
pub(crate) struct Media {
    processors: Arc<Processors>,
    sources: Sources,
    /// Where videos are read: they take seconds, in which everything else goes on beside them.
    video_pool: CpuPool,
    cache: Mutex<ByteLru<MediaHash, Arc<Processed>>>,
    /// What requests hold now: those with the same medium share its patches and its memory.
    held: Mutex<HashMap<MediaHash, Weak<HeldMedium>>>,
    /// What clients have called media.
    names: Names,
    /// Memory of media while they are decoded, over all requests.
    decoding: ByteBound,
    /// Memory of the patches that requests hold, over all of them. What the cache holds is not counted here.
    holding: ByteBound,
}

/// What turns files into patches.
pub(crate) struct Processors {
    images: Arc<ImageProcessor>,
    /// `None`: the checkpoint takes no videos.
    videos: Option<Arc<VideoProcessor>>,
    /// What decodes video files.
    decoder: Option<VideoDecoder>,
    /// Most placeholder tokens of one image or one temporal patch: what the engine's encoder was planned for.
    max_tokens: usize,
}

/// A medium, decoded: one part for an image, one for each temporal patch of a video.
pub(crate) struct Processed {
    parts: Vec<Part>,
}

/// What the engine takes for a medium.
struct Part {
    hash: MediaHash,
    patches: Arc<[u8]>,
    grid: [usize; 3],
    num_tokens: usize,
}

impl Processed {
    fn num_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.patches.len()).sum()
    }
}

/// A medium of requests whose sequences have not ended, with its share of the memory for that.
pub(crate) struct HeldMedium {
    medium: Arc<Processed>,
    _memory: OwnedSemaphorePermit,
}

impl Media {
    /// Media with the bounds of `options`, in parts of at most `max_tokens` each.
    pub(crate) fn new(images: Arc<ImageProcessor>, options: &Options, max_tokens: usize) -> Self {
        let decoder = options.video_decoder.clone();
        let processors = Processors { images, videos: None, decoder, max_tokens };
        Self {
            processors: Arc::new(processors),
            sources: Sources::new(options),
            video_pool: CpuPool::of(std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2))),
            cache: Mutex::new(ByteLru::new(options.mm_processor_cache_bytes)),
            held: Mutex::default(),
            names: Names::new(),
            decoding: ByteBound::new(options.max_decoding_bytes),
            holding: ByteBound::new(options.max_media_bytes),
        }
    }

    /// The same, for videos too.
    pub(crate) fn with_videos(self, videos: Arc<VideoProcessor>) -> Self {
        let Processors { images, decoder, max_tokens, .. } = &*self.processors;
        let (images, decoder, max_tokens) = (images.clone(), decoder.clone(), *max_tokens);
        Self {
            processors: Arc::new(Processors { images, videos: Some(videos), decoder, max_tokens }),
            ..self
        }
    }

    /// Whether videos are taken.
    pub(crate) fn takes_videos(&self) -> bool {
        self.processors.videos.is_some()
    }

    /// The file at an address, judged by its header: no pixel is decoded. Without an address, what the cache has under the
    /// medium's name. `index`: which of its kind it is in the request.
    ///
    /// # Errors
    /// When the address or the header is refused, the file cannot be had, nothing of that name is in the cache, or it needs
    /// more tokens than the engine has room for.
    pub(crate) async fn inspect(
        &self,
        pool: &CpuPool,
        url: MediaUrl,
        index: usize,
    ) -> Result<MediaFile, ApiError> {
        let max_frames = self.processors.videos.as_ref().map_or(0, |videos| videos.config().max_frames);
        let MediaUrl { kind, video, url, uuid } = url;
        let name = uuid.map(|uuid| Name::new(kind, video, &uuid));
        let Some(url) = url else {
            return self.named(kind, index, name).ok_or_else(|| names::miss(kind, index));
        };
        let found = self.sources.read(pool, kind, url, max_frames).await?;
        let processors = self.processors.clone();
        let work = move || MediaFile::inspect(&processors, kind, video, found);
        let mut file = self.pool_for(kind, pool).run(work).await?;
        file.name = name;
        Ok(file)
    }

    /// The medium of a name, if its patches are still here. They are not kept by that: whoever waits for memory holds nothing.
    fn named(&self, kind: Kind, index: usize, name: Option<Name>) -> Option<MediaFile> {
        let name = name?;
        let known = self.names.get(name)?;
        let is_here = self.cache.lock().get(&known.hash).is_some()
            || self.held.lock().get(&known.hash).is_some_and(|held| held.strong_count() > 0);
        is_here.then(|| MediaFile::cached(&known, kind, index, name))
    }

    /// All media of one request of `num_prompts` prompts, each content once however often it is there. Waits while the media of
    /// other requests leave no room.
    ///
    /// # Errors
    /// When one cannot be decoded, or those of several prompts could never be held together.
    pub(crate) async fn load(
        &self,
        pool: &CpuPool,
        files: Vec<MediaFile>,
        num_prompts: usize,
    ) -> Result<Vec<Arc<HeldMedium>>, ApiError> {
        let (mut distinct, mut indices, mut named) = (Vec::new(), HashMap::new(), Vec::new());
        let mut order = Vec::with_capacity(files.len());
        for file in files {
            named.extend(file.name.map(|name| (name, file.known())));
            let index = *indices.entry(file.hash).or_insert(distinct.len());
            order.push(index);
            if index == distinct.len() {
                distinct.push(file);
            }
        }
        let sizes = || distinct.iter().map(|file: &MediaFile| file.num_patch_bytes);
        // What one prompt may have its length bounds, but not how many prompts there are.
        if num_prompts > 1 {
            self.holding.check(sizes()).map_err(|limit| too_many(num_prompts, limit))?;
        }
        // For all at once, while nothing is held: two requests with half of theirs would wait for each other. What
        // turns out to be held already gives its share back.
        let mut memory = self.holding.acquire(sizes()).await?;
        let mut loads = Vec::with_capacity(distinct.len());
        for file in distinct {
            // A request over the whole bound has it alone; its last media get what is left.
            let num_units = ByteBound::units(file.num_patch_bytes).min(memory.num_permits());
            let share = memory.split(num_units);
            let share = share.ok_or_else(|| ApiError::internal(&"no memory left to split"))?;
            loads.push(self.load_one(pool, file, share));
        }
        let media = try_join_all(loads).await?;
        // Names lead to what could be decoded.
        named.into_iter().for_each(|(name, known)| self.names.insert(name, known));
        Ok(order.into_iter().map(|index| media[index].clone()).collect())
    }

    fn pool_for<'a>(&'a self, kind: Kind, pool: &'a CpuPool) -> &'a CpuPool {
        match kind {
            Kind::Image => pool,
            Kind::Video => &self.video_pool,
        }
    }

    async fn load_one(
        &self,
        pool: &CpuPool,
        file: MediaFile,
        memory: OwnedSemaphorePermit,
    ) -> Result<Arc<HeldMedium>, ApiError> {
        if let Some(held) = self.held.lock().get(&file.hash).and_then(Weak::upgrade) {
            return Ok(held);
        }
        let hash = file.hash;
        let cached = self.cache.lock().get(&hash);
        let medium = match cached {
            Some(medium) => medium,
            None => self.decode(pool, file).await?,
        };
        let mut held = self.held.lock();
        // Another request may have been faster.
        if let Some(other) = held.get(&hash).and_then(Weak::upgrade) {
            return Ok(other);
        }
        held.retain(|_, medium| medium.strong_count() > 0);
        let medium = Arc::new(HeldMedium { medium, _memory: memory });
        held.insert(hash, Arc::downgrade(&medium));
        Ok(medium)
    }

    async fn decode(&self, pool: &CpuPool, file: MediaFile) -> Result<Arc<Processed>, ApiError> {
        let memory = self.decoding.acquire([file.num_decoding_bytes]).await?;
        let (processors, hash, kind) = (self.processors.clone(), file.hash, file.kind);
        let work = move || {
            // Held by the work, not by the caller: an abandoned medium is still decoded.
            let _memory = memory;
            file.decode(&processors).map(Arc::new)
        };
        let medium = self.pool_for(kind, pool).run(work).await?;
        self.cache.lock().insert(hash, medium.clone(), medium.num_bytes());
        Ok(medium)
    }
}

/// The refusal of media that would have more than all the memory there is for media.
fn too_many(num_prompts: usize, max_bytes: usize) -> ApiError {
    let message = format!(
        "the images and videos of the {num_prompts} prompts would take more than the {max_bytes} bytes that there are for the \
         pixels of all requests: send fewer prompts in one request"
    );
    ApiError::field("messages", message)
}

/// The engine's view of media, whose placeholder runs begin at `offsets`: one for each part of each of them.
pub(crate) fn media_items(held: &[Arc<HeldMedium>], offsets: &[usize]) -> Vec<MediaItem> {
    let parts = held.iter().flat_map(|held| &held.medium.parts);
    let item = |(part, &offset): (&Part, &usize)| {
        let [t, h, w] = part.grid;
        MediaItem {
            hash: part.hash,
            patches: part.patches.clone(),
            grid: GridThw { t, h, w },
            offset,
            num_tokens: part.num_tokens,
        }
    };
    parts.zip(offsets).map(item).collect()
}
