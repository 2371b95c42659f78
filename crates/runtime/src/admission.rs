//! What the runner is told about a sequence when it enters a slot. Sent once per admission, not per step.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use spark_api::MediaItem;
use spark_backend::SlotParams;

use crate::wire::{SlotParamsFields, media_without_pixels};

/// A sequence that enters a slot.
#[derive(Serialize, Deserialize)]
pub(crate) struct Admission {
    /// The slot.
    pub(crate) slot: usize,
    /// Sampling state for the device.
    #[serde(with = "SlotParamsFields")]
    pub(crate) params: SlotParams,
    /// Tokens of its prompt.
    pub(crate) prompt_len: usize,
    /// Its media, for the encoder and for the positions of its tokens. Their pixels do not travel with it.
    #[serde(with = "media_without_pixels")]
    pub(crate) media: Arc<[MediaItem]>,
    /// Under which number the other ranks have the pixels.
    pub(crate) upload: Option<u64>,
    /// Its prompt and the number of alternatives, if prompt log-probabilities are wanted.
    pub(crate) prompt_logprobs: Option<(Arc<[u32]>, usize)>,
}
