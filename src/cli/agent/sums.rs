//! Times of sums between machines, as ranks make them: over NCCL where all have a GPU, else over TCP. Every machine runs this at the
//! same time; no model is there.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use spark_cuda::{Arena, ArenaPlan, Driver, Event, Stream, Team, Tensor};
use spark_engine::{
    Dtype,
    comm::{
        Follower, Hello, Leader, Listener, TcpCollective, join,
        nccl::{Group, Nccl, UniqueId},
    },
};

/// Bytes that ranks add per layer and token of a large model.
pub(crate) const SMALL: usize = 8 << 10;
/// Enough for the bandwidth to show, and what a prefill of some thousand tokens adds.
pub(crate) const LARGE: usize = 64 << 20;
/// Sums that are not counted, and those that are.
const WARM_UP: usize = 30;
const SMALL_SUMS: usize = 400;
const LARGE_SUMS: usize = 7;
/// How long the machines wait for each other.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long NCCL may take to connect.
const NCCL_CONNECTS_WITHIN: Duration = Duration::from_secs(60);

/// One machine's part in the measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Sums {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    /// Where rank 0 listens (its port may be 0) or where the others find it.
    pub(crate) at: SocketAddr,
    pub(crate) token: String,
    /// Which GPU; none: TCP.
    pub(crate) gpu: Option<usize>,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Times {
    /// Microseconds of a sum of [`SMALL`] bytes: the median.
    pub(crate) p50: f64,
    /// One in a hundred takes longer.
    pub(crate) p99: f64,
    /// Gigabytes a second that each machine sends while [`LARGE`] bytes are added.
    pub(crate) gigabytes: f64,
}

enum Side {
    Leader(Leader),
    Follower(Follower),
}

impl Sums {
    /// Measures; `listening` is told where rank 0 listens, before it waits.
    pub(super) fn measure(
        &self,
        listening: &mut dyn FnMut(SocketAddr) -> anyhow::Result<()>,
    ) -> anyhow::Result<Times> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let hello = Hello { token: self.token.clone(), version, model: [0; 32], settings: [0; 32] };
        let mut side = match self.rank {
            0 => {
                let listener = Listener::bind(self.at)?;
                listening(listener.local_addr())?;
                Side::Leader(listener.gather(self.world, &hello, TIMEOUT, &mut |_| ())?)
            }
            rank => Side::Follower(join(self.at, rank, self.world, &hello, TIMEOUT)?),
        };
        match self.gpu {
            Some(gpu) => self.over_nccl(&mut side, gpu),
            None => self.over_tcp(&mut side.collective()?),
        }
    }

    fn over_tcp(&self, collective: &mut TcpCollective) -> anyhow::Result<Times> {
        let mut values = vec![0.0f32; LARGE / 4];
        let mut sums = |length: usize, calls: usize| -> anyhow::Result<Vec<f64>> {
            let mut times = Vec::with_capacity(calls);
            for _ in 0..calls {
                let begin = Instant::now();
                collective.sum(&mut values[..length / 4])?;
                times.push(begin.elapsed().as_secs_f64() * 1e6);
            }
            Ok(times)
        };
        sums(SMALL, WARM_UP)?;
        let small = sums(SMALL, SMALL_SUMS)?;
        sums(LARGE, 1)?;
        Ok(times(small, sums(LARGE, LARGE_SUMS)?, self.world))
    }

    fn over_nccl(&self, side: &mut Side, gpu: usize) -> anyhow::Result<Times> {
        let device = Driver::open()?.device(gpu)?;
        let stream = Stream::new(&device)?;
        // Whether it is too old is another check's matter.
        let nccl = Nccl::open(true)?;
        let id = side.share_id(&nccl)?;
        let rank = spark_engine::Rank::new(self.rank, self.world).context("a rank below their count")?;
        let team = Team::connect(&device, &stream, &Group::new(&nccl, id, rank, NCCL_CONNECTS_WITHIN))?;
        let mut plan = ArenaPlan::default();
        let region = plan.add("messages", LARGE as u64)?;
        let memory = Arena::new(&device, plan)?.region(region)?;
        stream.fill(&memory, 0)?;
        let (start, end) = (Event::new(&device)?, Event::new(&device)?);
        let sums = |length: usize, calls: usize| -> anyhow::Result<Vec<f64>> {
            let x = Tensor::new(&memory, [1, length / 2], Dtype::Bf16)?;
            let mut times = Vec::with_capacity(calls);
            for _ in 0..calls {
                start.record(&stream)?;
                team.all_reduce(&stream, &x)?;
                end.record(&stream)?;
                end.synchronize()?;
                times.push(end.micros_since(&start)?);
            }
            Ok(times)
        };
        sums(SMALL, WARM_UP)?;
        let small = sums(SMALL, SMALL_SUMS)?;
        sums(LARGE, 1)?;
        let large = sums(LARGE, LARGE_SUMS)?;
        team.check()?;
        Ok(times(small, large, self.world))
    }
}

impl Side {
    fn collective(&mut self) -> spark_engine::comm::Result<TcpCollective> {
        match self {
            Self::Leader(leader) => leader.collective(),
            Self::Follower(follower) => follower.collective(),
        }
    }

    /// The name of a new group of NCCL, which rank 0 gives.
    fn share_id(&mut self, nccl: &Nccl) -> anyhow::Result<UniqueId> {
        match self {
            Self::Leader(leader) => {
                let id = nccl.unique_id()?;
                leader.send_bulk(&id.bytes().to_vec())?;
                Ok(id)
            }
            Self::Follower(follower) => {
                let bytes: Vec<u8> = follower.recv_bulk()?;
                let bytes: Option<[u8; UniqueId::LEN]> = bytes.try_into().ok();
                Ok(UniqueId::from(bytes.context("rank 0 sent an id of another length")?))
            }
        }
    }
}

/// From microseconds of every sum. Each of n ranks sends 2 (n - 1) / n of the bytes.
fn times(mut small: Vec<f64>, mut large: Vec<f64>, world: usize) -> Times {
    small.sort_by(f64::total_cmp);
    large.sort_by(f64::total_cmp);
    let at = |sorted: &[f64], share: f64| {
        sorted.get((sorted.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN)
    };
    let sent = LARGE as f64 * 2.0 * (world as f64 - 1.0) / world as f64;
    Times { p50: at(&small, 0.5), p99: at(&small, 0.99), gigabytes: sent / at(&large, 0.5) / 1e3 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_known_times() {
        let small = (1..=100).rev().map(f64::from).collect();
        let found = times(small, vec![1e6, 1e3, 1e4], 2);
        assert_eq!((found.p50, found.p99), (51.0, 100.0));
        assert!((found.gigabytes - 67.108_864 / 10.0).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn two_ranks_of_one_machine_measure_each_other() {
        let sums = |rank, at| Sums { rank, world: 2, at, token: "t".into(), gpu: None };
        let (told, listening) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            let at = listening.recv().unwrap();
            sums(1, at).measure(&mut |_| Ok(())).unwrap()
        });
        let times = sums(0, ([127, 0, 0, 1], 0).into()).measure(&mut |at| Ok(told.send(at)?)).unwrap();
        other.join().unwrap();
        assert!(times.p50 > 0.0 && times.p99 >= times.p50 && times.gigabytes > 0.0, "{times:?}");
    }
}
