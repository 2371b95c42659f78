//! How a team ends: in order, by a broken, silent or garbled connection, or because a rank gives it up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use spark_testing::{Direction, FaultProxy};

use super::{LOSS_TIME, SOON, apart, proxied_team, team, watch};
use crate::{Error, Follower, Leader, LossReason, PLAN_LIMIT, PeerLost, Result};

/// Connections of a proxied follower, in the order in which it opens them.
const PLAN: usize = 0;
const BULK: usize = 1;
const LIVENESS: usize = 2;

/// A team of two joined through a proxy.
fn proxied() -> (FaultProxy, Leader, Follower) {
    let (proxy, leader, mut followers) = proxied_team(2);
    (proxy, leader, followers.remove(0))
}

fn lost<T: std::fmt::Debug>(result: Result<T>) -> PeerLost {
    match result {
        Err(Error::Lost(lost)) => lost,
        other => panic!("{other:?}"),
    }
}

/// Both sides wait for messages that never come while `fault` happens; what each says, in time.
fn both_hear(fault: impl FnOnce(&FaultProxy)) -> (PeerLost, PeerLost) {
    let (proxy, mut leader, mut follower) = proxied();
    let seen = [watch(&leader.monitor()), watch(&follower.monitor())];
    let gathering = apart(move || lost(leader.gather::<u64>("a number")));
    let receiving = apart(move || lost(follower.recv_plan::<Vec<u64>>()));
    let begin = Instant::now();
    fault(&proxy);
    let hear = |receiver: &Receiver<PeerLost>| {
        receiver.recv_timeout(LOSS_TIME.saturating_sub(begin.elapsed())).expect("in time")
    };
    let blocked = (hear(&gathering), hear(&receiving));
    let watched = (hear(&seen[0]), hear(&seen[1]));
    assert_eq!(blocked, watched);
    blocked
}

#[test]
fn a_reset_ends_both_sides_at_once() {
    let begin = Instant::now();
    let (leader, follower) = both_hear(FaultProxy::reset);
    assert_eq!(leader, PeerLost { rank: 1, reason: LossReason::Closed });
    assert_eq!(follower, PeerLost { rank: 0, reason: LossReason::Closed });
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
}

#[test]
fn silence_ends_both_sides() {
    let (leader, follower) = both_hear(FaultProxy::stall);
    assert_eq!(leader, PeerLost { rank: 1, reason: LossReason::Silent });
    assert_eq!(follower, PeerLost { rank: 0, reason: LossReason::Silent });
}

#[test]
fn garbage_ends_both_sides() {
    let inject = |number: usize, direction: Direction, bytes: &[u8]| {
        both_hear(|proxy| proxy.inject(number, direction, bytes).unwrap())
    };
    let is_garbage = |lost: &PeerLost| matches!(lost.reason, LossReason::Garbage(_));
    // Over the limit; a message of another type (a list of 9 numbers that ends at once).
    for bytes in [&[0xff; 64][..], &[1, 0, 0, 0, 9]] {
        let (_, follower) = inject(PLAN, Direction::ToClient, bytes);
        assert!(follower.rank == 0 && is_garbage(&follower), "{follower}");
    }
    for bytes in [&[0xff; 1 << 20][..], &[1, 0, 0, 0, 0, 0, 0, 0, 0x80]] {
        let (leader, _) = inject(BULK, Direction::ToTarget, bytes);
        assert!(leader.rank == 1 && is_garbage(&leader), "{leader}");
    }
    let (leader, follower) = inject(LIVENESS, Direction::ToTarget, b"hello?");
    assert!(is_garbage(&leader), "{leader}");
    // It is told that its own rank is the lost one.
    assert_eq!(follower, PeerLost { rank: 1, reason: LossReason::ReportedBy(0) });
}

#[test]
fn delay_and_loss_below_the_limit_are_endured() {
    let (proxy, mut leader, mut follower) = proxied();
    proxy.set_delay(Duration::from_millis(20));
    proxy.set_loss(Some((100_000, Duration::from_millis(200))));
    let receiving = apart(move || {
        let bulk: Vec<u32> = follower.recv_bulk().unwrap();
        (bulk, follower.recv_plan::<u8>().unwrap(), follower)
    });
    let sent: Vec<u32> = (0..150_000).collect();
    leader.send_bulk(&sent).unwrap();
    leader.send_plan(&5_u8).unwrap();
    let (bulk, plan, _follower) = receiving.recv_timeout(2 * SOON).unwrap();
    assert!(bulk == sent && plan == 5);
    assert_eq!(leader.monitor().lost(), None);
}

#[test]
fn dropping_all_parts_says_goodbye() {
    let (leader, mut followers) = team(3);
    let seen: Vec<_> = followers.iter().map(|follower| watch(&follower.monitor())).collect();
    let mut follower = followers.remove(0);
    let receiving = apart(move || lost(follower.recv_plan::<u8>()));
    let (plan, bulk, monitor) = leader.split();
    drop((plan, bulk, monitor));
    let left = PeerLost { rank: 0, reason: LossReason::Left };
    assert_eq!(receiving.recv_timeout(SOON).unwrap(), left);
    assert!(seen.iter().all(|seen| seen.recv_timeout(SOON).unwrap() == left));
}

