//! One linear layer: rounds it in the chosen format, measures what that does to its outputs, gives its tensors.

use crate::Format;
use crate::awq::Int4;
use crate::fp8::{BLOCK, Fp8};
use crate::matrix::{Inputs, Weight, total_squares};
use crate::nvfp4::{Nvfp4, global_scale};
use crate::report::Kind;
use crate::search::group_limits;
use crate::writer::{Dtype, Tensor};

/// A linear layer of the folded model.
pub(crate) struct Linear<'a> {
    /// Full name as stored, without `.weight`.
    pub(crate) module: String,
    pub(crate) kind: Kind,
    pub(crate) weight: &'a Weight,
    /// What its inputs were multiplied by in folding; `None` is 1.
    pub(crate) scale_in: Option<&'a [f32]>,
    /// What its outputs were divided by.
    pub(crate) scale_out: Option<&'a [f32]>,
    /// What it got before folding; `None` without calibration.
    pub(crate) inputs: Option<&'a Inputs>,
    /// Largest magnitude of the layers that share a per-tensor scale.
    pub(crate) largest: f32,
}

/// A rounded weight.
pub(crate) enum Rounded {
    Int4(Int4),
    Nvfp4(Nvfp4),
    Fp8(Fp8),
}

/// Sums of squares over a layer's outputs on the calibration inputs; over its weights where there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Squares {
    /// Of the error.
    pub(crate) error: f64,
    /// Of the outputs themselves.
    pub(crate) output: f64,
}

impl Linear<'_> {
    /// Rounds the weight. `group_size` is AWQ's.
    pub(crate) fn round(&self, format: &Format, group_size: usize) -> Rounded {
        match format {
            Format::Awq { search, .. } => Rounded::Int4(self.int4(*search, group_size)),
            Format::Nvfp4 { search } => {
                let global = global_scale(self.largest);
                Rounded::Nvfp4(Nvfp4::new(self.weight, global, *search, self.inputs))
            }
            Format::Fp8 => Rounded::Fp8(Fp8::new(self.weight)),
        }
    }

    fn int4(&self, search: bool, group_size: usize) -> Int4 {
        // As in AWQ, q and k are not cut: their outputs are multiplied with each other, and an error that is small in
        // each is not small in the product.
        let limits = match self.inputs {
            Some(inputs) if search && !matches!(self.kind, Kind::Q | Kind::K) => {
                let ones = vec![1.0; self.weight.k];
                Some(group_limits(self.weight, self.scale_in.unwrap_or(&ones), inputs, group_size))
            }
            _ => None,
        };
        Int4::new(self.weight, group_size, limits.as_deref())
    }

    /// The error of `rounded`, in the terms of the model before folding.
    pub(crate) fn measure(&self, rounded: &Rounded) -> Squares {
        let unfold = |row: usize, out: &mut [f32]| {
            if let Some(scale) = self.scale_in {
                out.iter_mut().zip(scale).for_each(|(value, scale)| *value /= scale);
            }
            if let Some(scale) = self.scale_out {
                out.iter_mut().for_each(|value| *value *= scale[row]);
            }
        };
        let error = total_squares(self.weight, self.inputs, |row, out| {
            rounded.row(row, out);
            out.iter_mut().zip(self.weight.row(row)).for_each(|(value, w)| *value = w - *value);
            unfold(row, out);
        });
        let output = total_squares(self.weight, self.inputs, |row, out| {
            out.copy_from_slice(self.weight.row(row));
            unfold(row, out);
        });
        Squares { error, output }
    }
}

impl Rounded {
    /// Row `row` of the weight, dequantised.
    fn row(&self, row: usize, out: &mut [f32]) {
        match self {
            Rounded::Int4(weight) => weight.row(row, out),
            Rounded::Nvfp4(weight) => weight.row(row, out),
            Rounded::Fp8(weight) => weight.row(row, out),
        }
    }

