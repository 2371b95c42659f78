//! Wrapper of `kernels/linear_int4.cu` and `kernels/linear_nvfp4.cu`: linear layers with 4-bit weights, for the few rows of
//! decode. Experts are in `moe.rs`.

use spark_backend::Dtype;

use super::pack::{Scheme, padded_k, padded_n};
use super::{Kernels, LoadedModule, PackedHost, disjoint, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{ArenaPlan, DeviceSlice, Error, Region, Result, Stream, Tensor};

const OP: &str = "linear";
/// Most rows of one launch.
pub const MAX_DECODE_ROWS: usize = 32;
/// Rows of x that a tensor core takes at a time.
const TOKEN_TILE: usize = 8;
/// Rows of W of a block and most warps of it: constants of the kernel.
pub(super) const BLOCK_ROWS: usize = 32;
const MAX_WARPS: usize = 8;

/// `LinearParams` of `kernels/linear.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct LinearParams {
    codes: u64,
    scales: u64,
    row_scales: u64,
    bias: u64,
    x: u64,
    out: u64,
    n: u32,
    k: u32,
    x_columns: u32,
    rows: u32,
    out_is_f32: u32,
    padding: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 6 * 8 + 6 * 4 bytes, no padding.
unsafe impl Params for LinearParams {
    const NAME: &'static str = "LinearParams";
}

/// 4-bit weights on the device, in the packed layout: a matrix, or several of the same shape.
#[derive(Debug, Clone)]
pub struct PackedWeight {
    pub(super) count: usize,
    pub(super) codes: DeviceSlice,
    pub(super) scales: DeviceSlice,
    pub(super) row_scales: Option<DeviceSlice>,
    bias: Option<DeviceSlice>,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) scheme: Scheme,
}

impl PackedWeight {
    /// Plans the memory of `host`: regions for [`upload`](Self::upload).
    ///
    /// # Errors
    /// [`Error::Memory`] when the plan overflows.
    pub fn plan(plan: &mut ArenaPlan, name: &'static str, host: &PackedHost) -> Result<Region> {
        plan.add(name, Self::num_bytes(host))
    }

    /// Bytes of the layer on the device, between aligned parts.
    pub fn num_bytes(host: &PackedHost) -> u64 {
        offsets(host)[4]
    }

    /// Copies `host` into `target`.
    ///
    /// # Errors
    /// [`Error::Shape`] when `target` is too small, [`Error::Driver`].
    pub fn upload(stream: &Stream, target: &DeviceSlice, host: &PackedHost) -> Result<Self> {
        let [codes, scales, row_scales, bias, end] = offsets(host);
        if !target.address().is_multiple_of(crate::ALIGNMENT) {
            return Err(Error::shape(OP, "a place aligned to 256 bytes", target.address()));
        }
        let part = |start: u64, end: u64| target.slice(start, end - start);
        let weight = Self {
            count: host.count,
            codes: part(codes, scales)?,
            scales: part(scales, row_scales)?,
            row_scales: (!host.row_scales.is_empty()).then(|| part(row_scales, bias)).transpose()?,
            bias: (!host.bias.is_empty()).then(|| part(bias, end)).transpose()?,
            n: host.n,
            k: host.k,
            scheme: host.scheme,
        };
        stream.upload(&weight.codes, &host.codes)?;
        stream.upload(&weight.scales, &host.scales)?;
        if let Some(row_scales) = &weight.row_scales {
            stream.upload(row_scales, &host.row_scales)?;
        }
        if let Some(bias) = &weight.bias {
            stream.upload(bias, &host.bias)?;
        }
        Ok(weight)
    }

    /// Threads of a block over these weights.
    pub(super) fn num_threads(&self) -> usize {
        32 * (padded_k(self.k) / span(self.scheme)).min(MAX_WARPS)
    }

    /// All that the kernels read of them.
    pub(super) fn slices(&self) -> impl Iterator<Item = &DeviceSlice> {
        [&self.codes, &self.scales].into_iter().chain(&self.row_scales).chain(&self.bias)
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }
}

/// Where codes, scales, row scales, bias and the end lie in the memory of a layer.
fn offsets(host: &PackedHost) -> [u64; 5] {
    let aligned = |num_bytes: usize| (num_bytes as u64).next_multiple_of(crate::ALIGNMENT);
    let scales = aligned(4 * host.codes.len());
    let row_scales = scales + aligned(4 * host.scales.len());
    let bias = row_scales + aligned(4 * host.row_scales.len());
    [0, scales, row_scales, bias, bias + aligned(4 * host.bias.len())]
}

/// Inputs that a warp takes at a time: `span_of` and `SPAN` of the kernels.
fn span(scheme: Scheme) -> usize {
    if scheme == (Scheme::Int4 { group_size: 32 }) { 64 } else { 128 }
}

