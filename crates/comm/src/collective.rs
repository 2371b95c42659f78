//! Sums and exchanges over one TCP connection between each two ranks, for ranks that compute on the host. Not NCCL.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

use spark_backend::{Collective, Rank};

use crate::exchange::{Call, Exchange, Failure, Operation};
use crate::monitor::{LossReason, Monitor, PeerLost};
use crate::{BULK_LIMIT, Error, Result};

/// Up to so many values every rank sends all of them to every other and sums for itself: one exchange. Above, each rank
/// sums its share and sends the sum: two exchanges of `2 / world` of the bytes. Both add in rank order.
const DIRECT_VALUES: usize = 16 << 10;

/// A full mesh of connections. All ranks call the same operations in the same order; a call that differs ends the team.
pub struct TcpCollective {
    rank: Rank,
    monitor: Monitor,
    exchange: Exchange,
    streams: Arc<[TcpStream]>,
    /// What each peer sent, in rank order without this rank; kept from call to call.
    received: Vec<Vec<f32>>,
}

/// Ends a [`TcpCollective`] from another thread: blocked calls return.
#[derive(Clone)]
pub struct AbortHandle {
    monitor: Monitor,
    streams: Arc<[TcpStream]>,
}

impl AbortHandle {
    /// Gives the team up, as [`Monitor::abort`] does.
    pub fn abort(&self) {
        self.monitor.abort();
        shut(&self.streams);
    }
}

impl TcpCollective {
    /// `streams[rank]`, `None` for this one.
    pub(crate) fn new(monitor: &Monitor, streams: Vec<Option<TcpStream>>) -> Result<Self> {
        let peers: Vec<(usize, TcpStream)> =
            streams.into_iter().enumerate().filter_map(|(rank, stream)| Some((rank, stream?))).collect();
        let prepare = || -> std::io::Result<_> {
            let mut clones = Vec::new();
            for (_, stream) in &peers {
                stream.set_nonblocking(true)?;
                clones.push((stream.try_clone()?, stream.try_clone()?));
            }
            Ok(clones.into_iter().unzip::<_, _, Vec<_>, Vec<_>>())
        };
        let (clones, streams) = prepare().map_err(Error::system("prepare connections for collectives"))?;
        monitor.attach(clones);
        Ok(TcpCollective {
            rank: monitor.rank(),
            monitor: monitor.clone(),
            received: peers.iter().map(|_| Vec::new()).collect(),
            exchange: Exchange::new(peers),
            streams: streams.into(),
        })
    }

