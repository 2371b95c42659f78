//! Many clients, clients that vanish, clients that do not read, and a long time: the program answers or says when to come back, says
//! in the meantime how it is, and ends up where it was. `cargo xtask long` runs these in their full size (`SPARK_LONG`) and keeps
//! what they print; without it they are small enough for every run of the tests.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use spark_testing::Random;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    server::{CHAT, COMPLETIONS, MODEL, case, check_canaries, endless, with},
    support::{
        chat_body,
        server::{DEADLINE, Server},
    },
};

/// How many seconds the mix takes; `cargo xtask ci` wants two minutes.
const SOAK_VARIABLE: &str = "SPARK_SOAK_SECONDS";

/// Whether the tests run in their full size.
fn is_long() -> bool {
    std::env::var_os("SPARK_LONG").is_some()
}

/// One line of docs/results/long.md.
#[expect(clippy::print_stdout, reason = "`cargo xtask long` reads it there")]
fn report(what: &str, value: impl std::fmt::Display) {
    println!("| {what} | {value} |");
}

/// The request as a client of its own connection sends it.
fn request(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes()
}

/// As many sockets as the system gives.
fn raise_open_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

/// Asks for `path` again and again on one connection; returns how long each answer took, sorted.
fn probe(address: SocketAddr, path: &str, stop: &AtomicBool) -> Vec<Duration> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let question = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut times = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        stream.write_all(question.as_bytes()).unwrap();
        read_answer(&mut stream);
        times.push(start.elapsed());
        // A scrape every few milliseconds is plenty; more would be load of its own.
        std::thread::park_timeout(Duration::from_millis(3));
    }
    times.sort();
    times
}

/// One answer with a length; it has to be a 200.
fn read_answer(stream: &mut TcpStream) {
    let (mut answer, mut buffer) = (Vec::new(), [0; 65536]);
    loop {
        let count = stream.read(&mut buffer).expect("the server answers");
        assert!(count > 0, "the server ends the connection");
        answer.extend_from_slice(&buffer[..count]);
        let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
        assert!(head.starts_with("http/1.1 200"), "{head}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |text| text.trim().parse().unwrap());
        if answer.len() >= end + 4 + length {
            return;
        }
    }
}

/// The time that `share` of the answers did not exceed, in milliseconds.
fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let place = ((sorted.len() as f64 * share) as usize).min(sorted.len() - 1);
    sorted[place].as_secs_f64() * 1e3
}

/// Runs `work` while both light routes are asked; returns its result and their 99th percentiles in milliseconds.
fn probed<T>(server: &Server, work: impl FnOnce() -> T) -> (T, [f64; 2]) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let probes = ["/health", "/metrics"].map(|path| scope.spawn(|| probe(server.address(), path, &stop)));
        let result = work();
        stop.store(true, Ordering::Relaxed);
        (result, probes.map(|probe| percentile(&probe.join().unwrap(), 0.99)))
    })
}

/// How one request of many ended.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Answered,
    ToldWhenToComeBack,
    /// The status, or 0 when there was none.
    Other(u16),
}

async fn ask_once(address: SocketAddr, question: &[u8]) -> std::io::Result<End> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream.write_all(question).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let text = String::from_utf8_lossy(&answer);
    let head = text.split("\r\n\r\n").next().unwrap_or_default().to_lowercase();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok(match status {
        200 => End::Answered,
        429 | 503 if head.contains("retry-after: ") => End::ToldWhenToComeBack,
        other => End::Other(other),
    })
}

/// Sends `count` requests at once, each on a connection of its own; returns how they ended.
fn flood(address: SocketAddr, count: usize) -> BTreeMap<End, usize> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let body = json!({"prompt": "Count:", "max_tokens": 4, "temperature": 0, "ignore_eos": true});
    let question: Arc<[u8]> = request(COMPLETIONS, &body).into();
    runtime.block_on(async {
        let tasks: Vec<_> = (0..count)
            .map(|_| {
                let question = question.clone();
                tokio::spawn(async move { ask_once(address, &question).await.unwrap_or(End::Other(0)) })
            })
            .collect();
        let mut ends = BTreeMap::new();
        for task in tasks {
            *ends.entry(task.await.unwrap()).or_insert(0) += 1;
        }
        ends
    })
}

/// What a server has at rest.
struct Rest {
    resident_kib: i64,
    files: usize,
}

impl Rest {
    fn of(server: &Server) -> Self {
        server.wait_until_idle();
        check_canaries(server);
        Self { resident_kib: server.resident_kib(), files: server.num_files() }
    }

    /// After as many rounds of `work` as it takes until one adds little: what an allocator keeps, it uses again, and what is lost is
    /// lost in each round.
    fn settled(server: &Server, mut work: impl FnMut()) -> Self {
        work();
        let mut rest = Self::of(server);
        for _ in 0..4 {
            work();
            let before = std::mem::replace(&mut rest, Self::of(server));
            if rest.resident_kib - before.resident_kib < 16 << 10 {
                break;
            }
        }
        rest
    }

    /// Back to this, but for `slack_mib` of what an allocator keeps.
    fn check(&self, server: &Server, slack_mib: i64) {
        server.wait_until_idle();
        check_canaries(server);
        server.wait_for_files(self.files);
        let grown = server.resident_kib() - self.resident_kib;
        report("memory kept, MiB", grown >> 10);
        assert!(grown < slack_mib << 10, "{grown} KiB of memory are left behind");
        let log = server.wait_for_log("listening");
        assert!(!log.contains("panicked") && !log.contains("internal error"), "{log}");
    }
}

