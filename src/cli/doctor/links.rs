//! The networks between machines: which they share, whether all reach all on them with whole frames, and with `--probe` how fast sums
//! are on each. What runs on the machines is `cli/agent`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr, ToSocketAddrs},
};

use serde_json::{Value, json};

use super::{
    nodes::{self, Node},
    rails::MTU,
    report::Check,
};
use crate::cli::agent::{Agent, Reached, Request, Sums, Target, Times};

/// What a sum of 8 KB takes between two Sparks, in microseconds, and the share above it that is worth a word.
const LATENCY: f64 = 30.0;
const SLOWER: f64 = 1.5;
/// How much sooner a rail by itself has to be done with 8 KB than all of them, to be taken instead: it carries half as much.
const SOONER: f64 = 0.85;
/// What both rails of a Spark carry together, in GB/s, and the share of it that is enough.
const BANDWIDTH: f64 = 22.0;
const ENOUGH: f64 = 0.8;

/// A network that several machines have an address in.
#[derive(Debug, PartialEq)]
pub(super) struct Cable {
    /// Its subnet.
    name: String,
    /// By machine.
    ends: Vec<End>,
}

/// A machine's place in a network.
#[derive(Debug, Clone, PartialEq)]
struct End {
    /// Which machine.
    node: usize,
    interface: String,
    address: IpAddr,
    mtu: usize,
    /// The RDMA device behind it.
    device: Option<String>,
}

impl Cable {
    fn is_rail(&self) -> bool {
        self.ends.iter().all(|end| end.device.is_some())
    }

    /// The largest frame that has to arrive.
    fn frame(&self) -> usize {
        let largest = self.ends.iter().map(|end| end.mtu).max().unwrap_or(0);
        if self.is_rail() { largest.max(MTU as usize) } else { largest }
    }
}

/// What the machines share: rails if all have some, else other networks. Bridges of one machine (docker's) do not count, nor
/// does a network in which two have the same address. Where there is nothing, the names of the machines have to do.
pub(super) fn cables(nodes: &[Node]) -> Vec<Cable> {
    let all: Vec<(String, End)> =
        nodes.iter().enumerate().flat_map(|(index, node)| ends(index, &node.facts)).collect();
    let has_rails =
        (0..nodes.len()).all(|node| all.iter().any(|(_, end)| end.node == node && end.device.is_some()));
    let mut by_subnet: BTreeMap<String, Vec<End>> = BTreeMap::new();
    for (subnet, end) in all.iter().filter(|(_, end)| !has_rails || end.device.is_some()) {
        let ends = by_subnet.entry(subnet.clone()).or_default();
        if ends.iter().all(|other| other.node != end.node) {
            ends.push(end.clone());
        }
    }
    let is_shared = |ends: &[End]| {
        let addresses: BTreeSet<IpAddr> = ends.iter().map(|end| end.address).collect();
        ends.len() > 1 && addresses.len() == ends.len()
    };
    let shared = by_subnet.into_iter().filter(|(_, ends)| is_shared(ends));
    let cables: Vec<Cable> = shared.map(|(name, ends)| Cable { name, ends }).collect();
    match cables.is_empty() && !has_rails {
        true => by_name(nodes, &all).into_iter().collect(),
        false => cables,
    }
}

/// The places of a machine in networks, as its facts have them.
fn ends(node: usize, facts: &Value) -> Vec<(String, End)> {
    let end = |entry: &Value| {
        let address: IpAddr = entry["address"].as_str()?.parse().ok()?;
        let is_other = !address.is_loopback() && entry["is_bridge"] != true;
        let end = End {
            node,
            interface: entry["interface"].as_str()?.to_owned(),
            address,
            mtu: entry["mtu"].as_u64()? as usize,
            device: entry["device"].as_str().map(str::to_owned),
        };
        is_other.then(|| Some((entry["subnet"].as_str()?.to_owned(), end)))?
    };
    facts["interfaces"].as_array().into_iter().flatten().filter_map(end).collect()
}

fn by_name(nodes: &[Node], all: &[(String, End)]) -> Option<Cable> {
    let end = |(node, named): (usize, &Node)| {
        let address = (named.name.as_str(), 0).to_socket_addrs().ok()?.find(SocketAddr::is_ipv4)?.ip();
        let known = all.iter().find(|(_, end)| end.node == node && end.address == address);
        let unknown = End { node, interface: String::new(), address, mtu: 1500, device: None };
        Some(known.map_or(unknown, |(_, end)| end.clone()))
    };
    let ends: Vec<End> = nodes.iter().enumerate().map(end).collect::<Option<_>>()?;
    let addresses: BTreeSet<IpAddr> = ends.iter().map(|end| end.address).collect();
    (ends.len() > 1 && addresses.len() == ends.len()).then(|| Cable { name: "by name".to_owned(), ends })
}

