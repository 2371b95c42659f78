//! Loaded modules, kernels and their launch: parameters as one struct, and the overlap of a kernel with its predecessor.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::sync::Arc as Shared;

use cudarc::driver::sys;

use crate::driver::{check, check_for};
use crate::{Device, Error, Result, Stream, Version};

/// The one parameter of a kernel: the same struct on both sides.
///
/// # Safety
/// The type must be `#[repr(C)]` without padding, with addresses as `u64`, and have the layout of the struct `NAME` in
/// the kernel's file. Sizes are compared when the kernel is compiled (`PARAMS` in `kernels/prelude.cuh`).
pub(crate) unsafe trait Params: Copy + 'static {
    /// Name of the struct in the kernel's file.
    const NAME: &'static str;
}

/// Blocks, threads and shared memory of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    /// Thread blocks.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) num_threads: u32,
    /// Shared memory of a block besides what the kernel declares, in bytes.
    pub(crate) shared_bytes: u32,
}

impl Launch {
    /// `num_blocks` blocks of `num_threads`.
    pub(crate) fn blocks(num_blocks: u32, num_threads: u32) -> Self {
        Self { grid: [num_blocks, 1, 1], num_threads, shared_bytes: 0 }
    }
}

/// A loaded cubin.
#[derive(Debug)]
pub(crate) struct Module {
    device: Device,
    handle: sys::CUmodule,
}

// SAFETY: a module is only read after it was loaded; the driver takes calls from any thread with its context current.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads `cubin`, which the compiler of version `nvrtc` made, where that is known.
    pub(crate) fn load(device: &Device, cubin: &[u8], nvrtc: Option<Version>) -> Result<Shared<Self>> {
        device.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the image is a whole cubin (its checksum was right, or it comes from the compiler); the driver copies
        // it. `Drop` unloads the module.
        let status = unsafe { sys::cuModuleLoadData(&raw mut handle, cubin.as_ptr().cast()) };
        check("cuModuleLoadData", status)
            .map_err(|error| refused_image(error, nvrtc, device.properties().driver))?;
        Ok(Shared::new(Self { device: device.clone(), handle }))
    }
}

/// Says where it can be known that the driver refuses an image because a newer compiler made it; else `error` as it is.
fn refused_image(error: Error, nvrtc: Option<Version>, driver: Version) -> Error {
    let refusals = [
        sys::CUresult::CUDA_ERROR_INVALID_IMAGE,
        sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU,
        sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
    ];
    match (error, nvrtc) {
        (Error::Driver { code, message, .. }, Some(nvrtc))
            if nvrtc > driver && refusals.iter().any(|&refusal| refusal as u32 == code) =>
        {
            Error::NvrtcTooNew { nvrtc, driver, refusal: message }
        }
        (error, _) => error,
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: unloaded once; its kernels hold the module, so none is left.
            unsafe { sys::cuModuleUnload(self.handle) };
        }
    }
}

/// A kernel that takes `P`.
#[derive(Debug)]
pub(crate) struct Kernel<P> {
    module: Shared<Module>,
    handle: sys::CUfunction,
    /// For errors.
    name: String,
    /// What the launch may ask for.
    max_threads: u32,
    /// Granted so far beyond what every kernel may have.
    max_shared_bytes: u32,
    params: PhantomData<P>,
}

// SAFETY: as for `Module`.
unsafe impl<P> Send for Kernel<P> {}
// SAFETY: as for `Module`.
unsafe impl<P> Sync for Kernel<P> {}

impl<P: Params> Kernel<P> {
    /// The kernel `name` of a module; launches may use up to `shared_bytes` of dynamic shared memory.
    pub(crate) fn new(module: &Shared<Module>, name: &str, shared_bytes: u32) -> Result<Self> {
        module.device.bind()?;
        let mut handle = std::ptr::null_mut();
        let c_name =
            CString::new(name).map_err(|_| Error::shape("kernel", "a name without zero bytes", name))?;
        // SAFETY: the module lives; name and pointer are valid.
        let status = unsafe { sys::cuModuleGetFunction(&raw mut handle, module.handle, c_name.as_ptr()) };
        check_for(status, || format!("cuModuleGetFunction of {name}"))?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function lives as long as its module.
        let status = unsafe { sys::cuFuncSetAttribute(handle, attribute, shared_bytes as i32) };
        check("cuFuncSetAttribute", status)?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        let mut max_threads = 0;
        // SAFETY: as above; the pointer is valid.
        let status = unsafe { sys::cuFuncGetAttribute(&raw mut max_threads, attribute, handle) };
        check("cuFuncGetAttribute", status)?;
        Ok(Self {
            module: Shared::clone(module),
            handle,
            name: name.into(),
            max_threads: max_threads.unsigned_abs(),
            max_shared_bytes: shared_bytes,
            params: PhantomData,
        })
    }

