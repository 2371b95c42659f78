//! `kernels/nvfp4_mma.cu` run on the CPU (`emulation`): whole products, from bf16 rows to results, against float64. No device has
//! these instructions here, so this is what says that every index, scale and lane is right.

use std::sync::LazyLock;

use half::bf16;
use spark_backend::{Bytes, LinearWeight, Matrix, MatrixData};
use spark_testing::Random;

use super::gemm::{Block, GemmParams, What};
use super::nvfp4_host::HostRow;
use super::nvfp4_mma::{Nvfp4MmaParams, QuantizeParams, shared_bytes};
use super::pack::{NVFP4_GROUP as GROUP, PackedHost, padded_k, padded_n};
use super::testing::matrix_of;
use crate::emulation::{Done, Emulated, Work};

const BLOCK_ROWS: usize = 128;
const RUN: usize = 8;

static MODULE: LazyLock<Emulated> = LazyLock::new(|| {
    let product = "Nvfp4MmaParams";
    let kernels =
        [("nvfp4_quantize", "QuantizeParams"), ("nvfp4_mma_t64", product), ("nvfp4_mma_t128", product)];
    Emulated::new("nvfp4_mma", &kernels)
});

fn kernel(block: Block) -> &'static str {
    if block == Block::Tokens64 { "nvfp4_mma_t64" } else { "nvfp4_mma_t128" }
}

/// Where quantised rows are.
#[derive(Clone, Copy)]
struct Rows {
    codes: u64,
    scales: u64,
    factors: u64,
}

/// Puts the quantisation of rows of `k` numbers, as many as `x` has, into `work`.
fn quantize(work: &mut Work, x: u64, [rows, k]: [usize; 2], given: Option<f32>) -> Rows {
    let padded = padded_k(k);
    let out = Rows {
        codes: work.room(rows * padded / 2),
        scales: work.room(rows * padded / GROUP),
        factors: work.room(4 * rows),
    };
    let params = QuantizeParams {
        x,
        codes: out.codes,
        scales: out.scales,
        factors: out.factors,
        columns: k as u32,
        padded: padded as u32,
        given: given.unwrap_or(0.0),
        padding: 0,
    };
    work.launch("nvfp4_quantize", [rows, 1], 128, &params);
    out
}

fn bf16_bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
}

/// Rows with outliers, small groups and zeros, as bf16 holds them.
fn random_rows(random: &mut Random, rows: usize, k: usize) -> Vec<f32> {
    let mut x = random.bf16s(rows * k, 1.0);
    for group in x.chunks_mut(GROUP) {
        let scale = [1.0, 1.0, 30.0, 0.01, 0.0][random.below(5)];
        group.iter_mut().for_each(|value| *value = bf16::from_f32(*value * scale).to_f32());
    }
    x
}

fn nvfp4(random: &mut Random, shape: [usize; 2]) -> Matrix {
    matrix_of(random, shape, &MatrixData::Nvfp4 { codes: Bytes::new(), scales: Bytes::new(), alpha: 0.0 })
}

/// `x W^T` of quantised rows, and for each result the sum of magnitudes that bounds its error.
fn product(x: &[HostRow], weight: &[f32], k: usize) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for row in x {
        let values = row.values();
        for weights in weight.chunks_exact(k) {
            let terms = values.iter().zip(weights).map(|(x, &w)| x * f64::from(w));
            out.push(terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs())));
        }
    }
    out
}

/// Results within a part in 2^18 of what was added up: float32 sums of a few products, far less than a wrong code or scale changes.
fn assert_near(what: &str, got: &[f32], want: &[(f64, f64)]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &(want, size))) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(
            error <= size * 2f64.powi(-18) + 1e-30,
            "{what}: result {i} is {got}, not {want} (of {size})"
        );
    }
}

fn host_rows(x: &[f32], k: usize, given: Option<f32>) -> Vec<HostRow> {
    x.chunks_exact(k).map(|row| HostRow::new(row, given)).collect()
}

