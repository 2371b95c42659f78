//! The two network functions of a Spark's QSFP port, each a rail of its own: link, addresses, frames, RDMA. One machine's side
//! only; what lies between two is in `nodes`.

use serde_json::{Value, json};

use super::{host::Host, report::Check};

/// Megabits a second of one rail of a Spark.
const RAIL_SPEED: u64 = 100_000;
/// Largest frame that RoCE uses whole: 4096 bytes of data and headers need a network MTU well above 4200.
pub(super) const MTU: u64 = 9000;

/// A network interface that an RDMA device stands behind.
#[derive(Debug, Clone)]
pub(super) struct Rail {
    /// Such as `enp1s0f1np1`.
    pub(super) interface: String,
    /// Such as `rocep1s0f1`.
    pub(super) device: String,
    /// IPv4 address and length of its prefix.
    pub(super) addresses: Vec<(String, u8)>,
    has_ipv6: bool,
}

impl Rail {
    /// The network part of its first address, such as `192.168.100.0/24`.
    pub(super) fn subnet(&self) -> Option<String> {
        let (address, prefix) = self.addresses.first()?;
        subnet(address, *prefix)
    }
}

fn subnet(address: &str, prefix: u8) -> Option<String> {
    let bits = u32::from(address.parse::<std::net::Ipv4Addr>().ok()?);
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix).min(32)).unwrap_or(0);
    Some(format!("{}/{prefix}", std::net::Ipv4Addr::from(bits & mask)))
}

/// All interfaces with an RDMA device and a cable; of those without, the ones that have an address. Sorted by name.
pub(super) fn find(host: &dyn Host) -> Vec<Rail> {
    let addresses = host.run(&["ip", "-j", "addr"]).and_then(|text| serde_json::from_str(&text).ok());
    let mut rails = Vec::new();
    for interface in host.list("/sys/class/net") {
        let devices = host.list(&format!("/sys/class/net/{interface}/device/infiniband"));
        let Some(device) = devices.into_iter().next() else { continue };
        let (addresses, has_ipv6) = addresses_of(addresses.as_ref(), &interface);
        rails.push(Rail { interface, device, addresses, has_ipv6 });
    }
    let in_use: Vec<Rail> =
        rails.iter().filter(|rail| has_carrier(host, rail) || !rail.addresses.is_empty()).cloned().collect();
    // Nothing is plugged in: say so of every interface.
    if in_use.is_empty() { rails } else { in_use }
}

/// Every interface with an IPv4 address, for other machines to find a common network: name, address, subnet, MTU, the RDMA device
/// behind it, and whether it is a bridge of this machine.
pub(super) fn interfaces(host: &dyn Host, rails: &[Rail]) -> Vec<Value> {
    let all = host.run(&["ip", "-j", "addr"]).and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let names = all.as_ref().and_then(Value::as_array).into_iter().flatten();
    let mut found = Vec::new();
    for interface in names.filter_map(|link| link["ifname"].as_str()) {
        let (addresses, _) = addresses_of(all.as_ref(), interface);
        let device = rails.iter().find(|rail| rail.interface == interface).map(|rail| rail.device.clone());
        let folder = format!("/sys/class/net/{interface}");
        let mtu: Option<u64> = host.value(&format!("{folder}/mtu")).and_then(|mtu| mtu.parse().ok());
        let is_bridge = !host.list(&format!("{folder}/bridge")).is_empty();
        for (address, prefix) in addresses {
            found.push(json!({
                "interface": interface, "subnet": subnet(&address, prefix), "address": address, "mtu": mtu,
                "device": device, "is_bridge": is_bridge,
            }));
        }
    }
    found
}

/// What `ip -j addr` says of `interface`: its IPv4 addresses, and whether it has an IPv6 one.
fn addresses_of(all: Option<&Value>, interface: &str) -> (Vec<(String, u8)>, bool) {
    let links = all.and_then(Value::as_array);
    let link = links.and_then(|links| links.iter().find(|link| link["ifname"] == interface));
    let entries = || link.and_then(|link| link["addr_info"].as_array()).into_iter().flatten();
    let ipv4 = entries().filter(|entry| entry["family"] == "inet").filter_map(|entry| {
        Some((entry["local"].as_str()?.to_owned(), u8::try_from(entry["prefixlen"].as_u64()?).ok()?))
    });
    (ipv4.collect(), entries().any(|entry| entry["family"] == "inet6"))
}

