//! One GPU: its context, what it is, how much memory it has. Streams, memory and modules are made from it.

use std::ffi::c_int;
use std::sync::Arc as Shared;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cudarc::driver::sys;
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use spark_backend::Memory;

use crate::driver::check;
use crate::{Arch, Driver, Error, Result, Version};

/// What is left to the system on a GPU that shares the machine's memory: 6 GiB. GB10 machines that were filled to the
/// last byte had to be switched off.
const RESERVE: u64 = 6 << 30;

/// A GPU in use. Clones are the same device; the last one lets go of it.
#[derive(Debug, Clone)]
pub struct Device {
    inner: Shared<Inner>,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// As the driver calls it.
    pub name: String,
    /// Compile target of its kernels.
    pub arch: Arch,
    /// CUDA version of the driver.
    pub driver: Version,
    /// Streaming multiprocessors.
    pub num_sms: u32,
    /// Most shared memory of one thread block, in bytes.
    pub shared_bytes_per_block: u32,
    /// Second-level cache, in bytes.
    pub l2_bytes: u64,
    /// Whether it shares the machine's memory, as GB10 does.
    pub is_integrated: bool,
}

#[derive(Debug)]
struct Inner {
    handle: sys::CUdevice,
    context: sys::CUcontext,
    properties: Properties,
    /// Allocations so far.
    num_allocations: AtomicU64,
    /// No further allocation is allowed.
    sealed: AtomicBool,
}

// SAFETY: a CUDA context may be used from any thread that makes it current, which every call of this crate does.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Inner {}

impl Device {
    pub(crate) fn open(driver: Driver, ordinal: usize) -> Result<Self> {
        let mut handle = 0;
        // SAFETY: the driver is initialised (a `Driver` exists); the pointer is valid.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut handle, ordinal as c_int) })?;
        let properties = properties(driver, handle)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the handle is a device; `Drop` releases what is retained here.
        let status = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, handle) };
        check("cuDevicePrimaryCtxRetain", status)?;
        let inner = Inner { handle, context, properties, num_allocations: 0.into(), sealed: false.into() };
        let device = Self { inner: Shared::new(inner) };
        device.bind()?;
        Ok(device)
    }

    /// What it is.
    pub fn properties(&self) -> &Properties {
        &self.inner.properties
    }

    /// Where it sits: domain, bus, device and function of PCI, such as `0000:01:00.0`.
    pub(crate) fn bus_id(&self) -> Result<String> {
        let mut id = [0u8; 32];
        // SAFETY: the driver writes at most `id.len()` bytes, with a zero at the end.
        let status =
            unsafe { sys::cuDeviceGetPCIBusId(id.as_mut_ptr().cast(), id.len() as c_int, self.inner.handle) };
        check("cuDeviceGetPCIBusId", status)?;
        let id = id.split(|&byte| byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(id).into_owned())
    }

    /// Compile target of its kernels.
    pub fn arch(&self) -> Arch {
        self.inner.properties.arch
    }

    pub(crate) fn handle(&self) -> sys::CUdevice {
        self.inner.handle
    }

    /// Whether both are the same device.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Shared::ptr_eq(&self.inner, &other.inner)
    }

    /// Makes the device current in this thread; every call that needs it does.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `inner` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.inner.context) })
    }

    /// How much memory there is and how much of it may be planned. A GPU with memory of its own is asked for it; one that
    /// shares the machine's memory counts the page cache as used, so there the system is asked instead, and a reserve
    /// is left to it: a machine without free memory stops as a whole.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn memory(&self) -> Result<Memory> {
        if self.inner.properties.is_integrated {
            return Ok(without_reserve(Memory::of_machine()));
        }
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; the pointers are valid.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok(Memory { total: total as u64, available: free as u64, is_shared: false })
    }

    /// Forbids further device allocations: called when the start is over.
    pub fn seal(&self) {
        self.inner.sealed.store(true, Ordering::Release);
    }

    /// Counts an allocation of pinned memory of the host; an error after the start.
    pub(crate) fn count_allocation(&self, what: &'static str, num_bytes: u64) -> Result<()> {
        if self.inner.sealed.load(Ordering::Acquire) {
            return Err(Error::AllocationAfterStart { what, bytes: num_bytes });
        }
        self.inner.num_allocations.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Allocations so far, on the device and of pinned memory, for tests: the number must not grow after the start.
    pub fn num_allocations(&self) -> u64 {
        self.inner.num_allocations.load(Ordering::Acquire)
    }

    /// Allocates device memory; `what` names it in errors.
    pub(crate) fn allocate(&self, what: &'static str, num_bytes: u64) -> Result<DeviceMemory> {
        if self.inner.sealed.load(Ordering::Acquire) {
            return Err(Error::AllocationAfterStart { what, bytes: num_bytes });
        }
        let available = self.memory()?.available;
        if num_bytes > available {
            return Err(Error::Memory { what, needed: num_bytes, available });
        }
        let mut address = 0;
        // The driver refuses empty allocations.
        // SAFETY: the context is current since `memory`; the pointer is valid; `DeviceMemory` frees it.
        let status = unsafe { sys::cuMemAlloc_v2(&raw mut address, num_bytes.max(1) as usize) };
        if status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::Memory { what, needed: num_bytes, available });
        }
        check("cuMemAlloc", status)?;
        self.inner.num_allocations.fetch_add(1, Ordering::AcqRel);
        Ok(DeviceMemory { device: self.clone(), address })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; everything made in the context holds a clone of the device and is gone.
        // There is nothing to do about an error here.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}

/// An allocation, freed when dropped.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    device: Device,
    address: sys::CUdeviceptr,
}

impl DeviceMemory {
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in this context and freed once; cuMemFree waits for the work that uses it.
            unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// What may be planned of the machine's memory.
fn without_reserve(memory: Memory) -> Memory {
    Memory { available: memory.available.saturating_sub(RESERVE), ..memory }
}

fn properties(driver: Driver, handle: sys::CUdevice) -> Result<Properties> {
    let attribute = |attribute: Attribute| {
        let mut value = 0;
        // SAFETY: the handle is a device; the pointer is valid.
        check("cuDeviceGetAttribute", unsafe {
            sys::cuDeviceGetAttribute(&raw mut value, attribute, handle)
        })?;
        Ok::<_, Error>(value.unsigned_abs())
    };
    let mut name = [0u8; 256];
    // SAFETY: the driver writes at most `name.len()` bytes, with a zero at the end.
    let status = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, handle) };
    check("cuDeviceGetName", status)?;
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let Some(arch) = Arch::for_capability(major, minor) else {
        return Err(Error::UnsupportedDevice { name, major, minor });
    };
    Ok(Properties {
        name,
        arch,
        driver: driver.version(),
        num_sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
        is_integrated: attribute(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_left_to_the_system() {
        let machine = |available| Memory { total: 120 << 30, available, is_shared: true };
        assert_eq!(without_reserve(machine(100 << 30)), machine(94 << 30));
        assert_eq!(without_reserve(machine(5 << 30)), machine(0));
    }
}
