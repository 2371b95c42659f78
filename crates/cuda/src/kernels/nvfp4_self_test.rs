//! Whether a device multiplies NVFP4 as `nvfp4_mma.rs` counts on: no such device was at hand when the kernels were written, so each one
//! shows it before a model uses them. Weights of these products are random, and not a model's.

use std::fmt;

use half::bf16;
use spark_backend::{Dtype, LinearWeight, Matrix, MatrixData};

use super::gemm::{Block, GemmCut};
use super::nvfp4_host::HostRow;
use super::{Kernels, PackedHost, PackedWeight};
use crate::{Arch, Arena, ArenaPlan, Device, Pool, Result, Stream, Tensor};

/// Rows of x, of W, inputs: tails in every dimension, several steps, tiles and blocks of either size.
const ROWS: usize = 140;
const N: usize = 300;
const K: usize = 400;
/// Memory for operands and results.
const POOL_BYTES: u64 = 4 << 20;
/// Most of a result's error: a part of the sum of the magnitudes that it adds up. Tensor cores may cut sums at 13 bits.
const MOST_ERROR: f64 = 1.0 / 4096.0;
/// Most of the root mean square of what quantising x changes, as a part of the results'. A number is moved by at most a sixth of the
/// largest of its 16 (half the step between 4 and 6), evenly spread a part in 6 sqrt 3 of it; the largest of 16 normal numbers is about
/// twice their root mean square, so 0.19 if all were in the widest step. Most are in narrower ones: 0.1 is usual.
const MOST_CHANGE: f64 = 0.19;

/// What the test found.
#[derive(Debug, Clone, PartialEq)]
pub enum Nvfp4Test {
    /// Its tensor cores have no such instruction.
    NotOnThisArchitecture(Arch),
    /// Products are those of the definition.
    Passed {
        /// Root mean square of what quantising x changes, as a part of the results' (W4A4 against W4A16).
        change: f64,
        /// Largest error of a result against the definition, as a part of the magnitudes that it adds up.
        error: f64,
    },
    /// They are not: the first thing that was wrong.
    Failed(String),
}

impl Nvfp4Test {
    /// Whether products in NVFP4 may be used.
    pub fn has_passed(&self) -> bool {
        matches!(self, Self::Passed { .. })
    }
}

impl fmt::Display for Nvfp4Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOnThisArchitecture(arch) => {
                write!(f, "not on this architecture: {arch} has no FP4 products")
            }
            Self::Passed { change, error } => {
                write!(
                    f,
                    "passed: W4A4 differs from W4A16 by {change:.3}, from its definition by {error:.1e}"
                )
            }
            Self::Failed(what) => write!(f, "failed: {what}"),
        }
    }
}

/// Numbers of one product: rows of x that bf16 holds, weights, their values.
struct Case {
    x: Vec<f32>,
    weight: LinearWeight,
    values: Vec<f32>,
    /// The factor of all rows, or each has its own.
    given: Option<f32>,
}

/// A small generator (splitmix64): the test is the same every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, bound: u64) -> usize {
        (self.next() % bound) as usize
    }

    /// About normal: twelve even numbers added.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32).sum::<f32>() - 6.0
    }
}

/// The E2M1 numbers by their code.
const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
/// E4M3 bits of 0.5, 1, 2 and their values.
const POWERS: [(u8, f32); 3] = [(0x30, 0.5), (0x38, 1.0), (0x40, 2.0)];

impl Case {
    /// Numbers that stay as they are when they are quantised and whose sums float32 holds, so that every way of adding has one result.
    fn exact(numbers: &mut Numbers) -> Self {
        let mut x = Vec::with_capacity(ROWS * K);
        for _ in 0..ROWS * K / 16 {
            // A group's largest number is 6 of its scale.
            let (scale, first) = (POWERS[numbers.below(3)].1, x.len());
            x.extend((0..16).map(|_| scale * E2M1[numbers.below(16)]));
            let at = first + numbers.below(16);
            x[at] = 6.0 * scale;
        }
        let groups: Vec<(u8, f32)> = (0..N * K / 16).map(|_| POWERS[numbers.below(3)]).collect();
        Self::new(numbers, x, &groups, 1.0, Some(1.0))
    }

