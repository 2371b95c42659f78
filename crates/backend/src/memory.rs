//! How much memory a device or the machine has: numbers, and the reader of the system's own.

use std::fs;

/// Memory that an engine may be sized by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it, in bytes.
    pub total: u64,
    /// What may still be taken, in bytes.
    pub available: u64,
    /// Whether the rest of the machine lives in it too: the machine's own memory, also as an integrated GPU sees it.
    pub is_shared: bool,
}

impl Memory {
    /// The machine's memory, from `/proc/meminfo`: available is what programs can still take without swapping. Where there
    /// is no such file the kernel is asked, whose count of free memory leaves out the page cache and so is on the low
    /// side.
    pub fn of_machine() -> Self {
        let parsed = fs::read_to_string("/proc/meminfo").ok().and_then(|text| Self::parse(&text));
        parsed.unwrap_or_else(|| {
            let info = rustix::system::sysinfo();
            let unit = u64::from(info.mem_unit.max(1));
            // The kernel's fields are as wide as a machine word.
            Self {
                total: info.totalram as u64 * unit,
                available: info.freeram as u64 * unit,
                is_shared: true,
            }
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
        };
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")?, is_shared: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_by_their_whole_name() {
        let text = "MemTotal:       100 kB\nMemFree: 1 kB\nMemAvailable:    50 kB\nMemTotalX: 7 kB\n";
        let memory = Memory { total: 102_400, available: 51_200, is_shared: true };
        assert_eq!(Memory::parse(text), Some(memory));
    }

    #[test]
    fn this_machine_has_memory() {
        let memory = Memory::of_machine();
        assert!(memory.available > 0 && memory.available <= memory.total, "{memory:?}");
    }

    #[test]
    fn a_strange_file_is_no_answer() {
        for text in [
            "MemTotal: many kB\nMemAvailable: 1 kB\n",
            "MemTotal: 1 kB\n",
            "MemTotal: 18446744073709551615 kB\nMemAvailable: 1 kB\n",
        ] {
            assert_eq!(Memory::parse(text), None, "{text}");
        }
    }
}
