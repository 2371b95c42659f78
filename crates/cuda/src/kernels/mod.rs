//! The wrappers of the kernels: one file per `.cu`. Each checks what the kernel takes for granted, then launches it.

mod attention;
mod embed;
mod fp8x;
mod gemm;
#[cfg(test)]
mod held_tests;
mod kv;
mod linear;
mod linear_many;
mod loader;
mod moe;
mod moe_gemm;
mod norm;
mod nvfp4_host;
mod nvfp4_mma;
mod nvfp4_self_test;
#[cfg(test)]
mod nvfp4_tests;
mod pack;
mod prefill;
mod probe;
mod repack;
mod router;
mod rows;
mod sampler;
mod sampler_output;
mod sampler_step;
mod swiglu;
#[cfg(test)]
mod testing;
mod vision;
mod vision_attention;
mod weight;

pub use attention::AttendArgs;
pub(crate) use attention::AttentionParams;
pub(crate) use embed::EmbedParams;
pub(crate) use fp8x::Fp8RowsParams;
pub use gemm::After;
pub(crate) use gemm::{Block, GemmAddParams, GemmCut, GemmParams};
pub use kv::KvCache;
pub(crate) use linear::LinearParams;
pub use linear::MAX_DECODE_ROWS;
pub use loader::{Staging, WeightLoader};
pub(crate) use moe::MoeParams;
pub use moe::{Choice, MAX_PAIRS};
pub(crate) use moe_gemm::PARTIAL_BYTES;
pub(crate) use moe_gemm::{MoeAddParams, MoeSortParams};
pub use norm::ReduceNorm;
pub(crate) use norm::{LayerNormParams, NormParams, RanksNormParams};
pub(crate) use nvfp4_mma::{Nvfp4MmaParams, QuantizeParams};
pub use nvfp4_self_test::Nvfp4Test;
pub use pack::PackedHost;
pub use prefill::Prefill;
pub(crate) use probe::{Empty, MmaType, Probe, ProbeParams};
pub(crate) use repack::RepackParams;
pub(crate) use router::RouterParams;
pub use router::{MAX_ROUTED_EXPERTS, RouterRule};
pub use rows::RowRange;
pub(crate) use rows::{ElementsParams, GatherParams, JoinParams};
pub(crate) use sampler::AdmitParams;
pub use sampler::Sampler;
pub use sampler_output::{MAX_ALTERNATIVES, MAX_NAMED_TOKENS, SampleOut, Wanted};
pub(crate) use sampler_step::{CANDIDATE_WORDS, SampleParams};
pub(crate) use swiglu::SwigluParams;
pub(crate) use vision::{PatchesParams, PositionParams};
pub(crate) use vision_attention::VisionAttentionParams;
pub use weight::{Experts, ExpertsHost, Linear, MAX_EXPERTS, PackedWeight};

use std::sync::Arc as Shared;

use spark_backend::Dtype;

use crate::launch::Module;
use crate::{Cubins, Device, DeviceSlice, Error, Result};

/// All kernels, loaded on a device.
#[derive(Debug)]
pub struct Kernels {
    attention: attention::Attention,
    embed: embed::Embed,
    fp8x: fp8x::Fp8x,
    gemm: gemm::Gemm,
    linear: linear::DecodeLinear,
    linear_many: linear_many::ManyLinear,
    moe: moe::Moe,
    moe_gemm: moe_gemm::MoeGemm,
    norm: norm::Norm,
    /// Where the device has FP4.
    nvfp4_mma: Option<nvfp4_mma::Nvfp4Mma>,
    repack: repack::Repack,
    router: router::Router,
    prefill: Prefill,
    rows: rows::Rows,
    sample: sampler_step::Sample,
    sample_admit: sampler::SampleAdmit,
    swiglu: swiglu::Swiglu,
    vision: vision::Vision,
    vision_attention: vision_attention::VisionAttention,
}

