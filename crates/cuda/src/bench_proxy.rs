//! A GB10 on another GPU: the decode kernels at the shapes of half a 235B, on as many multiprocessors as a GB10 has. Whatever
//! moves bytes faster there than a GB10's memory gives them is not what limits a GB10.
//!
//! The shapes are timed by `bench.rs`, `bench_decode.rs` and `bench_attention.rs`, here on a stream that has a part of the
//! device (`sm_group.rs`). Whether its kernels really stay there is tested before anything is timed.

use spark_backend::{Dtype, KvDtype};

use crate::bench::{Bench, LAUNCHES, NUM_EXPERTS, TOP_K, Timing, arbitrary_choices};
use crate::bench_gemm::{Scheme, memory};
use crate::kernels::Probe;
use crate::{Cubins, Device, Error, Kernels, Result, Stream, bench_attention, bench_decode};

/// Multiprocessors of a GB10.
pub const GB10_SMS: u32 = 48;
/// Bytes a second that kernels read on a GB10, in units of 1e9.
pub const GB10_GB_PER_SECOND: f64 = 232.0;
/// Operations a second of its tensor cores in bf16, in units of 1e12.
pub const GB10_TFLOPS: f64 = 107.0;
/// How much faster than a GB10's memory a kernel must be, and should be, so that the memory alone counts.
const MUST: f64 = 1.5;
const GOAL: f64 = 2.5;

const ROWS: [usize; 4] = [1, 4, 16, 64];
const HIDDEN: usize = 4096;
const INTERMEDIATE: usize = 768;
/// qkv and o of a rank, in outputs.
const LINEARS: [usize; 2] = [4608, 4096];
const VOCAB: usize = 75_968;
/// Query and kv heads of a rank; tokens in the cache.
const HEADS: [usize; 2] = [32, 2];
const CONTEXT: usize = 4096;
const COPY_BYTES: u64 = 256 << 20;

/// One kernel at one batch.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxyTiming {
    /// Time and bytes.
    pub timing: Timing,
    /// Multiplications and additions of the tensor cores' instructions that it takes, padding counted.
    pub num_operations: f64,
}

impl ProxyTiming {
    /// Whether a GB10's tensor cores would take longer than its memory.
    pub fn is_bound_by_operations(&self) -> bool {
        self.num_operations / (1e3 * GB10_TFLOPS) > self.timing.num_bytes as f64 / GB10_GB_PER_SECOND
    }

    /// How many times faster it is than what limits a GB10: its memory, or its tensor cores.
    pub fn times_gb10(&self) -> f64 {
        match self.is_bound_by_operations() {
            true => self.num_operations / self.timing.micros / 1e6 / GB10_TFLOPS,
            false => self.timing.gb_per_second() / GB10_GB_PER_SECOND,
        }
    }
}

/// All measurements of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxyReport {
    /// Multiprocessors that were used.
    pub num_sms: u32,
    /// What a copy of a large region reaches on them, reads and writes counted.
    pub copy: Timing,
    /// The kernels.
    pub kernels: Vec<ProxyTiming>,
}

impl ProxyReport {
    /// Those that are less than `factor` times as fast as what limits a GB10.
    fn slower_than(&self, factor: f64) -> usize {
        self.kernels.iter().filter(|kernel| kernel.times_gb10() < factor).count()
    }
}

impl std::fmt::Display for ProxyReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:14} {:28} {:>9} {:>9} {:>9} {:>8} {:>7}  limit of a GB10",
            "kernel", "shape", "us", "GB/s", "% of copy", "TFLOPS", "x GB10"
        )?;
        let ceiling = self.copy.gb_per_second();
        let copy = ProxyTiming { timing: self.copy.clone(), num_operations: 0.0 };
        for kernel in std::iter::once(&copy).chain(&self.kernels) {
            let Timing { name, shape, micros, .. } = &kernel.timing;
            let speed = kernel.timing.gb_per_second();
            let share = 100.0 * speed / ceiling;
            let tera = kernel.num_operations / micros / 1e6;
            let times = kernel.times_gb10();
            let limit = if kernel.is_bound_by_operations() { "tensor cores" } else { "memory" };
            writeln!(
                f,
                "{name:14} {shape:28} {micros:>9.2} {speed:>9.1} {share:>9.1} {tera:>8.1} {times:>7.2}  {limit}"
            )?;
        }
        writeln!(
            f,
            "{} of {} kernels on {} multiprocessors are under {MUST} times a GB10 ({:.0} GB/s, {GB10_TFLOPS} TFLOPS), {} under \
             {GOAL} times",
            self.slower_than(MUST),
            self.kernels.len(),
            self.num_sms,
            GB10_GB_PER_SECOND,
            self.slower_than(GOAL)
        )
    }
}

