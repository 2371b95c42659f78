//! Folding: what multiplies the input channels of a linear layer divides the output channels of what stands before it,
//! so that the model computes the same. Which scales are good is decided in `search`.
//!
//! A norm is stored in 16 bits. A scale is therefore changed a little (`settle`), to the quotient of the norm and its
//! rounded quotient: the fold is then exact whatever the rounding.

use half::{bf16, f16};
use spark_weights::DiskType;

use crate::layer::{Layer, LayerInputs, Mlp, MlpInputs};
use crate::search::{Scaled, channel_scale};

/// What the input channels of a layer's linear layers are multiplied by.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scales {
    /// Of q, k, v: divides the input norm.
    pub(crate) qkv: Vec<f32>,
    /// Of o: divides the outputs of v. Only where every query head has its own KV head.
    pub(crate) o: Option<Vec<f32>>,
    /// Of gate and up of all MLPs: divides the norm before them; the router is multiplied by it.
    pub(crate) mlp: Vec<f32>,
    /// Of down of each MLP: divides the outputs of up.
    pub(crate) down: Vec<Vec<f32>>,
}

/// Types of the tensors that take up scales.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FoldTypes {
    pub(crate) input_norm: DiskType,
    pub(crate) post_norm: DiskType,
}

impl Scales {
    /// The scales that are best on what calibration saw.
    pub(crate) fn search(layer: &Layer, inputs: &LayerInputs, types: FoldTypes, group_size: usize) -> Self {
        let qkv: Vec<_> = layer.qkv.iter().map(|weight| Scaled { weight, inputs: &inputs.qkv }).collect();
        let into_input_norm = |scale| settle(&layer.input_norm, scale, types.input_norm);
        let qkv = channel_scale(&qkv, &inputs.qkv.mean_abs, group_size, into_input_norm);

        // With fewer KV heads than heads, one output of v is several inputs of o, and one scale cannot serve them all.
        let has_own_kv_heads = layer.qkv[2].n == layer.o.k;
        let o = has_own_kv_heads.then(|| {
            let layers = [Scaled { weight: &layer.o, inputs: &inputs.o }];
            channel_scale(&layers, &inputs.o.mean_abs, group_size, |scale| scale)
        });

        let pairs = layer.mlps.iter().zip(&inputs.mlps);
        let mlps: Vec<_> = pairs.flat_map(|(mlp, inputs)| scaled_gate_up(mlp, inputs)).collect();
        let into_post_norm = |scale| settle(&layer.post_norm, scale, types.post_norm);
        let mlp = channel_scale(&mlps, &inputs.mlp_mean_abs, group_size, into_post_norm);

        let down = layer.mlps.iter().zip(&inputs.mlps).map(|(mlp, inputs)| {
            let layers = [Scaled { weight: &mlp.down, inputs: &inputs.down }];
            channel_scale(&layers, &inputs.down.mean_abs, group_size, |scale| scale)
        });
        Self { qkv, o, mlp, down: down.collect() }
    }

    /// Brings the scales into the layer: weights, norms and router. The layer computes the same as before.
    pub(crate) fn fold(&self, layer: &mut Layer) {
        layer.qkv.iter_mut().for_each(|weight| weight.scale_columns(&self.qkv));
        divide(&mut layer.input_norm, &self.qkv);
        if let Some(o) = &self.o {
            layer.o.scale_columns(o);
            layer.qkv[2].divide_rows(o);
        }
        divide(&mut layer.post_norm, &self.mlp);
        if let Some(router) = &mut layer.router {
            router.scale_columns(&self.mlp);
        }
        for (mlp, down) in layer.mlps.iter_mut().zip(&self.down) {
            mlp.gate.scale_columns(&self.mlp);
            mlp.up.scale_columns(&self.mlp);
            mlp.up.divide_rows(down);
            mlp.down.scale_columns(down);
        }
    }
}

fn scaled_gate_up<'a>(mlp: &'a Mlp, inputs: &'a MlpInputs) -> [Scaled<'a>; 2] {
    [&mlp.gate, &mlp.up].map(|weight| Scaled { weight, inputs: &inputs.gate_up })
}

fn divide(norm: &mut [f32], scale: &[f32]) {
    norm.iter_mut().zip(scale).for_each(|(norm, scale)| *norm /= scale);
}

/// `scale`, changed so that `norm / scale` is a number of type `dtype`. Where the norm is zero (or becomes it), 1.
pub(crate) fn settle(norm: &[f32], mut scale: Vec<f32>, dtype: DiskType) -> Vec<f32> {
    for (scale, &norm) in scale.iter_mut().zip(norm) {
        let settled = norm / round(norm / *scale, dtype);
        *scale = if settled.is_finite() && settled > 0.0 { settled } else { 1.0 };
    }
    scale
}

