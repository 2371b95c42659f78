//! The place of this process among the ranks of a group, and how the group comes together. Who starts the other processes is
//! the program's matter; what ranks compute is the runtime's.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use spark_backend::{Collective, Rank};
use spark_comm::{
    Hello, Leader, Listener, LossReason, Monitor, Parcels,
    nccl::{self, Nccl, UniqueId},
};
use spark_weights::{Exchange, ExchangeError};

use crate::{Error, Result};

/// How long ranks may take to connect with NCCL once all are there.
const NCCL_CONNECTS_WITHIN: Duration = Duration::from_secs(120);

/// The place of this process in a group of ranks, one process each.
#[derive(Clone)]
pub struct Ranks {
    /// Which rank this is.
    pub rank: Rank,
    /// Its number among the ranks of this machine: the GPU that it takes.
    pub local_rank: usize,
    /// Ranks of this machine: they share its cores and memory.
    pub local_world: usize,
    /// The secret that all ranks know.
    pub token: String,
    /// How long ranks wait for each other at the start.
    pub join_timeout: Duration,
    /// Use an NCCL that is known to hang, where no other is there.
    pub allow_old_nccl: bool,
    /// Its part in the group.
    pub role: Role,
    /// Called each time that all ranks are there, before anything is loaded.
    pub on_joined: Option<OnJoined>,
}

/// What a rank does besides computing.
#[derive(Clone)]
pub enum Role {
    /// Rank 0: holds the scheduler and the clients.
    Leader {
        /// Where the others join.
        listener: Arc<Listener>,
        /// Starts them; `None` if somebody else does.
        others: Option<Arc<dyn StartRanks>>,
        /// How long a lost group may take to come back; 0 ends the engine with the group.
        rejoin_timeout: Duration,
    },
    /// Any other rank.
    Follower {
        /// Where rank 0 listens.
        leader: SocketAddr,
    },
}

/// What is done when all ranks are there. The monitor tells later what becomes of them; to keep it longer than the team would
/// keep the team.
pub type OnJoined = Arc<dyn Fn(&Monitor) + Send + Sync>;

/// Starts the other ranks of a group.
pub trait StartRanks: Send + Sync {
    /// Starts all of them; those of an earlier start that still run end first. They join at `leader`.
    ///
    /// # Errors
    /// A process cannot be started.
    fn start(&self, leader: SocketAddr) -> std::io::Result<()>;
}

/// A group whose ranks are connected.
pub(crate) enum Team {
    Leader(Leader),
    Follower(spark_comm::Follower),
}

impl Ranks {
    /// Waits for the other ranks, which must have the same program, the same model and the same settings.
    ///
    /// # Errors
    /// A rank does not come in time, or this one is refused.
    pub(crate) fn gather(&self, model: [u8; 32], settings: &str, timeout: Duration) -> Result<Team> {
        let hello = Hello {
            token: self.token.clone(),
            version: version()?,
            model,
            settings: blake3::hash(settings.as_bytes()).into(),
        };
        let world = self.rank.world();
        let team = match &self.role {
            Role::Leader { listener, others, .. } => {
                let address = listener.local_addr();
                if let Some(others) = others {
                    let problem = |error| Error::option("--tp", format!("starting the ranks: {error}"));
                    others.start(address).map_err(problem)?;
                }
                tracing::info!("waiting at {address} for the others of {world} ranks");
                let began = Instant::now();
                let leader =
                    listener.gather(world, &hello, timeout, &mut |event| tracing::info!("{event}"))?;
                tracing::info!("all {world} ranks are here after {:.1} s", began.elapsed().as_secs_f64());
                Team::Leader(leader)
            }
            Role::Follower { leader } => {
                Team::Follower(spark_comm::join(*leader, self.rank.index(), world, &hello, timeout)?)
            }
        };
        if let Some(on_joined) = &self.on_joined {
            on_joined(&team.monitor());
        }
        Ok(team)
    }

    /// How long a lost group may take to come back.
    pub(crate) fn rejoin_timeout(&self) -> Duration {
        match self.role {
            Role::Leader { rejoin_timeout, .. } => rejoin_timeout,
            Role::Follower { .. } => Duration::ZERO,
        }
    }

