//! Times of the kernels at the shapes of the published models: microseconds, bytes moved a second, and the share of what
//! a plain copy reaches in the same run.
//!
//! Every kernel runs in a graph over changing memory, more than the second-level cache holds, so that a weight is read
//! from memory as in a model. Small activations stay in the cache, as in a model: there are no more pieces than launches. The time of a launch is that of the graph divided by its launches.

use spark_backend::{Bytes, Dtype, LinearWeight, Matrix, MatrixData};

use crate::{
    Arena, ArenaPlan, Device, DeviceSlice, Event, Kernels, Linear, PackedHost, ReduceNorm, Result, Stream,
    Tensor,
};

/// One measurement.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// The kernel.
    pub name: &'static str,
    /// Its shape, for people.
    pub shape: String,
    /// Median time of a launch.
    pub micros: f64,
    /// Bytes that a launch must move.
    pub num_bytes: u64,
}

impl Timing {
    /// Bytes a second, in units of 1e9.
    pub fn gb_per_second(&self) -> f64 {
        self.num_bytes as f64 / self.micros / 1e3
    }
}

/// All measurements of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// What a copy of a large region reaches, reads and writes counted.
    pub copy: Timing,
    /// The kernels.
    pub kernels: Vec<Timing>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:14} {:28} {:>9} {:>9} {:>9}", "kernel", "shape", "us", "GB/s", "% of copy")?;
        let ceiling = self.copy.gb_per_second();
        for timing in std::iter::once(&self.copy).chain(&self.kernels) {
            let (speed, share) = (timing.gb_per_second(), 100.0 * timing.gb_per_second() / ceiling);
            writeln!(
                f,
                "{:14} {:28} {:>9.2} {speed:>9.1} {share:>9.1}",
                timing.name, timing.shape, timing.micros
            )?;
        }
        Ok(())
    }
}

/// Memory that the launches of a graph go through, this many times the second-level cache where pieces are large enough.
const CACHE_FACTOR: u64 = 4;
/// Launches in a graph.
pub(crate) const LAUNCHES: usize = 48;
const REPEATS: usize = 7;
/// Bytes of the copy that is the ceiling.
const COPY_BYTES: u64 = 256 << 20;

/// Widths of the residual of Qwen3-VL-30B-A3B and 235B-A22B.
const HIDDEN: [usize; 2] = [2048, 4096];
/// Experts of a layer of the 30B, and how many a row chooses; their sizes.
pub(crate) const NUM_EXPERTS: usize = 128;
pub(crate) const TOP_K: usize = 8;
pub(crate) const EXPERT_HIDDEN: usize = 2048;
pub(crate) const EXPERT_INTERMEDIATE: usize = 768;

/// Measures all kernels on `device`.
///
/// # Errors
/// What launching says; [`crate::Error::Memory`] with less than about 2 GB free.
pub fn run(device: &Device, kernels: &Kernels) -> Result<Report> {
    let bench = Bench { stream: Stream::new(device)?, kernels };
    let copy = bench.copy()?;
    let mut timings = Vec::new();
    for hidden in HIDDEN {
        for rows in [1, 32, 2048] {
            timings.push(bench.norm(rows, hidden)?);
        }
    }
    for rows in [1, 32, 2048] {
        timings.push(bench.embed(rows, 2048)?);
    }
    for (rows, intermediate) in [(8, 768), (256, 768), (4096, 1536)] {
        timings.push(bench.swiglu(rows, intermediate)?);
    }
    timings.extend(crate::bench_decode::run(&bench)?);
    Ok(Report { copy, kernels: timings })
}

pub(crate) struct Bench<'a> {
    pub(crate) stream: Stream,
    pub(crate) kernels: &'a Kernels,
}

