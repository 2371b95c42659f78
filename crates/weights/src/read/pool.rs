//! Buffers that are read into again and again: pages that the kernel has given once cost nothing the second time.

use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::direct::AlignedBuffer;
use crate::load::lock;

/// Free buffers of one size.
pub(crate) struct Pool {
    len: usize,
    free: Arc<Free>,
}

struct Free {
    buffers: Mutex<Vec<AlignedBuffer>>,
    /// Buffers that are kept; more are given back to the system.
    most: usize,
}

/// A buffer that goes back when nobody uses it any more.
struct Lent {
    buffer: Option<AlignedBuffer>,
    free: Arc<Free>,
}

impl Pool {
    /// Of buffers of `len` bytes, of which up to `most` wait for their next use.
    pub(crate) fn new(len: usize, most: usize) -> Self {
        Pool { len, free: Arc::new(Free { buffers: Mutex::default(), most }) }
    }

    /// A buffer with whatever was in it.
    pub(crate) fn take(&self) -> AlignedBuffer {
        let free = lock(&self.free.buffers).pop();
        free.unwrap_or_else(|| AlignedBuffer::new(self.len))
    }

    /// The bytes of a buffer of this pool, from its aligned address on. It comes back with the last of them.
    pub(crate) fn lend(&self, buffer: AlignedBuffer) -> Bytes {
        Bytes::from_owner(Lent { buffer: Some(buffer), free: Arc::clone(&self.free) })
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], AsRef::as_ref)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut free = lock(&self.free.buffers);
        if free.len() < self.free.most {
            free.extend(self.buffer.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_the_last_of_its_bytes() {
        let pool = Pool::new(10, 1);
        let buffer = pool.take();
        let place = buffer.as_ref().as_ptr();
        let bytes = pool.lend(buffer);
        let part = bytes.slice(3..5);
        drop(bytes);
        let other = pool.take();
        assert!(other.as_ref().as_ptr() != place, "it is in use");
        drop(part);
        drop(pool.lend(other));
        let again = pool.take();
        assert!(again.as_ref().as_ptr() == place, "and only one is kept");
    }
}
