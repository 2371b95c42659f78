//! Residual addition, RMSNorm, LayerNorm and the other elementwise operations. No products.

use crate::dot::sum_by;
use crate::math::{gelu_erf, gelu_tanh, silu};
use crate::tensor::{Compute, CpuTensor};
use spark_backend::{Activation, Error, Result};

/// RMSNorm of one row in place: statistic in float32, rounded to the compute dtype, times `weight`, rounded again (as
/// Hugging Face's `Qwen3VLMoeTextRMSNorm` does).
#[inline(always)]
pub(crate) fn rms_norm_row(compute: &Compute, row: &mut [f32], weight: &[f32], eps: f32) {
    let mean = sum_by(row, |x| x * x) / row.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    for (x, w) in row.iter_mut().zip(weight) {
        *x = compute.rounded(compute.rounded(*x * factor) * w);
    }
}

/// `residual += partial`, then RMSNorm of it.
pub(crate) fn reduce_norm(
    compute: &Compute,
    partial: Option<CpuTensor>,
    residual: &mut CpuTensor,
    weight: &CpuTensor,
    eps: f32,
) -> Result<CpuTensor> {
    let columns = residual.columns();
    weight.expect("reduce_norm weight", [1, columns])?;
    if let Some(partial) = partial {
        partial.expect("reduce_norm partial", residual.shape)?;
        add_into(compute, &mut residual.values, &partial.values);
    }
    let mut out = residual.values.clone();
    let work = 4 * out.len();
    compute.for_chunks(&mut out, columns, work, |_, row| {
        compute.arch.dispatch(
            #[inline(always)]
            || rms_norm_row(compute, row, &weight.values, eps),
        );
    });
    Ok(CpuTensor::new(out, residual.shape))
}

/// `x += y`, rounded to the compute dtype.
pub(crate) fn add_into(compute: &Compute, x: &mut [f32], y: &[f32]) {
    compute.arch.dispatch(
        #[inline(always)]
        || {
            for (x, y) in x.iter_mut().zip(y) {
                *x = compute.rounded(*x + y);
            }
        },
    );
}

/// LayerNorm over columns: mean, then variance around it, in float32; rounded once.
pub(crate) fn layer_norm(
    compute: &Compute,
    x: &CpuTensor,
    weight: &CpuTensor,
    bias: &CpuTensor,
    eps: f32,
) -> Result<CpuTensor> {
    let columns = x.columns();
    weight.expect("layer_norm weight", [1, columns])?;
    bias.expect("layer_norm bias", [1, columns])?;
    let mut out = x.values.clone();
    let work = 4 * out.len();
    compute.for_chunks(&mut out, columns, work, |_, row| {
        compute.arch.dispatch(
            #[inline(always)]
            || {
                let mean = sum_by(row, |x| x) / columns as f32;
                let variance = sum_by(row, |x| (x - mean) * (x - mean)) / columns as f32;
                let factor = 1.0 / (variance + eps).sqrt();
                for ((x, w), b) in row.iter_mut().zip(&weight.values).zip(&bias.values) {
                    *x = compute.rounded(((*x - mean) * factor).mul_add(*w, *b));
                }
            },
        );
    });
    Ok(CpuTensor::new(out, x.shape))
}

/// `silu(gate) * up` of one row `[2 * intermediate]`; SiLU is rounded before the product, as a model of modules does.
#[inline(always)]
pub(crate) fn swiglu_row(compute: &Compute, gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(out.len());
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = compute.rounded(compute.rounded(silu(gate)) * up);
    }
}

/// `silu(gate) * up`: `[rows, 2 * intermediate]` to `[rows, intermediate]`.
pub(crate) fn swiglu(compute: &Compute, gate_up: &CpuTensor) -> Result<CpuTensor> {
    let [rows, columns] = gate_up.shape;
    if columns % 2 != 0 {
        return Err(Error::shape("swiglu", "an even number of columns", columns));
    }
    let mut out = vec![0.0; rows * columns / 2];
    let work = 16 * out.len();
    compute.for_chunks(&mut out, columns / 2, work, |i, out| {
        compute.arch.dispatch(
            #[inline(always)]
            || swiglu_row(compute, gate_up.row(i), out),
        );
    });
    Ok(CpuTensor::new(out, [rows, columns / 2]))
}

/// Applies an activation to every element.
pub(crate) fn activate(compute: &Compute, x: &mut CpuTensor, activation: Activation) {
    let columns = x.columns();
    let work = 16 * x.values.len();
    compute.for_chunks(&mut x.values, columns, work, |_, row| {
        compute.arch.dispatch(
            #[inline(always)]
            || match activation {
                Activation::GeluTanh => row.iter_mut().for_each(|x| *x = compute.rounded(gelu_tanh(*x))),
                Activation::GeluErf => row.iter_mut().for_each(|x| *x = compute.rounded(gelu_erf(*x))),
                Activation::Silu => row.iter_mut().for_each(|x| *x = compute.rounded(silu(*x))),
            },
        );
    });
}

