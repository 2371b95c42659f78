//! Everyone sends to everyone and receives from everyone at once, on one thread. Not what is done with it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;

use rustix::event::{PollFd, PollFlags, poll};

use crate::BULK_LIMIT;
use crate::monitor::LossReason;

// Values travel as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"));

/// Operation, sequence number, length of the call, length of what follows.
const HEADER_BYTES: usize = 24;

/// What all ranks must call alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operation {
    Sum,
    Share,
    Shared,
    Gather,
    Broadcast(usize),
}

impl Operation {
    fn code(self) -> u32 {
        match self {
            Operation::Sum => 1,
            Operation::Share => 2,
            Operation::Shared => 3,
            Operation::Gather => 4,
            Operation::Broadcast(root) => 5 | (root as u32) << 8,
        }
    }
}

/// One call of a collective.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    /// Values that all ranks must agree on; 0 where lengths may differ.
    pub(crate) length: usize,
}

/// Why an exchange ended early.
pub(crate) enum Failure {
    /// The connection to this rank is not usable.
    Lost(usize, LossReason),
    /// This rank called something else.
    Diverged { rank: usize, theirs: String, ours: String },
}

/// The connections, which do not block, and how many exchanges there were.
pub(crate) struct Exchange {
    /// Ascending ranks.
    peers: Vec<(usize, TcpStream)>,
    sequence: u32,
}

impl Exchange {
    pub(crate) fn new(peers: Vec<(usize, TcpStream)>) -> Self {
        Exchange { peers, sequence: 0 }
    }

    /// Sends `out(peer)` to each peer; `received`, in the order of peers, becomes what they sent.
    pub(crate) fn run<'a>(
        &mut self,
        call: Call,
        out: impl Fn(usize) -> &'a [f32],
        expected: impl Fn(usize) -> Option<usize>,
        received: &mut [Vec<f32>],
    ) -> Result<(), Failure> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut transfers: Vec<Transfer<'_>> = Vec::with_capacity(self.peers.len());
        for ((rank, stream), into) in self.peers.iter().zip(received) {
            into.resize(expected(*rank).unwrap_or(0), 0.0);
            transfers.push(Transfer {
                rank: *rank,
                stream,
                header: header(call, self.sequence, out(*rank).len()),
                out: bytemuck::cast_slice(out(*rank)),
                sent: 0,
                their_header: [0; HEADER_BYTES],
                expected: expected(*rank),
                into,
                got: 0,
                due: None,
            });
        }
        loop {
            let mut has_progressed = false;
            for transfer in &mut transfers {
                has_progressed |= transfer.push()?;
                has_progressed |= transfer.pull()?;
            }
            if transfers.iter().all(|transfer| !transfer.is_sending() && !transfer.is_receiving()) {
                return Ok(());
            }
            if !has_progressed {
                wait(&transfers)?;
            }
        }
    }
}

fn header(call: Call, sequence: u32, length: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&call.operation.code().to_le_bytes());
    header[4..8].copy_from_slice(&sequence.to_le_bytes());
    header[8..16].copy_from_slice(&(call.length as u64).to_le_bytes());
    header[16..].copy_from_slice(&(length as u64).to_le_bytes());
    header
}

/// For messages: what a header says was called.
fn describe(header: &[u8; HEADER_BYTES]) -> String {
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let name = match word(0) & 0xff {
        1..=3 => "all_reduce",
        4 => "all_gather",
        5 => "broadcast",
        _ => "something unknown",
    };
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    format!("{name} of {} values as exchange {} ({} sent)", long(8), word(4), long(16))
}

/// What goes to one peer and comes from it.
struct Transfer<'a> {
    rank: usize,
    stream: &'a TcpStream,
    header: [u8; HEADER_BYTES],
    out: &'a [u8],
    /// Bytes of header and payload.
    sent: usize,
    their_header: [u8; HEADER_BYTES],
    /// Values that the peer must send.
    expected: Option<usize>,
    into: &'a mut Vec<f32>,
    /// Bytes of header and payload.
    got: usize,
    /// Bytes that will come; known with the header.
    due: Option<usize>,
}

