//! Bytes a second: kernels that read device, pinned, managed and ordinary memory, and the copies between host and device.

use std::ffi::c_uint;

use cudarc::driver::sys;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::{Bed, Findings, attribute};
use crate::bench::time;
use crate::bench_gemm::memory;
use crate::driver::check;
use crate::{Device, DeviceSlice, Error, Event, HostBuffer, Result};

/// More than any second-level cache holds.
const DEVICE_BYTES: u64 = 512 << 20;
const HOST_BYTES: u64 = 256 << 20;
/// Launches between two looks at the clock.
const LAUNCHES: usize = 3;

pub(super) fn measure(bed: &Bed, findings: &mut Findings) {
    findings.attempt("device_memory", |findings| device(bed, findings));
    findings.attempt("pinned_memory", |findings| pinned(bed, findings));
    findings.attempt("managed_memory", |findings| managed(bed, findings));
    findings.attempt("pageable_memory", |findings| pageable(bed, findings));
}

/// In units of 1e9.
fn gb_per_second(num_bytes: u64, micros: f64) -> f64 {
    num_bytes as f64 / micros / 1e3
}

fn device(bed: &Bed, findings: &mut Findings) -> Result<()> {
    let [source, target] = memory(bed.stream.device(), [DEVICE_BYTES; 2])?;
    bed.stream.fill(&source, 0x5a)?;
    // SAFETY: the kernel reads the slice, which lives until the graph has run.
    let read = time(&bed.stream, LAUNCHES, |_| unsafe {
        bed.kernels.read(&bed.stream, source.address(), DEVICE_BYTES, &target)
    })?;
    findings.add("device_read_gb_per_s", gb_per_second(DEVICE_BYTES, read));
    let copy = time(&bed.stream, LAUNCHES, |_| bed.kernels.copy(&bed.stream, &target, &source))?;
    findings.add("device_copy_by_kernel_gb_per_s", gb_per_second(2 * DEVICE_BYTES, copy));
    let copy = time(&bed.stream, LAUNCHES, |_| bed.stream.copy(&target, &source))?;
    findings.add("device_copy_by_driver_gb_per_s", gb_per_second(2 * DEVICE_BYTES, copy));
    Ok(())
}

/// Pinned memory of the host: read in place by a kernel, and copied.
fn pinned(bed: &Bed, findings: &mut Findings) -> Result<()> {
    let buffer = HostBuffer::new(bed.stream.device(), HOST_BYTES)?;
    let [slice, sink] = memory(bed.stream.device(), [HOST_BYTES, 16])?;
    // SAFETY: pinned memory, which the device reads; it lives until the graph has run.
    let read = time(&bed.stream, LAUNCHES, |_| unsafe {
        bed.kernels.read(&bed.stream, buffer.address(), HOST_BYTES, &sink)
    })?;
    findings.add("pinned_read_gb_per_s", gb_per_second(HOST_BYTES, read));
    // SAFETY: nobody touches the buffer before `of_copies` has waited.
    let up = of_copies(bed, || unsafe { bed.stream.upload_from(&slice, &buffer, 0) })?;
    findings.add("host_to_device_gb_per_s", gb_per_second(HOST_BYTES, up));
    // SAFETY: as above.
    let down = of_copies(bed, || unsafe { bed.stream.download_to(&buffer, 0, &slice) })?;
    findings.add("device_to_host_gb_per_s", gb_per_second(HOST_BYTES, down));
    Ok(())
}

/// Microseconds of a copy that cannot be recorded; waits for it.
fn of_copies(bed: &Bed, copy: impl Fn() -> Result<()>) -> Result<f64> {
    copy()?;
    let (start, end) = (Event::new(bed.stream.device())?, Event::new(bed.stream.device())?);
    start.record(&bed.stream)?;
    (0..LAUNCHES).try_for_each(|_| copy())?;
    end.record(&bed.stream)?;
    end.synchronize()?;
    Ok(end.micros_since(&start)? / LAUNCHES as f64)
}

fn managed(bed: &Bed, findings: &mut Findings) -> Result<()> {
    let mut buffer = Managed::new(bed.stream.device(), HOST_BYTES)?;
    let [sink] = memory(bed.stream.device(), [16])?;
    buffer.bytes_mut().fill(0x5a);
    // SAFETY: managed memory, which the device reads; it lives until the kernels have run, which `read_twice` waits for.
    let [first, later] = unsafe { read_twice(bed, buffer.address, &sink)? };
    findings.add("managed_first_read_gb_per_s", gb_per_second(HOST_BYTES, first));
    findings.add("managed_read_gb_per_s", gb_per_second(HOST_BYTES, later));
    Ok(())
}

/// Memory as `malloc` gives it, where the device can read that.
fn pageable(bed: &Bed, findings: &mut Findings) -> Result<()> {
    if attribute(bed.stream.device(), Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS)? == 0 {
        return Err(Error::shape(
            "pageable memory",
            "a device that reads ordinary memory",
            "one that does not",
        ));
    }
    let [sink] = memory(bed.stream.device(), [16])?;
    // Vectors of 16 bytes: the allocation starts where they may.
    let buffer = vec![[0x5a5a_5a5a_5a5a_5a5a_u64; 2]; HOST_BYTES as usize / 16];
    let address = buffer.as_ptr() as u64;
    if !address.is_multiple_of(16) {
        return Err(Error::shape("pageable memory", "an address that 16 divides", address));
    }
    // SAFETY: the device reads ordinary memory (checked above); it lives until the kernels have run, which `read_twice`
    // waits for.
    let [first, later] = unsafe { read_twice(bed, address, &sink)? };
    findings.add("pageable_first_read_gb_per_s", gb_per_second(HOST_BYTES, first));
    findings.add("pageable_read_gb_per_s", gb_per_second(HOST_BYTES, later));
    drop(buffer);
    Ok(())
}

/// Microseconds of the first read of [`HOST_BYTES`] bytes by the device, which may move their pages, and of later ones.
///
/// # Safety
/// The device must be able to read them until this returns.
unsafe fn read_twice(bed: &Bed, address: u64, sink: &DeviceSlice) -> Result<[f64; 2]> {
    // SAFETY: the caller's promise.
    let read = || unsafe { bed.kernels.read(&bed.stream, address, HOST_BYTES, sink) };
    let (start, end) = (Event::new(bed.stream.device())?, Event::new(bed.stream.device())?);
    start.record(&bed.stream)?;
    read()?;
    end.record(&bed.stream)?;
    end.synchronize()?;
    let later = time(&bed.stream, LAUNCHES, |_| read())?;
    Ok([end.micros_since(&start)?, later])
}

/// Memory that the driver moves to where it is used.
struct Managed {
    device: Device,
    address: sys::CUdeviceptr,
    num_bytes: usize,
}

impl Managed {
    fn new(device: &Device, num_bytes: u64) -> Result<Self> {
        const WHAT: &str = "managed memory";
        device.count_allocation(WHAT, num_bytes)?;
        device.bind()?;
        let mut address = 0;
        let flags = sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as c_uint;
        // SAFETY: the context is current; the pointer is valid; `Drop` frees it.
        let status = unsafe { sys::cuMemAllocManaged(&raw mut address, num_bytes as usize, flags) };
        check("cuMemAllocManaged", status)?;
        Ok(Self { device: device.clone(), address, num_bytes: num_bytes as usize })
    }

    /// For the time before the device uses it.
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as many bytes, valid on the host too; fresh pages are zero; no kernel runs on them yet.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.num_bytes) }
    }
}

impl Drop for Managed {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in this context and freed once.
            unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}
