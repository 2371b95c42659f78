//! What the engine can take, known once the model is loaded and the memory is planned.

use crate::TokenId;

/// Bounds that [`Request::new`](crate::Request::new) checks.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Prompt and output together, in tokens.
    pub max_model_len: usize,
    /// Rows of the model's output that are real tokens: an id must be below this.
    pub vocab_size: usize,
    /// Most alternatives per token in log-probabilities.
    pub max_logprobs: usize,
    /// Most placeholder tokens that one medium may fill: what the encoder's memory was planned for.
    pub max_media_tokens: usize,
    /// Most media in one prompt.
    pub max_media: usize,
    /// How media are cut; `None` for a text-only model.
    pub media_geometry: Option<MediaGeometry>,
    /// Token that stands for one embedding of an image; `None` for a text-only model.
    pub image_token_id: Option<TokenId>,
    /// Likewise for a video.
    pub video_token_id: Option<TokenId>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<TokenId>,
}

/// How the vision encoder cuts a medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MediaGeometry {
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Frames of a patch.
    pub temporal_patch_size: usize,
    /// Side of a merge block in patches.
    pub merge_size: usize,
}
