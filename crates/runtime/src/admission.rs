//! What the runner is told about a sequence when it enters a slot. Sent once per admission, not per step.

use std::sync::Arc;

use spark_api::MediaItem;
use spark_backend::SlotParams;
use spark_models::RopeIndex;

/// A sequence that enters a slot.
pub(crate) struct Admission {
    /// The slot.
    pub(crate) slot: usize,
    /// Sampling state for the device.
    pub(crate) params: SlotParams,
    /// Positions of its tokens.
    pub(crate) rope: Arc<RopeIndex>,
    /// Its media, for the encoder.
    pub(crate) media: Arc<[MediaItem]>,
    /// Its prompt and the number of alternatives, if prompt log-probabilities are wanted.
    pub(crate) prompt_logprobs: Option<(Arc<[u32]>, usize)>,
}