/// Whether all machines of each network reach each other there.
pub(super) fn check(nodes: &[Node], cables: &[Cable]) -> Vec<Check> {
    if cables.is_empty() {
        return Vec::new();
    }
    let found = match Echoes::start(nodes, cables).and_then(|mut echoes| echoes.reach(cables)) {
        Ok(found) => found,
        Err(error) => {
            let advice =
                "the program has to be the same on all machines, and able to open ports on their networks";
            return vec![Check::fail("LINK.REACH", format!("{error:#}"), advice)];
        }
    };
    cables.iter().zip(found).flat_map(|(cable, found)| judge(nodes, cable, &found)).collect()
}

/// From one machine to another, and what came of it.
struct Way {
    from: usize,
    to: usize,
    reached: Reached,
}

fn judge(nodes: &[Node], cable: &Cable, ways: &[Way]) -> Vec<Check> {
    let names = |way: &Way| format!("{} to {}", nodes[way.from].name, nodes[way.to].name);
    let lost: Vec<String> = ways
        .iter()
        .filter_map(|way| Some(format!("{}: {}", names(way), way.reached.problem.as_ref()?)))
        .collect();
    if !lost.is_empty() {
        let address = cable.ends.last().map_or(String::new(), |end| end.address.to_string());
        let advice = "the machines have addresses in this network and do not reach each other: look at the routes of both, at the cable, at the firewall";
        let check = Check::fail("LINK.REACH", format!("{}: {}", cable.name, lost.join("; ")), advice);
        return vec![check.with_fix(format!("ip route get {address}; sudo ufw status"))];
    }
    let best = ways.iter().map(|way| way.reached.micros).fold(f64::INFINITY, f64::min);
    let reach = Check::pass(
        "LINK.REACH",
        format!("{}: TCP and UDP both ways, {best:.0} us there and back", cable.name),
    );
    let frame = cable.frame();
    let cut: Vec<String> = ways
        .iter()
        .filter_map(|way| Some(format!("{}: {}", names(way), way.reached.cut.as_ref()?)))
        .collect();
    let mtus: Vec<String> = cable
        .ends
        .iter()
        .map(|end| format!("{} {} has {}", nodes[end.node].name, end.interface, end.mtu))
        .collect();
    let jumbo = match cut.is_empty() {
        true => Check::pass("LINK.JUMBO", format!("{}: frames of {frame} bytes arrive", cable.name)),
        false => Check::fail(
            "LINK.JUMBO",
            format!(
                "{}: frames of {frame} bytes do not arrive ({}); MTU: {}",
                cable.name,
                cut.join("; "),
                mtus.join(", ")
            ),
            "both ends, and a switch between them, need the same MTU; or the rails are plugged crosswise",
        )
        .with_fix(format!("sudo ip link set dev INTERFACE mtu {frame}")),
    };
    vec![reach, jumbo]
}

/// One agent on each machine, which echoes on all networks.
struct Echoes {
    agents: Vec<Agent>,
    ports: HashMap<IpAddr, u16>,
}

impl Echoes {
    fn start(nodes: &[Node], cables: &[Cable]) -> anyhow::Result<Self> {
        let program = nodes::program();
        let start = |node: &Node| Agent::start(&node.name, &program, None, &[]);
        let mut agents = nodes.iter().map(start).collect::<anyhow::Result<Vec<_>>>()?;
        let mut ports = HashMap::new();
        for (index, agent) in agents.iter_mut().enumerate() {
            let ends = cables.iter().flat_map(|cable| &cable.ends).filter(|end| end.node == index);
            let addresses: Vec<IpAddr> = ends.map(|end| end.address).collect();
            let opened: Vec<Result<u16, String>> =
                agent.ask(&Request::Listen { addresses: addresses.clone() })?;
            for (address, port) in addresses.into_iter().zip(opened) {
                let port = port.map_err(|problem| anyhow::anyhow!("listening at {address}: {problem}"))?;
                ports.insert(address, port);
            }
        }
        Ok(Self { agents, ports })
    }

