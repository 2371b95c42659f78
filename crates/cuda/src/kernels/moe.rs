//! Wrapper of `kernels/moe.cu`, `kernels/moe_int4.cu` and `kernels/moe_nvfp4.cu`: a layer of experts at decode.

use spark_backend::{Dtype, ExpertsWeight};

use super::linear::{BLOCK_ROWS, group_index};
use super::pack::{Scheme, padded_k, padded_n};
use super::{Kernels, LoadedModule, PackedHost, PackedWeight, disjoint, to_u32, words};
use crate::launch::{Kernel, Launch, Params};
use crate::{ALIGNMENT, DeviceSlice, Error, Result, Stream, Tensor};

const OP: &str = "moe_mlp";
/// Most pairs (row, chosen expert) of a launch, and most experts: threads of the sorting block.
pub const MAX_PAIRS: usize = 1024;
/// Rows of gate (and of up) that a block computes.
const TILE_ROWS: usize = 16;
/// Threads of a block that combines, and columns of a thread.
const COMBINE_THREADS: usize = 256;
const COMBINE_COLUMNS: usize = 4;
/// Bytes of `Group` of `kernels/moe.cuh`.
const GROUP_BYTES: usize = 16;

/// `MoeParams` of `kernels/moe.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MoeParams {
    codes: u64,
    scales: u64,
    row_scales: u64,
    x: u64,
    out: u64,
    partial: u64,
    experts: u64,
    weights: u64,
    groups: u64,
    pairs: u64,
    n: u32,
    padded_n: u32,
    k: u32,
    x_columns: u32,
    rows: u32,
    top_k: u32,
    num_experts: u32,
    max_groups: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 10 * 8 + 8 * 4 bytes, no padding.
unsafe impl Params for MoeParams {
    const NAME: &'static str = "MoeParams";
}

/// A layer's experts in the packed layout, still on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsHost {
    /// Each `[2 * intermediate, hidden]`, gate first.
    gate_up: PackedHost,
    /// Each `[hidden, intermediate]`.
    down: PackedHost,
}

impl ExpertsHost {
    /// Packs a layer of experts with 4-bit weights.
    ///
    /// # Errors
    /// [`Error::Shape`] for another scheme, for experts that differ, for an intermediate size that is not a multiple of 16,
    /// and for more than [`MAX_PAIRS`] experts.
    pub fn pack(weight: &ExpertsWeight) -> Result<Self> {
        let pack = |matrices: Vec<Result<PackedHost>>| {
            PackedHost::stack(matrices.into_iter().collect::<Result<Vec<_>>>()?)
        };
        let gate_up = pack(weight.experts.iter().map(|(gate_up, _)| PackedHost::pack(gate_up)).collect())?;
        let down = pack(weight.experts.iter().map(|(_, down)| PackedHost::pack(down)).collect())?;
        let (hidden, intermediate) = (gate_up.k, down.k);
        if [gate_up.n, down.n] != [2 * intermediate, hidden] {
            let expected = format!("outputs {:?} of gate_up and down", [2 * intermediate, hidden]);
            return Err(Error::shape(OP, expected, [gate_up.n, down.n]));
        }
        if gate_up.count > MAX_PAIRS {
            return Err(Error::shape(OP, format!("at most {MAX_PAIRS} experts"), gate_up.count));
        }
        Ok(Self { gate_up, down })
    }

    /// Bytes on the device.
    pub fn num_bytes(&self) -> u64 {
        PackedWeight::num_bytes(&self.gate_up) + PackedWeight::num_bytes(&self.down)
    }
}

/// A layer's experts on the device.
#[derive(Debug, Clone)]
pub struct Experts {
    gate_up: PackedWeight,
    down: PackedWeight,
}

