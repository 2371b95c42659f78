//! The CUDA device: driver, memory, streams, graphs; the kernels of `kernels/`, their compilation and launch.
//!
//! The libraries of NVIDIA are opened at run time, so the same program runs where there are none. Kernels are compiled by
//! NVRTC at the first start and kept, or come compiled in a folder. A wrapper of a kernel checks shapes, so that what is
//! launched is right; no model, no scheduling and no file of a checkpoint is known here.

mod arch;
mod arena;
pub mod bench;
mod cache;
mod compile;
mod device;
mod driver;
mod error;
mod kernels;
mod launch;
mod library;
mod memory;
mod nvrtc;
mod source;
mod stream;
mod tensor;

pub use arch::Arch;
pub use arena::{ALIGNMENT, Arena, ArenaPlan, DeviceSlice, Region, Scratch};
pub use cache::{CubinCache, CubinKey, Entry};
pub use compile::{Cubins, KernelOptions};
pub use device::{Device, Properties};
pub use driver::Driver;
pub use error::{Error, Result, Version};
pub use kernels::{
    Choice, Experts, ExpertsHost, Kernels, MAX_DECODE_ROWS, MAX_PAIRS, PackedHost, PackedWeight, ReduceNorm,
};
pub use memory::MemoryInfo;
pub use nvrtc::{Compiled, NVRTC_VARIABLE, Nvrtc};
pub use source::{MODULES, ModuleSource};
pub use stream::{Event, Graph, Stream};
pub use tensor::{Element, Tensor};