    /// `[cable]`: every ordered pair of its machines. The machines try at the same time.
    fn reach(&mut self, cables: &[Cable]) -> anyhow::Result<Vec<Vec<Way>>> {
        let mut asked: Vec<Vec<(usize, usize)>> = Vec::new();
        for (from, agent) in self.agents.iter_mut().enumerate() {
            let (mut targets, mut ways) = (Vec::new(), Vec::new());
            for (index, cable) in cables.iter().enumerate() {
                if cable.ends.iter().all(|end| end.node != from) {
                    continue;
                }
                for end in cable.ends.iter().filter(|end| end.node != from) {
                    let port = self.ports.get(&end.address).copied().unwrap_or(0);
                    let address = SocketAddr::new(end.address, port);
                    targets.push(Target { address, frame: cable.frame() });
                    ways.push((index, end.node));
                }
            }
            agent.send(&Request::Reach { targets })?;
            asked.push(ways);
        }
        let mut found: Vec<Vec<Way>> = cables.iter().map(|_| Vec::new()).collect();
        for (from, (agent, ways)) in self.agents.iter_mut().zip(asked).enumerate() {
            let all: Vec<Reached> = agent.receive()?;
            for ((cable, to), reached) in ways.into_iter().zip(all) {
                found[cable].push(Way { from, to, reached });
            }
        }
        Ok(found)
    }
}

