//! Checkpoints in the layout of published ones: the tensors of Qwen3-VL-30B-A3B in three formats, at its real sizes or with
//! fewer layers and experts, and the parameters that fill from them.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::files::Tensor;
use crate::{ParamSpec, Shard};

pub(crate) const HIDDEN: usize = 2048;
pub(crate) const INTER: usize = 768;
const HEADS: usize = 32;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = 128;
const VISION_BLOCKS: usize = 27;

/// How the linear layers of the decoder are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Format {
    /// AutoAWQ, groups of 128.
    Awq,
    /// compressed-tensors.
    Nvfp4,
    /// Blocks of 128 x 128.
    Fp8,
}

/// Sizes that differ between a whole model and one for a test.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) layers: usize,
    pub(crate) experts: usize,
    pub(crate) vocab: usize,
    pub(crate) has_vision: bool,
}

impl Size {
    /// The published model.
    pub(crate) const WHOLE: Size = Size { layers: 48, experts: 128, vocab: 151_936, has_vision: true };
}

/// Name, dtype and shape of a tensor.
type Entry = (String, &'static str, Vec<usize>);

/// What a model states: as `spark_models` does.
pub(crate) fn specs(size: Size) -> Vec<ParamSpec> {
    let root = "model.language_model";
    let mut specs = vec![ParamSpec::linear(format!("{root}.embed_tokens"), size.vocab, HIDDEN, Shard::Vocab)];
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    for layer in 0..size.layers {
        let name = |part: &str| format!("{root}.layers.{layer}.{part}");
        let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        let shard = Shard::Qkv { num_kv_heads: KV_HEADS };
        specs.push(ParamSpec::vector(name("input_layernorm.weight"), [1, HIDDEN]));
        specs.push(ParamSpec::fused(name("self_attn"), &parts, HIDDEN, shard));
        specs.push(ParamSpec::linear(name("self_attn.o_proj"), HIDDEN, q, Shard::Columns));
        specs.push(ParamSpec::linear(name("mlp.gate"), size.experts, HIDDEN, Shard::Replicated));
        specs.push(ParamSpec::experts(name("mlp.experts"), size.experts, HIDDEN, INTER));
    }
    specs.push(ParamSpec::linear("lm_head", size.vocab, HIDDEN, Shard::Vocab));
    for block in (0..VISION_BLOCKS).take_while(|_| size.has_vision) {
        for (module, [n, k]) in VISION_LINEAR {
            let name = format!("model.visual.blocks.{block}.{module}");
            specs.push(ParamSpec::linear(name, n, k, Shard::Replicated));
        }
    }
    specs
}

/// The large layers of an encoder block.
const VISION_LINEAR: [(&str, [usize; 2]); 4] = [
    ("attn.qkv", [3456, 1152]),
    ("attn.proj", [1152, 1152]),
    ("mlp.linear_fc1", [4304, 1152]),
    ("mlp.linear_fc2", [1152, 4304]),
];

/// The tensors of a linear layer `[n, k]` in a format, in the order of files: by name.
fn linear(format: Format, name: &str, [n, k]: [usize; 2]) -> Vec<Entry> {
    let tensor = |part: &str, dtype, shape: [usize; 2]| (format!("{name}.{part}"), dtype, shape.to_vec());
    match format {
        Format::Awq => vec![
            tensor("qweight", "I32", [k, n / 8]),
            tensor("qzeros", "I32", [k / 128, n / 8]),
            tensor("scales", "F16", [k / 128, n]),
        ],
        Format::Nvfp4 => vec![
            (format!("{name}.weight_global_scale"), "F32", vec![1]),
            tensor("weight_packed", "U8", [n, k / 2]),
            tensor("weight_scale", "F8_E4M3", [n, k / 16]),
        ],
        Format::Fp8 => {
            vec![tensor("weight", "F8_E4M3", [n, k]), tensor("weight_scale_inv", "BF16", [n / 128, k / 128])]
        }
    }
}

/// All tensors of the model.
fn entries(format: Format, size: Size) -> Vec<Entry> {
    let plain = |name: String, shape: [usize; 2]| (name, "BF16", shape.to_vec());
    let mut all = vec![plain("lm_head.weight".to_owned(), [size.vocab, HIDDEN])];
    let root = "model.language_model";
    all.push(plain(format!("{root}.embed_tokens.weight"), [size.vocab, HIDDEN]));
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    for layer in 0..size.layers {
        let name = |part: &str| format!("{root}.layers.{layer}.{part}");
        all.push((name("input_layernorm.weight"), "BF16", vec![HIDDEN]));
        for expert in 0..size.experts {
            for (module, shape) in
                [("down_proj", [HIDDEN, INTER]), ("gate_proj", [INTER, HIDDEN]), ("up_proj", [INTER, HIDDEN])]
            {
                all.extend(linear(format, &name(&format!("mlp.experts.{expert}.{module}")), shape));
            }
        }
        all.push(plain(name("mlp.gate.weight"), [size.experts, HIDDEN]));
        for (module, shape) in [
            ("k_proj", [kv, HIDDEN]),
            ("o_proj", [HIDDEN, q]),
            ("q_proj", [q, HIDDEN]),
            ("v_proj", [kv, HIDDEN]),
        ] {
            all.extend(linear(format, &name(&format!("self_attn.{module}")), shape));
        }
    }
    for block in (0..VISION_BLOCKS).take_while(|_| size.has_vision) {
        for (module, shape) in VISION_LINEAR {
            all.push(plain(format!("model.visual.blocks.{block}.{module}.weight"), shape));
        }
    }
    all
}

fn num_bytes((_, dtype, shape): &Entry) -> usize {
    let size = match *dtype {
        "I32" | "F32" => 4,
        "BF16" | "F16" => 2,
        _ => 1,
    };
    size * shape.iter().product::<usize>()
}

/// The tensors with bytes that repeat late and are finite in their type.
pub(crate) fn tensors(format: Format, size: Size) -> Vec<Tensor> {
    let fill = |entry: &Entry| {
        let noise = (0..num_bytes(entry) as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8);
        match entry.1 {
            // Exponents below the largest.
            "BF16" | "F16" => noise.enumerate().map(|(i, b)| if i % 2 == 1 { b & 0x3b } else { b }).collect(),
            "F32" => 0.5f32.to_le_bytes().to_vec(),
            "F8_E4M3" => noise.map(|byte| byte & 0xbf).collect(),
            _ => noise.collect::<Vec<u8>>(),
        }
    };
    let tensor = |entry: Entry| {
        let bytes = fill(&entry);
        Tensor { name: entry.0, dtype: entry.1, shape: entry.2, bytes }
    };
    entries(format, size).into_iter().map(tensor).collect()
}

/// A folder whose files have the right sizes but hold nothing: for what reads headers only.
pub(crate) fn write_hollow(folder: &Path, format: Format, size: Size) {
    let (mut header, mut end) = (Map::new(), 0);
    for entry in entries(format, size) {
        let begin = end;
        end += num_bytes(&entry);
        let (name, dtype, shape) = entry;
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
    std::fs::write(folder.join("config.json"), "{}").unwrap();
}
