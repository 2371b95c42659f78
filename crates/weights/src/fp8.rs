//! A dense matrix made FP8 while it is loaded: E4M3 values with a scale for each row and 128 inputs. The only quantisation that loading
//! does; that of whole checkpoints is another crate's.

use std::{num::NonZero, ops::Range, thread};

use half::{bf16, f16};
use spark_backend::{Dtype, LinearWeight, Matrix, MatrixData};

use crate::error::{Error, Result};

/// Inputs of a row that share a scale: what every backend can keep.
const BLOCK: usize = 128;
/// The largest E4M3 value.
const LARGEST: f32 = 448.0;
/// Weights that are worth a thread.
const THREAD_WEIGHTS: usize = 1 << 20;

/// `weight`, whose parts are dense, as E4M3 with a float32 scale for each row and 128 inputs: the largest of them becomes 448, the others are
/// rounded to the nearest value, ties to even. The result depends on each row alone, so not on how rows are divided. `name` is for messages.
///
/// # Errors
/// [`Error::Unsupported`] for a part that is quantised already; [`Error::Param`] when a value is not finite, or the bytes do not fit the shape.
pub fn to_fp8(name: &str, weight: LinearWeight) -> Result<LinearWeight> {
    let parts = weight.parts.iter().map(|part| matrix(name, part)).collect::<Result<_>>()?;
    Ok(LinearWeight { parts, bias: weight.bias })
}

fn matrix(name: &str, part: &Matrix) -> Result<Matrix> {
    let &Matrix { n, k, ref data } = part;
    let MatrixData::Dense { dtype, values } = data else {
        return Err(Error::Unsupported {
            module: name.to_owned(),
            reason: "is quantised in the checkpoint already, and what was rounded once is not rounded again; leave the format out to \
                     use it as it is"
                .to_owned(),
        });
    };
    let row_bytes = k * dtype.size();
    if values.len() != n * row_bytes {
        let reason = format!("[{n}, {k}] of {dtype:?} is {} bytes, not {}", n * row_bytes, values.len());
        return Err(Error::Param { name: name.to_owned(), reason });
    }
    let blocks = k.div_ceil(BLOCK);
    let (mut codes, mut scales) = (vec![0; n * k], vec![1.0; n * blocks]);
    if codes.is_empty() {
        let data = MatrixData::Fp8 { values: codes.into(), scales, block: [1, BLOCK] };
        return Ok(Matrix { n, k, data });
    }
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let rows = n.div_ceil(cores.min((n * k).div_ceil(THREAD_WEIGHTS)));
    let is_finite = thread::scope(|scope| {
        let pieces = codes.chunks_mut(rows * k).zip(scales.chunks_mut(rows * blocks)).enumerate();
        let workers: Vec<_> = pieces
            .map(|(i, (codes, scales))| {
                let first = i * rows;
                let values = &values[row_range(first..first + codes.len() / k, row_bytes)];
                scope.spawn(move || {
                    let rows = values.chunks_exact(row_bytes).zip(codes.chunks_exact_mut(k));
                    let mut row = vec![0.0; k];
                    rows.zip(scales.chunks_exact_mut(blocks)).all(|((values, codes), scales)| {
                        decode(*dtype, values, &mut row);
                        quantize_row(&row, codes, scales)
                    })
                })
            })
            .collect();
        // A worker cannot panic; if one did, its rows would be wrong.
        workers.into_iter().all(|worker| worker.join().unwrap_or(false))
    });
    if !is_finite {
        let reason = "has values that are not finite; the checkpoint is damaged, get it again".to_owned();
        return Err(Error::Param { name: name.to_owned(), reason });
    }
    Ok(Matrix { n, k, data: MatrixData::Fp8 { values: codes.into(), scales, block: [1, BLOCK] } })
}

/// Where `rows` lie.
fn row_range(rows: Range<usize>, row_bytes: usize) -> Range<usize> {
    rows.start * row_bytes..rows.end * row_bytes
}

fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*b);
            }
        }
        Dtype::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f16::from_le_bytes(*b).to_f32();
            }
        }
        Dtype::Bf16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = bf16::from_le_bytes(*b).to_f32();
            }
        }
    }
}

