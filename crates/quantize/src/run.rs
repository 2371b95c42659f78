//! The run: checks, calibration, then layer by layer reading, search, folding, rounding, writing.

use std::collections::HashMap;
use std::path::Path;

use spark_models::ModelConfig;
use spark_weights::{Checkpoint, DiskType, TensorInfo, normalise};

use crate::calibrate::{Calibration, CalibrationPrompt};
use crate::config;
use crate::error::{Error, Result};
use crate::fold::{FoldTypes, Scales, to_bytes};
use crate::layer::{LAYERS, Layer, LayerInputs, Mlp, in_layer, is_quantised};
use crate::linear::{Linear, stacked_fp8};
use crate::matrix::Weight;
use crate::recorder::Records;
use crate::report::{Kind, Report};
use crate::search::MAX_GROUP;
use crate::writer::{Dtype, Output, Tensor};
use crate::{Format, Options, Progress, nvfp4};

/// Writes the model of `checkpoint` to the folder `out`, its decoder's linear layers in the format of `options`. The
/// folder appears when it is complete. Encoder, embeddings, output head, router and norms keep their types.
///
/// `prompts` calibrate: AWQ's search needs some, NVFP4's may have some, and the report's errors are of outputs if there
/// are any. They run through the whole model on the CPU, which then is in memory; without them no more than one layer
/// is. `progress` is called from this thread.
///
/// # Errors
/// The checkpoint is quantised already, of an unknown architecture, incomplete, or of sizes that the format cannot hold;
/// a prompt does not fit; a file cannot be read or written.
pub fn quantize(
    checkpoint: &Checkpoint,
    options: &Options,
    prompts: &[CalibrationPrompt],
    out: &Path,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Report> {
    let (config, group_size) = checked(checkpoint, &options.format)?;
    if matches!(options.format, Format::Awq { search: true, .. }) && prompts.is_empty() {
        return Err(Error::NoPrompts);
    }
    let output = Output::create(out, options.shard_bytes)?;
    let calibration =
        Calibration { checkpoint, config: &config, image_mean_std: options.image_mean_std, progress };
    let records = if prompts.is_empty() { Records::new() } else { calibration.run(prompts)? };
    let awq = matches!(options.format, Format::Awq { .. });
    let report = Report::new(!prompts.is_empty(), awq.then_some(group_size));
    let run =
        Run { checkpoint, config: &config, format: &options.format, group_size, output, records, report };
    run.all(progress)
}

/// What [`quantize`] checks before it reads weights, without the prompts: for whoever has to prepare those first.
///
/// # Errors
/// The checkpoint is quantised already, of an unknown architecture, incomplete, or of sizes that the format cannot hold; `out` is
/// in the way.
pub fn check(checkpoint: &Checkpoint, format: &Format, out: &Path) -> Result<()> {
    checked(checkpoint, format)?;
    Output::check(out).map(drop)
}

/// The configuration of a checkpoint that the format can hold, and AWQ's group size.
fn checked(checkpoint: &Checkpoint, format: &Format) -> Result<(ModelConfig, usize)> {
    if let Some(found) = config::is_quantised(checkpoint) {
        return Err(Error::AlreadyQuantised { found });
    }
    let config = ModelConfig::parse(checkpoint.config(), checkpoint.generation_config())?;
    // Reads no data, but fails if anything is missing or left over.
    checkpoint.summary(&config.specs(checkpoint.has_module("lm_head")), 1)?;
    let group_size = check_sizes(&config, format)?;
    Ok((config, group_size))
}

/// Checks every linear layer against the rules of the format; gives AWQ's group size.
fn check_sizes(config: &ModelConfig, format: &Format) -> Result<usize> {
    let linears = linears(config);
    let size = |(module, n, k): &(String, usize, usize), rule: String| {
        Err(Error::Size { module: module.clone(), n: *n, k: *k, rule })
    };
    match format {
        Format::Awq { group_size, .. } => {
            let fits = |group: &usize| linears.iter().all(|(_, _, k)| k.is_multiple_of(*group));
            let group = match *group_size {
                Some(group_size) if ![16, 32, 64, MAX_GROUP].contains(&group_size) => {
                    return Err(Error::GroupSize { group_size });
                }
                Some(group_size) => group_size,
                None => [MAX_GROUP, 64, 32].into_iter().find(fits).unwrap_or(32),
            };
            if let Some(linear) = linears.iter().find(|(_, _, k)| !k.is_multiple_of(group)) {
                let rule = format!(
                    "AWQ needs inputs in multiples of the group size, here {group}; choose another format"
                );
                return size(linear, rule);
            }
            if let Some(linear) = linears.iter().find(|(_, n, _)| !n.is_multiple_of(8)) {
                return size(linear, "AWQ packs 8 outputs into a word; choose another format".to_owned());
            }
            Ok(group)
        }
        Format::Nvfp4 { .. } => match linears.iter().find(|(_, _, k)| !k.is_multiple_of(nvfp4::GROUP)) {
            Some(linear) => size(linear, "NVFP4 needs inputs in multiples of 16; choose fp8".to_owned()),
            None => Ok(nvfp4::GROUP),
        },
        Format::Fp8 => Ok(0),
    }
}

/// Name, outputs and inputs of every linear layer that will be quantised; of experts, the first's.
fn linears(config: &ModelConfig) -> Vec<(String, usize, usize)> {
    let text = &config.text;
    let (hidden, head) = (text.hidden_size, text.head_dim);
    let mut all = Vec::new();
    for layer in 0..text.num_hidden_layers {
        let (module, inner) = match text.moe_at(layer) {
            Some(moe) => ("mlp.experts.0", moe.moe_intermediate_size),
            None => ("mlp", text.intermediate_size),
        };
        let mut add = |name: &str, n, k| all.push((format!("{LAYERS}{layer}.{name}"), n, k));
        add("self_attn.q_proj", text.num_attention_heads * head, hidden);
        add("self_attn.k_proj", text.num_key_value_heads * head, hidden);
        add("self_attn.o_proj", hidden, text.num_attention_heads * head);
        add(&format!("{module}.gate_proj"), inner, hidden);
        add(&format!("{module}.down_proj"), hidden, inner);
    }
    all
}

struct Run<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    format: &'a Format,
    group_size: usize,
    output: Output,
    records: Records,
    report: Report,
}

