//! Times of the weights' kernels at decode: linear layers, the router, layers of experts, at the shapes of the published models
//! and of half a 235B (two ranks). What is around them is in `bench.rs`, products with many rows in `bench_gemm.rs`.

use spark_backend::{Dtype, ExpertsWeight, LinearWeight};

use crate::bench::{Bench, LAUNCHES, NUM_EXPERTS, TOP_K, Timing, arbitrary_choices, mean_distinct};
use crate::bench_gemm::{Scheme, matrix, memory, random_rows};
use crate::{Choice, Experts, ExpertsHost, Linear, PackedHost, Pool, Result, RouterRule, Tensor};

/// Output and input features: qkv and o of the 30B; qkv, o of half a 235B; one larger than any cache.
const LINEARS: [[usize; 2]; 5] = [[5120, 2048], [2048, 4096], [4608, 4096], [4096, 4096], [32_768, 4096]];
/// Vocabulary and width of the 30B; half the vocabulary of a 235B.
const HEADS: [[usize; 2]; 2] = [[151_936, 2048], [75_968, 4096]];
/// Width and intermediate size of the experts of the 30B, and of half a 235B.
const EXPERTS: [[usize; 2]; 2] = [[2048, 768], [4096, 768]];
/// For products in parts.
const POOL_BYTES: u64 = 32 << 20;
const ROWS: [usize; 7] = [1, 4, 8, 16, 32, 64, 128];

/// All of them.
pub(crate) fn run(bench: &Bench<'_>) -> Result<Vec<Timing>> {
    let mut timings = Vec::new();
    for shape in LINEARS {
        timings.extend(linear(bench, shape, Scheme::Int4(128), Dtype::Bf16, &ROWS)?);
    }
    for scheme in [Scheme::Nvfp4, Scheme::Fp8, Scheme::Bf16, Scheme::Int4(32)] {
        for shape in [LINEARS[0], LINEARS[4]] {
            timings.extend(linear(bench, shape, scheme, Dtype::Bf16, &[1, 16, 32, 64])?);
        }
    }
    for shape in HEADS {
        timings.extend(linear(bench, shape, Scheme::Bf16, Dtype::F32, &ROWS[..6])?);
    }
    for [hidden, _] in EXPERTS {
        timings.extend(route(bench, hidden)?);
    }
    for shape in EXPERTS {
        timings.extend(experts(bench, shape, Scheme::Int4(128), &ROWS)?);
    }
    for scheme in [Scheme::Nvfp4, Scheme::Fp8, Scheme::Bf16] {
        timings.extend(experts(bench, EXPERTS[0], scheme, &[1, 8, 64, 128])?);
    }
    Ok(timings)
}

/// Layers enough to go past the cache, one after the other.
pub(crate) fn linear(
    bench: &Bench<'_>,
    [n, k]: [usize; 2],
    scheme: Scheme,
    out_dtype: Dtype,
    all_rows: &[usize],
) -> Result<Vec<Timing>> {
    let host = [PackedHost::pack(&LinearWeight { parts: vec![matrix(n, k, scheme)], bias: None })?];
    let weight_bytes = Linear::num_bytes(&host);
    let pieces = bench.pieces(weight_bytes)?;
    let weights =
        pieces.iter().map(|piece| Linear::upload(&bench.stream, piece, &host)).collect::<Result<Vec<_>>>()?;
    let mut timings = Vec::new();
    for &rows in all_rows {
        let out_bytes = (rows * n * out_dtype.size()) as u64;
        let [x, out, pool] = memory(bench.device(), [2 * (rows * k) as u64, out_bytes, POOL_BYTES])?;
        bench.stream.upload(&x, &random_rows(rows * k))?;
        let (x, pool) = (Tensor::new(&x, [rows, k], Dtype::Bf16)?, Pool::new(&pool));
        let out = Tensor::new(&out, [rows, n], out_dtype)?;
        let micros = bench.time(LAUNCHES, |i| {
            bench.kernels.linear(&bench.stream, &pool, &x, &weights[i % weights.len()], &out)
        })?;
        let num_bytes = weight_bytes + 2 * (rows * k) as u64 + out_bytes;
        let shape = format!("{rows} x {n} x {k} {}", scheme.name());
        timings.push(Timing { name: "linear", shape, micros, num_bytes });
    }
    Ok(timings)
}

/// A router over random rows, which its weights send to many experts.
pub(crate) fn route(bench: &Bench<'_>, hidden: usize) -> Result<Vec<Timing>> {
    let router = Router::new(bench, hidden)?;
    let mut timings = Vec::new();
    for rows in ROWS {
        let x = router.x(bench, rows)?;
        let micros = bench.time(LAUNCHES, |i| router.route(bench, &x, i, rows).map(drop))?;
        let num_bytes = router.num_bytes + 2 * (rows * hidden) as u64;
        timings.push(Timing {
            name: "route",
            shape: format!("{rows} x {NUM_EXPERTS} x {hidden}"),
            micros,
            num_bytes,
        });
    }
    Ok(timings)
}

