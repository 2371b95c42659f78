//! The one error type of all backends.

/// Result of a backend call.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in a backend. None of these is caused by a request: requests are validated before.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor has another shape than the operation needs.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What it needs.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// The backend cannot run this model; said at start.
    #[error("{op}: {reason}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// Which limit, which value.
        reason: String,
    },
    /// The planned memory does not fit.
    #[error("not enough memory for {what}: {needed} bytes needed, {available} available")]
    Memory {
        /// What was to be allocated.
        what: &'static str,
        /// Bytes.
        needed: u64,
        /// Bytes.
        available: u64,
    },
    /// The device or its driver failed; fatal for the engine.
    #[error("{op}: device error: {message}")]
    Device {
        /// The operation.
        op: &'static str,
        /// The driver's words.
        message: String,
    },
}

impl Error {
    /// A [`Error::Shape`] with formatted sides.
    pub fn shape(op: &'static str, expected: impl std::fmt::Debug, got: impl std::fmt::Debug) -> Self {
        Self::Shape { op, expected: format!("{expected:?}"), got: format!("{got:?}") }
    }
}
