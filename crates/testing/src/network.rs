//! Several machines as network namespaces of this one, joined by a bridge for each cable: ranks in them have addresses, links and
//! routes of their own. Files and processes are shared. Needs root and `ip`; not a simulator of slow or lossy networks.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// Largest frame of every link, as on the rails between two Sparks.
pub const MTU: u32 = 9000;

/// Distinguishes the networks of one process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Namespaces 0 to `nodes - 1`. Each has an interface `rail0`, `rail1` ... on every cable, with an address in that cable's subnet; this
/// process reaches them through the first cable. All of it is removed when it is dropped.
#[derive(Debug)]
pub struct Network {
    /// Part of all names: they are the system's.
    id: u32,
    /// Middle bytes of the addresses of the first cable; the next cables count on.
    subnet: u16,
    nodes: usize,
    cables: usize,
}

impl Network {
    /// `nodes` namespaces on `cables` cables.
    ///
    /// # Errors
    /// The command that failed and what it said: without root, without `ip`, or where the kernel has no bridges, there are none.
    pub fn new(nodes: usize, cables: usize) -> io::Result<Self> {
        let id = std::process::id().wrapping_mul(8) + NEXT.fetch_add(1, Ordering::Relaxed);
        let id = id % 10_000_000;
        // Subnets of 10.64.0.0/10, two neighbours to a network.
        let subnet = u16::try_from(64 * 256 + (id * 4) % (64 * 256)).unwrap_or(64 * 256);
        let network = Self { id, subnet, nodes, cables };
        for node in 0..nodes {
            let namespace = network.namespace(node);
            ip(&["netns", "add", &namespace])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        }
        for cable in 0..cables {
            network.lay(cable)?;
        }
        Ok(network)
    }

    fn lay(&self, cable: usize) -> io::Result<()> {
        let (bridge, mtu) = (self.bridge(cable), MTU.to_string());
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        for node in 0..self.nodes {
            let (namespace, here, there) =
                (self.namespace(node), self.link(node, cable), format!("rail{cable}"));
            let pair = ["link", "add", &here, "mtu", &mtu, "type", "veth", "peer", "name", &there];
            ip(&[&pair[..], &["mtu", &mtu, "netns", &namespace]].concat())?;
            ip(&["link", "set", &here, "master", &bridge, "up"])?;
            let address = format!("{}/24", self.address(node, cable));
            ip(&["-n", &namespace, "addr", "add", &address, "dev", &there])?;
            ip(&["-n", &namespace, "link", "set", &there, "up"])?;
        }
        // A bridge takes the least MTU of its ports, so it comes last.
        ip(&["link", "set", &bridge, "mtu", &mtu, "up"])?;
        if cable == 0 {
            let address = format!("{}/24", self.host(cable, 254));
            ip(&["addr", "add", &address, "dev", &bridge])?;
        }
        Ok(())
    }

    fn host(&self, cable: usize, host: u8) -> Ipv4Addr {
        let [a, b] = (self.subnet + u16::try_from(cable).unwrap_or(0)).to_be_bytes();
        Ipv4Addr::new(10, a, b, host)
    }

    /// The address of `node` on `cable`.
    pub fn address(&self, node: usize, cable: usize) -> Ipv4Addr {
        self.host(cable, u8::try_from(node + 1).unwrap_or(253))
    }

    /// The addresses of all nodes on the first cable, with commas between: for `--nodes`.
    pub fn addresses(&self) -> String {
        let all: Vec<String> = (0..self.nodes).map(|node| self.address(node, 0).to_string()).collect();
        all.join(",")
    }

    /// The name of a node's namespace.
    pub fn namespace(&self, node: usize) -> String {
        format!("spark-{}-{node}", self.id)
    }

    /// Words in front of a command that make it run on `node`.
    pub fn enter(&self, node: usize) -> [String; 4] {
        ["ip".to_owned(), "netns".to_owned(), "exec".to_owned(), self.namespace(node)]
    }

