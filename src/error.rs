//! Why an engine could not be built. Each text says what was wrong and where.

/// Result of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an engine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint.
    #[error(transparent)]
    Weights(#[from] spark_weights::Error),
    /// The configuration or the network.
    #[error(transparent)]
    Model(#[from] spark_models::Error),
    /// The tokenizer or the chat template.
    #[error(transparent)]
    Text(#[from] spark_text::TextError),
    /// The image processor.
    #[error(transparent)]
    Vision(#[from] spark_vision::VisionError),
    /// Memory, options, threads.
    #[error(transparent)]
    Runtime(#[from] spark_runtime::Error),
    /// The other ranks, or the way to them.
    #[error(transparent)]
    Comm(#[from] spark_comm::Error),
    /// The device.
    #[error(transparent)]
    Backend(#[from] spark_backend::Error),
    /// No model was named, and the demo model is not there.
    #[error(
        "no MODEL given, and the demo model is in none of: {}; name a checkpoint folder or a Hugging Face id, or set \
         SPARK_MODEL",
        list(places)
    )]
    NoDemoModel {
        /// Folders that were looked at.
        places: Vec<std::path::PathBuf>,
    },
    /// An option that this build or this machine cannot follow.
    #[error("{option}: {problem}")]
    Option {
        /// The flag.
        option: &'static str,
        /// Rule, value and what to do.
        problem: String,
    },
}

impl Error {
    pub(crate) fn option(option: &'static str, problem: impl Into<String>) -> Self {
        Self::Option { option, problem: problem.into() }
    }
}

fn list(paths: &[std::path::PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}