    /// Normal numbers and scales of every kind.
    fn random(numbers: &mut Numbers) -> Self {
        let x = (0..ROWS * K).map(|_| bf16::from_f32(numbers.normal()).to_f32()).collect();
        let groups: Vec<(u8, f32)> = (0..N * K / 16)
            .map(|_| {
                let (exponent, mantissa) = (numbers.below(4), numbers.below(8));
                let value = (8 + mantissa) as f32 * (1 << exponent) as f32 / 64.0;
                ((exponent + 4) as u8 * 8 + mantissa as u8, value)
            })
            .collect();
        Self::new(numbers, x, &groups, 0.75, None)
    }

    fn new(numbers: &mut Numbers, x: Vec<f32>, groups: &[(u8, f32)], alpha: f32, given: Option<f32>) -> Self {
        let codes: Vec<usize> = (0..N * K).map(|_| numbers.below(16)).collect();
        let value = |(i, &code): (usize, &usize)| E2M1[code] * groups[i / 16].1 * alpha;
        let values = codes.iter().enumerate().map(value).collect();
        let packed: Vec<u8> = codes.chunks_exact(2).map(|pair| (pair[0] | pair[1] << 4) as u8).collect();
        let scales: Vec<u8> = groups.iter().map(|(bits, _)| *bits).collect();
        let data = MatrixData::Nvfp4 { codes: packed.into(), scales: scales.into(), alpha };
        let weight = LinearWeight { parts: vec![Matrix { n: N, k: K, data }], bias: None };
        Self { x, weight, values, given }
    }

    /// Results by the definition, and the magnitudes that each adds up.
    fn want(&self) -> Vec<(f64, f64)> {
        let mut out = Vec::with_capacity(ROWS * N);
        for row in self.x.chunks_exact(K) {
            let x = HostRow::new(row, self.given).values();
            for weights in self.values.chunks_exact(K) {
                let terms = x.iter().zip(weights).map(|(x, &w)| x * f64::from(w));
                out.push(terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs())));
            }
        }
        out
    }
}

/// What a device made of a case.
struct Results {
    /// W4A16.
    plain: Vec<f32>,
    /// W4A4, in blocks of 64 and of 128 rows.
    quantised: [Vec<f32>; 2],
}

impl Kernels {
    /// Multiplies NVFP4 by NVFP4 on `stream`'s device and compares with float64 and with products of x as it is. Allocates a few MiB,
    /// which are free again afterwards.
    ///
    /// # Errors
    /// [`crate::Error::Driver`], [`crate::Error::Memory`]: that it could not be tested.
    pub fn test_nvfp4(&self, device: &Device, stream: &Stream) -> Result<Nvfp4Test> {
        if !device.arch().has_fp4() {
            return Ok(Nvfp4Test::NotOnThisArchitecture(device.arch()));
        }
        let mut plan = ArenaPlan::default();
        let region = plan.add("the test of NVFP4", POOL_BYTES)?;
        let pool = Pool::new(&Arena::new(device, plan)?.region(region)?);
        let mut numbers = Numbers(20);
        let (exact, random) = (Case::exact(&mut numbers), Case::random(&mut numbers));
        let found = [self.results(stream, &pool, &exact)?, self.results(stream, &pool, &random)?];
        Ok(judge(&exact, &random, &found))
    }

    fn results(&self, stream: &Stream, pool: &Pool, case: &Case) -> Result<Results> {
        let host = PackedHost::pack(&case.weight)?;
        let weight =
            PackedWeight::upload(stream, &pool.take("test weights", PackedWeight::num_bytes(&host))?, &host)?;
        let x = pool.tensor("test rows", [ROWS, K], Dtype::Bf16)?;
        let bits: Vec<u16> = case.x.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
        stream.upload(x.slice(), &bits)?;
        let out = pool.tensor("test results", [ROWS, N], Dtype::F32)?;
        let download = |out: &Tensor| stream.download::<f32>(out.slice(), ROWS * N);

        self.gemm_cut(stream, pool, &x, &weight, (&out, 0), GemmCut::of(K, Block::Tokens128, 1))?;
        let plain = download(&out)?;
        let quantised = |block| {
            // What an earlier product left must not pass for a result.
            stream.fill(out.slice(), 0xff)?;
            let how = (GemmCut::of(K, block, 1), case.given);
            self.gemm_nvfp4x_cut(stream, pool, &x, &weight, (&out, 0), how)?;
            download(&out)
        };
        Ok(Results { plain, quantised: [quantised(Block::Tokens64)?, quantised(Block::Tokens128)?] })
    }
}

