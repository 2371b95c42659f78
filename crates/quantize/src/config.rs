//! What `config.json` says about the quantisation, in the words of AutoAWQ, compressed-tensors and transformers' FP8.

use serde_json::{Value, json};
use spark_models::ModelConfig;
use spark_weights::{Checkpoint, DiskType, normalise};

use crate::Format;
use crate::layer::in_layer;

/// `config.json` of the output: the input's with a `quantization_config`.
pub(crate) fn config(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    format: &Format,
    group_size: usize,
) -> Value {
    let mut out = checkpoint.config().clone();
    let entry = match format {
        Format::Awq { .. } => awq(config, group_size),
        Format::Nvfp4 { .. } => nvfp4(&kept_linears(checkpoint, config)),
        Format::Fp8 => json!({
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": kept_linears(checkpoint, config),
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }),
    };
    // An object: the model's configuration was read from it.
    if let Some(fields) = out.as_object_mut() {
        fields.insert("quantization_config".to_owned(), entry);
    }
    out
}

/// Why the input cannot be quantised, if it is quantised already.
pub(crate) fn is_quantised(checkpoint: &Checkpoint) -> Option<String> {
    let config = checkpoint.config();
    for part in [Some(config), config.get("text_config")].into_iter().flatten() {
        if part.get("quantization_config").is_some_and(|value| !value.is_null()) {
            return Some("config.json has a quantization_config".to_owned());
        }
    }
    let plain = |dtype| matches!(dtype, DiskType::Bf16 | DiskType::F16 | DiskType::F32);
    let found = checkpoint
        .tensors()
        .find(|tensor| in_layer(&normalise(&tensor.name)).is_some() && !plain(tensor.dtype))?;
    Some(format!("`{}` is {:?}", found.name, found.dtype))
}

fn awq(config: &ModelConfig, group_size: usize) -> Value {
    // Readers look for these as parts of a module's name, some at its beginning, some anywhere. `mlp.gate` alone would
    // also be part of `mlp.gate_proj`, so routers are named with their layers.
    let mut kept = vec!["lm_head".to_owned(), "embed_tokens".to_owned()];
    if config.vision.is_some() {
        kept.extend(["visual".to_owned(), "model.visual".to_owned()]);
    }
    let layers = 0..config.text.num_hidden_layers;
    kept.extend(layers.filter(|&i| config.text.moe_at(i).is_some()).map(|i| format!("layers.{i}.mlp.gate")));
    json!({
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": kept,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": true,
    })
}

fn nvfp4(ignore: &[String]) -> Value {
    let weights = json!({
        "actorder": null, "block_structure": null, "dynamic": false, "group_size": 16, "num_bits": 4,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "tensor_group", "symmetric": true, "type": "float",
    });
    const FORMAT: &str = "nvfp4-pack-quantized";
    json!({
        "config_groups": {"group_0": {
            "format": FORMAT, "input_activations": null, "output_activations": null, "targets": ["Linear"],
            "weights": weights,
        }},
        "format": FORMAT,
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    })
}

/// Names of all linear layers that stay as they are: those of the encoder, the routers, the output head (also where it
/// is the embeddings).
fn kept_linears(checkpoint: &Checkpoint, config: &ModelConfig) -> Vec<String> {
    let mut kept = Vec::new();
    for tensor in checkpoint.tensors() {
        let name = normalise(&tensor.name);
        let visual = name.starts_with("model.visual.")
            && !name.ends_with("pos_embed.weight")
            && tensor.shape.len() == 2;
        let router = in_layer(&name).is_some_and(|(_, name)| name == "mlp.gate.weight");
        if (visual || router)
            && let Some(module) = tensor.name.strip_suffix(".weight")
        {
            kept.push(module.to_owned());
        }
    }
    kept.sort_by_key(|name| (config.vision.is_some() && !name.contains("visual"), name.clone()));
    kept.push("lm_head".to_owned());
    kept
}
