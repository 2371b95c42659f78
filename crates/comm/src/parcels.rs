//! Bytes of any kind between each two ranks, on connections of their own: what ranks read of a checkpoint for each other. Not
//! what they mean, and not the messages between rank 0 and the others.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::monitor::{LossReason, Monitor};
use crate::{BULK_LIMIT, Error, Result};

/// Tag and length, before the bytes.
const HEADER_BYTES: usize = 12;

/// A connection to each other rank. Parcels of one rank arrive in the order in which they were sent; different threads may send
/// and receive at the same time.
pub struct Parcels {
    monitor: Monitor,
    /// `[rank]`, `None` for this one.
    peers: Vec<Option<Peer>>,
}

struct Peer {
    stream: TcpStream,
    /// Held for as long as one parcel takes.
    sending: Mutex<()>,
    receiving: Mutex<()>,
}

impl Parcels {
    /// `streams[rank]`, `None` for this one.
    pub(crate) fn new(monitor: &Monitor, streams: Vec<Option<TcpStream>>) -> Result<Self> {
        let attached = streams.iter().flatten().map(TcpStream::try_clone).collect::<io::Result<_>>();
        monitor.attach(attached.map_err(Error::system("share a connection between threads"))?);
        let peer = |stream| Peer { stream, sending: Mutex::default(), receiving: Mutex::default() };
        let peers = streams.into_iter().map(|stream| stream.map(peer)).collect();
        Ok(Self { monitor: monitor.clone(), peers })
    }

    /// Sends `bytes` to `rank`; returns when the system has taken them, which waits for the rank to receive what does not fit
    /// the system's buffers.
    ///
    /// # Errors
    /// [`Error::Lost`]; [`Error::TooLarge`] over [`BULK_LIMIT`], and [`Error::World`] for a rank that is none of the others, of
    /// which nothing was sent.
    pub fn send(&self, rank: usize, tag: u32, bytes: &[u8]) -> Result<()> {
        self.monitor.check()?;
        let length = bytes.len() as u64;
        if length > BULK_LIMIT {
            return Err(Error::TooLarge { channel: "parcel", bytes: length, limit: BULK_LIMIT });
        }
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&tag.to_le_bytes());
        header[4..].copy_from_slice(&length.to_le_bytes());
        let Peer { stream, sending, .. } = self.peer(rank)?;
        let _parcel = lock(sending);
        write_all(stream, &header, bytes).map_err(|_| self.monitor.explain(rank, LossReason::Closed))
    }

    /// Waits for the next parcel of `rank`: its tag and its bytes.
    ///
    /// # Errors
    /// [`Error::Lost`], also when what came is no parcel; [`Error::World`] for a rank that is none of the others.
    pub fn receive(&self, rank: usize) -> Result<(u32, Vec<u8>)> {
        self.monitor.check()?;
        let Peer { stream, receiving, .. } = self.peer(rank)?;
        let _parcel = lock(receiving);
        read(stream).map_err(|reason| self.monitor.explain(rank, reason))
    }

    /// Shuts all connections: nothing more can be sent or received, here or by the other ranks, and blocked calls return.
    pub fn close(&self) {
        for peer in self.peers.iter().flatten() {
            // It may have ended already.
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
    }

    fn peer(&self, rank: usize) -> Result<&Peer> {
        let world = self.peers.len();
        self.peers.get(rank).and_then(Option::as_ref).ok_or(Error::World { rank, world })
    }
}

impl Drop for Parcels {
    fn drop(&mut self) {
        self.close();
    }
}

/// A thread that panicked has ended its rank.
fn lock(parcel: &Mutex<()>) -> MutexGuard<'_, ()> {
    parcel.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_all(mut stream: &TcpStream, header: &[u8], bytes: &[u8]) -> io::Result<()> {
    // Both in one segment, where they fit.
    let written = loop {
        match stream.write_vectored(&[IoSlice::new(header), IoSlice::new(bytes)]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            written => break written?,
        }
    };
    stream.write_all(header.get(written..).unwrap_or_default())?;
    stream.write_all(&bytes[written.saturating_sub(HEADER_BYTES)..])
}

fn read(mut stream: &TcpStream) -> Result<(u32, Vec<u8>), LossReason> {
    let closed = |_: io::Error| LossReason::Closed;
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).map_err(closed)?;
    let [a, b, c, d, length @ ..] = header;
    let (tag, length) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(length));
    if length > BULK_LIMIT {
        return Err(LossReason::Garbage("a parcel over the limit"));
    }
    // Grows with what arrives, from a size that costs nothing.
    let mut bytes = Vec::with_capacity((length as usize).min(EXPECTED_BYTES));
    stream.take(length).read_to_end(&mut bytes).map_err(closed)?;
    if bytes.len() as u64 == length { Ok((tag, bytes)) } else { Err(LossReason::Closed) }
}

/// Room that is made for a parcel before its bytes come: a tensor of an expert and more.
const EXPECTED_BYTES: usize = 16 << 20;
