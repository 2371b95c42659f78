//! Who is let in, who is not and what they hear, and that nobody else can stop or delay a gathering.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::{SOON, gather, hello, join_thread, listener, team};
use crate::{Error, HANDSHAKE_TIMEOUT, Hello, JoinEvent, Listener, PROTOCOL, Refusal, join};

#[test]
fn teams_of_all_sizes_exchange_in_rank_order() {
    for world in [1, 2, 4, 8] {
        let (mut leader, followers) = team(world);
        let threads: Vec<_> = followers
            .into_iter()
            .map(|mut follower| {
                std::thread::spawn(move || {
                    let (number, text): (u32, String) = follower.recv_plan().unwrap();
                    assert_eq!((number, text.as_str()), (7, "plan"));
                    let bulk: Vec<u64> = follower.recv_bulk().unwrap();
                    assert_eq!(bulk.len(), 100_000);
                    follower.send_bulk(&(follower.rank().index(), bulk[99_999])).unwrap();
                    follower
                })
            })
            .collect();
        leader.send_plan(&(7_u32, "plan")).unwrap();
        leader.send_bulk(&(0..100_000_u64).collect::<Vec<_>>()).unwrap();
        let answers: Vec<(usize, u64)> = leader.gather("what they got").unwrap();
        assert_eq!(answers, (1..world).map(|rank| (rank, 99_999)).collect::<Vec<_>>());
        for thread in threads {
            thread.join().unwrap();
        }
    }
}

/// Gathers a team of two while `wrong` tries to join as `rank` of `world`; returns what it hears.
fn turned_away(wrong: Hello, rank: usize, world: usize) -> Refusal {
    let listener = listener();
    let address = listener.local_addr();
    let good = std::thread::spawn(move || {
        let refused = join(address, rank, world, &wrong, SOON).map(|_| ()).unwrap_err();
        let follower = join(address, 1, 2, &hello(), SOON).unwrap();
        (refused, follower)
    });
    let mut events = Vec::new();
    let leader = listener.gather(2, &hello(), SOON, &mut |event| events.push(event)).unwrap();
    let (refused, follower) = good.join().unwrap();
    let Error::Refused { refusal, .. } = refused else { panic!("{refused}") };
    let said = events
        .iter()
        .any(|event| matches!(event, JoinEvent::Refused { refusal: said, .. } if *said == refusal));
    assert!(said, "{events:?}");
    drop((leader, follower));
    refusal
}

#[test]
fn what_differs_is_named_to_both_sides() {
    assert_eq!(turned_away(Hello { token: "other".into(), ..hello() }, 1, 2), Refusal::Token);
    let (leader, joiner) = ("1.2.3".to_owned(), "1.2.4".to_owned());
    let wrong = Hello { version: joiner.clone(), model: [9; 32], ..hello() };
    assert_eq!(turned_away(wrong, 1, 2), Refusal::Version { leader, joiner });
    let wrong = Hello { model: [9; 32], settings: [9; 32], ..hello() };
    assert_eq!(turned_away(wrong, 1, 2), Refusal::Model);
    assert_eq!(turned_away(Hello { settings: [9; 32], ..hello() }, 1, 2), Refusal::Settings);
    assert_eq!(turned_away(hello(), 2, 3), Refusal::World { leader: 2, joiner: 3 });
}

#[test]
fn token_is_looked_at_before_anything_else() {
    let wrong = Hello { token: String::new(), version: "0".into(), model: [0; 32], settings: [0; 32] };
    assert_eq!(turned_away(wrong, 5, 6), Refusal::Token);
}

#[test]
fn impossible_ranks_fail_at_once() {
    let address = "127.0.0.1:1".parse().unwrap();
    for (rank, world) in [(0, 2), (2, 2), (1, 65), (0, 0)] {
        let error = join(address, rank, world, &hello(), SOON).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::World { .. }), "{error}");
    }
    for world in [0, 65] {
        let error = listener().gather(world, &hello(), SOON, &mut |_| ()).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::World { .. }), "{error}");
    }
}