impl Kernels {
    /// Loads `cubins` on `device`.
    ///
    /// # Errors
    /// [`Error::NvrtcTooNew`] or [`Error::Driver`] when the driver refuses one; [`Error::Shape`] for another
    /// architecture's.
    pub fn load(device: &Device, cubins: &Cubins) -> Result<Self> {
        if cubins.arch != device.arch() {
            return Err(Error::shape("kernels", device.arch(), cubins.arch));
        }
        let module = |name: &'static str| {
            let missing = || Error::shape("kernels", format!("a module {name}"), "none");
            Module::load(device, cubins.module(name).ok_or_else(missing)?, cubins.nvrtc)
        };
        Ok(Self {
            attention: attention::Attention::new(
                &module("attention_decode")?,
                &module("attention_prefill")?,
            )?,
            embed: embed::Embed::new(&module("embed")?)?,
            fp8x: fp8x::Fp8x::new(device.arch(), module)?,
            gemm: gemm::Gemm::new(device.arch(), module)?,
            linear: linear::DecodeLinear::new(module)?,
            linear_many: linear_many::ManyLinear::new(device.arch(), module)?,
            moe: moe::Moe::new(module)?,
            moe_gemm: moe_gemm::MoeGemm::new(&module("moe_gemm")?)?,
            norm: norm::Norm::new(&module("norm")?)?,
            nvfp4_mma: match device.arch().has_fp4() {
                true => Some(nvfp4_mma::Nvfp4Mma::new(&module("nvfp4_mma")?)?),
                false => None,
            },
            repack: repack::Repack::new(&module("repack")?)?,
            router: router::Router::new(device, &module("router")?)?,
            prefill: Prefill::default(),
            rows: rows::Rows::new(&module("rows")?)?,
            sample: sampler_step::Sample::new(&module("sample")?)?,
            sample_admit: sampler::SampleAdmit::new(&module("sample_admit")?)?,
            swiglu: swiglu::Swiglu::new(&module("swiglu")?)?,
            vision: vision::Vision::new(&module("vision")?)?,
            vision_attention: vision_attention::VisionAttention::new(&module("vision_attention")?)?,
        })
    }
}

type LoadedModule = Shared<Module>;

/// Numbers of a kernel are 32 bits wide.
fn to_u32(op: &'static str, value: usize) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::shape(op, "at most 4294967295", value))
}

/// Elements of `dtype` in 16 bytes.
fn vector_length(op: &'static str, dtype: Dtype) -> Result<usize> {
    match dtype {
        Dtype::Bf16 => Ok(8),
        Dtype::F32 => Ok(4),
        Dtype::F16 => Err(Error::shape(op, "Bf16 or F32", dtype)),
    }
}

/// An error of `op` unless `slice` holds `len` values of 4 bytes, such as u32 or f32, from an aligned address on.
fn words(op: &'static str, slice: &DeviceSlice, len: usize) -> Result<()> {
    words_at(op, slice.address(), slice.num_bytes(), len)
}

fn words_at(op: &'static str, address: u64, num_bytes: u64, len: usize) -> Result<()> {
    if num_bytes / 4 < len as u64 {
        return Err(Error::shape(op, format!("{len} values of 4 bytes"), format_args!("{num_bytes} bytes")));
    }
    if !address.is_multiple_of(4) {
        let got = format_args!("one at address {address:#x}");
        return Err(Error::shape(op, "values of 4 bytes that start at a multiple of 4", got));
    }
    Ok(())
}

/// An error of `op` if what it writes is also what it reads.
fn disjoint(op: &'static str, written: &DeviceSlice, read: &[&DeviceSlice]) -> Result<()> {
    match read.iter().any(|slice| slice.overlaps(written)) {
        false => Ok(()),
        true => Err(Error::shape(op, "a result apart from the inputs", "overlapping memory")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_4_bytes_are_counted_and_aligned() {
        assert!(words_at("op", 0x1004, 11, 2).is_ok() && words_at("op", 0, 0, 0).is_ok());
        let error = words_at("op", 0x1004, 11, 3).unwrap_err().to_string();
        assert_eq!(error, "op: expected 3 values of 4 bytes, got 11 bytes");
        let error = words_at("op", 0x1002, 8, 2).unwrap_err().to_string();
        assert!(error.ends_with("that start at a multiple of 4, got one at address 0x1002"), "{error}");
        assert!(words_at("op", 0, u64::MAX, usize::MAX).is_err());
    }
}
