//! What a machine says about its network, as far as NCCL's settings depend on it: the RDMA devices with their interfaces, the
//! routes, and the files from which NCCL reads settings by itself. Only reads; below a root, so that tests bring their own.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// A GPU that shares the machine's memory and whose network cards cannot reach it: NVIDIA GB10.
    pub is_gb10: bool,
    /// RDMA ports that are up and whose interfaces have an IPv4 network, by name.
    pub rails: Vec<Rail>,
    /// The interface that leads to the other ranks.
    pub interface: Option<String>,
    /// Settings in NCCL's own files.
    pub conf: Vec<ConfLine>,
}

/// An RDMA port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rail {
    /// Its device, such as `rocep1s0f0`.
    pub hca: String,
    /// From 1.
    pub port: u32,
    /// Its network interface, such as `enp1s0f0np0`.
    pub interface: String,
}

/// `name=value` in a file that NCCL reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfLine {
    /// The file.
    pub file: PathBuf,
    /// Name of a variable.
    pub name: String,
    /// Its value.
    pub value: String,
}

impl Machine {
    /// Reads the machine whose files lie below `root` (`/`); `user_conf` is the user's file of settings for NCCL, `peer` where another
    /// rank is reached. What cannot be read is not there.
    pub fn read(root: &Path, user_conf: Option<&Path>, peer: Option<IpAddr>) -> Self {
        let routes = routes(&text(&root.join("proc/net/route")));
        let etc = root.join("etc/nccl.conf");
        let files = user_conf.into_iter().chain([etc.as_path()]);
        Self {
            is_gb10: is_gb10(root),
            rails: rails(root, &routes),
            interface: peer.and_then(|peer| interface_to(&routes, peer)),
            conf: files.flat_map(|file| conf_lines(file, &text(file))).collect(),
        }
    }
}

/// The file's text; nothing if it cannot be read.
fn text(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_default()
}

/// Names in a folder, ascending; none if there is no such folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn is_gb10(root: &Path) -> bool {
    let folder = root.join("proc/driver/nvidia/gpus");
    names(&folder).iter().any(|gpu| {
        let information = text(&folder.join(gpu).join("information"));
        information.lines().any(|line| line.starts_with("Model:") && line.contains("GB10"))
    })
}

fn rails(root: &Path, routes: &[Route]) -> Vec<Rail> {
    let folder = root.join("sys/class/infiniband");
    let mut rails = Vec::new();
    for hca in names(&folder) {
        let Some(interface) = names(&folder.join(&hca).join("device/net")).into_iter().next() else {
            continue;
        };
        let has_ipv4 = routes.iter().any(|route| route.interface == interface && route.mask != 0);
        let ports = folder.join(&hca).join("ports");
        for port in names(&ports).iter().filter(|_| has_ipv4) {
            let is_active = text(&ports.join(port).join("state")).contains("ACTIVE");
            if let (true, Ok(port)) = (is_active, port.parse()) {
                rails.push(Rail { hca: hca.clone(), port, interface: interface.clone() });
            }
        }
    }
    rails
}

/// A line of `/proc/net/route`.
#[derive(Debug, PartialEq, Eq)]
struct Route {
    interface: String,
    destination: u32,
    mask: u32,
}

/// Routes that are up. Addresses are written there as the number that their bytes are on a little-endian processor.
fn routes(table: &str) -> Vec<Route> {
    const UP: u32 = 1;
    let route = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let number = |column: usize| u32::from_str_radix(columns.get(column)?, 16).ok();
        let is_up = number(3)? & UP != 0;
        let (destination, mask) = (number(1)?.swap_bytes(), number(7)?.swap_bytes());
        is_up.then(|| Route { interface: columns[0].to_owned(), destination, mask })
    };
    table.lines().filter_map(route).collect()
}

/// The interface of the longest prefix that holds `peer`; none for this machine itself.
fn interface_to(routes: &[Route], peer: IpAddr) -> Option<String> {
    let IpAddr::V4(peer) = peer.to_canonical() else { return None };
    if peer.is_loopback() || peer == Ipv4Addr::UNSPECIFIED {
        return None;
    }
    let peer = u32::from(peer);
    let fits = routes.iter().filter(|route| peer & route.mask == route.destination);
    fits.max_by_key(|route| route.mask).map(|route| route.interface.clone())
}

