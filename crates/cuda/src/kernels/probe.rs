//! Wrapper of `kernels/probe.cu`: kernels that show what the machine can do. Not among [`super::Kernels`]: no model needs them.

use std::sync::Arc as Shared;

use crate::launch::{Kernel, Launch, Module, Params};
use crate::{Arch, Cubins, Device, DeviceSlice, Error, Result, Stream};

/// Threads of a block of `probe_read`, `probe_copy` and `probe_mma_*`.
const NUM_THREADS: u32 = 256;
/// Blocks of `probe_read` and `probe_copy` for each multiprocessor: all that fit.
const BLOCKS_PER_SM: u32 = 5;
/// Of `probe_mma_*`: enough to keep tensor cores busy.
const MMA_BLOCKS_PER_SM: u32 = 2;
/// `CHAINS` of `kernels/probe.cu`.
const CHAINS: u32 = 8;

/// `ProbeParams` of `kernels/probe.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct ProbeParams {
    source: u64,
    target: u64,
    len: u64,
    repeats: u32,
    unused: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 3 * 8 + 2 * 4 bytes, no padding.
unsafe impl Params for ProbeParams {
    const NAME: &'static str = "ProbeParams";
}

/// Types that tensor cores multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MmaType {
    Bf16,
    E4m3,
    /// With a scale for every 16 numbers.
    E2m1,
}

impl MmaType {
    pub(crate) const ALL: [Self; 3] = [Self::Bf16, Self::E4m3, Self::E2m1];

    /// Whether `probe.cu` has it for `arch`.
    pub(crate) fn exists(self, arch: Arch) -> bool {
        match self {
            Self::Bf16 => true,
            Self::E4m3 => arch != Arch::Sm80,
            Self::E2m1 => arch.has_fp4(),
        }
    }

    /// Multiplications and additions of one `mma.sync`: 16 x 8 results over k of 16, 32 or 64.
    fn num_operations(self) -> f64 {
        match self {
            Self::Bf16 => 4096.0,
            Self::E4m3 => 8192.0,
            Self::E2m1 => 16_384.0,
        }
    }

    fn kernel(self) -> &'static str {
        match self {
            Self::Bf16 => "probe_mma_bf16",
            Self::E4m3 => "probe_mma_e4m3",
            Self::E2m1 => "probe_mma_e2m1",
        }
    }
}

/// How a kernel that does nothing lets the next one in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Empty {
    /// The next starts when this one has ended.
    Ordered,
    /// The next is let in behind the wait for the one before, as in most of the model's kernels.
    Overlapped,
    /// The next is let in before it.
    OverlappedEarly,
}

/// The kernels, loaded.
#[derive(Debug)]
pub(crate) struct Probe {
    read: Kernel<ProbeParams>,
    copy: Kernel<ProbeParams>,
    empty: Kernel<ProbeParams>,
    empty_early: Kernel<ProbeParams>,
    spin: Kernel<ProbeParams>,
    sms: Kernel<ProbeParams>,
    mma: Vec<(MmaType, Kernel<ProbeParams>)>,
}

impl Probe {
    /// Loads them from `cubins`.
    pub(crate) fn load(device: &Device, cubins: &Cubins) -> Result<Self> {
        let cubin = cubins.module("probe").ok_or_else(|| Error::shape("probe", "its module", "none"))?;
        let module: Shared<Module> = Module::load(device, cubin, cubins.nvrtc)?;
        let kernel = |name| Kernel::new(&module, name, 0);
        let types = MmaType::ALL.into_iter().filter(|mma| mma.exists(device.arch()));
        Ok(Self {
            read: kernel("probe_read")?,
            copy: kernel("probe_copy")?,
            empty: kernel("probe_empty")?,
            empty_early: kernel("probe_empty_early")?,
            spin: kernel("probe_spin")?,
            sms: kernel("probe_sms")?,
            mma: types.map(|mma| Ok((mma, kernel(mma.kernel())?))).collect::<Result<_>>()?,
        })
    }

    /// Reads `num_bytes` bytes at `address`.
    ///
    /// # Safety
    /// The stream's device must be able to read them until the kernel has run; the address is a multiple of 16.
    pub(crate) unsafe fn read(
        &self,
        stream: &Stream,
        address: u64,
        num_bytes: u64,
        sink: &DeviceSlice,
    ) -> Result<()> {
        holds(sink, 16)?;
        stream.uses("probe", &[sink])?;
        let params = ProbeParams {
            source: address,
            target: sink.address(),
            len: num_bytes / 16,
            ..ProbeParams::default()
        };
        let launch = Launch::blocks(BLOCKS_PER_SM * stream.num_sms(), NUM_THREADS);
        // SAFETY: the source is the caller's promise; the sink has room for the one vector that may be written.
        unsafe { self.read.launch(stream, launch, &params) }
    }

