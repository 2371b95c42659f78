//! Times of products with many rows at the shapes of the published models: microseconds, TFLOPS, and bytes of weights a second. The
//! other kernels are in `bench.rs`, whose graphs over changing memory are used here too.
//!
//! Weights and inputs are random: a GPU that multiplies zeros draws less power, and runs faster than it does at work.

use half::{bf16, f16};
use spark_backend::{Dtype, ExpertsWeight, LinearWeight, Matrix, MatrixData};

use crate::bench::{Bench, EXPERT_HIDDEN, EXPERT_INTERMEDIATE, NUM_EXPERTS, TOP_K, arbitrary_choices};
use crate::kernels::{Block, GemmCut};
use crate::{
    Arch, Arena, ArenaPlan, Choice, Device, DeviceSlice, Experts, ExpertsHost, Kernels, PackedHost,
    PackedWeight, Pool, Result, Stream, Tensor,
};

/// One measurement.
#[derive(Debug, Clone, PartialEq)]
pub struct GemmTiming {
    /// Which product.
    pub name: &'static str,
    /// Its shape, for people.
    pub shape: String,
    /// Median time of a launch.
    pub micros: f64,
    /// Multiplications and additions that it takes.
    pub num_operations: f64,
    /// Bytes of weights that must be read.
    pub num_bytes: u64,
}

/// All measurements of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct GemmReport {
    /// What tensor cores could do with `mma.sync` in bf16, in operations a second; `None` where it is not known.
    pub peak: Option<f64>,
    /// Bytes a second of a plain copy, reads and writes counted, in units of 1e9.
    pub copy_gb_per_second: f64,
    /// The products.
    pub timings: Vec<GemmTiming>,
}

impl std::fmt::Display for GemmReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:16} {:28} {:>10} {:>8} {:>8} {:>9} {:>9}",
            "product", "shape", "us", "TFLOPS", "% peak", "GB/s of W", "% of copy"
        )?;
        for timing in &self.timings {
            let tera = timing.num_operations / timing.micros / 1e6;
            let share = self.peak.map_or_else(|| "-".to_owned(), |peak| format!("{:.1}", 1e14 * tera / peak));
            let speed = timing.num_bytes as f64 / timing.micros / 1e3;
            writeln!(
                f,
                "{:16} {:28} {:>10.2} {tera:>8.1} {share:>8} {speed:>9.1} {:>9.1}",
                timing.name,
                timing.shape,
                timing.micros,
                100.0 * speed / self.copy_gb_per_second
            )?;
        }
        Ok(())
    }
}

/// Weights of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Bf16,
    Fp8,
    Int4(usize),
    Nvfp4,
}

impl Scheme {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int4(32) => "int4 g32",
            Self::Int4(64) => "int4 g64",
            Self::Int4(_) => "int4 g128",
            Self::Nvfp4 => "nvfp4",
        }
    }
}

/// Prompts of the 30B: qkv and o.
const LINEARS: [[usize; 2]; 2] = [[5120, 2048], [2048, 4096]];
const ROWS: [usize; 5] = [40, 128, 512, 2048, 8192];
/// The vision encoder's qkv, both products of its MLP, its output.
const VISION: [[usize; 2]; 4] = [[3456, 1152], [4304, 1152], [1152, 4304], [1152, 1152]];
const VISION_ROWS: [usize; 3] = [1024, 4096, 16_384];
/// Most launches in a graph, and about how long it may take.
const LAUNCHES: usize = 24;
const GRAPH_MICROS: f64 = 20_000.0;

/// Measures on `device`.
///
/// # Errors
/// What launching says; [`crate::Error::Memory`] with less than about 4 GB free.
pub fn run(device: &Device, kernels: &Kernels) -> Result<GemmReport> {
    let bench = Bench { stream: Stream::new(device)?, kernels };
    let mut timings = Vec::new();
    for shape in LINEARS {
        let rows = [Scheme::Int4(128), Scheme::Bf16].map(|scheme| (scheme, &ROWS[..]));
        let others = [Scheme::Int4(32), Scheme::Int4(64), Scheme::Fp8, Scheme::Nvfp4]
            .map(|scheme| (scheme, &ROWS[3..4]));
        for (scheme, all_rows) in rows.into_iter().chain(others) {
            timings.extend(linear(&bench, shape, scheme, all_rows)?);
        }
    }
    for shape in VISION {
        timings.extend(linear(&bench, shape, Scheme::Bf16, &VISION_ROWS)?);
    }
    timings.extend(linear(&bench, [151_936, 2048], Scheme::Bf16, &[128, 512])?);
    timings.extend(linear(&bench, [8192, 8192], Scheme::Bf16, &[8192])?);
    let all = [129, 256, 512, 1024, 2048, 8192];
    for (scheme, all_rows) in
        [(Scheme::Int4(128), &all[..]), (Scheme::Nvfp4, &all[4..]), (Scheme::Bf16, &all[5..])]
    {
        timings.extend(experts(&bench, scheme, all_rows)?);
    }
    // What the tensor cores of these do through `mma.sync`, see docs/kernels/gemm.md.
    let peak = match device.arch() {
        // 653 for a second, at the clocks of that load.
        Arch::Sm90 => Some(653e12),
        Arch::Sm121a => Some(107e12),
        Arch::Sm80 | Arch::Sm120a => None,
    };
    Ok(GemmReport { peak, copy_gb_per_second: bench.copy()?.gb_per_second(), timings })
}