impl Run<'_> {
    fn all(mut self, progress: &dyn Fn(Progress)) -> Result<Report> {
        self.output.copy_side_files(self.checkpoint.dir())?;
        self.keep(None, &HashMap::new())?;
        let total = self.config.text.num_hidden_layers;
        for index in 0..total {
            self.layer(index)?;
            progress(Progress::Quantised { done: index + 1, total });
        }
        let config = config::config(self.checkpoint, self.config, self.format, self.group_size);
        self.report.bytes_before = self.checkpoint.tensors().map(|tensor| tensor.len as u64).sum();
        self.report.bytes_after = self.output.finish(&config)?;
        Ok(self.report)
    }

    /// Copies the tensors of layer `layer` (`None`: those of no layer) that are not quantised, with the values of
    /// `changed` in place of those stored.
    fn keep(&mut self, layer: Option<usize>, changed: &HashMap<String, Vec<u8>>) -> Result<()> {
        for tensor in self.checkpoint.tensors() {
            let name = normalise(&tensor.name);
            let in_layer = in_layer(&name);
            if in_layer.map(|(layer, _)| layer) != layer || is_quantised(&name) {
                continue;
            }
            let changed = in_layer.and_then(|(_, name)| changed.get(name));
            let bytes = match changed {
                Some(bytes) => bytes.clone(),
                None => self.checkpoint.read_tensor(&tensor.name)?,
            };
            self.report.bytes_kept += bytes.len() as u64;
            let tensor = Tensor::new(tensor.name.clone(), disk_type(tensor.dtype), &tensor.shape, bytes);
            self.output.add([tensor])?;
        }
        Ok(())
    }

    fn layer(&mut self, index: usize) -> Result<()> {
        let mut layer = Layer::read(self.checkpoint, self.config, index)?;
        let inputs = LayerInputs::take(&mut self.records, &layer, index);
        let types = [INPUT_NORM, POST_NORM, ROUTER].map(|name| self.dtype(index, name));
        let fold = FoldTypes { input_norm: types[0], post_norm: types[1] };
        let scales = match (self.format, &inputs) {
            (Format::Awq { search: true, .. }, Some(inputs)) => {
                Some(Scales::search(&layer, inputs, fold, self.group_size))
            }
            _ => None,
        };
        let mut changed = HashMap::new();
        if let Some(scales) = &scales {
            scales.fold(&mut layer);
            changed.insert(INPUT_NORM.to_owned(), to_bytes(&layer.input_norm, types[0]));
            changed.insert(POST_NORM.to_owned(), to_bytes(&layer.post_norm, types[1]));
            if let Some(router) = &layer.router {
                changed.insert(ROUTER.to_owned(), to_bytes(&router.values, types[2]));
            }
        }
        self.keep(Some(index), &changed)?;
        self.linears(&layer, inputs.as_ref(), scales.as_ref(), index)
    }

    fn dtype(&self, layer: usize, name: &str) -> DiskType {
        let name = format!("{LAYERS}{layer}.{name}");
        let found = self.checkpoint.tensors().find(|tensor| normalise(&tensor.name) == name);
        found.map_or(DiskType::Bf16, |tensor| tensor.dtype)
    }

    /// Rounds and writes the linear layers of a folded layer.
    fn linears(
        &mut self,
        layer: &Layer,
        inputs: Option<&LayerInputs>,
        scales: Option<&Scales>,
        index: usize,
    ) -> Result<()> {
        let attention = |name: &str| format!("{}.self_attn.{name}", layer.prefix);
        let size = self.element_size(index);
        let (q_scale, o_scale) = (scales.map(|s| &s.qkv[..]), scales.and_then(|s| s.o.as_deref()));
        let largest = largest(&layer.qkv.iter().collect::<Vec<_>>());
        for (kind, weight) in [Kind::Q, Kind::K, Kind::V].into_iter().zip(&layer.qkv) {
            let scale_out = o_scale.filter(|_| kind == Kind::V);
            let inputs = inputs.map(|inputs| &inputs.qkv);
            let module = attention(kind.name());
            self.linear(
                &Linear { module, kind, weight, scale_in: q_scale, scale_out, inputs, largest },
                size,
            )?;
        }
        let o = Linear {
            module: attention(Kind::O.name()),
            kind: Kind::O,
            weight: &layer.o,
            scale_in: o_scale,
            scale_out: None,
            inputs: inputs.map(|inputs| &inputs.o),
            largest: self::largest(&[&layer.o]),
        };
        self.linear(&o, size)?;
        // Published FP8 checkpoints of the multimodal models keep their experts together, all others apart.
        if matches!(self.format, Format::Fp8) && layer.router.is_some() && self.config.vision.is_some() {
            return self.stacked(layer, size);
        }
        for (number, mlp) in layer.mlps.iter().enumerate() {
            let inputs = inputs.map(|inputs| &inputs.mlps[number]);
            let (in_scale, down) = (scales.map(|s| &s.mlp[..]), scales.map(|s| &s.down[number][..]));
            let module = |kind: Kind| format!("{}.{}.{}", layer.prefix, mlp.module, kind.name());
            let Mlp { gate, up, down: down_weight, .. } = mlp;
            let largest = self::largest(&[gate, up]);
            let gate_up = |kind, weight, scale_out| Linear {
                module: module(kind),
                kind,
                weight,
                scale_in: in_scale,
                scale_out,
                inputs: inputs.map(|inputs| &inputs.gate_up),
                largest,
            };
            self.linear(&gate_up(Kind::Gate, gate, None), size)?;
            self.linear(&gate_up(Kind::Up, up, down), size)?;
            let down = Linear {
                module: module(Kind::Down),
                kind: Kind::Down,
                weight: down_weight,
                scale_in: down,
                scale_out: None,
                inputs: inputs.map(|inputs| &inputs.down),
                largest: self::largest(&[down_weight]),
            };
            self.linear(&down, size)?;
        }
        Ok(())
    }

    fn linear(&mut self, linear: &Linear<'_>, element_size: usize) -> Result<()> {
        let rounded = linear.round(self.format, self.group_size);
        let squares = linear.measure(&rounded);
        let &Weight { n, k, .. } = linear.weight;
        let tensors = rounded.tensors(&linear.module, [n, k]);
        let after = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
        self.report.add(linear.kind, (n * k * element_size) as u64, after, squares);
        self.output.add(tensors)
    }

    fn stacked(&mut self, layer: &Layer, element_size: usize) -> Result<()> {
        let base = format!("{}.mlp.experts", layer.prefix);
        let gate_up: Vec<Weight> = layer.mlps.iter().map(|mlp| stack(&mlp.gate, &mlp.up)).collect();
        let down: Vec<Weight> = layer.mlps.iter().map(|mlp| mlp.down.clone()).collect();
        // A tensor of gate and up counts half for each.
        for (name, weights, kinds) in
            [("gate_up_proj", gate_up, &[Kind::Gate, Kind::Up][..]), ("down_proj", down, &[Kind::Down])]
        {
            let before: usize = weights.iter().map(|weight| weight.values.len() * element_size).sum();
            let (tensors, squares) = stacked_fp8(&format!("{base}.{name}"), &weights);
            let after: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
            for &kind in kinds {
                self.report.add(kind, (before / kinds.len()) as u64, (after / kinds.len()) as u64, squares);
            }
            self.output.add(tensors)?;
        }
        Ok(())
    }

    /// Bytes of an element of the quantised tensors of a layer, as stored in the input.
    fn element_size(&self, layer: usize) -> usize {
        let stored = |tensor: &&TensorInfo| {
            let name = normalise(&tensor.name);
            in_layer(&name).is_some_and(|(in_layer, _)| in_layer == layer) && is_quantised(&name)
        };
        self.checkpoint.tensors().find(stored).map_or(2, |tensor| tensor.dtype.size())
    }
}

