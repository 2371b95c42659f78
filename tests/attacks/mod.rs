//! Attacks on the whole program, group by group as `docs/attacks.md` lists them: what a hostile client sends is refused or answered,
//! never a 500 and never a hang; afterwards the engine is alive, a known question has its exact answer, and memory and files are
//! where they were. What other tests show already is not repeated here: the table in `docs/attacks.md` names them.

mod dialects;
mod http_edge;
mod media;
mod parameters;
mod structured;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    server::{CHAT, COMPLETIONS, MODEL, check_canaries},
    support::server::{DEADLINE, Server},
};

/// The longest that any answer to an attack may take on a busy test machine.
const LIMIT: Duration = Duration::from_secs(30);
/// What a round may add to memory, and how many rounds there are at most until one adds less.
const SLACK_KIB: i64 = 24 << 10;
const ROUNDS: usize = 6;

/// Runs `attack` on a server until a round leaves nothing behind: the first rounds pay for what is made once and for what an allocator
/// keeps for the next time; something that is lost is lost in each.
fn survives(arguments: &[&str], attack: impl Fn(&Server)) {
    let server = Server::start(MODEL, &[&["--max-model-len", "2048"], arguments].concat());
    let rest = || {
        server.wait_until_idle();
        check_canaries(&server);
        server.resident_kib()
    };
    rest();
    attack(&server);
    let (mut memory, files) = (rest(), server.num_files());
    let mut growth = Vec::new();
    while growth.len() < ROUNDS && growth.last().is_none_or(|grown| *grown >= SLACK_KIB) {
        attack(&server);
        let before = std::mem::replace(&mut memory, rest());
        growth.push(memory - before);
    }
    server.wait_for_files(files);
    assert!(
        growth.last().is_some_and(|grown| *grown < SLACK_KIB),
        "KiB left behind by each round: {growth:?}"
    );
    assert_eq!(server.get("/health").status, 200);
    let log = server.wait_for_log("listening");
    assert!(!log.contains("panicked") && !log.contains("internal error"), "{log}");
}

/// What a client's bytes on a connection of their own are answered with, all of it; empty if the connection just ends.
fn exchange(server: &Server, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    // The server may refuse what it has not read; then the connection breaks, with or without an answer.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// The status of an answer's head; 0 without one.
fn status_of(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
}

/// Sends a body; the answer has to come in time and to be no failure. Returns its status.
fn post(server: &Server, path: &str, name: &str, body: &[u8]) -> u16 {
    let start = Instant::now();
    let response = server.post_bytes(path, body);
    assert!(start.elapsed() < LIMIT, "{name}: {:?}", start.elapsed());
    let text = String::from_utf8_lossy(&response.body);
    let shown: String = text.chars().take(500).collect();
    assert!(response.status < 500 || response.status == 503, "{name}: {} {shown}", response.status);
    assert!(text.len() < 1 << 20, "{name}: an answer of {} bytes", text.len());
    response.status
}

/// [`post`] that has to be refused.
fn refused(server: &Server, path: &str, name: &str, body: &Value) {
    let status = post(server, path, name, body.to_string().as_bytes());
    assert!((400..500).contains(&status), "{name}: {status}");
}

/// [`post`] that has to be answered.
fn answered(server: &Server, path: &str, name: &str, body: &Value) {
    let status = post(server, path, name, body.to_string().as_bytes());
    assert_eq!(status, 200, "{name}");
}

/// A chat with one field more.
fn chat(field: &str, value: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2});
    body[field] = value;
    body
}

/// A completion with one field more.
fn completion(field: &str, value: Value) -> Value {
    let mut body = json!({"prompt": "x", "max_tokens": 2});
    body[field] = value;
    body
}

/// Group 26: what a client chooses never becomes a label.
#[test]
fn group_26_metrics_have_no_names_of_clients() {
    survives(&[], |server| {
        let names = || -> Vec<String> {
            let page = String::from_utf8(server.get("/metrics").body).unwrap();
            page.lines().filter_map(|line| line.rsplit_once(' ')).map(|(name, _)| name.to_owned()).collect()
        };
        answered(server, COMPLETIONS, "one request", &completion("request_id", json!("first")));
        let before = names();
        for i in 0..100 {
            let name = format!("client-{i}\"}} 1\nfake_metric");
            refused(server, COMPLETIONS, "another model", &completion("model", json!(name)));
            answered(server, COMPLETIONS, "a name", &completion("request_id", json!(name)));
            answered(server, CHAT, "a salt", &chat("cache_salt", json!(name)));
            answered(server, CHAT, "a user", &chat("user", json!(name)));
        }
        let start = Instant::now();
        assert_eq!(names(), before);
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    });
}