impl Bench<'_> {
    pub(crate) fn device(&self) -> &Device {
        self.stream.device()
    }

    /// As many pieces of `num_bytes` as it takes to go past the cache, at most one for each launch: small ones stay in it.
    pub(crate) fn pieces(&self, num_bytes: u64) -> Result<Vec<DeviceSlice>> {
        let wanted = CACHE_FACTOR * self.device().properties().l2_bytes;
        let count = wanted.div_ceil(num_bytes).clamp(2, LAUNCHES as u64);
        let mut plan = ArenaPlan::default();
        let regions = (0..count).map(|_| plan.add("piece", num_bytes)).collect::<Result<Vec<_>>>()?;
        let arena = Arena::new(self.device(), plan)?;
        let slices: Vec<DeviceSlice> =
            regions.into_iter().map(|region| arena.region(region)).collect::<Result<_>>()?;
        // Zeros are valid values of every type here.
        for slice in &slices {
            self.stream.fill(slice, 0)?;
        }
        Ok(slices)
    }

    /// Median time of `launch(i)` in a graph of launches.
    pub(crate) fn time(&self, launches: usize, launch: impl Fn(usize) -> Result<()>) -> Result<f64> {
        time(&self.stream, launches, launch)
    }

    pub(crate) fn copy(&self) -> Result<Timing> {
        let mut plan = ArenaPlan::default();
        let regions = [plan.add("source", COPY_BYTES)?, plan.add("target", COPY_BYTES)?];
        let arena = Arena::new(self.device(), plan)?;
        let [source, target] = [arena.region(regions[0])?, arena.region(regions[1])?];
        self.stream.fill(&source, 1)?;
        let micros = self.time(4, |_| self.stream.copy(&target, &source))?;
        Ok(Timing { name: "copy", shape: "256 MiB".to_owned(), micros, num_bytes: 2 * COPY_BYTES })
    }

    pub(crate) fn norm(&self, rows: usize, hidden: usize) -> Result<Timing> {
        let bytes = 2 * (rows * hidden) as u64;
        let weight_bytes = 2 * hidden as u64;
        let pieces = self.pieces(3 * bytes + weight_bytes)?;
        let tensors = pieces
            .iter()
            .map(|piece| {
                let matrix =
                    |i: u64| Tensor::new(&piece.slice(i * bytes, bytes)?, [rows, hidden], Dtype::Bf16);
                let weight = piece.slice(3 * bytes, weight_bytes)?;
                Ok((matrix(0)?, matrix(1)?, matrix(2)?, Tensor::new(&weight, [1, hidden], Dtype::Bf16)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let micros = self.time(LAUNCHES, |i| {
            let (partial, residual, out, weight) = &tensors[i % tensors.len()];
            let args = ReduceNorm { partial: Some(partial), residual, weight, eps: 1e-6 };
            self.kernels.reduce_norm(&self.stream, args, out)
        })?;
        Ok(Timing {
            name: "reduce_norm",
            shape: format!("{rows} x {hidden} bf16"),
            micros,
            num_bytes: 4 * bytes + weight_bytes,
        })
    }

    fn embed(&self, rows: usize, hidden: usize) -> Result<Timing> {
        /// Rows of the table: enough to be past the cache.
        const VOCAB: usize = 32_768;
        let out_bytes = 2 * (rows * hidden) as u64;
        let values = Bytes::from(vec![0; 2 * VOCAB * hidden]);
        let data = MatrixData::Dense { dtype: Dtype::Bf16, values };
        let parts = vec![Matrix { n: VOCAB, k: hidden, data }];
        let host = [PackedHost::pack(&LinearWeight { parts, bias: None })?];
        let mut plan = ArenaPlan::default();
        let regions = [
            plan.add("table", Linear::num_bytes(&host))?,
            plan.add("tokens", 4 * (LAUNCHES * rows) as u64)?,
            plan.add("out", out_bytes)?,
        ];
        let arena = Arena::new(self.device(), plan)?;
        let [table, tokens, out] =
            [arena.region(regions[0])?, arena.region(regions[1])?, arena.region(regions[2])?];
        let table = Linear::upload(&self.stream, &table, &host)?;
        // A multiplicative hash: tokens all over the table.
        let ids: Vec<u32> =
            (0..(LAUNCHES * rows) as u32).map(|i| i.wrapping_mul(2_654_435_769) >> 17).collect();
        self.stream.upload(&tokens, &ids)?;
        let out = Tensor::new(&out, [rows, hidden], Dtype::Bf16)?;
        let micros = self.time(LAUNCHES, |i| {
            let of_launch = tokens.slice(4 * (i * rows) as u64, 4 * rows as u64)?;
            self.kernels.embed(&self.stream, &of_launch, &tokens, &table, 0, &out)
        })?;
        let shape = format!("{rows} x {hidden} bf16");
        Ok(Timing { name: "embed", shape, micros, num_bytes: 2 * out_bytes })
    }

    fn swiglu(&self, rows: usize, intermediate: usize) -> Result<Timing> {
        let bytes = 2 * (rows * intermediate) as u64;
        let pieces = self.pieces(3 * bytes)?;
        let tensors = pieces
            .iter()
            .map(|piece| {
                let gate_up =
                    Tensor::new(&piece.slice(0, 2 * bytes)?, [rows, 2 * intermediate], Dtype::Bf16)?;
                let out = Tensor::new(&piece.slice(2 * bytes, bytes)?, [rows, intermediate], Dtype::Bf16)?;
                Ok((gate_up, out))
            })
            .collect::<Result<Vec<_>>>()?;
        let micros = self.time(LAUNCHES, |i| {
            let (gate_up, out) = &tensors[i % tensors.len()];
            self.kernels.swiglu(&self.stream, gate_up, out)
        })?;
        let shape = format!("{rows} x {intermediate} bf16");
        Ok(Timing { name: "swiglu", shape, micros, num_bytes: 3 * bytes })
    }
}

/// Median time of `launch(i)` in a graph of launches on `stream`.
pub(crate) fn time(stream: &Stream, launches: usize, launch: impl Fn(usize) -> Result<()>) -> Result<f64> {
    let graph = stream.record(|| (0..launches).try_for_each(&launch))?;
    graph.upload(stream)?;
    let (start, end) = (Event::new(stream.device())?, Event::new(stream.device())?);
    let mut times = Vec::with_capacity(REPEATS);
    for repeat in 0..=REPEATS {
        start.record(stream)?;
        graph.launch(stream)?;
        end.record(stream)?;
        end.synchronize()?;
        // The first run warms up.
        if repeat > 0 {
            times.push(end.micros_since(&start)? / launches as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}

/// Distinct experts of a launch, in the mean.
pub(crate) fn mean_distinct(chosen: &[u32]) -> f64 {
    let distinct = |launch: &[u32]| launch.iter().collect::<std::collections::HashSet<_>>().len();
    let sum: usize = chosen.chunks(chosen.len() / LAUNCHES).map(distinct).sum();
    sum as f64 / LAUNCHES as f64
}

/// Experts of every row of every launch, without repetition in a row: spread by a multiplicative hash, as uniform routing is.
pub(crate) fn arbitrary_choices(rows: usize) -> Vec<u32> {
    let mut chosen: Vec<u32> = Vec::with_capacity(LAUNCHES * rows * TOP_K);
    let mut seed = 1u32;
    for row in 0..LAUNCHES * rows {
        while chosen.len() < (row + 1) * TOP_K {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let expert = (seed >> 16) % NUM_EXPERTS as u32;
            if !chosen[row * TOP_K..].contains(&expert) {
                chosen.push(expert);
            }
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_do_not_repeat_in_a_row_and_hit_as_many_experts_as_uniform_ones() {
        let chosen = arbitrary_choices(8);
        assert_eq!(chosen.len(), LAUNCHES * 8 * TOP_K);
        assert!(chosen.chunks(TOP_K).all(|row| (0..TOP_K).all(|i| !row[..i].contains(&row[i]))));
        // 128 * (1 - (1 - 8 / 128)^8) = 51.6.
        let distinct = mean_distinct(&chosen);
        assert!((distinct - 51.6).abs() < 3.0, "{distinct}");
    }

    #[test]
    fn the_table_shows_the_share_of_the_ceiling() {
        let timing = |name, micros| Timing { name, shape: "s".into(), micros, num_bytes: 3_000_000 };
        let report = Report { copy: timing("copy", 1.0), kernels: vec![timing("norm", 2.0)] };
        let text = report.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("copy") && lines[1].ends_with("3000.0     100.0"), "{text}");
        assert!(lines[2].starts_with("norm") && lines[2].ends_with("1500.0      50.0"), "{text}");
    }
}