fn conf_lines(file: &Path, text: &str) -> Vec<ConfLine> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let lines = lines.filter_map(|line| line.split_once('='));
    let line = |(name, value): (&str, &str)| ConfLine {
        file: file.to_owned(),
        name: name.trim().to_owned(),
        value: value.trim().to_owned(),
    };
    lines.map(line).filter(|line| line.name.starts_with("NCCL_")).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) const ROUTES: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
        wlP9s9\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
        wlP9s9\t0001A8C0\t00000000\t0001\t0\t0\t600\t00FFFFFF\t0\t0\t0\n\
        enp1s0f0np0\t0064A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        enP2p1s0f0np0\t0065A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        enp1s0f1np1\t0066A8C0\t00000000\t0000\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";

    fn write(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// A Spark with a cable in its first port: both halves of that port are up, those of the second are not.
    pub(crate) fn spark(root: &Path, routes: &str) {
        write(root, "proc/driver/nvidia/gpus/000f:01:00.0/information", "Model: \t\t NVIDIA GB10\nIRQ: 1\n");
        write(root, "proc/net/route", routes);
        for (hca, interface, state) in [
            ("rocep1s0f0", "enp1s0f0np0", "4: ACTIVE"),
            ("rocep1s0f1", "enp1s0f1np1", "1: DOWN"),
            ("roceP2p1s0f0", "enP2p1s0f0np0", "4: ACTIVE"),
            ("roceP2p1s0f1", "enP2p1s0f1np1", "1: DOWN"),
        ] {
            let folder = format!("sys/class/infiniband/{hca}");
            write(root, &format!("{folder}/ports/1/state"), state);
            write(root, &format!("{folder}/device/net/{interface}/mtu"), "9000\n");
        }
    }

    pub(crate) fn read_spark(routes: &str, peer: [u8; 4]) -> Machine {
        let folder = tempfile::tempdir().unwrap();
        spark(folder.path(), routes);
        Machine::read(folder.path(), None, Some(IpAddr::from(peer)))
    }

    #[test]
    fn both_halves_of_a_port_are_found_and_the_interface_that_leads_to_the_peer() {
        let machine = read_spark(ROUTES, [192, 168, 101, 12]);
        assert!(machine.is_gb10);
        let rails: Vec<String> = machine
            .rails
            .iter()
            .map(|rail| format!("{}:{} {}", rail.hca, rail.port, rail.interface))
            .collect();
        assert_eq!(rails, ["roceP2p1s0f0:1 enP2p1s0f0np0", "rocep1s0f0:1 enp1s0f0np0"]);
        assert_eq!(machine.interface.as_deref(), Some("enP2p1s0f0np0"));
        // Elsewhere: the default route. A route that is down does not count.
        for peer in [[10, 0, 0, 1], [192, 168, 102, 7]] {
            assert_eq!(read_spark(ROUTES, peer).interface.as_deref(), Some("wlP9s9"));
        }
        assert_eq!(read_spark(ROUTES, [127, 0, 0, 1]).interface, None);
        let mapped = "::ffff:192.168.100.3".parse().unwrap();
        assert_eq!(interface_to(&routes(ROUTES), mapped).as_deref(), Some("enp1s0f0np0"));
        assert_eq!(interface_to(&routes(ROUTES), "fe80::1".parse().unwrap()), None);
    }

    #[test]
    fn a_rail_without_an_ipv4_network_does_not_count() {
        let one: String =
            ROUTES.lines().filter(|line| !line.starts_with("enP2")).map(|line| format!("{line}\n")).collect();
        let machine = read_spark(&one, [192, 168, 100, 2]);
        assert_eq!(machine.rails.len(), 1);
        assert_eq!(machine.rails[0].hca, "rocep1s0f0");
        assert_eq!(read_spark("", [192, 168, 100, 2]).rails, []);
    }

    #[test]
    fn a_machine_that_says_nothing_has_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Machine::read(folder.path(), None, None), Machine::default());
        write(folder.path(), "proc/net/route", "Iface\nx\ty\nz 0 0 zz\n");
        write(folder.path(), "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: NVIDIA H200\n");
        assert_eq!(Machine::read(folder.path(), None, None), Machine::default());
    }

    #[test]
    fn settings_in_files_are_read_with_their_place() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "etc/nccl.conf", "# NCCL_X=1\n NCCL_IB_DISABLE = 1\nOTHER=2\nNCCL_DEBUG\n");
        write(folder.path(), "home/.nccl.conf", "NCCL_DEBUG=WARN\n");
        let user = folder.path().join("home/.nccl.conf");
        let machine = Machine::read(folder.path(), Some(&user), None);
        let lines: Vec<_> =
            machine.conf.iter().map(|line| (line.name.as_str(), line.value.as_str())).collect();
        assert_eq!(lines, [("NCCL_DEBUG", "WARN"), ("NCCL_IB_DISABLE", "1")]);
        assert!(machine.conf[1].file.ends_with("etc/nccl.conf") && machine.conf[0].file == user);
    }
}
