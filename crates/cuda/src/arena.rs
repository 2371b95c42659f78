//! Device memory: one allocation, planned at start and cut into named regions. Knows bytes, not tensors; what a step
//! takes piece by piece from a region is `pool.rs`.

use std::fmt::Write as _;
use std::sync::Arc as Shared;

use crate::device::DeviceMemory;
use crate::pool::Piece;
use crate::{Device, Error, Result};

/// Everything starts at a multiple of this: the width of the widest loads, and whole cache lines.
pub const ALIGNMENT: u64 = 256;

/// Which regions an arena will have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ArenaPlan {
    regions: Vec<Planned>,
    num_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Planned {
    name: &'static str,
    offset: u64,
    num_bytes: u64,
}

/// A region of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Region(usize);

impl ArenaPlan {
    /// Adds a region of `num_bytes`.
    ///
    /// # Errors
    /// [`Error::Memory`] when the sum does not fit 64 bits.
    pub fn add(&mut self, name: &'static str, num_bytes: u64) -> Result<Region> {
        let offset = self.num_bytes;
        let end = aligned(num_bytes).and_then(|num_bytes| offset.checked_add(num_bytes));
        self.num_bytes =
            end.ok_or(Error::Memory { what: name, needed: num_bytes, available: u64::MAX - offset })?;
        self.regions.push(Planned { name, offset, num_bytes });
        Ok(Region(self.regions.len() - 1))
    }

    /// Bytes of all regions, each rounded up to [`ALIGNMENT`].
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// One line for each region, with its share.
    pub fn report(&self) -> String {
        let width = self.regions.iter().map(|region| region.name.len()).max().unwrap_or(0).max(5);
        let mut text = String::new();
        for (name, num_bytes) in self
            .regions
            .iter()
            .map(|region| (region.name, region.num_bytes))
            .chain([("total", self.num_bytes)])
        {
            let share = 100.0 * num_bytes as f64 / self.num_bytes.max(1) as f64;
            let mib = num_bytes as f64 / f64::from(1 << 20);
            // Writing to a string does not fail.
            let _ = writeln!(text, "{name:width$} {mib:>12.2} MiB {share:>5.1} %");
        }
        text
    }
}

/// The planned memory, allocated. Lives as long as a slice of it.
#[derive(Debug)]
pub struct Arena {
    memory: Shared<DeviceMemory>,
    plan: ArenaPlan,
}

impl Arena {
    /// Allocates all of `plan` at once.
    ///
    /// # Errors
    /// [`Error::Memory`] when it does not fit, [`Error::AllocationAfterStart`], [`Error::Driver`].
    pub fn new(device: &Device, plan: ArenaPlan) -> Result<Self> {
        let memory = Shared::new(device.allocate("the arena", plan.num_bytes())?);
        Ok(Self { memory, plan })
    }

    /// The memory of a region of this arena's plan.
    ///
    /// # Errors
    /// [`Error::Shape`] for a region beyond those of its plan. One of another plan is not noticed otherwise.
    pub fn region(&self, region: Region) -> Result<DeviceSlice> {
        let Some(planned) = self.plan.regions.get(region.0) else {
            return Err(Error::shape("arena", "a region of its plan", region));
        };
        let address = self.memory.address() + planned.offset;
        Ok(DeviceSlice {
            memory: Shared::clone(&self.memory),
            _piece: None,
            address,
            num_bytes: planned.num_bytes,
        })
    }

    /// What was planned.
    pub fn plan(&self) -> &ArenaPlan {
        &self.plan
    }
}

/// Some bytes on the device. Clones are the same bytes.
#[derive(Debug, Clone)]
pub struct DeviceSlice {
    memory: Shared<DeviceMemory>,
    /// Its place in the pool that it was taken from: goes back when the last slice of it is dropped.
    _piece: Option<Shared<Piece>>,
    address: u64,
    num_bytes: u64,
}

impl DeviceSlice {
    /// Where it starts on the device.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// `num_bytes` from byte `offset` on.
    ///
    /// # Errors
    /// [`Error::Shape`] when the slice ends before.
    pub fn slice(&self, offset: u64, num_bytes: u64) -> Result<Self> {
        if offset.checked_add(num_bytes).is_none_or(|end| end > self.num_bytes) {
            let expected = format!("a part of {} bytes", self.num_bytes);
            return Err(Error::shape("slice", expected, (offset, num_bytes)));
        }
        Ok(Self { address: self.address + offset, num_bytes, ..self.clone() })
    }

    /// The same bytes as a piece of a pool.
    pub(crate) fn with_piece(self, piece: Shared<Piece>) -> Self {
        Self { _piece: Some(piece), ..self }
    }

    /// Whether both have a byte in common.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.address < other.address + other.num_bytes && other.address < self.address + self.num_bytes
    }

    /// The allocation that it is a part of.
    pub(crate) fn memory(&self) -> &Shared<DeviceMemory> {
        &self.memory
    }

    pub(crate) fn device(&self) -> &Device {
        self.memory.device()
    }
}

/// The next multiple of [`ALIGNMENT`].
fn aligned(num_bytes: u64) -> Option<u64> {
    num_bytes.checked_next_multiple_of(ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_and_do_not_overlap() {
        let mut plan = ArenaPlan::default();
        for (name, num_bytes) in [("weights", 1000), ("empty", 0), ("kv", 256), ("scratch", 1)] {
            plan.add(name, num_bytes).unwrap();
        }
        let offsets: Vec<u64> = plan.regions.iter().map(|region| region.offset).collect();
        assert_eq!(offsets, [0, 1024, 1024, 1280]);
        assert_eq!(plan.num_bytes(), 1536);
    }

    #[test]
    fn a_plan_that_no_machine_holds_is_an_error() {
        let mut plan = ArenaPlan::default();
        plan.add("weights", 1 << 63).unwrap();
        let error = plan.add("kv", 1 << 63).unwrap_err().to_string();
        assert!(error.starts_with("not enough memory for kv: 9223372036854775808 bytes needed"), "{error}");
        assert!(plan.add("kv", u64::MAX).is_err());
        assert_eq!(plan.num_bytes(), 1 << 63, "a refused region takes nothing");
    }

    #[test]
    fn the_report_names_every_region() {
        let mut plan = ArenaPlan::default();
        plan.add("weights", 3 << 20).unwrap();
        plan.add("kv", 1 << 20).unwrap();
        assert_eq!(
            plan.report(),
            "weights         3.00 MiB  75.0 %\nkv              1.00 MiB  25.0 %\ntotal           4.00 MiB 100.0 %\n"
        );
    }
}
