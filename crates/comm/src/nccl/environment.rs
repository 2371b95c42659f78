//! NCCL's settings: which defaults suit a machine, and how they are made known. NCCL reads them from the environment of the
//! process at its first use; what the user has set there, or in NCCL's own files, stays.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::Machine;

/// The settings that `machine` needs besides NCCL's own defaults.
pub fn defaults(machine: &Machine) -> Vec<(&'static str, String)> {
    let mut all: Vec<(&'static str, String)> = Vec::new();
    let mut set = |name, value: &str| all.push((name, value.to_owned()));
    // Multicast through the switch of a board: starts have hung with it, and two ranks gain nothing.
    set("NCCL_NVLS_ENABLE", "0");
    if machine.is_gb10 {
        // The network cards cannot reach the GPU's memory: everything goes through pinned memory of the host.
        set("NCCL_NET_GDR_LEVEL", "LOC");
        set("NCCL_NET_GDR_C2C", "0");
        set("NCCL_DMABUF_ENABLE", "0");
        set("NCCL_NET_PLUGIN", "none");
        set("NCCL_CUMEM_ENABLE", "0");
        set("NCCL_CUMEM_HOST_ENABLE", "0");
        // By version and family, not by an index into the table of addresses, which changes when a link goes up or down.
        set("NCCL_IB_ROCE_VERSION_NUM", "2");
        set("NCCL_IB_ADDR_FAMILY", "AF_INET");
        // Channels take multiprocessors from the kernels, and the link is full with few.
        set("NCCL_MAX_NCHANNELS", "4");
        if !machine.rails.is_empty() {
            let rails: Vec<String> =
                machine.rails.iter().map(|rail| format!("{}:{}", rail.hca, rail.port)).collect();
            // `=`: exactly these.
            set("NCCL_IB_HCA", &format!("={}", rails.join(",")));
            // Both halves of a port as one card of twice the width.
            set("NCCL_IB_MERGE_NICS", if rails.len() > 1 { "1" } else { "0" });
        }
        if let Some(interface) = &machine.interface {
            set("NCCL_SOCKET_IFNAME", &format!("={interface}"));
        }
    }
    all
}

/// The ports of `hcas`, a list as [`defaults`] makes it for NCCL_IB_HCA, that `machine` does not have among its rails: they are down, or
/// have lost their network.
pub fn lost_rails(hcas: &str, machine: &Machine) -> Vec<String> {
    let ports = hcas.trim_start_matches('=').split(',').filter(|port| !port.is_empty());
    let is_up = |port: &str| machine.rails.iter().any(|rail| format!("{}:{}", rail.hca, rail.port) == port);
    ports.filter(|port| !is_up(port)).map(str::to_owned).collect()
}

/// What is wrong with a value that somebody set, on a [GB10](Machine::is_gb10) or another machine; `None` if nothing is known against
/// it. The only list of such settings: what is warned of at a start is what `doctor` finds.
pub fn harm(is_gb10: bool, name: &str, value: &str) -> Option<&'static str> {
    let value = value.trim();
    let is_off = ["0", "", "false"].iter().any(|off| off.eq_ignore_ascii_case(value));
    match name {
        "NCCL_IB_DISABLE" if !is_off => {
            Some("turns RDMA off: ranks on two machines use TCP, which is many times slower")
        }
        "NCCL_IB_GID_INDEX" if !value.starts_with('-') => Some(
            "pins an index into a table that changes when a link goes up or down: NCCL then hangs; leave it to NCCL_IB_ROCE_VERSION_NUM=2",
        ),
        "NCCL_IB_USE_INLINE" | "NCCL_IB_PREPOST_RECEIVE_WORK_REQUESTS" if !is_off => {
            Some("has stopped starts for ever on GB10 machines")
        }
        "NCCL_NET" if value.eq_ignore_ascii_case("socket") => {
            Some("turns RDMA off: ranks on two machines use TCP, which is many times slower")
        }
        "NCCL_P2P_DISABLE" if !is_off => Some("keeps GPUs of one machine from talking directly"),
        "NCCL_SHM_DISABLE" if !is_off => Some("keeps ranks of one machine from talking through memory"),
        "NCCL_NVLS_ENABLE" if !is_off => Some("starts have hung with it"),
        "NCCL_NET_GDR_LEVEL" if is_gb10 && value != "LOC" => {
            Some("a GB10's memory cannot be reached by its network cards")
        }
        "NCCL_NET_GDR_C2C" | "NCCL_DMABUF_ENABLE" if is_gb10 && !is_off => {
            Some("a GB10's memory cannot be reached by its network cards")
        }
        _ => None,
    }
}