    /// For another thread.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle { monitor: self.monitor.clone(), streams: self.streams.clone() }
    }

    /// [`Collective::all_reduce`] with this crate's error.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Diverged`], [`Error::TooLarge`].
    pub fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        if self.rank.world() <= 2 || values.len() <= DIRECT_VALUES {
            self.sum_direct(values)
        } else {
            self.sum_by_shares(values)
        }
    }

    fn sum_direct(&mut self, values: &mut [f32]) -> Result<()> {
        let call = Call { operation: Operation::Sum, length: values.len() };
        self.run(call, |_| &*values, |_| Some(values.len()))?;
        add_in_rank_order(values, &mut self.received, self.rank.index());
        Ok(())
    }

    fn sum_by_shares(&mut self, values: &mut [f32]) -> Result<()> {
        let (total, world, index) = (values.len(), self.rank.world(), self.rank.index());
        let share = |rank: usize| Rank::new(rank, world).map_or(0..0, |rank| rank.range(total));
        let mine = share(index);
        let call = Call { operation: Operation::Share, length: total };
        self.run(call, |peer| &values[share(peer)], |_| Some(mine.len()))?;
        add_in_rank_order(&mut values[mine.clone()], &mut self.received, index);
        let call = Call { operation: Operation::Shared, length: total };
        self.run(call, |_| &values[mine.clone()], |peer| Some(share(peer).len()))?;
        let peers = (0..world).filter(|&peer| peer != index);
        for (peer, received) in peers.zip(&self.received) {
            values[share(peer)].copy_from_slice(received);
        }
        Ok(())
    }

    /// [`Collective::all_gather`] with this crate's error.
    ///
    /// # Errors
    /// As [`TcpCollective::sum`].
    pub fn gather(&mut self, mine: &[f32]) -> Result<Vec<Vec<f32>>> {
        // Lengths may differ, so none is compared.
        let call = Call { operation: Operation::Gather, length: 0 };
        self.run(call, |_| mine, |_| None)?;
        let mut all: Vec<Vec<f32>> = self.received.iter_mut().map(std::mem::take).collect();
        all.insert(self.rank.index(), mine.to_vec());
        Ok(all)
    }

    /// [`Collective::broadcast`] with this crate's error.
    ///
    /// # Errors
    /// As [`TcpCollective::sum`].
    pub fn spread(&mut self, values: &mut [f32], root: usize) -> Result<()> {
        let call = Call { operation: Operation::Broadcast(root), length: values.len() };
        // Everyone sends at least its header, so that a rank that calls something else is noticed.
        let is_root = self.rank.index() == root;
        let length = values.len();
        self.run(
            call,
            |_| if is_root { &*values } else { &[] },
            |peer| Some(if peer == root { length } else { 0 }),
        )?;
        let peers = (0..self.rank.world()).filter(|&peer| peer != self.rank.index());
        for (_, received) in peers.zip(&self.received).filter(|(peer, _)| *peer == root) {
            values.copy_from_slice(received);
        }
        Ok(())
    }

    /// One exchange: `out(peer)` to each peer, and from each peer as many values as `expected(peer)` says, if it does.
    fn run<'a>(
        &mut self,
        call: Call,
        out: impl Fn(usize) -> &'a [f32],
        expected: impl Fn(usize) -> Option<usize>,
    ) -> Result<()> {
        self.monitor.check()?;
        let bytes = call.length as u64 * 4;
        if bytes > BULK_LIMIT {
            return Err(Error::TooLarge { channel: "collective", bytes, limit: BULK_LIMIT });
        }
        self.exchange.run(call, out, expected, &mut self.received).map_err(|failure| {
            let (rank, reason, error) = match failure {
                Failure::Lost(rank, LossReason::Closed) => {
                    return self.monitor.explain(rank, LossReason::Link);
                }
                Failure::Lost(rank, reason) => return self.monitor.explain(rank, reason),
                Failure::Diverged { rank, theirs, ours } => {
                    (rank, LossReason::Diverged, Error::Diverged { rank, theirs, ours })
                }
            };
            self.monitor.report(&PeerLost { rank, reason });
            error
        })
    }
}

impl Drop for TcpCollective {
    fn drop(&mut self) {
        shut(&self.streams);
    }
}

impl Collective for TcpCollective {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn all_reduce(&mut self, values: &mut [f32]) -> spark_backend::Result<()> {
        self.sum(values).map_err(device("all_reduce"))
    }

    fn all_gather(&mut self, mine: &[f32]) -> spark_backend::Result<Vec<Vec<f32>>> {
        self.gather(mine).map_err(device("all_gather"))
    }

    fn broadcast(&mut self, values: &mut [f32], root: usize) -> spark_backend::Result<()> {
        self.spread(values, root).map_err(device("broadcast"))
    }
}

/// Backends know one error; its message keeps the rank and the reason.
fn device(op: &'static str) -> impl Fn(Error) -> spark_backend::Error {
    move |error| spark_backend::Error::Device { op, message: error.to_string() }
}

fn shut(streams: &[TcpStream]) {
    for stream in streams {
        // It may have ended already.
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// `values`, which rank `index` holds, become the sum of all ranks' values, added in ascending rank order on every rank.
fn add_in_rank_order(values: &mut [f32], received: &mut [Vec<f32>], index: usize) {
    let (lower, higher) = received.split_at_mut(index);
    if let Some((first, others)) = lower.split_first_mut() {
        for other in others {
            add(first, other);
        }
        for (value, sum) in values.iter_mut().zip(first) {
            // Two summands give the same bits in either order.
            *value += *sum;
        }
    }
    for other in higher {
        add(values, other);
    }
}

fn add(sum: &mut [f32], values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}
