//! A bound on bytes that are in use at the same time: who wants more waits. Counts promises, not allocations.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ApiError;

/// The semaphore counts in units of this many bytes, so that 32 bits are enough.
const UNIT_BYTES: usize = 1 << 16;

/// A number of bytes, handed out in order of asking.
pub(crate) struct ByteBound {
    semaphore: Arc<Semaphore>,
    num_units: usize,
}

impl ByteBound {
    /// A bound of `max_bytes`, of at least one unit.
    pub(crate) fn new(max_bytes: usize) -> Self {
        let num_units = (max_bytes / UNIT_BYTES).clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        Self { semaphore: Arc::new(Semaphore::new(num_units)), num_units }
    }

    /// Permits of a semaphore that `num_bytes` take.
    pub(crate) fn units(num_bytes: usize) -> usize {
        num_bytes.div_ceil(UNIT_BYTES)
    }

    fn units_of_all(num_bytes: impl IntoIterator<Item = usize>) -> usize {
        num_bytes.into_iter().map(Self::units).fold(0, usize::saturating_add)
    }

    /// Whether all of `num_bytes` can ever be in use together.
    ///
    /// # Errors
    /// The bound, where they cannot.
    pub(crate) fn check(&self, num_bytes: impl IntoIterator<Item = usize>) -> Result<(), usize> {
        if Self::units_of_all(num_bytes) <= self.num_units {
            Ok(())
        } else {
            Err(self.num_units * UNIT_BYTES)
        }
    }

    /// Waits until there is room for all of `num_bytes` together. What is over the whole bound gets all of it, alone.
    ///
    /// # Errors
    /// [`ApiError::Internal`], if the semaphore is closed, which it never is.
    pub(crate) async fn acquire(
        &self,
        num_bytes: impl IntoIterator<Item = usize>,
    ) -> Result<OwnedSemaphorePermit, ApiError> {
        let num_units = Self::units_of_all(num_bytes).min(self.num_units);
        let num_units = u32::try_from(num_units).map_err(|error| ApiError::internal(&error))?;
        let permit = self.semaphore.clone().acquire_many_owned(num_units).await;
        permit.map_err(|error| ApiError::internal(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn units_are_handed_out_and_come_back() {
        let bound = ByteBound::new(4 * UNIT_BYTES);
        let mut two = bound.acquire([1, UNIT_BYTES]).await.unwrap();
        assert_eq!((two.num_permits(), bound.semaphore.available_permits()), (2, 2));
        drop(two.split(1).unwrap());
        assert_eq!(bound.semaphore.available_permits(), 3);
        drop(two);
        let all = bound.acquire([usize::MAX, usize::MAX]).await.unwrap();
        assert_eq!((all.num_permits(), bound.semaphore.available_permits()), (4, 0));
        assert_eq!((bound.check([1; 4]), bound.check([1; 5])), (Ok(()), Err(4 * UNIT_BYTES)));
    }
}