    /// As it is stored under `module`; the weight is `[n, k]`.
    pub(crate) fn tensors(self, module: &str, [n, k]: [usize; 2]) -> Vec<Tensor> {
        match self {
            Rounded::Int4(weight) => weight.tensors(module),
            Rounded::Nvfp4(weight) => weight.tensors(module),
            Rounded::Fp8(weight) => {
                let scales = weight.scale_bytes();
                let grid = [n.div_ceil(BLOCK), k.div_ceil(BLOCK)];
                vec![
                    Tensor::new(format!("{module}.weight"), Dtype::F8_E4M3, &[n, k], weight.values),
                    Tensor::new(format!("{module}.weight_scale_inv"), Dtype::BF16, &grid, scales),
                ]
            }
        }
    }
}

/// FP8 experts as in Qwen3-VL-MoE's published checkpoints: all in one tensor, transposed, `[experts, k, n]`, with the
/// blocks counted on the transposed matrix. `weights` are `[n, k]` each; `name` is the tensor's.
pub(crate) fn stacked_fp8(name: &str, weights: &[Weight]) -> (Vec<Tensor>, Squares) {
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    let (mut squares, mut shape) = (Squares::default(), [0; 2]);
    for weight in weights {
        let weight = weight.transposed();
        let fp8 = Fp8::new(&weight);
        let difference = |row: usize, out: &mut [f32]| {
            fp8.row(row, out);
            out.iter_mut().zip(weight.row(row)).for_each(|(value, w)| *value = w - *value);
        };
        squares.error += total_squares(&weight, None, difference);
        squares.output += total_squares(&weight, None, |row, out| out.copy_from_slice(weight.row(row)));
        shape = [weight.n, weight.k];
        scales.extend(fp8.scale_bytes());
        values.extend(fp8.values);
    }
    let count = weights.len();
    let grid = [count, shape[0].div_ceil(BLOCK), shape[1].div_ceil(BLOCK)];
    let tensors = vec![
        Tensor::new(name.to_owned(), Dtype::F8_E4M3, &[count, shape[0], shape[1]], values),
        Tensor::new(format!("{name}_scale_inv"), Dtype::BF16, &grid, scales),
    ];
    (tensors, squares)
}

#[cfg(test)]
mod tests {
    use spark_testing::Random;

    use super::*;

    #[test]
    fn errors_are_those_of_the_model_before_folding() {
        let mut random = Random::new(9);
        let (n, k) = (16, 64);
        let plain = Weight { n, k, values: random.normals(n * k, 0.1) };
        let inputs = Inputs::new(k, random.normals(40 * k, 1.0), vec![1.0; k]);
        // Powers of two: folding rounds nothing, and neither does unfolding.
        let mut scale =
            |len: usize| -> Vec<f32> { (0..len).map(|_| [0.25, 1.0, 8.0][random.below(3)]).collect() };
        let (scale_in, scale_out) = (scale(k), scale(n));
        let mut folded = plain.clone();
        folded.scale_columns(&scale_in);
        folded.divide_rows(&scale_out);
        let linear = |weight, scale_in, scale_out, inputs| Linear {
            module: String::new(),
            kind: Kind::Up,
            weight,
            scale_in,
            scale_out,
            inputs,
            largest: 1.0,
        };
        for inputs in [None, Some(&inputs)] {
            let before = linear(&plain, None, None, inputs);
            let after = linear(&folded, Some(&scale_in[..]), Some(&scale_out[..]), inputs);
            let rounded = after.round(&Format::Awq { group_size: None, search: false }, 64);
            let squares = after.measure(&rounded);
            assert_eq!(squares.output, before.measure(&rounded).output);
            // The error, from the whole matrix that the rounded one stands for.
            let mut difference = plain.clone();
            for (row, values) in difference.values.chunks_exact_mut(k).enumerate() {
                let mut out = vec![0.0; k];
                rounded.row(row, &mut out);
                for ((value, out), scale) in values.iter_mut().zip(&out).zip(&scale_in) {
                    *value -= out / scale * scale_out[row];
                }
            }
            let error =
                total_squares(&difference, inputs, |row, out| out.copy_from_slice(difference.row(row)));
            assert!((squares.error / error - 1.0).abs() < 1e-4, "{} {error}", squares.error);
            assert!(error > 0.0 && error < squares.output);
        }
    }
}
