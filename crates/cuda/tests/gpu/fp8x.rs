//! Products whose x is quantised to FP8 (W4A8) against the CPU backend with x quantised alike, and what that costs in error and brings in
//! speed. x in bf16 is in `gemm.rs` and `moe_gemm.rs`.

use std::sync::OnceLock;

use half::bf16;
use spark_backend::{Backend, Dtype, LinearWeight};
use spark_cpu::{CpuBackend, e4m3_bits, e4m3_value};
use spark_cuda::{Choice, Cubins, Experts, ExpertsHost, Kernels, PackedHost, PackedWeight, Pool, Prefill};
use spark_testing::{Random, rel_err, tolerance};

use super::gemm::{Scheme, assert_close, matrix};
use super::{Bed, cpu, cpu_tensor, gpu, kernel_options};

/// Tensor cores of sm_89 keep 13 bits of mantissa of what they add, and add 32 products at a time up to a group; codes are added with their
/// zero points still in them, so the sums are about twice as large as what remains. x in bf16 instead costs 2.6e-2.
const QUANTISED_SUMS: f64 = 2e-3;

/// The kernels, which quantise x.
fn quantising() -> &'static Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| {
        let device = &gpu().device;
        let cubins = Cubins::get(device.arch(), &kernel_options()).unwrap();
        Kernels::load(device, &cubins)
            .unwrap()
            .with_prefill(Prefill { fp8: true, ..Prefill::default() })
            .unwrap()
    })
}

fn bed() -> Bed {
    Bed { kernels: quantising(), ..Bed::new() }
}

/// Rows of `k` as the kernels take them: the largest of a row is 448, times the row's scale.
fn quantised(x: &[f32], k: usize) -> Vec<f32> {
    let mut out = x.to_vec();
    for row in out.chunks_exact_mut(k) {
        let largest = row.iter().fold(0f32, |most, v| most.max(v.abs()));
        let (inverse, scale) = if largest == 0.0 { (0.0, 0.0) } else { (448.0 / largest, largest / 448.0) };
        row.iter_mut().for_each(|v| *v = e4m3_value(e4m3_bits(*v * inverse)) * scale);
    }
    out
}

/// Activations of unlike sizes: rows, and a few columns that are 20 times as large as the others.
fn activations(random: &mut Random, rows: usize, k: usize) -> Vec<f32> {
    let mut x = random.bf16s(rows * k, 1.0);
    for (row, values) in x.chunks_exact_mut(k).enumerate() {
        let size = [1.0, 0.125, 16.0][row % 3];
        values.iter_mut().for_each(|v| *v *= size);
        values.iter_mut().skip(5).step_by(97).for_each(|v| *v *= 16.0);
    }
    // A row of zeros.
    x[k..2 * k].fill(0.0);
    x
}

fn exact(backend: &CpuBackend, x: &[f32], weight: &LinearWeight) -> Vec<f32> {
    let (rows, on_cpu) = (x.len() / weight.k(), backend.linear_weight(weight.clone()).unwrap());
    backend.linear(&cpu_tensor(backend, x, [rows, weight.k()]), &on_cpu).unwrap().values().to_vec()
}

/// The layer on the GPU, float32.
fn layer(bed: &Bed, x: &[f32], weight: &LinearWeight) -> Vec<f32> {
    let host = PackedHost::pack(weight).unwrap();
    let slice = bed.bytes(PackedWeight::num_bytes(&host));
    let packed = PackedWeight::upload(&bed.stream, &slice, &host).unwrap();
    let pool = Pool::new(&bed.bytes(64 << 20));
    let (rows, k) = (x.len() / weight.k(), weight.k());
    let (x, out) = (bed.tensor(x, [rows, k], Dtype::Bf16), bed.empty([rows, weight.n()], Dtype::F32));
    bed.kernels.gemm(&bed.stream, &pool, &x, &packed, &out, 0).unwrap();
    bed.values(&out)
}

#[test]
fn layers_are_those_of_quantised_rows() {
    let (bed, mut random, backend) = (bed(), Random::new(51), cpu(Dtype::F32));
    // Tails in every dimension, one and several blocks and steps, real sizes.
    for ([n, k], rows) in [
        ([16, 128], 257),
        ([33, 96], 257),
        ([130, 1040], 300),
        ([256, 384], 321),
        ([768, 2048], 600),
        ([2048, 4096], 260),
    ] {
        for group_size in [32, 64, 128] {
            let what = format!("{rows} x {n} x {k}, groups of {group_size}");
            let bias = (n % 2 == 0).then(|| random.normals(n, 1.0));
            let weight =
                LinearWeight { parts: vec![matrix(&mut random, n, k, Scheme::Int4(group_size))], bias };
            let x = activations(&mut random, rows, k);
            let got = layer(&bed, &x, &weight);
            let want = exact(&backend, &quantised(&x, k), &weight);
            println!("{what}: error {:.2e}", rel_err(&got, &want));
            assert_close(&what, &got, &want, n, QUANTISED_SUMS);
            assert_eq!(got, layer(&bed, &x, &weight), "{what}: bits");
        }
    }
}