struct Router {
    weights: Vec<Linear>,
    num_bytes: u64,
    hidden: usize,
    pool: Pool,
}

impl Router {
    fn new(bench: &Bench<'_>, hidden: usize) -> Result<Self> {
        let parts = vec![matrix(NUM_EXPERTS, hidden, Scheme::Bf16)];
        let host = [PackedHost::pack(&LinearWeight { parts, bias: None })?];
        let num_bytes = Linear::num_bytes(&host);
        let upload = |piece| Linear::upload(&bench.stream, piece, &host);
        let weights = bench.pieces(num_bytes)?.iter().map(upload).collect::<Result<Vec<_>>>()?;
        let [pool] = memory(bench.device(), [64 << 20])?;
        Ok(Self { weights, num_bytes, hidden, pool: Pool::new(&pool) })
    }

    /// Different rows for every launch.
    fn x(&self, bench: &Bench<'_>, rows: usize) -> Result<crate::DeviceSlice> {
        let values = random_rows(LAUNCHES * rows * self.hidden);
        let [x] = memory(bench.device(), [2 * values.len() as u64])?;
        bench.stream.upload(&x, &values)?;
        Ok(x)
    }

    fn rows(&self, x: &crate::DeviceSlice, launch: usize, rows: usize) -> Result<Tensor> {
        let num_bytes = 2 * (rows * self.hidden) as u64;
        Tensor::new(&x.slice(launch as u64 * num_bytes, num_bytes)?, [rows, self.hidden], Dtype::Bf16)
    }

    fn route(&self, bench: &Bench<'_>, x: &crate::DeviceSlice, launch: usize, rows: usize) -> Result<Choice> {
        let weight = &self.weights[launch % self.weights.len()];
        let x = self.rows(x, launch, rows)?;
        let rule = RouterRule::new(weight, TOP_K, true);
        bench.kernels.route_for_experts(&bench.stream, &self.pool, &x, &rule)
    }
}

/// A layer of experts: with the lists made beside it (all that is launched where no router has made them), and behind a router,
/// as in a model. Bytes are the weights of the experts that are hit; behind the router, of as many as uniform routing hits.
pub(crate) fn experts(
    bench: &Bench<'_>,
    [hidden, intermediate]: [usize; 2],
    scheme: Scheme,
    all_rows: &[usize],
) -> Result<Vec<Timing>> {
    let layer = |parts| LinearWeight { parts, bias: None };
    let gate_up = layer(vec![matrix(intermediate, hidden, scheme), matrix(intermediate, hidden, scheme)]);
    let down = layer(vec![matrix(hidden, intermediate, scheme)]);
    // The same weights for every expert, each at its own place.
    let host = ExpertsHost::pack(&ExpertsWeight { experts: vec![(gate_up, down); NUM_EXPERTS] })?;
    let [place] = memory(bench.device(), [host.num_bytes()])?;
    let weights = Experts::upload(&bench.stream, &place, &host)?;
    let router = Router::new(bench, hidden)?;
    let mut timings = Vec::new();
    for &rows in all_rows {
        let chosen = arbitrary_choices(rows);
        let num_pairs = rows * TOP_K;
        let sizes = [4 * chosen.len() as u64, 4 * num_pairs as u64, 2 * (rows * hidden) as u64];
        let [all, shares, out] = memory(bench.device(), sizes)?;
        bench.stream.upload(&all, &chosen)?;
        bench.stream.upload(&shares, &vec![1.0f32 / TOP_K as f32; num_pairs])?;
        let x = router.x(bench, rows)?;
        let out = Tensor::new(&out, [rows, hidden], Dtype::Bf16)?;
        let mlp = |i: usize, choice: &Choice| {
            let x = router.rows(&x, i, rows)?;
            bench.kernels.moe_mlp(&bench.stream, &router.pool, &x, choice, &weights, &out)
        };
        let listed = bench.time(LAUNCHES, |i| {
            let chosen = all.slice(4 * (i * num_pairs) as u64, 4 * num_pairs as u64)?;
            mlp(i, &Choice::new(chosen, shares.clone(), TOP_K))
        })?;
        let routed = bench.time(LAUNCHES, |i| mlp(i, &router.route(bench, &x, i, rows)?))?;
        let distinct = mean_distinct(&chosen);
        let num_bytes = (distinct / NUM_EXPERTS as f64 * host.num_bytes() as f64) as u64;
        let shape = format!("{rows} x {hidden} {}, {distinct:.1}", scheme.name());
        timings.push(Timing { name: "sort + moe", shape: shape.clone(), micros: listed, num_bytes });
        let num_bytes = num_bytes + router.num_bytes;
        timings.push(Timing { name: "route + moe", shape, micros: routed, num_bytes });
    }
    Ok(timings)
}
