//! Writes a checkpoint of a chosen size with random weights, in the layouts that published ones have: what loading is
//! measured on. The model it makes is a Qwen3-VL with few layers of the width of the 30B-A3B; its text is noise.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};
use spark_models::ModelConfig;
use spark_testing::{Random, model_dir};
use spark_weights::{ParamKind, ParamSpec};

/// Bytes of a shard, as far as whole tensors allow. Published shards have 4 to 5 GB.
const SHARD: u64 = 512 << 20;
/// Inputs that share an AWQ scale.
const GROUP: usize = 128;

/// Layout of the decoder's linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Dense model, BF16, `[n, k]` as it is used.
    DenseBf16,
    /// Experts stacked in one BF16 tensor per layer, `[experts, k, n]`: transposed on the way in.
    MoeBf16,
    /// Each expert three AWQ triples: codes `[k, n / 8]`, interleaved, transposed on the way in.
    MoeAwq,
}

/// What a tensor holds; decides its bytes.
#[derive(Clone, Copy)]
enum Fill {
    /// BF16 of a deviation near 0.02.
    Bf16,
    /// BF16 ones: norms.
    Ones,
    /// Any bits.
    Codes,
    /// F16 scales near 0.005.
    Scales,
}

struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    fill: Fill,
}

impl Tensor {
    fn len(&self) -> u64 {
        let size = if self.dtype == "I32" { 4 } else { 2 };
        self.shape.iter().map(|&side| side as u64).product::<u64>() * size
    }
}

/// Writes the checkpoint into the empty folder `dir`, with the small files of a fixture; flushed to the disk. Returns
/// the paths of its shards.
pub(crate) fn write(dir: &Path, layout: Layout) -> Result<Vec<std::path::PathBuf>> {
    let fixture = model_dir(if layout == Layout::DenseBf16 { "dense_vl_bf16" } else { "moe_vl_bf16" });
    for name in ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"] {
        fs::copy(fixture.join(name), dir.join(name)).with_context(|| format!("copying {name}"))?;
    }
    let config = config(&fixture, layout)?;
    fs::write(dir.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    let mut tensors = Vec::new();
    for spec in ModelConfig::parse(&config, None)?.specs(true) {
        describe(&spec, layout, &mut tensors);
    }
    let mut shards: Vec<Vec<Tensor>> = vec![Vec::new()];
    let mut size = 0;
    for tensor in tensors {
        if size >= SHARD {
            shards.push(Vec::new());
            size = 0;
        }
        size += tensor.len();
        let last = shards.len() - 1;
        shards[last].push(tensor);
    }
    let (mut map, mut paths, mut random) = (Map::new(), Vec::new(), Random::new(1));
    for (number, tensors) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        let path = dir.join(&name);
        write_shard(&path, tensors, &mut random).with_context(|| format!("writing {name}"))?;
        paths.push(path);
    }
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), serde_json::to_vec(&index)?)?;
    Ok(paths)
}