/// 0, 1, 2 for group sizes 32, 64, 128; there are no others after `PackedHost::pack`.
pub(super) fn group_index(group_size: usize) -> usize {
    (group_size / 32).ilog2() as usize
}

/// Token tiles of the kernel that takes `rows` rows: 1, 2 or 4.
fn token_tiles(rows: usize) -> usize {
    rows.div_ceil(TOKEN_TILE).max(1).next_power_of_two()
}

/// The kernels of one scheme by token tiles: 1, 2, 4.
type ByTokens = [Kernel<LinearParams>; 3];

#[derive(Debug)]
pub(super) struct Linear {
    /// By group size: 32, 64, 128.
    int4: [ByTokens; 3],
    nvfp4: ByTokens,
}

impl Linear {
    pub(super) fn new(int4_module: &LoadedModule, nvfp4_module: &LoadedModule) -> Result<Self> {
        let kernels = |module: &LoadedModule, scheme: &str| {
            let kernel = |tiles: u32| Kernel::new(module, &format!("linear_{scheme}_t{tiles}"), 0);
            Ok::<_, Error>([kernel(1)?, kernel(2)?, kernel(4)?])
        };
        let int4 = |group_size: u32| kernels(int4_module, &format!("g{group_size}"));
        Ok(Self { int4: [int4(32)?, int4(64)?, int4(128)?], nvfp4: kernels(nvfp4_module, "nvfp4")? })
    }

    fn kernel(&self, scheme: Scheme, rows: usize) -> &Kernel<LinearParams> {
        let by_tokens = match scheme {
            Scheme::Int4 { group_size } => &self.int4[group_index(group_size)],
            Scheme::Nvfp4 => &self.nvfp4,
        };
        &by_tokens[token_tiles(rows).ilog2() as usize]
    }
}

impl Kernels {
    /// `x W^T + bias`: `x` `[rows, k]` bf16, up to [`MAX_DECODE_ROWS`], to `out` `[rows, n]`, bf16 or f32. A row has the same
    /// bits alone and beside others.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn linear(&self, stream: &Stream, x: &Tensor, weight: &PackedWeight, out: &Tensor) -> Result<()> {
        let rows = x.rows();
        if rows > MAX_DECODE_ROWS {
            return Err(Error::shape(OP, format!("at most {MAX_DECODE_ROWS} rows"), rows));
        }
        x.expect(OP, [rows, weight.k], Dtype::Bf16)?;
        // Logits stay in float32; everything else is bf16.
        let out_dtype = if out.dtype() == Dtype::F32 { Dtype::F32 } else { Dtype::Bf16 };
        out.expect(OP, [rows, weight.n], out_dtype)?;
        if weight.count != 1 {
            return Err(Error::shape(OP, "one matrix", weight.count));
        }
        let read: Vec<&DeviceSlice> = std::iter::once(x.slice()).chain(weight.slices()).collect();
        stream.uses(OP, &[&read[..], &[out.slice()]].concat())?;
        disjoint(OP, out.slice(), &read)?;
        if rows == 0 {
            return Ok(());
        }
        let (n, k) = (padded_n(weight.n), padded_k(weight.k));
        let params = LinearParams {
            codes: weight.codes.address(),
            scales: weight.scales.address(),
            row_scales: weight.row_scales.as_ref().map_or(0, DeviceSlice::address),
            bias: weight.bias.as_ref().map_or(0, DeviceSlice::address),
            x: x.address(),
            out: out.address(),
            n: to_u32(OP, weight.n)?,
            k: to_u32(OP, k)?,
            x_columns: to_u32(OP, weight.k)?,
            rows: to_u32(OP, rows)?,
            out_is_f32: (out_dtype == Dtype::F32).into(),
            padding: 0,
        };
        let launch = Launch::blocks(to_u32(OP, n / BLOCK_ROWS)?, to_u32(OP, weight.num_threads())?);
        let kernel = self.linear.kernel(weight.scheme, rows);
        // SAFETY: codes, scales, row scales and bias were made by `PackedHost` for n, k and the scheme; x and out have the shapes that the
        // parameters say; out overlaps with nothing that is read; tensors and the parts of a weight (offsets of
        // `ALIGNMENT`) are aligned to 16 bytes, and so are rows of x, because k is a multiple of 16 (`PackedHost::pack`).
        unsafe { kernel.launch(stream, launch, &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_rounded_up_to_what_is_compiled() {
        let tiles: Vec<usize> = [0, 1, 8, 9, 16, 17, 24, 25, 32].map(token_tiles).to_vec();
        assert_eq!(tiles, [1, 1, 1, 2, 2, 4, 4, 4, 4]);
    }
}
