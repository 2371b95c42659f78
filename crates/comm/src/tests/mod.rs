//! Teams of threads over the loopback interface, sound and broken. Real processes are tested by the program.

mod collective;
mod gathering;
mod parcels;
mod team;
mod unreachable;

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use spark_testing::FaultProxy;

use crate::{Follower, Hello, JoinEvent, Leader, Listener, Monitor, PeerLost, Result, join};

/// For what must happen at once; generous, since test machines are busy.
const SOON: Duration = Duration::from_secs(5);
/// From a loss to the end of every blocked call.
const LOSS_TIME: Duration = Duration::from_millis(1500);

fn hello() -> Hello {
    Hello { token: "secret".into(), version: "1.2.3".into(), model: [1; 32], settings: [2; 32] }
}

fn listener() -> Listener {
    Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap()
}

fn join_thread(address: SocketAddr, rank: usize, world: usize, hello: Hello) -> JoinHandle<Result<Follower>> {
    std::thread::spawn(move || join(address, rank, world, &hello, SOON))
}

/// Gathers with nothing unusual happening.
fn gather(listener: &Listener, world: usize) -> Leader {
    let mut joined = Vec::new();
    let leader = listener.gather(world, &hello(), SOON, &mut |event| match event {
        JoinEvent::Joined { rank, .. } => joined.push(rank),
        other => panic!("{other}"),
    });
    joined.sort_unstable();
    assert_eq!(joined, (1..world).collect::<Vec<_>>());
    leader.unwrap()
}

/// A team whose rank `r` joins at `address(r, leader's address)`.
fn team_via(world: usize, address: impl Fn(usize, SocketAddr) -> SocketAddr) -> (Leader, Vec<Follower>) {
    let listener = listener();
    let followers: Vec<_> = (1..world)
        .map(|rank| join_thread(address(rank, listener.local_addr()), rank, world, hello()))
        .collect();
    let leader = gather(&listener, world);
    (leader, followers.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect())
}

fn team(world: usize) -> (Leader, Vec<Follower>) {
    team_via(world, |_, address| address)
}

/// A team whose last rank joins through a proxy.
fn proxied_team(world: usize) -> (FaultProxy, Leader, Vec<Follower>) {
    let proxy = std::cell::OnceCell::new();
    let (leader, followers) = team_via(world, |rank, address| {
        let through = rank + 1 == world;
        if through { proxy.get_or_init(|| FaultProxy::start(address).unwrap()).address() } else { address }
    });
    (proxy.into_inner().unwrap(), leader, followers)
}

/// What a monitor says at the first loss.
fn watch(monitor: &Monitor) -> Receiver<PeerLost> {
    let (sender, receiver) = channel();
    monitor.watch(move |lost| sender.send(lost).unwrap());
    receiver
}

/// Runs a call that may block on a thread of its own.
fn apart<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(call()));
    receiver
}
