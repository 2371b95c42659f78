//! The error type of this crate: configurations that cannot be run, and what the layers below report.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model cannot be built or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of `config.json` is missing, of the wrong type or inconsistent.
    #[error("config.json: {field}: {problem}")]
    Config {
        /// Path of the field, for example `text_config.rope_theta`.
        field: String,
        /// What is wrong and what is expected.
        problem: String,
    },
    /// The architecture is not one of ours.
    #[error(
        "config.json: model_type {0:?} is not supported; supported are qwen3_vl_moe, qwen3_vl, qwen3_moe and qwen3"
    )]
    Architecture(String),
    /// A head that should be dense and is not.
    #[error(
        "lm_head is quantised in the checkpoint: --lm-head-dtype bf16 is for one that is not; `auto` uses it as it is"
    )]
    QuantisedHead,
    /// The checkpoint does not fit.
    #[error(transparent)]
    Weights(#[from] spark_weights::Error),
    /// The backend refused or failed.
    #[error(transparent)]
    Backend(#[from] spark_backend::Error),
}

impl Error {
    pub(crate) fn config(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Config { field: field.into(), problem: problem.into() }
    }
}
