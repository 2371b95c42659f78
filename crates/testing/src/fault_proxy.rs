//! A TCP proxy that breaks connections as a test tells it: delay, loss, stalls, resets, garbage. Not a network simulator:
//! TCP hides single lost packets, so loss shows as what it causes, pauses in the stream.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A blocked read or write looks so often whether its connection was reset.
const TICK: Duration = Duration::from_millis(10);
/// Bytes read and passed on at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the side that connected to the proxy.
    ToTarget,
    /// From the target.
    ToClient,
}

/// Passes connections on to a target and does to them what it is told, at any time, from any thread.
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    connections: Vec<Weak<Connection>>,
    /// Bytes passed on, both directions, all connections.
    bytes: u64,
    faults: Faults,
    is_over: bool,
}

#[derive(Default, Clone, Copy)]
struct Faults {
    delay: Duration,
    is_stalled: bool,
    is_refusing: bool,
    reset_at: Option<u64>,
    loss: Option<(u64, Duration)>,
}

struct Connection {
    client: TcpStream,
    target: TcpStream,
    /// Held while bytes are written, so that what is injected stays in one piece.
    writing: [Mutex<()>; 2],
    is_reset: AtomicBool,
}

impl FaultProxy {
    /// Listens on a free port of the loopback interface and passes connections on to `target`, without faults.
    ///
    /// # Errors
    /// The system refuses a socket or a thread.
    pub fn start(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { target, state: Mutex::default(), changed: Condvar::new() });
        let accepting = shared.clone();
        let thread = std::thread::Builder::new().name("fault proxy".into()).spawn(move || {
            for client in listener.incoming() {
                if accepting.state().is_over {
                    return;
                }
                // A connection that cannot be passed on ends here, as at a broken host.
                let _ = client.and_then(|client| Connection::open(&accepting, client));
            }
        })?;
        Ok(FaultProxy { address, shared, thread: Some(thread) })
    }

    /// Where to connect instead of the target.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes are passed on so much later. Holds up what follows, so it also limits the rate.
    pub fn set_delay(&self, delay: Duration) {
        self.set(|faults| faults.delay = delay);
    }

    /// A pause in a direction whenever all connections together have passed `every` more bytes: what a lost packet and its
    /// repetition look like from above TCP. `None`: no loss.
    pub fn set_loss(&self, loss: Option<(u64, Duration)>) {
        self.set(|faults| faults.loss = loss);
    }

    /// Nothing is passed on, and no connection ends, until [`FaultProxy::resume`]: a cable that is out.
    pub fn stall(&self) {
        self.set(|faults| faults.is_stalled = true);
    }

    /// Passes on what was held back.
    pub fn resume(&self) {
        self.set(|faults| faults.is_stalled = false);
    }

    /// Whether new connections are reset at once; those that exist go on.
    pub fn set_refusing(&self, is_refusing: bool) {
        self.set(|faults| faults.is_refusing = is_refusing);
    }

    /// Resets all connections now, towards both sides.
    pub fn reset(&self) {
        self.shared.reset(&mut self.shared.state());
    }

    /// Resets all connections when so many more bytes have passed.
    pub fn reset_after(&self, bytes: u64) {
        let mut state = self.shared.state();
        state.faults.reset_at = Some(state.bytes + bytes);
    }

    /// Puts bytes into connection `number` (in order of connecting, from 0), between what is passed on.
    ///
    /// # Errors
    /// There is no such connection any more, or it does not take the bytes.
    pub fn inject(&self, number: usize, direction: Direction, bytes: &[u8]) -> io::Result<()> {
        let connection = self.shared.state().connections.get(number).and_then(Weak::upgrade);
        connection.ok_or(io::ErrorKind::NotConnected)?.write(direction, bytes)
    }

    /// Waits until so many connections have been passed on; whether that happened in time.
    pub fn wait_for_connections(&self, count: usize, timeout: Duration) -> bool {
        self.wait(timeout, |state| state.connections.len() >= count)
    }

    /// Waits until so many bytes have passed, both directions together; whether that happened in time.
    pub fn wait_for_bytes(&self, bytes: u64, timeout: Duration) -> bool {
        self.wait(timeout, |state| state.bytes >= bytes)
    }

    /// Bytes passed on so far, both directions together.
    pub fn bytes(&self) -> u64 {
        self.shared.state().bytes
    }

    fn set(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.shared.state().faults);
        self.shared.changed.notify_all();
    }

    fn wait(&self, timeout: Duration, is_met: impl Fn(&State) -> bool) -> bool {
        let state = self.shared.state();
        let waited = self.shared.changed.wait_timeout_while(state, timeout, |state| !is_met(state));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.is_over = true;
        self.shared.reset(&mut state);
        drop(state);
        // Wakes `accept`.
        let woken = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset(&self, state: &mut State) {
        state.faults.reset_at = None;
        for connection in state.connections.iter().filter_map(Weak::upgrade) {
            connection.reset();
        }
        self.changed.notify_all();
    }

    /// Waits out what holds back bytes that have just been read; then counts them. Whether they may be passed on.
    fn admit(&self, connection: &Connection, bytes: u64) -> bool {
        let mut state = self.state();
        let mut pause = state.faults.delay;
        if let Some((every, time)) = state.faults.loss {
            let every = every.max(1);
            if (state.bytes + bytes) / every > state.bytes / every {
                pause += time;
            }
        }
        let until = Instant::now() + pause;
        loop {
            if connection.is_reset.load(Ordering::Acquire) {
                return false;
            }
            let left = until.saturating_duration_since(Instant::now());
            let wait = if state.faults.is_stalled { TICK } else { left.min(TICK) };
            if wait.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.bytes += bytes;
        if state.faults.reset_at.is_some_and(|at| state.bytes >= at) {
            self.reset(&mut state);
            return false;
        }
        drop(state);
        self.changed.notify_all();
        true
    }
}

impl Connection {
    fn open(shared: &Arc<Shared>, client: TcpStream) -> io::Result<()> {
        if shared.state().faults.is_refusing {
            return end_with_reset(&client);
        }
        let target = TcpStream::connect(shared.target)?;
        for stream in [&client, &target] {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(TICK))?;
            stream.set_write_timeout(Some(TICK))?;
        }
        let connection =
            Arc::new(Connection { client, target, writing: Default::default(), is_reset: false.into() });
        shared.state().connections.push(Arc::downgrade(&connection));
        shared.changed.notify_all();
        for direction in [Direction::ToTarget, Direction::ToClient] {
            let (shared, connection) = (shared.clone(), connection.clone());
            std::thread::Builder::new()
                .name("fault proxy".into())
                .spawn(move || connection.pump(&shared, direction))?;
        }
        Ok(())
    }

    fn ends(&self, direction: Direction) -> (&TcpStream, &TcpStream) {
        match direction {
            Direction::ToTarget => (&self.client, &self.target),
            Direction::ToClient => (&self.target, &self.client),
        }
    }

    fn pump(&self, shared: &Shared, direction: Direction) {
        let (mut from, to) = self.ends(direction);
        let mut chunk = vec![0; CHUNK_BYTES];
        while !self.is_reset.load(Ordering::Acquire) {
            match from.read(&mut chunk) {
                Ok(0) => {
                    // The other direction may go on.
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
                Ok(bytes) => {
                    if !shared.admit(self, bytes as u64) {
                        return;
                    }
                    if self.write(direction, &chunk[..bytes]).is_err() {
                        return self.reset();
                    }
                }
                Err(error) if waits(&error) => {}
                Err(_) => return self.reset(),
            }
        }
    }

    fn write(&self, direction: Direction, mut bytes: &[u8]) -> io::Result<()> {
        let lock = self.writing[direction as usize].lock();
        let _writing = lock.unwrap_or_else(PoisonError::into_inner);
        let (_, mut to) = self.ends(direction);
        while !bytes.is_empty() {
            if self.is_reset.load(Ordering::Acquire) {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            match to.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if waits(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Its threads let go of it within a tick; then both sockets close with a reset.
    fn reset(&self) {
        let _ = end_with_reset(&self.client).and_then(|()| end_with_reset(&self.target));
        self.is_reset.store(true, Ordering::Release);
    }
}

/// Closing this socket will send a reset instead of an orderly end.
fn end_with_reset(stream: &TcpStream) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?)
}

fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);

    /// A client and what it reaches through a proxy.
    fn connected() -> (FaultProxy, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = FaultProxy::start(listener.local_addr().unwrap()).unwrap();
        let client = TcpStream::connect(proxy.address()).unwrap();
        let (server, _) = listener.accept().unwrap();
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        }
        assert!(proxy.wait_for_connections(1, TIMEOUT));
        (proxy, client, server)
    }

    fn read(mut stream: &TcpStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn passes_both_ways_and_ends_in_order() {
        let (proxy, mut client, mut server) = connected();
        client.write_all(b"there").unwrap();
        assert_eq!(read(&server, 5), b"there");
        server.write_all(b"and back").unwrap();
        assert_eq!(read(&client, 8), b"and back");
        assert_eq!(proxy.bytes(), 13);
        drop(client);
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn delay_and_loss_hold_bytes_back() {
        let (proxy, mut client, server) = connected();
        let begin = Instant::now();
        proxy.set_delay(Duration::from_millis(60));
        client.write_all(b"1").unwrap();
        read(&server, 1);
        assert!(begin.elapsed() >= Duration::from_millis(60));
        proxy.set_delay(Duration::ZERO);
        proxy.set_loss(Some((2, Duration::from_millis(80))));
        let begin = Instant::now();
        client.write_all(b"2").unwrap();
        read(&server, 1);
        assert!(begin.elapsed() >= Duration::from_millis(80));
    }

    #[test]
    fn stalls_and_resumes() {
        let (proxy, mut client, server) = connected();
        proxy.stall();
        client.write_all(b"held").unwrap();
        server.set_read_timeout(Some(Duration::from_millis(80))).unwrap();
        assert!(waits(&(&server).read(&mut [0]).unwrap_err()));
        server.set_read_timeout(Some(TIMEOUT)).unwrap();
        proxy.resume();
        assert_eq!(read(&server, 4), b"held");
    }

    #[test]
    fn resets_now_and_after_bytes() {
        let (proxy, mut client, mut server) = connected();
        proxy.reset();
        for stream in [&mut client, &mut server] {
            assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
        let (proxy, mut client, mut server) = connected();
        proxy.reset_after(3);
        client.write_all(b"12").unwrap();
        assert_eq!(read(&server, 2), b"12");
        client.write_all(b"3").unwrap();
        assert_eq!(server.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn injects_and_refuses() {
        let (proxy, mut client, server) = connected();
        proxy.inject(0, Direction::ToTarget, b"noise").unwrap();
        assert_eq!(read(&server, 5), b"noise");
        proxy.inject(0, Direction::ToClient, b"more").unwrap();
        assert_eq!(read(&client, 4), b"more");
        assert!(proxy.inject(1, Direction::ToClient, b"").is_err());
        proxy.set_refusing(true);
        let mut refused = TcpStream::connect(proxy.address()).unwrap();
        assert_eq!(refused.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        client.write_all(b"old ones go on").unwrap();
        assert_eq!(read(&server, 14), b"old ones go on");
    }
}