/// What results say of the device.
fn judge(exact: &Case, random: &Case, [of_exact, of_random]: &[Results; 2]) -> Nvfp4Test {
    let want = exact.want();
    for (got, rows) in of_exact.quantised.iter().zip([64, 128]) {
        for (i, (&got, &(want, _))) in got.iter().zip(&want).enumerate() {
            // Bit for bit, but for the sign of a zero.
            if f64::from(got) != want || got != of_exact.plain[i] {
                let plain = of_exact.plain[i];
                let place = format!("row {} column {} in blocks of {rows} rows", i / N, i % N);
                return Nvfp4Test::Failed(format!("{place} is {got}, exactly {want} (W4A16: {plain})"));
            }
        }
    }
    let want = random.want();
    let mut most = 0.0f64;
    for (i, &(want, size)) in want.iter().enumerate() {
        for got in &of_random.quantised {
            let error = (f64::from(got[i]) - want).abs() / size;
            // Not a number is an error, too.
            if error.is_nan() || error > MOST_ERROR {
                let place = format!("row {} column {}", i / N, i % N);
                return Nvfp4Test::Failed(format!("{place} is {}, by its definition {want}", got[i]));
            }
            most = most.max(error);
        }
    }
    let [changes, sizes] = [true, false].map(|is_change| {
        let both = of_random.quantised[1].iter().zip(&of_random.plain);
        both.map(|(&got, &plain)| f64::from(if is_change { got - plain } else { plain }).powi(2)).sum::<f64>()
    });
    let change = (changes / sizes).sqrt();
    if change.is_nan() || change > MOST_CHANGE {
        return Nvfp4Test::Failed(format!(
            "W4A4 differs from W4A16 by {change:.3}, at most {MOST_CHANGE} is right"
        ));
    }
    Nvfp4Test::Passed { change, error: most }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device that multiplies right makes of `case`, with an error of `error` where an f32 has one.
    fn right(case: &Case) -> Results {
        let quantised: Vec<f32> = case.want().iter().map(|(sum, _)| *sum as f32).collect();
        let exact = |row: &[f32], weights: &[f32]| {
            row.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>()
        };
        let mut plain = Vec::new();
        for row in case.x.chunks_exact(K) {
            plain.extend(case.values.chunks_exact(K).map(|weights| exact(row, weights) as f32));
        }
        Results { plain, quantised: [quantised.clone(), quantised] }
    }

    #[test]
    fn right_results_pass_and_wrong_ones_do_not() {
        let mut numbers = Numbers(20);
        let (exact, random) = (Case::exact(&mut numbers), Case::random(&mut numbers));
        // Nothing is lost: x is of the format, sums fit float32.
        let mut found = [right(&exact), right(&random)];
        assert_eq!(found[0].plain, found[0].quantised[0]);
        let Nvfp4Test::Passed { change, error } = judge(&exact, &random, &found) else {
            panic!("right results fail")
        };
        assert!((0.05..0.15).contains(&change) && error < 1e-6, "{change} {error}");

        // The scales of two groups exchanged, as a wrong lane would.
        found[1].quantised[0][7] *= 1.01;
        assert!(matches!(judge(&exact, &random, &found), Nvfp4Test::Failed(_)));
        found[1] = right(&random);
        found[1].quantised[1][9] = f32::NAN;
        assert!(matches!(judge(&exact, &random, &found), Nvfp4Test::Failed(_)));
        found[1] = right(&random);
        found[0].quantised[1][300] += 0.25;
        let Nvfp4Test::Failed(what) = judge(&exact, &random, &found) else { panic!("a wrong result passes") };
        assert!(what.starts_with("row 1 column 0 in blocks of 128 rows"), "{what}");
    }

    #[test]
    fn weights_are_what_the_packed_layout_says() {
        let case = Case::random(&mut Numbers(1));
        assert_eq!(spark_cpu::dequantize(&case.weight.parts[0]).unwrap(), case.values);
    }
}