/// The fixture's configuration at the width of Qwen3-VL-30B-A3B, with as many layers as make 2 GB.
fn config(fixture: &Path, layout: Layout) -> Result<Value> {
    let mut config: Value = serde_json::from_slice(&fs::read(fixture.join("config.json"))?)?;
    let (layers, experts) = match layout {
        Layout::DenseBf16 => (17, 0),
        Layout::MoeBf16 => (10, 16),
        Layout::MoeAwq => (6, 128),
    };
    let text = &mut config["text_config"];
    for (key, value) in [
        ("hidden_size", 2048),
        ("head_dim", 128),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 4),
        ("intermediate_size", 6144),
        ("moe_intermediate_size", 768),
        ("num_hidden_layers", layers),
        ("vocab_size", 16_384),
    ] {
        text[key] = json!(value);
    }
    if experts > 0 {
        text["num_experts"] = json!(experts);
        text["num_experts_per_tok"] = json!(8);
    }
    text["rope_scaling"]["mrope_section"] = json!([24, 20, 20]);
    config["vision_config"]["out_hidden_size"] = json!(2048);
    if layout == Layout::MoeAwq {
        config["quantization_config"] = json!({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": true});
    }
    Ok(config)
}

/// The tensors that a published checkpoint has for `spec`.
fn describe(spec: &ParamSpec, layout: Layout, out: &mut Vec<Tensor>) {
    match &spec.kind {
        &ParamKind::Vector { shape: [rows, columns] } => {
            let shape = if rows == 1 { vec![columns] } else { vec![rows, columns] };
            let fill = if spec.name.contains("norm") { Fill::Ones } else { Fill::Bf16 };
            out.push(Tensor { name: spec.name.clone(), dtype: "BF16", shape, fill });
        }
        ParamKind::Linear { parts, k, bias } => {
            let plain = ["visual", "embed_tokens", "lm_head"].iter().any(|part| spec.name.contains(part))
                || spec.name.ends_with("mlp.gate");
            for (part, n) in parts {
                let module =
                    if part.is_empty() { spec.name.clone() } else { format!("{}.{part}", spec.name) };
                matrix(&module, *n, *k, layout == Layout::MoeAwq && !plain, out);
                if *bias {
                    let name = format!("{module}.bias");
                    out.push(Tensor { name, dtype: "BF16", shape: vec![*n], fill: Fill::Bf16 });
                }
            }
        }
        &ParamKind::Experts { num_experts, hidden, intermediate } if layout == Layout::MoeAwq => {
            for expert in 0..num_experts {
                let module = |projection: &str| format!("{}.{expert}.{projection}", spec.name);
                matrix(&module("gate_proj"), intermediate, hidden, true, out);
                matrix(&module("up_proj"), intermediate, hidden, true, out);
                matrix(&module("down_proj"), hidden, intermediate, true, out);
            }
        }
        &ParamKind::Experts { num_experts, hidden, intermediate } => {
            let stacked = |projection: &str, k: usize, n: usize| Tensor {
                name: format!("{}.{projection}", spec.name),
                dtype: "BF16",
                shape: vec![num_experts, k, n],
                fill: Fill::Bf16,
            };
            out.push(stacked("gate_up_proj", hidden, 2 * intermediate));
            out.push(stacked("down_proj", intermediate, hidden));
        }
    }
}

/// The tensors of one matrix `[n, k]`.
fn matrix(module: &str, n: usize, k: usize, awq: bool, out: &mut Vec<Tensor>) {
    let mut push = |kind: &str, dtype, shape, fill| {
        out.push(Tensor { name: format!("{module}.{kind}"), dtype, shape, fill });
    };
    if awq {
        push("qweight", "I32", vec![k, n / 8], Fill::Codes);
        push("qzeros", "I32", vec![k / GROUP, n / 8], Fill::Codes);
        push("scales", "F16", vec![k / GROUP, n], Fill::Scales);
    } else {
        push("weight", "BF16", vec![n, k], Fill::Bf16);
    }
}

fn write_shard(path: &Path, tensors: &[Tensor], random: &mut Random) -> Result<()> {
    let (mut header, mut offset) = (Map::new(), 0);
    for tensor in tensors {
        let end = offset + tensor.len();
        header.insert(
            tensor.name.clone(),
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    // As the safetensors library does: spaces up to a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(4 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for tensor in tensors {
        let mut left = tensor.len() as usize;
        while left > 0 {
            let word = word(random, tensor.fill).to_le_bytes();
            let take = left.min(word.len());
            file.write_all(&word[..take])?;
            left -= take;
        }
    }
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    Ok(())
}

/// Eight bytes of a tensor. 16-bit floats get a fixed exponent under a random sign and mantissa.
fn word(random: &mut Random, fill: Fill) -> u64 {
    const EACH: u64 = 0x0001_0001_0001_0001;
    match fill {
        Fill::Bf16 => (random.next_u64() & (0x807f * EACH)) | (0x3c80 * EACH),
        Fill::Ones => 0x3f80 * EACH,
        Fill::Codes => random.next_u64(),
        Fill::Scales => (random.next_u64() & (0x03ff * EACH)) | (0x1c00 * EACH),
    }
}