impl Experts {
    /// Copies `host` into `target`.
    ///
    /// # Errors
    /// [`Error::Shape`] when `target` is too small, [`Error::Driver`].
    pub fn upload(stream: &Stream, target: &DeviceSlice, host: &ExpertsHost) -> Result<Self> {
        let middle = PackedWeight::num_bytes(&host.gate_up);
        let rest = target.slice(middle, PackedWeight::num_bytes(&host.down))?;
        Ok(Self {
            gate_up: PackedWeight::upload(stream, target, &host.gate_up)?,
            down: PackedWeight::upload(stream, &rest, &host.down)?,
        })
    }

    /// How many.
    pub fn num_experts(&self) -> usize {
        self.gate_up.count
    }

    /// Width of x and of the result.
    pub fn hidden(&self) -> usize {
        self.gate_up.k
    }

    /// Width between the two products.
    pub fn intermediate(&self) -> usize {
        self.down.k
    }

    /// Bytes of scratch memory that [`Kernels::moe_mlp`] needs for `rows` rows of `top_k` experts.
    ///
    /// # Errors
    /// [`Error::Shape`] for numbers that `moe_mlp` does not take.
    pub fn scratch_bytes(&self, rows: usize, top_k: usize) -> Result<u64> {
        Ok(self.scratch_offsets(checked_pairs(rows, top_k, self.num_experts())?)[4])
    }

    /// Where groups, pairs, inner, partial and the end lie in the scratch memory.
    fn scratch_offsets(&self, num_pairs: usize) -> [u64; 5] {
        let sizes = [
            GROUP_BYTES * self.max_groups(num_pairs),
            4 * num_pairs,
            2 * num_pairs * self.intermediate(),
            4 * num_pairs * self.hidden(),
        ];
        let mut offsets = [0; 5];
        for (i, size) in sizes.into_iter().enumerate() {
            offsets[i + 1] = offsets[i] + (size as u64).next_multiple_of(ALIGNMENT);
        }
        offsets
    }

    /// Most experts that `num_pairs` pairs can use.
    fn max_groups(&self, num_pairs: usize) -> usize {
        num_pairs.min(self.num_experts())
    }
}

/// The router's choice, on the device. Its numbers cannot be checked before the launch: a repeated expert, or one that does
/// not exist, gives wrong values in that row of the result; nothing outside the given memory is touched.
#[derive(Debug, Clone)]
pub struct Choice {
    /// `[rows, top_k]` u32, each row without repetition.
    pub experts: DeviceSlice,
    /// `[rows, top_k]` f32.
    pub weights: DeviceSlice,
    /// Experts of a row.
    pub top_k: usize,
}

#[derive(Debug)]
pub(super) struct Moe {
    sort: Kernel<MoeParams>,
    combine: Kernel<MoeParams>,
    /// gate_up and down by group size: 32, 64, 128.
    int4: [[Kernel<MoeParams>; 2]; 3],
    /// gate_up and down.
    nvfp4: [Kernel<MoeParams>; 2],
}

impl Moe {
    pub(super) fn new(
        module: &LoadedModule,
        int4_module: &LoadedModule,
        nvfp4_module: &LoadedModule,
    ) -> Result<Self> {
        let both = |module: &LoadedModule, scheme: &str| {
            let kernel = |op: &str| Kernel::new(module, &format!("{op}_{scheme}"), 0);
            Ok::<_, Error>([kernel("gate_up")?, kernel("down")?])
        };
        Ok(Self {
            sort: Kernel::new(module, "moe_sort", 0)?,
            combine: Kernel::new(module, "moe_combine", 0)?,
            int4: [both(int4_module, "g32")?, both(int4_module, "g64")?, both(int4_module, "g128")?],
            nvfp4: both(nvfp4_module, "nvfp4")?,
        })
    }

    fn kernels(&self, scheme: Scheme) -> &[Kernel<MoeParams>; 2] {
        match scheme {
            Scheme::Int4 { group_size } => &self.int4[group_index(group_size)],
            Scheme::Nvfp4 => &self.nvfp4,
        }
    }
}