/// How products of some sizes are best cut: the same product with other rows of x in a block, and other parts of k. Names and
/// microseconds.
///
/// # Errors
/// As [`run`].
pub fn cuts(device: &Device, kernels: &Kernels) -> Result<Vec<(String, f64)>> {
    let bench = Bench { stream: Stream::new(device)?, kernels };
    let mut found = Vec::new();
    let int4 = Scheme::Int4(128);
    for ([n, k], scheme) in [(LINEARS[0], int4), (LINEARS[1], int4), (LINEARS[1], Scheme::Bf16)] {
        let layer = Layer::new(&bench, [n, k], scheme)?;
        for (rows, block, splits) in [40, 64, 128, 256, 512, 1024, 8192]
            .into_iter()
            .flat_map(|rows| [Block::Wide64, Block::Tokens128].map(|block| (rows, block)))
            .flat_map(|(rows, block)| [1, 2, 4, 8, 16].map(|splits| (rows, block, splits)))
            .filter(|&(rows, block, splits)| {
                rows > block.tokens() / 2 && (rows * splits <= 1024 || splits == 1)
            })
        {
            let micros = layer.time(&bench, rows, Some(GemmCut::of(k, block, splits)))?;
            let what = format!("{} {rows} x {n} x {k}, {block:?}, {splits} parts", scheme.name());
            found.push((what, micros));
        }
    }
    let layer = ExpertsLayer::new(&bench, EXPERTS, int4)?;
    for rows in [129, 256, 512, 1024, 2048, 8192] {
        for block in [Block::Tokens16, Block::Tokens32, Block::Tokens64, Block::Tokens128] {
            let micros = layer.time(&bench, rows, Some(block))?;
            found.push((format!("{rows} x {TOP_K} of {NUM_EXPERTS} experts, {block:?}"), micros));
        }
    }
    Ok(found)
}

/// Products of prompts of the 30B and of half a 235B (two ranks) with integers in groups of 128: by `kernels`, which leave x in bf16, and by
/// `quantising` ones. Microseconds of each and operations.
///
/// # Errors
/// As [`run`].
pub fn activations(
    device: &Device,
    kernels: &Kernels,
    quantising: &Kernels,
) -> Result<Vec<(String, [f64; 2], f64)>> {
    let plain = Bench { stream: Stream::new(device)?, kernels };
    let fp8 = Bench { stream: Stream::new(device)?, kernels: quantising };
    let int4 = Scheme::Int4(128);
    let mut found = Vec::new();
    for [n, k] in [LINEARS[0], LINEARS[1], [4608, 4096], [4096, 4096]] {
        let layer = Layer::new(&plain, [n, k], int4)?;
        for rows in [512, 2048, 8192] {
            let micros = [layer.time(&plain, rows, None)?, layer.time(&fp8, rows, None)?];
            found.push((format!("{rows} x {n} x {k}"), micros, layer.num_operations(rows)));
        }
    }
    for [hidden, intermediate] in [EXPERTS, [4096, 768]] {
        let layer = ExpertsLayer::new(&plain, [hidden, intermediate], int4)?;
        for rows in [2048, 8192] {
            let micros = [layer.time(&plain, rows, None)?, layer.time(&fp8, rows, None)?];
            let what = format!("{rows} x {TOP_K} of {NUM_EXPERTS} experts, {hidden} x {intermediate}");
            found.push((what, micros, layer.num_operations(rows)));
        }
    }
    Ok(found)
}

fn launches(num_operations: f64) -> usize {
    // At 300 TFLOPS.
    ((GRAPH_MICROS / (num_operations / 3e8)) as usize).clamp(3, LAUNCHES)
}

