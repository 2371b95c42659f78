//! The wrappers of the kernels: one file per `.cu`. Each checks what the kernel takes for granted, then launches it.

mod embed;
mod linear;
mod moe;
mod norm;
mod pack;
mod swiglu;

pub(crate) use embed::EmbedParams;
pub(crate) use linear::LinearParams;
pub use linear::{MAX_DECODE_ROWS, PackedWeight};
pub(crate) use moe::MoeParams;
pub use moe::{Choice, Experts, ExpertsHost, MAX_PAIRS};
pub(crate) use norm::NormParams;
pub use norm::ReduceNorm;
pub use pack::PackedHost;
pub(crate) use swiglu::SwigluParams;

use std::sync::Arc as Shared;

use spark_backend::Dtype;

use crate::launch::Module;
use crate::{Cubins, Device, DeviceSlice, Error, Result};

/// All kernels, loaded on a device.
#[derive(Debug)]
pub struct Kernels {
    embed: embed::Embed,
    linear: linear::Linear,
    moe: moe::Moe,
    norm: norm::Norm,
    swiglu: swiglu::Swiglu,
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
            embed: embed::Embed::new(&module("embed")?)?,
            linear: linear::Linear::new(&module("linear_int4")?, &module("linear_nvfp4")?)?,
            moe: moe::Moe::new(&module("moe")?, &module("moe_int4")?, &module("moe_nvfp4")?)?,
            norm: norm::Norm::new(&module("norm")?)?,
            swiglu: swiglu::Swiglu::new(&module("swiglu")?)?,
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
