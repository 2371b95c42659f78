//! `spark-engine doctor` as a program: on this machine, and on "nodes" that a stand-in for ssh reaches. What each check says of a
//! good or a broken machine is tested beside the checks.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use serde_json::Value;

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
