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

    /// `pixels` to `target`, piece by piece.
    pub(super) fn pixels(&mut self, stream: &Stream, target: &DeviceSlice, pixels: &[u8]) -> Result<()> {
        for (i, piece) in pixels.chunks(PIECE).enumerate() {
            let target = target.slice((i * PIECE) as u64, piece.len() as u64)?;
            self.send(stream, &target, |bytes| {
                bytes[..piece.len()].copy_from_slice(piece);
                Ok(piece.len())
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
