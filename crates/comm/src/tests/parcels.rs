//! Parcels between all ranks at once, and how they end.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use spark_testing::Direction;

use super::{LOSS_TIME, SOON, apart, proxied_team, team};
use crate::{BULK_LIMIT, Error, Follower, Leader, LossReason, Parcels};

/// Of every rank of a team.
fn parcels(leader: &mut Leader, followers: &mut [Follower]) -> Vec<Parcels> {
    std::thread::scope(|scope| {
        let others: Vec<_> =
            followers.iter_mut().map(|follower| scope.spawn(|| follower.parcels().unwrap())).collect();
        let mut all = vec![leader.parcels().unwrap()];
        all.extend(others.into_iter().map(|thread| thread.join().unwrap()));
        all
    })
}

fn bytes(from: usize, to: usize, tag: u32) -> Vec<u8> {
    let len = [0, 1, 11, 4096, 3 << 20][tag as usize % 5];
    (0..len).map(|i| (i * (2 * from + 1) + 7 * to + tag as usize) as u8).collect()
}

#[test]
fn all_ranks_send_to_all_at_once_in_order() {
    for world in [2, 4] {
        let (mut leader, mut followers) = team(world);
        let all = parcels(&mut leader, &mut followers);
        std::thread::scope(|scope| {
            for (mine, parcels) in all.iter().enumerate() {
                for peer in (0..world).filter(move |&peer| peer != mine) {
                    scope.spawn(move || {
                        (0..20).for_each(|tag| parcels.send(peer, tag, &bytes(mine, peer, tag)).unwrap());
                    });
                    scope.spawn(move || {
                        for tag in 0..20 {
                            assert!(parcels.receive(peer).unwrap() == (tag, bytes(peer, mine, tag)));
                        }
                    });
                }
            }
        });
        assert!(matches!(all[0].send(0, 1, &[]), Err(Error::World { rank: 0, .. })), "not to itself");
        assert!(matches!(all[0].receive(world), Err(Error::World { .. })));
        let long = vec![0; BULK_LIMIT as usize + 1];
        assert!(matches!(all[0].send(1, 1, &long), Err(Error::TooLarge { .. })));
        // Other messages of the team go on.
        leader.send_bulk(&7_u8).unwrap();
        assert_eq!(followers[0].recv_bulk::<u8>().unwrap(), 7);
    }
}

#[test]
fn garbage_between_parcels_ends_the_team() {
    let (leader, _followers) = team(2);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    let parcels = Parcels::new(&leader.monitor(), vec![None, Some(near)]).unwrap();
    // Tag 7, three bytes; then a length that nothing has.
    far.write_all(&[&[7, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0][..], b"abc", &[0xee; 4096]].concat()).unwrap();
    assert!(parcels.receive(1).unwrap() == (7, b"abc".to_vec()));
    let Error::Lost(lost) = parcels.receive(1).unwrap_err() else { panic!("a loss") };
    assert!(lost.rank == 1 && matches!(lost.reason, LossReason::Garbage(_)), "{lost}");
}

#[test]
fn a_lost_or_closed_connection_ends_both_sides_in_time() {
    let (proxy, mut leader, mut followers) = proxied_team(2);
    let mut all = parcels(&mut leader, &mut followers).into_iter();
    let (here, there) = (all.next().unwrap(), all.next().unwrap());
    let receiving = apart(move || here.receive(1));
    let sending = apart(move || {
        // Nobody receives: the buffers of the system fill.
        (0..1000).find_map(|tag| there.send(0, tag, &vec![0; 1 << 20]).err())
    });
    assert!(receiving.recv_timeout(SOON).unwrap().is_ok());
    let begin = Instant::now();
    proxy.inject(2, Direction::ToTarget, b"garbage").unwrap();
    let error = sending.recv_timeout(LOSS_TIME).unwrap().unwrap();
    assert!(matches!(&error, Error::Lost(_)) && begin.elapsed() < LOSS_TIME, "{error}");

    let (mut leader, mut followers) = team(2);
    let mut all = parcels(&mut leader, &mut followers).into_iter();
    let (here, there) = (all.next().unwrap(), all.next().unwrap());
    let receiving = apart(move || here.receive(1));
    drop(there);
    let Error::Lost(lost) = receiving.recv_timeout(SOON).unwrap().unwrap_err() else { panic!("a loss") };
    assert!(lost.rank == 1 && lost.reason == LossReason::Closed, "{lost}");
}
