//! Matrices on the device and the types of their elements. No operations.

use half::bf16;
use spark_backend::Dtype;

use crate::{DeviceSlice, Error, Result};

/// A type that host and device store alike.
///
/// # Safety
/// Any bytes must be a valid value, and the type must have no padding.
pub unsafe trait Element: Copy + Default + 'static {}

// SAFETY: integers and floats take any bytes and have no padding.
unsafe impl Element for u8 {}
// SAFETY: as above.
unsafe impl Element for u64 {}
// SAFETY: as above.
unsafe impl Element for u16 {}
// SAFETY: as above.
unsafe impl Element for u32 {}
// SAFETY: as above.
unsafe impl Element for f32 {}
// SAFETY: a transparent u16.
unsafe impl Element for bf16 {}

/// A row-major matrix on the device, in the compute dtype.
#[derive(Debug, Clone)]
pub struct Tensor {
    slice: DeviceSlice,
    shape: [usize; 2],
    dtype: Dtype,
}

impl Tensor {
    /// A matrix `[rows, columns]` of `dtype` at the start of `slice`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the slice is smaller or does not start aligned to 16 bytes.
    pub fn new(slice: &DeviceSlice, shape: [usize; 2], dtype: Dtype) -> Result<Self> {
        let Some(num_bytes) = Self::num_bytes(shape, dtype) else {
            return Err(Error::shape("tensor", "a size that fits 64 bits", shape));
        };
        let slice = slice.slice(0, num_bytes)?;
        if slice.address() % 16 != 0 {
            return Err(Error::shape("tensor", "a start aligned to 16 bytes", slice.address()));
        }
        Ok(Self { slice, shape, dtype })
    }

    /// Bytes of a matrix; `None` beyond 64 bits.
    pub fn num_bytes(shape: [usize; 2], dtype: Dtype) -> Option<u64> {
        (shape[0] as u64).checked_mul(shape[1] as u64)?.checked_mul(dtype.size() as u64)
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.shape[1]
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its bytes.
    pub fn slice(&self) -> &DeviceSlice {
        &self.slice
    }

    pub(crate) fn address(&self) -> u64 {
        self.slice.address()
    }

    /// An error of `op` unless this is `[rows, columns]` of `dtype`.
    pub(crate) fn expect(&self, op: &'static str, shape: [usize; 2], dtype: Dtype) -> Result<()> {
        if self.shape == shape && self.dtype == dtype {
            return Ok(());
        }
        Err(Error::shape(op, format!("{shape:?} {dtype:?}"), (self.shape, self.dtype)))
    }
}
