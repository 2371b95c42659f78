//! CPU work of requests: off the async threads, and never more at once than there are cores.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::ApiError;

/// Runs closures on tokio's blocking threads, bounded.
#[derive(Clone)]
pub(crate) struct CpuPool(Arc<Semaphore>);

impl CpuPool {
    /// A pool as wide as the machine.
    pub(crate) fn new() -> Self {
        Self::of(std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// A pool that runs at most so many closures at once.
    pub(crate) fn of(width: usize) -> Self {
        Self(Arc::new(Semaphore::new(width)))
    }

    /// Runs `work`. When the caller goes away while it waits, it is never started.
    ///
    /// # Errors
    /// What `work` returns; [`ApiError::Internal`] if it panics.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = self.0.clone().acquire_owned().await.map_err(|error| ApiError::internal(&error))?;
        let run = move || {
            // Held by the work, not by the caller: an abandoned closure still uses its core.
            let _permit = permit;
            work()
        };
        tokio::task::spawn_blocking(run).await.map_err(|error| ApiError::internal(&error))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_costs_one_request() {
        let pool = CpuPool::new();
        let failed = pool.run(|| -> Result<(), _> { panic!("a defect") }).await;
        assert_eq!(failed, Err(ApiError::Internal));
        assert_eq!(pool.run(|| Ok(7)).await, Ok(7));
    }
}
