//! One decoder layer of the source: its linear layers in float32, their names as stored, and what calibration saw.

use spark_models::ModelConfig;
use spark_weights::{Checkpoint, LoadOptions, ParamSpec, Params, normalise};

use crate::error::Result;
use crate::matrix::{Inputs, Weight};
use crate::recorder::Records;
use crate::reservoir::Reservoir;

/// Prefix of decoder layers in normalised names.
pub(crate) const LAYERS: &str = "model.language_model.layers.";

/// Experts that were given fewer rows are judged by rows of the whole layer.
const MIN_ROWS: usize = 16;

/// A decoder layer.
pub(crate) struct Layer {
    /// Name as stored, without a dot at the end.
    pub(crate) prefix: String,
    /// q, k, v.
    pub(crate) qkv: [Weight; 3],
    pub(crate) o: Weight,
    /// `[hidden]`.
    pub(crate) input_norm: Vec<f32>,
    /// `[hidden]`.
    pub(crate) post_norm: Vec<f32>,
    /// `[num_experts, hidden]`; `None` in a dense layer.
    pub(crate) router: Option<Weight>,
    /// One in a dense layer.
    pub(crate) mlps: Vec<Mlp>,
}

/// A dense MLP or an expert.
pub(crate) struct Mlp {
    /// Name below the layer's.
    pub(crate) module: String,
    pub(crate) gate: Weight,
    pub(crate) up: Weight,
    pub(crate) down: Weight,
}

/// The names of a layer's parameters that are read here, as the model states them.
fn is_read(name: &str) -> bool {
    const LINEAR: [&str; 6] =
        ["self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", "mlp.gate", "mlp.experts"];
    LINEAR.contains(&name) || name == "input_layernorm.weight" || name == "post_attention_layernorm.weight"
}

/// Whether the tensor of this normalised name is part of a linear layer that is quantised.
pub(crate) fn is_quantised(normalised: &str) -> bool {
    let Some((_, name)) = in_layer(normalised) else { return false };
    const LINEAR: [&str; 7] = [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ];
    LINEAR.contains(&name) || name.starts_with("mlp.experts.")
}

/// Layer and name inside it of a normalised name.
pub(crate) fn in_layer(normalised: &str) -> Option<(usize, &str)> {
    let (layer, name) = normalised.strip_prefix(LAYERS)?.split_once('.')?;
    Some((layer.parse().ok()?, name))
}

impl Layer {
    /// Reads layer `index`.
    pub(crate) fn read(checkpoint: &Checkpoint, config: &ModelConfig, index: usize) -> Result<Self> {
        let base = format!("{LAYERS}{index}");
        let inside = |spec: &ParamSpec| {
            let name = spec.name.strip_prefix(&base).and_then(|name| name.strip_prefix('.'));
            name.is_some_and(is_read)
        };
        let specs: Vec<_> = config.specs(false).into_iter().filter(inside).collect();
        let mut params = checkpoint.load_some(&specs, &LoadOptions::default())?;
        let prefix = stored_prefix(checkpoint, index);
        let mut take = |name: &str| linear(&mut params, &base, name);
        let [q, k, v] = three(take("self_attn")?);
        let o = one(take("self_attn.o_proj")?);
        let moe = config.text.moe_at(index).is_some();
        let (router, mlps) = if moe {
            let router = one(take("mlp.gate")?);
            (Some(router), experts(&mut params, &format!("{base}.mlp.experts"))?)
        } else {
            let [gate, up, _] = three(take("mlp")?);
            let down = one(take("mlp.down_proj")?);
            (None, vec![Mlp { module: "mlp".to_owned(), gate, up, down }])
        };
        let mut norm =
            |name: &str| -> Result<Vec<f32>> { Ok(params.vector(&format!("{base}.{name}"))?.values) };
        let (input_norm, post_norm) =
            (norm("input_layernorm.weight")?, norm("post_attention_layernorm.weight")?);
        Ok(Self { prefix, qkv: [q, k, v], o, input_norm, post_norm, router, mlps })
    }
}

/// The name under which the checkpoint stores layer `index`.
fn stored_prefix(checkpoint: &Checkpoint, index: usize) -> String {
    let wanted = format!("{LAYERS}{index}.");
    let found = checkpoint.tensors().find_map(|tensor| {
        let rest = normalise(&tensor.name).strip_prefix(&wanted)?.len();
        Some(tensor.name[..tensor.name.len() - rest - 1].to_owned())
    });
    found.unwrap_or_else(|| format!("{LAYERS}{index}"))
}

fn linear(params: &mut Params, base: &str, name: &str) -> Result<Vec<Weight>> {
    let name = format!("{base}.{name}");
    Weight::parts(&params.linear(&name)?, &name)
}

fn empty() -> Weight {
    Weight { n: 0, k: 0, values: Vec::new() }
}

/// The only part of a layer that the model states with one.
fn one(parts: Vec<Weight>) -> Weight {
    parts.into_iter().next().unwrap_or_else(empty)
}

