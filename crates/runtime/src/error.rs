//! What can stop an engine from starting.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Model(#[from] spark_models::Error),
    /// The device.
    #[error(transparent)]
    Backend(#[from] spark_backend::Error),
    /// Sizes that no step could be made with.
    #[error(transparent)]
    Scheduler(#[from] spark_scheduler::ConfigError),
    /// An option that contradicts the model or the memory.
    #[error("{option}: {problem}")]
    Option {
        /// The flag.
        option: &'static str,
        /// Rule, value and what to do.
        problem: String,
    },
    /// The other ranks, or the way to them.
    #[error(transparent)]
    Comm(#[from] spark_comm::Error),
    /// A rank says what it should not say now: versions that differ were refused before, so this is a defect.
    #[error("{from} sent {got} where {expected} was expected")]
    Protocol {
        /// Who.
        from: String,
        /// What came.
        got: &'static str,
        /// What should have come.
        expected: &'static str,
    },
    /// Ranks went apart: what they computed from here on would be wrong.
    #[error(
        "this rank's results differ from rank 0's after step {num_steps} at the latest: ranks do not compute the same; stopped"
    )]
    Diverged {
        /// Steps that were compared.
        num_steps: u64,
    },
    /// The operating system.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// Its words.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn option(option: &'static str, problem: impl Into<String>) -> Self {
        Self::Option { option, problem: problem.into() }
    }
}