/// Whether all values are finite.
fn quantize_row(row: &[f32], codes: &mut [u8], scales: &mut [f32]) -> bool {
    let mut is_finite = true;
    for ((values, codes), scale) in row.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(scales) {
        // Of numbers that are not negative, the order is that of their bits, and what is not finite is above the rest.
        let bits = values.iter().map(|value| value.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let largest = f32::from_bits(bits);
        is_finite &= largest.is_finite();
        // Blocks of zeros, and of numbers too small for a normal scale, are zeros.
        let of_largest = largest / LARGEST;
        if !of_largest.is_normal() {
            codes.fill(0);
            continue;
        }
        *scale = of_largest;
        for (code, value) in codes.iter_mut().zip(values) {
            *code = e4m3(value / of_largest);
        }
    }
    is_finite
}

/// The nearest E4M3 value, ties to even, of a number of up to 448 and a rounding error; without branches, so that loops vectorise.
fn e4m3(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24) as u8 & 0x80;
    let magnitude = f32::from_bits(bits & 0x7fff_ffff).min(LARGEST);
    // Below 2^-6 values are multiples of 2^-9: the sum with 2^14 drops the rest, and leaves their number in the lowest bits.
    let small = (magnitude + 16384.0).to_bits() as u8;
    let bits = magnitude.to_bits();
    // Half of the dropped unit, less one bit where the kept part is even.
    let normal = (bits.wrapping_add(0x7_ffff + ((bits >> 20) & 1)) >> 20).wrapping_sub(120 << 3) as u8;
    sign | if magnitude < 1.0 / 64.0 { small } else { normal }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::dequantize;

    fn dense(n: usize, k: usize, value: impl Fn(usize) -> f32) -> Matrix {
        let values: Vec<u8> = (0..n * k).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect();
        Matrix { n, k, data: MatrixData::Dense { dtype: Dtype::Bf16, values: values.into() } }
    }

    fn layer(part: Matrix) -> LinearWeight {
        LinearWeight { parts: vec![part], bias: None }
    }

    #[test]
    fn every_value_is_the_nearest() {
        let all: Vec<f32> = (0..0x7f).map(dequantize::e4m3).collect();
        for (code, pair) in all.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            assert_eq!(usize::from(e4m3(pair[0])), code);
            assert_eq!(usize::from(e4m3(middle)), code + code % 2, "tie at {middle}");
            assert_eq!(usize::from(e4m3(middle * 0.9999)), code);
            assert_eq!(usize::from(e4m3(-middle * 1.0001)), 0x80 | (code + 1));
        }
        assert_eq!([e4m3(448.0001), e4m3(-449.0)], [0x7e, 0xfe]);
    }

    #[test]
    fn a_row_keeps_its_largest_value_and_little_is_lost() {
        // A last block of 4, a block of zeros, a large value among small ones.
        let value = |i: usize| match i % 260 {
            128..256 if i >= 260 => 0.0,
            7 => -3.0,
            at => ((i * 37) % 101) as f32 * 0.001 * if at % 2 == 0 { 1.0 } else { -1.0 },
        };
        let part = dense(3, 260, value);
        let want = dequantize::dequantize(&part);
        let got = to_fp8("head", layer(part.clone())).unwrap();
        let MatrixData::Fp8 { scales, block, .. } = &got.parts[0].data else { panic!("{:?}", got.parts[0]) };
        assert_eq!((scales.len(), *block), (9, [1, 128]));
        assert_eq!(scales[0], 3.0 / 448.0);
        let back = dequantize::dequantize(&got.parts[0]);
        assert_eq!(back[7], want[7]);
        for (i, (got, want)) in back.iter().zip(&want).enumerate() {
            // Half of the last of four bits, or of the smallest number.
            let bound = (want.abs() / 16.0).max(scales[i / 260 * 3 + i % 260 / 128] / 1024.0);
            assert!((got - want).abs() <= bound, "{i}: {got} for {want}");
        }
        // The rows of a share are those of the whole.
        let share = to_fp8("head", layer(dense(1, 260, |i| value(i + 260)))).unwrap();
        assert_eq!(dequantize::dequantize(&share.parts[0]), back[260..520]);
    }

    #[test]
    fn rows_are_divided_among_threads() {
        let value = |i: usize| (i % 977) as f32 - 400.0;
        let all = to_fp8("head", layer(dense(1537, 2048, value))).unwrap();
        let back = dequantize::dequantize(&all.parts[0]);
        for row in [0, 511, 512, 513, 1024, 1536] {
            let one = to_fp8("head", layer(dense(1, 2048, |i| value(i + row * 2048)))).unwrap();
            assert_eq!(dequantize::dequantize(&one.parts[0]), back[row * 2048..(row + 1) * 2048], "{row}");
        }
    }

    #[test]
    fn what_is_quantised_or_broken_is_refused() {
        let once = to_fp8("lm_head", layer(dense(2, 8, |i| i as f32))).unwrap();
        let message = to_fp8("lm_head", once).unwrap_err().to_string();
        assert!(message.starts_with("`lm_head`: is quantised in the checkpoint already"), "{message}");
        for bad in [f32::NAN, f32::NEG_INFINITY] {
            let broken = dense(2, 8, |i| if i == 11 { bad } else { 1.0 });
            let message = to_fp8("lm_head", layer(broken)).unwrap_err().to_string();
            assert!(message.contains("not finite"), "{message}");
        }
        let short = Matrix { n: 3, ..dense(2, 8, |_| 1.0) };
        assert!(to_fp8("lm_head", layer(short)).is_err());
        assert_eq!(to_fp8("lm_head", layer(dense(0, 8, |_| 1.0))).unwrap().n(), 0);
    }
}
