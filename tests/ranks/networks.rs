//! Ranks that each have a network of their own, as on separate machines: their answers are those of one rank, for every fixture
//! and the demo model, and lost ranks and cut links end as promised. Nodes are started through a stand-in for ssh.

use std::process::{Command, Output};

use rustix::process::{Signal, kill_process};
use spark_testing::{Network, Oracle, media_path, model_dir, model_names};
use tempfile::TempDir;

use super::{CPU, children, is_gone, other_rank, wait_for_failure, wait_for_health};
use crate::{
    server::{CHAT, COMPLETIONS, MODEL, check_canaries, endless},
    support::{
        self, chat_body,
        server::{DEADLINE, Server, program, program_in},
    },
};

/// Nodes and the way to them.
struct Nodes {
    network: Network,
    names: String,
    ssh: String,
    _scripts: TempDir,
}

impl Nodes {
    fn new(count: usize) -> Self {
        let network = Network::new(count, 1).unwrap();
        let scripts = tempfile::tempdir().unwrap();
        let ssh = network.ssh(scripts.path(), "").unwrap().display().to_string();
        Self { names: network.addresses(), network, ssh, _scripts: scripts }
    }

    /// Serves `model`, one rank on each node.
    fn serve(&self, model: &str) -> Server {
        self.serve_with(model, &[])
    }

    fn serve_with(&self, model: &str, arguments: &[&str]) -> Server {
        let arguments = [&CPU[..], &["--nodes", &self.names], arguments].concat();
        let server =
            Server::serve_in(&self.network, Some(&model_dir(model)), &arguments, &[("SPARK_SSH", &self.ssh)]);
        server.wait_for_log("[rank 1] ");
        server
    }
}

/// The fixtures whose names begin with `prefix` answer the oracle's chats as the oracle does, and so as one rank does.
fn check_fixtures(prefix: &str, count: usize) {
    check_models(&model_names(prefix).unwrap(), count, "tp");
}

/// The same with whole experts on every node.
fn check_whole_experts(prefix: &str, count: usize) {
    let mut models = model_names(prefix).unwrap();
    // It has six experts.
    models.retain(|model| count == 2 || model != "moe_vl_bf16");
    check_models(&models, count, "ep");
}

fn check_models(models: &[String], count: usize, moe_parallel: &str) {
    let nodes = Nodes::new(count);
    assert!(!models.is_empty(), "no fixture has such a name");
    for model in models {
        let server = nodes.serve_with(model, &["--moe-parallel", moe_parallel]);
        for case in Oracle::load(model).unwrap().cases.values() {
            let answer = server.ask(CHAT, &chat_body(case, case.greedy_ids.len()));
            let (prompt, output) = support::prompt_and_output(&answer);
            assert_eq!(prompt, case.prompt_ids, "{model}/{}", case.name);
            assert_eq!(output, case.greedy_ids, "{model}/{} on {count} nodes, {moe_parallel}", case.name);
        }
    }
}

#[test]
fn moe_fixtures_answer_on_two_nodes_as_on_one() {
    check_fixtures("moe_vl", 2);
}

#[test]
fn dense_fixtures_answer_on_two_nodes_as_on_one() {
    check_fixtures("dense_vl", 2);
}

#[test]
fn text_fixtures_answer_on_two_nodes_as_on_one() {
    check_fixtures("text", 2);
}

#[test]
fn moe_fixtures_answer_on_four_nodes_as_on_one() {
    check_fixtures("moe_vl", 4);
}

#[test]
fn dense_fixtures_answer_on_four_nodes_as_on_one() {
    check_fixtures("dense_vl", 4);
}

#[test]
fn text_fixtures_answer_on_four_nodes_as_on_one() {
    check_fixtures("text", 4);
}

#[test]
fn moe_fixtures_with_whole_experts_answer_on_two_nodes_as_on_one() {
    check_whole_experts("moe_vl", 2);
}

#[test]
fn moe_fixtures_with_whole_experts_answer_on_four_nodes_as_on_one() {
    check_whole_experts("moe_vl", 4);
}

#[test]
fn text_fixtures_with_whole_experts_answer_on_nodes_as_on_one() {
    check_whole_experts("text_moe", 2);
    check_whole_experts("text_moe", 4);
}