/// Few rows, and other weights, are as they are without the option.
#[test]
fn few_rows_and_other_weights_are_not_quantised() {
    let (bed, plain, mut random) = (bed(), Bed::new(), Random::new(52));
    for (scheme, rows) in
        [(Scheme::Int4(128), 256), (Scheme::Fp8, 300), (Scheme::Bf16, 300), (Scheme::Nvfp4, 300)]
    {
        let weight = LinearWeight { parts: vec![matrix(&mut random, 64, 256, scheme)], bias: None };
        let x = random.bf16s(rows * 256, 1.0);
        assert_eq!(layer(&bed, &x, &weight), layer(&plain, &x, &weight), "{scheme:?}, {rows} rows");
    }
}

/// A layer of experts and who takes which row.
struct Moe {
    experts: Vec<(LinearWeight, LinearWeight)>,
    chosen: Vec<u32>,
    weights: Vec<f32>,
    top_k: usize,
}

impl Moe {
    fn new(
        random: &mut Random,
        num_experts: usize,
        [hidden, inner]: [usize; 2],
        rows: usize,
        group: usize,
    ) -> Self {
        let top_k = num_experts.min(3);
        let part = |random: &mut Random, n, k| matrix(random, n, k, Scheme::Int4(group));
        let experts = (0..num_experts).map(|_| {
            let gate_up = vec![part(random, inner, hidden), part(random, inner, hidden)];
            let down = vec![part(random, hidden, inner)];
            (LinearWeight { parts: gate_up, bias: None }, LinearWeight { parts: down, bias: None })
        });
        let experts = experts.collect();
        let mut chosen = Vec::new();
        for row in 0..rows {
            let mut order: Vec<u32> = (0..num_experts as u32).collect();
            random.shuffle(&mut order);
            // Rows of padding choose nobody.
            chosen.extend(order[..top_k].iter().map(|&e| if row % 11 == 10 { u32::MAX } else { e }));
        }
        let weights = (0..rows * top_k).map(|_| random.unit()).collect();
        Self { experts, chosen, weights, top_k }
    }

    fn on_gpu(&self, bed: &Bed, x: &[f32]) -> Vec<f32> {
        let weight = spark_backend::ExpertsWeight { experts: self.experts.clone() };
        let host = ExpertsHost::pack(&weight).unwrap();
        let experts = Experts::upload(&bed.stream, &bed.bytes(host.num_bytes()), &host).unwrap();
        let shape = [x.len() / experts.hidden(), experts.hidden()];
        let choice = Choice::new(bed.upload(&self.chosen), bed.upload(&self.weights), self.top_k);
        let (x, out) = (bed.tensor(x, shape, Dtype::Bf16), bed.empty(shape, Dtype::Bf16));
        let pool = Pool::new(&bed.bytes(192 << 20));
        bed.kernels.moe_gemm(&bed.stream, &pool, &x, &choice, &experts, &out).unwrap();
        bed.values(&out)
    }

    /// Rounded where the backends round; `quantise` is applied to the rows of both products.
    fn on_cpu(
        &self,
        backend: &CpuBackend,
        x: &[f32],
        quantise: impl Fn(&[f32], usize) -> Vec<f32>,
    ) -> Vec<f32> {
        let hidden = self.experts[0].0.k();
        let round = |v: f32| bf16::from_f32(v).to_f32();
        let mut out = vec![0.0; x.len()];
        for (expert, (gate_up, down)) in self.experts.iter().enumerate() {
            let pairs: Vec<usize> =
                (0..self.chosen.len()).filter(|&pair| self.chosen[pair] as usize == expert).collect();
            if pairs.is_empty() {
                continue;
            }
            let row = |pair: usize| pair / self.top_k * hidden;
            let rows: Vec<f32> =
                pairs.iter().flat_map(|&pair| x[row(pair)..row(pair) + hidden].to_vec()).collect();
            let both = exact(backend, &quantise(&rows, hidden), gate_up);
            let inner: Vec<f32> = both
                .chunks_exact(2 * down.k())
                .flat_map(|both| {
                    let (gate, up) = both.split_at(down.k());
                    gate.iter().zip(up).map(|(&gate, &up)| {
                        let gate = round(gate);
                        round(round(gate / (1.0 + (-gate).exp())) * round(up))
                    })
                })
                .collect();
            let results = exact(backend, &quantise(&inner, down.k()), down);
            for (&pair, result) in pairs.iter().zip(results.chunks_exact(hidden)) {
                let weight = self.weights[pair];
                out[row(pair)..].iter_mut().zip(result).for_each(|(out, v)| *out += weight * v);
            }
        }
        out
    }
}

