//! One connection between each two ranks, for collectives and parcels. Not what they carry.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::acceptor::{Acceptor, Outcome};
use crate::channel::{BulkFollower, BulkLeader};
use crate::handshake::{Failure, Hello, Introduction, Key, Purpose, random};
use crate::join::open;
use crate::monitor::{LossReason, Monitor};
use crate::{Error, Refusal, Result};

/// All ranks begin at the same moment, so this is ample.
const MESH_TIMEOUT: Duration = Duration::from_secs(10);

/// What the leader tells all: where each rank listens.
#[derive(Serialize, Deserialize)]
struct Addresses {
    /// Which mesh: later ones have another.
    group: [u8; 32],
    /// `[rank]`; of rank 0 only the port counts, its host is where each rank reached the leader.
    by_rank: Vec<SocketAddr>,
}

/// A connection to each other rank, `[rank]`.
pub(crate) type Streams = Vec<Option<TcpStream>>;

/// The leader's side.
pub(crate) fn lead(
    key: Key,
    interface: SocketAddr,
    bulk: &mut BulkLeader,
    monitor: &Monitor,
) -> Result<Streams> {
    let listener = listen(interface)?;
    let mut by_rank = vec![local_addr(&listener)?];
    by_rank.extend(bulk.gather::<SocketAddr>("where they listen")?);
    let group = random().map_err(Error::system("draw random numbers"))?;
    let addresses = Addresses { group, by_rank };
    bulk.send(&addresses)?;
    connect(key, &listener, &addresses, monitor)
}

/// A follower's side; `plan` is its connection to the leader.
pub(crate) fn follow(
    key: Key,
    plan: &TcpStream,
    bulk: &mut BulkFollower,
    monitor: &Monitor,
) -> Result<Streams> {
    let ends = || -> io::Result<_> { Ok((plan.local_addr()?, plan.peer_addr()?)) };
    let (mine, leader) = ends().map_err(|_| monitor.explain(0, LossReason::Closed))?;
    let listener = listen(mine)?;
    bulk.send(&local_addr(&listener)?)?;
    let mut addresses: Addresses = bulk.recv()?;
    if addresses.by_rank.len() != monitor.rank().world() {
        return Err(monitor.explain(0, LossReason::Garbage("addresses of another number of ranks")));
    }
    let port = addresses.by_rank[0].port();
    addresses.by_rank[0] = leader;
    addresses.by_rank[0].set_port(port);
    connect(key, &listener, &addresses, monitor)
}

/// On a free port of the interface that has this address.
fn listen(mut address: SocketAddr) -> Result<TcpListener> {
    address.set_port(0);
    TcpListener::bind(address).map_err(|source| Error::Bind { address, source })
}

fn local_addr(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().map_err(Error::system("ask for the address of a socket"))
}

/// Connects to all lower ranks and takes the connections of all higher ones.
fn connect(key: Key, listener: &TcpListener, addresses: &Addresses, monitor: &Monitor) -> Result<Streams> {
    let rank = monitor.rank();
    let until = Instant::now() + MESH_TIMEOUT;
    let acceptor = Acceptor::start(listener, key)?;
    let mut streams: Streams = (0..rank.world()).map(|_| None).collect();
    for (peer, &address) in addresses.by_rank.iter().enumerate().take(rank.index()) {
        streams[peer] = Some(reach(address, peer, key, addresses.group, monitor, until)?);
    }
    while let Some(missing) = (rank.index() + 1..rank.world()).find(|&peer| streams[peer].is_none()) {
        monitor.check()?;
        if Instant::now() >= until {
            return Err(monitor.explain(missing, LossReason::Closed));
        }
        // Short waits, so that a loss is noticed.
        let next = acceptor.next(until.min(Instant::now() + Duration::from_millis(100)));
        let Some(Outcome::Introduced(_, waiting)) = next else { continue };
        let (peer, purpose) = (waiting.introduction.rank as usize, waiting.introduction.purpose);
        if purpose != Purpose::Mesh(addresses.group) || peer <= rank.index() || peer >= rank.world() {
            waiting.refuse(Refusal::Session);
            continue;
        }
        // A second connection replaces the first, which its owner has given up; a broken one is tried again.
        if let Ok(stream) = waiting.welcome(addresses.group) {
            streams[peer] = Some(stream);
        }
    }
    Ok(streams)
}

fn reach(
    address: SocketAddr,
    peer: usize,
    key: Key,
    group: [u8; 32],
    monitor: &Monitor,
    until: Instant,
) -> Result<TcpStream> {
    let rank = monitor.rank();
    // Compared when the team was made; here the group says all.
    let hello = Hello { token: String::new(), version: String::new(), model: [0; 32], settings: [0; 32] };
    let introduction = Introduction::new(&hello, rank.index(), rank.world(), Purpose::Mesh(group));
    loop {
        monitor.check()?;
        match open(address, &key, &introduction, until) {
            Ok((stream, _)) => return Ok(stream),
            Err(Failure::Io(_)) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Failure::Io(_)) => return Err(monitor.explain(peer, LossReason::Closed)),
            Err(_) => return Err(monitor.explain(peer, LossReason::Garbage("handshake of the collective"))),
        }
    }
}
