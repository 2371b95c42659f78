//! `spark-engine doctor` as a program: on this machine, on "nodes" that a stand-in for ssh reaches, and on machines with networks of
//! their own. What each check says of a
//! good or a broken machine is tested beside the checks.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use serde_json::Value;
use spark_testing::Network;

const PROGRAM: &str = env!("CARGO_BIN_EXE_spark-engine");

/// A stand-in for ssh: `other` answers as a machine with another build and a clock of its own, `gone` not at all.
const SSH: &str = r#"#!/bin/sh
case "$1" in
    gone) echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255 ;;
    bare) echo "sh: 1: spark-engine: not found" >&2; exit 127 ;;
    other) sh -c "$2" | sed 's/"program": "..../"program": "0000/' ;;
    *) sh -c "$2" ;;
esac
"#;

fn doctor(folder: &Path, args: &[&str]) -> (Value, Option<i32>) {
    let ssh = folder.join("ssh");
    if !ssh.exists() {
        fs::write(&ssh, SSH).unwrap();
        fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new(PROGRAM);
    command.args(["doctor", "--json"]).args(args).env("SPARK_SSH", ssh);
    let output = command.output().unwrap();
    let report = serde_json::from_slice(&output.stdout);
    (report.unwrap_or_else(|error| panic!("{error}: {output:?}")), output.status.code())
}

/// The status and the text of check `id`.
fn check<'a>(report: &'a Value, id: &str) -> (&'a str, &'a str) {
    let found = report["checks"].as_array().unwrap().iter().find(|check| check["id"] == id);
    let found = found.unwrap_or_else(|| panic!("no {id} in {report:#}"));
    (found["status"].as_str().unwrap(), found["found"].as_str().unwrap())
}

#[test]
fn one_machine_gets_at_least_fifteen_checks() {
    let folder = tempfile::tempdir().unwrap();
    let recording = folder.path().join("machine.json");
    let (report, code) = doctor(folder.path(), &["--record", recording.to_str().unwrap()]);
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() >= 15, "{report:#}");
    let failed = checks.iter().any(|check| check["status"] == "FAIL");
    assert_eq!(code, Some(i32::from(failed)));
    let recorded: Value = serde_json::from_str(&fs::read_to_string(recording).unwrap()).unwrap();
    assert!(recorded["files"]["/proc/meminfo"].as_str().unwrap().contains("MemTotal"));
}

#[test]
fn two_nodes_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    let (report, _) = doctor(folder.path(), &["--nodes", "one,two", "--model", model.to_str().unwrap()]);
    assert_eq!(check(&report, "SSH.REACHABLE"), ("PASS", "one, two"));
    for id in ["BIN.SAME", "MODEL.SAME", "NCCL.SAME", "TIME.SKEW"] {
        assert_eq!(check(&report, id).0, "PASS", "{report:#}");
    }
    assert_eq!(report["nodes"][1]["node"], "two");
    assert!(report["nodes"][1]["checks"].as_array().unwrap().len() >= 15);
}

#[test]
fn another_build_on_one_node_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (report, code) = doctor(folder.path(), &["--nodes", "one,other"]);
    let (status, found) = check(&report, "BIN.SAME");
    assert!(status == "FAIL" && found.contains("other: 0000"), "{found}");
    assert_eq!(code, Some(1));
}

#[test]
fn nodes_that_do_not_answer_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (report, code) = doctor(folder.path(), &["--nodes", "one,gone"]);
    let (status, found) = check(&report, "SSH.REACHABLE");
    assert!(status == "FAIL" && found.contains("gone") && found.contains("No route"), "{found}");
    assert_eq!(code, Some(1));
    let (report, _) = doctor(folder.path(), &["--nodes", "one,bare"]);
    let (status, found) = check(&report, "BIN.SAME");
    assert!(status == "FAIL" && found.contains("bare") && found.contains("not found"), "{found}");
}

/// Two machines on two cables, and what `doctor` says of them.
struct Pair {
    network: Network,
    folder: tempfile::TempDir,
    before: BTreeMap<String, String>,
}

impl Pair {
    /// In order, so that what is wrong with the machine itself is known.
    fn new() -> Self {
        let network = Network::new(2, 2).unwrap();
        let folder = tempfile::tempdir().unwrap();
        network.ssh(folder.path(), "").unwrap();
        let mut pair = Self { network, folder, before: BTreeMap::new() };
        pair.before = troubles(&pair.look(&[]));
        pair
    }

