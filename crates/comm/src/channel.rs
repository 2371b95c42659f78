//! Messages on the plan and bulk connections: lengths, limits, encoding. Not what they mean.

use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::monitor::{LossReason, Monitor};
use crate::{BULK_LIMIT, Error, PLAN_LIMIT, Result, STILL_WAITING};

/// Sends plans to all followers.
pub struct PlanSender {
    peers: Vec<(usize, TcpStream)>,
    monitor: Monitor,
    buffer: Vec<u8>,
}

impl PlanSender {
    pub(crate) fn new(peers: Vec<(usize, TcpStream)>, monitor: Monitor) -> Self {
        PlanSender { peers, monitor, buffer: Vec::new() }
    }

    /// Sends one message to every follower; returns when the system has taken it, not when they have read it.
    ///
    /// # Errors
    /// [`Error::Lost`]; [`Error::TooLarge`] over [`PLAN_LIMIT`] and [`Error::Encode`], of which nothing was sent.
    pub fn send(&mut self, message: &impl Serialize) -> Result<()> {
        self.monitor.check()?;
        encode("plan", message, &mut self.buffer, 4, PLAN_LIMIT)?;
        for (rank, stream) in &mut self.peers {
            stream.write_all(&self.buffer).map_err(|_| self.monitor.explain(*rank, LossReason::Closed))?;
        }
        trim(&mut self.buffer);
        Ok(())
    }
}

/// Receives the leader's plans.
pub struct PlanReceiver {
    stream: BufReader<TcpStream>,
    monitor: Monitor,
    buffer: Vec<u8>,
}

impl PlanReceiver {
    pub(crate) fn new(stream: TcpStream, monitor: Monitor) -> Self {
        PlanReceiver { stream: BufReader::with_capacity(64 << 10, stream), monitor, buffer: Vec::new() }
    }

    /// Waits for the next message, as long as the leader lives.
    ///
    /// # Errors
    /// [`Error::Lost`], also when what came is no such message.
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<T> {
        self.monitor.check()?;
        let message = receive(&mut self.stream, &mut self.buffer, Prefix::Plan);
        trim(&mut self.buffer);
        message.map_err(|reason| self.monitor.explain(0, reason))
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        self.stream.get_ref()
    }
}

/// The leader's side of the bulk connections.
pub struct BulkLeader {
    peers: Vec<(usize, TcpStream)>,
    monitor: Monitor,
    buffer: Vec<u8>,
}

impl BulkLeader {
    pub(crate) fn new(peers: Vec<(usize, TcpStream)>, monitor: Monitor) -> Self {
        BulkLeader { peers, monitor, buffer: Vec::new() }
    }

    /// Sends one message to every follower, one after the other. A message that does not fit the system's buffers waits
    /// until the follower reads it.
    ///
    /// # Errors
    /// [`Error::Lost`]; [`Error::TooLarge`] over [`BULK_LIMIT`] and [`Error::Encode`], of which nothing was sent.
    pub fn send(&mut self, message: &impl Serialize) -> Result<()> {
        self.monitor.check()?;
        encode("bulk", message, &mut self.buffer, 8, BULK_LIMIT)?;
        for (rank, stream) in &mut self.peers {
            stream.write_all(&self.buffer).map_err(|_| self.monitor.explain(*rank, LossReason::Closed))?;
        }
        trim(&mut self.buffer);
        Ok(())
    }

    /// One message of every follower, in rank order: `[rank - 1]`. What they say with it is `awaited`: the log names it, and who has not
    /// said it, once a minute.
    ///
    /// # Errors
    /// [`Error::Lost`], also when what came is no such message.
    pub fn gather<T: DeserializeOwned>(&mut self, awaited: &str) -> Result<Vec<T>> {
        self.monitor.check()?;
        let mut messages = Vec::with_capacity(self.peers.len());
        for index in 0..self.peers.len() {
            while !is_readable(&self.peers[index].1, STILL_WAITING) {
                let silent = silent(&self.peers[index..]);
                tracing::warn!("waiting for ranks {silent:?}: they live, and have not said yet {awaited}");
            }
            let (rank, stream) = &mut self.peers[index];
            let message = receive(stream, &mut self.buffer, Prefix::Bulk);
            messages.push(message.map_err(|reason| self.monitor.explain(*rank, reason))?);
        }
        trim(&mut self.buffer);
        Ok(messages)
    }
}

/// A follower's side of the bulk connection.
pub struct BulkFollower {
    stream: TcpStream,
    monitor: Monitor,
    buffer: Vec<u8>,
}

impl BulkFollower {
    pub(crate) fn new(stream: TcpStream, monitor: Monitor) -> Self {
        BulkFollower { stream, monitor, buffer: Vec::new() }
    }

    /// Waits for the leader's next message, as long as the leader lives.
    ///
    /// # Errors
    /// [`Error::Lost`], also when what came is no such message.
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<T> {
        self.monitor.check()?;
        let message = receive(&mut self.stream, &mut self.buffer, Prefix::Bulk);
        trim(&mut self.buffer);
        message.map_err(|reason| self.monitor.explain(0, reason))
    }

