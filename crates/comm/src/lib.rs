//! How ranks find each other, check each other and exchange plans and tensors. Not what they compute.
//!
//! # Protocol
//! Rank 0, the leader, listens on one address; every other rank, a follower, opens three TCP connections to it:
//!
//! | connection | carries | one message |
//! |---|---|---|
//! | plan | the leader's step plans: latency counts | `u32` length, then postcard; at most [`PLAN_LIMIT`] bytes |
//! | bulk | admissions, addresses, memory plans, both ways | `u64` length, then postcard; at most [`BULK_LIMIT`] bytes |
//! | liveness | heartbeats, losses, the wish to stop, the goodbye | one byte |
//!
//! [`TcpCollective`] adds one connection between each two ranks, and so does [`Parcels`] (`u32` tag, `u64` length, bytes; at most
//! [`BULK_LIMIT`]). All integers are little-endian.
//!
//! Each connection begins with the same handshake (`handshake.rs`), within [`HANDSHAKE_TIMEOUT`], on a thread of its own:
//! 1. The joiner knocks: 8 bytes that name this protocol, its version, 32 random bytes. Anything else is a stranger and
//!    is closed, so a port scanner or a browser neither stops nor delays a gathering.
//! 2. The leader answers with the same 8 bytes, its version and 32 random bytes of its own.
//! 3. The joiner sends a proof and its introduction. The proof is a keyed BLAKE3 hash of both random values and the
//!    introduction, under a key derived from the token. It is compared in constant time before the introduction is
//!    parsed.
//! 4. Then program version, model hash, settings hash, world and rank are compared, in this order. The leader answers
//!    with a session number and a proof of its own, or with the [`Refusal`] that names the item that differs.
//!
//! Plan comes first and is given a random session; bulk and liveness must present it. A number that has joined is refused
//! a second time, unless its first holder has closed its connection, or its machine has answered nothing for [`UNREACHABLE`]. When
//! all ranks are there, the leader says so on all plan connections, and heartbeats begin.
//!
//! # The end of a team
//! Each side of a liveness connection sends a byte every [`HEARTBEAT`]. A closed connection is a loss at once, silence is one
//! after [`SILENCE`] (a stopped process keeps its connections open). A team does not survive a loss: the rank that sees
//! it tells all ranks it is connected to and shuts all its sockets, so that every blocked call returns with the same
//! [`PeerLost`]. The same [`Listener`] then gathers a new team. Dropping all parts of a team says goodbye instead:
//! [`LossReason::Left`].
//!
//! # Limits and security
//! Every length is compared with its limit before memory is reserved, and memory for bulk grows with what has arrived.
//! The token never travels, and protects against accidents and strangers: traffic is neither encrypted nor authenticated
//! after the handshake. Listen on the rail between the machines only.
#![deny(unsafe_code)]
#![allow(unexpected_cfgs, reason = "`cargo xtask fuzz` sets `fuzzing`, as other fuzzers do")]

mod acceptor;
mod channel;
mod collective;
mod error;
mod exchange;
#[cfg(fuzzing)]
pub mod fuzz;
mod handshake;
mod join;
mod listener;
mod mesh;
mod monitor;
#[allow(unsafe_code, reason = "functions of another library")]
pub mod nccl;
mod parcels;
mod team;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

pub use channel::{BulkFollower, BulkLeader, PlanReceiver, PlanSender};
pub use collective::{AbortHandle, TcpCollective};
pub use error::{Error, Refusal, Result};
pub use handshake::{Hello, PROTOCOL};
pub use join::join;
pub use listener::{JoinEvent, Listener, Stopper};
pub use monitor::{LossReason, Monitor, PeerLost};
pub use parcels::Parcels;
pub use team::{Follower, Leader};

/// Most ranks of a group.
pub const MAX_WORLD: usize = 64;

/// Most bytes of a message on a plan connection. A plan of thousands of sequences is a few hundred kilobytes, but those that enter their
/// slots may bring their prompts, and many that share a prefix enter together: 64 of 262,144 tokens are 50 MB.
pub const PLAN_LIMIT: u64 = 256 << 20;

/// Most bytes of a message on a bulk connection or of one rank's part in a collective.
pub const BULK_LIMIT: u64 = 1 << 30;

/// How long the handshake of one connection may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// Time between two heartbeats.
pub const HEARTBEAT: Duration = Duration::from_millis(200);

/// After so much silence a peer counts as lost: five heartbeats.
pub const SILENCE: Duration = Duration::from_secs(1);

/// After so long a machine that answers nothing counts as gone where nothing is said: while ranks gather. The system asks by itself
/// (TCP keepalive); later heartbeats notice earlier.
pub const UNREACHABLE: Duration = Duration::from_secs(5);

/// A message of a rank that lives is waited for as long as it takes, since a load may be slow; after each such time the log says which
/// rank it is, and what it has yet to say.
const STILL_WAITING: Duration = Duration::from_secs(60);

/// When a wait of `timeout` ends: of one that no clock can count, in a hundred years.
fn deadline(timeout: Duration) -> Instant {
    const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    Instant::now() + timeout.min(LONGEST)
}