/// What is set for NCCL: to be shown at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Defaults of this program.
    pub set: Vec<(&'static str, String)>,
    /// What the user set in their place or besides, and where.
    pub kept: Vec<(String, String, String)>,
    /// What is doubtful.
    pub warnings: Vec<String>,
}

impl Settings {
    /// The defaults for `machine` where neither `environment` nor NCCL's files say anything.
    pub fn new(machine: &Machine, environment: &[(String, String)]) -> Self {
        let of_files =
            machine.conf.iter().map(|line| (&line.name, &line.value, line.file.display().to_string()));
        let mut kept: Vec<(String, String, String)> = Vec::new();
        // The environment before files, the user's file before the system's, as NCCL takes them.
        for (name, value, place) in environment
            .iter()
            .filter(|(name, _)| name.starts_with("NCCL_"))
            .map(|(name, value)| (name, value, "the environment".to_owned()))
            .chain(of_files)
        {
            if !kept.iter().any(|(other, ..)| other == name) {
                kept.push((name.clone(), value.clone(), place));
            }
        }
        let warning = |(name, value, place): &(String, String, String)| {
            let problem = harm(machine.is_gb10, name, value)?;
            Some(format!("{name}={value} in {place}: {problem}; remove it unless it was measured to help"))
        };
        let warnings = kept.iter().filter_map(warning).collect();
        let set =
            defaults(machine).into_iter().filter(|(name, _)| !kept.iter().any(|(kept, ..)| kept == name));
        Self { set: set.collect(), kept, warnings }
    }
}

/// One line.
impl std::fmt::Display for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let set = self.set.iter().map(|(name, value)| format!("{name}={value}"));
        let kept = self.kept.iter().map(|(name, value, place)| format!("{name}={value} (from {place})"));
        f.write_str(&set.chain(kept).collect::<Vec<_>>().join(" "))
    }
}

/// Sets the defaults for this machine in the environment of this process; `peer` is where another rank is reached, none if all
/// are on this machine. To be called at the very start: once there is a second thread nothing is set, and a warning says so.
pub fn prepare_environment(peer: Option<IpAddr>) -> Settings {
    let user = std::env::var_os("NCCL_CONF_FILE").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".nccl.conf"));
    let machine = Machine::read(Path::new("/"), user.or_else(home).as_deref(), peer);
    let mut settings = Settings::new(&machine, &variables());
    if num_threads() != Some(1) {
        let wanted: Vec<String> =
            settings.set.drain(..).map(|(name, value)| format!("{name}={value}")).collect();
        let warning = format!("NCCL's settings come too late; set them yourself: {}", wanted.join(" "));
        settings.warnings.push(warning);
        return settings;
    }
    for (name, value) in &settings.set {
        // SAFETY: this is the only thread of the process, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
    settings
}

/// Threads of this process; `None` where the system does not say.
fn num_threads() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

/// NCCL's variables in the environment, by name.
fn variables() -> Vec<(String, String)> {
    let all = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let mut variables: Vec<_> = all.filter(|(name, _)| name.starts_with("NCCL_")).collect();
    variables.sort();
    variables
}

