//! Several ranks as processes over real sockets: their answers are those of one rank, and whatever happens to a rank, to the
//! network or to the head ends as promised, within seconds. The protocol itself is tested in `crates/comm`.

mod copies;
mod exchange;
mod link;
mod networks;

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::json;
use spark_testing::{FaultProxy, Oracle, model_dir};

use crate::{
    server::{CHAT, COMPLETIONS, MODEL, check_canaries, endless},
    support::{
        self, chat_body,
        server::{DEADLINE, Server, Streamed, program, wait_for_exit},
    },
};

/// A lost rank is noticed within a second, and a machine that runs other tests needs some more.
const NOTICED: Duration = Duration::from_secs(5);

/// Flags of a small engine on the CPU.
const CPU: [&str; 8] = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--kv-cache-memory-bytes",
    "67108864",
    "--max-model-len",
    "4096",
];

fn folder(model: &str) -> String {
    model_dir(model).display().to_string()
}

/// Serves `model` on `world` ranks of this machine.
fn serve(model: &str, world: &str, arguments: &[&str]) -> Server {
    Server::serve(Some(&model_dir(model)), &[&CPU, &["--tp", world][..], arguments].concat())
}

/// Processes whose parent is `parent`, as /proc knows them: `PID (name) state PPID ...`.
fn children(parent: Pid) -> Vec<Pid> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, fields) = stat.rsplit_once(") ")?;
        let of: i32 = fields.split(' ').nth(1)?.parse().ok()?;
        (of == parent.as_raw_nonzero().get()).then(|| Pid::from_raw(pid)).flatten()
    });
    processes.collect()
}

/// The one other rank of `server`.
pub(crate) fn other_rank(server: &Server) -> Pid {
    let [rank] = children(server.pid())[..] else { panic!("one other rank: {:?}", children(server.pid())) };
    rank
}

fn wait_until(what: &str, within: Duration, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < within, "not within {within:?}: {what}");
        std::thread::yield_now();
    }
}

/// Whether a process is gone; one that nobody has waited for yet is.
fn is_gone(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    test_kill_process(pid).is_err() || stat.is_ok_and(|stat| stat.contains(") Z "))
}

/// Waits until /health says 503 and names the rank.
fn wait_for_failure(server: &Server, named: &str) {
    let mut body = String::new();
    wait_until("/health says what was lost", NOTICED, || {
        let response = server.get("/health");
        body = String::from_utf8_lossy(&response.body).into_owned();
        response.status == 503
    });
    assert!(body.contains(named), "{body}");
}

fn wait_for_health(server: &Server) {
    wait_until("it serves again", DEADLINE, || server.get("/health").status == 200);
}

#[test]
fn bench_measures_ranks() {
    for experts in [&[][..], &["--moe-parallel", "ep"]] {
        let mut command = program(&["bench", "latency", "--config", &folder("moe_vl_bf16"), "--tp", "2"]);
        command.args(&CPU[..6]).args(["--input-len", "8", "--output-len", "4", "--num-iters", "1"]);
        let Output { status, stdout, stderr } = command.args(experts).output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        assert!(String::from_utf8(stdout).unwrap().contains("Avg latency"));
    }
}

/// What cannot be shared so ends the start, and says why.
#[test]
fn whole_experts_are_refused_where_there_are_none_or_too_few() {
    for (model, world, expected) in [
        ("dense_vl_bf16", "2", ["--moe-parallel: ep", "qwen3_vl has no experts"]),
        ("moe_vl_bf16", "4", ["num_experts: 6", "over 1, 2 ranks"]),
    ] {
        let mut command = program(&["generate", &folder(model), "-p", "Hello", "--tp", world]);
        let Output { status, stderr, .. } =
            command.args(CPU).args(["--moe-parallel", "ep"]).output().unwrap();
        let message = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{message}");
        assert!(expected.iter().all(|part| message.contains(part)), "{message}");
    }
}

/// Pictures of the oracle's chats on two ranks that each have a half of the encoder.
#[test]
fn a_split_encoder_answers_as_a_whole_one() {
    for model in ["moe_vl_bf16", "moe_vl_awq", "dense_vl_bf16"] {
        let server = serve(model, "2", &["--mm-encoder-tp-mode", "weights"]);
        let oracle = Oracle::load(model).unwrap();
        let cases: Vec<_> = oracle.cases.values().filter(|case| !case.media.is_empty()).collect();
        assert!(!cases.is_empty(), "{model}");
        for case in cases {
            let answer = server.ask(CHAT, &chat_body(case, case.greedy_ids.len()));
            let (prompt, output) = support::prompt_and_output(&answer);
            assert_eq!(prompt, case.prompt_ids, "{model}/{}", case.name);
            assert_eq!(output, case.greedy_ids, "{model}/{}", case.name);
        }
    }
}

