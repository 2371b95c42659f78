//! What the machines that `plan` knows can do: figures, no measurements of this machine.

use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::cli::probe::SCHEMA_VERSION;

/// A machine, or two that are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Machine {
    /// One DGX Spark.
    Gb10,
    /// Two DGX Sparks with RoCE between them.
    Gb10x2,
    /// One H100 (80 GB).
    H100,
    /// Two H200 of one host.
    H200x2,
}

/// The figures of a machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hardware {
    pub(super) name: &'static str,
    /// GPUs, each with everything below.
    pub(super) ranks: usize,
    /// Bytes a second that a kernel can read; measured, not the data sheet's.
    pub(super) bandwidth: f64,
    /// Operations a second of `mma.sync` in bf16.
    pub(super) bf16: f64,
    /// Bytes for weights, KV cache and activations.
    pub(super) memory: f64,
    /// The collectives between the ranks.
    pub(super) link: Option<Link>,
}

/// Time of an all-reduce.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    /// Bytes and microseconds, ascending; between them a straight line.
    pub(super) small: &'static [(f64, f64)],
    /// Bytes a second beyond the last of them.
    pub(super) bandwidth: f64,
}

impl Link {
    /// Seconds of one all-reduce of `bytes`.
    pub(super) fn seconds(&self, bytes: f64) -> f64 {
        let Some(&(first, least)) = self.small.first() else { return bytes / self.bandwidth };
        let (mut from, mut micros) = (first, least);
        for &(to, next) in self.small {
            if bytes <= to {
                let share = if to > from { (bytes.max(from) - from) / (to - from) } else { 0.0 };
                return (micros + share * (next - micros)) * 1e-6;
            }
            (from, micros) = (to, next);
        }
        micros * 1e-6 + (bytes - from) / self.bandwidth
    }
}

impl Hardware {
    /// With what `spark-engine probe` measured on one of its GPUs in place of the figures here; collectives and memory stay.
    pub(super) fn measured(self, probe: &Value) -> anyhow::Result<Self> {
        let version = &probe["schema_version"];
        ensure!(*version == SCHEMA_VERSION, "schema_version must be {SCHEMA_VERSION}, is {version}");
        let number = |name: &str| {
            let value = probe["gpu"]["measured"][name].as_f64().filter(|value| *value > 0.0);
            value.with_context(|| format!("gpu.measured.{name} is missing: the GPU was not measured"))
        };
        Ok(Self {
            bandwidth: 1e9 * number("device_read_gb_per_s")?,
            bf16: 1e12 * number("mma_bf16_m16n8k16_tflops")?,
            ..self
        })
    }
}

/// Two Sparks under NCCL, as others have measured them.
const ROCE: Link =
    Link { small: &[(8192.0, 31.0), (16_384.0, 31.0), (32_768.0, 38.0), (65_536.0, 66.0)], bandwidth: 15e9 };
/// Two GPUs of one host under NCCL over NVLink.
const NVLINK: Link = Link { small: &[(65_536.0, 12.0), (1_048_576.0, 18.0)], bandwidth: 350e9 };
/// Left to the system where the GPU shares its memory.
const RESERVE: f64 = 6.0 * 1073741824.0;

impl Machine {
    pub(super) fn hardware(self) -> Hardware {
        let spark = Hardware {
            name: "one GB10",
            ranks: 1,
            bandwidth: 232e9,
            bf16: 107e12,
            memory: 121.69 * 1073741824.0 - RESERVE,
            link: None,
        };
        match self {
            Self::Gb10 => spark,
            Self::Gb10x2 => Hardware { name: "two GB10", ranks: 2, link: Some(ROCE), ..spark },
            Self::H100 => Hardware {
                name: "one H100",
                ranks: 1,
                bandwidth: 3.0e12,
                bf16: 600e12,
                memory: 0.9 * 81_559.0 * 1_048_576.0,
                link: None,
            },
            Self::H200x2 => Hardware {
                name: "two H200",
                ranks: 2,
                bandwidth: 4.3e12,
                bf16: 600e12,
                memory: 0.9 * 143_771.0 * 1_048_576.0,
                link: Some(NVLINK),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_probe_replaces_the_figures_of_a_gpu() {
        let measured = json!({"device_read_gb_per_s": 235.5, "mma_bf16_m16n8k16_tflops": 118});
        let probe = json!({"schema_version": SCHEMA_VERSION, "gpu": {"measured": measured}});
        let hardware = Machine::Gb10x2.hardware().measured(&probe).unwrap();
        assert_eq!((hardware.bandwidth, hardware.bf16, hardware.ranks), (235.5e9, 118e12, 2));
        for (probe, word) in [
            (json!({"schema_version": SCHEMA_VERSION, "missing": {"gpu": "none"}}), "not measured"),
            (json!({"schema_version": 99}), "must be 1, is 99"),
            (json!([1]), "is null"),
        ] {
            let error = Machine::Gb10.hardware().measured(&probe).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn an_all_reduce_takes_the_latency_then_the_bandwidth() {
        let micros = |bytes: f64| (ROCE.seconds(bytes) * 1e6).round();
        assert_eq!([0.0, 8192.0, 16_384.0, 24_576.0, 65_536.0].map(micros), [31.0, 31.0, 31.0, 35.0, 66.0]);
        assert_eq!(micros(65_536.0 + 15e6), 1066.0);
    }
}
