//! How much memory may be planned on a GPU that shares the machine's. Numbers only, no allocation.

/// Memory for the plan of the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// All of it, in bytes.
    pub total: u64,
    /// What may be allocated, in bytes.
    pub available: u64,
}

/// What is left to the system on a GPU that shares the machine's memory: 6 GiB. GB10 machines that were filled to the
/// last byte had to be switched off.
const RESERVE: u64 = 6 << 30;

/// The machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SharedMemory {
    total: u64,
    available: u64,
}

impl SharedMemory {
    /// `None` where `/proc/meminfo` does not say.
    pub(crate) fn read() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
        };
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")? })
    }

    /// What may be planned.
    pub(crate) fn budget(self) -> MemoryInfo {
        MemoryInfo { total: self.total, available: self.available.saturating_sub(RESERVE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_left_to_the_system() {
        let text = "MemTotal:       125829120 kB\nMemFree: 1 kB\nMemAvailable:   104857600 kB\n";
        let memory = SharedMemory::parse(text).unwrap();
        assert_eq!(memory.budget(), MemoryInfo { total: 120 << 30, available: 94 << 30 });
        let full = SharedMemory { total: 1 << 37, available: 5 << 30 };
        assert_eq!(full.budget().available, 0);
    }

    #[test]
    fn a_strange_file_is_no_answer() {
        assert_eq!(SharedMemory::parse("MemTotal: many kB\nMemAvailable: 1 kB\n"), None);
        assert_eq!(SharedMemory::parse("MemTotal: 1 kB\n"), None);
        assert_eq!(SharedMemory::parse("MemTotal: 18446744073709551615 kB\nMemAvailable: 1 kB\n"), None);
    }
}
