//! Products with packed weights: linear layers, logits, embedding rows. Formats are in `weight.rs`, loops in `dot.rs`.

use crate::dot::{LANES, products};
use crate::nvfp4::round_nvfp4;
use crate::tensor::{Compute, CpuTensor};
use crate::weight::CpuLinear;
use pulp::{Simd, WithSimd};
use spark_backend::{Error, Result};
use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

/// Output features of one parallel task: their float32 rows stay in the second-level cache while the tokens pass.
const PANEL: usize = 32;
/// Output features dequantised at a time when there are few tokens: they stay in the first-level cache.
const STRIP: usize = 4;

thread_local! {
    /// Dequantised rows of the panel that this thread works on; grows to the largest and stays.
    static ROWS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `x W^T` of `m` rows `[m, k]`, without bias, **transposed**: `[n, m]` float32, unrounded.
pub(crate) fn product(compute: &Compute, weight: &CpuLinear, x: &[f32], m: usize) -> Vec<f32> {
    let rounded = (compute.nvfp4_rows && weight.is_nvfp4()).then(|| {
        let mut rounded = x.to_vec();
        rounded.chunks_mut(weight.k).for_each(round_nvfp4);
        rounded
    });
    let x = padded(rounded.as_deref().unwrap_or(x), weight.k);
    let mut out = vec![0.0; weight.n * m];
    let work = weight.n * weight.k * m;
    compute.for_chunks(&mut out, PANEL * m, work, |index, out| {
        ROWS.with_borrow_mut(|rows| {
            compute.arch.dispatch(Panel { weight, x: &x, m, first: index * PANEL, rows, out });
        });
    });
    out
}

/// Rows of `k` values, each padded with zeros to a multiple of [`LANES`].
fn padded(x: &[f32], k: usize) -> Cow<'_, [f32]> {
    let padded = k.next_multiple_of(LANES);
    if padded == k || k == 0 {
        return Cow::Borrowed(x);
    }
    let mut out = vec![0.0; x.len() / k * padded];
    for (out, row) in out.chunks_exact_mut(padded).zip(x.chunks_exact(k)) {
        out[..k].copy_from_slice(row);
    }
    Cow::Owned(out)
}

/// Output features from `first` on: dequantise some, multiply them with all rows of `x`, go on.
struct Panel<'a> {
    weight: &'a CpuLinear,
    /// `[m, k padded]`.
    x: &'a [f32],
    m: usize,
    first: usize,
    rows: &'a mut Vec<f32>,
    /// `[features, m]`.
    out: &'a mut [f32],
}

impl WithSimd for Panel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let k = self.weight.k;
        let padded = k.next_multiple_of(LANES);
        let strip = if self.m <= STRIP { STRIP } else { PANEL };
        if self.rows.len() < strip * padded {
            self.rows.resize(strip * padded, 0.0);
        }
        let mut first = self.first;
        for out in self.out.chunks_mut(strip * self.m) {
            let count = out.len() / self.m;
            for row in 0..count {
                let values = &mut self.rows[row * padded..][..padded];
                self.weight.row(first + row, &mut values[..k]);
                values[k..].fill(0.0);
            }
            products(simd, self.rows, count, self.x, self.m, padded, out);
            first += count;
        }
    }
}

