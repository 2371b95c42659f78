//! Memory of the host that the device reads and writes by itself (pinned), for copies that nobody waits for. Bytes; who
//! may touch them when is said where copies are put into a stream.

use cudarc::driver::sys;

use crate::driver::check;
use crate::{Device, Error, Result};

/// Pinned bytes, zero at first. Freed when dropped, after which no copy may use them.
#[derive(Debug)]
pub struct HostBuffer {
    device: Device,
    pointer: *mut u8,
    /// Where the device sees them.
    address: u64,
    num_bytes: usize,
}

// SAFETY: memory of the process, valid in every thread; references to it follow the rules of `&` and `&mut`.
unsafe impl Send for HostBuffer {}
// SAFETY: as above; `&HostBuffer` gives out `&[u8]` alone.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    /// `num_bytes` bytes.
    ///
    /// # Errors
    /// [`Error::Memory`] when the system does not give them, [`Error::AllocationAfterStart`], [`Error::Driver`].
    pub fn new(device: &Device, num_bytes: u64) -> Result<Self> {
        let what = "pinned memory of the host";
        let memory = |available| Error::Memory { what, needed: num_bytes, available };
        let size = usize::try_from(num_bytes.max(1)).map_err(|_| memory(0))?;
        device.count_allocation(what, num_bytes)?;
        device.bind()?;
        let mut pointer = std::ptr::null_mut();
        // Not write-combined: what comes back from the device is read here, and packing is not strictly sequential.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the context is current; the pointer is valid; `Drop` frees it.
        let status = unsafe { sys::cuMemHostAlloc(&raw mut pointer, size, flags) };
        if status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(memory(spark_backend::Memory::of_machine().available));
        }
        check("cuMemHostAlloc", status)?;
        let mut buffer =
            Self { device: device.clone(), pointer: pointer.cast(), address: 0, num_bytes: size };
        // SAFETY: allocated with `size` bytes.
        unsafe { buffer.pointer.write_bytes(0, size) };
        // SAFETY: the pointer is of a mapped allocation; the flags must be 0.
        let status = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut buffer.address, pointer, 0) };
        check("cuMemHostGetDevicePointer", status)?;
        Ok(buffer)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `num_bytes` initialised bytes that live as long as `self`; copies to them are in nobody's way by the promise
        // of `Stream::download_to`.
        unsafe { std::slice::from_raw_parts(self.pointer, self.num_bytes) }
    }

    /// The bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, with `Stream::upload_from`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.num_bytes) }
    }

    /// Where kernels find the bytes.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.pointer
    }

    /// An error of `op` unless this belongs to `device` and holds `num_bytes` from `offset` on.
    pub(crate) fn holds(
        &self,
        op: &'static str,
        device: &Device,
        offset: usize,
        num_bytes: usize,
    ) -> Result<()> {
        if !self.device.is(device) {
            return Err(Error::shape(op, "memory of the stream's device", "memory of another"));
        }
        if offset.checked_add(num_bytes).is_none_or(|end| end > self.num_bytes) {
            return Err(Error::shape(op, format!("a part of {} bytes", self.num_bytes), (offset, num_bytes)));
        }
        Ok(())
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in this context and freed once.
            unsafe { sys::cuMemFreeHost(self.pointer.cast()) };
        }
    }
}