    /// Runs `ip` with these words on `node`: what an administrator does wrong there.
    ///
    /// # Errors
    /// What the command said.
    pub fn ip(&self, node: usize, words: &str) -> io::Result<()> {
        let namespace = self.namespace(node);
        let words: Vec<&str> = ["-n", &namespace].into_iter().chain(words.split_whitespace()).collect();
        ip(&words)
    }

    /// Pulls the plug of `node` on `cable`, or puts it in again.
    ///
    /// # Errors
    /// What the command said.
    pub fn plug(&self, node: usize, cable: usize, is_in: bool) -> io::Result<()> {
        ip(&["link", "set", &self.link(node, cable), if is_in { "up" } else { "down" }])
    }

    /// Writes a stand-in for ssh into `folder`, which runs the command in the namespace that has the address. `first`: what the
    /// shell there does before it, such as `export HOME=...`; what it mounts is seen by that command only.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn ssh(&self, folder: &Path, first: &str) -> io::Result<PathBuf> {
        let cases: Vec<String> = (0..self.nodes)
            .map(|node| format!("{}) namespace={} ;;", self.address(node, 0), self.namespace(node)))
            .collect();
        let script = format!(
            "#!/bin/sh\ncase \"$1\" in\n{}\n*) echo \"ssh: no host $1\" >&2; exit 255 ;;\nesac\n\
             exec ip netns exec \"$namespace\" sh -c '{first}\nexec sh -c \"exec $1\"' sh \"$2\"\n",
            cases.join("\n")
        );
        let path = folder.join("ssh");
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// At most 15 bytes: the kernel's limit for names of interfaces.
    fn bridge(&self, cable: usize) -> String {
        format!("sb{}c{cable}", self.id)
    }

    /// This machine's end.
    fn link(&self, node: usize, cable: usize) -> String {
        format!("sv{}n{node}c{cable}", self.id)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // What was never made cannot be removed; a pair of veth goes with its namespace, but only when nobody runs in it any more.
        for node in 0..self.nodes {
            for cable in 0..self.cables {
                let _ = ip(&["link", "del", &self.link(node, cable)]);
            }
            let _ = ip(&["netns", "del", &self.namespace(node)]);
        }
        for cable in 0..self.cables {
            let _ = ip(&["link", "del", &self.bridge(cable)]);
        }
    }
}

fn ip(words: &[&str]) -> io::Result<()> {
    let failed = |why: String| {
        io::Error::other(format!(
            "tests of several machines need root and iproute2 to make network namespaces: ip {}: {why}",
            words.join(" ")
        ))
    };
    let output = Command::new("ip").args(words).output().map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_reach_each_other_on_every_cable_until_it_is_pulled_and_leave_nothing() {
        let network = Network::new(2, 2).unwrap();
        let reaches = |cable: usize| {
            let [program, words @ ..] = network.enter(0);
            let address = network.address(1, cable);
            // A port that nobody listens on is refused by the other side: it is there.
            let script = format!("exec 3<>/dev/tcp/{address}/9");
            let output = Command::new(program)
                .args(words)
                .args(["timeout", "2", "bash", "-c", &script])
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stderr).contains("refused")
        };
        assert!(reaches(0) && reaches(1));
        network.plug(1, 1, false).unwrap();
        assert!(reaches(0) && !reaches(1));
        network.plug(1, 1, true).unwrap();
        assert!(reaches(1));
        let (namespace, bridge) = (network.namespace(0), network.bridge(0));
        drop(network);
        assert!(!Path::new("/run/netns").join(namespace).exists());
        assert!(!Path::new("/sys/class/net").join(bridge).exists());
    }

    #[test]
    fn what_is_refused_is_named_with_what_is_needed() {
        let message = ip(&["netns", "del", "spark-never-made"]).unwrap_err().to_string();
        assert!(message.contains("need root") && message.contains("spark-never-made"), "{message}");
    }
}