#[test]
fn a_flood_is_answered_or_told_when_to_come_back() {
    raise_open_files();
    let count = if is_long() { 10_000 } else { 1_500 };
    let queued = (count * 8 / 10).to_string();
    let server = Server::start(
        MODEL,
        &["--max-num-seqs", "16", "--max-connections", "12000", "--max-num-queued-reqs", &queued],
    );
    let rest = Rest::settled(&server, || drop(flood(server.address(), count)));
    let (_, idle) = probed(&server, || std::thread::park_timeout(Duration::from_secs(2)));
    let start = Instant::now();
    let (ends, busy) = probed(&server, || flood(server.address(), count));
    report("requests at once", count);
    report("how they ended", format!("{ends:?}"));
    report("seconds", start.elapsed().as_secs());
    report("/health and /metrics at rest, p99 ms", format!("{:.1} {:.1}", idle[0], idle[1]));
    report("/health and /metrics meanwhile, p99 ms", format!("{:.1} {:.1}", busy[0], busy[1]));
    assert!(ends[&End::Answered] > count / 2, "{ends:?}");
    // Small runs share their machine with other tests.
    let limit = if is_long() { 10.0 } else { 100.0 };
    assert!(busy.iter().all(|&time| time < limit), "{busy:?} ms");
    assert!(!ends.keys().any(|end| matches!(end, End::Other(_))), "{ends:?}");
    // The C library keeps some kilobytes for every connection that there was at once, and not always the same.
    rest.check(&server, if is_long() { 128 } else { 64 });
}

/// Sends a request, reads for a while or not at all, and goes away.
fn vanish(address: SocketAddr, client: usize) {
    let mut random = Random::new(client as u64);
    let body = with(endless(400), json!({"stream": client.is_multiple_of(2)}));
    let question = request(COMPLETIONS, &body);
    let mut stream = TcpStream::connect(address).unwrap();
    let sent = if client.is_multiple_of(5) { random.below(question.len()) } else { question.len() };
    stream.write_all(&question[..sent]).unwrap();
    // Those that have asked for the whole of it.
    if client % 10 == 1 {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        // An end of the connection is as good.
        let _ = stream.read(&mut [0; 200]);
    }
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let count = if is_long() { 1_000 } else { 300 };
    let server = Server::start(MODEL, &["--max-num-seqs", "16", "--max-model-len", "1024"]);
    let wave = || {
        std::thread::scope(|scope| {
            for first in 0..10 {
                let address = server.address();
                scope.spawn(move || (first..count).step_by(10).for_each(|client| vanish(address, client)));
            }
        });
    };
    wave();
    let rest = Rest::of(&server);
    wave();
    report("clients that vanish", count);
    rest.check(&server, 32);
}

#[test]
fn slow_readers_hold_up_nobody() {
    let count = if is_long() { 100 } else { 25 };
    let server =
        Server::start(MODEL, &["--max-num-seqs", "128", "--max-model-len", "2048", "--write-timeout", "5"]);
    // Log-probabilities make an answer larger than what the system buffers for a connection.
    let body = with(endless(1500), json!({"stream": true, "logprobs": 20}));
    let question = request(COMPLETIONS, &body);
    let wave = || {
        let slow: Vec<TcpStream> = (0..count)
            .map(|_| {
                let mut stream = TcpStream::connect(server.address()).unwrap();
                stream.write_all(&question).unwrap();
                stream
            })
            .collect();
        server.wait_for_metric("vllm:num_requests_running", |running| running > 0.0);
        let start = Instant::now();
        check_canaries(&server);
        report("canaries beside them, s", format!("{:.1}", start.elapsed().as_secs_f64()));
        server.wait_until_idle();
        slow
    };
    drop(wave());
    let rest = Rest::of(&server);
    // The connections of these are still open at the end on our side, and not on the server's.
    let slow = wave();
    server.wait_for_files(rest.files);
    drop(slow);
    report("readers that do not read", count);
    rest.check(&server, 64);
}

/// One request of a mix, on a connection of its own.
fn ask_something(server: &Server, random: &mut Random) {
    let i = random.below(1000);
    let (path, body) = match i % 4 {
        0 => (CHAT, chat_body(&case(["image0", "image1", "images"][i % 3]), 4 + i % 9)),
        1 => (CHAT, chat_body(&case("chat"), 4 + i % 9)),
        2 => (COMPLETIONS, with(endless(1 + i % 40), json!({"prompt": format!("Request {i}:")}))),
        _ => (COMPLETIONS, json!({"prompt": [i, -1], "max_tokens": 1})),
    };
    let status = server.post(path, &body).status;
    assert_eq!(status, if i % 4 == 3 { 400 } else { 200 }, "{body}");
    if i.is_multiple_of(50) {
        vanish(server.address(), i);
    }
}

#[test]
fn a_long_mix_leaves_memory_flat() {
    let wanted = std::env::var(SOAK_VARIABLE).ok();
    let wanted = wanted.map(|seconds| seconds.parse().expect("a number of seconds"));
    let seconds = wanted.unwrap_or(if is_long() { 1200 } else { 10 });
    let server = Server::start(MODEL, &["--max-num-seqs", "16", "--max-model-len", "1024"]);
    let run = |seconds: u64| -> usize {
        let end = Instant::now() + Duration::from_secs(seconds);
        let client = |seed: u64| {
            let (server, mut random, mut count) = (&server, Random::new(seed), 0);
            move || {
                while Instant::now() < end {
                    ask_something(server, &mut random);
                    count += 1;
                }
                count
            }
        };
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..6).map(|seed| scope.spawn(client(seed))).collect();
            clients.into_iter().map(|client| client.join().unwrap()).sum()
        })
    };
    run(seconds / 5);
    let rest = Rest::of(&server);
    let count = run(seconds);
    report("requests of a mix", format!("{count} in {seconds} s"));
    rest.check(&server, 32);
}
