//! Device memory that a step takes piece by piece and gives back by dropping. Knows bytes and the tensors made of them; no
//! allocation: the memory is a slice that was planned before.
//!
//! A piece returns when its last clone is dropped on the host, which may be before the device has used it. That is right
//! because all users of a pool launch on one stream: what the next owner puts in runs after what the last one put in, and
//! kernels that overlap with their predecessor write only behind `wait_for_predecessor`.

use std::sync::{Arc as Shared, Mutex, MutexGuard, PoisonError};

use spark_backend::Dtype;

use crate::{ALIGNMENT, DeviceSlice, Error, Result, Tensor};

/// Memory that is taken and returned in any order. Clones are the same pool.
#[derive(Debug, Clone)]
pub struct Pool {
    inner: Shared<Inner>,
}

#[derive(Debug)]
struct Inner {
    slice: DeviceSlice,
    runs: Mutex<FreeRuns>,
}

impl Inner {
    fn runs(&self) -> MutexGuard<'_, FreeRuns> {
        // The runs are changed by whole operations that do not panic in between.
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in a pool, taken until this is dropped.
#[derive(Debug)]
pub(crate) struct Piece {
    pool: Shared<Inner>,
    offset: u64,
    num_bytes: u64,
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.pool.runs().put_back(self.offset, self.num_bytes);
    }
}

impl Pool {
    /// A pool over all of `slice`, from its first aligned byte on. Over a piece of another pool, its own pieces hold that.
    pub fn new(slice: &DeviceSlice) -> Self {
        let skipped = slice.address().next_multiple_of(ALIGNMENT) - slice.address();
        let runs = Mutex::new(FreeRuns::new(skipped, slice.num_bytes()));
        Self { inner: Shared::new(Inner { slice: slice.clone(), runs }) }
    }

    /// `num_bytes`, aligned to [`ALIGNMENT`]; `what` names them in errors.
    ///
    /// # Errors
    /// [`Error::Memory`] when no free run is long enough.
    pub fn take(&self, what: &'static str, num_bytes: u64) -> Result<DeviceSlice> {
        let (offset, taken) = self.inner.runs().take(what, num_bytes)?;
        let piece = Piece { pool: Shared::clone(&self.inner), offset, num_bytes: taken };
        Ok(self.inner.slice.slice(offset, num_bytes)?.with_piece(Shared::new(piece)))
    }

    /// An uninitialised matrix `[rows, columns]`.
    ///
    /// # Errors
    /// As [`Pool::take`]; [`Error::Shape`] for a size beyond 64 bits.
    pub fn tensor(&self, what: &'static str, shape: [usize; 2], dtype: Dtype) -> Result<Tensor> {
        let Some(num_bytes) = Tensor::num_bytes(shape, dtype) else {
            return Err(Error::shape(what, "a size that fits 64 bits", shape));
        };
        Tensor::new(&self.take(what, num_bytes)?, shape, dtype)
    }

    /// Bytes from the start of the pool that were ever in use: a pool of this size would have been enough.
    pub fn high_water(&self) -> u64 {
        self.inner.runs().high_water
    }

    /// Its size.
    pub fn num_bytes(&self) -> u64 {
        self.inner.slice.num_bytes()
    }

    /// An error while a piece exists: between steps nothing may be held, or a recorded step would overwrite it.
    ///
    /// # Errors
    /// [`Error::InUse`].
    pub fn expect_empty(&self) -> Result<()> {
        match self.inner.runs().num_taken {
            0 => Ok(()),
            count => Err(Error::InUse { count }),
        }
    }
}

/// The arithmetic of a [`Pool`]: free runs in order, no two of them adjacent. There are few.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FreeRuns {
    /// Offset and length.
    runs: Vec<(u64, u64)>,
    num_taken: usize,
    pub(crate) high_water: u64,
}