/// `[n, m]` to `[m, n]`, plus bias. Unrounded.
pub(crate) fn transposed(compute: &Compute, values: Vec<f32>, m: usize, bias: Option<&[f32]>) -> Vec<f32> {
    /// Rows of the result that are filled together: one cache line of the source.
    const BLOCK: usize = 16;
    if m == 0 {
        return values;
    }
    let n = values.len() / m;
    let mut out = values;
    if m > 1 {
        let source = out;
        out = vec![0.0; n * m];
        compute.for_chunks(&mut out, BLOCK * n, n * m, |index, out| {
            for feature in 0..n {
                let line = &source[feature * m + index * BLOCK..][..out.len() / n];
                for (t, &value) in line.iter().enumerate() {
                    out[t * n + feature] = value;
                }
            }
        });
    }
    if let Some(bias) = bias {
        for row in out.chunks_exact_mut(n) {
            row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
    }
    out
}

/// `x W^T + b`, `[rows, k]` to `[rows, n]`, rounded to the compute dtype.
pub(crate) fn linear(compute: &Compute, x: &CpuTensor, weight: &CpuLinear) -> Result<CpuTensor> {
    let mut out = linear_f32(compute, x, weight)?;
    compute.round(&mut out.values);
    Ok(out)
}

/// [`linear`] without rounding: logits.
pub(crate) fn linear_f32(compute: &Compute, x: &CpuTensor, weight: &CpuLinear) -> Result<CpuTensor> {
    x.expect("linear", [x.rows(), weight.k])?;
    let m = x.rows();
    let out = transposed(compute, product(compute, weight, &x.values, m), m, weight.bias.as_deref());
    Ok(CpuTensor::new(out, [m, weight.n]))
}

/// Rows `tokens` of a table of `vocab_rows` rows, of which `table` holds those of `share`, rounded to the compute dtype:
/// `[tokens, k]`. Rows that another rank holds are zero.
pub(crate) fn embed(
    compute: &Compute,
    table: &CpuLinear,
    share: Range<usize>,
    vocab_rows: usize,
    tokens: &[u32],
) -> Result<CpuTensor> {
    let k = table.k;
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab_rows) {
        return Err(Error::shape("embed", format!("token ids under {vocab_rows}"), token));
    }
    let mut values = vec![0.0; tokens.len() * k];
    compute.for_chunks(&mut values, k, tokens.len() * k, |i, out| {
        let token = tokens[i] as usize;
        if share.contains(&token) {
            table.row(token - share.start, out);
        }
    });
    compute.round(&mut values);
    Ok(CpuTensor::new(values, [tokens.len(), k]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, backend, tensor};
    use crate::{CpuBackend, dequantize};
    use spark_backend::{Backend, Dtype, LinearWeight, Matrix, MatrixData};

    fn e4m3_bytes(random: &mut Random, n: usize) -> Vec<u8> {
        // Without NaN: exponents up to 0x6f.
        random.bytes(n).into_iter().map(|b| b & 0xef).collect()
    }

    /// One matrix of every scheme, with an odd number of rows.
    fn matrices(random: &mut Random, n: usize, k: usize) -> Vec<Matrix> {
        let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let halves = |values: &[f32], bits: fn(f32) -> u16| {
            values.iter().flat_map(|&v| bits(v).to_le_bytes()).collect::<Vec<u8>>()
        };
        let bf16 = |v: f32| half::bf16::from_f32(v).to_bits();
        let f16 = |v: f32| half::f16::from_f32(v).to_bits();
        let dense = random.normal(n * k);
        let groups = n * k.div_ceil(32);
        let scales = random.normal(groups);
        vec![
            MatrixData::Dense { dtype: Dtype::F32, values: f32s(&dense).into() },
            MatrixData::Dense { dtype: Dtype::Bf16, values: halves(&dense, bf16).into() },
            MatrixData::Dense { dtype: Dtype::F16, values: halves(&dense, f16).into() },
            MatrixData::Int4 {
                codes: random.bytes(n * k / 2).into(),
                zeros: Some(random.bytes(groups).iter().map(|b| b & 15).collect::<Vec<u8>>().into()),
                scales: halves(&scales, f16).into(),
                scale_dtype: Dtype::F16,
                group_size: 32,
            },
            MatrixData::Int4 {
                codes: random.bytes(n * k / 2).into(),
                zeros: None,
                scales: halves(&scales, bf16).into(),
                scale_dtype: Dtype::Bf16,
                group_size: 32,
            },
            MatrixData::Nvfp4 {
                codes: random.bytes(n * k / 2).into(),
                scales: e4m3_bytes(random, n * k.div_ceil(16)).into(),
                alpha: 0.37,
            },
            MatrixData::Fp8 {
                values: e4m3_bytes(random, n * k).into(),
                scales: random.normal(n.div_ceil(5) * k.div_ceil(24)),
                block: [5, 24],
            },
        ]
        .into_iter()
        .map(|data| Matrix { n, k, data })
        .collect()
    }

    fn naive(weight: &[f32], bias: Option<&[f32]>, x: &[f32], k: usize) -> Vec<f64> {
        let mut out = Vec::new();
        for x in x.chunks_exact(k) {
            for (j, w) in weight.chunks_exact(k).enumerate() {
                let sum: f64 = x.iter().zip(w).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                out.push(sum + bias.map_or(0.0, |bias| f64::from(bias[j])));
            }
        }
        out
    }

    #[test]
    fn every_scheme_matches_the_definition() {
        let mut random = Random::new(3);
        for (n, k) in [(37, 64), (5, 90), (70, 16)] {
            for matrix in matrices(&mut random, n, k) {
                let weight = dequantize(&matrix).unwrap();
                let bias = random.normal(n);
                let b = backend(Dtype::F32);
                let linear =
                    b.linear_weight(LinearWeight { parts: vec![matrix], bias: Some(bias.clone()) }).unwrap();
                for m in [1, 2, 5, 33] {
                    let x = random.normal(m * k);
                    let want = naive(&weight, Some(&bias), &x, k);
                    let got = b.linear(&tensor(&b, x, k), &linear).unwrap();
                    assert_eq!(got.shape(), [m, n]);
                    assert_close(got.values(), &want, 1e-5);
                }
            }
        }
    }

    #[test]
    fn mixed_parts_are_concatenated() {
        let mut random = Random::new(4);
        let parts = matrices(&mut random, 7, 32);
        let weight: Vec<f32> = parts.iter().flat_map(|part| dequantize(part).unwrap()).collect();
        let b = backend(Dtype::F32);
        let linear = b.linear_weight(LinearWeight { parts, bias: None }).unwrap();
        let x = random.normal(3 * 32);
        let want = naive(&weight, None, &x, 32);
        assert_close(b.linear(&tensor(&b, x, 32), &linear).unwrap().values(), &want, 1e-5);
    }

    #[test]
    fn a_row_is_the_same_alone_and_batched_and_on_any_number_of_threads() {
        let mut random = Random::new(5);
        let (n, k, m) = (131, 640, 9);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for matrix in matrices(&mut random, n, k) {
                let weight = || LinearWeight { parts: vec![matrix.clone()], bias: None };
                let x = random.normal(m * k);
                let run = |threads, x: &[f32]| {
                    let b = CpuBackend::new(dtype, Some(threads)).unwrap();
                    let weight = b.linear_weight(weight()).unwrap();
                    b.linear(&tensor(&b, x.to_vec(), k), &weight).unwrap().values
                };
                let whole = run(1, &x);
                assert_eq!(whole, run(3, &x));
                for t in 0..m {
                    assert_eq!(whole[t * n..][..n], run(2, &x[t * k..][..k]));
                }
                assert_eq!(whole[..5 * n], run(2, &x[..5 * k]));
            }
        }
    }

    #[test]
    fn bf16_results_are_bf16_numbers_and_the_bias_is_added_before_rounding() {
        let b = backend(Dtype::Bf16);
        let values: Vec<u8> = 1.0f32.to_le_bytes().to_vec();
        let part =
            Matrix { n: 1, k: 1, data: MatrixData::Dense { dtype: Dtype::F32, values: values.into() } };
        let bias = Some(vec![1.0 / 512.0]);
        let linear = b.linear_weight(LinearWeight { parts: vec![part], bias }).unwrap();
        // 1 + 2^-7 + 2^-9 rounds to 1 + 2^-7; the half-way 1 + 2^-7 + 2^-8 would go up.
        let got = b.linear(&tensor(&b, vec![1.0 + 1.0 / 128.0], 1), &linear).unwrap();
        assert_eq!(got.values(), [1.0 + 1.0 / 128.0]);
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let mut random = Random::new(6);
        let b = backend(Dtype::F32);
        let matrix = matrices(&mut random, 4, 32).remove(0);
        let linear = b.linear_weight(LinearWeight { parts: vec![matrix.clone()], bias: None }).unwrap();
        assert!(b.linear(&tensor(&b, vec![0.0; 31], 31), &linear).is_err());
        assert!(b.linear_weight(LinearWeight { parts: vec![], bias: None }).is_err());
        let short = LinearWeight { parts: vec![matrix.clone()], bias: Some(vec![0.0; 3]) };
        assert!(b.linear_weight(short).is_err());
        let other = matrices(&mut random, 4, 16).remove(0);
        assert!(b.linear_weight(LinearWeight { parts: vec![matrix, other], bias: None }).is_err());
        let empty = b.linear(&CpuTensor::new(vec![], [0, 32]), &linear).unwrap();
        assert_eq!(empty.shape(), [0, 4]);
    }

    #[test]
    fn embedding_rows_across_parts() {
        let mut random = Random::new(7);
        let parts = matrices(&mut random, 3, 32);
        let all: Vec<f32> = parts.iter().flat_map(|part| dequantize(part).unwrap()).collect();
        let b = backend(Dtype::F32);
        let table = b.linear_weight(LinearWeight { parts, bias: None }).unwrap();
        let got = embed(&b.compute, &table, 0..21, 21, &[20, 0, 4]).unwrap();
        for (i, token) in [20, 0, 4].into_iter().enumerate() {
            assert_eq!(got.row(i), &all[token * 32..][..32]);
        }
        assert!(embed(&b.compute, &table, 0..21, 21, &[21]).is_err());
        // Of a larger table, the rows of others are zero.
        let part = embed(&b.compute, &table, 10..31, 40, &[10, 9, 31, 30]).unwrap();
        assert_eq!(part.row(0), &all[..32]);
        assert_eq!(part.row(3), &all[20 * 32..]);
        assert!(part.values()[32..3 * 32].iter().all(|&value| value == 0.0));
    }
}