/// The variables that NCCL will see, in one line.
pub(super) fn in_force() -> String {
    let variables: Vec<String> = variables().iter().map(|(name, value)| format!("{name}={value}")).collect();
    if variables.is_empty() { "no NCCL_ variable is set".to_owned() } else { variables.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::super::ConfLine;
    use super::super::machine::tests::{ROUTES, read_spark};
    use super::*;

    fn value<'a>(settings: &'a [(&'static str, String)], name: &str) -> Option<&'a str> {
        settings.iter().find(|(other, _)| *other == name).map(|(_, value)| value.as_str())
    }

    #[test]
    fn a_spark_with_two_rails_uses_both_and_the_interface_to_its_peer() {
        let machine = read_spark(ROUTES, [192, 168, 100, 11]);
        let all = defaults(&machine);
        assert_eq!(value(&all, "NCCL_IB_HCA"), Some("=roceP2p1s0f0:1,rocep1s0f0:1"));
        assert_eq!(value(&all, "NCCL_IB_MERGE_NICS"), Some("1"));
        assert_eq!(value(&all, "NCCL_SOCKET_IFNAME"), Some("=enp1s0f0np0"));
        for (name, expected) in [
            ("NCCL_NET_GDR_LEVEL", "LOC"),
            ("NCCL_NET_GDR_C2C", "0"),
            ("NCCL_DMABUF_ENABLE", "0"),
            ("NCCL_NET_PLUGIN", "none"),
            ("NCCL_CUMEM_ENABLE", "0"),
            ("NCCL_NVLS_ENABLE", "0"),
            ("NCCL_IB_ROCE_VERSION_NUM", "2"),
            ("NCCL_IB_ADDR_FAMILY", "AF_INET"),
        ] {
            assert_eq!(value(&all, name), Some(expected), "{name}");
        }
        let mut names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
    }

    #[test]
    fn one_rail_is_not_merged_and_none_is_not_named() {
        let mut machine = read_spark(ROUTES, [192, 168, 100, 11]);
        let both = value(&defaults(&machine), "NCCL_IB_HCA").unwrap().to_owned();
        assert_eq!(lost_rails(&both, &machine), [""; 0]);
        machine.rails.remove(0);
        assert_eq!(lost_rails(&both, &machine), ["roceP2p1s0f0:1"]);
        assert_eq!(lost_rails(&both, &Machine::default()).len(), 2);
        assert_eq!(lost_rails("", &machine), [""; 0]);
        let all = defaults(&machine);
        assert_eq!(value(&all, "NCCL_IB_HCA"), Some("=rocep1s0f0:1"));
        assert_eq!(value(&all, "NCCL_IB_MERGE_NICS"), Some("0"));
        machine.rails.clear();
        machine.interface = None;
        let all = defaults(&machine);
        assert!(value(&all, "NCCL_IB_HCA").is_none() && value(&all, "NCCL_SOCKET_IFNAME").is_none());
    }

    #[test]
    fn other_machines_get_what_does_no_harm() {
        let mut machine = read_spark(ROUTES, [192, 168, 100, 11]);
        machine.is_gb10 = false;
        assert_eq!(defaults(&machine), [("NCCL_NVLS_ENABLE", "0".to_owned())]);
    }

    #[test]
    fn what_the_user_set_stays_and_bad_values_are_named_with_their_place() {
        let mut machine = read_spark(ROUTES, [192, 168, 100, 11]);
        let line = |name: &str, value: &str| ConfLine {
            file: "/etc/nccl.conf".into(),
            name: name.to_owned(),
            value: value.to_owned(),
        };
        machine.conf =
            vec![line("NCCL_IB_DISABLE", "1"), line("NCCL_IB_HCA", "mlx5"), line("NCCL_NET_PLUGIN", "x")];
        let environment = [("NCCL_NET_PLUGIN", "y"), ("NCCL_DEBUG", "INFO"), ("PATH", "z")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let settings = Settings::new(&machine, &environment);
        for name in ["NCCL_IB_HCA", "NCCL_NET_PLUGIN"] {
            assert_eq!(value(&settings.set, name), None, "{name}");
        }
        assert_eq!(value(&settings.set, "NCCL_DMABUF_ENABLE"), Some("0"));
        let shown = settings.to_string();
        assert!(shown.contains("NCCL_NET_PLUGIN=y (from the environment)"), "{shown}");
        assert!(shown.contains("NCCL_IB_HCA=mlx5 (from /etc/nccl.conf)") && !shown.contains('\n'), "{shown}");
        assert_eq!(settings.warnings.len(), 1);
        let warning = &settings.warnings[0];
        assert!(warning.starts_with("NCCL_IB_DISABLE=1 in /etc/nccl.conf: turns RDMA off"), "{warning}");
        machine.conf = vec![
            line("NCCL_IB_GID_INDEX", "3"),
            line("NCCL_NET_GDR_LEVEL", "SYS"),
            line("NCCL_IB_DISABLE", "0"),
        ];
        assert_eq!(Settings::new(&machine, &[]).warnings.len(), 2);
        machine.is_gb10 = false;
        assert_eq!(Settings::new(&machine, &[]).warnings.len(), 1);
    }

    /// Tests run in threads: nothing may be set here, and that is said.
    #[test]
    fn with_other_threads_nothing_is_set() {
        let settings = std::thread::spawn(|| prepare_environment(None)).join().unwrap();
        assert!(settings.set.is_empty());
        let warning = settings.warnings.last().unwrap();
        assert!(warning.contains("come too late"), "{warning}");
    }
}