/// `value` as a tensor of type `dtype` holds it.
fn round(value: f32, dtype: DiskType) -> f32 {
    match dtype {
        DiskType::F16 => f16::from_f32(value).to_f32(),
        DiskType::Bf16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// The bytes of `values` as `dtype`, which is a float type.
pub(crate) fn to_bytes(values: &[f32], dtype: DiskType) -> Vec<u8> {
    match dtype {
        DiskType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        DiskType::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use spark_testing::Random;

    use super::*;
    use crate::matrix::Weight;

    const HIDDEN: usize = 32;
    const INNER: usize = 64;

    fn weight(random: &mut Random, n: usize, k: usize) -> Weight {
        Weight { n, k, values: random.normals(n * k, 0.2) }
    }

    fn layer(random: &mut Random) -> Layer {
        let norm =
            |random: &mut Random| -> Vec<f32> { random.bf16s(HIDDEN, 0.5).iter().map(|v| v + 1.5).collect() };
        let mlp = |index: usize, random: &mut Random| Mlp {
            module: format!("mlp.experts.{index}"),
            gate: weight(random, INNER, HIDDEN),
            up: weight(random, INNER, HIDDEN),
            down: weight(random, HIDDEN, INNER),
        };
        Layer {
            prefix: "model.layers.0".to_owned(),
            qkv: [(); 3].map(|()| weight(random, INNER, HIDDEN)),
            o: weight(random, HIDDEN, INNER),
            input_norm: norm(random),
            post_norm: norm(random),
            router: Some(weight(random, 2, HIDDEN)),
            mlps: vec![mlp(0, random), mlp(1, random)],
        }
    }

    fn times(weight: &Weight, x: &[f64]) -> Vec<f64> {
        weight
            .values
            .chunks(weight.k)
            .map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum())
            .collect()
    }

    fn normed(x: &[f64], norm: &[f32]) -> Vec<f64> {
        x.iter().zip(norm).map(|(x, &norm)| x * f64::from(norm)).collect()
    }

    /// q and k as they are, o of v (as if each position saw only itself), the router, and each expert, all in float64.
    fn outputs(layer: &Layer, x: &[f64]) -> Vec<f64> {
        let h = normed(x, &layer.input_norm);
        let mut out = times(&layer.qkv[0], &h);
        out.extend(times(&layer.qkv[1], &h));
        out.extend(times(&layer.o, &times(&layer.qkv[2], &h)));
        let h = normed(x, &layer.post_norm);
        out.extend(layer.router.iter().flat_map(|router| times(router, &h)));
        for mlp in &layer.mlps {
            let gate = times(&mlp.gate, &h);
            let up = times(&mlp.up, &h);
            let inner: Vec<f64> = gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
            out.extend(times(&mlp.down, &inner));
        }
        out
    }

    #[test]
    fn a_folded_layer_computes_the_same() {
        let mut random = Random::new(11);
        let mut layer = layer(&mut random);
        let mut scale = |k: usize| -> Vec<f32> { (0..k).map(|_| random.uniform(-3.0, 3.0).exp2()).collect() };
        let scales = Scales {
            qkv: settle(&layer.input_norm, scale(HIDDEN), DiskType::Bf16),
            o: Some(scale(INNER)),
            mlp: settle(&layer.post_norm, scale(HIDDEN), DiskType::Bf16),
            down: vec![scale(INNER), scale(INNER)],
        };
        let x: Vec<f64> = Random::new(12).normals(HIDDEN, 1.0).iter().map(|&v| f64::from(v)).collect();
        let before = outputs(&layer, &x);
        scales.fold(&mut layer);
        let after = outputs(&layer, &x);
        let size = before.iter().fold(0.0f64, |size, v| size.max(v.abs()));
        for (a, b) in after.iter().zip(&before) {
            // Float32 weights were multiplied and divided: some roundings of 2^-24.
            assert!((a - b).abs() < 2e-6 * size, "{a} {b}");
        }
        for norm in [&layer.input_norm, &layer.post_norm] {
            let stored = to_bytes(norm, DiskType::Bf16);
            for (value, bytes) in norm.iter().zip(stored.chunks(2)) {
                let stored = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
                assert!(
                    (stored - value).abs() <= 2e-7 * value.abs(),
                    "the norm is exact as stored: {stored} {value}"
                );
            }
        }
    }

    #[test]
    fn norms_of_zero_are_left_alone() {
        assert_eq!(settle(&[0.0, 1.0, 1e-30], vec![2.0, 2.0, 1e30], DiskType::F16), [1.0, 2.0, 1.0]);
    }
}
