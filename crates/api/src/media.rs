//! One image (or video) of a request, decoded and resized, ready for the vision encoder.

use std::sync::Arc;

/// Identity of a processed medium: content, size and processor settings. Equal hashes mean equal embeddings.
pub type MediaHash = [u8; 32];

/// Size of a medium in patches: temporal pairs, rows, columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GridThw {
    /// Temporal patches; 1 for an image.
    pub t: usize,
    /// Rows of patches.
    pub h: usize,
    /// Columns of patches.
    pub w: usize,
}

impl GridThw {
    /// Number of patches that the encoder sees.
    pub fn num_patches(&self) -> usize {
        self.t * self.h * self.w
    }
}

/// A medium and the run of placeholder tokens that it fills.
#[derive(Debug, Clone)]
pub struct MediaItem {
    /// Identity for the encoder cache and the prefix cache.
    pub hash: MediaHash,
    /// Raw pixels as patch rows in merge-block order, `[num_patches, 3, frames, patch, patch]` u8, with `frames` 1 for
    /// an image (the device repeats it) and the temporal patch size for a video. Normalised on the device.
    pub patches: Arc<[u8]>,
    /// Size in patches.
    pub grid: GridThw,
    /// Index of the first placeholder token in the prompt.
    pub offset: usize,
    /// Length of the placeholder run: `grid.num_patches() / merge_size^2`.
    pub num_tokens: usize,
}
