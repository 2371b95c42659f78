//! Kernel, limits, memory, disk, clock and neighbours of one machine. Nothing of GPU or network.

use super::{host::Host, report::Check};

const GIB: u64 = 1 << 30;
/// Open files that a busy server and its ranks need.
const MIN_FILES: u64 = 65_536;
/// Memory that may be locked for RDMA buffers when it is not unlimited.
const MIN_MEMLOCK: u64 = 8 * GIB;
/// Free blocks of this order (4 MiB and more) that a machine should have.
const LARGE_ORDER: usize = 10;
/// Below this share of all memory, what others use is worth a word.
const MIN_AVAILABLE: f64 = 0.75;

/// The checks; `has_rails` says whether RDMA is to be expected.
pub(super) fn check(host: &dyn Host, has_rails: bool) -> Vec<Check> {
    let meminfo = MemInfo::read(host);
    vec![
        kernel(host, &meminfo),
        governor(host),
        files(host),
        memlock(host, has_rails),
        available(&meminfo),
        page_cache(&meminfo),
        swap(&meminfo),
        fragments(host),
        oom_daemon(host),
        shared_memory(host),
        disk(host),
        clock(host),
        leftovers(host),
        firewall(host),
    ]
}

struct MemInfo(String);

impl MemInfo {
    fn read(host: &dyn Host) -> Self {
        Self(host.read("/proc/meminfo").unwrap_or_default())
    }

    /// Bytes of a line such as `MemTotal:  127600000 kB`.
    fn bytes(&self, name: &str) -> Option<u64> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / GIB as f64)
}

/// Kernels of 7.0 with a broken contiguous allocator cannot register memory for RDMA.
fn kernel(host: &dyn Host, meminfo: &MemInfo) -> Check {
    let id = "OS.KERNEL";
    let version = host.value("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".to_owned());
    let (total, free) = (meminfo.bytes("CmaTotal").unwrap_or(0), meminfo.bytes("CmaFree").unwrap_or(0));
    match free > total {
        true => Check::fail(
            id,
            format!("{version}, CmaFree ({free}) above CmaTotal ({total})"),
            "this kernel miscounts contiguous memory, and RDMA cannot register buffers: boot with kho=off, or an older kernel",
        ),
        false => Check::pass(id, version),
    }
}

fn governor(host: &dyn Host) -> Check {
    let id = "CPU.GOVERNOR";
    match host.value("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") {
        None => Check::pass(id, "the machine sets no frequencies"),
        Some(governor) if governor == "powersave" => {
            Check::warn(id, governor, "the CPU starts every step: `performance` or `schedutil` is faster")
                .with_fix("sudo cpupower frequency-set -g performance")
        }
        Some(governor) => Check::pass(id, governor),
    }
}

/// Soft limit of a line of /proc/self/limits; `None` is unlimited.
fn limit(host: &dyn Host, name: &str) -> Option<Option<u64>> {
    let limits = host.read("/proc/self/limits")?;
    let soft = limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
    Some(soft.parse().ok())
}

fn files(host: &dyn Host) -> Check {
    let id = "LIMIT.FILES";
    match limit(host, "Max open files") {
        None => Check::warn(id, "the limit cannot be read", "look at `ulimit -n`"),
        Some(Some(files)) if files < MIN_FILES => Check::warn(
            id,
            format!("{files} open files"),
            "every connection is one: raise the limit (LimitNOFILE in the unit, `ulimit -n` in a shell)",
        )
        .with_fix(format!("ulimit -n {MIN_FILES}")),
        Some(files) => {
            Check::pass(id, files.map_or("unlimited".to_owned(), |files| format!("{files} open files")))
        }
    }
}

fn memlock(host: &dyn Host, has_rails: bool) -> Check {
    let id = "LIMIT.MEMLOCK";
    match limit(host, "Max locked memory") {
        Some(None) => Check::pass(id, "unlimited"),
        _ if !has_rails => Check::pass(id, "limited; only RDMA needs more"),
        Some(Some(bytes)) if bytes >= MIN_MEMLOCK => Check::pass(id, gib(bytes)),
        found => Check::fail(
            id,
            found.flatten().map_or("the limit cannot be read".to_owned(), gib),
            "RDMA locks its buffers: set memlock to unlimited (/etc/security/limits.d, LimitMEMLOCK=infinity, docker --ulimit memlock=-1)",
        )
        .with_fix("echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/90-memlock.conf"),
    }
}

fn available(meminfo: &MemInfo) -> Check {
    let id = "MEM.AVAILABLE";
    let (Some(total), Some(available)) = (meminfo.bytes("MemTotal"), meminfo.bytes("MemAvailable")) else {
        return Check::warn(id, "/proc/meminfo cannot be read", "the engine sizes itself by it");
    };
    let found = format!("{} of {}", gib(available), gib(total));
    match (available as f64) < MIN_AVAILABLE * total as f64 {
        true => {
            Check::warn(id, found, "other programs hold much memory; the KV cache becomes smaller by as much")
        }
        false => Check::pass(id, found),
    }
}

fn page_cache(meminfo: &MemInfo) -> Check {
    let id = "MEM.DIRTY";
    let bytes = meminfo.bytes("Dirty").unwrap_or(0) + meminfo.bytes("Writeback").unwrap_or(0);
    match bytes > 4 * GIB {
        true => Check::warn(
            id,
            format!("{} not yet written to disk", gib(bytes)),
            "loading competes with these writes and the memory is not free until then: wait, or `sync`",
        )
        .with_fix("sync"),
        false => Check::pass(id, format!("{} not yet written to disk", gib(bytes))),
    }
}

