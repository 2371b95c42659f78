//! A team of ranks that have joined: the leader's and the follower's side. Not how they came together.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};

use serde::Serialize;
use serde::de::DeserializeOwned;
use spark_backend::Rank;

use crate::channel::{BulkFollower, BulkLeader, PlanReceiver, PlanSender};
use crate::handshake::Key;
use crate::monitor::Monitor;
use crate::{Error, Parcels, Result, TcpCollective, mesh};

/// First byte of a plan connection after the handshake: all ranks are there.
pub(crate) const START: u8 = 1;

/// The connections between the leader and one follower.
pub(crate) struct Parts {
    pub(crate) plan: TcpStream,
    pub(crate) bulk: TcpStream,
    pub(crate) liveness: TcpStream,
}

/// Rank 0 of a team.
pub struct Leader {
    rank: Rank,
    key: Key,
    /// Where it listens: collectives use the same interface.
    interface: SocketAddr,
    plan: PlanSender,
    bulk: BulkLeader,
    monitor: Monitor,
}

/// Any other rank of a team.
pub struct Follower {
    rank: Rank,
    key: Key,
    plan: PlanReceiver,
    bulk: BulkFollower,
    monitor: Monitor,
}

impl Leader {
    /// Tells all followers (`[rank - 1]`) that all are there.
    pub(crate) fn assemble(rank: Rank, key: Key, interface: SocketAddr, parts: Vec<Parts>) -> Result<Self> {
        let (mut plan, mut bulk, mut liveness, mut sockets) = (vec![], vec![], vec![], vec![]);
        for (peer, parts) in (1..).zip(parts) {
            // A follower that has ended meanwhile is noticed by the monitor.
            let _ = (&parts.plan).write_all(&[START]);
            sockets.extend(clones(&[&parts.plan, &parts.bulk])?);
            plan.push((peer, parts.plan));
            bulk.push((peer, parts.bulk));
            liveness.push((peer, parts.liveness));
        }
        let monitor = Monitor::start(rank, liveness).map_err(Error::system("watch the ranks"))?;
        monitor.attach(sockets);
        Ok(Leader {
            rank,
            key,
            interface,
            plan: PlanSender::new(plan, monitor.clone()),
            bulk: BulkLeader::new(bulk, monitor.clone()),
            monitor,
        })
    }

    /// Its rank: 0 of the world.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The monitor of this team.
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    /// [`PlanSender::send`].
    ///
    /// # Errors
    /// As there.
    pub fn send_plan(&mut self, message: &impl Serialize) -> Result<()> {
        self.plan.send(message)
    }

    /// [`BulkLeader::send`].
    ///
    /// # Errors
    /// As there.
    pub fn send_bulk(&mut self, message: &impl Serialize) -> Result<()> {
        self.bulk.send(message)
    }

    /// [`BulkLeader::gather`].
    ///
    /// # Errors
    /// As there.
    pub fn gather<T: DeserializeOwned>(&mut self, awaited: &str) -> Result<Vec<T>> {
        self.bulk.gather(awaited)
    }

    /// Collectives over TCP among all ranks; every rank calls this at the same place of its bulk messages.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::System`].
    pub fn collective(&mut self) -> Result<TcpCollective> {
        let streams = self.mesh()?;
        TcpCollective::new(&self.monitor, streams)
    }

    /// Connections for parcels among all ranks; every rank calls this at the same place of its bulk messages.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::System`].
    pub fn parcels(&mut self) -> Result<Parcels> {
        let streams = self.mesh()?;
        Parcels::new(&self.monitor, streams)
    }

    fn mesh(&mut self) -> Result<mesh::Streams> {
        mesh::lead(self.key, self.interface, &mut self.bulk, &self.monitor)
    }

    /// Its parts, for different threads. The goodbye is said when the last of them is dropped.
    pub fn split(self) -> (PlanSender, BulkLeader, Monitor) {
        (self.plan, self.bulk, self.monitor)
    }
}

impl Follower {
    pub(crate) fn assemble(rank: Rank, key: Key, parts: Parts) -> Result<Self> {
        let sockets = clones(&[&parts.plan, &parts.bulk])?;
        let monitor =
            Monitor::start(rank, vec![(0, parts.liveness)]).map_err(Error::system("watch the leader"))?;
        monitor.attach(sockets);
        Ok(Follower {
            rank,
            key,
            plan: PlanReceiver::new(parts.plan, monitor.clone()),
            bulk: BulkFollower::new(parts.bulk, monitor.clone()),
            monitor,
        })
    }

    /// Its rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The monitor of this team.
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    /// [`PlanReceiver::recv`].
    ///
    /// # Errors
    /// As there.
    pub fn recv_plan<T: DeserializeOwned>(&mut self) -> Result<T> {
        self.plan.recv()
    }

    /// [`BulkFollower::recv`].
    ///
    /// # Errors
    /// As there.
    pub fn recv_bulk<T: DeserializeOwned>(&mut self) -> Result<T> {
        self.bulk.recv()
    }

    /// [`BulkFollower::send`].
    ///
    /// # Errors
    /// As there.
    pub fn send_bulk(&mut self, message: &impl Serialize) -> Result<()> {
        self.bulk.send(message)
    }

    /// Collectives over TCP among all ranks; every rank calls this at the same place of its bulk messages.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::System`].
    pub fn collective(&mut self) -> Result<TcpCollective> {
        let streams = self.mesh()?;
        TcpCollective::new(&self.monitor, streams)
    }

    /// Connections for parcels among all ranks; every rank calls this at the same place of its bulk messages.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::System`].
    pub fn parcels(&mut self) -> Result<Parcels> {
        let streams = self.mesh()?;
        Parcels::new(&self.monitor, streams)
    }

    fn mesh(&mut self) -> Result<mesh::Streams> {
        mesh::follow(self.key, self.plan.stream(), &mut self.bulk, &self.monitor)
    }

    /// Its parts, for different threads. The goodbye is said when the last of them is dropped.
    pub fn split(self) -> (PlanReceiver, BulkFollower, Monitor) {
        (self.plan, self.bulk, self.monitor)
    }
}

fn clones(streams: &[&TcpStream]) -> Result<Vec<TcpStream>> {
    let clones = streams.iter().map(|stream| stream.try_clone()).collect::<std::io::Result<_>>();
    clones.map_err(Error::system("share a connection between threads"))
}
