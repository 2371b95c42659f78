//! Weights from the host to the device: through two staging areas in turn, so that the host fills one while the other is
//! copied and repacked. What a batch is made of is in `repack.rs`.

use rayon::prelude::*;
use spark_backend::{ExpertsWeight, LinearWeight, Matrix};

use super::pack::{Layout, layouts};
use super::repack::{Batch, Target, transfers};
use super::weight::{device_bytes, expert_layouts};
use super::{Experts, Kernels, Linear, PackedWeight};
use crate::{Arena, ArenaPlan, Device, DeviceSlice, Element, Error, Event, HostBuffer, Result, Stream};

const OP: &str = "weight loader";
/// Bytes that one thread copies at a time.
const COPY: usize = 1 << 20;

/// How staged bytes reach the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Staging {
    /// Copied to the device first.
    Device,
    /// Read by the kernels where the host wrote them: right where both share one memory.
    Host,
}

/// Takes weights to a device in the packed layout. Its staging areas are freed when it is dropped.
#[derive(Debug)]
pub struct WeightLoader {
    stream: Stream,
    slots: [Slot; 2],
    next: usize,
    capacity: usize,
}

/// A staging area.
#[derive(Debug)]
struct Slot {
    host: HostBuffer,
    /// `None` where kernels read the host's.
    device: Option<DeviceSlice>,
    /// Reached when the area may be filled again.
    free: Event,
}

impl WeightLoader {
    /// Bytes of a staging area: large enough for the full speed of a copy, small enough to be allocated quickly.
    pub const CAPACITY: usize = 32 << 20;

    /// A loader with staging areas of `capacity` bytes (see [`CAPACITY`](Self::CAPACITY)), in the way that suits the device.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::AllocationAfterStart`], [`Error::Driver`].
    pub fn new(device: &Device, capacity: usize) -> Result<Self> {
        let staging = if device.properties().is_integrated { Staging::Host } else { Staging::Device };
        Self::with_staging(device, capacity, staging)
    }