/// One arena with a region of each size.
pub(crate) fn memory<const N: usize>(device: &Device, sizes: [u64; N]) -> Result<[DeviceSlice; N]> {
    let mut plan = ArenaPlan::default();
    let mut regions = Vec::with_capacity(N);
    for size in sizes {
        regions.push(plan.add("measured", size)?);
    }
    let arena = Arena::new(device, plan)?;
    let slices: Vec<DeviceSlice> =
        regions.into_iter().map(|region| arena.region(region)).collect::<Result<_>>()?;
    slices.try_into().map_err(|_| crate::Error::shape("measured", N, "another number"))
}

/// Normal enough: sums of four bytes, standard deviation 1.
pub(crate) fn random_rows(len: usize) -> Vec<bf16> {
    let mut random = Random(7);
    let value = |bytes: u64| (0..4).map(|i| (bytes >> (8 * i) & 0xff) as f32).sum::<f32>();
    (0..len).map(|_| bf16::from_f32((value(random.next()) - 510.0) / 147.8)).collect()
}

/// A linear layer, several times.
struct Layer {
    weights: Vec<PackedWeight>,
    num_bytes: u64,
}

impl Layer {
    fn new(bench: &Bench<'_>, [n, k]: [usize; 2], scheme: Scheme) -> Result<Self> {
        let host = PackedHost::pack(&LinearWeight { parts: vec![matrix(n, k, scheme)], bias: None })?;
        let num_bytes = PackedWeight::num_bytes(&host);
        let pieces = bench.pieces(num_bytes)?;
        let upload = |piece| PackedWeight::upload(&bench.stream, piece, &host);
        Ok(Self { weights: pieces.iter().map(upload).collect::<Result<_>>()?, num_bytes })
    }

    fn num_operations(&self, rows: usize) -> f64 {
        2.0 * rows as f64 * (self.weights[0].n() * self.weights[0].k()) as f64
    }

    fn time(&self, bench: &Bench<'_>, rows: usize, cut: Option<GemmCut>) -> Result<f64> {
        let (n, k) = (self.weights[0].n(), self.weights[0].k());
        let sizes = [2 * (rows * k) as u64, 2 * (rows * n) as u64, 128 << 20];
        let [x, out, pool] = memory(bench.device(), sizes)?;
        bench.stream.upload(&x, &random_rows(rows * k))?;
        let pool = Pool::new(&pool);
        let x = Tensor::new(&x, [rows, k], Dtype::Bf16)?;
        let out = Tensor::new(&out, [rows, n], Dtype::Bf16)?;
        bench.time(launches(self.num_operations(rows)), |i| {
            let weight = &self.weights[i % self.weights.len()];
            match cut {
                Some(cut) => bench.kernels.gemm_cut(&bench.stream, &pool, &x, weight, (&out, 0), cut),
                None => bench.kernels.gemm(&bench.stream, &pool, &x, weight, &out, 0),
            }
        })
    }
}

fn linear(
    bench: &Bench<'_>,
    [n, k]: [usize; 2],
    scheme: Scheme,
    all_rows: &[usize],
) -> Result<Vec<GemmTiming>> {
    let layer = Layer::new(bench, [n, k], scheme)?;
    let timing = |&rows: &usize| {
        Ok(GemmTiming {
            name: scheme.name(),
            shape: format!("{rows} x {n} x {k}"),
            micros: layer.time(bench, rows, None)?,
            num_operations: layer.num_operations(rows),
            num_bytes: layer.num_bytes,
        })
    };
    all_rows.iter().map(timing).collect()
}

/// Width of x and inner width of the 30B's experts.
const EXPERTS: [usize; 2] = [EXPERT_HIDDEN, EXPERT_INTERMEDIATE];

/// A layer of experts.
struct ExpertsLayer {
    weights: Experts,
    num_bytes: u64,
}

impl ExpertsLayer {
    fn new(bench: &Bench<'_>, [hidden, intermediate]: [usize; 2], scheme: Scheme) -> Result<Self> {
        let layer = |parts| LinearWeight { parts, bias: None };
        let gate_up = layer(vec![matrix(intermediate, hidden, scheme), matrix(intermediate, hidden, scheme)]);
        let down = layer(vec![matrix(hidden, intermediate, scheme)]);
        // The same weights for every expert, each at its own place.
        let host = ExpertsHost::pack(&ExpertsWeight { experts: vec![(gate_up, down); NUM_EXPERTS] })?;
        let [place] = memory(bench.device(), [host.num_bytes()])?;
        Ok(Self { weights: Experts::upload(&bench.stream, &place, &host)?, num_bytes: host.num_bytes() })
    }