fn has_carrier(host: &dyn Host, rail: &Rail) -> bool {
    host.value(&format!("/sys/class/net/{}/carrier", rail.interface)).as_deref() == Some("1")
}

/// The checks of all rails.
pub(super) fn check(host: &dyn Host, rails: &[Rail]) -> Vec<Check> {
    if rails.is_empty() {
        let advice = "one machine needs none; two Sparks are joined by a cable between their QSFP ports";
        return vec![Check::warn("LINK.UP", "no network interface with RDMA was found", advice)];
    }
    vec![
        link_up(host, rails),
        link_ipv4(rails),
        link_mtu(host, rails),
        link_ipv6(rails),
        rdma_port(host, rails),
        rdma_gid(host, rails),
        rdma_device(host),
    ]
}

/// `found` of every rail, in one line.
fn each(rails: &[Rail], found: impl Fn(&Rail) -> String) -> String {
    rails.iter().map(|rail| format!("{} {}", rail.interface, found(rail))).collect::<Vec<_>>().join(", ")
}

fn link_up(host: &dyn Host, rails: &[Rail]) -> Check {
    let speed = |rail: &Rail| -> u64 {
        let speed = host.value(&format!("/sys/class/net/{}/speed", rail.interface));
        speed.and_then(|speed| speed.parse().ok()).unwrap_or(0)
    };
    let found = each(rails, |rail| match has_carrier(host, rail) {
        true => format!("{} Gb/s", speed(rail) / 1000),
        false => "no link".to_owned(),
    });
    if rails.iter().any(|rail| !has_carrier(host, rail)) {
        let advice = "plug the cable into the same QSFP port on both machines; a port shows two interfaces, both have to come up";
        return Check::fail("LINK.UP", found, advice)
            .with_fix("ip -br link; sudo ip link set dev INTERFACE up");
    }
    if rails.len() < 2 {
        let advice = "a Spark's port has two functions; with one, half of the bandwidth is used: give the other an address and bring it up";
        return Check::warn("LINK.UP", found, advice);
    }
    match rails.iter().any(|rail| speed(rail) < RAIL_SPEED) {
        true => Check::warn("LINK.UP", found, "a rail should run at 100 or 200 Gb/s: check the cable"),
        false => Check::pass("LINK.UP", found),
    }
}

fn link_ipv4(rails: &[Rail]) -> Check {
    let found = each(rails, |rail| match &rail.addresses[..] {
        [] => "has no IPv4 address".to_owned(),
        some => {
            some.iter().map(|(address, prefix)| format!("{address}/{prefix}")).collect::<Vec<_>>().join(" ")
        }
    });
    let advice = "give each rail an address in a subnet of its own, in a netplan file so that it stays after a reboot (deploy/netplan)";
    if rails.iter().any(|rail| rail.addresses.is_empty()) {
        return Check::fail("LINK.IPV4", found, advice);
    }
    let mut subnets: Vec<_> = rails.iter().filter_map(Rail::subnet).collect();
    subnets.sort();
    subnets.dedup();
    match subnets.len() == rails.len() {
        true => Check::pass("LINK.IPV4", found),
        false => Check::fail("LINK.IPV4", format!("{found}: two rails in one subnet"), advice),
    }
}

fn link_mtu(host: &dyn Host, rails: &[Rail]) -> Check {
    let mtu = |rail: &Rail| -> u64 {
        let mtu = host.value(&format!("/sys/class/net/{}/mtu", rail.interface));
        mtu.and_then(|mtu| mtu.parse().ok()).unwrap_or(0)
    };
    let found = each(rails, |rail| format!("{}", mtu(rail)));
    match rails.iter().find(|rail| mtu(rail) < MTU) {
        None => Check::pass("LINK.MTU", found),
        Some(rail) => Check::fail(
            "LINK.MTU",
            found,
            "frames of 9000 bytes are needed on both machines (a firmware update sets 1500 again): transfers fail or crawl otherwise",
        )
        .with_fix(format!("sudo ip link set dev {} mtu {MTU}", rail.interface)),
    }
}

