//! Weights on the device in the packed layout: matrices, linear layers, experts. What is in the layout is in `pack.rs`, what
//! is computed with it in the wrappers of the kernels.

use spark_backend::{ExpertsWeight, LinearWeight};

use super::PackedHost;
use super::pack::{Layout, Scheme};
use crate::{ArenaPlan, DeviceSlice, Error, Region, Result, Stream};

const OP: &str = "weight";
/// Most experts of a layer: threads of the block that sorts by expert.
pub const MAX_EXPERTS: usize = 1024;

/// Packed weights of one scheme: a matrix, or several of the same shape.
#[derive(Debug, Clone)]
pub struct PackedWeight {
    pub(super) count: usize,
    /// See `PackedHost::codes`.
    pub(super) codes: DeviceSlice,
    /// See `PackedHost::scales`; empty for bfloat16.
    pub(super) scales: DeviceSlice,
    /// `[count, n]` f32, of NVFP4 alone.
    pub(super) row_scales: Option<DeviceSlice>,
    /// `[n]` f32.
    pub(super) bias: Option<DeviceSlice>,
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
        device_bytes(&host.layout)
    }

    /// Copies `host` into `target`.
    ///
    /// # Errors
    /// [`Error::Shape`] when `target` is too small, [`Error::Driver`].
    pub fn upload(stream: &Stream, target: &DeviceSlice, host: &PackedHost) -> Result<Self> {
        let weight = Self::at(target, &host.layout)?;
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

    /// Weights of `layout` at the start of `target`, whose bytes are still to be written.
    pub(super) fn at(target: &DeviceSlice, layout: &Layout) -> Result<Self> {
        let [codes, scales, row_scales, bias, _] = offsets(layout);
        if !target.address().is_multiple_of(crate::ALIGNMENT) {
            return Err(Error::shape(OP, "a place aligned to 256 bytes", target.address()));
        }
        let sizes = layout.num_bytes();
        let optional = |at: u64, size: u64| (size > 0).then(|| target.slice(at, size)).transpose();
        Ok(Self {
            count: layout.count,
            codes: target.slice(codes, sizes[0])?,
            scales: target.slice(scales, sizes[1])?,
            row_scales: optional(row_scales, sizes[2])?,
            bias: optional(bias, sizes[3])?,
            n: layout.n,
            k: layout.k,
            scheme: layout.scheme,
        })
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

/// Where codes, scales, row scales, bias and the end lie in the memory of weights.
fn offsets(layout: &Layout) -> [u64; 5] {
    let mut offsets = [0; 5];
    for (i, size) in layout.num_bytes().into_iter().enumerate() {
        offsets[i + 1] = offsets[i] + size.next_multiple_of(crate::ALIGNMENT);
    }
    offsets
}

/// Bytes of weights on the device, between aligned parts.
pub(super) fn device_bytes(layout: &Layout) -> u64 {
    offsets(layout)[4]
}

/// A linear layer: parts over the same input whose outputs lie side by side. Neighbours of one scheme are one part.
#[derive(Debug, Clone)]
pub struct Linear {
    pub(super) parts: Vec<PackedWeight>,
    pub(super) n: usize,
    pub(super) k: usize,
}

impl Linear {
    /// The layer of `parts`, in output order.
    ///
    /// # Errors
    /// [`Error::Shape`] for none, for parts of different inputs, for several matrices in a part.
    pub fn new(parts: Vec<PackedWeight>) -> Result<Self> {
        let k = parts.first().map_or(0, |part| part.k);
        if parts.is_empty() || parts.iter().any(|part| part.k != k || part.count != 1) {
            let got: Vec<_> = parts.iter().map(|part| (part.count, part.k)).collect();
            return Err(Error::shape(OP, "parts of one matrix each over the same inputs", got));
        }
        Ok(Self { n: parts.iter().map(|part| part.n).sum(), parts, k })
    }

    /// Bytes of the packed parts of a layer on the device.
    pub fn num_bytes(host: &[PackedHost]) -> u64 {
        host.iter().map(PackedWeight::num_bytes).sum()
    }

    /// Copies the packed parts of a layer into `target`.
    ///
    /// # Errors
    /// [`Error::Shape`] when `target` is too small, [`Error::Driver`].
    pub fn upload(stream: &Stream, target: &DeviceSlice, host: &[PackedHost]) -> Result<Self> {
        let mut offset = 0;
        let upload = |host: &PackedHost| {
            let num_bytes = PackedWeight::num_bytes(host);
            let part = PackedWeight::upload(stream, &target.slice(offset, num_bytes)?, host);
            offset += num_bytes;
            part
        };
        Self::new(host.iter().map(upload).collect::<Result<Vec<_>>>()?)
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The parts, in output order.
    pub fn parts(&self) -> &[PackedWeight] {
        &self.parts
    }
}

/// The layouts of a layer's experts, for gate_up and down, both with `count` matrices.
///
/// # Errors
/// [`Error::Shape`] for experts that differ, mixed schemes within an expert's product, an intermediate size that is not a
/// multiple of 16, and more than [`MAX_EXPERTS`] experts.
pub(super) fn expert_layouts(weight: &ExpertsWeight) -> Result<[Layout; 2]> {
    let count = weight.experts.len();
    if count == 0 || count > MAX_EXPERTS {
        return Err(Error::shape(OP, format!("1 to {MAX_EXPERTS} experts"), count));
    }
    let one = |weight: &LinearWeight| {
        let found = super::pack::layouts(weight)?;
        match found[..] {
            [(layout, _)] if !layout.has_bias => Ok(Layout { count, ..layout }),
            _ => Err(Error::shape(OP, "experts of one scheme each, without bias", found.len())),
        }
    };
    let mut layouts = None;
    for (gate_up, down) in &weight.experts {
        let found = [one(gate_up)?, one(down)?];
        let want = *layouts.get_or_insert(found);
        if found != want {
            return Err(Error::shape(OP, format!("experts alike: {want:?}"), found));
        }
    }
    let [gate_up, down] = layouts.ok_or_else(|| Error::shape(OP, "at least one expert", "none"))?;
    let (hidden, intermediate) = (gate_up.k, down.k);
    if [gate_up.n, down.n] != [2 * intermediate, hidden] {
        let expected = format!("outputs {:?} of gate_up and down", [2 * intermediate, hidden]);
        return Err(Error::shape(OP, expected, [gate_up.n, down.n]));
    }
    Ok([gate_up, down])
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
    /// Packs a layer of experts.
    ///
    /// # Errors
    /// [`Error::Shape`] for experts that differ, mixed schemes within an expert's product, an intermediate size that is not a
    /// multiple of 16, and more than [`MAX_EXPERTS`] experts.
    pub fn pack(weight: &ExpertsWeight) -> Result<Self> {
        expert_layouts(weight)?;
        let pack = |matrices: Vec<Result<PackedHost>>| {
            PackedHost::stack(matrices.into_iter().collect::<Result<Vec<_>>>()?)
        };
        Ok(Self {
            gate_up: pack(weight.experts.iter().map(|(gate_up, _)| PackedHost::pack(gate_up)).collect())?,
            down: pack(weight.experts.iter().map(|(_, down)| PackedHost::pack(down)).collect())?,
        })
    }

    /// Bytes on the device.
    pub fn num_bytes(&self) -> u64 {
        PackedWeight::num_bytes(&self.gate_up) + PackedWeight::num_bytes(&self.down)
    }
}

/// A layer's experts on the device.
#[derive(Debug, Clone)]
pub struct Experts {
    /// Each `[2 * intermediate, hidden]`, gate first.
    pub(super) gate_up: PackedWeight,
    /// Each `[hidden, intermediate]`.
    pub(super) down: PackedWeight,
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use spark_backend::{Matrix, MatrixData};

    fn layer(rows: &[usize], k: usize) -> LinearWeight {
        let part = |&n: &usize| {
            let data = MatrixData::Nvfp4 {
                codes: vec![0; n * k / 2].into(),
                scales: vec![0; n * k / 16].into(),
                alpha: 1.0,
            };
            Matrix { n, k, data }
        };
        LinearWeight { parts: rows.iter().map(part).collect(), bias: None }
    }

    #[test]
    fn experts_must_fit_together() {
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