    /// Copies `source` to `target` of the same size.
    pub(crate) fn copy(&self, stream: &Stream, target: &DeviceSlice, source: &DeviceSlice) -> Result<()> {
        holds(target, source.num_bytes())?;
        stream.uses("probe", &[source, target])?;
        let params = ProbeParams {
            source: source.address(),
            target: target.address(),
            len: source.num_bytes() / 16,
            ..ProbeParams::default()
        };
        let launch = Launch::blocks(BLOCKS_PER_SM * stream.num_sms(), NUM_THREADS);
        // SAFETY: both hold as many whole vectors, from aligned addresses (slices of an arena).
        unsafe { self.copy.launch(stream, launch, &params) }
    }

    /// A kernel of one block that does nothing.
    pub(crate) fn empty(&self, stream: &Stream, how: Empty) -> Result<()> {
        let (launch, params) = (Launch::blocks(1, 32), ProbeParams::default());
        // SAFETY: these kernels use no parameter.
        unsafe {
            match how {
                Empty::Ordered => self.empty.launch_in_order(stream, launch, &params),
                Empty::Overlapped => self.empty.launch(stream, launch, &params),
                Empty::OverlappedEarly => self.empty_early.launch(stream, launch, &params),
            }
        }
    }

    /// A kernel that lasts `micros`.
    pub(crate) fn spin(&self, stream: &Stream, micros: u32) -> Result<()> {
        let params = ProbeParams { repeats: micros, ..ProbeParams::default() };
        // SAFETY: this kernel uses no address.
        unsafe { self.spin.launch(stream, Launch::blocks(1, 32), &params) }
    }

    /// Sets a bit of `words` (zero at first) for every multiprocessor that the stream's kernels may run on.
    pub(crate) fn mark_sms(&self, stream: &Stream, words: &DeviceSlice) -> Result<()> {
        stream.uses("probe", &[words])?;
        let params = ProbeParams {
            target: words.address(),
            len: words.num_bytes() / 16,
            repeats: 20,
            ..ProbeParams::default()
        };
        let blocks = 4 * stream.device().properties().num_sms;
        // SAFETY: the kernel writes to the words that `len` says only.
        unsafe { self.sms.launch(stream, Launch::blocks(blocks, 1024), &params) }
    }

    /// Multiplies on all multiprocessors, `repeats` times; cycles and nanoseconds of a block come to `out` as two u64.
    /// Returns the number of operations; `None` where the type does not exist.
    pub(crate) fn multiply(
        &self,
        stream: &Stream,
        mma: MmaType,
        repeats: u32,
        out: &DeviceSlice,
    ) -> Result<Option<f64>> {
        let Some((_, kernel)) = self.mma.iter().find(|(found, _)| *found == mma) else { return Ok(None) };
        holds(out, 24)?;
        stream.uses("probe", &[out])?;
        let params = ProbeParams { target: out.address(), repeats, ..ProbeParams::default() };
        let blocks = MMA_BLOCKS_PER_SM * stream.num_sms();
        // SAFETY: three u64 fit.
        unsafe { kernel.launch(stream, Launch::blocks(blocks, NUM_THREADS), &params)? };
        let products = f64::from(blocks * NUM_THREADS / 32) * f64::from(CHAINS) * f64::from(repeats);
        Ok(Some(products * mma.num_operations()))
    }
}

fn holds(slice: &DeviceSlice, num_bytes: u64) -> Result<()> {
    match slice.num_bytes() >= num_bytes && slice.address().is_multiple_of(16) {
        true => Ok(()),
        false => Err(Error::shape("probe", format!("{num_bytes} aligned bytes"), slice.num_bytes())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_those_of_the_source() {
        let source = include_str!("../../../../kernels/probe.cu");
        assert!(MmaType::ALL.iter().all(|mma| source.contains(&format!(" {}(", mma.kernel()))));
        assert!(source.contains(&format!("constexpr int CHAINS = {CHAINS};")));
        let of = |arch| MmaType::ALL.map(|mma| mma.exists(arch));
        assert_eq!(of(Arch::Sm80), [true, false, false]);
        assert_eq!(of(Arch::Sm90), [true, true, false]);
        assert_eq!(of(Arch::Sm121a), [true, true, true]);
    }
}