/// A launch of a dense product without its addresses.
fn dense_params(weight: &PackedHost, [rows, k]: [usize; 2], what: What) -> GemmParams {
    let n = weight.layout.n;
    GemmParams {
        n: n as u32,
        padded_n: padded_n(n) as u32,
        k: padded_k(k) as u32,
        x_columns: k as u32,
        rows: rows as u32,
        out_columns: n as u32,
        num_rows: n as u32,
        what: what as u32,
        top_k: 1,
        panel: 2,
        ..GemmParams::default()
    }
}

/// The codes' and scales' addresses.
fn with_weight(work: &mut Work, weight: &PackedHost, params: GemmParams) -> GemmParams {
    GemmParams {
        codes: work.words(weight.codes.iter().copied()),
        scales: work.words(weight.scales.iter().copied()),
        row_scales: work.words(weight.row_scales.iter().map(|scale| scale.to_bits())),
        ..params
    }
}

fn launch(work: &mut Work, block: Block, grid: [usize; 2], rows: Rows, gemm: GemmParams) {
    let gemm = GemmParams { x: rows.codes, ..gemm };
    let params = Nvfp4MmaParams { gemm, x_scales: rows.scales, x_factors: rows.factors };
    work.launch(kernel(block), grid, block.tokens() as u32, &params);
}

#[test]
fn emulated_rows_are_quantised_as_on_the_host() {
    let mut random = Random::new(2);
    for (rows, k, given) in
        [(3, 16, None), (5, 80, None), (7, 128, Some(0.01)), (4, 208, Some(3e-4)), (2, 2064, None)]
    {
        let mut x = random_rows(&mut random, rows, k);
        // Rows of zeros, of tiny numbers, and with one that is not finite.
        x[..k].fill(0.0);
        x[k..2 * k].iter_mut().for_each(|value| *value = bf16::from_f32(*value * 1e-30).to_f32());
        if rows > 3 {
            x[3 * k - 1] = if k == 80 { f32::NAN } else { f32::NEG_INFINITY };
        }
        let mut work = Work::default();
        let at = work.buffer(bf16_bytes(&x));
        let out = quantize(&mut work, at, [rows, k], given);
        let done = MODULE.run(&work);
        let (codes, factors, padded) = (done.words(out.codes), done.floats(out.factors), padded_k(k));
        for (i, want) in host_rows(&x, k, given).iter().enumerate() {
            if given.is_some() && i == 2 {
                // With a given factor, what is not finite is the largest number.
                continue;
            }
            assert_eq!(
                factors[i].to_bits() & 0x7fff_ffff,
                want.factor.to_bits() & 0x7fff_ffff,
                "row {i} of {k}"
            );
            let scales = &done.bytes(out.scales)[i * padded / GROUP..][..padded / GROUP];
            assert_eq!(&scales[..k / GROUP], &want.scales[..], "row {i} of {k}");
            assert!(scales[k / GROUP..].iter().all(|&scale| scale == 0));
            let words = &codes[i * padded / RUN..][..padded / RUN];
            let code = |at: usize| {
                // Of 128 inputs, lane t's words of both products lie together; of a word, the even ones are in its lower half.
                let (step, run) = (at / 128, at % 128 / RUN);
                let word = words[16 * step + 4 * (run % 4) + 2 * (run / 8) + run / 4 % 2];
                (word >> (4 * (at % RUN / 2 + 4 * (at % 2))) & 15) as u8
            };
            let got: Vec<u8> = (0..padded).map(code).collect();
            assert_eq!(&got[..k], &want.codes[..], "row {i} of {k}");
            assert!(got[k..].iter().all(|&code| code == 0));
        }
    }
}