/// What the demo model says of `images` pictures with the ranks that `command` starts.
fn describe(mut command: Command, images: usize) -> String {
    command.args(CPU).args(["--temperature", "0", "--log-level", "warn"]);
    for name in &["demo.png", "demo-after.png"][..images] {
        command.arg("--image").arg(media_path(name));
    }
    command.args(["-p", "Describe the picture.", "-p", "What is 123 + 456?"]);
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

#[test]
fn the_demo_model_answers_on_any_number_of_nodes_as_on_one() {
    let on_nodes = |count: usize, images: usize| {
        let nodes = Nodes::new(count);
        let mut command = program_in(&nodes.network, 0, &["generate", "--nodes", &nodes.names]);
        command.env("SPARK_SSH", &nodes.ssh);
        describe(command, images)
    };
    let alone = |images| describe(program(&["generate"]), images);
    let one = alone(1);
    assert!(one.contains("a pink ring at the top left"), "{one}");
    assert_eq!(on_nodes(2, 1), one);
    assert_eq!(on_nodes(4, 1), one);
    let two = alone(2);
    assert_eq!(on_nodes(2, 2), two, "each rank encodes one picture");
    assert_eq!(describe(program(&["generate", "--tp", "2"]), 2), two, "ranks of one machine");
    let whole_experts = ["generate", "--tp", "4", "--moe-parallel", "ep"];
    assert_eq!(describe(program(&whole_experts), 2), two, "whole experts");
}

/// What happens to a rank in the middle of a stream: the stream ends with an error, /health names the rank, and the rank
/// is started again.
fn a_rank_that(signal: Signal) {
    let nodes = Nodes::new(2);
    let server = &nodes.serve(MODEL);
    check_canaries(server);
    let rank = other_rank(server);
    let mut events = server.stream(COMPLETIONS, &endless(4000));
    assert!(events.next().is_some(), "the stream has begun");
    kill_process(rank, signal).unwrap();
    wait_for_failure(server, "rank 1");
    let events: Vec<String> = events.collect();
    let error =
        events.iter().find(|event| event.contains("\"error\"")).expect("an event says what went wrong");
    assert!(error.contains("rank 1"), "{error}");
    wait_for_health(server);
    assert!(is_gone(rank), "the lost rank holds nothing any more");
    check_canaries(server);
    assert_ne!(other_rank(server), rank);
}

#[test]
fn a_killed_rank_comes_back() {
    a_rank_that(Signal::KILL);
}

#[test]
fn a_stopped_rank_is_replaced() {
    a_rank_that(Signal::STOP);
}

#[test]
fn a_cut_link_is_noticed_and_ranks_come_back_with_it() {
    let nodes = Nodes::new(2);
    let server = nodes.serve(MODEL);
    check_canaries(&server);
    let rank = other_rank(&server);
    let mut events = server.stream(COMPLETIONS, &endless(4000));
    assert!(events.next().is_some(), "the stream has begun");
    nodes.network.plug(1, 0, false).unwrap();
    wait_for_failure(&server, "rank 1");
    assert!(events.any(|event| event.contains("\"error\"")), "the stream ends with an error");
    nodes.network.plug(1, 0, true).unwrap();
    wait_for_health(&server);
    check_canaries(&server);
    assert!(is_gone(rank), "a rank without its group ends");
}

#[test]
fn ctrl_c_ends_the_ranks_of_all_nodes() {
    let nodes = Nodes::new(4);
    let mut server = nodes.serve(MODEL);
    // It says where it listens before it listens to signals.
    check_canaries(&server);
    let ranks = children(server.pid());
    assert_eq!(ranks.len(), 3);
    kill_process(server.pid(), Signal::INT).unwrap();
    assert_eq!(server.wait_for_exit(DEADLINE).code(), Some(0));
    assert!(ranks.into_iter().all(is_gone));
}

#[test]
fn a_pulled_cable_at_the_head_is_noticed_too() {
    let nodes = Nodes::new(2);
    let server = nodes.serve(MODEL);
    let rank = other_rank(&server);
    nodes.network.ip(0, "link set rail0 down").unwrap();
    super::wait_until("a rank that is cut off ends", super::NOTICED, || is_gone(rank));
}
