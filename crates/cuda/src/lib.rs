//! The CUDA device: driver, memory, streams, graphs; the kernels of `kernels/`, their compilation and launch; the backend over
//! them.
//!
//! The libraries of NVIDIA are opened at run time, so the same program runs where there are none. Kernels are compiled by
//! NVRTC at the first start and kept, or come compiled in a folder. A wrapper of a kernel checks shapes, so that what is
//! launched is right; no model, no scheduling and no file of a checkpoint is known here.

mod arch;
mod arena;
mod backend;
pub mod bench;
pub mod bench_attention;
mod bench_decode;
pub mod bench_gemm;
pub mod bench_proxy;
pub mod bench_team;
mod cache;
mod compile;
mod device;
mod driver;
#[cfg(test)]
mod emulation;
mod error;
mod host_buffer;
mod kernels;
mod launch;
mod library;
mod mailbox;
mod nvml;
mod nvrtc;
mod pool;
pub mod probe;
mod sm_group;
mod source;
mod step;
mod stream;
mod team;
mod tensor;

pub use arch::Arch;
pub use arena::{ALIGNMENT, Arena, ArenaPlan, DeviceSlice, Region};
pub use backend::{CudaBackend, CudaOptions, CudaTensor, Profile, Routing, Time};
pub use cache::{CubinCache, CubinKey, Entry};
pub use compile::{Cubins, KernelOptions};
pub use device::{Device, Properties};
pub use driver::Driver;
pub use error::{Error, Result, Version};
pub use host_buffer::HostBuffer;
pub use kernels::{
    After, AttendArgs, Choice, Experts, ExpertsHost, Kernels, KvCache, Linear, MAX_DECODE_ROWS, MAX_EXPERTS,
    MAX_PAIRS, MAX_ROUTED_EXPERTS, Nvfp4Test, PackedHost, PackedWeight, Prefill, ReduceNorm, RouterRule,
    Staging, WeightLoader,
};
pub use kernels::{MAX_ALTERNATIVES, MAX_NAMED_TOKENS, RowRange, SampleOut, Sampler, Wanted};
pub use mailbox::Mailboxes;
pub use nvrtc::{Compiled, NVRTC_VARIABLE, Nvrtc};
pub use pool::Pool;
pub use source::{MODULES, ModuleSource, modules_for};
pub use step::{PADDING, PENDING, StepLimits, StepView};
pub use stream::{Event, Graph, Stream};
pub use team::Team;
pub use tensor::{Element, Tensor};