const INPUT_NORM: &str = "input_layernorm.weight";
const POST_NORM: &str = "post_attention_layernorm.weight";
const ROUTER: &str = "mlp.gate.weight";

fn largest(weights: &[&Weight]) -> f32 {
    weights.iter().flat_map(|weight| &weight.values).fold(0.0f32, |largest, value| largest.max(value.abs()))
}

/// The rows of `first`, then those of `second`.
fn stack(first: &Weight, second: &Weight) -> Weight {
    let values = [&first.values[..], &second.values[..]].concat();
    Weight { n: first.n + second.n, k: first.k, values }
}

fn disk_type(dtype: DiskType) -> Dtype {
    match dtype {
        DiskType::Bool => Dtype::BOOL,
        DiskType::U8 => Dtype::U8,
        DiskType::I8 => Dtype::I8,
        DiskType::F8E4m3 => Dtype::F8_E4M3,
        DiskType::F8E5m2 => Dtype::F8_E5M2,
        DiskType::F8E8m0 => Dtype::F8_E8M0,
        DiskType::U16 => Dtype::U16,
        DiskType::I16 => Dtype::I16,
        DiskType::F16 => Dtype::F16,
        DiskType::Bf16 => Dtype::BF16,
        DiskType::U32 => Dtype::U32,
        DiskType::I32 => Dtype::I32,
        DiskType::F32 => Dtype::F32,
        DiskType::U64 => Dtype::U64,
        DiskType::I64 => Dtype::I64,
        DiskType::F64 => Dtype::F64,
    }
}
