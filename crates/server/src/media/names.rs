//! What clients call their media (`uuid`), so that they need not send them again. A name leads to the identity of a content,
//! never to another client's name or bytes; the contents themselves are in the cache.

use std::sync::Arc;

use parking_lot::Mutex;
use spark_api::MediaHash;

use super::source::{Kind, VideoOptions};
use crate::ApiError;
use crate::client::current_client;
use crate::lru::ByteLru;

/// Most bytes of names that are remembered, by a guess at what each takes.
const MAX_BYTES: usize = 16 << 20;
const BYTES_OF_NAME: usize = 256;

/// A name, as far as it is told from others: of a client, a kind of medium, and what is taken of a video.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Name([u8; 32]);

impl Name {
    /// The name that the client whose request this task answers means by `uuid`.
    pub(super) fn new(kind: Kind, video: VideoOptions, uuid: &str) -> Self {
        Self::of(current_client(), kind, video, uuid)
    }

    fn of(client: Option<[u8; 32]>, kind: Kind, video: VideoOptions, uuid: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[u8::from(client.is_some())]).update(&client.unwrap_or_default());
        // Debug forms of enums and numbers have no zero in them; the uuid is last and may have anything.
        hasher.update(format!("{kind:?} {video:?}\0").as_bytes()).update(uuid.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }
}

/// What is known of a medium without its bytes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Known {
    pub(super) hash: MediaHash,
    pub(super) num_patch_bytes: usize,
    pub(super) tokens_per_part: usize,
    pub(super) times: Vec<f64>,
}

/// The names that are remembered; the least recently used are forgotten first.
pub(super) struct Names(Mutex<ByteLru<Name, Arc<Known>>>);

impl Names {
    pub(super) fn new() -> Self {
        Self(Mutex::new(ByteLru::new(MAX_BYTES)))
    }

    pub(super) fn get(&self, name: Name) -> Option<Arc<Known>> {
        self.0.lock().get(&name)
    }

    /// The name means this medium from now on.
    pub(super) fn insert(&self, name: Name, known: Known) {
        let num_bytes = BYTES_OF_NAME + size_of_val(&known.times[..]);
        self.0.lock().insert(name, Arc::new(known), num_bytes);
    }
}

/// The refusal of a medium that would have to be sent. Its beginning is vLLM's, by which clients know that they have to.
pub(super) fn miss(kind: Kind, index: usize) -> ApiError {
    let name = kind.name();
    let message = format!(
        "Cache miss for {name} at index {index} but data is not provided: the {name} of this uuid was never sent with this \
         API key, or is not cached any more; send it again"
    );
    ApiError::field(kind.param(), message)
}

#[cfg(test)]
mod tests {
    use spark_vision::SampleRate;

    use super::*;

    #[test]
    fn a_name_is_one_clients_of_one_kind() {
        let (plain, fast) = (VideoOptions::default(), VideoOptions { rate: SampleRate::PerSecond(4.0) });
        let all = [
            Name::of(None, Kind::Image, plain, "a"),
            Name::of(Some([0; 32]), Kind::Image, plain, "a"),
            Name::of(Some([1; 32]), Kind::Image, plain, "a"),
            Name::of(None, Kind::Video, plain, "a"),
            Name::of(None, Kind::Video, fast, "a"),
            Name::of(None, Kind::Image, plain, "b"),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|other| other != one), "{i}");
        }
        assert_eq!(all[0], Name::of(None, Kind::Image, plain, "a"));
    }
}