impl FreeRuns {
    /// One run from `start` to `end`.
    pub(crate) fn new(start: u64, end: u64) -> Self {
        let len = end.saturating_sub(start);
        Self { runs: if len == 0 { Vec::new() } else { vec![(start, len)] }, num_taken: 0, high_water: 0 }
    }

    /// The first run that holds `num_bytes`: offset, and bytes taken (whole alignment units, less at the very end; none for
    /// none).
    pub(crate) fn take(&mut self, what: &'static str, num_bytes: u64) -> Result<(u64, u64)> {
        let Some(i) = self.runs.iter().position(|&(_, len)| len >= num_bytes) else {
            if num_bytes == 0 {
                self.num_taken += 1;
                return Ok((0, 0));
            }
            let available = self.runs.iter().map(|&(_, len)| len).max().unwrap_or(0);
            return Err(Error::Memory { what, needed: num_bytes, available });
        };
        let (offset, len) = self.runs[i];
        let taken = num_bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(len).min(len);
        if taken == len {
            self.runs.remove(i);
        } else {
            self.runs[i] = (offset + taken, len - taken);
        }
        self.num_taken += 1;
        self.high_water = self.high_water.max(offset + num_bytes);
        Ok((offset, taken))
    }

    /// Joins what was taken with its free neighbours.
    pub(crate) fn put_back(&mut self, offset: u64, num_bytes: u64) {
        self.num_taken -= 1;
        if num_bytes == 0 {
            return;
        }
        let next = self.runs.partition_point(|&(start, _)| start < offset);
        let (mut start, mut end) = (offset, offset + num_bytes);
        let (mut first, mut last) = (next, next);
        if let Some(&(run, len)) = self.runs.get(next)
            && run == end
        {
            (end, last) = (run + len, next + 1);
        }
        if let Some(&(run, len)) = next.checked_sub(1).and_then(|i| self.runs.get(i))
            && run + len == start
        {
            (start, first) = (run, next - 1);
        }
        self.runs.splice(first..last, [(start, end - start)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_hole_that_is_large_enough_is_taken() {
        let mut runs = FreeRuns::new(0, 4096);
        let places: Vec<_> = [1, 600, 256].map(|n| runs.take("t", n).unwrap()).into();
        assert_eq!(places, [(0, 256), (256, 768), (1024, 256)]);
        assert_eq!(runs.high_water, 1280);
        runs.put_back(256, 768);
        assert_eq!(runs.take("t", 700).unwrap(), (256, 768), "exactly the hole");
        runs.put_back(256, 768);
        assert_eq!(runs.take("t", 200).unwrap(), (256, 256), "its start");
        assert_eq!(runs.take("t", 600).unwrap(), (1280, 768), "the rest of the hole is too small");
        assert_eq!(runs.high_water, 1880);
    }

    #[test]
    fn all_that_is_returned_becomes_one_run_again() {
        let whole = FreeRuns::new(256, 10_000);
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
            let mut runs = whole.clone();
            let places = [300, 1, 5000, 256].map(|n| runs.take("t", n).unwrap());
            assert_eq!((runs.num_taken, places[0].0), (4, 256));
            for i in order {
                runs.put_back(places[i].0, places[i].1);
            }
            assert_eq!((runs.runs, runs.num_taken), (whole.runs.clone(), 0), "{order:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_longest_run() {
        let mut runs = FreeRuns::new(0, 1000);
        let first = runs.take("a", 1).unwrap();
        assert_eq!(runs.take("b", 744).unwrap(), (256, 744), "the last piece need not be aligned");
        let error = runs.take("c", 1).unwrap_err().to_string();
        assert_eq!(error, "not enough memory for c: 1 bytes needed, 0 available");
        assert_eq!(runs.take("nothing", 0).unwrap(), (0, 0));
        runs.put_back(first.0, first.1);
        let error = runs.take("d", u64::MAX).unwrap_err().to_string();
        assert!(error.ends_with(" 256 available"), "{error}");
        assert_eq!(runs.num_taken, 2, "a refused piece takes nothing");
    }
}
