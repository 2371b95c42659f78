//! Images of requests: from data URLs to patches, once per content, within a bound of memory.

use std::sync::Arc;

use parking_lot::Mutex;
use spark_api::{GridThw, MediaItem};
use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ProcessedImage, VisionError, read_size};
use tokio::sync::Semaphore;

use crate::lru::ByteLru;
use crate::pool::CpuPool;
use crate::{ApiError, data_url};

/// Memory that an image takes while it is decoded, as the vision crate states it.
const DECODING_BYTES_PER_PIXEL: usize = 9;
const DECODING_BYTES: usize = 16 << 20;
/// The semaphore counts in units of this many bytes.
const UNIT_BYTES: usize = 1 << 16;

/// The image processor with its cache (`--mm-processor-cache-gb`) and its bound.
pub(crate) struct Images {
    processor: Arc<ImageProcessor>,
    cache: Mutex<ByteLru<[u8; 32], Arc<ProcessedImage>>>,
    /// Bytes of pixels that may be in work, over all requests.
    decoding: Semaphore,
    num_units: usize,
    /// Most placeholder tokens of one image: what the engine's encoder was planned for.
    max_tokens: usize,
}

impl Images {
    pub(crate) fn new(
        processor: Arc<ImageProcessor>,
        cache_bytes: usize,
        max_decoding_bytes: usize,
        max_tokens: usize,
    ) -> Self {
        let num_units =
            (max_decoding_bytes / UNIT_BYTES).clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        Self {
            processor,
            cache: Mutex::new(ByteLru::new(cache_bytes)),
            decoding: Semaphore::new(num_units),
            num_units,
            max_tokens,
        }
    }

    /// The patches of the image in a data URL.
    ///
    /// # Errors
    /// When the URL or the image is refused, or the image needs more tokens than the engine has room for.
    pub(crate) async fn load(&self, pool: &CpuPool, url: String) -> Result<Arc<ProcessedImage>, ApiError> {
        let processor = self.processor.clone();
        let max_tokens = self.max_tokens;
        let (bytes, hash, num_pixels) = pool.run(move || inspect(&processor, &url, max_tokens)).await?;
        if let Some(image) = self.cache.lock().get(&hash) {
            return Ok(image);
        }
        let units = (num_pixels.saturating_mul(DECODING_BYTES_PER_PIXEL).saturating_add(DECODING_BYTES)
            / UNIT_BYTES)
            // An image over the whole bound is decoded alone.
            .clamp(1, self.num_units);
        let units = u32::try_from(units).map_err(|error| ApiError::internal(&error))?;
        let _memory = self.decoding.acquire_many(units).await.map_err(|error| ApiError::internal(&error))?;
        let processor = self.processor.clone();
        let image = pool
            .run(move || Ok(Arc::new(processor.process(&bytes).map_err(|error| refuse(&error))?)))
            .await?;
        self.cache.lock().insert(hash, image.clone(), image.patches.len());
        Ok(image)
    }
}

/// Bytes, identity and size of an image, before any pixel is decoded.
fn inspect(
    processor: &ImageProcessor,
    url: &str,
    max_tokens: usize,
) -> Result<(Vec<u8>, [u8; 32], usize), ApiError> {
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
    let hash = processor.hash(&bytes);
    Ok((bytes, hash, size.width.saturating_mul(size.height)))
}

/// The messages of the vision crate carry sizes and limits only, so the client may see them.
fn refuse(error: &VisionError) -> ApiError {
    ApiError::field("image_url", error.to_string())
}

/// The engine's view of an image whose placeholders begin at `offset`.
pub(crate) fn media_item(image: &ProcessedImage, offset: usize) -> MediaItem {
    let [t, h, w] = image.grid_thw;
    MediaItem {
        hash: image.hash,
        patches: image.patches.clone(),
        grid: GridThw { t, h, w },
        offset,
        num_tokens: image.num_tokens,
    }
}
