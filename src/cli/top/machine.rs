//! GPU and rails of the machine that `top` runs on, as its driver and kernel tell them. Nothing of other machines.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

/// One GPU.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Gpu {
    pub(super) name: String,
    /// Share of the time in which it worked, in percent.
    pub(super) busy: Option<f64>,
    pub(super) watts: Option<f64>,
    pub(super) megahertz: Option<f64>,
    pub(super) celsius: Option<f64>,
}

/// What `nvidia-smi` is asked for, in this order.
const QUERY: &str = "name,utilization.gpu,power.draw,clocks.sm,temperature.gpu";

/// The GPUs; none where there is no driver.
pub(super) fn gpus() -> Vec<Gpu> {
    let mut command = Command::new("nvidia-smi");
    command.args([&format!("--query-gpu={QUERY}"), "--format=csv,noheader,nounits"]).stdin(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => parse(&String::from_utf8_lossy(&output.stdout)),
        _ => Vec::new(),
    }
}

/// One line a GPU; what a GPU does not know is `[N/A]`.
fn parse(text: &str) -> Vec<Gpu> {
    let gpu = |line: &str| {
        let fields: Vec<&str> = line.split(", ").map(str::trim).collect();
        let number = |i: usize| fields.get(i)?.parse().ok();
        let name = (*fields.first()?).to_owned();
        Some(Gpu { name, busy: number(1), watts: number(2), megahertz: number(3), celsius: number(4) })
    };
    text.lines().filter(|line| !line.trim().is_empty()).filter_map(gpu).collect()
}

/// Bytes that ports of RDMA have moved so far.
pub(super) struct Rails {
    at: Instant,
    /// Name, bytes received, bytes sent.
    ports: Vec<(String, u64, u64)>,
}

impl Rails {
    /// Reads the counters below `root` (`/sys/class/infiniband`).
    pub(super) fn read(root: &Path, at: Instant) -> Self {
        let folders = |path: &Path| {
            let mut found: Vec<_> =
                fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path()).collect();
            found.sort();
            found
        };
        let mut ports = Vec::new();
        for device in folders(root) {
            for port in folders(&device.join("ports")) {
                // The counters count words of four bytes.
                let bytes = |name: &str| {
                    let text = fs::read_to_string(port.join("counters").join(name)).ok()?;
                    text.trim().parse::<u64>().ok()?.checked_mul(4)
                };
                if let (Some(received), Some(sent)) = (bytes("port_rcv_data"), bytes("port_xmit_data")) {
                    let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    ports.push((name, received, sent));
                }
            }
        }
        Self { at, ports }
    }

    /// Name, and gigabits received and sent a second since `before`.
    pub(super) fn rates(&self, before: Option<&Self>) -> Vec<(String, f64, f64)> {
        let Some(before) = before else { return Vec::new() };
        let seconds = self.at.saturating_duration_since(before.at).as_secs_f64().max(1e-3);
        let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 * 8e-9 / seconds;
        let both = self.ports.iter().zip(&before.ports).filter(|(now, then)| now.0 == then.0);
        both.map(|(now, then)| (now.0.clone(), rate(now.1, then.1), rate(now.2, then.2))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_a_gpu_does_not_know_is_left_out() {
        let gpus = parse("NVIDIA GB10, 96, 88.12, 2418, 61\nNVIDIA X, [N/A], [Not Supported], 900, 40\n\n");
        assert_eq!(gpus.len(), 2);
        let first = Gpu {
            name: "NVIDIA GB10".into(),
            busy: Some(96.0),
            watts: Some(88.12),
            megahertz: Some(2418.0),
            celsius: Some(61.0),
        };
        assert_eq!(gpus[0], first);
        assert_eq!((gpus[1].busy, gpus[1].watts, gpus[1].megahertz), (None, None, Some(900.0)));
    }

    #[test]
    fn rails_are_rates_between_two_looks() {
        let folder = tempfile::tempdir().unwrap();
        let counters = folder.path().join("rocep1s0f1/ports/1/counters");
        fs::create_dir_all(&counters).unwrap();
        let write = |received: u64, sent: u64| {
            fs::write(counters.join("port_rcv_data"), format!("{received}\n")).unwrap();
            fs::write(counters.join("port_xmit_data"), format!("{sent}\n")).unwrap();
        };
        let start = Instant::now();
        write(0, 250_000_000);
        let first = Rails::read(folder.path(), start);
        write(250_000_000, 250_000_000);
        let second = Rails::read(folder.path(), start + Duration::from_secs(2));
        assert_eq!(second.rates(Some(&first)), [("rocep1s0f1".to_owned(), 4.0, 0.0)]);
        assert!(second.rates(None).is_empty());
    }
}
