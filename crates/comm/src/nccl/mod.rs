//! NCCL, opened at run time: ranks that each hold a GPU add, gather and broadcast device memory with it. What the memory
//! means, and the streams, are the backend's.
//!
//! Its settings are environment variables that it reads once, so they are set before anything else (`environment.rs`).

mod communicator;
mod environment;
mod error;
mod library;
mod machine;

pub use communicator::{Aborter, Communicator, ElementType, Group};
pub use environment::{Settings, defaults, harm, lost_rails, prepare_environment};
pub use error::{Error, Result};
pub use library::{NCCL_VARIABLE, Nccl, NcclVersion, UniqueId, too_old};
pub use machine::{ConfLine, Machine, Rail};
