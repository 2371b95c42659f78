//! The reference backend: every operation of [`spark_backend::Backend`] on the CPU, readable first, and the numbers that
//! every other kernel is compared with.
//!
//! No model and no loading lives here. One promise shapes the code: the additions behind every output element happen in
//! an order that depends on the lengths of the vectors and on key positions alone, never on the number of rows in a
//! call, on how a prompt was cut, on threads, or on the width of the machine's vectors (see `dot.rs`).
#![forbid(unsafe_code)]

mod attention;
mod backend;
mod dot;
mod dtype;
mod group;
mod kv;
mod linear;
mod math;
mod moe;
mod norm;
mod nvfp4;
mod philox;
mod rope;
mod sampler;
mod state;
mod tensor;
#[cfg(test)]
mod testing;
mod vision;
mod weight;

#[cfg(test)]
mod step_tests;

pub use backend::CpuBackend;
pub use dtype::{E2M1, E4M3_MAX, e4m3_bits, e4m3_value};
pub use moe::{CpuExperts, Routing};
pub use nvfp4::round_nvfp4;
pub use tensor::CpuTensor;
pub use weight::{CpuLinear, dequantize};