    fn look(&self, args: &[&str]) -> Value {
        let names = self.network.addresses();
        doctor(self.folder.path(), &[&["--nodes", &names], args].concat()).0
    }

    /// What was not there before, between the machines or on one of them.
    fn new_troubles(&self) -> BTreeMap<String, String> {
        let mut now = troubles(&self.look(&[]));
        now.retain(|id, _| !self.before.contains_key(id));
        now
    }
}

/// What did not pass, between the machines and on them, but for what other tests on this machine do to its memory and processes.
fn troubles(report: &Value) -> BTreeMap<String, String> {
    let nodes = report["nodes"].as_array().into_iter().flatten().flat_map(|node| node["checks"].as_array());
    let all = nodes.chain(report["checks"].as_array()).flatten();
    let is_of_others = |check: &Value| {
        let id = check["id"].as_str().unwrap();
        ["PROC.", "MEM.", "DISK.", "TIME."].iter().any(|kind| id.starts_with(kind))
    };
    let bad = all.filter(|check| check["status"] != "PASS" && !is_of_others(check));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    bad.map(|check| (text(&check["id"]), text(&check["found"]))).collect()
}

#[test]
fn faults_between_two_machines_are_named_and_nothing_else() {
    let pair = Pair::new();
    let report = pair.look(&[]);
    for cable in 0..2 {
        let subnet = pair.network.address(0, cable).octets();
        let subnet = format!("{}.{}.{}.0/24", subnet[0], subnet[1], subnet[2]);
        for id in ["LINK.REACH", "LINK.JUMBO"] {
            let is_it = |check: &&Value| {
                check["id"] == id && check["found"].as_str().is_some_and(|found| found.contains(&subnet))
            };
            let check = report["checks"].as_array().unwrap().iter().find(is_it);
            assert_eq!(
                check.map(|check| &check["status"]),
                Some(&"PASS".into()),
                "{id} of {subnet}: {report:#}"
            );
        }
    }
    let mut steps = 0;
    let mut expect = |wrong: &str, id: &str, named: &[&str], right: &[&str]| {
        pair.network.ip(1, wrong).unwrap();
        let found = pair.new_troubles();
        let ids: Vec<&str> = found.keys().map(String::as_str).collect();
        assert_eq!(ids, [id], "{wrong}: {found:?}");
        assert!(named.iter().all(|word| found[id].contains(word)), "{wrong}: {found:?}");
        right.iter().for_each(|words| pair.network.ip(1, words).unwrap());
        steps += 1;
    };
    let second = pair.network.address(1, 1).to_string();
    let subnet = format!("{}.0/24", second.rsplit_once('.').unwrap().0);
    expect(
        "link set rail1 mtu 1500",
        "LINK.JUMBO",
        &[&subnet, "rail1 has 1500"],
        &["link set rail1 mtu 9000"],
    );
    expect(
        &format!("route del {subnet} dev rail1"),
        "LINK.REACH",
        &[&subnet, "unreachable"],
        &[&format!("route add {subnet} dev rail1 src {second}")],
    );
    expect("link set rail1 down", "LINK.REACH", &[&subnet], &["link set rail1 up"]);
    assert_eq!(steps, 3);
    assert_eq!(pair.new_troubles(), BTreeMap::new(), "all is mended");
}

#[test]
fn sums_between_two_machines_are_measured_on_each_cable() {
    let pair = Pair::new();
    let report = pair.look(&["--probe"]);
    let measured = report["probe"].as_array().unwrap();
    assert_eq!(measured.len(), 2, "{report:#}");
    for (cable, probe) in measured.iter().enumerate() {
        let network = pair.network.address(0, cable).to_string();
        let subnet = network.rsplit_once('.').unwrap().0;
        assert!(probe["network"].as_str().unwrap().starts_with(subnet), "{probe}");
        let number = |pointer: &str| probe.pointer(pointer).and_then(Value::as_f64).unwrap();
        assert!(number("/all_reduce_8k_us/p50") > 0.0, "{probe}");
        assert!(number("/all_reduce_8k_us/p99") >= number("/all_reduce_8k_us/p50"), "{probe}");
        assert!(number("/bandwidth_gb_s/measured") > 0.0, "{probe}");
        assert_eq!(number("/bandwidth_gb_s/expected"), 22.0);
    }
    for id in ["PROBE.LATENCY", "PROBE.BANDWIDTH"] {
        let (status, found) = check(&report, id);
        assert!(status != "FAIL" && found.contains("two Sparks"), "{id}: {status} {found}");
    }
}