impl Kernels {
    /// `sum over a row's experts, ascending, of weight * down(silu(gate(x)) * up(x))`: `x` and `out` `[rows, hidden]` bf16. Rounds
    /// where the CPU backend does. At most [`MAX_PAIRS`] pairs. `scratch` has [`Experts::scratch_bytes`].
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn moe_mlp(
        &self,
        stream: &Stream,
        x: &Tensor,
        choice: &Choice,
        experts: &Experts,
        scratch: &DeviceSlice,
        out: &Tensor,
    ) -> Result<()> {
        let (rows, top_k, hidden) = (x.rows(), choice.top_k, experts.hidden());
        x.expect(OP, [rows, hidden], Dtype::Bf16)?;
        out.expect(OP, [rows, hidden], Dtype::Bf16)?;
        let num_pairs = checked_pairs(rows, top_k, experts.num_experts())?;
        let [groups, pairs, inner, partial, end] = experts.scratch_offsets(num_pairs);
        let scratch = scratch.slice(0, end)?;
        check_memory(stream, [x, out], choice, experts, &scratch, num_pairs)?;
        if num_pairs == 0 {
            return Ok(());
        }
        let at = |offset: u64| scratch.address() + offset;
        let max_groups = to_u32(OP, experts.max_groups(num_pairs))?;
        let gate_up = MoeParams {
            codes: experts.gate_up.codes.address(),
            scales: experts.gate_up.scales.address(),
            row_scales: experts.gate_up.row_scales.as_ref().map_or(0, DeviceSlice::address),
            x: x.address(),
            out: at(inner),
            partial: at(partial),
            experts: choice.experts.address(),
            weights: choice.weights.address(),
            groups: at(groups),
            pairs: at(pairs),
            n: to_u32(OP, experts.gate_up.n)?,
            padded_n: to_u32(OP, padded_n(experts.gate_up.n))?,
            k: to_u32(OP, padded_k(hidden))?,
            x_columns: to_u32(OP, hidden)?,
            rows: to_u32(OP, rows)?,
            top_k: to_u32(OP, top_k)?,
            num_experts: to_u32(OP, experts.num_experts())?,
            max_groups,
        };
        let down = MoeParams {
            codes: experts.down.codes.address(),
            scales: experts.down.scales.address(),
            row_scales: experts.down.row_scales.as_ref().map_or(0, DeviceSlice::address),
            x: at(inner),
            out: at(partial),
            n: to_u32(OP, hidden)?,
            padded_n: to_u32(OP, padded_n(hidden))?,
            k: to_u32(OP, padded_k(experts.intermediate()))?,
            x_columns: to_u32(OP, experts.intermediate())?,
            ..gate_up
        };
        let combine = MoeParams { out: out.address(), ..down };
        let launch = |blocks: usize, y: u32, num_threads: usize| {
            let (blocks, num_threads) = (to_u32(OP, blocks)?, to_u32(OP, num_threads)?);
            Ok::<_, Error>(Launch { grid: [blocks, y, 1], num_threads, shared_bytes: 0 })
        };
        let gate_up_launch =
            launch(experts.intermediate() / TILE_ROWS, max_groups, experts.gate_up.num_threads())?;
        let down_launch = launch(padded_n(hidden) / BLOCK_ROWS, max_groups, experts.down.num_threads())?;
        let combine_blocks = hidden.div_ceil(COMBINE_COLUMNS * COMBINE_THREADS);
        let combine_launch = launch(combine_blocks, gate_up.rows, COMBINE_THREADS)?;
        let kernels = &self.moe;
        // SAFETY: the weights were made by `ExpertsHost` for these sizes; x, out, choice and the parts of the scratch memory have
        // the sizes that the parameters say and do not overlap; the choice is aligned to 4 bytes and everything else to 16 or
        // more, rows of x and inner because hidden and intermediate size are multiples of 16. The sort ignores experts that do not exist, so the
        // groups name existing ones, at most `max_groups`.
        unsafe {
            kernels.sort.launch(stream, launch(1, 1, MAX_PAIRS)?, &gate_up)?;
            kernels.kernels(experts.gate_up.scheme)[0].launch(stream, gate_up_launch, &gate_up)?;
            kernels.kernels(experts.down.scheme)[1].launch(stream, down_launch, &down)?;
            kernels.combine.launch(stream, combine_launch, &combine)
        }
    }
}

