//! Times of what ranks do together: sums of the sizes that steps add, one after the other, launched one by one and in a graph.
//! All ranks of the group run this at once. What a step hides behind other work is not seen here.

use spark_backend::Dtype;

use crate::{
    Arena, ArenaPlan, Device, Event, Kernels, Mailboxes, ReduceNorm, Result, Stream, Team, Tensor, bench,
};

/// Bytes of a message: a row of hidden size 4096 to what a prefill of a thousand such rows adds.
pub const SIZES: [u64; 8] = [8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20, 8 << 20];
/// Sums in a decode step of Qwen3-VL-235B-A22B, without that of the embedding; and fewer of the large ones, which take long.
const LAUNCHES: usize = 188;
const LARGE_LAUNCHES: usize = 24;
const LARGE: u64 = 512 << 10;
const REPEATS: usize = 7;
/// Hidden size of Qwen3-VL-235B-A22B, and rows of its decode steps.
const COLUMNS: usize = 4096;
const ROWS: [usize; 5] = [1, 4, 16, 64, 128];

/// Times of one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TeamTiming {
    /// Bytes of a message.
    pub num_bytes: u64,
    /// Microseconds of a sum that is launched by itself.
    pub eager: f64,
    /// Microseconds of a sum in a graph of as many.
    pub in_graph: f64,
}

/// All sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct TeamReport {
    /// Ranks.
    pub world: usize,
    /// Ascending.
    pub sums: Vec<TeamTiming>,
    /// The sum and the norm behind it: rows of 4096 columns.
    pub norms: Vec<NormTiming>,
}

/// Times of a sum with the norm behind it, in a graph.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormTiming {
    /// Rows.
    pub rows: usize,
    /// Microseconds with NCCL's sum.
    pub library: f64,
    /// Microseconds with the sum in the same launch, where GPUs reach each other.
    pub mailboxes: Option<f64>,
}

impl std::fmt::Display for TeamReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "sums of bf16 over {} ranks, {LAUNCHES} one after the other (large ones {LARGE_LAUNCHES}), median of {REPEATS}",
            self.world
        )?;
        writeln!(f, "{:>10} {:>10} {:>10} {:>12}", "bytes", "eager us", "graph us", "graph GB/s")?;
        for TeamTiming { num_bytes, eager, in_graph } in &self.sums {
            let speed = *num_bytes as f64 / in_graph / 1e3;
            writeln!(f, "{num_bytes:>10} {eager:>10.1} {in_graph:>10.1} {speed:>12.2}")?;
        }
        writeln!(f, "{:>10} {:>10} {:>10}  sum and norm in a graph", "rows", "NCCL us", "own us")?;
        for NormTiming { rows, library, mailboxes } in &self.norms {
            let own = mailboxes.map_or_else(|| "-".to_owned(), |micros| format!("{micros:.1}"));
            writeln!(f, "{rows:>10} {library:>10.1} {own:>10}")?;
        }
        Ok(())
    }
}

/// Measures with all ranks of `team`.
///
/// # Errors
/// [`crate::Error::Group`], [`crate::Error::Memory`], [`crate::Error::Driver`].
pub fn run(device: &Device, team: &Team, kernels: &Kernels) -> Result<TeamReport> {
    let stream = Stream::new(device)?;
    let mut plan = ArenaPlan::default();
    let region = plan.add("messages", SIZES[SIZES.len() - 1])?;
    let memory = Arena::new(device, plan)?.region(region)?;
    stream.fill(&memory, 0)?;
    let sums = SIZES.iter().map(|&num_bytes| {
        let x = Tensor::new(&memory, [1, (num_bytes / 2) as usize], Dtype::Bf16)?;
        let launches = if num_bytes < LARGE { LAUNCHES } else { LARGE_LAUNCHES };
        let eager = eager(&stream, launches, || team.all_reduce(&stream, &x))?;
        let in_graph = bench::time(&stream, launches, |_| team.all_reduce(&stream, &x))?;
        Ok(TeamTiming { num_bytes, eager, in_graph })
    });
    let sums = sums.collect::<Result<_>>()?;
    let mailboxes = Mailboxes::open(device, &stream, team, COLUMNS)?;
    let norm = |&rows: &usize| norm(&stream, team, kernels, mailboxes.as_ref(), rows);
    let norms = ROWS.iter().map(norm).collect::<Result<_>>()?;
    team.check()?;
    Ok(TeamReport { world: team.rank().world(), sums, norms })
}

/// A sum of `rows` and the norm behind it, both ways.
fn norm(
    stream: &Stream,
    team: &Team,
    kernels: &Kernels,
    mailboxes: Option<&Mailboxes>,
    rows: usize,
) -> Result<NormTiming> {
    let mut plan = ArenaPlan::default();
    let shape = [rows, COLUMNS];
    let regions = [0; 3].map(|_| plan.add("rows", 2 * (rows * COLUMNS) as u64));
    let weight = plan.add("weight", 2 * COLUMNS as u64)?;
    let [partial, residual, out] = regions;
    let regions = [partial?, residual?, out?];
    let arena = Arena::new(stream.device(), plan)?;
    let tensor = |region, shape| {
        let slice = arena.region(region)?;
        stream.fill(&slice, 0)?;
        Tensor::new(&slice, shape, Dtype::Bf16)
    };
    let [partial, residual, out] = regions.map(|region| tensor(region, shape));
    let (partial, residual, out, weight) = (partial?, residual?, out?, tensor(weight, [1, COLUMNS])?);
    let args = ReduceNorm { partial: Some(&partial), residual: &residual, weight: &weight, eps: 1e-6 };
    let library = bench::time(stream, LAUNCHES, |_| {
        team.all_reduce(stream, &partial)?;
        kernels.reduce_norm(stream, args, &out)
    })?;
    let own = mailboxes.map(|mailboxes| {
        bench::time(stream, LAUNCHES, |_| kernels.reduce_norm_ranks(stream, mailboxes, args, &out))
    });
    Ok(NormTiming { rows, library, mailboxes: own.transpose()? })
}

/// Median time of `launch` in a row of `launches`.
fn eager(stream: &Stream, launches: usize, launch: impl Fn() -> Result<()>) -> Result<f64> {
    let (start, end) = (Event::new(stream.device())?, Event::new(stream.device())?);
    let mut times = Vec::with_capacity(REPEATS);
    for repeat in 0..=REPEATS {
        start.record(stream)?;
        (0..launches).try_for_each(|_| launch())?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_size() {
        let timing = TeamTiming { num_bytes: 8192, eager: 20.0, in_graph: 16.0 };
        let norms = vec![NormTiming { rows: 4, library: 9.0, mailboxes: None }];
        let text = TeamReport { world: 2, sums: vec![timing], norms }.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("over 2 ranks"), "{text}");
        let words: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(words, ["8192", "20.0", "16.0", "0.51"]);
        assert!(lines[4].ends_with("9.0          -"), "{text}");
    }
}