impl Transfer<'_> {
    fn is_sending(&self) -> bool {
        self.sent < HEADER_BYTES + self.out.len()
    }

    fn is_receiving(&self) -> bool {
        self.due.is_none_or(|due| self.got < due)
    }

    /// Writes once if there is something to write; whether it did.
    fn push(&mut self) -> Result<bool, Failure> {
        if !self.is_sending() {
            return Ok(false);
        }
        let mut stream = self.stream;
        let written = if self.sent < HEADER_BYTES {
            let parts = [IoSlice::new(&self.header[self.sent..]), IoSlice::new(self.out)];
            stream.write_vectored(&parts)
        } else {
            stream.write(&self.out[self.sent - HEADER_BYTES..])
        };
        let written = self.progress(written)?;
        self.sent += written;
        Ok(written > 0)
    }

    /// Reads once if there is something to read; whether it did.
    fn pull(&mut self) -> Result<bool, Failure> {
        if !self.is_receiving() {
            return Ok(false);
        }
        let mut stream = self.stream;
        let payload: &mut [u8] = bytemuck::cast_slice_mut(self.into);
        let read = if self.got < HEADER_BYTES {
            let parts = &mut [IoSliceMut::new(&mut self.their_header[self.got..]), IoSliceMut::new(payload)];
            stream.read_vectored(parts)
        } else {
            stream.read(&mut payload[self.got - HEADER_BYTES..])
        };
        let read = self.progress(read)?;
        self.got += read;
        if self.due.is_none() && self.got >= HEADER_BYTES {
            self.check_header()?;
        }
        Ok(read > 0)
    }

    /// Bytes of a read or write; 0 if it would block.
    fn progress(&self, moved: io::Result<usize>) -> Result<usize, Failure> {
        match moved {
            Ok(0) => Err(Failure::Lost(self.rank, LossReason::Closed)),
            Ok(bytes) => Ok(bytes),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(Failure::Lost(self.rank, LossReason::Closed)),
            },
        }
    }

    /// The peer must be in the same call; then makes room for what it sends.
    fn check_header(&mut self) -> Result<(), Failure> {
        let (theirs, ours) = (&self.their_header, &self.header);
        let mut length = [0; 8];
        length.copy_from_slice(&theirs[16..]);
        let length = u64::from_le_bytes(length);
        let is_known = matches!(theirs[0], 1..=5);
        if !is_known || length > BULK_LIMIT / 4 {
            return Err(Failure::Lost(self.rank, LossReason::Garbage("header of a collective")));
        }
        let is_expected = self.expected.is_none_or(|expected| expected as u64 == length);
        if theirs[..16] != ours[..16] || !is_expected {
            return Err(Failure::Diverged {
                rank: self.rank,
                theirs: describe(theirs),
                ours: describe(ours),
            });
        }
        self.into.resize(length as usize, 0.0);
        self.due = Some(HEADER_BYTES + length as usize * 4);
        Ok(())
    }
}

/// Until a connection can go on. Without a timeout: a loss shuts the sockets, which wakes this.
fn wait(transfers: &[Transfer<'_>]) -> Result<(), Failure> {
    let mut descriptors = Vec::with_capacity(transfers.len());
    for transfer in transfers.iter().filter(|transfer| transfer.is_sending() || transfer.is_receiving()) {
        let mut events = PollFlags::empty();
        events.set(PollFlags::OUT, transfer.is_sending());
        events.set(PollFlags::IN, transfer.is_receiving());
        descriptors.push(PollFd::new(transfer.stream, events));
    }
    match poll(&mut descriptors, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(_) => Err(Failure::Lost(transfers[0].rank, LossReason::Closed)),
    }
}