#[test]
fn emulated_layers_are_float64s() {
    let mut random = Random::new(3);
    // One row, tails in every dimension, more than one block each way, one step and several.
    let cases = [
        (1, 16, 16, Block::Tokens64),
        (17, 100, 144, Block::Tokens64),
        (65, 140, 272, Block::Tokens64),
        (33, 128, 128, Block::Tokens128),
        (129, 260, 400, Block::Tokens128),
    ];
    for (rows, n, k, block) in cases {
        let (x, matrix) = (random_rows(&mut random, rows, k), nvfp4(&mut random, [n, k]));
        let weights = spark_cpu::dequantize(&matrix).unwrap();
        let bias: Vec<f32> = random.normals(n, 1.0);
        let packed = PackedHost::pack(&LinearWeight { parts: vec![matrix], bias: None }).unwrap();
        let mut work = Work::default();
        let at = work.buffer(bf16_bytes(&x));
        let rows_at = quantize(&mut work, at, [rows, k], None);
        // Columns of a wider result, which keeps its others.
        let (first_column, columns) = (4, n + 9);
        let params = with_weight(&mut work, &packed, dense_params(&packed, [rows, k], What::StoreF32));
        let params = GemmParams {
            out: work.room(4 * rows * columns),
            bias: work.words(bias.iter().map(|value| value.to_bits())),
            out_columns: columns as u32,
            first_column: first_column as u32,
            ..params
        };
        let grid = [n.div_ceil(BLOCK_ROWS) * rows.div_ceil(block.tokens()), 1];
        launch(&mut work, block, grid, rows_at, params);
        let rounded =
            GemmParams { out: work.room(2 * rows * n), out_columns: n as u32, first_column: 0, ..params };
        launch(
            &mut work,
            block,
            grid,
            rows_at,
            GemmParams { what: What::StoreBf16 as u32, bias: 0, ..rounded },
        );

        let done = MODULE.run(&work);
        let want = product(&host_rows(&x, k, None), &weights, k);
        let all = done.floats(params.out);
        let untouched = f32::from_bits(0x7f7f_7f7f);
        let mut got = Vec::new();
        for row in all.chunks_exact(columns) {
            assert!(
                row[..first_column].iter().chain(&row[first_column + n..]).all(|value| *value == untouched)
            );
            got.extend(row[first_column..][..n].iter().zip(&bias).map(|(value, bias)| value - bias));
        }
        let what = format!("{rows} x {n} x {k}");
        // The bias was added in float32.
        let wider =
            |(i, &(sum, size)): (usize, &(f64, f64))| (sum, size + 64.0 * f64::from(bias[i % n].abs()));
        assert_near(&what, &got, &want.iter().enumerate().map(wider).collect::<Vec<_>>());
        // Rounding to bf16 is a part in 2^9.
        let wide: Vec<_> = want.iter().map(|&(sum, size)| (sum, size + 1024.0 * sum.abs())).collect();
        assert_near(&format!("{what} in bf16"), &done.bf16s(rounded.out), &wide);
    }
}

#[test]
fn emulated_parts_of_k_add_up() {
    let mut random = Random::new(4);
    let (rows, n, k, splits) = (70, 96, 640, 3);
    let (x, matrix) = (random_rows(&mut random, rows, k), nvfp4(&mut random, [n, k]));
    let weights = spark_cpu::dequantize(&matrix).unwrap();
    let packed = PackedHost::pack(&LinearWeight { parts: vec![matrix], bias: None }).unwrap();
    let mut work = Work::default();
    let at = work.buffer(bf16_bytes(&x));
    let rows_at = quantize(&mut work, at, [rows, k], None);
    let stride = padded_n(n);
    let params = GemmParams {
        out: work.room(4 * splits * rows * stride),
        out_columns: stride as u32,
        // Of 64 inputs: the last part has one of 128, the others have two.
        steps_per_split: 4,
        ..dense_params(&packed, [rows, k], What::StoreSplits)
    };
    let params = with_weight(&mut work, &packed, params);
    launch(&mut work, Block::Tokens64, [rows.div_ceil(64), splits], rows_at, params);
    let partial = MODULE.run(&work).floats(params.out);
    // What `gemm_add` does.
    let total = |i: usize| {
        let (row, feature) = (i / n, i % n);
        let sum: f32 = (0..splits).map(|split| partial[(split * rows + row) * stride + feature]).sum();
        sum * packed.row_scales[feature]
    };
    let got: Vec<f32> = (0..rows * n).map(total).collect();
    assert_near("parts", &got, &product(&host_rows(&x, k, None), &weights, k));
}

