//! Why a checkpoint cannot be quantised. Not the recovery: the output folder is left as it was.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint cannot be quantised.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input is quantised.
    #[error(
        "the checkpoint is quantised already: {found}; quantise the original in bfloat16, float16 or float32"
    )]
    AlreadyQuantised {
        /// What shows it.
        found: String,
    },
    /// A layer that the format cannot hold.
    #[error("`{module}` is [{n}, {k}]: {rule}")]
    Size {
        /// The linear layer.
        module: String,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// What the format needs, and what to do.
        rule: String,
    },
    /// A group size that AWQ does not have.
    #[error("the group size {group_size} is not one of 16, 32, 64 and 128")]
    GroupSize {
        /// What was asked for.
        group_size: usize,
    },
    /// Weights that are no numbers.
    #[error("`{module}` has NaN or infinite values; the checkpoint is damaged, get it again")]
    NonFinite {
        /// The linear layer.
        module: String,
    },
    /// A calibration prompt that the model cannot run.
    #[error("calibration prompt {index}: {reason}")]
    Prompt {
        /// Its position in the list.
        index: usize,
        /// The rule and the value.
        reason: String,
    },
    /// No prompts where the method needs some.
    #[error(
        "the activation-aware search needs calibration prompts and got none; give some, or search nothing"
    )]
    NoPrompts,
    /// A folder that is in the way.
    #[error("{}: {reason}", path.display())]
    Output {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: &'static str,
    },
    /// The operating system refused.
    #[error("{}: {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// Writing a shard.
    #[error("{}: cannot write the tensors: {source}", path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: safetensors::SafeTensorError,
    },
    /// The input checkpoint.
    #[error(transparent)]
    Weights(#[from] spark_weights::Error),
    /// The configuration or the network.
    #[error(transparent)]
    Model(#[from] spark_models::Error),
    /// The CPU backend, while it runs the calibration prompts.
    #[error(transparent)]
    Backend(#[from] spark_backend::Error),
}