fn link_ipv6(rails: &[Rail]) -> Check {
    match rails.iter().find(|rail| rail.has_ipv6) {
        None => Check::pass("LINK.IPV6", "no IPv6 address on the rails"),
        Some(rail) => Check::warn(
            "LINK.IPV6",
            format!("{} has an IPv6 address", rail.interface),
            "when it comes late the numbers of RoCE addresses move, which breaks programs that pin them: `link-local: []` in netplan",
        ),
    }
}

fn port(rail: &Rail, file: &str) -> String {
    format!("/sys/class/infiniband/{}/ports/1/{file}", rail.device)
}

fn rdma_port(host: &dyn Host, rails: &[Rail]) -> Check {
    let read =
        |rail: &Rail, file: &str| host.value(&port(rail, file)).unwrap_or_else(|| "unknown".to_owned());
    let is_good =
        |rail: &Rail| read(rail, "state").ends_with("ACTIVE") && read(rail, "link_layer") == "Ethernet";
    let found = each(rails, |rail| format!("{} {}", read(rail, "state"), read(rail, "link_layer")));
    match rails.iter().all(is_good) {
        true => Check::pass("RDMA.PORT", found),
        false => Check::fail(
            "RDMA.PORT",
            found,
            "an RDMA port has to be ACTIVE and in Ethernet mode: bring its interface up, or set the mode with mlxconfig",
        ),
    }
}

/// The number of the address that RoCE version 2 uses for `ipv4` on this rail, as it is now.
fn gid_index(host: &dyn Host, rail: &Rail, ipv4: &str) -> Option<String> {
    let [a, b, c, d] = ipv4.parse::<std::net::Ipv4Addr>().ok()?.octets();
    let wanted = format!("0000:0000:0000:0000:0000:ffff:{a:02x}{b:02x}:{c:02x}{d:02x}");
    host.list(&port(rail, "gids")).into_iter().find(|index| {
        host.value(&port(rail, &format!("gids/{index}"))).as_deref() == Some(&wanted)
            && host.value(&port(rail, &format!("gid_attrs/types/{index}"))).as_deref() == Some("RoCE v2")
    })
}

fn rdma_gid(host: &dyn Host, rails: &[Rail]) -> Check {
    let index = |rail: &Rail| rail.addresses.iter().find_map(|(ipv4, _)| gid_index(host, rail, ipv4));
    let with_address: Vec<Rail> = rails.iter().filter(|rail| !rail.addresses.is_empty()).cloned().collect();
    let found = each(&with_address, |rail| match index(rail) {
        Some(index) => format!("GID {index}"),
        None => "has no RoCE v2 GID for its IPv4 address".to_owned(),
    });
    match with_address.iter().all(|rail| index(rail).is_some()) {
        true if with_address.is_empty() => Check::pass("RDMA.GID", "no rail has an address yet"),
        true => Check::pass("RDMA.GID", found),
        false => Check::fail(
            "RDMA.GID",
            found,
            "NCCL needs it to send over RoCE between subnets: set the address again, then look at /sys/class/infiniband/*/ports/1/gids",
        ),
    }
}

fn rdma_device(host: &dyn Host) -> Check {
    let folder = "/dev/infiniband";
    let names: Vec<String> =
        host.list(folder).into_iter().filter(|name| name.starts_with("uverbs")).collect();
    if names.is_empty() {
        let advice = "load the driver (`sudo modprobe ib_uverbs mlx5_ib`); in a container pass --device /dev/infiniband";
        return Check::fail("RDMA.DEVICE", format!("{folder}/uverbs* is not there"), advice);
    }
    match names.iter().find(|name| !host.can_open(&format!("{folder}/{name}"))) {
        None => Check::pass("RDMA.DEVICE", names.join(" ")),
        Some(name) => Check::fail(
            "RDMA.DEVICE",
            format!("{folder}/{name} may not be opened by this user"),
            "NCCL would fall back to sockets without a word: allow it by a udev rule or a group",
        )
        .with_fix(format!("sudo chmod a+rw {folder}/{name}")),
    }
}