/// Measures on `num_sms` multiprocessors of `device`.
///
/// # Errors
/// What [`Stream::on_sms`] and launching say; [`Error::Shape`] when the driver lets recorded kernels run elsewhere;
/// [`Error::Memory`] with less than about 4 GB free.
pub fn run(device: &Device, cubins: &Cubins, kernels: &Kernels, num_sms: u32) -> Result<ProxyReport> {
    let probe = Probe::load(device, cubins)?;
    let bench = Bench { stream: Stream::on_sms(device, num_sms)?, kernels };
    stays_on(&bench, &probe, num_sms)?;
    let copy = copy(&bench, &probe)?;
    let mut timings = Vec::new();
    for n in LINEARS {
        timings.extend(linear(&bench, n, Scheme::Int4(128), Dtype::Bf16)?);
    }
    timings.extend(experts(&bench)?);
    let routed = bench_decode::route(&bench, HIDDEN)?;
    let of_rows =
        |timing: &Timing| ROWS.iter().position(|rows| timing.shape.starts_with(&format!("{rows} x ")));
    timings.extend(routed.into_iter().filter_map(|timing| {
        let rows = ROWS[of_rows(&timing)?];
        Some(ProxyTiming { timing, num_operations: operations(rows, NUM_EXPERTS, HIDDEN) })
    }));
    for scheme in [Scheme::Bf16, Scheme::Fp8] {
        timings.extend(linear(&bench, VOCAB, scheme, Dtype::F32)?);
    }
    for rows in ROWS {
        timings.push(ProxyTiming { timing: bench.norm(rows, HIDDEN)?, num_operations: 0.0 });
    }
    for rows in ROWS {
        let found = bench_attention::decode(&bench, HEADS, KvDtype::Fp8, rows, CONTEXT)?;
        let timing = Timing {
            name: "attend fp8",
            shape: found.shape,
            micros: found.micros,
            num_bytes: found.num_bytes,
        };
        timings.push(ProxyTiming { timing, num_operations: found.num_operations });
    }
    Ok(ProxyReport { num_sms, copy, kernels: timings })
}

/// An error unless kernels of a graph run on `num_sms` multiprocessors, all of them and no other.
fn stays_on(bench: &Bench<'_>, probe: &Probe, num_sms: u32) -> Result<()> {
    let [words] = memory(bench.device(), [64])?;
    bench.stream.fill(&words, 0)?;
    let graph = bench.stream.record(|| probe.mark_sms(&bench.stream, &words))?;
    graph.launch(&bench.stream)?;
    let marked: u32 = bench.stream.download::<u32>(&words, 16)?.iter().map(|word| word.count_ones()).sum();
    match marked == num_sms {
        true => Ok(()),
        false => {
            Err(Error::shape("kernels in a graph", format!("to run on {num_sms} multiprocessors"), marked))
        }
    }
}

fn copy(bench: &Bench<'_>, probe: &Probe) -> Result<Timing> {
    let [source, target] = memory(bench.device(), [COPY_BYTES; 2])?;
    bench.stream.fill(&source, 1)?;
    let micros = bench.time(4, |_| probe.copy(&bench.stream, &target, &source))?;
    Ok(Timing { name: "copy", shape: "256 MiB".to_owned(), micros, num_bytes: 2 * COPY_BYTES })
}

