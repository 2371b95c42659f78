//! Device memory for weights, which come one by one and stay: small ones share allocations, large ones have their own.

use crate::{Arena, ArenaPlan, Device, DeviceSlice, Result};

/// Bytes of a shared allocation.
const SLAB: u64 = 64 << 20;
/// What is larger has an allocation of its own, so that the rest of a slab is never more than this.
const LARGE: u64 = 8 << 20;

/// Takes memory for weights.
#[derive(Debug)]
pub(super) struct WeightMemory {
    device: Device,
    /// What is left of the last slab.
    rest: Option<DeviceSlice>,
    /// Bytes that weights take, without what is left over.
    pub(super) num_bytes: u64,
}

impl WeightMemory {
    pub(super) fn new(device: &Device) -> Self {
        Self { device: device.clone(), rest: None, num_bytes: 0 }
    }

    /// `num_bytes`, aligned.
    ///
    /// # Errors
    /// [`crate::Error::Memory`], [`crate::Error::AllocationAfterStart`], [`crate::Error::Driver`].
    pub(super) fn take(&mut self, num_bytes: u64) -> Result<DeviceSlice> {
        let size = num_bytes.next_multiple_of(crate::ALIGNMENT);
        self.num_bytes += size;
        if size > LARGE {
            return self.allocate(size)?.slice(0, num_bytes);
        }
        let slab = match self.rest.take() {
            Some(rest) if rest.num_bytes() >= size => rest,
            _ => self.allocate(SLAB)?,
        };
        self.rest = Some(slab.slice(size, slab.num_bytes() - size)?);
        slab.slice(0, num_bytes)
    }

    fn allocate(&self, num_bytes: u64) -> Result<DeviceSlice> {
        let mut plan = ArenaPlan::default();
        let region = plan.add("weights", num_bytes)?;
        Arena::new(&self.device, plan)?.region(region)
    }
}
