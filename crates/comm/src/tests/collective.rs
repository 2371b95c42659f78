//! Sums have the same bits everywhere; broken, silent and diverged ranks end every rank's call.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use spark_backend::Collective;
use spark_testing::{FaultProxy, Random};

use super::{LOSS_TIME, SOON, apart, proxied_team, team};
use crate::{Error, Follower, Leader, LossReason, PeerLost, Result, TcpCollective};

/// Each rank's collective, with what keeps its team alive.
fn collectives(world: usize) -> (Leader, Vec<Follower>, Vec<TcpCollective>) {
    let (leader, followers) = team(world);
    collectives_of(leader, followers)
}

fn collectives_of(
    mut leader: Leader,
    followers: Vec<Follower>,
) -> (Leader, Vec<Follower>, Vec<TcpCollective>) {
    let threads: Vec<_> = followers
        .into_iter()
        .map(|mut follower| std::thread::spawn(move || (follower.collective().unwrap(), follower)))
        .collect();
    let mut all = vec![leader.collective().unwrap()];
    let mut kept = Vec::new();
    for thread in threads {
        let (collective, follower) = thread.join().unwrap();
        all.push(collective);
        kept.push(follower);
    }
    (leader, kept, all)
}

/// Runs `call(rank)` on every rank at once.
fn on_all<T: Send>(
    all: &mut [TcpCollective],
    call: impl Fn(usize, &mut TcpCollective) -> T + Sync,
) -> Vec<T> {
    let call = &call;
    std::thread::scope(|scope| {
        let threads: Vec<_> = all
            .iter_mut()
            .enumerate()
            .map(|(rank, collective)| scope.spawn(move || call(rank, collective)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn values(rank: usize, count: usize) -> Vec<f32> {
    let mut random = Random::new(rank as u64 + 1);
    (0..count).map(|_| random.uniform(-1.0, 1.0) * 10_f32.powi(rank as i32 % 3)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn sums_are_in_rank_order_with_equal_bits_everywhere() {
    for world in [1, 2, 4, 8] {
        let (_leader, _followers, mut all) = collectives(world);
        // Above 16 Ki values ranks sum shares, here of unequal size.
        for count in [0, 1, 1000, 16_384, 16_387, 100_003] {
            let mut expected = values(0, count);
            for rank in 1..world {
                for (sum, value) in expected.iter_mut().zip(values(rank, count)) {
                    *sum += value;
                }
            }
            let sums = on_all(&mut all, |rank, collective| {
                let mut mine = values(rank, count);
                collective.all_reduce(&mut mine).unwrap();
                mine
            });
            for (rank, sum) in sums.iter().enumerate() {
                assert_eq!(bits(sum), bits(&expected), "rank {rank} of {world}, {count} values");
            }
        }
    }
}

#[test]
fn gathers_unequal_lengths_and_spreads_from_any_rank() {
    for world in [1, 2, 4] {
        let (_leader, _followers, mut all) = collectives(world);
        let expected: Vec<_> = (0..world).map(|rank| values(rank, rank * 1000)).collect();
        for round in 0..3 {
            let gathered = on_all(&mut all, |rank, collective| {
                assert_eq!((collective.rank().index(), collective.rank().world()), (rank, world));
                collective.all_gather(&values(rank, rank * 1000)).unwrap()
            });
            assert!(gathered.iter().all(|gathered| *gathered == expected), "round {round}");
        }
        for root in 0..world {
            let spread = on_all(&mut all, |rank, collective| {
                let mut mine = values(rank, 5000);
                collective.broadcast(&mut mine, root).unwrap();
                mine
            });
            assert!(spread.iter().all(|spread| *spread == values(root, 5000)));
        }
    }
}

#[test]
fn messages_larger_than_all_buffers_do_not_block() {
    let count = 4 << 20;
    let (_leader, _followers, mut all) = collectives(2);
    let sums = on_all(&mut all, |rank, collective| {
        let mut mine = vec![rank as f32 + 1.0; count];
        collective.all_reduce(&mut mine).unwrap();
        mine
    });
    assert!(sums.iter().flatten().all(|&sum| sum == 3.0));
}

#[test]
fn diverged_ranks_are_told_apart() {
    let message = |call: fn(usize, &mut TcpCollective) -> Result<()>| {
        let (_leader, _followers, mut all) = collectives(2);
        let errors = on_all(&mut all, |rank, collective| call(rank, collective).unwrap_err());
        assert!(errors.iter().any(|error| matches!(error, Error::Diverged { .. })), "{errors:?}");
        errors.into_iter().find(|error| matches!(error, Error::Diverged { .. })).unwrap().to_string()
    };
    let text = message(|rank, collective| collective.sum(&mut vec![0.0; 7 + rank]));
    assert!(text.contains("of 7 values") && text.contains("of 8 values"), "{text}");
    let text = message(|rank, collective| match rank {
        0 => collective.sum(&mut [0.0; 4]),
        _ => collective.gather(&[0.0; 4]).map(|_| ()),
    });
    assert!(text.contains("all_reduce") && text.contains("all_gather"), "{text}");
    let text = message(|rank, collective| collective.spread(&mut [0.0; 4], rank));
    assert!(text.contains("broadcast"), "{text}");
}

/// Two ranks whose connection for collectives goes through a proxy (their other connections do not).
fn proxied() -> (Leader, Follower, FaultProxy, [TcpCollective; 2]) {
    let (leader, mut followers) = team(2);
    let follower = followers.remove(0);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = FaultProxy::start(listener.local_addr().unwrap()).unwrap();
    let far = TcpStream::connect(proxy.address()).unwrap();
    let (near, _) = listener.accept().unwrap();
    let pair = [
        TcpCollective::new(&leader.monitor(), vec![None, Some(near)]).unwrap(),
        TcpCollective::new(&follower.monitor(), vec![Some(far), None]).unwrap(),
    ];
    (leader, follower, proxy, pair)
}

/// Both ranks sum 4 MB again and again until `fault` ends it; how each ended, in time after the fault.
fn ended_by(pair: [TcpCollective; 2], proxy: &FaultProxy, fault: impl FnOnce(&FaultProxy)) -> Vec<PeerLost> {
    let threads = pair.map(|mut collective| {
        apart(move || {
            let mut mine = vec![1.0; 1 << 20];
            loop {
                match collective.sum(&mut mine) {
                    Ok(()) => {}
                    Err(Error::Lost(lost)) => return lost,
                    Err(other) => panic!("{other}"),
                }
            }
        })
    });
    assert!(proxy.wait_for_bytes(10_000_000, SOON));
    let begin = Instant::now();
    fault(proxy);
    let heard = threads.map(|thread| {
        let left = LOSS_TIME.saturating_sub(begin.elapsed());
        thread.recv_timeout(left).expect("in time")
    });
    heard.into()
}

#[test]
fn a_reset_in_the_middle_of_a_sum_ends_it() {
    let (leader, follower, proxy, pair) = proxied();
    let heard = ended_by(pair, &proxy, |proxy| proxy.reset_after(1_000_001));
    // Both live, and both know it.
    assert!(heard.iter().all(|lost| lost.reason == LossReason::Link), "{heard:?}");
    assert_eq!(leader.monitor().lost().as_ref(), Some(&heard[0]));
    assert_eq!(follower.monitor().lost().as_ref(), Some(&heard[1]));
}

#[test]
fn a_stalled_sum_ends_when_the_team_is_given_up() {
    let (_leader, _follower, proxy, pair) = proxied();
    let handle = pair[0].abort_handle();
    let heard = ended_by(pair, &proxy, |proxy| {
        proxy.stall();
        handle.abort();
    });
    assert_eq!(heard[0], PeerLost { rank: 0, reason: LossReason::Aborted });
    assert_eq!(heard[1], PeerLost { rank: 0, reason: LossReason::ReportedBy(0) });
}

#[test]
fn a_rank_that_leaves_ends_the_sums_of_all() {
    let (_leader, mut followers, all) = collectives(4);
    let mut waiting = Vec::new();
    for (rank, mut collective) in all.into_iter().enumerate() {
        if rank != 3 {
            waiting.push(apart(move || collective.sum(&mut vec![0.0; 50_000]).unwrap_err()));
        }
    }
    drop(followers.remove(2));
    for waiting in waiting {
        let error = waiting.recv_timeout(LOSS_TIME).unwrap();
        assert!(matches!(error, Error::Lost(PeerLost { rank: 3, .. })), "{error}");
    }
}

#[test]
fn a_silent_rank_ends_the_sums_of_all() {
    let (proxy, leader, followers) = proxied_team(3);
    let (_leader, followers, mut all) = collectives_of(leader, followers);
    // Rank 2 is stopped: it calls nothing, its connections stay, its heart is not heard.
    let _stopped = all.pop();
    proxy.stall();
    let waiting: Vec<_> = all
        .into_iter()
        .map(|mut collective| apart(move || collective.sum(&mut vec![0.0; 50_000]).unwrap_err()))
        .collect();
    let begin = Instant::now();
    for (rank, waiting) in waiting.into_iter().enumerate() {
        let error = waiting.recv_timeout(LOSS_TIME.saturating_sub(begin.elapsed())).unwrap();
        let reason = [LossReason::Silent, LossReason::ReportedBy(0)][rank].clone();
        assert!(matches!(&error, Error::Lost(lost) if *lost == PeerLost { rank: 2, reason }), "{error}");
    }
    drop(followers);
}

#[test]
fn a_team_may_make_several_collectives() {
    let (leader, followers, first) = collectives(3);
    let (_leader, _followers, mut second) = collectives_of(leader, followers);
    drop(first);
    let sums = on_all(&mut second, |_, collective| {
        let mut mine = [1.0];
        collective.sum(&mut mine).map(|()| mine).unwrap()
    });
    assert_eq!(sums, [[3.0]; 3]);
}

#[test]
fn garbage_among_values_ends_the_sum() {
    let (leader, mut followers) = team(2);
    let follower = followers.remove(0);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    let mut collective = TcpCollective::new(&leader.monitor(), vec![None, Some(near)]).unwrap();
    far.write_all(&[0xee; 4096]).unwrap();
    let error = collective.sum(&mut [0.0; 8]).unwrap_err();
    let Error::Lost(PeerLost { rank: 1, reason: LossReason::Garbage(_) }) = error else { panic!("{error}") };
    assert!(matches!(collective.sum(&mut [0.0; 8]), Err(Error::Lost(_))));
    drop(follower);
}