    /// As [`Kernel::new`], for kernels that follow each other in steps of few rows: all ask for the most shared memory, because on a
    /// multiprocessor kernels that want different shares of the first-level cache cannot overlap, which is what their early start is
    /// for. Kernels that read much through that cache do without.
    pub(crate) fn overlapping(module: &Shared<Module>, name: &str, shared_bytes: u32) -> Result<Self> {
        /// In percent.
        const MOST: i32 = 100;
        let kernel = Self::new(module, name, shared_bytes)?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        // SAFETY: the function lives as long as its module, whose device `new` has bound.
        let status = unsafe { sys::cuFuncSetAttribute(kernel.handle, attribute, MOST) };
        check("cuFuncSetAttribute", status)?;
        Ok(kernel)
    }

    /// Puts the kernel into `stream`. Where the device can, it starts before its predecessor has ended, and waits for it
    /// where its code says `wait_for_predecessor` (`kernels/prelude.cuh`).
    ///
    /// # Safety
    /// Every address in `params` must point to memory of the stream's device with the size, alignment and type that the
    /// kernel expects for these parameters, valid until the kernel has run.
    pub(crate) unsafe fn launch(&self, stream: &Stream, launch: Launch, params: &P) -> Result<()> {
        let overlaps = self.module.device.arch().has_dependent_launch();
        // SAFETY: the caller's promise is that of this function.
        unsafe { self.launch_as(stream, launch, params, overlaps) }
    }

    /// [`Self::launch`] that starts when its predecessor has ended, to measure what the overlap saves.
    ///
    /// # Safety
    /// As for [`Self::launch`].
    pub(crate) unsafe fn launch_in_order(&self, stream: &Stream, launch: Launch, params: &P) -> Result<()> {
        // SAFETY: the caller's promise is that of this function.
        unsafe { self.launch_as(stream, launch, params, false) }
    }

    unsafe fn launch_as(&self, stream: &Stream, launch: Launch, params: &P, overlaps: bool) -> Result<()> {
        if launch.num_threads > self.max_threads || launch.shared_bytes > self.max_shared_bytes {
            let expected = format!("at most {} threads, {} bytes", self.max_threads, self.max_shared_bytes);
            return Err(Error::shape(P::NAME, expected, launch));
        }
        if launch.grid.contains(&0) {
            return Ok(());
        }
        stream.keep_module(&self.module);
        // Other libraries' kernels do not say when a successor may start, nor do all their operations run on a kernel's terms.
        let overlaps = !stream.take_foreign() && overlaps;
        stream.device().bind()?;
        let mut overlap = sys::CUlaunchAttribute_st {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue_union { pad: [0; 64] },
        };
        overlap.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig_st {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.num_threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: stream.handle(),
            attrs: &raw mut overlap,
            numAttrs: overlaps.into(),
        };
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: stream, function and module live; the driver reads the one parameter, of the size that the kernel was
        // compiled with, during this call; what it points to is the caller's promise.
        let status = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.handle,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check_for(status, || format!("cuLaunchKernelEx of {}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_newer_compiler_is_blamed_for_a_refused_image() {
        let refused = |code: sys::CUresult, nvrtc: Option<Version>| {
            let error = Error::Driver {
                call: "cuModuleLoadData".into(),
                code: code as u32,
                name: "CUDA_ERROR".into(),
                message: "the reason".into(),
            };
            refused_image(error, nvrtc, Version { major: 12, minor: 9 })
        };
        let invalid = sys::CUresult::CUDA_ERROR_INVALID_IMAGE;
        let [older, newer] = [Version { major: 12, minor: 9 }, Version { major: 13, minor: 0 }];
        let message = refused(invalid, Some(newer)).to_string();
        assert!(
            message.starts_with(
                "the driver (CUDA 12.9) refuses a kernel that the newer NVRTC 13.0 made (the reason)"
            ),
            "{message}"
        );
        for (code, nvrtc) in
            [(invalid, Some(older)), (invalid, None), (sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY, Some(newer))]
        {
            assert!(matches!(refused(code, nvrtc), Error::Driver { .. }), "{code:?} {nvrtc:?}");
        }
    }
}
