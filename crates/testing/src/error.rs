//! The one error type of this crate: a golden file that is not there or not as its description says.

use std::path::PathBuf;

/// Result of reading a golden file.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a golden file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file or folder could not be read.
    #[error("cannot read {}: {source}; `tests/fixtures/make` makes the fixtures", path.display())]
    Io {
        /// What was to be read.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not the JSON that was expected.
    #[error("{} is not the JSON its description promises: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The file is not a safetensors file.
    #[error("{} is not a safetensors file: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Why.
        source: safetensors::SafeTensorError,
    },
    /// The file has no tensor of this name.
    #[error("{} has no tensor {name:?}; names that begin alike: {near:?}", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The name that was asked for.
        name: String,
        /// Names in the same case, at most eight.
        near: Vec<String>,
    },
    /// A tensor has another element type than the caller asked for, or one this reader does not convert.
    #[error("{}: tensor {name:?} holds {found}, wanted {wanted}", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its element type.
        found: String,
        /// What the caller can take.
        wanted: &'static str,
    },
    /// Two parts of an oracle contradict each other.
    #[error("{}: case {case:?}: {rule}", path.display())]
    Inconsistent {
        /// The file.
        path: PathBuf,
        /// The case.
        case: String,
        /// What should hold and does not.
        rule: String,
    },
}
