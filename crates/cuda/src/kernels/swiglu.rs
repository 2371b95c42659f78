//! Wrapper of `kernels/swiglu.cu`.

use spark_backend::Dtype;

use super::{Kernels, LoadedModule, disjoint, to_u32, vector_length};
use crate::launch::{Kernel, Launch, Params};
use crate::{Error, Result, Stream, Tensor};

const OP: &str = "swiglu";
const NUM_THREADS: u32 = 256;

/// `SwigluParams` of `kernels/swiglu.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct SwigluParams {
    gate_up: u64,
    out: u64,
    rows: u32,
    intermediate: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 2 * 8 + 2 * 4 bytes, no padding.
unsafe impl Params for SwigluParams {
    const NAME: &'static str = "SwigluParams";
}

#[derive(Debug)]
pub(super) struct Swiglu {
    bf16: Kernel<SwigluParams>,
    f32: Kernel<SwigluParams>,
}

impl Swiglu {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        Ok(Self { bf16: Kernel::new(module, "swiglu_bf16", 0)?, f32: Kernel::new(module, "swiglu_f32", 0)? })
    }
}

impl Kernels {
    /// `silu(gate) * up` of `gate_up` `[rows, 2 * intermediate]`: `out` `[rows, intermediate]`.
    ///
    /// # Errors
    /// [`Error::Shape`], also when `intermediate` is not a multiple of 16 bytes; [`Error::Driver`].
    pub fn swiglu(&self, stream: &Stream, gate_up: &Tensor, out: &Tensor) -> Result<()> {
        let ([rows, intermediate], dtype) = (out.shape(), out.dtype());
        let length = vector_length(OP, dtype)?;
        if !intermediate.is_multiple_of(length) {
            return Err(Error::shape(OP, format!("columns: a multiple of {length}"), intermediate));
        }
        gate_up.expect(OP, [rows, 2 * intermediate], dtype)?;
        stream.uses(OP, &[gate_up.slice(), out.slice()])?;
        disjoint(OP, out.slice(), &[gate_up.slice()])?;
        let params = SwigluParams {
            gate_up: gate_up.address(),
            out: out.address(),
            rows: to_u32(OP, rows)?,
            intermediate: to_u32(OP, intermediate)?,
        };
        let row_vectors = to_u32(OP, intermediate / length)?;
        let num_threads = row_vectors.next_multiple_of(32).clamp(32, NUM_THREADS);
        let grid = [params.rows, row_vectors.div_ceil(num_threads), 1];
        let launch = Launch { grid, num_threads, shared_bytes: 0 };
        let kernel = if dtype == Dtype::Bf16 { &self.swiglu.bf16 } else { &self.swiglu.f32 };
        // SAFETY: both tensors have the shapes that the parameters say, are aligned to 16 bytes and do not overlap.
        unsafe { kernel.launch(stream, launch, &params) }
    }
}
