//! Reads that the kernel does while their thread works on others (io_uring). Every read that does not come whole is done again
//! by the caller, who knows what the rest means; so nothing is decided here.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use super::direct::AlignedBuffer;

/// Reads of one thread.
pub(super) struct Ring {
    ring: IoUring,
    /// The reads under way, each at the place that its completion names.
    flights: Vec<Option<Flight>>,
}

/// A read under way, or done.
pub(super) struct Flight {
    /// The caller's number.
    pub(super) piece: usize,
    /// What is read into.
    pub(super) buffer: AlignedBuffer,
    /// Whether all bytes are there that were needed.
    pub(super) is_whole: bool,
    need: usize,
}

/// A read to be started: `len` bytes, of which the caller needs the first `need`.
pub(super) struct Wanted<'a> {
    pub(super) file: &'a File,
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) need: usize,
}

impl Ring {
    /// Room for `depth` reads; `None` where the kernel has no rings, or does not let this process have one.
    pub(super) fn new(depth: usize) -> Option<Self> {
        let ring = IoUring::new(u32::try_from(depth).ok()?).ok()?;
        Some(Self { ring, flights: (0..depth).map(|_| None).collect() })
    }

    /// Whether as many reads are under way as there is room for.
    pub(super) fn is_full(&self) -> bool {
        self.flights.iter().all(Option::is_some)
    }

    fn is_empty(&self) -> bool {
        self.flights.iter().all(Option::is_none)
    }

    /// Starts a read into `buffer`. A ring that is full gives the buffer back.
    #[expect(unsafe_code, reason = "the kernel writes into memory that it is told of")]
    pub(super) fn start(
        &mut self,
        piece: usize,
        wanted: &Wanted<'_>,
        mut buffer: AlignedBuffer,
    ) -> std::result::Result<(), AlignedBuffer> {
        let free = self.flights.iter().position(Option::is_none);
        let (Some(place), Ok(len)) = (free, u32::try_from(wanted.len)) else { return Err(buffer) };
        let target = buffer.bytes(wanted.len).as_mut_ptr();
        let read = opcode::Read::new(types::Fd(wanted.file.as_raw_fd()), target, len).offset(wanted.offset);
        let entry = read.build().user_data(place as u64);
        // SAFETY: `target` are `len` bytes of the buffer's own allocation, which stays where it is when the buffer moves. From
        // here to the completion the buffer is held in `flights` and not touched; `drop` waits for completions, or leaks
        // the buffers. The file is a number to the kernel: were it closed before the entry is submitted, the read would fail.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err(buffer);
        }
        self.flights[place] = Some(Flight { piece, buffer, is_whole: false, need: wanted.need });
        // What is not taken now is submitted with the next, at the latest by `wait`.
        let _ = self.ring.submit();
        Ok(())
    }

    /// Waits for any read to end; `None` when none is under way.
    pub(super) fn wait(&mut self) -> Result<Option<Flight>> {
        if self.is_empty() {
            return Ok(None);
        }
        loop {
            if let Some(done) = self.ring.completion().next() {
                let place = usize::try_from(done.user_data()).ok();
                let flight = place.and_then(|place| self.flights.get_mut(place)?.take());
                let mut flight = flight.ok_or_else(|| Error::other("a read ended that was not started"))?;
                flight.is_whole = usize::try_from(done.result()).is_ok_and(|got| got >= flight.need);
                return Ok(Some(flight));
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while !self.is_empty() {
            if self.wait().is_err() {
                // The kernel may still write to them.
                self.flights.drain(..).for_each(std::mem::forget);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_end_in_any_order_and_short_ones_say_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let data: Vec<u8> = (0..50_000_u32).map(|i| (i * 31 % 251) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        let file = File::open(&path).unwrap();
        // Not every kernel that this runs on has rings.
        let Some(mut ring) = Ring::new(2) else { return };
        assert!(ring.wait().unwrap().is_none());
        let wanted = |offset, len, need| Wanted { file: &file, offset, len, need };
        let buffer = || AlignedBuffer::new(30_000);
        assert!(ring.start(7, &wanted(5, 30_000, 30_000), buffer()).is_ok());
        assert!(ring.start(8, &wanted(40_000, 30_000, 10_001), buffer()).is_ok());
        assert!(ring.is_full() && ring.start(9, &wanted(0, 1, 1), buffer()).is_err());
        for _ in 0..2 {
            let flight = ring.wait().unwrap().unwrap();
            assert_eq!(flight.is_whole, flight.piece == 7);
            if flight.is_whole {
                assert!(flight.buffer.as_ref()[..30_000] == data[5..30_005]);
            }
        }
        assert!(ring.start(9, &wanted(0, 30_000, 1), buffer()).is_ok());
        drop(ring);
    }
}
