//! A follower's side of a gathering: finds the leader, is checked, waits for the others. Not what follows.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use spark_backend::Rank;

use crate::handshake::{Failure, Hello, Introduction, Key, Purpose, introduce, settle};
use crate::team::{Follower, Parts, START};
use crate::{Error, HANDSHAKE_TIMEOUT, MAX_WORLD, Refusal, Result, deadline};

/// Time between two attempts to reach the leader.
const RETRY: Duration = Duration::from_millis(100);

/// Joins the leader at `address` as `rank` of `world` and returns when all ranks are there. Tries again while the leader
/// does not listen, or ends before all are there.
///
/// # Errors
/// [`Error::Refused`], which is final and says which item differs; [`Error::NotALeader`]; [`Error::Connect`] after `timeout`;
/// [`Error::World`].
pub fn join(
    address: SocketAddr,
    rank: usize,
    world: usize,
    hello: &Hello,
    timeout: Duration,
) -> Result<Follower> {
    let rank = Rank::new(rank, world)
        .filter(|rank| world <= MAX_WORLD && !rank.is_first())
        .ok_or(Error::World { rank, world })?;
    let key = Key::new(&hello.token);
    let until = deadline(timeout);
    loop {
        let source = match attempt(address, rank, hello, &key, until) {
            Ok(parts) => return Follower::assemble(rank, key, parts),
            // The gathering that gave the session has ended; the next one gives another.
            Err(Failure::Refused(Refusal::Session)) => io::ErrorKind::ConnectionReset.into(),
            Err(Failure::Refused(refusal)) => return Err(Error::Refused { address, refusal }),
            Err(Failure::Stranger(reason)) => return Err(Error::NotALeader { address, reason }),
            Err(Failure::Io(error)) => error,
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Connect { address, waited: timeout, source });
        }
        std::thread::sleep(RETRY.min(left));
    }
}

fn attempt(
    address: SocketAddr,
    rank: Rank,
    hello: &Hello,
    key: &Key,
    until: Instant,
) -> Result<Parts, Failure> {
    let introduction = |purpose| Introduction::new(hello, rank.index(), rank.world(), purpose);
    let (plan, session) = open(address, key, &introduction(Purpose::Plan), until)?;
    let (bulk, _) = open(address, key, &introduction(Purpose::Bulk(session)), until)?;
    let (liveness, _) = open(address, key, &introduction(Purpose::Liveness(session)), until)?;
    await_start(&plan, until)?;
    Ok(Parts { plan, bulk, liveness })
}

/// One connection with its handshake, and the session that the other side gave.
pub(crate) fn open(
    address: SocketAddr,
    key: &Key,
    introduction: &Introduction,
    until: Instant,
) -> Result<(TcpStream, [u8; 32]), Failure> {
    let until = until.min(Instant::now() + HANDSHAKE_TIMEOUT);
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let stream = TcpStream::connect_timeout(&address, left)?;
    // A port of this machine that nobody listens on can be connected with itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(Failure::Io(io::ErrorKind::ConnectionRefused.into()));
    }
    let session = introduce(&stream, key, introduction, until)?;
    settle(&stream)?;
    Ok((stream, session))
}

fn await_start(mut plan: &TcpStream, until: Instant) -> Result<(), Failure> {
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    plan.set_read_timeout(Some(left))?;
    let mut word = [0];
    plan.read_exact(&mut word).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, "joined, but other ranks did not")
        }
        _ => error,
    })?;
    plan.set_read_timeout(None)?;
    if word[0] == START { Ok(()) } else { Err(Failure::Stranger("it does not begin with the start")) }
}