/// Ranks that would split different things do not become a group.
#[test]
fn ranks_agree_on_what_they_split() {
    let leader = format!("127.0.0.1:{}", free_port());
    std::thread::scope(|scope| {
        let address = &leader;
        let rank = scope.spawn(move || {
            drop(connect(address));
            Started::new("moe_vl_bf16", "1", address, "secret").end()
        });
        let folder = folder("moe_vl_bf16");
        let mut command = program(&["serve", &folder, "--port", "0", "--rank", "0", "--world", "2"]);
        command.args(CPU).args(["--leader", address, "--token", "secret", "--join-timeout", "20"]);
        command.args(["--mm-encoder-tp-mode", "weights"]).stdout(Stdio::null()).stderr(Stdio::null());
        let _leader = Started(command.spawn().unwrap());
        let (code, text) = rank.join().unwrap();
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("refuse") && text.contains("settings"), "{text}");
    });
}

#[test]
fn an_idle_server_notices_a_killed_rank() {
    let server = serve(MODEL, "4", &[]);
    let ranks = children(server.pid());
    assert_eq!(ranks.len(), 3);
    kill_process(ranks[1], Signal::KILL).unwrap();
    wait_for_failure(&server, "rank ");
    wait_for_health(&server);
    check_canaries(&server);
    assert!(ranks.iter().all(|rank| is_gone(*rank)), "all ranks are new");
}

#[test]
fn without_patience_a_lost_rank_ends_the_server() {
    let mut server = serve(MODEL, "2", &["--rejoin-timeout", "0"]);
    kill_process(other_rank(&server), Signal::KILL).unwrap();
    assert_eq!(server.wait_for_exit(DEADLINE).code(), Some(6));
    server.wait_for_log("rank 1 is lost");
}

#[test]
fn ranks_do_not_outlive_their_head() {
    let mut server = serve(MODEL, "4", &[]);
    let ranks = children(server.pid());
    assert_eq!(ranks.len(), 3);
    kill_process(server.pid(), Signal::KILL).unwrap();
    server.wait_for_exit(DEADLINE);
    wait_until("all ranks are gone", NOTICED, || ranks.iter().all(|rank| is_gone(*rank)));
}

#[test]
fn sigterm_lets_streams_finish_and_ends_all_ranks() {
    let mut server = serve(MODEL, "2", &[]);
    let rank = other_rank(&server);
    let mut events = server.stream(COMPLETIONS, &endless(1000));
    let first = events.next().expect("the stream has begun");
    server.terminate();
    let streamed = Streamed::read(std::iter::once(first).chain(events));
    assert!(streamed.done);
    assert_eq!(streamed.token_ids.len(), 1000);
    assert_eq!(server.wait_for_exit(DEADLINE).code(), Some(0));
    assert!(is_gone(rank));
}

#[test]
fn a_rank_that_is_told_to_stop_lets_streams_finish() {
    for signal in [Signal::TERM, Signal::HUP] {
        let mut server = serve(MODEL, "2", &[]);
        let rank = other_rank(&server);
        let mut events = server.stream(COMPLETIONS, &endless(1000));
        let first = events.next().expect("the stream has begun");
        kill_process(rank, signal).unwrap();
        server.wait_for_log("shutting down");
        let streamed = Streamed::read(std::iter::once(first).chain(events));
        assert!(streamed.done);
        assert_eq!(streamed.token_ids.len(), 1000);
        assert_eq!(server.wait_for_exit(DEADLINE).code(), Some(0));
        assert!(is_gone(rank));
    }
}

/// A port that was free a moment ago.
fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

/// A rank that is started by itself; killed when dropped.
struct Started(Child);

impl Started {
    fn new(model: &str, rank: &str, leader: &str, token: &str) -> Self {
        Self::with(&[], model, rank, leader, token)
    }

