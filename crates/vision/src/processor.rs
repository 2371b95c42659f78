//! The image processor of a checkpoint: bytes of an image file to patch rows, token counts and cache identity. It holds
//! no cache and no model.

use std::path::Path;
use std::sync::Arc;

use crate::patches::to_patches;
use crate::{
    Alpha, DecodeOptions, ImageProcessorConfig, ImageProcessorOverrides, RgbImage, VisionError, decode,
    read_size, resize_bicubic, smart_resize,
};

/// An image, ready for the vision encoder.
#[derive(Debug, Clone)]
pub struct ProcessedImage {
    /// Patch rows in merge-block order, `[num_patches, 3, 1, patch, patch]` u8: not normalised, one frame.
    pub patches: Arc<[u8]>,
    /// Patches: temporal (1), rows, columns.
    pub grid_thw: [usize; 3],
    /// Tokens that the image fills in the prompt: `num_patches / merge_size^2`.
    pub num_tokens: usize,
    /// Identity of the image with this processor's settings: [`ImageProcessor::hash`] of the file.
    pub hash: [u8; 32],
    /// Width of the file's image before resizing, in pixels, EXIF orientation applied.
    pub width: usize,
    /// Height, likewise.
    pub height: usize,
}

/// Turns image files into [`ProcessedImage`]s. Cheap to share; every call is independent.
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    config: ImageProcessorConfig,
    options: DecodeOptions,
    hash_key: [u8; 32],
}

impl ImageProcessor {
    /// A processor with these settings. `hash_key` should be random and new for each process, so that nobody outside can
    /// make two images collide in a cache.
    pub fn new(config: ImageProcessorConfig, options: DecodeOptions, hash_key: [u8; 32]) -> Self {
        Self { config, options, hash_key }
    }

    /// The processor of the checkpoint in `folder`.
    ///
    /// # Errors
    /// Those of [`ImageProcessorConfig::from_folder`].
    pub fn from_folder(
        folder: &Path,
        overrides: &ImageProcessorOverrides,
        options: DecodeOptions,
        hash_key: [u8; 32],
    ) -> Result<Self, VisionError> {
        Ok(Self::new(ImageProcessorConfig::from_folder(folder, overrides)?, options, hash_key))
    }

    /// The settings: mean and deviation for the device, sizes for the model.
    pub fn config(&self) -> &ImageProcessorConfig {
        &self.config
    }

    /// Tokens that an image of this size fills, without an image.
    ///
    /// # Errors
    /// Those of [`smart_resize`].
    pub fn num_tokens_for(&self, width: usize, height: usize) -> Result<usize, VisionError> {
        let (height, width) = self.resized(height, width)?;
        Ok((height / self.config.factor()) * (width / self.config.factor()))
    }

    /// Tokens that the image in this file will fill, from its header: no pixel is decoded.
    ///
    /// # Errors
    /// Those of [`read_size`] and [`smart_resize`].
    pub fn num_tokens_of(&self, bytes: &[u8]) -> Result<usize, VisionError> {
        let size = read_size(bytes, &self.options)?;
        self.num_tokens_for(size.width, size.height)
    }

    /// Identity of a file with this processor's settings, without decoding: a keyed BLAKE3 over everything that the
    /// patches and their normalisation depend on. The same pixels in another file have another identity.
    pub fn hash(&self, bytes: &[u8]) -> [u8; 32] {
        let config = &self.config;
        let mut hasher = blake3::Hasher::new_keyed(&self.hash_key);
        // Fixed widths before the file, which comes last: no two inputs give the same sequence of bytes.
        hasher.update(b"spark-vision image 1");
        hasher.update(&config.min_pixels.to_le_bytes());
        hasher.update(&config.max_pixels.to_le_bytes());
        for size in [config.patch_size, config.temporal_patch_size, config.merge_size] {
            hasher.update(&(size as u64).to_le_bytes());
        }
        for value in config.image_mean.iter().chain(&config.image_std) {
            hasher.update(&value.to_le_bytes());
        }
        hasher.update(&[match self.options.alpha {
            Alpha::Drop => 0,
            Alpha::OverWhite => 1,
        }]);
        hasher.update(bytes);
        *hasher.finalize().as_bytes()
    }

    /// Decodes, resizes and cuts into patches. Takes milliseconds to a second of one core: not for an IO thread.
    ///
    /// # Errors
    /// Those of [`decode`] and [`smart_resize`]; the size is judged before pixels are decoded.
    pub fn process(&self, bytes: &[u8]) -> Result<ProcessedImage, VisionError> {
        // An impossible aspect ratio need not be decoded first.
        self.num_tokens_of(bytes)?;
        let image = decode(bytes, &self.options)?;
        let (patches, grid_thw) = self.cut(&image)?;
        Ok(ProcessedImage {
            num_tokens: patches.len() / self.bytes_per_token(),
            patches: patches.into(),
            grid_thw,
            hash: self.hash(bytes),
            width: image.width(),
            height: image.height(),
        })
    }

    /// Resizes an image that is in memory and cuts it into patches: [`ProcessedImage::patches`] and
    /// [`ProcessedImage::grid_thw`].
    ///
    /// # Errors
    /// Those of [`smart_resize`].
    pub fn cut(&self, image: &RgbImage) -> Result<(Vec<u8>, [usize; 3]), VisionError> {
        let (height, width) = self.resized(image.height(), image.width())?;
        let resized = resize_bicubic(image, height, width);
        let patch = self.config.patch_size;
        Ok((to_patches(&[&resized], patch, self.config.merge_size), [1, height / patch, width / patch]))
    }

    fn bytes_per_token(&self) -> usize {
        3 * self.config.factor().pow(2)
    }

    /// `(height, width)` after resizing.
    fn resized(&self, height: usize, width: usize) -> Result<(usize, usize), VisionError> {
        let config = &self.config;
        smart_resize(height, width, config.factor(), config.min_pixels, config.max_pixels)
    }
}
