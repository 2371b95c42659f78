//! Several machines: each is asked over ssh for its own checks, then what has to be equal is compared. What lies between them is
//! in `links`.

use std::{collections::BTreeSet, process::Stdio};

use serde_json::{Value, json};

use super::report::Check;
use crate::cli::ssh;

/// Clocks that differ by more make logs of two machines hard to read together.
const MAX_SKEW_SECONDS: f64 = 2.0;

/// What one machine has said of itself.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) checks: Vec<Check>,
    pub(super) facts: Value,
    /// Seconds by which its clock is ahead.
    skew: f64,
}

/// Asks `name` for `spark-engine doctor --json` with `args` behind.
///
/// # Errors
/// The check that says why there is no answer.
pub(super) fn ask(name: &str, args: &[&str]) -> Result<Node, Check> {
    let program = program();
    let remote: Vec<&str> = [&program, "doctor", "--json"].into_iter().chain(args.iter().copied()).collect();
    let before = seconds();
    let output = ssh::command(name, &remote).stdin(Stdio::null()).output();
    let after = seconds();
    let unreachable =
        |found: String, advice: &str| Check::fail("SSH.REACHABLE", format!("{name}: {found}"), advice);
    let keys = "a login without a password is needed: ssh-copy-id to this machine, same user on both";
    let output = output.map_err(|error| unreachable(format!("ssh cannot be started: {error}"), keys))?;
    let report: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    let Some(report) = report.filter(|report| report["checks"].is_array()) else {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().last().unwrap_or("it said nothing").to_owned();
        if output.status.code() == Some(255) {
            return Err(unreachable(said, keys));
        }
        let advice =
            format!("the program has to be there under the same path ({program}), in the same version");
        return Err(Check::fail("BIN.SAME", format!("{name}: {said}"), advice)
            .with_fix(format!("scp {program} {name}:{program}")));
    };
    let time = report["facts"]["time"].as_f64();
    let checks = report["checks"].as_array().into_iter().flatten().filter_map(Check::from_json).collect();
    Ok(Node {
        name: name.to_owned(),
        checks,
        facts: report["facts"].clone(),
        skew: time.map_or(0.0, |time| (time - before).min(0.0) + (time - after).max(0.0)),
    })
}

/// Where this program is: here, and so on the other machines.
pub(super) fn program() -> String {
    let path = std::env::current_exe().ok().map(|path| path.to_string_lossy().into_owned());
    path.unwrap_or_else(|| "spark-engine".to_owned())
}

/// Seconds since 1970.
pub(super) fn seconds() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0.0, |since| since.as_secs_f64())
}

/// The checks between machines that answered.
pub(super) fn between(nodes: &[Node]) -> Vec<Check> {
    let mut checks = vec![
        same(nodes, "BIN.SAME", "program", "all machines need the same build: copy the program"),
        same(nodes, "OS.SAME", "kernel", "different kernels are a frequent cause of faults on one side only"),
        same(nodes, "GPU.SAME", "driver", "install the same driver on all machines"),
        same(nodes, "NCCL.SAME", "nccl", "all ranks have to use the same NCCL"),
        skew(nodes),
        subnets(nodes),
    ];
    if nodes.iter().any(|node| !node.facts["model"].is_null()) {
        checks.push(same(
            nodes,
            "MODEL.SAME",
            "model",
            "the checkpoints differ: copy one over, or start with --copy-model",
        ));
    }
    checks
}

fn same(nodes: &[Node], id: &str, fact: &str, advice: &str) -> Check {
    let short = |value: &Value| match value.as_str() {
        None => "none".to_owned(),
        Some(hash) if hash.len() == 64 => hash[..12].to_owned(),
        Some(text) => text.to_owned(),
    };
    let values: BTreeSet<String> = nodes.iter().map(|node| node.facts[fact].to_string()).collect();
    if let ([first, ..], 1) = (nodes, values.len()) {
        return Check::pass(id, short(&first.facts[fact]));
    }
    let each: Vec<String> =
        nodes.iter().map(|node| format!("{}: {}", node.name, short(&node.facts[fact]))).collect();
    // A kernel may differ; what computes may not.
    match id {
        "OS.SAME" => Check::warn(id, each.join(", "), advice),
        _ => Check::fail(id, each.join(", "), advice),
    }
}

fn skew(nodes: &[Node]) -> Check {
    let id = "TIME.SKEW";
    let worst = nodes.iter().max_by(|a, b| a.skew.abs().total_cmp(&b.skew.abs()));
    match worst {
        Some(node) if node.skew.abs() > MAX_SKEW_SECONDS => Check::warn(
            id,
            format!("{} is {:.1} s off", node.name, node.skew),
            "logs of the machines do not fit together: turn NTP on",
        ),
        _ => Check::pass(id, format!("within {MAX_SKEW_SECONDS} s")),
    }
}

/// A node's rails: interface, address, subnet.
fn rails(node: &Node) -> Vec<(String, String, String)> {
    let all = node.facts["rails"].as_array();
    let text = |rail: &Value, name: &str| rail[name].as_str().map(str::to_owned);
    let rail = |rail: &Value| Some((text(rail, "interface")?, text(rail, "address")?, text(rail, "subnet")?));
    all.into_iter().flatten().filter_map(rail).collect()
}

fn subnets(nodes: &[Node]) -> Check {
    let id = "LINK.SUBNET";
    let of =
        |node: &Node| -> BTreeSet<String> { rails(node).into_iter().map(|(_, _, subnet)| subnet).collect() };
    let all: Vec<BTreeSet<String>> = nodes.iter().map(of).collect();
    let each: Vec<String> = nodes
        .iter()
        .zip(&all)
        .map(|(node, subnets)| {
            format!("{}: {}", node.name, subnets.iter().cloned().collect::<Vec<_>>().join(" "))
        })
        .collect();
    match all.windows(2).all(|pair| pair[0] == pair[1]) {
        true if all.first().is_some_and(BTreeSet::is_empty) => Check::warn(
            id,
            "no machine has a rail with an address",
            "they will talk over the ordinary network",
        ),
        true => Check::pass(id, each.join(", ")),
        false => Check::fail(
            id,
            each.join(", "),
            "the rails of all machines have to be in the same subnets, one each (deploy/netplan)",
        ),
    }
}

impl Node {
    /// A node that says this of itself, and whose checks are no matter.
    #[cfg(test)]
    pub(super) fn new(name: &str, facts: Value) -> Self {
        Self { name: name.to_owned(), checks: Vec::new(), facts, skew: 0.0 }
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "node": self.name,
            "facts": self.facts,
            "checks": self.checks.iter().map(Check::to_json).collect::<Vec<_>>(),
        })
    }
}
