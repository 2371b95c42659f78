//! Names and seeds for requests that bring none.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

/// Where seeds come from.
pub(crate) struct Seeds(AtomicU64);

/// Step of a Weyl sequence (2^64 over the golden ratio): consecutive seeds share no pattern.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Seeds {
    /// Starts at `first`, or anywhere.
    pub(crate) fn new(first: Option<u64>) -> Self {
        Self(AtomicU64::new(first.unwrap_or_else(random)))
    }

    /// The next seed.
    pub(crate) fn next(&self) -> u64 {
        self.0.fetch_add(GOLDEN, Relaxed)
    }
}

/// A number that nobody can guess from outside: the standard library's hash keys come from the operating system.
fn random() -> u64 {
    RandomState::new().hash_one(0)
}

/// 32 hexadecimal digits.
pub(crate) fn random_id() -> String {
    let state = RandomState::new();
    format!("{:016x}{:016x}", state.hash_one(0), state.hash_one(1))
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
