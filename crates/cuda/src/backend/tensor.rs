//! What the models hold: an activation or a small weight, and what was kept of an encoded medium, which may move.

use std::sync::Arc as Shared;
use std::sync::atomic::{AtomicU64, Ordering};

use spark_backend::Dtype;

use crate::{DeviceSlice, Result, Tensor};

/// A matrix on the device.
#[derive(Debug, Clone)]
pub struct CudaTensor(Place);

#[derive(Debug, Clone)]
enum Place {
    Fixed(Tensor),
    Kept(Shared<Kept>),
}

impl CudaTensor {
    /// A kept matrix.
    pub(super) fn kept(kept: Shared<Kept>) -> Self {
        Self(Place::Kept(kept))
    }

    /// The matrix where it is now: to be used before anything else is kept.
    pub(super) fn tensor(&self) -> Result<Tensor> {
        match &self.0 {
            Place::Fixed(tensor) => Ok(tensor.clone()),
            Place::Kept(kept) => kept.tensor(),
        }
    }
}

impl From<Tensor> for CudaTensor {
    fn from(tensor: Tensor) -> Self {
        Self(Place::Fixed(tensor))
    }
}

/// A matrix in the store of kept ones (`kept.rs`), which moves it when it needs a larger hole.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) store: DeviceSlice,
    pub(super) offset: AtomicU64,
    pub(super) shape: [usize; 2],
    pub(super) dtype: Dtype,
    pub(super) num_bytes: u64,
}

impl Kept {
    pub(super) fn tensor(&self) -> Result<Tensor> {
        let place = self.store.slice(self.offset.load(Ordering::Acquire), self.num_bytes)?;
        Tensor::new(&place, self.shape, self.dtype)
    }
}
