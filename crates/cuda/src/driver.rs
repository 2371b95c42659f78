//! The CUDA driver: opening it, its version, its errors. Everything that needs a device is in `device.rs`.

use std::ffi::CStr;

use cudarc::driver::sys;

use crate::library::{self, Wanted};
use crate::{Device, Error, Result, Version};

/// Every driver function that this crate calls, so that a driver without one is refused before anything runs (the
/// bindings look functions up at their first use and panic when one is missing).
const SYMBOLS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemAllocManaged",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemFreeHost",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuIpcCloseMemHandle",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphGetNodes",
    "cuGraphLaunch",
    "cuGraphUpload",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventElapsedTime_v2",
    "cuEventDestroy_v2",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuLaunchKernelEx",
];

/// The opened driver.
#[derive(Debug, Clone, Copy)]
pub struct Driver {
    version: Version,
}

impl Driver {
    /// Opens and initialises the driver of this machine.
    ///
    /// # Errors
    /// [`Error::LibraryMissing`] without a driver, [`Error::LibraryTooOld`] with one from before CUDA 12.8,
    /// [`Error::NoDevice`] without a GPU, [`Error::Driver`] for anything else.
    pub fn open() -> Result<Self> {
        // The bindings try both names, too.
        Self::open_library(&["libcuda.so", "libcuda.so.1"])
    }

    fn open_library(names: &[&str]) -> Result<Self> {
        // The bindings open the library by themselves, and panic if they cannot.
        let (library, _) = library::open(&Wanted {
            library: "the NVIDIA driver",
            candidates: names.iter().map(Into::into).collect(),
            symbols: SYMBOLS,
            advice: "install the NVIDIA driver (580 or newer); in a container start it with --gpus all",
        })?;
        // It stays loaded for the life of the process, as the bindings' own handle does.
        std::mem::forget(library);
        let mut version = 0;
        // SAFETY: needs no initialisation; the pointer is valid.
        check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
        let version =
            Version { major: version.unsigned_abs() / 1000, minor: version.unsigned_abs() % 1000 / 10 };
        // SAFETY: may be called any number of times; the flags must be 0.
        let status = unsafe { sys::cuInit(0) };
        if status == sys::CUresult::CUDA_ERROR_NO_DEVICE {
            return Err(Error::NoDevice { ordinal: 0, count: 0, driver: version });
        }
        check("cuInit", status)?;
        Ok(Self { version })
    }

    /// The CUDA version that the driver speaks.
    pub fn version(&self) -> Version {
        self.version
    }

    /// GPUs of this process.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn num_devices(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: the driver is initialised; the pointer is valid.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
        Ok(count.max(0) as usize)
    }

    /// Takes GPU `ordinal` into use.
    ///
    /// # Errors
    /// [`Error::NoDevice`], [`Error::UnsupportedDevice`] or [`Error::Driver`].
    pub fn device(&self, ordinal: usize) -> Result<Device> {
        let count = self.num_devices()?;
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count, driver: self.version });
        }
        Device::open(*self, ordinal)
    }
}

/// An error of `call` unless it succeeded.
pub(crate) fn check(call: &str, status: sys::CUresult) -> Result<()> {
    check_for(status, || call.to_owned())
}

/// [`check`] of a call that is only named when it failed.
pub(crate) fn check_for(status: sys::CUresult, call: impl FnOnce() -> String) -> Result<()> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the pointer is valid; the driver answers with a string that lives forever, or leaves null.
        unsafe {
            get(status, &raw mut text);
            if text.is_null() {
                "unknown".into()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        }
    };
    Err(Error::Driver {
        call: call(),
        code: status as u32,
        name: text(sys::cuGetErrorName),
        message: text(sys::cuGetErrorString),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_gets_one_sentence() {
        let error = Driver::open_library(&["libabsent-cuda.so.1"]).unwrap_err().to_string();
        assert!(
            error.starts_with("the NVIDIA driver is not on this machine: tried libabsent-cuda.so.1; install"),
            "{error}"
        );
        assert!(!error.contains('\n'));
        assert!(!error.contains("--device"), "not every command has it: {error}");
    }

    #[test]
    fn a_library_that_is_no_driver_is_refused_before_the_bindings_call_it() {
        let error = Driver::open_library(&["libc.so.6"]).unwrap_err().to_string();
        assert!(error.contains("(libc.so.6) is too old: it has no function `cuInit`"), "{error}");
    }

    /// On any machine: a driver of a usable version, or an error that says what is missing.
    #[test]
    fn opening_the_driver_never_panics() {
        match Driver::open() {
            Ok(driver) => assert!(driver.version() >= Version { major: 12, minor: 8 }),
            Err(Error::LibraryMissing { tried, .. }) => assert_eq!(tried, ["libcuda.so", "libcuda.so.1"]),
            Err(error) => assert!(
                matches!(error, Error::NoDevice { .. } | Error::LibraryTooOld { .. } | Error::Driver { .. }),
                "{error}"
            ),
        }
    }

    /// Every function of the bindings that this crate calls is in the list, and nothing else is.
    #[test]
    fn the_list_of_functions_is_that_of_the_code() {
        let sources = [
            include_str!("driver.rs"),
            include_str!("device.rs"),
            include_str!("host_buffer.rs"),
            include_str!("launch.rs"),
            include_str!("mailbox.rs"),
            include_str!("probe/mod.rs"),
            include_str!("probe/memory.rs"),
            include_str!("stream.rs"),
        ];
        let mut called: Vec<&str> = sources
            .iter()
            .flat_map(|source| source.split("sys::cu").skip(1))
            .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap())
            // Types start with `CU`, functions with `cu` and a capital.
            .filter(|name| name.starts_with(char::is_uppercase))
            .collect();
        called.sort_unstable();
        called.dedup();
        let mut listed: Vec<&str> = SYMBOLS.iter().map(|name| &name[2..]).collect();
        listed.sort_unstable();
        assert_eq!(called, listed);
    }
}
