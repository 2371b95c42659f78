//! `spark-engine doctor`: looks at one machine, or at several and what lies between them, and says what would go wrong. Changes
//! nothing.

mod gpu;
mod host;
mod links;
mod nccl;
mod nodes;
mod rails;
mod report;
mod system;
#[cfg(test)]
mod tests;

use std::{fs, io::Write, path::PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use spark_engine::fingerprint;

use self::{
    host::{Host, Recording, ThisHost},
    report::{Check, Status, summary, table},
};

/// Version of the JSON output: changes when a field changes its meaning or goes.
const SCHEMA_VERSION: u32 = 1;

/// Look for what would slow the engine down or stop it: links, RDMA, NCCL, memory, GPU. Changes nothing.
#[derive(Args)]
#[command(
    after_help = "Exit code 0: nothing failed (there may be warnings); 1: something did.\n\nExamples:\n  \
    spark-engine doctor\n  \
    spark-engine doctor --nodes spark-1,spark-2 --model ./Qwen3-VL-235B --fix-hints\n  \
    spark-engine doctor --json"
)]
pub(crate) struct DoctorArgs {
    /// Machines to look at over ssh, the first one the head; without it, this one.
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    nodes: Vec<String>,
    /// Also measure what sums between the machines take, over NCCL where all have a GPU, else over TCP: on each rail by itself and,
    /// over NCCL, on all of them. Ten seconds; nothing else should run.
    #[arg(long, requires = "nodes")]
    probe: bool,
    /// A folder with a checkpoint that has to be the same on all machines.
    #[arg(long, value_name = "FOLDER")]
    model: Option<PathBuf>,
    /// Print {"checks": [...]} instead of a table.
    #[arg(long)]
    json: bool,
    /// Print the command that mends it below every warning and failure. None is run.
    #[arg(long)]
    fix_hints: bool,
    /// Also write everything that was looked at to FILE, to be sent to who can read it. It names interfaces, addresses and
    /// processes.
    #[arg(long, value_name = "FILE", conflicts_with = "nodes")]
    record: Option<PathBuf>,
}

pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let failed = match args.nodes.is_empty() {
        true => one_machine(args)?,
        false => several(args)?,
    };
    // The answer is on stdout; an error message would say it twice.
    if failed {
        std::process::exit(1);
    }
    Ok(())
}

/// Whether anything failed.
fn one_machine(args: &DoctorArgs) -> anyhow::Result<bool> {
    // In JSON it is a fact, with which the machine that asks compares its own.
    if let (Some(folder), false) = (&args.model, args.json) {
        fingerprint::model(folder)
            .with_context(|| format!("--model {}: not a checkpoint", folder.display()))?;
    }
    let host = Recording::new(ThisHost);
    let (checks, facts) = examine(&host);
    if let Some(path) = &args.record {
        fs::write(path, format!("{:#}\n", host.into_json())).with_context(|| path.display().to_string())?;
    }
    let text = match args.json {
        true => format!("{:#}\n", to_json(&checks, with_identity(facts, args)?)),
        false => format!("{}\n{}\n", table(&checks, args.fix_hints), summary(&checks)),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(has_failed(&checks))
}

fn several(args: &DoctorArgs) -> anyhow::Result<bool> {
    let model = args.model.as_ref().map(|folder| folder.to_string_lossy().into_owned());
    let extra: Vec<&str> = model.as_deref().map(|folder| ["--model", folder]).into_iter().flatten().collect();
    // Each takes a second or two of ssh and programs: all at once.
    let answers = std::thread::scope(|scope| {
        let asked: Vec<_> = args.nodes.iter().map(|name| scope.spawn(|| nodes::ask(name, &extra))).collect();
        asked
            .into_iter()
            .map(|thread| thread.join().expect("asking a node does not panic"))
            .collect::<Vec<_>>()
    });
    let (mut reached, mut between, mut probed) = (Vec::new(), Vec::new(), Vec::new());
    for answer in answers {
        match answer {
            Ok(node) => reached.push(node),
            Err(check) => between.push(check),
        }
    }
    if between.is_empty() {
        between.push(Check::pass("SSH.REACHABLE", args.nodes.join(", ")));
        between.extend(nodes::between(&reached));
        let cables = links::cables(&reached);
        between.extend(links::check(&reached, &cables));
        if args.probe {
            let (checks, measured) = links::probe(&reached, &cables);
            between.extend(checks);
            probed = measured;
        }
    }
    let all: Vec<Check> =
        reached.iter().flat_map(|node| node.checks.iter().cloned()).chain(between.iter().cloned()).collect();
    let mut stdout = std::io::stdout().lock();
    if args.json {
        let nodes: Vec<Value> = reached.iter().map(nodes::Node::to_json).collect();
        let mut whole = to_json(&between, Value::Null);
        whole["nodes"] = nodes.into();
        if args.probe {
            whole["probe"] = probed.into();
        }
        writeln!(stdout, "{whole:#}")?;
    } else {
        for node in &reached {
            writeln!(stdout, "{}\n{}", node.name, table(&node.checks, args.fix_hints))?;
        }
        writeln!(stdout, "between them\n{}\n{}", table(&between, args.fix_hints), summary(&all))?;
    }
    Ok(has_failed(&all))
}

fn has_failed(checks: &[Check]) -> bool {
    checks.iter().any(|check| check.status == Status::Fail)
}

/// All checks of one machine, and what of it has to be compared with others.
fn examine(host: &dyn Host) -> (Vec<Check>, Value) {
    let (gpu, rails, nccl) = (gpu::find(host), rails::find(host), host.nccl_version());
    let has_rails = !rails.is_empty();
    let mut checks = system::check(host, has_rails);
    checks.extend(gpu::check(host, gpu.as_ref()));
    let is_gb10 = gpu.as_ref().is_some_and(gpu::Gpu::is_gb10);
    checks.extend(nccl::check(host, &nccl, has_rails || gpu.is_some(), is_gb10));
    checks.extend(rails::check(host, &rails));
    let interfaces = rails::interfaces(host, &rails);
    let rails: Vec<Value> = rails
        .iter()
        .map(|rail| {
            let address = rail.addresses.first().map(|(address, _)| address);
            json!({ "interface": rail.interface, "address": address, "subnet": rail.subnet() })
        })
        .collect();
    let facts = json!({
        "kernel": host.value("/proc/sys/kernel/osrelease"),
        "driver": gpu.map(|gpu| gpu.driver),
        "nccl": nccl.ok(),
        "rails": rails,
        "interfaces": interfaces,
        "boot": host.value("/proc/sys/kernel/random/boot_id"),
    });
    (checks, facts)
}

/// `facts` with what tells this program and the model from others.
fn with_identity(mut facts: Value, args: &DoctorArgs) -> anyhow::Result<Value> {
    let hex = |hash: [u8; 32]| hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    facts["version"] = env!("CARGO_PKG_VERSION").into();
    facts["program"] = hex(fingerprint::program().context("reading this program")?).into();
    facts["time"] = nodes::seconds().into();
    if let Some(folder) = &args.model {
        // A machine without the model says so by having no hash.
        facts["model"] = fingerprint::model(folder).map(hex).unwrap_or_else(|_| "missing".to_owned()).into();
    }
    Ok(facts)
}

fn to_json(checks: &[Check], facts: Value) -> Value {
    let checks: Vec<_> = checks.iter().map(Check::to_json).collect();
    let mut whole = json!({"schema_version": SCHEMA_VERSION, "checks": checks});
    whole["facts"] = facts;
    whole
}