#[test]
fn experts_are_those_of_quantised_rows() {
    let (bed, mut random, backend) = (bed(), Random::new(53), cpu(Dtype::F32));
    // Tails of tiles and of columns; a real size.
    for (num_experts, hidden, inner, rows) in
        [(1, 16, 16, 70), (3, 272, 160, 500), (5, 192, 208, 1100), (4, 2048, 768, 400)]
    {
        for group_size in [32, 64, 128] {
            let what = format!("{num_experts} x {hidden} x {inner}, {rows} rows, groups of {group_size}");
            let moe = Moe::new(&mut random, num_experts, [hidden, inner], rows, group_size);
            let x = random.bf16s(rows * hidden, 0.2);
            let got = moe.on_gpu(&bed, &x);
            let want = moe.on_cpu(&backend, &x, quantised);
            println!("{what}: error {:.2e}", rel_err(&got, &want));
            // An inner value that is rounded to bf16 in the other direction may fall to its FP8 neighbour.
            assert_close(&what, &got, &want, hidden, 2.0 * tolerance::KERNEL_BF16);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (bed, mut random) = (bed(), Random::new(54));
    let parts = vec![matrix(&mut random, 32, 128, Scheme::Int4(128))];
    let host = PackedHost::pack(&LinearWeight { parts, bias: None }).unwrap();
    let slice = bed.bytes(PackedWeight::num_bytes(&host));
    let packed = PackedWeight::upload(&bed.stream, &slice, &host).unwrap();
    let run = |columns, pool_bytes| {
        let (x, out) = (bed.empty([300, columns], Dtype::Bf16), bed.empty([300, 32], Dtype::Bf16));
        bed.kernels.gemm(&bed.stream, &Pool::new(&bed.bytes(pool_bytes)), &x, &packed, &out, 0)
    };
    assert!(run(128, 1 << 20).is_ok());
    assert!(run(64, 1 << 20).is_err());
    assert!(run(128, 4096).is_err());
    bed.stream.synchronize().unwrap();
}

/// What FP8 activations cost and bring: error against float64 with x as it is, of bf16 and of FP8 activations, and operations a second.
#[test]
fn measurements_of_fp8_activations() {
    let (fp8, plain, mut random, backend) = (bed(), Bed::new(), Random::new(55), cpu(Dtype::F32));
    let rows = 260;
    for [n, k] in [[512, 2048], [512, 4096]] {
        let weight = LinearWeight { parts: vec![matrix(&mut random, n, k, Scheme::Int4(128))], bias: None };
        for (name, x) in [
            ("normal rows", random.bf16s(rows * k, 1.0)),
            ("rows with outliers", activations(&mut random, rows, k)),
        ] {
            let want = exact(&backend, &x, &weight);
            let error = |bed| rel_err(&layer(bed, &x, &weight), &want);
            println!(
                "{rows} x {n} x {k}, {name}: error W4A16 {:.1e}, W4A8 {:.1e}",
                error(&plain),
                error(&fp8)
            );
        }
    }
    for (hidden, inner) in [(2048, 768), (4096, 768)] {
        let moe = Moe::new(&mut random, 4, [hidden, inner], 400, 128);
        let x = random.bf16s(400 * hidden, 1.0);
        let want = moe.on_cpu(&backend, &x, |rows, _| rows.to_vec());
        let error = |bed| rel_err(&moe.on_gpu(bed, &x), &want);
        println!("experts {hidden} x {inner}: error W4A16 {:.1e}, W4A8 {:.1e}", error(&plain), error(&fp8));
    }
    let found = spark_cuda::bench_gemm::activations(&gpu().device, &gpu().kernels, quantising()).unwrap();
    println!("{:50} {:>10} {:>10} {:>8} {:>8}", "g128", "W4A16 us", "W4A8 us", "TFLOPS", "TFLOPS");
    for (what, micros, operations) in found {
        let [plain, fp8] = micros.map(|micros| operations / micros / 1e6);
        println!("{what:50} {:>10.1} {:>10.1} {plain:>8.1} {fp8:>8.1}", micros[0], micros[1]);
    }
}
