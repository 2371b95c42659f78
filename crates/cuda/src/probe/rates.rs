//! Operations a second of the tensor cores by type, held for a second each, with the clocks meanwhile.

use std::time::Duration;

use super::{Bed, Findings};
use crate::bench_gemm::memory;
use crate::kernels::MmaType;
use crate::nvml::Nvml;
use crate::{DeviceSlice, Event, Result};

/// Products of a chain while the rate is looked for.
const FIRST_REPEATS: u32 = 1024;
/// Microseconds of a launch, launches of the load, and when its clocks are looked at: once they have settled.
const LAUNCH_MICROS: f64 = 20_000.0;
const LAUNCHES: usize = 60;
const SETTLE: Duration = Duration::from_millis(800);

pub(super) fn measure(bed: &Bed, findings: &mut Findings) {
    let nvml = match bed.stream.device().bus_id().and_then(|bus_id| Nvml::open(&bus_id)) {
        Ok(nvml) => Some(nvml),
        Err(error) => {
            findings.missing.push(("clocks_under_load".to_owned(), error.to_string()));
            None
        }
    };
    for mma in MmaType::ALL {
        let name = match mma {
            MmaType::Bf16 => "mma_bf16_m16n8k16",
            MmaType::E4m3 => "mma_e4m3_m16n8k32",
            MmaType::E2m1 => "mma_mxf4nvf4_m16n8k64",
        };
        if !mma.exists(bed.stream.device().arch()) {
            let why = format!("not among the instructions for {}", bed.stream.device().arch());
            findings.missing.push((name.to_owned(), why));
            continue;
        }
        findings.attempt(name, |findings| load(bed, mma, name, nvml.as_ref(), findings));
    }
}

fn load(bed: &Bed, mma: MmaType, name: &str, nvml: Option<&Nvml>, findings: &mut Findings) -> Result<()> {
    let [out] = memory(bed.stream.device(), [32])?;
    bed.stream.fill(&out, 0)?;
    // The first launch loads the kernel.
    timed(bed, mma, [FIRST_REPEATS, 1], &out, || {})?;
    let (_, micros) = timed(bed, mma, [FIRST_REPEATS, 1], &out, || {})?;
    let repeats = (f64::from(FIRST_REPEATS) * LAUNCH_MICROS / micros.max(1.0)).clamp(1.0, 1e8) as u32;
    let mut clocks = Vec::new();
    let (operations, micros) = timed(bed, mma, [repeats, LAUNCHES as u32], &out, || {
        if let Some(nvml) = nvml {
            std::thread::sleep(SETTLE);
            clocks = nvml.now();
        }
    })?;
    findings.add(format!("{name}_tflops"), operations / micros / 1e6);
    let [cycles, nanos] = bed.stream.download::<u64>(&out, 2)?[..] else { return Ok(()) };
    if nanos > 0 {
        let hertz = cycles as f64 / nanos as f64 * 1e9;
        findings.add(format!("{name}_sm_clock_mhz"), hertz / 1e6);
        let num_sms = f64::from(bed.stream.num_sms());
        findings.add(
            format!("{name}_operations_per_cycle_and_sm"),
            operations / (micros / 1e6) / hertz / num_sms,
        );
    }
    for (value, number) in clocks {
        findings.add(format!("{name}_nvml_{value}"), number);
    }
    Ok(())
}

/// Operations and microseconds of `launches` with so many repeats; `meanwhile` runs on the host.
fn timed(
    bed: &Bed,
    mma: MmaType,
    [repeats, launches]: [u32; 2],
    out: &DeviceSlice,
    meanwhile: impl FnOnce(),
) -> Result<(f64, f64)> {
    let (start, end) = (Event::new(bed.stream.device())?, Event::new(bed.stream.device())?);
    let mut operations = 0.0;
    start.record(&bed.stream)?;
    for _ in 0..launches {
        operations += bed.kernels.multiply(&bed.stream, mma, repeats, out)?.unwrap_or(0.0);
    }
    end.record(&bed.stream)?;
    meanwhile();
    end.synchronize()?;
    Ok((operations, end.micros_since(&start)?))
}