fn linear(bench: &Bench<'_>, n: usize, scheme: Scheme, out: Dtype) -> Result<Vec<ProxyTiming>> {
    let timings = bench_decode::linear(bench, [n, HIDDEN], scheme, out, &ROWS)?;
    let with_operations = timings.into_iter().zip(ROWS).map(|(timing, rows)| {
        // No projection of attention has the size of the head.
        let name = if n == VOCAB { "lm_head" } else { timing.name };
        ProxyTiming { timing: Timing { name, ..timing }, num_operations: operations(rows, n, HIDDEN) }
    });
    Ok(with_operations.collect())
}

fn experts(bench: &Bench<'_>) -> Result<Vec<ProxyTiming>> {
    let timings = bench_decode::experts(bench, [HIDDEN, INTERMEDIATE], Scheme::Int4(128), &ROWS)?;
    // Two for each number of rows.
    let rows = ROWS.iter().flat_map(|rows| [rows; 2]);
    let with_operations = timings.into_iter().zip(rows).map(|(timing, &rows)| {
        let num_operations = 6.0 * padded_pairs(rows) * (HIDDEN * INTERMEDIATE) as f64;
        ProxyTiming { timing, num_operations }
    });
    Ok(with_operations.collect())
}

/// Operations of a product whose rows are computed 8 at a time.
fn operations(rows: usize, n: usize, k: usize) -> f64 {
    2.0 * rows.next_multiple_of(8) as f64 * n as f64 * k as f64
}

/// Pairs of a row and an expert in a launch with every expert's rows padded to 8, in the mean over the launches.
fn padded_pairs(rows: usize) -> f64 {
    let padded = |launch: &[u32]| {
        let mut counts = [0usize; NUM_EXPERTS];
        launch.iter().for_each(|&expert| counts[expert as usize] += 1);
        counts.iter().map(|count| count.next_multiple_of(8)).sum::<usize>()
    };
    let sum: usize = arbitrary_choices(rows).chunks(rows * TOP_K).map(padded).sum();
    sum as f64 / LAUNCHES as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(num_bytes: u64, num_operations: f64) -> ProxyTiming {
        let timing = Timing { name: "linear", shape: "s".into(), micros: 10.0, num_bytes };
        ProxyTiming { timing, num_operations }
    }

    #[test]
    fn the_limit_of_a_gb10_is_what_takes_longer_there() {
        // 10 us at 232 GB/s and at 107 TFLOPS.
        let (bytes, operations) = (2_320_000, 1.07e9);
        let memory = kernel(2 * bytes, operations);
        assert!(!memory.is_bound_by_operations());
        assert!((memory.times_gb10() - 2.0).abs() < 1e-9);
        let tensor = kernel(bytes, 3.0 * operations);
        assert!(tensor.is_bound_by_operations());
        assert!((tensor.times_gb10() - 3.0).abs() < 1e-9);
    }

    #[test]
    fn the_last_line_counts_the_slow_ones() {
        let kernels = vec![kernel(2_320_000, 0.0), kernel(4_640_000, 0.0), kernel(9_280_000, 0.0)];
        let copy = Timing { name: "copy", shape: "s".into(), micros: 1.0, num_bytes: 1_160_000 };
        let text = ProxyReport { num_sms: 48, copy, kernels }.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 6);
        let words: Vec<&str> = lines[3].split_whitespace().collect();
        assert_eq!(words, ["linear", "s", "10.00", "464.0", "40.0", "0.0", "2.00", "memory"]);
        assert!(lines[5].starts_with("1 of 3 kernels on 48 multiprocessors are under 1.5 times"), "{text}");
        assert!(lines[5].ends_with(", 2 under 2.5 times"), "{text}");
    }

    #[test]
    fn few_rows_are_padded() {
        assert_eq!(operations(1, 16, 32), 8192.0);
        // One row: every chosen expert has one row.
        assert_eq!(padded_pairs(1), 64.0);
        // 4 rows of each expert in the mean: nearly all are padded to 8, few have more.
        assert!((1000.0..1100.0).contains(&padded_pairs(64)), "{}", padded_pairs(64));
    }
}
