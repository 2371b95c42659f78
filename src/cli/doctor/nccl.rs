//! NCCL: its version, and settings of it that are known to slow two Sparks down or to hang them. Does not open a communicator.

use spark_comm::nccl::{Nccl, harm, too_old};

use super::{host::Host, report::Check};

/// The checks. `found`: the version that would be used, or why there is none. `is_needed`: the machine has a GPU or rails. `is_gb10`: it
/// is a Spark.
pub(super) fn check(
    host: &dyn Host,
    found: &Result<String, String>,
    is_needed: bool,
    is_gb10: bool,
) -> Vec<Check> {
    vec![version(host, found, is_needed), environment(host, is_gb10), files(host, is_gb10)]
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

fn environment(host: &dyn Host, is_gb10: bool) -> Check {
    let id = "NCCL.ENV";
    let all = host.vars("NCCL_");
    match all.iter().find_map(|(name, value)| Some((name, value, harm(is_gb10, name, value)?))) {
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
fn files(host: &dyn Host, is_gb10: bool) -> Check {
    let id = "NCCL.CONF";
    let home = host.var("HOME").unwrap_or_default();
    let paths = ["/etc/nccl.conf".to_owned(), format!("{home}/.nccl.conf")];
    let present: Vec<(&String, String)> =
        paths.iter().filter_map(|path| Some((path, host.read(path)?))).collect();
    for (path, text) in &present {
        let settings = text.lines().filter_map(|line| line.split('#').next()?.split_once('='));
        for (name, value) in settings {
            let (name, value) = (name.trim(), value.trim());
            if let Some(what) = harm(is_gb10, name, value) {
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
