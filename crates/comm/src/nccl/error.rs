//! What can go wrong with NCCL.

use std::path::PathBuf;

use super::NcclVersion;

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why ranks cannot compute together on their GPUs, or stopped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No library was found.
    #[error(
        "NCCL is not on this machine: tried {}; install the package libnccl2 or the Python package nvidia-nccl-cu13 and let \
         SPARK_NCCL name its libnccl.so.2", .tried.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    Missing {
        /// Names and paths that were tried, in order.
        tried: Vec<PathBuf>,
    },
    /// A library was opened and lacks a function.
    #[error("{} is no NCCL that can be used: it has no function `{symbol}`; let SPARK_NCCL name another libnccl.so.2", .path.display())]
    NoFunction {
        /// The file.
        path: PathBuf,
        /// The first function that is missing.
        symbol: &'static str,
    },
    /// A version that is known not to work.
    #[error(
        "NCCL {version} ({}) is too old for {arch}: {reason}; install {least} or newer and let SPARK_NCCL name its libnccl.so.2, \
         or start with --allow-old-nccl", .path.display()
    )]
    TooOld {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: NcclVersion,
        /// The first that may be used.
        least: NcclVersion,
        /// Architecture of the processor.
        arch: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A call failed.
    #[error("{call}: {message} ({code})")]
    Call {
        /// The function.
        call: &'static str,
        /// NCCL's number.
        code: i32,
        /// NCCL's words.
        message: String,
    },
    /// The other ranks did not come.
    #[error(
        "rank {rank} of {world} waited {seconds:.0} s for NCCL to connect the ranks; look at what the other ranks say, and with NCCL_DEBUG=INFO at what NCCL says"
    )]
    Timeout {
        /// This rank.
        rank: usize,
        /// Ranks in the group.
        world: usize,
        /// How long it waited.
        seconds: f64,
    },
    /// The group was given up by this process.
    #[error("the group of ranks was given up: {reason}")]
    Aborted {
        /// Why.
        reason: String,
    },
    /// The GPU could not be made current, or no thread could be started.
    #[error("{what}: {message}")]
    Start {
        /// What was being done.
        what: &'static str,
        /// Why not.
        message: String,
    },
}