#[test]
fn same_rank_twice_is_refused_until_the_first_is_gone() {
    let listener = listener();
    let address = listener.local_addr();
    // The first waits for rank 2, which comes only when the second has been refused.
    let first = join_thread(address, 1, 3, hello());
    let mut joins = vec![first];
    let mut refused = None;
    let leader = listener.gather(3, &hello(), SOON, &mut |event| match event {
        JoinEvent::Joined { rank: 1, .. } => joins.push(join_thread(address, 1, 3, hello())),
        JoinEvent::Refused { refusal, .. } => {
            refused = Some(refusal);
            joins.push(join_thread(address, 2, 3, hello()));
        }
        _ => {}
    });
    leader.unwrap();
    assert!(matches!(refused, Some(Refusal::Taken { rank: 1, .. })), "{refused:?}");
    let mut results = joins.into_iter().map(|join| join.join().unwrap().map(|_| ()));
    assert!(results.next().unwrap().is_ok());
    let second = results.next().unwrap().unwrap_err();
    assert!(second.to_string().contains("rank 1 has already joined from 127.0.0.1"), "{second}");
    assert!(results.next().unwrap().is_ok());
}

#[test]
fn a_rank_that_ends_early_makes_room() {
    let listener = listener();
    let address = listener.local_addr();
    // Gives up soon after it has joined, since rank 2 is missing.
    let short =
        std::thread::spawn(move || join(address, 1, 3, &hello(), Duration::from_millis(300)).map(|_| ()));
    let mut joins = Vec::new();
    let leader = listener.gather(3, &hello(), SOON, &mut |event| {
        if event == (JoinEvent::Gone { rank: 1 }) {
            joins.extend([1, 2].map(|rank| join_thread(address, rank, 3, hello())));
        }
    });
    leader.unwrap();
    assert_eq!(joins.len(), 2);
    let error = short.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("other ranks did not"), "{error}");
    assert!(joins.into_iter().all(|join| join.join().unwrap().is_ok()));
}

#[test]
fn strangers_neither_stop_nor_delay() {
    let listener = listener();
    let address = listener.local_addr();
    let begin = Instant::now();
    let mut silent = vec![TcpStream::connect(address).unwrap()];
    // Speaks the first bytes and falls silent.
    silent.push(TcpStream::connect(address).unwrap());
    silent[1].write_all(b"SPKRANKS").unwrap();
    drop(TcpStream::connect(address).unwrap());
    let mut browser = TcpStream::connect(address).unwrap();
    browser.write_all(b"GET / HTTP/1.1\r\nHost: there\r\n\r\n").unwrap();
    let garbage = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        // Closed on the way: how far it comes is not the point.
        let _ = stream.write_all(&vec![0xa5; 1 << 20]);
    });
    let mut strangers = 0;
    let mut joined = None;
    let leader = listener.gather(2, &hello(), SOON, &mut |event| {
        if let JoinEvent::Stranger { .. } = event {
            strangers += 1;
        }
        if strangers == 3 && joined.is_none() {
            joined = Some(join_thread(address, 1, 2, hello()));
        }
    });
    leader.unwrap();
    assert!(begin.elapsed() < HANDSHAKE_TIMEOUT, "{:?}", begin.elapsed());
    joined.unwrap().join().unwrap().unwrap();
    garbage.join().unwrap();
    assert_eq!(browser.read(&mut [0; 8]).unwrap_or(0), 0, "a stranger hears nothing");
}

#[test]
fn a_flood_of_silent_connections_holds_a_rank_up_only_for_a_while() {
    let listener = listener();
    let address = listener.local_addr();
    let joined = std::thread::spawn(move || {
        // More than handshakes are held at a time.
        let flood: Vec<_> = (0..140).map(|_| TcpStream::connect(address).unwrap()).collect();
        (join(address, 1, 2, &hello(), HANDSHAKE_TIMEOUT + SOON).map(|_| ()), flood)
    });
    let timeout = HANDSHAKE_TIMEOUT + SOON;
    listener.gather(2, &hello(), timeout, &mut |_| ()).unwrap();
    joined.join().unwrap().0.unwrap();
}

/// Bytes of a joiner up to its proof.
fn knock(protocol: u32) -> Vec<u8> {
    let mut bytes = b"SPKRANKS".to_vec();
    bytes.extend(protocol.to_le_bytes());
    bytes.extend([3; 32]);
    bytes
}

#[test]
fn other_protocols_and_long_messages_are_turned_away() {
    let listener = listener();
    let address = listener.local_addr();
    let mut newer = TcpStream::connect(address).unwrap();
    newer.write_all(&knock(PROTOCOL + 1)).unwrap();
    let mut long = TcpStream::connect(address).unwrap();
    long.write_all(&knock(PROTOCOL)).unwrap();
    long.write_all(&[0; 32]).unwrap();
    long.write_all(&u32::MAX.to_le_bytes()).unwrap();
    let mut events = Vec::new();
    let error = listener.gather(2, &hello(), Duration::from_millis(400), &mut |event| events.push(event));
    let Err(Error::Missing { ranks, world: 2, .. }) = error.map(|_| ()) else { panic!() };
    assert_eq!(ranks, [1]);
    let (mut has_refused, mut has_stranger) = (false, false);
    for event in &events {
        match event {
            JoinEvent::Refused { refusal, .. } => {
                has_refused |= *refusal == Refusal::Protocol { leader: PROTOCOL, joiner: PROTOCOL + 1 };
            }
            JoinEvent::Stranger { reason, .. } => has_stranger |= reason.contains("longer"),
            _ => {}
        }
    }
    assert!(has_refused && has_stranger, "{events:?}");
    let mut answer = [0; 12];
    newer.read_exact(&mut answer).unwrap();
    assert_eq!(answer[8..], PROTOCOL.to_le_bytes());
}

