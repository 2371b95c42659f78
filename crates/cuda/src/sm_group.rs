//! A part of a GPU's multiprocessors (a "green context" of the driver), for streams that stand for a smaller GPU. Memory,
//! modules and kernels stay those of the device.

use cudarc::driver::sys;

use crate::driver::check;
use crate::library::{self, Wanted};
use crate::{Device, Error, Result};

/// The functions that are called here; drivers from CUDA 12.4 on have them.
const SYMBOLS: &[&str] = &[
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxDestroy",
    "cuGreenCtxStreamCreate",
];

/// Multiprocessors that are set apart.
#[derive(Debug)]
pub(crate) struct SmGroup {
    device: Device,
    handle: sys::CUgreenCtx,
    num_sms: u32,
}

// SAFETY: the driver takes calls on a green context from any thread; after the start it is only read.
unsafe impl Send for SmGroup {}

impl SmGroup {
    /// Exactly `num_sms` multiprocessors of `device`.
    pub(crate) fn new(device: &Device, num_sms: u32) -> Result<Self> {
        const OP: &str = "multiprocessors";
        let (library, _) = library::open(&Wanted {
            library: "the NVIDIA driver",
            candidates: vec!["libcuda.so".into(), "libcuda.so.1".into()],
            symbols: SYMBOLS,
            advice: "running on a part of the multiprocessors (--sms) needs driver 550 or newer",
        })?;
        // The bindings hold the library open as well.
        drop(library);
        let most = device.properties().num_sms;
        if num_sms == 0 || num_sms > most {
            return Err(Error::shape(OP, format!("1 to {most} of {}", device.properties().name), num_sms));
        }
        device.bind()?;
        let mut all = empty();
        let kind = sys::CUdevResourceType::CU_DEV_RESOURCE_TYPE_SM;
        // SAFETY: the device is in use; the pointer is valid.
        let status = unsafe { sys::cuDeviceGetDevResource(device.handle(), &raw mut all, kind) };
        check("cuDeviceGetDevResource", status)?;
        let (mut part, mut rest, mut count) = (empty(), empty(), 1);
        // SAFETY: `all` is the device's; the driver writes one part, as `count` says, and the rest.
        let status = unsafe {
            sys::cuDevSmResourceSplitByCount(
                &raw mut part,
                &raw mut count,
                &raw const all,
                &raw mut rest,
                0,
                num_sms,
            )
        };
        check("cuDevSmResourceSplitByCount", status)?;
        // SAFETY: a resource of multiprocessors has this member.
        let given = unsafe { part.__bindgen_anon_1.sm.smCount };
        if count != 1 || given != num_sms {
            let expected = format!("a number that the driver can set apart on {}", device.properties().name);
            return Err(Error::shape(OP, format!("{expected}, such as {given}"), num_sms));
        }
        let (mut description, mut handle) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: one resource, made above; the pointer is valid.
        let status = unsafe { sys::cuDevResourceGenerateDesc(&raw mut description, &raw mut part, 1) };
        check("cuDevResourceGenerateDesc", status)?;
        let flags = sys::CUgreenCtxCreate_flags::CU_GREEN_CTX_DEFAULT_STREAM as u32;
        // SAFETY: the description was just made for this device; `Drop` destroys the context.
        let status = unsafe { sys::cuGreenCtxCreate(&raw mut handle, description, device.handle(), flags) };
        check("cuGreenCtxCreate", status)?;
        Ok(Self { device: device.clone(), handle, num_sms })
    }

    /// How many.
    pub(crate) fn num_sms(&self) -> u32 {
        self.num_sms
    }

    /// A stream on them; the caller destroys it before the group.
    pub(crate) fn create_stream(&self) -> Result<sys::CUstream> {
        self.device.bind()?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context lives; the pointer is valid.
        let status = unsafe { sys::cuGreenCtxStreamCreate(&raw mut stream, self.handle, flags, 0) };
        check("cuGreenCtxStreamCreate", status)?;
        Ok(stream)
    }
}

impl Drop for SmGroup {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: destroyed once, after its stream (fields are dropped after the `drop` of what holds them).
            unsafe { sys::cuGreenCtxDestroy(self.handle) };
        }
    }
}

fn empty() -> sys::CUdevResource {
    // SAFETY: numbers and bytes alone, for which zeros are valid (type 0 is "invalid").
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every function of the bindings that is called here is in the list, and nothing else is.
    #[test]
    fn the_list_of_functions_is_that_of_the_code() {
        let mut called: Vec<&str> = include_str!("sm_group.rs")
            .split("sys::cu")
            .skip(1)
            .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap())
            .filter(|name| name.starts_with(char::is_uppercase))
            .collect();
        called.sort_unstable();
        called.dedup();
        let mut listed: Vec<&str> = SYMBOLS.iter().map(|name| &name[2..]).collect();
        listed.sort_unstable();
        assert_eq!(called, listed);
    }
}
