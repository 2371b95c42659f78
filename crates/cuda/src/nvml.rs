//! Clocks, power and temperature of a GPU while it works, through NVIDIA's management library where there is one. Nothing in
//! this program needs it: it is for reports.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};

use libloading::Library;

use crate::library::{self, Wanted};
use crate::{Error, Result};

type Handle = *mut c_void;
type Init = unsafe extern "C" fn() -> c_int;
type ByBusId = unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int;
type OfKind = unsafe extern "C" fn(Handle, c_uint, *mut c_uint) -> c_int;
type Number = unsafe extern "C" fn(Handle, *mut c_uint) -> c_int;

const SYMBOLS: &[&str] = &[
    "nvmlInit_v2",
    "nvmlShutdown",
    "nvmlDeviceGetHandleByPciBusId_v2",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetMaxClockInfo",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetTemperature",
];
/// `NVML_CLOCK_SM`, `NVML_CLOCK_MEM`.
const CLOCKS: [(&str, &str, c_uint); 2] =
    [("sm_clock_mhz", "sm_clock_max_mhz", 1), ("memory_clock_mhz", "memory_clock_max_mhz", 2)];
/// `NVML_TEMPERATURE_GPU`.
const TEMPERATURE: c_uint = 0;

/// The library, for one GPU.
#[derive(Debug)]
pub(crate) struct Nvml {
    library: Library,
    gpu: Handle,
}

impl Nvml {
    /// For the GPU at `bus_id` of PCI.
    ///
    /// # Errors
    /// [`Error::LibraryMissing`], [`Error::LibraryTooOld`]; [`Error::Driver`] when it does not know the GPU.
    pub(crate) fn open(bus_id: &str) -> Result<Self> {
        let (library, _) = library::open(&Wanted {
            library: "NVIDIA's management library",
            candidates: vec!["libnvidia-ml.so.1".into(), "libnvidia-ml.so".into()],
            symbols: SYMBOLS,
            advice: "clocks and power are left out; it comes with the driver",
        })?;
        let failed = |call: &str, code: c_int| Error::Driver {
            call: call.to_owned(),
            code: code.unsigned_abs(),
            name: "NVML".to_owned(),
            message: format!("no answer for the GPU at {bus_id}"),
        };
        let mut this = Self { library, gpu: std::ptr::null_mut() };
        let bus_id = CString::new(bus_id).map_err(|_| Error::shape("bus id", "no zero bytes", bus_id))?;
        // SAFETY: the function has this type and no requirements.
        let code = unsafe { this.function::<Init>("nvmlInit_v2").map_or(-1, |init| init()) };
        if code != 0 {
            return Err(failed("nvmlInit", code));
        }
        let mut gpu = std::ptr::null_mut();
        // SAFETY: the function has this type; the string ends with a zero and the pointer is valid.
        let code = unsafe {
            this.function::<ByBusId>("nvmlDeviceGetHandleByPciBusId_v2")
                .map_or(-1, |find| find(bus_id.as_ptr(), &raw mut gpu))
        };
        if code != 0 {
            return Err(failed("nvmlDeviceGetHandleByPciBusId", code));
        }
        this.gpu = gpu;
        Ok(this)
    }

    /// What it says now: names with units. What a GPU does not say (GB10 leaves out some) is absent.
    pub(crate) fn now(&self) -> Vec<(String, f64)> {
        let mut values = Vec::new();
        let mut add = |name: &str, value: Option<c_uint>, unit: f64| {
            values.extend(value.map(|value| (name.to_owned(), f64::from(value) * unit)));
        };
        for (name, most, clock) in CLOCKS {
            add(name, self.of_kind("nvmlDeviceGetClockInfo", clock), 1.0);
            add(most, self.of_kind("nvmlDeviceGetMaxClockInfo", clock), 1.0);
        }
        add("temperature_celsius", self.of_kind("nvmlDeviceGetTemperature", TEMPERATURE), 1.0);
        let mut milliwatts = 0;
        // SAFETY: the function has this type; the handle is of this library and the pointer valid.
        let code = unsafe {
            self.function::<Number>("nvmlDeviceGetPowerUsage").map(|get| get(self.gpu, &raw mut milliwatts))
        };
        add("power_watts", (code == Some(0)).then_some(milliwatts), 1e-3);
        values
    }

    fn of_kind(&self, name: &str, kind: c_uint) -> Option<c_uint> {
        let mut value = 0;
        // SAFETY: the functions given here have this type; the handle is of this library and the pointer valid.
        let code = unsafe { self.function::<OfKind>(name)?(self.gpu, kind, &raw mut value) };
        (code == 0).then_some(value)
    }

    /// # Safety
    /// The function `name` must have type `F`.
    unsafe fn function<F: Copy>(&self, name: &str) -> Option<F> {
        // SAFETY: the caller's promise; the copy is used while the library is open.
        unsafe { self.library.get::<F>(name.as_bytes()).ok().map(|function| *function) }
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: the function has this type; it undoes one `nvmlInit`, and without one does nothing.
        unsafe { self.function::<Init>("nvmlShutdown").map(|shut_down| shut_down()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On any machine: no library, a library that does not know the GPU, never a panic.
    #[test]
    fn a_gpu_that_is_not_there_is_an_error() {
        let error = Nvml::open("ffff:ff:1f.0").unwrap_err();
        let is_known = matches!(
            error,
            Error::LibraryMissing { .. } | Error::LibraryTooOld { .. } | Error::Driver { .. }
        );
        assert!(is_known, "{error}");
        assert!(Nvml::open("a\0b").is_err());
    }
}
