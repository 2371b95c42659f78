//! What can go wrong with the device, its libraries and its kernels. Errors of the operations are those of the backend.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the device cannot be used, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A library that is opened at run time is not on this machine.
    #[error("{library} is not on this machine: tried {}; {advice}", .tried.join(", "))]
    LibraryMissing {
        /// What it is, for people.
        library: &'static str,
        /// Names and paths that were tried, in order.
        tried: Vec<String>,
        /// What to do.
        advice: &'static str,
    },
    /// A library was opened and lacks a function.
    #[error("{library} ({path}) is too old: it has no function `{symbol}`; {advice}")]
    LibraryTooOld {
        /// What it is, for people.
        library: &'static str,
        /// As it was opened.
        path: String,
        /// The first function that is missing.
        symbol: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The driver found no GPU.
    #[error(
        "there is no GPU {ordinal}: the NVIDIA driver (CUDA {driver}) sees {count}; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    )]
    NoDevice {
        /// The one that was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
        /// CUDA version of the driver.
        driver: Version,
    },
    /// A GPU that the kernels are not made for.
    #[error(
        "GPU {name} has compute capability {major}.{minor}; the kernels are made for 8.x, 9.0, 12.0 and 12.1"
    )]
    UnsupportedDevice {
        /// Its name.
        name: String,
        /// Compute capability.
        major: u32,
        /// Compute capability.
        minor: u32,
    },
    /// Numbers of a type that the tensor cores do not multiply.
    #[error("{arch} has no tensor core instructions for {kind}: leave activations in bf16")]
    NoInstructions {
        /// The type, for people.
        kind: &'static str,
        /// The architecture.
        arch: &'static str,
    },
    /// A name that is no architecture.
    #[error("unknown architecture `{name}`: the kernels are made for sm_80, sm_90, sm_120a and sm_121a")]
    UnknownArch {
        /// What was given.
        name: String,
    },
    /// A driver call failed.
    #[error("{call}: {name} ({code}): {message}")]
    Driver {
        /// The function, and what it was called for where there are several.
        call: String,
        /// The driver's number.
        code: u32,
        /// The driver's name of it.
        name: String,
        /// The driver's words.
        message: String,
    },
    /// A compiler call failed for another reason than the source.
    #[error("NVRTC {version}: {call}: {message}")]
    Nvrtc {
        /// The library's version.
        version: Version,
        /// The function.
        call: &'static str,
        /// The library's words.
        message: String,
    },
    /// A kernel source does not compile.
    #[error("{module}.cu does not compile for {arch} with NVRTC {version}:\n{log}")]
    Compile {
        /// File without `.cu`.
        module: String,
        /// Architecture.
        arch: &'static str,
        /// The compiler's version.
        version: Version,
        /// Its output, with file and line.
        log: String,
    },
    /// The compiler makes kernels that the driver cannot load.
    #[error(
        "the driver (CUDA {driver}) refuses a kernel that the newer NVRTC {nvrtc} made ({refusal}): update the driver, set \
         SPARK_NVRTC to an older libnvrtc, or use --kernel-dir"
    )]
    NvrtcTooNew {
        /// The compiler's version.
        nvrtc: Version,
        /// The driver's version.
        driver: Version,
        /// The driver's words.
        refusal: String,
    },
    /// `#include` of something that is not in `kernels/`.
    #[error("{file}:{line}: `{include}` is not a file of kernels/")]
    Include {
        /// The including file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// What it asks for.
        include: String,
    },
    /// A folder of compiled kernels lacks one, or holds a broken one.
    #[error(
        "kernel folder {}: {file} {problem}; make the folder with this version of the program: spark-engine kernels build --arch \
         {arch} --out {}", .folder.display(), .folder.display()
    )]
    KernelDir {
        /// The folder.
        folder: PathBuf,
        /// The file that was looked for.
        file: String,
        /// What is wrong with it.
        problem: &'static str,
        /// The device's architecture.
        arch: &'static str,
    },
    /// Reading or writing a file.
    #[error("{what} {}: {source}", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The planned memory does not fit, or a region is full.
    #[error("not enough memory for {what}: {needed} bytes needed, {available} available")]
    Memory {
        /// What was to be placed.
        what: &'static str,
        /// Bytes.
        needed: u64,
        /// Bytes.
        available: u64,
    },
    /// A device allocation after the start; a defect of this program.
    #[error(
        "{what}: {bytes} bytes were to be allocated on the device after the start; everything is planned before"
    )]
    AllocationAfterStart {
        /// What was to be placed.
        what: &'static str,
        /// Bytes.
        bytes: u64,
    },
    /// Something is kept in a memory pool that must be empty; a defect of this program.
    #[error("{count} pieces of a memory pool are still in use where none may be")]
    InUse {
        /// How many.
        count: usize,
    },
    /// The ranks cannot compute together, or stopped.
    #[error(transparent)]
    Group(#[from] spark_comm::nccl::Error),
    /// A tensor or weight has a shape or type that the kernel does not take.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
}

impl Error {
    /// An [`Error::Shape`] with formatted sides.
    pub(crate) fn shape(
        op: &'static str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Debug,
    ) -> Self {
        Self::Shape { op, expected: expected.to_string(), got: format!("{got:?}") }
    }
}

impl From<Error> for spark_backend::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Shape { op, expected, got } => Self::Shape { op, expected, got },
            Error::Memory { what, needed, available } => Self::Memory { what, needed, available },
            other => Self::Device { op: "cuda", message: other.to_string() },
        }
    }
}

/// Version of CUDA that a library speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Major number; kernels made for it load on every driver with the same or a higher one.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