    fn num_operations(&self, rows: usize) -> f64 {
        6.0 * (rows * TOP_K) as f64 * (self.weights.hidden() * self.weights.intermediate()) as f64
    }

    /// Sort, products, sum.
    fn time(&self, bench: &Bench<'_>, rows: usize, block: Option<Block>) -> Result<f64> {
        let (hidden, num_pairs) = (self.weights.hidden(), rows * TOP_K);
        let bytes = 2 * (rows * hidden) as u64;
        let sizes = [bytes, bytes, 4 * num_pairs as u64, 4 * num_pairs as u64, 512 << 20];
        let [x, out, chosen, shares, pool] = memory(bench.device(), sizes)?;
        bench.stream.upload(&x, &random_rows(rows * hidden))?;
        bench.stream.upload(&chosen, &arbitrary_choices(rows)[..num_pairs])?;
        bench.stream.upload(&shares, &vec![1.0f32 / TOP_K as f32; num_pairs])?;
        let pool = Pool::new(&pool);
        let x = Tensor::new(&x, [rows, hidden], Dtype::Bf16)?;
        let out = Tensor::new(&out, [rows, hidden], Dtype::Bf16)?;
        let choice = Choice::new(chosen, shares, TOP_K);
        bench.time(launches(self.num_operations(rows)), |_| {
            let kernels = bench.kernels;
            kernels.moe_gemm_blocks(&bench.stream, &pool, [&x, &out], &choice, &self.weights, block)
        })
    }
}

fn experts(bench: &Bench<'_>, scheme: Scheme, all_rows: &[usize]) -> Result<Vec<GemmTiming>> {
    let layer = ExpertsLayer::new(bench, EXPERTS, scheme)?;
    let timing = |&rows: &usize| {
        Ok(GemmTiming {
            name: scheme.name(),
            shape: format!("{rows} x {TOP_K} of {NUM_EXPERTS} experts"),
            micros: layer.time(bench, rows, None)?,
            num_operations: layer.num_operations(rows),
            num_bytes: layer.num_bytes,
        })
    };
    all_rows.iter().map(timing).collect()
}

/// Numbers without meaning (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// A matrix of weights around 1/64.
pub(crate) fn matrix(n: usize, k: usize, scheme: Scheme) -> Matrix {
    let mut random = Random(5);
    let data = match scheme {
        Scheme::Bf16 => {
            let mut values = random.bytes(2 * n * k);
            // Exponents of 2^-7 and 2^-6, any sign and mantissa.
            values.chunks_exact_mut(2).for_each(|value| value[1] = value[1] & 0x80 | 0x3c);
            MatrixData::Dense { dtype: Dtype::Bf16, values: values.into() }
        }
        Scheme::Fp8 => {
            let values: Vec<u8> = random.bytes(n * k).into_iter().map(|byte| byte & 0xbf).collect();
            let scales = vec![0.01; n.div_ceil(128) * k.div_ceil(128)];
            MatrixData::Fp8 { values: values.into(), scales, block: [128, 128] }
        }
        Scheme::Int4(group_size) => {
            let groups = n * k.div_ceil(group_size);
            let scale = |byte: u8| f16::from_f32(0.002 + f32::from(byte) * 1e-5).to_le_bytes();
            let scales: Vec<u8> = random.bytes(groups).into_iter().flat_map(scale).collect();
            MatrixData::Int4 {
                codes: random.bytes(n * k / 2).into(),
                zeros: None,
                scales: scales.into(),
                scale_dtype: Dtype::F16,
                group_size,
            }
        }
        Scheme::Nvfp4 => MatrixData::Nvfp4 {
            codes: random.bytes(n * k / 2).into(),
            scales: random.bytes(n * k / 16).into_iter().map(|byte| 0x20 | byte & 0x0f).collect(),
            alpha: 0.01,
        },
    };
    Matrix { n, k, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_rates_and_shares() {
        let timing = GemmTiming {
            name: "bf16",
            shape: "s".into(),
            micros: 10.0,
            num_operations: 3e9,
            num_bytes: 5_000_000,
        };
        let report = GemmReport { peak: Some(600e12), copy_gb_per_second: 1000.0, timings: vec![timing] };
        let text = report.to_string();
        let words: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(words, ["bf16", "s", "10.00", "300.0", "50.0", "500.0", "50.0"]);
    }

    #[test]
    fn rows_are_spread_like_activations() {
        let values: Vec<f32> = random_rows(4096).into_iter().map(f32::from).collect();
        let mean = values.iter().sum::<f32>() / 4096.0;
        let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / 4096.0;
        assert!(mean.abs() < 0.1 && (0.8..1.2).contains(&variance), "{mean} {variance}");
    }
}
