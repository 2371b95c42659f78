//! What a GPU and the way to it can do, measured: reading by kind of memory, copies, products by type, the time between
//! kernels, clocks under load. For machines that the program's authors do not have; nothing is decided by it.
//!
//! A measurement that a machine does not allow is named with its reason instead of ending the run.

mod gaps;
mod memory;
mod rates;

use cudarc::driver::sys;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

use crate::driver::check;
use crate::kernels::Probe;
use crate::{Cubins, Device, Kernels, Nvfp4Test, Result, Stream};

/// Numbers by name (the name ends in the unit), and what is missing with its reason.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Findings {
    /// What the driver says of the device, not measured.
    pub device: Vec<(String, f64)>,
    /// What was measured.
    pub measured: Vec<(String, f64)>,
    /// What was not, and why.
    pub missing: Vec<(String, String)>,
}

impl Findings {
    fn add(&mut self, name: impl Into<String>, value: f64) {
        self.measured.push((name.into(), value));
    }

    /// Notes what `measure` adds, or under `name` why it failed.
    fn attempt(&mut self, name: &str, measure: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(error) = measure(self) {
            self.missing.push((name.to_owned(), error.to_string()));
        }
    }
}

/// What all measurements use.
struct Bed {
    stream: Stream,
    kernels: Probe,
}

/// Measures `device`: about ten seconds, 2 GB of its memory, 256 MiB of the host's.
///
/// # Errors
/// When the kernels cannot be loaded or the device does not answer; a single measurement that fails is in
/// [`Findings::missing`].
pub fn run(device: &Device, cubins: &Cubins) -> Result<Findings> {
    let bed = Bed { stream: Stream::new(device)?, kernels: Probe::load(device, cubins)? };
    let mut findings = Findings { device: facts(device)?, ..Findings::default() };
    memory::measure(&bed, &mut findings);
    gaps::measure(&bed, &mut findings);
    rates::measure(&bed, &mut findings);
    findings.attempt("nvfp4_test", |findings| test_nvfp4(device, cubins, &bed, findings));
    Ok(findings)
}

/// The test that a start with FP4 products makes: whether scales and codes reach the right numbers.
fn test_nvfp4(device: &Device, cubins: &Cubins, bed: &Bed, findings: &mut Findings) -> Result<()> {
    match Kernels::load(device, cubins)?.test_nvfp4(device, &bed.stream)? {
        Nvfp4Test::Passed { change, error } => {
            findings.add("nvfp4_test_w4a4_against_w4a16", change);
            findings.add("nvfp4_test_against_definition", error);
        }
        other => findings.missing.push(("nvfp4_test".to_owned(), other.to_string())),
    }
    Ok(())
}

const FACTS: [(&str, Attribute); 12] = [
    ("multiprocessors", Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
    ("compute_capability_major", Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
    ("compute_capability_minor", Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    ("l2_bytes", Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
    ("shared_bytes_per_block", Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
    ("shared_bytes_per_multiprocessor", Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR),
    ("memory_bus_bits", Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH),
    ("is_integrated", Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED),
    ("copy_engines", Attribute::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT),
    ("concurrent_managed_access", Attribute::CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS),
    ("pageable_memory_access", Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS),
    (
        "uses_page_tables_of_the_host",
        Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES,
    ),
];

fn facts(device: &Device) -> Result<Vec<(String, f64)>> {
    FACTS.iter().map(|&(name, key)| Ok((name.to_owned(), attribute(device, key)?.into()))).collect()
}

fn attribute(device: &Device, attribute: Attribute) -> Result<u32> {
    let mut value = 0;
    // SAFETY: the device is in use; the pointer is valid.
    let status = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device.handle()) };
    check("cuDeviceGetAttribute", status)?;
    Ok(value.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn what_fails_is_missing_with_its_reason() {
        let mut findings = Findings::default();
        findings.attempt("a_us", |findings| {
            findings.add("a_us", 2.0);
            Ok(())
        });
        findings.attempt("b_us", |_| Err(Error::shape("op", "this", "that")));
        assert_eq!(findings.measured, [("a_us".to_owned(), 2.0)]);
        assert_eq!(findings.missing.len(), 1);
        assert!(findings.missing[0].0 == "b_us" && findings.missing[0].1.contains("expected this"));
    }
}