    /// As [`new`](Self::new), in the given way.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_staging(device: &Device, capacity: usize, staging: Staging) -> Result<Self> {
        let slot = || {
            let on_device = match staging {
                Staging::Host => None,
                Staging::Device => {
                    let mut plan = ArenaPlan::default();
                    let region = plan.add("staging of weights", capacity as u64)?;
                    Some(Arena::new(device, plan)?.region(region)?)
                }
            };
            let host = HostBuffer::new(device, capacity as u64)?;
            Ok::<_, Error>(Slot { host, device: on_device, free: Event::without_time(device)? })
        };
        Ok(Self { stream: Stream::new(device)?, slots: [slot()?, slot()?], next: 0, capacity })
    }

    /// Bytes that a linear layer takes on the device.
    ///
    /// # Errors
    /// [`Error::Shape`] for what the packed layout does not take.
    pub fn linear_bytes(weight: &LinearWeight) -> Result<u64> {
        Ok(layouts(weight)?.iter().map(|(layout, _)| device_bytes(layout)).sum())
    }

    /// Bytes that a layer's experts take on the device.
    ///
    /// # Errors
    /// As for [`experts`](Self::experts).
    pub fn experts_bytes(weight: &ExpertsWeight) -> Result<u64> {
        Ok(expert_layouts(weight)?.iter().map(device_bytes).sum())
    }

    /// Takes a linear layer to `target`, which has [`linear_bytes`](Self::linear_bytes) and is aligned to
    /// [`ALIGNMENT`](crate::ALIGNMENT). It is there after [`finish`](Self::finish).
    ///
    /// # Errors
    /// [`Error::Shape`] for what the packed layout does not take and for a small target, [`Error::Driver`].
    pub fn linear(
        &mut self,
        kernels: &Kernels,
        target: &DeviceSlice,
        weight: &LinearWeight,
    ) -> Result<Linear> {
        let (mut offset, mut first) = (0, 0);
        let mut parts = Vec::new();
        for (layout, matrices) in layouts(weight)? {
            let num_bytes = device_bytes(&layout);
            let part = PackedWeight::at(&target.slice(offset, num_bytes)?, &layout)?;
            self.repack(kernels, &part, layout, &[matrices])?;
            if let (Some(target), Some(bias)) = (&part.bias, &weight.bias) {
                self.upload(target, &bias[first..first + layout.n])?;
            }
            parts.push(part);
            (offset, first) = (offset + num_bytes, first + layout.n);
        }
        Linear::new(parts)
    }

    /// Takes a layer's experts to `target`, which has [`experts_bytes`](Self::experts_bytes) and is aligned to
    /// [`ALIGNMENT`](crate::ALIGNMENT). They are there after [`finish`](Self::finish).
    ///
    /// # Errors
    /// [`Error::Shape`] for experts that differ, mixed schemes within an expert's product, an intermediate size that is not a
    /// multiple of 16, too many experts, and a small target; [`Error::Driver`].
    pub fn experts(
        &mut self,
        kernels: &Kernels,
        target: &DeviceSlice,
        weight: &ExpertsWeight,
    ) -> Result<Experts> {
        let [gate_up, down] = expert_layouts(weight)?;
        let middle = device_bytes(&gate_up);
        let experts = Experts {
            gate_up: PackedWeight::at(&target.slice(0, middle)?, &gate_up)?,
            down: PackedWeight::at(&target.slice(middle, device_bytes(&down))?, &down)?,
        };
        let parts = |part: fn(&(LinearWeight, LinearWeight)) -> &LinearWeight| -> Vec<&[Matrix]> {
            weight.experts.iter().map(|expert| &part(expert).parts[..]).collect()
        };
        self.repack(kernels, &experts.gate_up, gate_up, &parts(|expert| &expert.0))?;
        self.repack(kernels, &experts.down, down, &parts(|expert| &expert.1))?;
        Ok(experts)
    }

    /// Copies `values` to the start of `target` without waiting for the copy.
    ///
    /// # Errors
    /// [`Error::Shape`] when the target is smaller, [`Error::Driver`].
    pub fn upload<T: Element>(&mut self, target: &DeviceSlice, values: &[T]) -> Result<()> {
        // SAFETY: an `Element` has no padding, so every byte is initialised; the slice borrows `values`.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        for (i, bytes) in bytes.chunks(self.capacity).enumerate() {
            let target = target.slice((i * self.capacity) as u64, bytes.len() as u64)?;
            let slot = &mut self.slots[self.next];
            slot.free.wait()?;
            fill(slot.host.bytes_mut(), &[(0, bytes)]);
            // SAFETY: the buffer is neither written nor freed before `free` is reached.
            unsafe { self.stream.upload_from(&target, &slot.host, 0)? };
            slot.free.record(&self.stream)?;
            self.next = 1 - self.next;
        }
        Ok(())
    }

    /// Waits until everything is on the device.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn finish(&mut self) -> Result<()> {
        self.stream.synchronize()
    }

    /// Repacks `matrices`, the parts of each matrix of `weight`.
    fn repack(
        &mut self,
        kernels: &Kernels,
        weight: &PackedWeight,
        layout: Layout,
        matrices: &[&[Matrix]],
    ) -> Result<()> {
        self.stream.uses(OP, &weight.slices().collect::<Vec<_>>())?;
        // The kernels write all columns but only the source's rows.
        if layout.rows() != layout.n {
            self.stream.fill(&weight.codes, 0)?;
            self.stream.fill(&weight.scales, 0)?;
        }
        for transfer in transfers(Target::of(weight, layout), matrices) {
            for batch in transfer.batches(self.capacity)? {
                self.run(kernels, &batch)?;
            }
        }
        Ok(())
    }

    fn run(&mut self, kernels: &Kernels, batch: &Batch<'_>) -> Result<()> {
        let slot = &mut self.slots[self.next];
        slot.free.wait()?;
        let copies: Vec<(usize, &[u8])> = batch.copies.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
        fill(slot.host.bytes_mut(), &copies);
        let staging = match &slot.device {
            None => slot.host.address(),
            Some(device) => {
                let used = device.slice(0, batch.num_bytes as u64)?;
                // SAFETY: the buffer is neither written nor freed before `free` is reached.
                unsafe { self.stream.upload_from(&used, &slot.host, 0)? };
                device.address()
            }
        };
        // SAFETY: the staging area holds the batch, is aligned as an allocation of its own, and is neither written nor freed
        // before `free` is reached; `uses` has checked the target, whose slices live until then, because `Drop` waits.
        unsafe { kernels.repack(&self.stream, batch, staging)? };
        slot.free.record(&self.stream)?;
        self.next = 1 - self.next;
        Ok(())
    }
}

impl Drop for WeightLoader {
    fn drop(&mut self) {
        // What was put in may still read the staging areas. An error will be seen by whoever uses the device next.
        let _ = self.stream.synchronize();
    }
}

/// Copies bytes to their places in `target`, given in ascending order, with all threads.
fn fill(target: &mut [u8], copies: &[(usize, &[u8])]) {
    let (mut rest, mut done) = (target, 0);
    let mut pieces = Vec::new();
    for &(at, bytes) in copies {
        let (place, behind) = rest[at - done..].split_at_mut(bytes.len());
        pieces.extend(place.chunks_mut(COPY).zip(bytes.chunks(COPY)));
        (rest, done) = (behind, at + bytes.len());
    }
    pieces.into_par_iter().for_each(|(place, bytes)| place.copy_from_slice(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_to_their_places() {
        let long: Vec<u8> = (0..2 * COPY + 77).map(|i| (i % 251) as u8).collect();
        let mut target = vec![0xff; long.len() + 600];
        fill(&mut target, &[(0, &[1, 2]), (256, &[]), (256, &long), (512 + long.len(), &[3])]);
        assert_eq!((&target[..2], &target[2..256]), (&[1, 2][..], &[0xff; 254][..]));
        assert!(target[256..256 + long.len()] == long);
        assert_eq!(target[256 + long.len()..][..257], [vec![0xff; 256], vec![3]].concat());
    }
}
