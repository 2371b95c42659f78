//! The machine around the GPU: processor, memory, system; and how fast its cores read memory together.

use std::{collections::BTreeMap, fs, thread, time::Instant};

use serde_json::{Value, json};
use spark_backend::Memory;

use super::number;

/// Bytes that all threads read together; more than any cache.
const BYTES: usize = 512 << 20;
const REPEATS: usize = 3;
/// Fields of `/proc/cpuinfo` that tell processors apart, on x86 and on Arm.
const CPU_FIELDS: [&str; 4] = ["model name", "CPU implementer", "CPU part", "CPU variant"];

pub(super) fn measure() -> Value {
    let memory = Memory::of_machine();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    json!({
        "machine": std::env::consts::ARCH,
        "cpu": fs::read_to_string("/proc/cpuinfo").map(|text| processors(&text)).unwrap_or_default(),
        "kernel": line("/proc/sys/kernel/osrelease"),
        "product": line("/sys/devices/virtual/dmi/id/product_name"),
        "page_bytes": rustix::param::page_size(),
        "transparent_hugepages": line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "nvidia_driver": line("/sys/module/nvidia/version"),
        "cores": cores,
        "memory_total_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "cpu_read_gb_per_s": cpu_read(memory.available, cores).map(number),
    })
}

/// The one line of a file of the system; `None` where there is none.
fn line(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// How many processors there are of each kind.
fn processors(cpuinfo: &str) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for processor in cpuinfo.split("\n\n") {
        let fields = processor.lines().filter_map(|line| line.split_once(':'));
        let kind: Vec<String> = fields
            .filter(|(name, _)| CPU_FIELDS.contains(&name.trim()))
            .map(|(name, value)| match name.trim() {
                "model name" => value.trim().to_owned(),
                name => format!("{name} {}", value.trim()),
            })
            .collect();
        if !kind.is_empty() {
            *kinds.entry(kind.join(", ")).or_default() += 1;
        }
    }
    kinds
}

/// In units of 1e9, by all cores together, the best of some runs; `None` where there is not enough memory to spare.
fn cpu_read(available: u64, cores: usize) -> Option<f64> {
    if available < 4 * BYTES as u64 {
        return None;
    }
    let values = vec![1u64; BYTES / 8];
    let share = values.len().div_ceil(cores);
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        let sum: u64 = thread::scope(|scope| {
            let readers: Vec<_> =
                values.chunks(share).map(|part| scope.spawn(move || part.iter().sum::<u64>())).collect();
            readers.into_iter().filter_map(|reader| reader.join().ok()).sum()
        });
        // The sum is used, so that nothing is left out.
        if sum != values.len() as u64 {
            return None;
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    Some(BYTES as f64 / best / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_by_kind() {
        let x86 = "processor : 0\nmodel name : A B\n\nprocessor : 1\nmodel name : A B\n\n";
        assert_eq!(processors(x86), BTreeMap::from([("A B".to_owned(), 2)]));
        let arm = |part: &str| format!("processor : 0\nCPU implementer : 0x41\nCPU part : {part}\n\n");
        let spark = processors(&[arm("0xd85"), arm("0xd87"), arm("0xd87")].concat());
        assert_eq!(spark["CPU implementer 0x41, CPU part 0xd87"], 2);
        assert_eq!(spark.len(), 2);
        assert!(processors("nothing").is_empty());
    }

    #[test]
    fn a_full_machine_is_not_filled_further() {
        assert_eq!(cpu_read(1 << 20, 2), None);
    }
}