/// What a joiner says of a listener that answers with `answer`.
fn joined_with(answer: &'static [u8]) -> Error {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap();
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = other.accept().unwrap();
        stream.read_exact(&mut [0; 44]).unwrap();
        stream.write_all(answer).unwrap();
        // Until the joiner has heard enough.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let error = join(address, 1, 2, &hello(), SOON).map(|_| ()).unwrap_err();
    answering.join().unwrap();
    error
}

#[test]
fn what_is_no_leader_is_not_joined() {
    let error = joined_with(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    assert!(matches!(error, Error::NotALeader { .. }), "{error}");
    let newer: &[u8; 44] = b"SPKRANKS\x07\0\0\0................................";
    let error = joined_with(newer);
    let expected = Refusal::Protocol { leader: 7, joiner: PROTOCOL };
    assert!(matches!(&error, Error::Refused { refusal, .. } if *refusal == expected), "{error}");
    // A welcome (tag 0) whose proof and session are zeros: it lets anyone in and knows no token.
    let mut blind = b"SPKRANKS\x01\0\0\0................................\x41\0\0\0".to_vec();
    blind.extend([0; 65]);
    let error = joined_with(blind.leak());
    assert!(error.to_string().contains("does not know the token"), "{error}");
}

#[test]
fn joins_a_leader_that_starts_later() {
    let address = listener().local_addr();
    let follower = join_thread(address, 1, 2, hello());
    // Its first attempts find nobody there.
    let unreachable = join(address, 1, 2, &hello(), Duration::from_millis(150)).map(|_| ()).unwrap_err();
    assert!(matches!(unreachable, Error::Connect { .. }), "{unreachable}");
    let listener = Listener::bind(address).unwrap();
    gather(&listener, 2);
    follower.join().unwrap().unwrap();
    let taken = Listener::bind(address).map(|_| ()).unwrap_err();
    assert!(matches!(taken, Error::Bind { .. }), "{taken}");
}

#[test]
fn one_listener_gathers_one_team_after_the_other() {
    let listener = listener();
    for _ in 0..3 {
        let follower = join_thread(listener.local_addr(), 1, 2, hello());
        let mut leader = gather(&listener, 2);
        leader.send_plan(&1_u8).unwrap();
        assert_eq!(follower.join().unwrap().unwrap().recv_plan::<u8>().unwrap(), 1);
    }
}

#[test]
fn a_gathering_can_be_stopped_until_it_is_allowed_again() {
    let listener = listener();
    let stopper = listener.stopper();
    let begin = Instant::now();
    let mut is_there = false;
    let follower = join_thread(listener.local_addr(), 1, 3, hello());
    let stopped = listener.gather(3, &hello(), 4 * SOON, &mut |event| {
        is_there |= matches!(event, JoinEvent::Joined { rank: 1, .. });
        stopper.stop("rank 2 has ended");
    });
    let error = stopped.map(|_| ()).unwrap_err();
    assert!(is_there && error.to_string().contains("rank 2 has ended"), "{error}");
    assert!(begin.elapsed() < SOON);
    assert!(listener.gather(1, &hello(), SOON, &mut |_| ()).is_ok(), "nobody is awaited");
    // Rank 1 tries again by itself.
    stopper.reset();
    let second = join_thread(listener.local_addr(), 2, 3, hello());
    listener.gather(3, &hello(), SOON, &mut |_| ()).unwrap();
    assert!(follower.join().unwrap().is_ok() && second.join().unwrap().is_ok());
}

#[test]
fn ranks_may_wait_for_each_other_as_long_as_can_be_said() {
    let listener = listener();
    let address = listener.local_addr();
    let follower = std::thread::spawn(move || join(address, 1, 2, &hello(), Duration::MAX));
    listener.gather(2, &hello(), Duration::MAX, &mut |_| {}).unwrap();
    follower.join().unwrap().unwrap();
}