#[test]
fn every_rank_hears_who_was_lost() {
    let (mut leader, mut followers) = team(4);
    let seen: Vec<_> = followers.iter().map(|follower| watch(&follower.monitor())).collect();
    drop(followers.remove(1));
    let leaves = PeerLost { rank: 2, reason: LossReason::Left };
    assert_eq!(lost(leader.gather::<u8>("a number")), leaves);
    let told = PeerLost { rank: 2, reason: LossReason::ReportedBy(0) };
    for index in [0, 2] {
        assert_eq!(seen[index].recv_timeout(SOON).unwrap(), told);
    }
    // From now on every call says so, and a late watcher is told at once.
    assert_eq!(lost(leader.send_plan(&0_u8)), leaves);
    assert_eq!(lost(leader.send_bulk(&0_u8)), leaves);
    assert_eq!(watch(&leader.monitor()).try_recv().unwrap(), leaves);
    assert_eq!(lost(followers[0].recv_bulk::<u8>()), told);
}

#[test]
fn a_rank_may_give_the_team_up() {
    let (leader, mut followers) = team(2);
    let mut follower = followers.remove(0);
    let receiving = apart(move || lost(follower.recv_plan::<u8>()));
    leader.monitor().abort();
    let expected = PeerLost { rank: 0, reason: LossReason::ReportedBy(0) };
    assert_eq!(receiving.recv_timeout(SOON).unwrap(), expected);
    assert_eq!(leader.monitor().lost(), Some(PeerLost { rank: 0, reason: LossReason::Aborted }));
}

#[test]
fn a_link_that_is_broken_between_living_ranks_is_told_to_all() {
    let (leader, followers) = team(3);
    let seen: Vec<_> = followers.iter().map(|follower| watch(&follower.monitor())).collect();
    let is_broken = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&is_broken);
    followers[1].monitor().watch_link(move || asked.load(Ordering::Relaxed).then(|| "cut".to_owned()));
    assert_eq!(leader.monitor().lost(), None);
    is_broken.store(true, Ordering::Relaxed);
    let lost = PeerLost { rank: 2, reason: LossReason::Link };
    assert!(seen.iter().all(|seen| seen.recv_timeout(SOON).unwrap() == lost));
    assert_eq!(leader.monitor().lost(), Some(lost));

    // A rank that is lost meanwhile is what counts.
    let (leader, mut followers) = team(3);
    leader.monitor().watch_link(|| Some("cut".to_owned()));
    drop(followers.remove(1));
    let seen = watch(&leader.monitor());
    assert_eq!(seen.recv_timeout(SOON).unwrap(), PeerLost { rank: 2, reason: LossReason::Left });
}

#[test]
fn a_follower_may_ask_for_an_orderly_end() {
    let (leader, followers) = team(3);
    let (asked, asks) = std::sync::mpsc::channel();
    leader.monitor().watch_for_stop(move |rank| asked.send(rank).unwrap());
    followers[1].monitor().ask_to_stop();
    assert_eq!(asks.recv_timeout(SOON), Ok(2));
    assert_eq!(leader.monitor().lost(), None, "the team goes on until the leader ends it");
}

#[test]
fn an_end_that_was_asked_for_early_is_not_forgotten() {
    let (leader, mut followers) = team(2);
    let follower = followers.remove(0);
    follower.monitor().ask_to_stop();
    drop(follower);
    // What was said before the goodbye has been heard with it.
    let left = PeerLost { rank: 1, reason: LossReason::Left };
    assert_eq!(watch(&leader.monitor()).recv_timeout(SOON), Ok(left));
    let (asked, asks) = std::sync::mpsc::channel();
    leader.monitor().watch_for_stop(move |rank| asked.send(rank).unwrap());
    assert_eq!(asks.try_recv(), Ok(1));
}

#[test]
fn a_plan_may_bring_many_long_prompts() {
    let (mut leader, mut followers) = team(2);
    let mut follower = followers.remove(0);
    // 64 sequences that share a prefix enter their slots in one step, each with its prompt for the repetition penalty.
    let prompts: Vec<Vec<u32>> = (0..64).map(|i| vec![100_000 + i; 100_000]).collect();
    let received = apart(move || (follower.recv_plan::<Vec<Vec<u32>>>(), follower));
    leader.send_plan(&prompts).unwrap();
    assert!(received.recv_timeout(SOON).unwrap().0.unwrap() == prompts);
}

#[test]
fn a_message_over_the_limit_is_not_sent() {
    let (mut leader, mut followers) = team(2);
    let long = vec![0_u8; PLAN_LIMIT as usize + 1];
    let error = leader.send_plan(&long).unwrap_err();
    assert!(matches!(error, Error::TooLarge { channel: "plan", .. }), "{error}");
    leader.send_plan(&3_u8).unwrap();
    assert_eq!(followers[0].recv_plan::<u8>().unwrap(), 3);
}