/// The parts of a layer that the model states with two or three; a third that is not there is empty.
fn three(parts: Vec<Weight>) -> [Weight; 3] {
    let mut parts = parts.into_iter();
    std::array::from_fn(|_| parts.next().unwrap_or_else(empty))
}

fn experts(params: &mut Params, name: &str) -> Result<Vec<Mlp>> {
    let experts = params.experts(name)?.experts.into_iter().enumerate();
    experts
        .map(|(index, (gate_up, down))| {
            let module = format!("mlp.experts.{index}");
            let [gate, up, _] = three(Weight::parts(&gate_up, &format!("{name}.{index}.gate_up_proj"))?);
            let down = one(Weight::parts(&down, &format!("{name}.{index}.down_proj"))?);
            Ok(Mlp { module, gate, up, down })
        })
        .collect()
}

/// What the linear layers of a decoder layer saw.
pub(crate) struct LayerInputs {
    pub(crate) qkv: Inputs,
    pub(crate) o: Inputs,
    /// Mean magnitude of each channel of the MLP's inputs, over all rows.
    pub(crate) mlp_mean_abs: Vec<f32>,
    /// Of each MLP.
    pub(crate) mlps: Vec<MlpInputs>,
}

/// What the linear layers of an MLP saw.
pub(crate) struct MlpInputs {
    pub(crate) gate_up: Inputs,
    pub(crate) down: Inputs,
}

impl LayerInputs {
    /// Takes the records of layer `index` out of `records`; `None` if it was not recorded.
    pub(crate) fn take(records: &mut Records, layer: &Layer, index: usize) -> Option<Self> {
        let base = format!("{LAYERS}{index}");
        let mut take = |name: &str| records.remove(&format!("{base}.{name}"));
        let qkv = inputs(&take("self_attn")?.all, None);
        let o = inputs(&take("self_attn.o_proj")?.all, None);
        let moe = layer.router.is_some();
        let record = take(if moe { "mlp.experts" } else { "mlp" })?;
        take("mlp.down_proj");
        let mlps = if moe {
            let given = layer.mlps.iter().zip(&record.experts);
            given.map(|(mlp, expert)| MlpInputs::of(mlp, expert, &record.all)).collect()
        } else {
            layer.mlps.iter().map(|mlp| MlpInputs::of(mlp, &record.all, &record.all)).collect()
        };
        Some(Self { qkv, o, mlp_mean_abs: record.all.mean_abs(), mlps })
    }
}

impl MlpInputs {
    /// From the rows that `mlp` was given, or if these are too few, from those of the whole layer.
    fn of(mlp: &Mlp, given: &Reservoir, all: &Reservoir) -> Self {
        let enough = given.weights.len() >= MIN_ROWS.min(all.weights.len());
        let sample = if enough { given } else { all };
        let count = (!enough).then_some(given.seen);
        let gate_up = inputs(sample, count);
        let raw = Inputs::new(gate_up.k, sample.rows.clone(), Vec::new());
        let mut inner = raw.times(&mlp.gate);
        for (gate, up) in inner.iter_mut().zip(raw.times(&mlp.up)) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
        let k = mlp.down.k;
        let mut mean_abs = vec![0.0f32; k];
        for row in inner.chunks_exact(k) {
            mean_abs.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.abs());
        }
        let rows = (inner.len() / k).max(1) as f32;
        mean_abs.iter_mut().for_each(|sum| *sum /= rows);
        for (row, factor) in inner.chunks_exact_mut(k).zip(factors(sample, count)) {
            row.iter_mut().for_each(|x| *x *= factor);
        }
        Self { gate_up, down: Inputs::new(k, inner, mean_abs) }
    }
}

/// What each kept row is multiplied by, so that squares of products count the rows that were not kept as well. `count`
/// says how many rows the sample stands for, if not for those it has seen.
fn factors(sample: &Reservoir, count: Option<u64>) -> impl Iterator<Item = f32> + '_ {
    let kept = sample.weights.len().max(1) as f32;
    let each = (count.unwrap_or(sample.seen).max(1) as f32 / kept).sqrt();
    sample.weights.iter().map(move |weight| weight * each)
}

fn inputs(sample: &Reservoir, count: Option<u64>) -> Inputs {
    let mean_abs = sample.mean_abs();
    let k = mean_abs.len();
    let mut values = sample.rows.clone();
    for (row, factor) in values.chunks_exact_mut(k).zip(factors(sample, count)) {
        row.iter_mut().for_each(|x| *x *= factor);
    }
    Inputs::new(k, values, mean_abs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_quantised() {
        for name in ["self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.experts.gate_up_proj"] {
            assert!(is_quantised(&format!("{LAYERS}12.{name}")), "{name}");
        }
        for name in ["self_attn.q_norm.weight", "mlp.gate.weight", "input_layernorm.weight"] {
            assert!(!is_quantised(&format!("{LAYERS}12.{name}")), "{name}");
        }
        assert!(!is_quantised("lm_head.weight") && !is_quantised("model.visual.blocks.0.attn.qkv.weight"));
        assert_eq!(in_layer("model.language_model.layers.7.mlp.gate.weight"), Some((7, "mlp.gate.weight")));
    }
}