    /// With further flags.
    fn with(arguments: &[&str], model: &str, rank: &str, leader: &str, token: &str) -> Self {
        let mut command = program(&["serve", &folder(model), "--port", "0", "--rank", rank, "--world", "2"]);
        command.args(CPU).args(["--leader", leader, "--join-timeout", "20"]).env("SPARK_TOKEN", token);
        command.args(arguments);
        Self(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Its exit code and what it said.
    fn end(mut self) -> (Option<i32>, String) {
        let code = wait_for_exit(&mut self.0, DEADLINE).code();
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (code, text)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Connects as soon as somebody listens.
fn connect(address: &str) -> TcpStream {
    let mut connection = None;
    wait_until("rank 0 listens", DEADLINE, || {
        connection = TcpStream::connect(address).ok();
        connection.is_some()
    });
    connection.unwrap()
}

#[test]
fn strangers_and_wrong_ranks_are_refused_and_the_right_one_is_served() {
    let leader = format!("127.0.0.1:{}", free_port());
    std::thread::scope(|scope| {
        let address = &leader;
        let others = scope.spawn(move || {
            // Somebody who says nothing, and somebody who says too much.
            let silent = connect(address);
            let mut loud = connect(address);
            // It is closed before all of it is read.
            let _ = loud.write_all(&vec![b'x'; 1 << 20]);
            for (model, token, named) in [("text_moe_awq", "secret", "model"), (MODEL, "guess", "token")] {
                let (code, text) = Started::new(model, "1", address, token).end();
                assert_eq!(code, Some(1), "{text}");
                assert!(text.contains("refuse") && text.contains(named), "{text}");
            }
            for other in [["--moe-parallel", "ep"], ["--native-fp4", "emulate"]] {
                let (code, text) = Started::with(&other, MODEL, "1", address, "secret").end();
                assert_eq!(code, Some(1), "{text}");
                assert!(text.contains("refuse") && text.contains("settings"), "{text}");
            }
            drop(silent);
            Started::new(MODEL, "1", address, "secret")
        });
        let server = Server::serve_with(
            Some(&model_dir(MODEL)),
            &[&CPU[..], &["--rank", "0", "--world", "2", "--leader", address]].concat(),
            &[("SPARK_TOKEN", "secret")],
        );
        check_canaries(&server);
        let rank = others.join().unwrap();
        drop(server);
        let (code, text) = rank.end();
        assert_eq!(code, Some(6), "a head that is killed is a lost one: {text}");
    });
}

#[test]
fn a_slow_network_is_endured_and_a_rank_that_a_supervisor_starts_again_rejoins() {
    let leader = format!("127.0.0.1:{}", free_port());
    let proxy = FaultProxy::start(leader.parse().unwrap()).unwrap();
    let through_proxy = proxy.address().to_string();
    let rank = Started::new(MODEL, "1", &through_proxy, "secret");
    let server = Server::serve_with(
        Some(&model_dir(MODEL)),
        &[&CPU[..], &["--rank", "0", "--world", "2", "--leader", &leader]].concat(),
        &[("SPARK_TOKEN", "secret")],
    );
    proxy.set_delay(Duration::from_millis(5));
    check_canaries(&server);
    proxy.set_delay(Duration::ZERO);
    let mut events = server.stream(COMPLETIONS, &endless(4000));
    assert!(events.next().is_some(), "the stream has begun");
    proxy.reset();
    wait_for_failure(&server, "rank 1");
    assert!(events.any(|event| event.contains("rank 1")), "the stream ends with an error");
    let refused = server.post(COMPLETIONS, &endless(1));
    assert_eq!(refused.status, 503, "{}", String::from_utf8_lossy(&refused.body));
    let (code, text) = rank.end();
    assert_eq!(code, Some(6), "a supervisor is told that the group was lost: {text}");
    let again = Started::new(MODEL, "1", &through_proxy, "secret");
    wait_for_health(&server);
    check_canaries(&server);
    drop(server);
    assert_eq!(again.end().0, Some(6));
}

#[test]
fn ranks_need_a_secret_and_each_other() {
    let output = |arguments: &[&str]| {
        let Output { status, stderr, .. } = program(arguments).args(CPU).output().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    };
    let model = folder(MODEL);
    let rank_0 = ["serve", &model, "--port", "0", "--rank", "0", "--world", "2", "--leader", "127.0.0.1:0"];
    let (code, text) = output(&rank_0);
    assert_eq!(code, Some(1));
    assert!(text.contains("SPARK_TOKEN"), "{text}");
    let (code, text) = output(&[&rank_0[..], &["--token", "secret", "--join-timeout", "1"]].concat());
    assert_eq!(code, Some(1));
    assert!(text.contains("[1] of 2 did not join"), "{text}");
}

/// What the program calls instead of `ssh`: `script` in a file, with the host in `$1` and the command in `$2`.
fn fake_ssh(folder: &tempfile::TempDir, script: &str) -> String {
    let path: PathBuf = folder.path().join("ssh");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

#[test]
fn a_node_that_cannot_be_reached_ends_the_start_at_once() {
    let start = Instant::now();
    let scripts = tempfile::tempdir().unwrap();
    let ssh = fake_ssh(&scripts, "echo no route to $1 >&2; exit 255");
    let mut command = program(&["serve", &folder(MODEL), "--port", "0", "--nodes", "127.0.0.1,spark-2"]);
    let Output { status, stderr, .. } = command.args(CPU).env("SPARK_SSH", ssh).output().unwrap();
    let text = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("spark-2: no route to spark-2") && text.contains("ssh could not log in"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(30), "far below the join timeout");
}

#[test]
fn waiting_requests_survive_a_lost_rank() {
    let server = serve(MODEL, "2", &["--max-num-seqs", "1"]);
    let rank = other_rank(&server);
    let mut running = server.stream(COMPLETIONS, &endless(3000));
    assert!(running.next().is_some(), "the first runs");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.ask(COMPLETIONS, &endless(20)));
        server.wait_for_metric("vllm:num_requests_waiting", |count| count == 1.0);
        kill_process(rank, Signal::KILL).unwrap();
        let answer = waiting.join().unwrap();
        assert_eq!(support::ids(&answer["choices"][0]["token_ids"]).len(), 20, "{answer}");
    });
    assert!(running.any(|event| event.contains("rank 1")));
    let body = json!({"prompt": "x", "max_tokens": 1});
    assert_eq!(server.post(COMPLETIONS, &body).status, 200);
}