/// The ranges of `rows` rows in `x` (from `row`) and in `source` (from `source_row`), checked.
pub(crate) fn row_ranges(
    op: &'static str,
    [x, source]: [&CpuTensor; 2],
    [row, source_row]: [usize; 2],
    rows: usize,
) -> Result<[std::ops::Range<usize>; 2]> {
    let columns = x.columns();
    source.expect(op, [source.rows(), columns])?;
    let range = |first: usize, tensor: &CpuTensor| {
        let end = first.checked_add(rows).filter(|&end| end <= tensor.rows());
        end.map(|end| first * columns..end * columns)
            .ok_or_else(|| Error::shape(op, format!("rows within {}", tensor.rows()), (first, rows)))
    };
    Ok([range(row, x)?, range(source_row, source)?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, backend, tensor};
    use spark_backend::{Backend, Dtype};

    #[test]
    fn reduce_norm_by_hand() {
        let b = backend(Dtype::F32);
        let mut residual = tensor(&b, vec![1.0, 2.0, 0.0, 0.0], 2);
        let partial = tensor(&b, vec![2.0, 2.0, 0.0, 1.0], 2);
        let weight = tensor(&b, vec![1.0, 2.0], 2);
        let got = b.reduce_norm(Some(partial), &mut residual, &weight, 0.0).unwrap();
        assert_eq!(residual.values(), [3.0, 4.0, 0.0, 1.0]);
        let root = 12.5f64.sqrt();
        assert_close(got.values(), &[3.0 / root, 8.0 / root, 0.0, 2.0 * 2f64.sqrt()], 1e-6);
        let plain = b.reduce_norm(None, &mut residual, &weight, 0.0).unwrap();
        assert_eq!(plain, got);
    }

    #[test]
    fn norms_match_over_odd_sizes() {
        let mut random = Random::new(8);
        let b = backend(Dtype::F32);
        for columns in [1, 5, 72, 1153] {
            let (x, w, bias) = (random.normal(3 * columns), random.normal(columns), random.normal(columns));
            let (eps, n) = (1e-6, columns as f64);
            let (mut rms, mut layer) = (Vec::new(), Vec::new());
            for row in x.chunks_exact(columns) {
                let square: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
                let mean: f64 = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
                let variance: f64 = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
                for ((&v, &w), &b) in row.iter().zip(&w).zip(&bias) {
                    let (v, w, b) = (f64::from(v), f64::from(w), f64::from(b));
                    rms.push(v / (square + eps).sqrt() * w);
                    layer.push((v - mean) / (variance + eps).sqrt() * w + b);
                }
            }
            let (mut x, w, bias) =
                (tensor(&b, x, columns), tensor(&b, w, columns), tensor(&b, bias, columns));
            assert_close(b.layer_norm(&x, &w, &bias, 1e-6).unwrap().values(), &layer, 1e-5);
            assert_close(b.reduce_norm(None, &mut x, &w, 1e-6).unwrap().values(), &rms, 1e-5);
        }
    }

    #[test]
    fn bf16_norm_rounds_before_the_weight() {
        let b = backend(Dtype::Bf16);
        let mut x = tensor(&b, vec![1.0, 3.0, 5.0], 3);
        let w = tensor(&b, vec![1.5, 1.25, 0.75], 3);
        let got = b.reduce_norm(None, &mut x, &w, 0.0).unwrap();
        let factor = 1.0 / (35.0f32 / 3.0).sqrt();
        let half = |v: f32| half::bf16::from_f32(v).to_f32();
        let want: Vec<f32> =
            [(1.0, 1.5), (3.0, 1.25), (5.0, 0.75)].map(|(x, w)| half(half(x * factor) * w)).to_vec();
        assert_eq!(got.values(), want);
    }

    #[test]
    fn swiglu_and_activations() {
        let b = backend(Dtype::F32);
        let got = b.swiglu(&tensor(&b, vec![0.0, 1.0, 2.0, 3.0, -1.0, 0.5], 6)).unwrap();
        let silu = |x: f64| x / (1.0 + (-x).exp());
        assert_close(got.values(), &[0.0, -silu(1.0), 0.5 * silu(2.0)], 1e-6);
        assert!(b.swiglu(&tensor(&b, vec![0.0; 3], 3)).is_err());
        let mut x = tensor(&b, vec![1.0, -2.0], 2);
        b.activate(&mut x, Activation::GeluErf).unwrap();
        assert_close(x.values(), &[0.841_344_746, -0.045_500_264], 1e-6);
    }

    #[test]
    fn rows_are_set_added_and_checked() {
        let b = backend(Dtype::F32);
        let mut x = tensor(&b, vec![1.0; 8], 2);
        let source = tensor(&b, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2);
        b.set_rows(&mut x, 2, &source, 1, 2).unwrap();
        assert_eq!(x.values(), [1.0, 1.0, 1.0, 1.0, 3.0, 4.0, 5.0, 6.0]);
        b.add_rows(&mut x, 0, &source, 2, 1).unwrap();
        assert_eq!(x.values()[..4], [6.0, 7.0, 1.0, 1.0]);
        assert!(b.set_rows(&mut x, 3, &source, 0, 2).is_err());
        assert!(b.add_rows(&mut x, 0, &source, 2, 2).is_err());
        assert!(b.add_rows(&mut x, usize::MAX, &source, 0, 1).is_err());
        let narrow = tensor(&b, vec![0.0; 3], 1);
        assert!(b.set_rows(&mut x, 0, &narrow, 0, 1).is_err());
        assert!(b.add(&mut x, &source).is_err());
        assert!(b.reduce_norm(Some(source), &mut x, &narrow, 0.0).is_err());
    }

    #[test]
    fn reshape_keeps_values() {
        let b = backend(Dtype::F32);
        let x = b.reshape(&tensor(&b, (0..12).map(|v| v as f32).collect(), 3), 6).unwrap();
        assert_eq!(x.shape(), [2, 6]);
        assert!(b.reshape(&x, 5).is_err());
        assert!(b.reshape(&x, 0).is_err());
    }
}
