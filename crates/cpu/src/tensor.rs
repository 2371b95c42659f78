//! Activations on the host, and what every operation needs to run: threads, vector width, rounding. No mathematics.

use crate::dtype::round_bf16;
use pulp::Arch;
use rayon::prelude::*;
use spark_backend::{Dtype, Error, Result};

/// A row-major float32 matrix. In bfloat16 mode its values are bfloat16 numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuTensor {
    /// `[rows, columns]`.
    pub(crate) values: Vec<f32>,
    /// Rows and columns.
    pub(crate) shape: [usize; 2],
}

impl CpuTensor {
    pub(crate) fn new(values: Vec<f32>, shape: [usize; 2]) -> Self {
        debug_assert_eq!(values.len(), shape[0] * shape[1]);
        Self { values, shape }
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    pub(crate) fn rows(&self) -> usize {
        self.shape[0]
    }

    pub(crate) fn columns(&self) -> usize {
        self.shape[1]
    }

    /// Row `i`.
    pub(crate) fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.shape[1]..][..self.shape[1]]
    }

    /// An error of `op` unless this tensor is `[rows, columns]`.
    pub(crate) fn expect(&self, op: &'static str, shape: [usize; 2]) -> Result<()> {
        if self.shape == shape { Ok(()) } else { Err(Error::shape(op, shape, self.shape)) }
    }
}

/// Work (multiply-adds, roughly) under which waking other threads costs more than it brings.
const SEQUENTIAL: usize = 1 << 16;

/// How operations compute: dtype, vector instructions, threads.
pub(crate) struct Compute {
    pub(crate) dtype: Dtype,
    pub(crate) arch: Arch,
    /// Rows that meet NVFP4 weights are rounded to NVFP4.
    pub(crate) nvfp4_rows: bool,
    /// `None` is rayon's global pool.
    pool: Option<rayon::ThreadPool>,
}

impl Compute {
    pub(crate) fn new(dtype: Dtype, threads: Option<usize>) -> Result<Self> {
        if dtype == Dtype::F16 {
            let reason = "float16 computation is not supported: choose bfloat16 or float32".to_owned();
            return Err(Error::Unsupported { op: "cpu", reason });
        }
        let build = |n: usize| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(n.max(1))
                .thread_name(|i| format!("cpu-{i}"))
                .build()
                .map_err(|error| Error::Device { op: "cpu", message: error.to_string() })
        };
        Ok(Self { dtype, arch: Arch::new(), nvfp4_rows: false, pool: threads.map(build).transpose()? })
    }

    /// `x` as the compute dtype stores it.
    #[inline(always)]
    pub(crate) fn rounded(&self, x: f32) -> f32 {
        if self.dtype == Dtype::Bf16 { round_bf16(x) } else { x }
    }

    /// Rounds all values to the compute dtype.
    pub(crate) fn round(&self, values: &mut [f32]) {
        if self.dtype == Dtype::Bf16 {
            self.arch.dispatch(
                #[inline(always)]
                || values.iter_mut().for_each(|x| *x = round_bf16(*x)),
            );
        }
    }

    /// Runs `f` where parallel iterators use this backend's threads.
    pub(crate) fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(f),
            None => f(),
        }
    }

    /// Calls `f(index, chunk)` for chunks of `length`, in parallel if `work` is worth it. Results must not depend on it.
    pub(crate) fn for_chunks(
        &self,
        values: &mut [f32],
        length: usize,
        work: usize,
        f: impl Fn(usize, &mut [f32]) + Send + Sync,
    ) {
        if values.is_empty() || length == 0 {
            return;
        }
        if work < SEQUENTIAL || values.len() <= length {
            values.chunks_mut(length).enumerate().for_each(|(i, chunk)| f(i, chunk));
        } else {
            self.install(|| values.par_chunks_mut(length).enumerate().for_each(|(i, chunk)| f(i, chunk)));
        }
    }

    /// `f` of every item, in order, in parallel if `work` is worth it.
    pub(crate) fn map<T: Sync, R: Send>(
        &self,
        items: &[T],
        work: usize,
        f: impl Fn(&T) -> R + Send + Sync,
    ) -> Vec<R> {
        if work < SEQUENTIAL || items.len() < 2 {
            items.iter().map(f).collect()
        } else {
            self.install(|| items.par_iter().map(f).collect())
        }
    }
}
