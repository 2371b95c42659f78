//! The GPU as the driver's own tool tells of it. Opens no device.

use super::{host::Host, report::Check};

/// First driver that runs what is compiled for CUDA 13.
const FIRST_DRIVER: u32 = 580;
/// A branch whose recorded graphs are reported to fail on Sparks.
const DOUBTFUL_DRIVER: u32 = 590;
/// Reasons for a lowered clock that are faults: hardware slowdown, thermal, power brake.
const FAULTS: u64 = 0x8 | 0x20 | 0x40 | 0x80;

/// What the driver's tool says of the first GPU.
pub(super) struct Gpu {
    name: String,
    pub(super) driver: String,
    capability: String,
    reasons: u64,
}

impl Gpu {
    /// Whether this is the GPU of a Spark, which shares the machine's memory.
    pub(super) fn is_gb10(&self) -> bool {
        self.name.contains("GB10")
    }
}

/// The first GPU; `None` if there is none or no driver.
pub(super) fn find(host: &dyn Host) -> Option<Gpu> {
    let query = "--query-gpu=name,driver_version,compute_cap,clocks_event_reasons.active";
    let text = host.run(&["nvidia-smi", query, "--format=csv,noheader"])?;
    let mut fields = text.lines().next()?.split(',').map(str::trim);
    let (name, driver, capability) = (fields.next()?, fields.next()?, fields.next()?);
    let reasons = fields.next().and_then(|hex| u64::from_str_radix(hex.trim_start_matches("0x"), 16).ok());
    Some(Gpu {
        name: name.to_owned(),
        driver: driver.to_owned(),
        capability: capability.to_owned(),
        reasons: reasons.unwrap_or(0),
    })
}

/// The checks.
pub(super) fn check(host: &dyn Host, gpu: Option<&Gpu>) -> Vec<Check> {
    let Some(gpu) = gpu else {
        let advice = "without a driver everything runs on the CPU; on a Spark: sudo apt install nvidia-driver-580-open";
        return vec![Check::warn("GPU.DRIVER", "nvidia-smi finds no GPU", advice)];
    };
    vec![driver(gpu), clocks(gpu), errors(host), others(host)]
}

fn driver(gpu: &Gpu) -> Check {
    let id = "GPU.DRIVER";
    let found = format!("{} (compute capability {}), driver {}", gpu.name, gpu.capability, gpu.driver);
    let branch: u32 = gpu.driver.split('.').next().and_then(|branch| branch.parse().ok()).unwrap_or(0);
    match branch {
        _ if branch < FIRST_DRIVER => {
            Check::fail(id, found, format!("kernels for CUDA 13 need driver {FIRST_DRIVER} or newer"))
                .with_fix("sudo apt install nvidia-driver-580-open")
        }
        DOUBTFUL_DRIVER => Check::warn(
            id,
            found,
            "this branch is reported to break recorded steps on Sparks: prefer 580, or start with --enforce-eager",
        ),
        _ => Check::pass(id, found),
    }
}

fn clocks(gpu: &Gpu) -> Check {
    let id = "GPU.CLOCKS";
    match gpu.reasons & FAULTS {
        0 => Check::pass(id, "not held back"),
        bits => Check::fail(
            id,
            format!("the clock is held back by heat or power (reasons {bits:#x})"),
            "a Spark in this state runs at a quarter of its speed: let it cool, or unplug it for a minute",
        ),
    }
}

fn errors(host: &dyn Host) -> Check {
    let id = "GPU.XID";
    let found = host.run(&["journalctl", "-k", "-b", "-q", "--no-pager", "-g", "NVRM: Xid", "-n", "1"]);
    match found.as_deref().map(str::trim).filter(|line| !line.is_empty()) {
        None => Check::pass(id, "the kernel's log has no fault of the GPU since the last start"),
        Some(line) => Check::warn(
            id,
            line.chars().take(160).collect::<String>(),
            "the GPU has had a fault since the machine was started: restart it if the engine fails",
        ),
    }
}

fn others(host: &dyn Host) -> Check {
    let id = "GPU.PROCESSES";
    let text = host.run(&["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader"]);
    let users: Vec<String> = text
        .unwrap_or_default()
        .lines()
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    match users.is_empty() {
        true => Check::pass(id, "no other program uses it"),
        false => Check::warn(id, users.join("; "), "other programs compute on this GPU and hold its memory"),
    }
}
