//! What ranks say to each other, as plain data. No connection: `spark-comm` carries it.
//!
//! The types of requests and steps are not serialisable by themselves, so their forms on the wire are here.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use spark_api::{GridThw, MediaHash, MediaItem};
use spark_backend::SlotParams;

use crate::digest::Digest;

/// From rank 0, one after the other on the plan connection. `W` is a [`StepWork`](crate::runner::StepWork), borrowed where it is
/// sent.
#[derive(Serialize, Deserialize)]
pub(crate) enum PlanMessage<W> {
    /// Run this step after all steps before it.
    Step {
        /// The step.
        work: W,
        /// Results that rank 0 had when it sent the step.
        results: Results,
    },
    /// Nothing follows: end.
    End,
}

/// The results of all steps up to one, for comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Results {
    /// Steps whose results are in `digest`.
    pub(crate) num_steps: u64,
    /// Over their plans and sampled tokens.
    pub(crate) digest: Digest,
}

/// From rank 0 on the bulk connection.
#[derive(Serialize, Deserialize)]
pub(crate) enum ToFollower {
    /// The sizes of the state that every rank allocates.
    Agreement(Agreement),
    /// Pixels of a request that is about to be scheduled: one medium, since all of them may be more than a message takes.
    Upload {
        /// Its number.
        id: u64,
        /// Of its next medium.
        pixels: Pixels,
        /// Whether all have come with this one.
        is_last: bool,
    },
}

/// Sizes that all ranks use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Agreement {
    /// Blocks of the KV pool.
    pub(crate) num_blocks: usize,
    /// Longest sequence.
    pub(crate) max_model_len: usize,
    /// Real tokens of the vocabulary.
    pub(crate) vocab_size: usize,
}

/// To rank 0 on the bulk connection.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromFollower {
    /// KV blocks that this rank has memory for.
    Offer {
        /// How many.
        num_blocks: usize,
    },
    /// State is allocated and the device is ready for steps.
    Ready,
    /// The pixels with this number are here.
    Uploaded(u64),
}

/// Bytes of one medium, written as one piece and not byte by byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pixels(pub(crate) Arc<[u8]>);

impl Serialize for Pixels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Pixels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Pixels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Pixels, E> {
                Ok(Pixels(bytes.into()))
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}

/// The fields of [`SlotParams`]; the compiler compares the two.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SlotParams")]
pub(crate) struct SlotParamsFields {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    logit_bias: Vec<(u32, f32)>,
    seed: u64,
    stop_token_ids: Vec<u32>,
    min_tokens: usize,
    logprobs: Option<usize>,
    named_tokens: Vec<u32>,
    prompt: Vec<u32>,
    output: Vec<u32>,
}

/// Media as an admission names them; the pixels come by an upload.
pub(crate) mod media_without_pixels {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Item {
        hash: MediaHash,
        grid: [usize; 3],
        offset: usize,
        num_tokens: usize,
    }

    pub(crate) fn serialize<S: Serializer>(
        media: &Arc<[MediaItem]>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(media.iter().map(|item| Item {
            hash: item.hash,
            grid: [item.grid.t, item.grid.h, item.grid.w],
            offset: item.offset,
            num_tokens: item.num_tokens,
        }))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<[MediaItem]>, D::Error> {
        let items: Vec<Item> = Vec::deserialize(deserializer)?;
        Ok(items
            .into_iter()
            .map(|Item { hash, grid: [t, h, w], offset, num_tokens }| MediaItem {
                hash,
                patches: Arc::new([]),
                grid: GridThw { t, h, w },
                offset,
                num_tokens,
            })
            .collect())
    }
}
