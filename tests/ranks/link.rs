//! A connection that carries sums between two ranks breaks, and nothing else: both processes live and know it. What clients were
//! promised is kept.

use std::{fs, os::fd::OwnedFd, path::Path};

use rustix::{
    net::{Shutdown, shutdown},
    process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::{is_gone, other_rank, serve, wait_for_health};
use crate::{
    server::{COMPLETIONS, MODEL, check_canaries, endless},
    support::server::{Server, Streamed},
};

/// The port after the last colon of an address, in numbers of this base.
fn port(address: &str, base: u32) -> u16 {
    let (_, port) = address.rsplit_once(':').unwrap();
    u16::from_str_radix(port, base).unwrap()
}

/// Inodes of the connections of `server` whose port on its side is none of `others`.
fn connections(server: &Server, others: &[u16]) -> Vec<String> {
    const ESTABLISHED: &str = "01";
    let table = fs::read_to_string(format!("/proc/{}/net/tcp", server.pid().as_raw_nonzero())).unwrap();
    let connection = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let is_ours = columns[3] == ESTABLISHED && !others.contains(&port(columns[1], 16));
        is_ours.then(|| format!("socket:[{}]", columns[9]))
    };
    table.lines().skip(1).filter_map(connection).collect()
}

/// The socket that rank 0 sums with rank 1 on: what is neither of the team's other connections nor of a client.
fn data_connection(server: &Server) -> OwnedFd {
    let log = server.wait_for_log("waiting at ");
    let team = log.split("waiting at ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let sockets = connections(server, &[port(team, 10), server.address().port()]);
    let process = pidfd_open(server.pid(), PidfdFlags::empty()).unwrap();
    let folder = format!("/proc/{}/fd", server.pid().as_raw_nonzero());
    let files = fs::read_dir(Path::new(&folder)).unwrap().map(|entry| entry.unwrap());
    let mut found = files.filter(|file| {
        fs::read_link(file.path()).is_ok_and(|link| sockets.iter().any(|socket| link == Path::new(socket)))
    });
    let file = found.next().expect("rank 0 has a connection for sums").file_name();
    let number = file.to_str().unwrap().parse().unwrap();
    pidfd_getfd(process, number, PidfdGetfdFlags::empty()).unwrap()
}

#[test]
fn streams_go_on_when_a_data_connection_between_living_ranks_breaks() {
    let server = serve(MODEL, "2", &[]);
    let undisturbed = Streamed::read(server.stream(COMPLETIONS, &endless(1000)));
    let rank = other_rank(&server);
    let mut events = server.stream(COMPLETIONS, &endless(1000));
    let first = events.next().expect("the stream has begun");
    shutdown(data_connection(&server), Shutdown::Both).unwrap();
    let streamed = Streamed::read(std::iter::once(first).chain(events));
    assert!(streamed.done, "no error");
    assert_eq!(streamed.token_ids, undisturbed.token_ids);
    let log = server.wait_for_log("all ranks are back");
    assert!(log.contains("it lives, but data") && log.contains("all requests go on"), "{log}");
    assert!(is_gone(rank), "the other rank is a new process");
    wait_for_health(&server);
    check_canaries(&server);
}