/// Pairs of `rows` rows.
fn checked_pairs(rows: usize, top_k: usize, num_experts: usize) -> Result<usize> {
    if top_k == 0 || top_k > num_experts {
        return Err(Error::shape(OP, format!("1 to {num_experts} experts of a row"), top_k));
    }
    let num_pairs = rows.checked_mul(top_k).filter(|&pairs| pairs <= MAX_PAIRS);
    num_pairs.ok_or_else(|| {
        Error::shape(OP, format!("at most {MAX_PAIRS} chosen experts of all rows"), (rows, top_k))
    })
}

/// Sizes, alignment, devices and overlaps of all that a call touches.
fn check_memory(
    stream: &Stream,
    [x, out]: [&Tensor; 2],
    choice: &Choice,
    experts: &Experts,
    scratch: &DeviceSlice,
    num_pairs: usize,
) -> Result<()> {
    for slice in [&choice.experts, &choice.weights] {
        words(OP, slice, num_pairs)?;
    }
    if !scratch.address().is_multiple_of(ALIGNMENT) {
        return Err(Error::shape(OP, "scratch memory aligned to 256 bytes", scratch.address()));
    }
    let mut read: Vec<&DeviceSlice> = vec![x.slice(), &choice.experts, &choice.weights];
    read.extend(experts.gate_up.slices().chain(experts.down.slices()));
    disjoint(OP, out.slice(), &read)?;
    disjoint(OP, scratch, &read)?;
    disjoint(OP, scratch, &[out.slice()])?;
    read.extend([out.slice(), scratch]);
    stream.uses(OP, &read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use spark_backend::{LinearWeight, Matrix, MatrixData};

    #[test]
    fn pairs_are_bounded() {
        assert_eq!(checked_pairs(128, 8, 128).unwrap(), MAX_PAIRS);
        assert_eq!(checked_pairs(0, 8, 128).unwrap(), 0);
        for (rows, top_k, num_experts) in [(129, 8, 128), (1, 0, 8), (1, 9, 8), (usize::MAX, 2, 8)] {
            assert!(checked_pairs(rows, top_k, num_experts).is_err(), "{rows} {top_k}");
        }
    }

    #[test]
    fn experts_must_fit_together() {
        let layer = |rows: &[usize], k: usize| {
            let part = |&n: &usize| {
                let data = MatrixData::Nvfp4 {
                    codes: vec![0; n * k / 2].into(),
                    scales: vec![0; n * k / 16].into(),
                    alpha: 1.0,
                };
                Matrix { n, k, data }
            };
            LinearWeight { parts: rows.iter().map(part).collect(), bias: None }
        };
        let pack = |experts| ExpertsHost::pack(&ExpertsWeight { experts });
        let good = || (layer(&[32, 32], 64), layer(&[64], 32));
        let packed = pack(vec![good(), good()]).unwrap();
        assert!(packed.num_bytes() > (2 * 3 * 64 * 32 / 2) as u64);
        assert!(pack(vec![good(), (layer(&[16, 16], 64), layer(&[64], 16))]).is_err());
        assert!(pack(vec![(layer(&[32, 32], 64), layer(&[48], 32))]).is_err());
        assert!(pack(vec![(layer(&[24, 24], 64), layer(&[64], 24))]).is_err());
        assert!(pack(Vec::new()).is_err());
    }
}
