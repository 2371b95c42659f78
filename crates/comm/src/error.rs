//! The one error type of this crate, and why a joining process was turned away. Not the decision what to do then.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::PeerLost;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between ranks.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The leader cannot listen where it was told to.
    #[error(
        "cannot listen for ranks on {address}: {source}; give an address of this machine and a free port"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// No leader could be reached in time.
    #[error(
        "no leader could be joined at {address} within {:.1} s (last attempt: {source}); start rank 0 first, and check that \
         address, port and firewall let this machine reach it",
        waited.as_secs_f64()
    )]
    Connect {
        /// Where the leader should listen.
        address: SocketAddr,
        /// How long this rank tried.
        waited: Duration,
        /// How the last attempt ended.
        source: io::Error,
    },
    /// Something else listens at the leader's address.
    #[error(
        "what listens at {address} is no leader of spark-engine: {reason}; check address, port and token"
    )]
    NotALeader {
        /// The address.
        address: SocketAddr,
        /// What it did.
        reason: &'static str,
    },
    /// The leader turned this process away, for good.
    #[error("the leader at {address} refuses this rank: {refusal}")]
    Refused {
        /// The leader.
        address: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// Not all ranks came.
    #[error("ranks {ranks:?} of {world} did not join within {:.1} s; start them, or look why they ended", waited.as_secs_f64())]
    Missing {
        /// Who is missing.
        ranks: Vec<usize>,
        /// Ranks in the group.
        world: usize,
        /// How long the leader waited.
        waited: Duration,
    },
    /// [`Stopper::stop`](crate::Stopper::stop) was called: it is known that a rank will not come.
    #[error("not all ranks will join: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
    /// A number of ranks that cannot be.
    #[error(
        "a group has 1 to {} ranks and each rank's number is below their count, got rank {rank} of {world}",
        crate::MAX_WORLD
    )]
    World {
        /// The rank.
        rank: usize,
        /// Ranks in the group.
        world: usize,
    },
    /// A message is longer than its connection carries.
    #[error("a {channel} message has {bytes} bytes, the limit is {limit}")]
    TooLarge {
        /// Which connection.
        channel: &'static str,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A message of this process cannot be written as bytes: a mistake in the program.
    #[error("cannot encode a {channel} message: {source}")]
    Encode {
        /// Which connection.
        channel: &'static str,
        /// Why.
        source: postcard::Error,
    },
    /// A peer is gone: the team is over.
    #[error(transparent)]
    Lost(#[from] PeerLost),
    /// Ranks called the same collective with different lengths, or different collectives: they have diverged.
    #[error(
        "rank {rank} called {theirs} where this rank called {ours}: the ranks have diverged; the team is over"
    )]
    Diverged {
        /// The other rank.
        rank: usize,
        /// Its call.
        theirs: String,
        /// This rank's call.
        ours: String,
    },
    /// The system refused a socket, a thread or random numbers.
    #[error("cannot {action}: {source}")]
    System {
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: an [`Error::System`] of this action.
    pub(crate) fn system(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { action, source }
    }
}

/// Which item of a joining process differs from the leader's. Sent to it, so that it can say so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Another version of this protocol.
    #[error(
        "the leader speaks protocol {leader}, this program {joiner}; run the same spark-engine on all machines"
    )]
    Protocol {
        /// The leader's.
        leader: u32,
        /// The joining process's.
        joiner: u32,
    },
    /// The tokens differ. Nothing else was looked at.
    #[error("the tokens differ; give all ranks the same --token")]
    Token,
    /// What came after the token is not what this protocol says.
    #[error("the introduction is not of this protocol; run the same spark-engine on all machines")]
    Malformed,
    /// Another version of the program.
    #[error(
        "the leader runs version {leader}, this rank {joiner}; run the same spark-engine on all machines"
    )]
    Version {
        /// The leader's.
        leader: String,
        /// The joining process's.
        joiner: String,
    },
    /// Another model, or another state of the same.
    #[error("the model differs from the leader's; all ranks need the same files (config and weights)")]
    Model,
    /// Other settings.
    #[error("the settings differ from the leader's; all ranks need the same flags")]
    Settings,
    /// Another number of ranks.
    #[error(
        "the leader gathers {leader} ranks, this one was started for {joiner}; give all ranks the same --world"
    )]
    World {
        /// The leader's.
        leader: u64,
        /// The joining process's.
        joiner: u64,
    },
    /// A number that no follower of this group can have.
    #[error("rank {rank} cannot join a group of {world}: followers are 1 to {}", world.saturating_sub(1))]
    Rank {
        /// The number.
        rank: u64,
        /// Ranks in the group.
        world: u64,
    },
    /// The number is taken by a process that is still there.
    #[error(
        "rank {rank} has already joined from {holder}; give each process its own --rank (or, if that machine has just failed, start \
         this rank again after {} s)",
        crate::UNREACHABLE.as_secs()
    )]
    Taken {
        /// The number.
        rank: u64,
        /// Who has it.
        holder: SocketAddr,
    },
    /// A further connection that belongs to no session of this gathering.
    #[error("the connection belongs to a session that has ended; join again")]
    Session,
}