/// A layer of experts: gate_up over lists of rows, then down over what came of it.
struct Layer {
    rows: usize,
    hidden: usize,
    intermediate: usize,
    top_k: usize,
    x: Vec<f32>,
    gate_up: Vec<Vec<f32>>,
    down: Vec<Vec<f32>>,
    packed: [PackedHost; 2],
    /// Pairs by expert, and the tiles over them: expert, first, count.
    pairs: Vec<u32>,
    tiles: Vec<[u32; 4]>,
}

impl Layer {
    fn new(random: &mut Random, [rows, hidden, intermediate]: [usize; 3], tokens: usize) -> Self {
        let (experts, top_k) = (3, 2);
        let matrices =
            |random: &mut Random, shape| (0..experts).map(|_| nvfp4(random, shape)).collect::<Vec<_>>();
        let gate_up = matrices(random, [2 * intermediate, hidden]);
        let down = matrices(random, [hidden, intermediate]);
        let weights = |all: &[Matrix]| all.iter().map(|one| spark_cpu::dequantize(one).unwrap()).collect();
        let (gate_up_values, down_values) = (weights(&gate_up), weights(&down));
        let pack = |all: Vec<Matrix>| {
            let one = |part| PackedHost::pack(&LinearWeight { parts: vec![part], bias: None }).unwrap();
            PackedHost::stack(all.into_iter().map(one)).unwrap()
        };
        // Expert 1 has no rows but one; choices that do not exist are in no list.
        let chosen: Vec<usize> =
            (0..rows * top_k).map(|pair| [0, 2, 2, 0, 9][random.below(5)] + usize::from(pair == 5)).collect();
        let (mut pairs, mut tiles) = (Vec::new(), Vec::new());
        for expert in 0..experts {
            let own: Vec<u32> =
                (0..rows * top_k).filter(|&pair| chosen[pair] == expert).map(|pair| pair as u32).collect();
            for tile in own.chunks(tokens) {
                tiles.push([expert as u32, pairs.len() as u32, tile.len() as u32, 0]);
                pairs.extend(tile);
            }
        }
        // Unused, as the last ones of a launch are.
        tiles.push([0; 4]);
        let x = random_rows(random, rows, hidden);
        let packed = [pack(gate_up), pack(down)];
        Self {
            rows,
            hidden,
            intermediate,
            top_k,
            x,
            gate_up: gate_up_values,
            down: down_values,
            packed,
            pairs,
            tiles,
        }
    }

    fn experts(&self) -> impl Iterator<Item = (usize, u32, usize)> {
        let places = self
            .tiles
            .iter()
            .flat_map(|&[expert, first, count, _]| (first..first + count).map(move |at| (at, expert)));
        places.map(|(at, expert)| (at as usize, self.pairs[at as usize], expert as usize))
    }

    fn run(&self, block: Block) -> (Vec<f32>, Done, [u64; 3]) {
        let Self { rows, hidden, intermediate, top_k, .. } = *self;
        let (num_pairs, mut work) = (rows * top_k, Work::default());
        let lists = GemmParams {
            tiles: work.words(self.tiles.iter().flatten().copied()),
            pairs: work.words(
                self.pairs.iter().copied().chain(std::iter::repeat_n(0, num_pairs - self.pairs.len())),
            ),
            ..GemmParams::default()
        };
        let x_at = work.buffer(bf16_bytes(&self.x));
        let x_rows = quantize(&mut work, x_at, [rows, hidden], None);
        let inner = work.room(2 * num_pairs * intermediate);
        let dense = dense_params(&self.packed[0], [0, hidden], What::GateUp);
        let gate_up = GemmParams {
            out: inner,
            tiles: lists.tiles,
            pairs: lists.pairs,
            out_columns: intermediate as u32,
            num_rows: intermediate as u32,
            top_k: top_k as u32,
            ..with_weight(&mut work, &self.packed[0], dense)
        };
        launch(&mut work, block, [intermediate.div_ceil(BLOCK_ROWS / 2), self.tiles.len()], x_rows, gate_up);
        let inner_rows = quantize(&mut work, inner, [num_pairs, intermediate], None);
        let dense = dense_params(&self.packed[1], [0, intermediate], What::Down);
        let down = GemmParams {
            out: work.room(2 * num_pairs * hidden),
            factors: work.room(4 * num_pairs * hidden.div_ceil(BLOCK_ROWS)),
            tiles: lists.tiles,
            pairs: lists.pairs,
            ..with_weight(&mut work, &self.packed[1], dense)
        };
        launch(&mut work, block, [hidden.div_ceil(BLOCK_ROWS), self.tiles.len()], inner_rows, down);
        let done = MODULE.run(&work);
        (done.bf16s(inner), done, [down.out, down.factors, 0])
    }
}