    /// `cores` divided among the ranks of this machine.
    pub(crate) fn share_of(&self, cores: usize) -> usize {
        (cores / self.local_world.max(1)).max(1)
    }
}

impl Team {
    /// Collectives over host memory.
    ///
    /// # Errors
    /// A rank is gone.
    pub(crate) fn collective(&mut self) -> Result<Box<dyn Collective>> {
        Ok(Box::new(match self {
            Self::Leader(leader) => leader.collective()?,
            Self::Follower(follower) => follower.collective()?,
        }))
    }

    /// The way on which ranks send each other what they read of a checkpoint.
    ///
    /// # Errors
    /// A rank is gone.
    pub(crate) fn exchange(&mut self) -> Result<Arc<dyn Exchange>> {
        Ok(Arc::new(Way(match self {
            Self::Leader(leader) => leader.parcels()?,
            Self::Follower(follower) => follower.parcels()?,
        })))
    }

    /// A group of GPUs that the backend connects. It is given up when a rank is lost.
    ///
    /// # Errors
    /// No NCCL that can be used, or a rank is gone.
    pub(crate) fn nccl(&mut self, allow_old: bool) -> Result<nccl::Group> {
        let nccl = Nccl::open(allow_old).map_err(|e| Error::option("--tp", e.to_string()))?;
        let id = match self {
            Self::Leader(leader) => {
                let id = nccl.unique_id().map_err(|e| Error::option("--tp", e.to_string()))?;
                leader.send_bulk(&id.bytes().to_vec())?;
                id
            }
            Self::Follower(follower) => {
                let bytes: Vec<u8> = follower.recv_bulk()?;
                let bytes: [u8; UniqueId::LEN] = bytes.try_into().map_err(|bytes: Vec<u8>| {
                    let problem =
                        format!("rank 0 sent an id of {} bytes, not {}", bytes.len(), UniqueId::LEN);
                    Error::option("--tp", problem)
                })?;
                UniqueId::from(bytes)
            }
        };
        let group = nccl::Group::new(&nccl, id, self.rank(), NCCL_CONNECTS_WITHIN);
        let (aborter, checked) = (group.aborter(), group.aborter());
        let monitor = self.monitor();
        monitor.watch_link(move || checked.check().err().map(|error| error.to_string()));
        monitor.watch(move |lost| {
            if lost.reason == LossReason::Link {
                tell_of_rails();
            }
            if !aborter.abort(&lost.to_string()) {
                tracing::error!(
                    "NCCL does not let go of the lost group: only the end of this process frees its GPU"
                );
            }
        });
        Ok(group)
    }

    fn rank(&self) -> Rank {
        match self {
            Self::Leader(leader) => leader.rank(),
            Self::Follower(follower) => follower.rank(),
        }
    }

    fn monitor(&self) -> Monitor {
        match self {
            Self::Leader(leader) => leader.monitor(),
            Self::Follower(follower) => follower.monitor(),
        }
    }
}

/// Says which of the rails that NCCL was given are down.
fn tell_of_rails() {
    let hcas = std::env::var("NCCL_IB_HCA").unwrap_or_default();
    let machine = nccl::Machine::read(Path::new("/"), None, None);
    for rail in nccl::lost_rails(&hcas, &machine) {
        let left: Vec<String> =
            machine.rails.iter().map(|rail| format!("{}:{}", rail.hca, rail.port)).collect();
        tracing::error!("the rail {rail} is down; what is left: {}", left.join(", "));
    }
}

/// Neither of the two crates that meet here knows the other.
struct Way(Parcels);

impl Exchange for Way {
    fn send(&self, rank: usize, tag: u32, bytes: &[u8]) -> Result<(), ExchangeError> {
        Ok(self.0.send(rank, tag, bytes)?)
    }

    fn receive(&self, rank: usize) -> Result<(u32, Vec<u8>), ExchangeError> {
        Ok(self.0.receive(rank)?)
    }

    fn close(&self) {
        self.0.close();
    }
}

/// Version and contents of the program: ranks that differ in either would not speak and compute alike.
fn version() -> Result<String> {
    let program = crate::fingerprint::program()
        .map_err(|e| Error::option("--tp", format!("reading this program's own file: {e}")))?;
    let short: String = program[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{} ({short})", env!("CARGO_PKG_VERSION")))
}
