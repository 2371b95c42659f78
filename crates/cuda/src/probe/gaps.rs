//! Microseconds between kernels that do nothing: launched one by one or recorded, one after the other or overlapping.

use std::time::Instant;

use super::{Bed, Findings};
use crate::bench::time;
use crate::kernels::Empty;
use crate::{Event, Result};

/// Kernels in a row.
const LAUNCHES: usize = 400;
const REPEATS: usize = 7;
/// How long the device is kept busy while the host puts kernels behind: longer than that takes.
const BUSY_MICROS: u32 = 8_000;
const WAYS: [(Empty, &str); 3] =
    [(Empty::Ordered, ""), (Empty::Overlapped, "_overlapped"), (Empty::OverlappedEarly, "_overlapped_early")];

pub(super) fn measure(bed: &Bed, findings: &mut Findings) {
    let overlaps = bed.stream.device().arch().has_dependent_launch();
    for (how, suffix) in WAYS.into_iter().filter(|(how, _)| overlaps || *how == Empty::Ordered) {
        findings.attempt(&format!("gap{suffix}_us"), |findings| {
            let [device, host] = launched(bed, how)?;
            findings.add(format!("launch_gap{suffix}_us"), device);
            findings.add(format!("launch_host{suffix}_us"), host);
            let recorded = time(&bed.stream, LAUNCHES, |_| bed.kernels.empty(&bed.stream, how))?;
            findings.add(format!("graph_gap{suffix}_us"), recorded);
            Ok(())
        });
    }
    findings.attempt("round_trip_us", |findings| {
        findings.add("round_trip_us", round_trip(bed)?);
        Ok(())
    });
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Of the device from one kernel to the next when all of them wait for it already; of the host to launch one.
fn launched(bed: &Bed, how: Empty) -> Result<[f64; 2]> {
    let (start, end) = (Event::new(bed.stream.device())?, Event::new(bed.stream.device())?);
    let [mut device, mut host] = [Vec::new(), Vec::new()];
    for _ in 0..REPEATS {
        bed.kernels.spin(&bed.stream, BUSY_MICROS)?;
        start.record(&bed.stream)?;
        let began = Instant::now();
        (0..LAUNCHES).try_for_each(|_| bed.kernels.empty(&bed.stream, how))?;
        host.push(began.elapsed().as_secs_f64() * 1e6 / LAUNCHES as f64);
        end.record(&bed.stream)?;
        end.synchronize()?;
        device.push(end.micros_since(&start)? / LAUNCHES as f64);
    }
    Ok([median(device), median(host)])
}

/// From a launch to the host knowing that the kernel has run.
fn round_trip(bed: &Bed) -> Result<f64> {
    bed.stream.synchronize()?;
    let mut times = Vec::with_capacity(LAUNCHES);
    for _ in 0..LAUNCHES {
        let began = Instant::now();
        bed.kernels.empty(&bed.stream, Empty::Ordered)?;
        bed.stream.synchronize()?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(median(times))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
        assert!(median(Vec::new()).is_nan());
    }
}