    /// The same for a message that has to come, with which the leader says what is `awaited`: the log names it once a minute.
    ///
    /// # Errors
    /// As for [`recv`](Self::recv).
    pub fn recv_awaited<T: DeserializeOwned>(&mut self, awaited: &str) -> Result<T> {
        while !is_readable(&self.stream, STILL_WAITING) {
            tracing::warn!("waiting for rank 0: it lives, and has not said yet {awaited}");
        }
        self.recv()
    }

    /// Sends one message to the leader.
    ///
    /// # Errors
    /// [`Error::Lost`]; [`Error::TooLarge`] over [`BULK_LIMIT`] and [`Error::Encode`], of which nothing was sent.
    pub fn send(&mut self, message: &impl Serialize) -> Result<()> {
        self.monitor.check()?;
        encode("bulk", message, &mut self.buffer, 8, BULK_LIMIT)?;
        let sent = self.stream.write_all(&self.buffer);
        trim(&mut self.buffer);
        sent.map_err(|_| self.monitor.explain(0, LossReason::Closed))
    }
}

/// Waits until something can be read, or the connection has ended, but not longer than `within`; whether it was so.
fn is_readable(stream: &TcpStream, within: Duration) -> bool {
    let seconds = i64::try_from(within.as_secs()).unwrap_or(i64::MAX);
    let timeout = Timespec { tv_sec: seconds, tv_nsec: i64::from(within.subsec_nanos()) };
    loop {
        match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            // Reading says what is wrong.
            Err(_) => return true,
        }
    }
}

/// Those of `peers` of which nothing has come.
fn silent(peers: &[(usize, TcpStream)]) -> Vec<usize> {
    let silent = peers.iter().filter(|(_, stream)| !is_readable(stream, Duration::ZERO));
    silent.map(|(rank, _)| *rank).collect()
}

/// Buffers keep their memory from message to message up to this: one large picture or plan must not hold its size forever.
const KEPT_BYTES: usize = 1 << 20;

fn trim(buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.shrink_to(KEPT_BYTES);
}

/// `buffer` becomes `prefix` bytes of length, then the message.
fn encode(
    channel: &'static str,
    message: &impl Serialize,
    buffer: &mut Vec<u8>,
    prefix: usize,
    limit: u64,
) -> Result<()> {
    let mut bytes = std::mem::take(buffer);
    bytes.clear();
    bytes.resize(prefix, 0);
    let mut bytes =
        postcard::to_extend(message, bytes).map_err(|source| Error::Encode { channel, source })?;
    let length = (bytes.len() - prefix) as u64;
    if length > limit {
        return Err(Error::TooLarge { channel, bytes: length, limit });
    }
    bytes[..prefix].copy_from_slice(&length.to_le_bytes()[..prefix]);
    *buffer = bytes;
    Ok(())
}

#[derive(Clone, Copy)]
pub(crate) enum Prefix {
    Plan,
    Bulk,
}

/// Reads one message; on failure why the peer counts as lost.
pub(crate) fn receive<T: DeserializeOwned>(
    stream: &mut impl Read,
    buffer: &mut Vec<u8>,
    prefix: Prefix,
) -> Result<T, LossReason> {
    let (bytes, limit) = match prefix {
        Prefix::Plan => (4, PLAN_LIMIT),
        Prefix::Bulk => (8, BULK_LIMIT),
    };
    let mut length = [0; 8];
    let closed = |_: io::Error| LossReason::Closed;
    stream.read_exact(&mut length[..bytes]).map_err(closed)?;
    let length = u64::from_le_bytes(length);
    if length > limit {
        return Err(LossReason::Garbage("a length over the limit"));
    }
    buffer.clear();
    // Grows with what arrives: the length alone reserves nothing.
    let read = stream.by_ref().take(length).read_to_end(buffer).map_err(closed)?;
    if read as u64 != length {
        return Err(LossReason::Closed);
    }
    match postcard::take_from_bytes(buffer) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(LossReason::Garbage("a message with a rest")),
        Err(_) => Err(LossReason::Garbage("a message of another type")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Shutdown, TcpListener};

    use super::*;

    #[test]
    fn who_has_said_nothing_is_known_and_an_end_is_something() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = || {
            let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (ours, listener.accept().unwrap().0)
        };
        let (ours, mut theirs): (Vec<_>, Vec<_>) = (0..4).map(|_| pair()).unzip();
        let peers: Vec<(usize, TcpStream)> = (1..).zip(ours).collect();
        assert_eq!(silent(&peers), [1, 2, 3, 4]);
        theirs[1].write_all(&[1]).unwrap();
        theirs[3].shutdown(Shutdown::Both).unwrap();
        for index in [1, 3] {
            assert!(is_readable(&peers[index].1, Duration::from_secs(60)));
        }
        assert!(!is_readable(&peers[0].1, Duration::from_millis(5)));
        assert_eq!(silent(&peers), [1, 3]);
    }
}