/// How fast sums are: checks, and the numbers. On each network by itself; over NCCL on all rails together as well.
pub(super) fn probe(nodes: &[Node], cables: &[Cable]) -> (Vec<Check>, Vec<Value>) {
    let has_gpus = nodes.iter().all(|node| !node.facts["driver"].is_null() && !node.facts["nccl"].is_null());
    let (mut checks, mut numbers, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    let mut run = |cable: &Cable, name: &str, is_alone: bool, share: f64| -> Option<Times> {
        let transport = if has_gpus { "NCCL" } else { "TCP" };
        match measure(nodes, cable, has_gpus, is_alone) {
            Ok(times) => {
                checks.extend(compare(name, transport, &times, BANDWIDTH * share));
                numbers.push(json!({
                    "network": name, "transport": transport,
                    "all_reduce_8k_us": {"p50": times.p50, "p99": times.p99, "expected": LATENCY},
                    "bandwidth_gb_s": {"measured": times.gigabytes, "expected": BANDWIDTH * share},
                }));
                Some(times)
            }
            Err(error) => {
                checks.push(Check::fail(
                    "PROBE.LATENCY",
                    format!("{name} over {transport}: {error:#}"),
                    "ranks would not connect either: see what the other checks say of this network and of NCCL",
                ));
                None
            }
        }
    };
    let num_rails = cables.iter().filter(|cable| cable.is_rail()).count().max(1);
    for cable in cables {
        let share = if cable.is_rail() { 1.0 / num_rails as f64 } else { 1.0 };
        let times = run(cable, &cable.name, cable.is_rail(), share);
        alone.extend(times.filter(|_| cable.is_rail()).map(|times| (cable, times)));
    }
    if let (Some(first), true) = (cables.iter().find(|cable| cable.is_rail()), has_gpus && num_rails > 1) {
        let together = run(first, "all rails", false, 1.0);
        checks.extend(together.map(|together| compare_rails(&alone, &together)));
    }
    (checks, numbers)
}

/// Whether ranks are better off with one rail than with all of them, which is what they take unless they are told. Both have been
/// seen: small sums wait for the slower rail, large ones are done in half the time.
fn compare_rails(alone: &[(&Cable, Times)], together: &Times) -> Check {
    let all = format!("all rails: 8 KB in {:.1} us, {:.2} GB/s", together.p50, together.gigabytes);
    let quickest = alone.iter().min_by(|(_, a), (_, b)| a.p50.total_cmp(&b.p50));
    let Some((cable, times)) = quickest else {
        return Check::pass("PROBE.RAILS", all);
    };
    let found = format!("{all}; {} alone: {:.1} us, {:.2} GB/s", cable.name, times.p50, times.gigabytes);
    if times.p50 > together.p50 * SOONER {
        return Check::pass("PROBE.RAILS", found);
    }
    let mut devices: Vec<&str> = cable.ends.iter().filter_map(|end| end.device.as_deref()).collect();
    devices.dedup();
    let advice = format!(
        "one rail answers single users sooner, all of them read long prompts faster: for the former set NCCL_IB_HCA where `serve --nodes` \
         starts (the other machines get it from there; in units of systemd on each) to `=` and the rail's device, {}",
        devices.join(" here and there ")
    );
    let check = Check::warn("PROBE.RAILS", found, advice);
    // Which device a rank is told has to be right on every machine.
    match devices[..] {
        [device] => check.with_fix(format!("export NCCL_IB_HCA=={device}:1")),
        _ => check,
    }
}

/// Sums between the machines of `cable`; over NCCL only on that rail when `is_alone`.
fn measure(nodes: &[Node], cable: &Cable, has_gpus: bool, is_alone: bool) -> anyhow::Result<Times> {
    let program = nodes::program();
    let (world, token) = (cable.ends.len(), crate::cli::ranks::random_token()?);
    let mut agents = Vec::new();
    for (rank, end) in cable.ends.iter().enumerate() {
        let mut variables = Vec::new();
        if let (true, Some(device)) = (is_alone, &end.device) {
            variables.push(("NCCL_IB_HCA", format!("={device}:1")));
            variables.push(("NCCL_SOCKET_IFNAME", format!("={}", end.interface)));
        }
        let peer = cable.ends[(rank + 1) % world].address;
        agents.push(Agent::start(&nodes[end.node].name, &program, Some(peer), &variables)?);
    }
    let sums = |rank: usize, at: SocketAddr| {
        let gpu = has_gpus.then(|| gpu_of(nodes, cable, rank));
        Request::Sums(Sums { rank, world, at, token: token.clone(), gpu })
    };
    agents[0].send(&sums(0, SocketAddr::new(cable.ends[0].address, 0)))?;
    let at: SocketAddr = agents[0].receive()?;
    for (rank, agent) in agents.iter_mut().enumerate().skip(1) {
        agent.send(&sums(rank, at))?;
    }
    let mut times = Vec::new();
    for agent in &mut agents {
        times.push(agent.receive::<Times>()?);
    }
    Ok(times.swap_remove(0))
}

/// The first GPU; where two nodes are one machine, each takes another.
fn gpu_of(nodes: &[Node], cable: &Cable, rank: usize) -> usize {
    let boot = |rank: usize| &nodes[cable.ends[rank].node].facts["boot"];
    (0..rank).filter(|&other| boot(other) == boot(rank)).count()
}

fn compare(name: &str, transport: &str, times: &Times, bandwidth: f64) -> [Check; 2] {
    let over = format!("{name} over {transport}");
    let advice = match transport {
        "TCP" => {
            "this is what ranks on the CPU get; ranks on GPUs use NCCL over RDMA where all machines have both"
        }
        _ => {
            "NCCL may not use RDMA on this network: see RDMA.* and NCCL.*, and NCCL_DEBUG=INFO at the start of `serve`"
        }
    };
    let Times { p50, p99, gigabytes } = times;
    let latency = format!("{over}: a sum of 8 KB takes {p50:.1} us (p99 {p99:.1}), two Sparks {LATENCY:.0}");
    let rate = format!("{over}: {gigabytes:.2} GB/s, two Sparks {bandwidth:.0}");
    [
        match *p50 <= LATENCY * SLOWER {
            true => Check::pass("PROBE.LATENCY", latency),
            false => Check::warn("PROBE.LATENCY", latency, advice),
        },
        match *gigabytes >= bandwidth * ENOUGH {
            true => Check::pass("PROBE.BANDWIDTH", rate),
            false => Check::warn("PROBE.BANDWIDTH", rate, advice),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::report::Status;

    fn node(name: &str, interfaces: &[(&str, &str, u64, Option<&str>)]) -> Node {
        let interfaces: Vec<Value> = interfaces
            .iter()
            .map(|(interface, address, mtu, device)| {
                let subnet = format!("{}.0/24", address.rsplit_once('.').unwrap().0);
                let is_bridge = interface.starts_with("docker");
                json!({"interface": interface, "address": address, "subnet": subnet, "mtu": mtu,
                       "device": device, "is_bridge": is_bridge})
            })
            .collect();
        Node::new(name, json!({ "interfaces": interfaces, "boot": name }))
    }

    #[test]
    fn rails_are_tested_and_nothing_else_where_there_are_some() {
        let spark = |name, last: u8| {
            let address = |third: u8| format!("192.168.{third}.{last}");
            let (lan, a, b) = (address(1), address(100), address(101));
            node(
                name,
                &[
                    ("lo", "127.0.0.1", 65536, None),
                    ("docker0", "172.17.0.1", 1500, None),
                    ("wlan", &lan, 1500, None),
                    ("rail0", &a, 9000, Some("roce0")),
                    ("rail1", &b, 9000, Some("roce1")),
                ],
            )
        };
        let found = cables(&[spark("a", 1), spark("b", 2)]);
        let names: Vec<&str> = found.iter().map(|cable| cable.name.as_str()).collect();
        assert_eq!(names, ["192.168.100.0/24", "192.168.101.0/24"]);
        assert!(found.iter().all(|cable| cable.is_rail() && cable.ends.len() == 2));
    }

    #[test]
    fn other_machines_are_tested_on_what_they_share() {
        let machine = |name, lan: &str| {
            node(
                name,
                &[
                    ("docker0", "172.17.0.1", 1500, None),
                    ("virbr", "10.9.9.1", 1500, None),
                    ("eth0", lan, 1500, None),
                ],
            )
        };
        let found = cables(&[machine("a", "10.0.0.1"), machine("b", "10.0.0.2")]);
        assert_eq!(found.len(), 1, "one address on both is no network between them: {found:?}");
        assert_eq!((found[0].name.as_str(), found[0].frame()), ("10.0.0.0/24", 1500));
        // Nothing is shared: the names.
        let found = cables(&[node("127.0.0.1", &[]), node("127.0.0.2", &[])]);
        assert_eq!(found[0].ends[1].address, IpAddr::from([127, 0, 0, 2]));
        assert_eq!(cables(&[node("a.invalid", &[]), node("b.invalid", &[])]), []);
    }

    #[test]
    fn rails_need_whole_frames_whatever_is_set_on_them() {
        let spark = |name, address, mtu| node(name, &[("rail0", address, mtu, Some("roce0"))]);
        let nodes = [spark("a", "10.0.0.1", 1500), spark("b", "10.0.0.2", 1500)];
        let found = cables(&nodes);
        assert_eq!(found[0].frame(), 9000);
        let way = |from, to, problem: Option<&str>, cut: Option<&str>| {
            let reached =
                Reached { problem: problem.map(Into::into), cut: cut.map(Into::into), micros: 50.0 };
            Way { from, to, reached }
        };
        let status = |ways: &[Way]| {
            let checks = judge(&nodes, &found[0], ways);
            checks.into_iter().map(|check| (check.id, check.status)).collect::<Vec<_>>()
        };
        let (reach, jumbo) = ("LINK.REACH".to_owned(), "LINK.JUMBO".to_owned());
        assert_eq!(
            status(&[way(0, 1, None, None), way(1, 0, None, Some("too long"))]),
            [(reach.clone(), Status::Pass), (jumbo, Status::Fail)]
        );
        assert_eq!(
            status(&[way(0, 1, None, Some("x")), way(1, 0, Some("no route"), None)]),
            [(reach, Status::Fail)],
            "frames are no matter where nothing arrives"
        );
    }

    #[test]
    fn times_are_compared_with_those_of_two_sparks() {
        let of = |p50, gigabytes| {
            let checks = compare("x", "NCCL", &Times { p50, p99: 99.0, gigabytes }, 11.0);
            checks.map(|check| check.status)
        };
        assert_eq!(of(31.0, 10.5), [Status::Pass, Status::Pass]);
        assert_eq!(of(300.0, 1.0), [Status::Warn, Status::Warn]);
    }

    #[test]
    fn one_rail_is_recommended_only_where_it_is_clearly_sooner() {
        let spark = |name, last: u8| {
            let address = format!("192.168.100.{last}");
            node(name, &[("rail0", &address, 9000, Some("rocep1s0f0"))])
        };
        let found = cables(&[spark("a", 1), spark("b", 2)]);
        let times = |p50, gigabytes| Times { p50, p99: p50, gigabytes };
        let check = |alone, all| compare_rails(&[(&found[0], times(alone, 11.0))], &times(all, 21.0));
        for (alone, all) in [(30.0, 30.0), (28.0, 31.0), (40.0, 30.0)] {
            assert_eq!(check(alone, all).status, Status::Pass, "{alone} against {all}");
        }
        let warned = check(27.0, 41.0).to_json();
        assert_eq!((warned["status"].as_str(), warned["id"].as_str()), (Some("WARN"), Some("PROBE.RAILS")));
        let text = warned.to_string();
        assert!(text.contains("41.0 us, 21.00 GB/s; 192.168.100.0/24 alone: 27.0 us, 11.00 GB/s"), "{text}");
        assert!(text.contains("export NCCL_IB_HCA==rocep1s0f0:1"), "{text}");
    }

    #[test]
    fn nodes_of_one_machine_take_a_gpu_each() {
        let mut nodes = vec![node("127.0.0.1", &[]), node("127.0.0.2", &[]), node("127.0.0.3", &[])];
        let cable = by_name(&nodes, &[]).unwrap();
        assert_eq!([0, 1, 2].map(|rank| gpu_of(&nodes, &cable, rank)), [0, 0, 0]);
        nodes[2].facts["boot"] = nodes[0].facts["boot"].clone();
        assert_eq!([0, 1, 2].map(|rank| gpu_of(&nodes, &cable, rank)), [0, 0, 1]);
    }
}
