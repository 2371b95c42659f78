//! Whether machines reach each other at given addresses: by TCP, and by whole frames of UDP that nobody on the way may cut. A probe
//! of our own, because not every machine has `ping` or may use it.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use rustix::net::sockopt::{Ipv4PathMtuDiscovery, set_ip_mtu_discover};
use serde::{Deserialize, Serialize};

/// How long a connection may take: far more than on any local network.
const CONNECTS_WITHIN: Duration = Duration::from_millis(1500);
/// How long an echo may take, and how often it is asked for again: a datagram may be lost for no reason.
const ECHOES_WITHIN: Duration = Duration::from_millis(300);
const ATTEMPTS: usize = 3;
/// Echoes of which the fastest counts.
const ROUNDS: usize = 20;
/// Headers of IPv4 and UDP in a frame.
const HEADERS: usize = 28;
/// Longest datagram that is sent: below the limit of UDP.
const LONGEST: usize = 65_000;
/// Larger than any frame.
const LARGEST: usize = 64 << 10;

/// Where an echo is, and the largest frame of the way to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) frame: usize,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Reached {
    /// Why it could not be reached at all.
    pub(crate) problem: Option<String>,
    /// Why whole frames did not come back.
    pub(crate) cut: Option<String>,
    /// Time of a small datagram there and back, the best of some.
    pub(crate) micros: f64,
}

/// Echoes at `addresses` as long as this process lives: for each its port, of TCP and UDP alike, or why there is none.
pub(super) fn listen(addresses: &[IpAddr]) -> Vec<Result<u16, String>> {
    addresses.iter().map(|&address| echo_at(address).map_err(|error| error.to_string())).collect()
}

fn echo_at(address: IpAddr) -> io::Result<u16> {
    let tcp = TcpListener::bind((address, 0))?;
    let port = tcp.local_addr()?.port();
    let udp = UdpSocket::bind((address, port))?;
    keep_whole(&udp, address)?;
    thread::Builder::new().name("accept".into()).spawn(move || {
        // Accepting is the answer.
        tcp.incoming().for_each(drop);
    })?;
    thread::Builder::new().name("echo".into()).spawn(move || {
        let mut frame = vec![0; LARGEST];
        loop {
            let Ok((length, from)) = udp.recv_from(&mut frame) else { continue };
            // One that cannot be sent is missed at the other side, which is what it is for.
            let _ = udp.send_to(&frame[..length], from);
        }
    })?;
    Ok(port)
}

/// No one on the way may cut its datagrams into smaller frames, this machine included.
fn keep_whole(socket: &UdpSocket, address: IpAddr) -> io::Result<()> {
    if address.is_ipv4() {
        set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::PROBE)?;
    }
    Ok(())
}

pub(super) fn reach(targets: &[Target]) -> Vec<Reached> {
    targets.iter().map(reach_one).collect()
}

fn reach_one(target: &Target) -> Reached {
    let mut reached = Reached { problem: None, cut: None, micros: 0.0 };
    if let Err(error) = TcpStream::connect_timeout(&target.address, CONNECTS_WITHIN) {
        reached.problem = Some(format!("TCP: {error}"));
        return reached;
    }
    match times(target) {
        Ok(micros) => reached.micros = micros,
        Err(error) => {
            reached.problem = Some(format!("UDP: {error}"));
            return reached;
        }
    }
    let size = target.frame.saturating_sub(HEADERS).clamp(1, LONGEST);
    reached.cut = connect(target).and_then(|socket| echo(&socket, size)).err().map(|error| error.to_string());
    reached
}

fn connect(target: &Target) -> io::Result<UdpSocket> {
    let any: IpAddr = match target.address {
        SocketAddr::V4(_) => [0; 4].into(),
        SocketAddr::V6(_) => [0u16; 8].into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    keep_whole(&socket, any)?;
    socket.connect(target.address)?;
    socket.set_read_timeout(Some(ECHOES_WITHIN))?;
    Ok(socket)
}

fn times(target: &Target) -> io::Result<f64> {
    let socket = connect(target)?;
    let times = (0..ROUNDS).map(|_| echo(&socket, 8)).collect::<io::Result<Vec<_>>>()?;
    Ok(times.into_iter().min().unwrap_or_default().as_secs_f64() * 1e6)
}

/// Time of a datagram of `size` bytes there and back.
fn echo(socket: &UdpSocket, size: usize) -> io::Result<Duration> {
    let sent = vec![0x5a; size];
    let mut received = vec![0; size];
    for _ in 0..ATTEMPTS {
        let begin = Instant::now();
        socket.send(&sent)?;
        match socket.recv(&mut received) {
            Ok(length) if length == size => return Ok(begin.elapsed()),
            // A late one of other size.
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("{ATTEMPTS} datagrams without an answer")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_is_reached_with_frames_up_to_what_the_interface_carries() {
        let port = listen(&[[127, 0, 0, 1].into()]).remove(0).unwrap();
        let target = |port, frame| Target { address: ([127, 0, 0, 1], port).into(), frame };
        let [whole, none] = &reach(&[target(port, 9000), target(1, 9000)])[..] else { panic!() };
        assert!(whole.problem.is_none() && whole.cut.is_none() && whole.micros > 0.0, "{whole:?}");
        assert!(none.problem.as_ref().is_some_and(|problem| problem.contains("refused")), "{none:?}");
    }

    #[test]
    fn an_address_of_another_machine_is_no_place_to_listen() {
        let [listening] = &listen(&[[192, 0, 2, 1].into()])[..] else { panic!() };
        assert!(listening.is_err());
    }
}
