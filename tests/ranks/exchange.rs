//! Ranks that read a checkpoint for each other: the same answers, about half of the bytes from the disk by the kernel's own count, and
//! an end with the reason when one of them is lost meanwhile. The protocol is tested in `crates/weights` and `crates/comm`.

#[path = "../../models/examples/load/write.rs"]
mod write;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::Stdio,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use spark_testing::{Oracle, model_dir, model_names};
use tempfile::TempDir;

use super::{CPU, Started, children, free_port, other_rank, serve};
use crate::{
    server::{CHAT, COMPLETIONS, check_canaries},
    support::{
        self, chat_body,
        server::{DEADLINE, Server, program, wait_for_exit},
    },
};

/// The fixtures whose names begin with `prefix` answer the oracle's chats as the oracle does.
fn check_fixtures(prefix: &str, world: &str) {
    for model in model_names(prefix).unwrap() {
        let server = serve(&model, world, &["--load-exchange"]);
        let log = server.wait_for_log("GB of weights are read here");
        assert!(log.contains("come from other ranks"), "{model}: {log}");
        for case in Oracle::load(&model).unwrap().cases.values() {
            let answer = server.ask(CHAT, &chat_body(case, case.greedy_ids.len()));
            let (_, output) = support::prompt_and_output(&answer);
            assert_eq!(output, case.greedy_ids, "{model}/{} on {world} ranks", case.name);
        }
    }
}

#[test]
fn fixtures_read_by_two_ranks_for_each_other_answer_as_on_one() {
    check_fixtures("", "2");
}

#[test]
fn fixtures_read_by_four_ranks_for_each_other_answer_as_on_one() {
    check_fixtures("moe_vl", "4");
    check_fixtures("dense_vl", "4");
}

/// A checkpoint of Qwen3-30B-A3B's layout with few experts, of random numbers, and a fixture's tokenizer.
fn checkpoint(format: &str) -> TempDir {
    // Where tests are built there is a disk; temporary folders may be in memory.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let changes = json!({
        "num_hidden_layers": 2, "num_experts": 16, "vocab_size": 4096, "eos_token_id": 1, "bos_token_id": 1,
    });
    write::write(folder.path(), &changes, format).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(model_dir("text_moe_awq").join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// Bytes of a checkpoint's weights.
fn size(folder: &Path) -> f64 {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let is_shard = |entry: &fs::DirEntry| entry.path().extension().is_some_and(|name| name == "safetensors");
    entries.filter(is_shard).map(|entry| entry.metadata().unwrap().len() as f64).sum()
}

/// Bytes that a process has had fetched from storage.
fn read_bytes(process: Pid) -> f64 {
    let text = fs::read_to_string(format!("/proc/{}/io", process.as_raw_nonzero())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("read_bytes: ")).unwrap();
    line.parse().unwrap()
}

/// What each of two ranks reads of a checkpoint, as a share of it, and what the first answers.
fn shares(folder: &Path, arguments: &[&str]) -> ([f64; 2], String) {
    let server = Server::serve(Some(folder), &[&CPU, &["--tp", "2"][..], arguments].concat());
    let shares = [server.pid(), other_rank(&server)].map(|rank| read_bytes(rank) / size(folder));
    let question = json!({"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": true});
    let answer = server.ask(COMPLETIONS, &question);
    (shares, answer["choices"][0]["token_ids"].to_string())
}

#[test]
fn each_of_two_ranks_reads_half_of_a_checkpoint() {
    for (format, alone) in [("awq", 0.7), ("nvfp4", 0.55), ("fp8", 0.55)] {
        let folder = checkpoint(format);
        let (whole, expected) = shares(folder.path(), &[]);
        let (halves, answer) = shares(folder.path(), &["--load-exchange"]);
        assert!(whole.iter().all(|&share| share > alone), "{format}: the disk is counted: {whole:?}");
        assert!(halves.iter().all(|&share| (0.4..=0.55).contains(&share)), "{format}: {halves:?}");
        assert_eq!(answer, expected, "{format}");
        // With a cache nobody reads the checkpoint the second time, with or without each other.
        let cache = tempfile::tempdir().unwrap();
        let cache = ["--load-exchange", "--weight-cache", cache.path().to_str().unwrap()];
        for _ in 0..2 {
            assert_eq!(shares(folder.path(), &cache).1, expected, "{format}, through a cache");
        }
    }
}

#[test]
fn a_rank_that_is_lost_while_loading_ends_the_start() {
    let folder = checkpoint("awq");
    for signal in [Signal::KILL, Signal::STOP] {
        let mut command = program(&["serve", folder.path().to_str().unwrap(), "--port", "0", "--tp", "2"]);
        command.args(CPU).arg("--load-exchange").stderr(Stdio::piped());
        let mut server = command.spawn().unwrap();
        let head = Pid::from_child(&server);
        let mut log = BufReader::new(server.stderr.take().unwrap());
        let mut text = String::new();
        while !text.contains("ranks are here") {
            assert!(log.read_line(&mut text).unwrap() > 0, "{text}");
        }
        let [rank] = children(head)[..] else { panic!("one other rank") };
        kill_process(rank, signal).unwrap();
        let status = wait_for_exit(&mut server, DEADLINE);
        log.read_to_string(&mut text).unwrap();
        assert!(!status.success() && text.contains("rank 1"), "{signal:?}: {text}");
        // It may have ended with its head.
        let _ = kill_process(rank, Signal::KILL);
    }
}

#[test]
fn ranks_that_differ_in_the_flag_do_not_begin() {
    let leader = format!("127.0.0.1:{}", free_port());
    let model = crate::server::MODEL;
    let rank = Started::new(model, "1", &leader, "secret");
    let text = std::thread::scope(|scope| {
        let ended = scope.spawn(move || rank.end());
        let mut command = program(&["serve", &super::folder(model), "--port", "0", "--load-exchange"]);
        command.args(CPU).args(["--rank", "0", "--world", "2", "--leader", &leader, "--join-timeout", "5"]);
        let status = command.env("SPARK_TOKEN", "secret").stderr(Stdio::null()).status().unwrap();
        assert!(!status.success());
        ended.join().unwrap().1
    });
    assert!(text.contains("settings"), "{text}");
    let server = serve(model, "2", &["--load-exchange"]);
    check_canaries(&server);
}
