//! NCCL: its version, and settings of it that are known to slow two Sparks down or to hang them. Does not open a communicator.

use spark_comm::nccl::{Nccl, too_old};

use super::{host::Host, report::Check};

/// Settings that nobody wants on a Spark: name, the value that does harm (none: any value), what it does.
const HARMFUL: [(&str, Option<&str>, &str); 7] = [
    ("NCCL_IB_DISABLE", Some("1"), "turns RoCE off, so that everything goes through sockets"),
    ("NCCL_IB_GID_INDEX", None, "pins the number of an address, which moves when addresses come and go"),
    ("NCCL_IB_USE_INLINE", Some("1"), "makes small transfers fail on these cards"),
    ("NCCL_IB_PREPOST_RECEIVE_WORK_REQUESTS", Some("1"), "makes transfers hang on these cards"),
    ("NCCL_P2P_DISABLE", Some("1"), "keeps GPUs of one machine from talking directly"),
    ("NCCL_SHM_DISABLE", Some("1"), "keeps ranks of one machine from talking through memory"),
    ("NCCL_NET", Some("Socket"), "turns RoCE off, so that everything goes through sockets"),
];

/// The checks. `found`: the version that would be used, or why there is none. `is_needed`: the machine has a GPU or rails.
pub(super) fn check(host: &dyn Host, found: &Result<String, String>, is_needed: bool) -> Vec<Check> {
    vec![version(host, found, is_needed), environment(host), files(host)]
}

fn version(host: &dyn Host, found: &Result<String, String>, is_needed: bool) -> Check {
    let id = "NCCL.VERSION";
    match found.clone() {
        Ok(version) => {
            let too_old = match version.parse() {
                Ok(number) => too_old(number, &host.architecture()),
                Err(_) => return Check::warn(id, version, "a version that nobody knows"),
            };
            match too_old {
                None => Check::pass(id, version),
                Some((least, why)) => {
                    Check::fail(id, version, format!("{least} or newer is needed: {why}"))
                        .with_fix("pip install --upgrade nvidia-nccl-cu13")
                }
            }
        }
        Err(reason) if is_needed => Check::fail(
            id,
            reason,
            "two GPUs or two machines need it: install libnccl2, or the wheel nvidia-nccl-cu13 and name it with SPARK_NCCL",
        )
        .with_fix("pip install nvidia-nccl-cu13"),
        Err(_) => Check::pass(id, "not here; ranks on the CPU do not use it"),
    }
}

/// What is wrong with one setting.
fn harm(name: &str, value: &str) -> Option<&'static str> {
    let (_, _, what) = HARMFUL.iter().find(|(bad, bad_value, _)| {
        *bad == name && bad_value.is_none_or(|bad_value| bad_value.eq_ignore_ascii_case(value.trim()))
    })?;
    Some(what)
}

fn environment(host: &dyn Host) -> Check {
    let id = "NCCL.ENV";
    let all = host.vars("NCCL_");
    match all.iter().find_map(|(name, value)| Some((name, value, harm(name, value)?))) {
        Some((name, value, what)) => Check::warn(
            id,
            format!("{name}={value}: {what}"),
            "unset it; the engine finds what fits this machine",
        )
        .with_fix(format!("unset {name}")),
        None if all.is_empty() => Check::pass(id, "nothing is set"),
        None => Check::pass(
            id,
            all.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" "),
        ),
    }
}

/// NCCL reads a file of the system and one of the user, which nobody sees in the environment.
fn files(host: &dyn Host) -> Check {
    let id = "NCCL.CONF";
    let home = host.var("HOME").unwrap_or_default();
    let paths = ["/etc/nccl.conf".to_owned(), format!("{home}/.nccl.conf")];
    let present: Vec<(&String, String)> =
        paths.iter().filter_map(|path| Some((path, host.read(path)?))).collect();
    for (path, text) in &present {
        let settings = text.lines().filter_map(|line| line.split('#').next()?.split_once('='));
        for (name, value) in settings {
            let (name, value) = (name.trim(), value.trim());
            if let Some(what) = harm(name, value) {
                let advice =
                    format!("remove the line from {path}: it counts for every program on this machine");
                return Check::fail(id, format!("{path}: {name}={value}: {what}"), advice)
                    .with_fix(format!("sudo sed -i '/^ *{name}/d' {path}"));
            }
        }
    }
    match present.is_empty() {
        true => Check::pass(id, "there is none"),
        false => {
            let paths: Vec<&str> = present.iter().map(|(path, _)| path.as_str()).collect();
            Check::pass(id, format!("{} has nothing harmful", paths.join(" and ")))
        }
    }
}

/// The version of the NCCL that the engine would use on this machine.
pub(super) fn installed() -> Result<String, String> {
    // Old ones are told as well: the check judges.
    Nccl::open(true).map(|nccl| nccl.version().to_string()).map_err(|error| error.to_string())
}
