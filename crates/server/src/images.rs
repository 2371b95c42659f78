//! Images of requests: from data URLs to patches, once per content, within bounds of memory.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use futures_util::future::try_join_all;
use parking_lot::Mutex;
use spark_api::{GridThw, MediaHash, MediaItem};
use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ProcessedImage, VisionError, read_size};
use tokio::sync::OwnedSemaphorePermit;

use crate::byte_bound::ByteBound;
use crate::lru::ByteLru;
use crate::pool::CpuPool;
use crate::{ApiError, Options, data_url};

/// Memory that an image takes while it is decoded, as the vision crate states it.
const DECODING_BYTES_PER_PIXEL: usize = 9;
const DECODING_BYTES: usize = 16 << 20;
/// Bytes of a pixel in patches.
const PATCH_BYTES_PER_PIXEL: usize = 3;

/// The image processor with its cache (`--mm-processor-cache-gb`) and its bounds.
pub(crate) struct Images {
    processor: Arc<ImageProcessor>,
    cache: Mutex<ByteLru<MediaHash, Arc<ProcessedImage>>>,
    /// What requests hold now: those with the same image share its patches and its memory.
    held: Mutex<HashMap<MediaHash, Weak<HeldImage>>>,
    /// Memory of images while they are decoded, over all requests.
    decoding: ByteBound,
    /// Memory of the patches that requests hold, over all of them. What the cache holds is not counted here.
    holding: ByteBound,
    /// Most placeholder tokens of one image: what the engine's encoder was planned for.
    max_tokens: usize,
}

/// An image file of which only the header has been read.
pub(crate) struct ImageFile {
    bytes: Vec<u8>,
    hash: MediaHash,
    num_pixels: usize,
    /// Of its patches.
    num_patch_bytes: usize,
    /// Placeholder tokens that it fills.
    pub(crate) num_tokens: usize,
}

/// An image of requests whose sequences have not ended, with its share of the memory for that.
pub(crate) struct HeldImage {
    image: Arc<ProcessedImage>,
    _memory: OwnedSemaphorePermit,
}

impl Images {
    /// Images with the bounds of `options`, and of at most `max_tokens` each.
    pub(crate) fn new(processor: Arc<ImageProcessor>, options: &Options, max_tokens: usize) -> Self {
        Self {
            processor,
            cache: Mutex::new(ByteLru::new(options.mm_processor_cache_bytes)),
            held: Mutex::default(),
            decoding: ByteBound::new(options.max_decoding_bytes),
            holding: ByteBound::new(options.max_media_bytes),
            max_tokens,
        }
    }

    /// The file in a data URL, judged by its header: no pixel is decoded.
    ///
    /// # Errors
    /// When the URL or the header is refused, or the image needs more tokens than the engine has room for.
    pub(crate) async fn inspect(&self, pool: &CpuPool, url: String) -> Result<ImageFile, ApiError> {
        let processor = self.processor.clone();
        let max_tokens = self.max_tokens;
        pool.run(move || inspect(&processor, &url, max_tokens)).await
    }

    /// All images of one request. Waits while the images of other requests leave no room.
    ///
    /// # Errors
    /// When an image cannot be decoded.
    pub(crate) async fn load(
        &self,
        pool: &CpuPool,
        files: Vec<ImageFile>,
    ) -> Result<Vec<Arc<HeldImage>>, ApiError> {
        // For all at once, while nothing is held: two requests with half of theirs would wait for each other. What
        // turns out to be held already gives its share back.
        let mut memory = self.holding.acquire(files.iter().map(|file| file.num_patch_bytes)).await?;
        let mut loads = Vec::with_capacity(files.len());
        for file in files {
            // A request over the whole bound has it alone; its last images get what is left.
            let num_units = ByteBound::units(file.num_patch_bytes).min(memory.num_permits());
            let share = memory.split(num_units);
            let share = share.ok_or_else(|| ApiError::internal(&"no memory left to split"))?;
            loads.push(self.load_one(pool, file, share));
        }
        try_join_all(loads).await
    }

    async fn load_one(
        &self,
        pool: &CpuPool,
        file: ImageFile,
        memory: OwnedSemaphorePermit,
    ) -> Result<Arc<HeldImage>, ApiError> {
        if let Some(held) = self.held.lock().get(&file.hash).and_then(Weak::upgrade) {
            return Ok(held);
        }
        let hash = file.hash;
        let cached = self.cache.lock().get(&hash);
        let image = match cached {
            Some(image) => image,
            None => self.decode(pool, file).await?,
        };
        let mut held = self.held.lock();
        // Another request may have been faster.
        if let Some(other) = held.get(&hash).and_then(Weak::upgrade) {
            return Ok(other);
        }
        held.retain(|_, image| image.strong_count() > 0);
        let image = Arc::new(HeldImage { image, _memory: memory });
        held.insert(hash, Arc::downgrade(&image));
        Ok(image)
    }

    async fn decode(&self, pool: &CpuPool, file: ImageFile) -> Result<Arc<ProcessedImage>, ApiError> {
        let num_bytes =
            file.num_pixels.saturating_mul(DECODING_BYTES_PER_PIXEL).saturating_add(DECODING_BYTES);
        let memory = self.decoding.acquire([num_bytes]).await?;
        let processor = self.processor.clone();
        let work = move || {
            // Held by the work, not by the caller: an abandoned image is still decoded.
            let _memory = memory;
            processor.process(&file.bytes).map(Arc::new).map_err(|error| refuse(&error))
        };
        let image = pool.run(work).await?;
        self.cache.lock().insert(file.hash, image.clone(), image.patches.len());
        Ok(image)
    }
}

/// Identity and size of an image, before any pixel is decoded.
fn inspect(processor: &ImageProcessor, url: &str, max_tokens: usize) -> Result<ImageFile, ApiError> {
    let bytes = data_url::decode(url)?;
    let num_tokens = processor.num_tokens_of(&bytes).map_err(|error| refuse(&error))?;
    // The processor has just applied the limits; this only reads the size again.
    let unlimited =
        DecodeOptions { max_side: u64::MAX, max_pixels: u64::MAX, ..DecodeOptions::new(Alpha::Drop) };
    let size = read_size(&bytes, &unlimited).map_err(|error| refuse(&error))?;
    if num_tokens > max_tokens {
        let message = format!(
            "an image of {} x {} pixels needs {num_tokens} tokens; the limit is {max_tokens} an image: send a smaller one",
            size.width, size.height
        );
        return Err(ApiError::field("image_url", message));
    }
    let side = processor.config().factor();
    Ok(ImageFile {
        hash: processor.hash(&bytes),
        bytes,
        num_pixels: size.width.saturating_mul(size.height),
        num_patch_bytes: num_tokens.saturating_mul(side * side * PATCH_BYTES_PER_PIXEL),
        num_tokens,
    })
}

/// The messages of the vision crate carry sizes and limits only, so the client may see them.
fn refuse(error: &VisionError) -> ApiError {
    ApiError::field("image_url", error.to_string())
}

/// The engine's view of an image whose placeholders begin at `offset`.
pub(crate) fn media_item(held: &HeldImage, offset: usize) -> MediaItem {
    let image = &held.image;
    let [t, h, w] = image.grid_thw;
    MediaItem {
        hash: image.hash,
        patches: image.patches.clone(),
        grid: GridThw { t, h, w },
        offset,
        num_tokens: image.num_tokens,
    }
}