fn swap(meminfo: &MemInfo) -> Check {
    let id = "MEM.SWAP";
    let (total, free) = (meminfo.bytes("SwapTotal").unwrap_or(0), meminfo.bytes("SwapFree").unwrap_or(0));
    let used = total.saturating_sub(free);
    match used > GIB {
        true => Check::warn(
            id,
            format!("{} of {} in use", gib(used), gib(total)),
            "the machine has run out of memory before: find out what for, then `swapoff -a && swapon -a`",
        ),
        false => Check::pass(id, format!("{} of {} in use", gib(used), gib(total))),
    }
}

/// Large free pieces in /proc/buddyinfo: one line a zone, free blocks by order.
fn fragments(host: &dyn Host) -> Check {
    let id = "MEM.FRAGMENTS";
    let Some(text) = host.read("/proc/buddyinfo") else {
        return Check::pass(id, "not told by this kernel");
    };
    let large: u64 = text
        .lines()
        .filter_map(|line| line.split_once("zone"))
        .flat_map(|(_, zone)| zone.split_whitespace().skip(1 + LARGE_ORDER))
        .filter_map(|count| count.parse::<u64>().ok())
        .sum();
    match large {
        0 => Check::warn(
            id,
            "no free piece of 4 MiB or more",
            "memory is in small pieces after long uptime, which makes allocations of the GPU crawl: restart the machine",
        ),
        _ => Check::pass(id, format!("{large} free pieces of 4 MiB or more")),
    }
}

/// Names of all processes with their ids.
pub(super) fn processes(host: &dyn Host) -> Vec<(u32, String)> {
    let ids = host.list("/proc").into_iter().filter_map(|name| name.parse().ok());
    ids.filter_map(|id: u32| Some((id, host.value(&format!("/proc/{id}/comm"))?))).collect()
}

fn oom_daemon(host: &dyn Host) -> Check {
    let id = "MEM.OOMD";
    let found = processes(host).into_iter().find(|(_, name)| name == "earlyoom" || name == "systemd-oomd");
    match found {
        None => Check::pass(id, "no daemon ends programs before memory is full"),
        Some((_, name)) => Check::pass(
            id,
            format!(
                "{name} runs: it may end the engine when memory is short, instead of the machine freezing"
            ),
        ),
    }
}

fn shared_memory(host: &dyn Host) -> Check {
    let id = "MEM.SHM";
    match host.free_bytes("/dev/shm") {
        Some(bytes) if bytes >= GIB => Check::pass(id, format!("{} free in /dev/shm", gib(bytes))),
        Some(bytes) => Check::warn(
            id,
            format!("{} free in /dev/shm", gib(bytes)),
            "NCCL between ranks of one machine needs some: docker --shm-size 1g",
        ),
        None => Check::warn(id, "/dev/shm is not there", "NCCL between ranks of one machine needs it"),
    }
}

fn disk(host: &dyn Host) -> Check {
    let id = "DISK.FREE";
    match host.free_bytes(".") {
        Some(bytes) if bytes < 10 * GIB => Check::warn(
            id,
            format!("{} free here", gib(bytes)),
            "a checkpoint of 235 billion parameters in 4 bits is 124 GB, the packed cache of a rank half of it",
        ),
        Some(bytes) => Check::pass(id, format!("{} free here", gib(bytes))),
        None => Check::warn(id, "the free space of this folder cannot be read", "look at `df -h .`"),
    }
}

fn clock(host: &dyn Host) -> Check {
    let id = "TIME.SYNC";
    match host.run(&["timedatectl", "show", "-p", "NTPSynchronized", "--value"]) {
        Some(answer) if answer.trim() == "no" => Check::warn(
            id,
            "the clock is not synchronised",
            "logs of two machines do not fit together: turn NTP on",
        )
        .with_fix("sudo timedatectl set-ntp true"),
        Some(_) => Check::pass(id, "the clock is synchronised"),
        None => Check::pass(id, "not told by this system"),
    }
}

/// Ranks of an earlier run that still hold memory and ports.
fn leftovers(host: &dyn Host) -> Check {
    let id = "PROC.LEFTOVER";
    let own = host.read("/proc/self/stat");
    let own = own.as_deref().and_then(|stat| stat.split_whitespace().next()?.parse().ok()).unwrap_or(0u32);
    let found: Vec<String> = processes(host)
        .into_iter()
        .filter(|(id, name)| name == "spark-engine" && *id != own && !is_doctor(host, *id))
        .map(|(id, _)| id.to_string())
        .collect();
    match found.is_empty() {
        true => Check::pass(id, "no other spark-engine runs"),
        false => Check::warn(
            id,
            format!("spark-engine runs already: process {}", found.join(", ")),
            "it holds memory and maybe the port: stop it first, if it is not meant to run",
        )
        .with_fix(format!("kill {}", found.join(" "))),
    }
}

/// Whether a process is a doctor as well: one that asks this machine over ssh, or is asked; or an agent of one.
fn is_doctor(host: &dyn Host, id: u32) -> bool {
    host.read(&format!("/proc/{id}/cmdline"))
        .is_some_and(|line| line.split('\0').any(|word| word == "doctor" || word == "agent"))
}

fn firewall(host: &dyn Host) -> Check {
    let id = "NET.FIREWALL";
    let config = host.read("/etc/ufw/ufw.conf").unwrap_or_default();
    match config.lines().any(|line| line.trim() == "ENABLED=yes") {
        true => Check::warn(
            id,
            "ufw is on",
            "ranks connect on ports that the system chooses: allow everything on the rails",
        )
        .with_fix("sudo ufw allow in on INTERFACE"),
        false => Check::pass(id, "ufw is off"),
    }
}
