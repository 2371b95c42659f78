//! Measures all-reduce over TCP between ranks of this machine: `cargo run --release -p spark-comm --example all_reduce`.
//!
//! Median of many calls, by size and number of ranks. Not a measurement of a network: the loopback interface has none.
#![allow(clippy::print_stdout, reason = "a program that prints a table")]

use std::time::{Duration, Instant};

use spark_comm::{Error, Hello, Listener, Result, TcpCollective, join};

const TIMEOUT: Duration = Duration::from_secs(10);
const SIZES_KIB: [usize; 6] = [8, 32, 128, 512, 2048, 8192];

fn main() -> Result<()> {
    println!("ranks        KiB   calls  median us       GB/s of each rank's values");
    for world in [2, 4] {
        for (kib, calls, median) in measure(world)? {
            let rate = (kib << 10) as f64 / median.as_secs_f64() / 1e9;
            println!("{world:5} {kib:10} {calls:7} {:10.1} {rate:10.2}", median.as_secs_f64() * 1e6);
        }
    }
    Ok(())
}

fn hello() -> Hello {
    Hello { token: "example".into(), version: "0".into(), model: [0; 32], settings: [0; 32] }
}

/// What rank 0 sees: size in KiB, number of calls, median time.
fn measure(world: usize) -> Result<Vec<(usize, usize, Duration)>> {
    let address = "127.0.0.1:0".parse().expect("a literal address");
    let listener = Listener::bind(address)?;
    let address = listener.local_addr();
    std::thread::scope(|scope| {
        let followers: Vec<_> = (1..world)
            .map(|rank| {
                scope.spawn(move || -> Result<()> {
                    let mut follower = join(address, rank, world, &hello(), TIMEOUT)?;
                    all_sizes(&mut follower.collective()?).map(|_| ())
                })
            })
            .collect();
        let mut leader = listener.gather(world, &hello(), TIMEOUT, &mut |_| ())?;
        let times = all_sizes(&mut leader.collective()?)?;
        for follower in followers {
            follower.join().map_err(|_| thread_ended())??;
        }
        Ok(times)
    })
}

fn thread_ended() -> Error {
    Error::System { action: "measure on a thread", source: std::io::Error::other("it panicked") }
}

fn all_sizes(collective: &mut TcpCollective) -> Result<Vec<(usize, usize, Duration)>> {
    let mut all = Vec::new();
    for kib in SIZES_KIB {
        let calls = (64 * 1024 / kib).clamp(30, 2000);
        let mut values = vec![0.0; kib * 256];
        let mut times = Vec::with_capacity(calls);
        for _ in 0..calls {
            let begin = Instant::now();
            collective.sum(&mut values)?;
            times.push(begin.elapsed());
        }
        times.sort_unstable();
        all.push((kib, calls, times[calls / 2]));
    }
    Ok(all)
}
