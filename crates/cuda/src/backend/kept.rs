//! The store of what outlives steps: rows of encoded media. Whose turn it is to go is the scheduler's; here is where
//! things lie.
//!
//! All that is kept fits the store by the scheduler's count, but holes may be too small for the next one. Then everything is
//! moved together. What was put into the stream before still reads the old places, and runs before the move.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc as Shared, Mutex, PoisonError, Weak};

use super::tensor::{CudaTensor, Kept};
use crate::{DeviceSlice, Error, Result, Stream, Tensor};

/// Places start at multiples of this: the alignment of a tensor.
const PLACE_ALIGNMENT: u64 = 16;
/// A move over a shorter distance goes through a buffer of this size, because a copy must not overlap itself.
const BUFFER: u64 = 4 << 20;

/// Memory for kept tensors.
#[derive(Debug)]
pub(super) struct KeptStore {
    places: DeviceSlice,
    buffer: DeviceSlice,
    kept: Mutex<Vec<Weak<Kept>>>,
}

impl KeptStore {
    /// Bytes of a store whose tensors take `num_bytes`.
    pub(super) fn num_bytes(num_bytes: u64) -> u64 {
        num_bytes.next_multiple_of(crate::ALIGNMENT) + if num_bytes > 0 { BUFFER } else { 0 }
    }

    /// A store for `num_bytes` in `slice`.
    pub(super) fn new(slice: &DeviceSlice, num_bytes: u64) -> Result<Self> {
        let end = num_bytes.next_multiple_of(crate::ALIGNMENT);
        Ok(Self {
            places: slice.slice(0, end)?,
            buffer: slice.slice(end, slice.num_bytes() - end)?,
            kept: Mutex::new(Vec::new()),
        })
    }

    /// A copy of `x`, here until its last clone is dropped.
    pub(super) fn keep(&self, stream: &Stream, x: &Tensor) -> Result<CudaTensor> {
        // Nothing panics while the list is changed.
        let mut list = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept: Vec<Shared<Kept>> = list.iter().filter_map(Weak::upgrade).collect();
        kept.sort_by_key(|kept| kept.offset.load(Ordering::Acquire));
        let size = x.slice().num_bytes();
        let taken: Vec<(u64, u64)> =
            kept.iter().map(|kept| (kept.offset.load(Ordering::Acquire), kept.num_bytes)).collect();
        let offset = match first_hole(&taken, self.places.num_bytes(), size) {
            Some(offset) => offset,
            None => self.move_together(stream, &kept, size)?,
        };
        let new = Shared::new(Kept {
            store: self.places.clone(),
            offset: AtomicU64::new(offset),
            shape: x.shape(),
            dtype: x.dtype(),
            num_bytes: size,
        });
        stream.copy(new.tensor()?.slice(), x.slice())?;
        *list = kept.iter().chain([&new]).map(Shared::downgrade).collect();
        Ok(CudaTensor::kept(new))
    }

    /// Moves what is kept (in ascending order) to the start of the store: where `size` bytes are free then.
    fn move_together(&self, stream: &Stream, kept: &[Shared<Kept>], size: u64) -> Result<u64> {
        let used: u64 = kept.iter().map(|kept| kept.num_bytes.next_multiple_of(PLACE_ALIGNMENT)).sum();
        let available = self.places.num_bytes().saturating_sub(used);
        if size > available {
            return Err(Error::Memory { what: "encoder cache", needed: size, available });
        }
        let mut end = 0;
        for kept in kept {
            self.move_down(stream, kept.offset.load(Ordering::Acquire), end, kept.num_bytes)?;
            kept.offset.store(end, Ordering::Release);
            end += kept.num_bytes.next_multiple_of(PLACE_ALIGNMENT);
        }
        Ok(end)
    }

    /// Moves `num_bytes` from byte `from` to byte `to`, which is not behind it.
    fn move_down(&self, stream: &Stream, from: u64, to: u64, num_bytes: u64) -> Result<()> {
        let distance = from - to;
        if distance == 0 {
            return Ok(());
        }
        for (at, len) in pieces(num_bytes, distance.max(BUFFER)) {
            let (source, target) = (self.places.slice(from + at, len)?, self.places.slice(to + at, len)?);
            if distance >= len {
                stream.copy(&target, &source)?;
            } else {
                let buffer = self.buffer.slice(0, len)?;
                stream.copy(&buffer, &source)?;
                stream.copy(&target, &buffer)?;
            }
        }
        Ok(())
    }
}

/// Start and length of the pieces of `num_bytes`, each at most `most` long.
fn pieces(num_bytes: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..num_bytes.div_ceil(most)).map(move |i| (i * most, most.min(num_bytes - i * most)))
}

/// The first place for `size` bytes between `taken` ones (offset and size, ascending) in `capacity` bytes.
fn first_hole(taken: &[(u64, u64)], capacity: u64, size: u64) -> Option<u64> {
    let mut start: u64 = 0;
    for &(offset, num_bytes) in taken.iter().chain([&(capacity, 0)]) {
        if start.checked_add(size)? <= offset {
            return Some(start);
        }
        start = (offset + num_bytes).next_multiple_of(PLACE_ALIGNMENT);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_hole_that_holds_it() {
        let taken = [(0, 32), (64, 30), (160, 16)];
        assert_eq!(first_hole(&taken, 256, 32), Some(32));
        assert_eq!(first_hole(&taken, 256, 33), Some(96));
        assert_eq!(first_hole(&taken, 256, 80), Some(176));
        assert_eq!(first_hole(&taken, 256, 81), None);
        assert_eq!(first_hole(&[], 256, 256), Some(0));
        assert_eq!(first_hole(&[(0, 256)], 256, 1), None);
        assert_eq!(first_hole(&[], 256, u64::MAX), None);
    }

    #[test]
    fn pieces_are_whole_and_in_order() {
        let all: Vec<_> = pieces(10, 4).collect();
        assert_eq!(all, [(0, 4), (4, 4), (8, 2)]);
        assert_eq!(pieces(0, 4).count(), 0);
    }
}