#[test]
fn emulated_experts_are_float64s() {
    let mut random = Random::new(5);
    for (sizes, block) in [
        ([40, 80, 48], Block::Tokens64),
        ([90, 144, 80], Block::Tokens64),
        ([150, 272, 144], Block::Tokens128),
    ] {
        let layer = Layer::new(&mut random, sizes, block.tokens());
        let (inner, done, [out, factors, _]) = layer.run(block);
        let (hidden, intermediate) = (layer.hidden, layer.intermediate);
        let x = host_rows(&layer.x, hidden, None);
        let partial: Vec<f32> = done
            .bytes(out)
            .chunks_exact(2)
            .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect();
        let factors = done.floats(factors);
        for (at, pair, expert) in layer.experts() {
            let what = format!("{sizes:?}, pair {pair} of expert {expert}");
            // gate_up: rounded to bf16, then the activation of gate, then the product.
            let row = &inner[at * intermediate..][..intermediate];
            let both = product(&x[pair as usize / layer.top_k..][..1], &layer.gate_up[expert], hidden);
            let want: Vec<(f64, f64)> = (0..intermediate)
                .map(|i| {
                    let ((gate, gate_size), (up, up_size)) = (both[i], both[intermediate + i]);
                    let value = gate / (1.0 + (-gate).exp()) * up;
                    // A part in 2^8 of both, with the slope of the activation (below 1.1), and what sums lose.
                    let error = 1.1 * (gate.abs() + gate_size / 512.0) * up.abs()
                        + gate.abs() * (up.abs() + up_size / 512.0);
                    (value, 4096.0 * error)
                })
                .collect();
            assert_near(&what, row, &want);
            // down reads what gate_up has left, so it is held to the same precision as a layer, but for 11 bits of the largest.
            let quantised = HostRow::new(row, None);
            let want = product(std::slice::from_ref(&quantised), &layer.down[expert], intermediate);
            let got: Vec<f32> = (0..hidden)
                .map(|i| {
                    let factor = factors[pair as usize * hidden.div_ceil(BLOCK_ROWS) + i / BLOCK_ROWS];
                    partial[pair as usize * hidden + i] * factor
                })
                .collect();
            let largest = want.iter().fold(0.0f64, |most, (sum, _)| most.max(sum.abs()));
            let want: Vec<_> =
                want.iter().map(|&(sum, size)| (sum, size + 256.0 * sum.abs() + 0.25 * largest)).collect();
            assert_near(&what, &got, &want);
        }
    }
}

#[test]
fn stages_fit_the_smallest_device_and_hold_the_results() {
    for block in [Block::Tokens64, Block::Tokens128] {
        // The kernel's own: three words for each row of x.
        let bytes = shared_bytes(block) + 12 * block.tokens();
        assert!(bytes <= 101_376, "{block:?}: {bytes}");
        assert!(shared_bytes(block) >= 32 * (BLOCK_ROWS + 4) * 4);
        // Blocks on a multiprocessor of GB10, as the kernels are compiled for, with what each takes besides.
        let blocks = if block == Block::Tokens64 { 3 } else { 2 };
        assert!(blocks * (bytes + 1024) <= 100 << 10, "{block:?}: {bytes}");
    }
}
