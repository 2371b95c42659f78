//! Takes connections and shakes hands with each on its own thread, so that none can delay another. Not who is let in.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::handshake::{Failure, Key, Waiting};
use crate::{Error, HANDSHAKE_TIMEOUT, Refusal, Result};

/// Handshakes at a time; further connections are closed at once and may try again.
const MAX_PENDING: usize = 128;

/// How a connection's handshake ended.
pub(crate) enum Outcome {
    /// It knows the token and waits for the verdict.
    Introduced(SocketAddr, Box<Waiting>),
    /// It was turned away.
    Refused(SocketAddr, Refusal),
    /// It does not speak the protocol.
    Stranger(SocketAddr, String),
}

/// Takes connections until it is dropped.
pub(crate) struct Acceptor {
    outcomes: Receiver<Outcome>,
    /// Dropped first: its end wakes the thread.
    wake: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    pub(crate) fn start(listener: &TcpListener, key: Key) -> Result<Self> {
        let prepare = || -> io::Result<_> {
            listener.set_nonblocking(true)?;
            let (wake, woken) = UnixStream::pair()?;
            let (sender, outcomes) = channel();
            let accepting = Accepting { listener: listener.try_clone()?, woken, key, sender };
            let thread = std::thread::Builder::new().name("ranks".into()).spawn(move || accepting.run())?;
            Ok(Acceptor { outcomes, wake: Some(wake), thread: Some(thread) })
        };
        prepare().map_err(Error::system("take connections of ranks"))
    }

    /// The next outcome; `None` at `until`.
    pub(crate) fn next(&self, until: Instant) -> Option<Outcome> {
        self.outcomes.recv_timeout(until.saturating_duration_since(Instant::now())).ok()
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        drop(self.wake.take());
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been printed; there is nothing to add here.
            let _ = thread.join();
        }
    }
}

struct Accepting {
    listener: TcpListener,
    woken: UnixStream,
    key: Key,
    sender: Sender<Outcome>,
}

impl Accepting {
    fn run(&self) {
        let pending = Arc::new(AtomicUsize::new(0));
        while !self.is_over(true, None) {
            match self.listener.accept() {
                Ok((stream, address)) => self.shake_hands(stream, address, &pending),
                Err(error) if passes(&error) => {}
                // Out of descriptors: accept would fail again at once.
                Err(_) => {
                    self.is_over(false, Some(Duration::from_millis(100)));
                }
            }
        }
    }

    /// Waits for a connection (if asked to), the end, or the timeout; whether it is the end.
    fn is_over(&self, connections: bool, timeout: Option<Duration>) -> bool {
        let mut descriptors = vec![PollFd::new(&self.woken, PollFlags::IN)];
        if connections {
            descriptors.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        let timeout = timeout.map(|time| Timespec { tv_sec: 0, tv_nsec: i64::from(time.subsec_nanos()) });
        match poll(&mut descriptors, timeout.as_ref()) {
            Ok(_) => !descriptors[0].revents().is_empty(),
            Err(error) => error != rustix::io::Errno::INTR,
        }
    }

    fn shake_hands(&self, stream: TcpStream, address: SocketAddr, pending: &Arc<AtomicUsize>) {
        let place = Place::take(pending);
        if place.number >= MAX_PENDING {
            return;
        }
        let (sender, key) = (self.sender.clone(), self.key);
        let until = Instant::now() + HANDSHAKE_TIMEOUT;
        // Without a thread the stream is dropped here, and the peer tries again.
        let _ = std::thread::Builder::new().name("handshake".into()).spawn(move || {
            let outcome = match Waiting::receive(stream, key, until) {
                Ok(waiting) => Outcome::Introduced(address, Box::new(waiting)),
                Err(Failure::Refused(refusal)) => Outcome::Refused(address, refusal),
                Err(Failure::Stranger(reason)) => Outcome::Stranger(address, reason.to_owned()),
                Err(Failure::Io(error)) => Outcome::Stranger(address, error.to_string()),
            };
            drop(place);
            // Nobody listens any more: the gathering is over.
            let _ = sender.send(outcome);
        });
    }
}

/// Errors of `accept` that concern one connection only.
fn passes(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted | ConnectionReset)
}

/// One of the places for pending handshakes, given back when dropped.
struct Place {
    number: usize,
    count: Arc<AtomicUsize>,
}

impl Place {
    fn take(count: &Arc<AtomicUsize>) -> Self {
        Place { number: count.fetch_add(1, Ordering::Relaxed), count: count.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}
