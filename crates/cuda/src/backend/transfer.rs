//! What goes between host and device in every step: the inputs in one copy, the outputs in one copy, neither waited for
//! when it is begun. Pixels of media, which are large, go in pieces.

use spark_backend::{StepInputs, StepKey};

use crate::step::pack;
use crate::{Device, DeviceSlice, Error, Event, HostBuffer, Result, Stream};

/// Bytes of a piece of pixels.
const PIECE: usize = 4 << 20;

/// A pinned buffer and when it may be used again.
#[derive(Debug)]
struct Staging {
    host: HostBuffer,
    /// Reached when the copy from or to the buffer is over.
    done: Event,
}

impl Staging {
    fn new(device: &Device, num_bytes: usize) -> Result<Self> {
        Ok(Self { host: HostBuffer::new(device, num_bytes as u64)?, done: Event::without_time(device)? })
    }
}

/// Two buffers in turn: the host fills one while the device copies the other.
#[derive(Debug)]
pub(super) struct Upload {
    staging: [Staging; 2],
    next: usize,
}

impl Upload {
    /// Buffers of `num_bytes`.
    pub(super) fn new(device: &Device, num_bytes: usize) -> Result<Self> {
        Ok(Self { staging: [Staging::new(device, num_bytes)?, Staging::new(device, num_bytes)?], next: 0 })
    }

    /// Buffers for [`pixels`](Self::pixels).
    pub(super) fn for_pixels(device: &Device) -> Result<Self> {
        Self::new(device, PIECE)
    }

    /// The inputs, padded to `key`, to the start of `target`.
    pub(super) fn inputs(
        &mut self,
        stream: &Stream,
        target: &DeviceSlice,
        inputs: &StepInputs,
        key: StepKey,
        vocab_size: usize,
    ) -> Result<()> {
        self.send(stream, target, |bytes| pack(inputs, key, vocab_size, bytes))
    }

    /// The pixels of media, one after the other, to `target`, piece by piece: a piece may have the end of one medium and all of
    /// others.
    pub(super) fn pixels(&mut self, stream: &Stream, target: &DeviceSlice, media: &[&[u8]]) -> Result<()> {
        let total: usize = media.iter().map(|medium| medium.len()).sum();
        let mut rest = Rest { current: &[], media };
        for offset in (0..total).step_by(PIECE) {
            let len = PIECE.min(total - offset);
            let target = target.slice(offset as u64, len as u64)?;
            self.send(stream, &target, |bytes| {
                rest.take(&mut bytes[..len]);
                Ok(len)
            })?;
        }
        Ok(())
    }

    /// What `fill` writes (it says how much) to the start of `target`.
    fn send(
        &mut self,
        stream: &Stream,
        target: &DeviceSlice,
        fill: impl FnOnce(&mut [u8]) -> Result<usize>,
    ) -> Result<()> {
        let Staging { host, done } = &mut self.staging[self.next];
        done.wait()?;
        let len = fill(host.bytes_mut())?;
        // SAFETY: the buffer is written again only after `done`, and dropped after the stream has ended (`Drop` of the backend
        // waits for it).
        unsafe { stream.upload_from(&target.slice(0, len as u64)?, host, 0)? };
        done.record(stream)?;
        self.next = 1 - self.next;
        Ok(())
    }
}

/// Bytes of media that have not been taken.
struct Rest<'a> {
    current: &'a [u8],
    media: &'a [&'a [u8]],
}

impl Rest<'_> {
    /// Fills `bytes` with the next ones; there are as many.
    fn take(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let (now, later) = self.current.split_at(self.current.len().min(bytes.len()));
            let (filled, left) = bytes.split_at_mut(now.len());
            filled.copy_from_slice(now);
            (self.current, bytes) = (later, left);
            if !bytes.is_empty() {
                let Some((next, others)) = self.media.split_first() else { return };
                (self.current, self.media) = (next, others);
            }
        }
    }
}

/// Two buffers in turn, for steps in the order in which they were begun.
#[derive(Debug)]
pub(super) struct Download {
    staging: [Staging; 2],
    next: usize,
    num_waiting: usize,
}

impl Download {
    /// Buffers of `num_bytes`.
    pub(super) fn new(device: &Device, num_bytes: usize) -> Result<Self> {
        let staging = [Staging::new(device, num_bytes)?, Staging::new(device, num_bytes)?];
        Ok(Self { staging, next: 0, num_waiting: 0 })
    }

    /// Whether both buffers hold what was not taken.
    pub(super) fn is_full(&self) -> bool {
        self.num_waiting == self.staging.len()
    }

    /// Copies `source` when all that is in the stream is done.
    ///
    /// # Errors
    /// [`Error::Shape`] when two are not taken yet, [`Error::Driver`].
    pub(super) fn begin(&mut self, stream: &Stream, source: &DeviceSlice) -> Result<()> {
        if self.is_full() {
            return Err(Error::shape("step", "at most 2 steps whose output was not taken", 3));
        }
        let Staging { host, done } = &self.staging[self.next];
        // SAFETY: the buffer is read only after `done`, and dropped after the stream has ended (`Drop` of the backend waits for
        // it); its last copy was waited for when it was taken.
        unsafe { stream.download_to(host, 0, source)? };
        done.record(stream)?;
        self.next = 1 - self.next;
        self.num_waiting += 1;
        Ok(())
    }

    /// Waits for the oldest copy that was not taken: its bytes, valid until the next but one [`begin`](Self::begin).
    ///
    /// # Errors
    /// [`Error::Shape`] when there is none, [`Error::Driver`].
    pub(super) fn take(&mut self) -> Result<&[u8]> {
        if self.num_waiting == 0 {
            return Err(Error::shape("output", "a step whose output was not taken", "none"));
        }
        let oldest = (self.next + self.staging.len() - self.num_waiting) % self.staging.len();
        let Staging { host, done } = &self.staging[oldest];
        done.wait()?;
        self.num_waiting -= 1;
        Ok(host.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_run_over_the_ends_of_media() {
        let media: [&[u8]; 4] = [&[1, 2, 3], &[], &[4], &[5, 6, 7, 8]];
        for len in 1..=8 {
            let mut rest = Rest { current: &[], media: &media };
            let mut bytes = [0; 8];
            bytes.chunks_mut(len).for_each(|piece| rest.take(piece));
            assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8], "pieces of {len}");
        }
    }
}
