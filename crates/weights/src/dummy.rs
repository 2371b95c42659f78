//! Random weights of the right shapes and of the scheme that a configuration names (`--load-format dummy`): the engine
//! at full size without a checkpoint. The text that such a model makes is noise.

use bytes::Bytes;
use half::{bf16, f16};
use serde_json::Value;
use spark_backend::{Dtype, Matrix, MatrixData};

use crate::error::Result;
use crate::load::{build, option};
use crate::params::Params;
use crate::scheme::{NVFP4_GROUP, fp8_block};
use crate::shard::Rank;
use crate::spec::{ParamKind, ParamSpec, join};

/// Scheme of the quantised layers of a dummy model.
#[derive(Debug, Clone, Copy, PartialEq)]
enum DummyScheme {
    Bf16,
    Int4 { group: usize, zeros: bool },
    Nvfp4,
    Fp8 { block: [usize; 2] },
}

/// Random parameters for `specs`, whole (of one rank). `config` is a `config.json`; its `quantization_config` decides
/// the scheme of the decoder's linear layers. Router, embedding, lm_head and vision tower are BF16, as are layers whose
/// inputs the scheme cannot pack. The same seed gives the same values.
///
/// # Errors
/// When a name is stated twice, or when the weights would not fit this machine's memory.
pub fn dummy(config: &Value, specs: &[ParamSpec], seed: u64) -> Result<Params> {
    let scheme = scheme_of(config);
    let needed = specs.iter().map(|spec| estimate(spec, scheme)).sum::<f64>();
    let memory = total_memory();
    if needed > memory {
        let reason = format!("the weights would take {needed:.3e} bytes, this machine has {memory:.3e}");
        return Err(option("dummy weights", reason));
    }
    let rank = Rank::new(0, 1)?;
    let mut params = Vec::with_capacity(specs.len());
    for spec in specs {
        let mut random = Random::new(seed, &spec.name);
        let mut matrices = Vec::new();
        let mut floats = Vec::new();
        match &spec.kind {
            &ParamKind::Vector { shape: [rows, cols] } => floats.push(random.vector(&spec.name, rows * cols)),
            ParamKind::Linear { parts, k, bias } => {
                for (part, n) in parts {
                    let scheme =
                        if is_quantised(&join(&spec.name, part)) { scheme } else { DummyScheme::Bf16 };
                    matrices.push(random.matrix(*n, *k, scheme));
                    if *bias {
                        floats.push(vec![0.0; *n]);
                    }
                }
            }
            &ParamKind::Experts { num_experts, hidden, intermediate } => {
                for _ in 0..num_experts {
                    matrices.push(random.matrix(intermediate, hidden, scheme));
                    matrices.push(random.matrix(intermediate, hidden, scheme));
                    matrices.push(random.matrix(hidden, intermediate, scheme));
                }
            }
        }
        params.push((spec.name.clone(), build(spec, matrices, floats, rank)?));
    }
    Params::new(params)
}

/// About the bytes of a parameter. In floating point: a configuration alone may claim any size.
fn estimate(spec: &ParamSpec, scheme: DummyScheme) -> f64 {
    // What a matrix takes beside its weights, so that endless empty ones count too.
    const EACH: f64 = 64.0;
    let bytes = |scheme| match scheme {
        DummyScheme::Bf16 => 2.0,
        DummyScheme::Int4 { .. } | DummyScheme::Nvfp4 => 0.5,
        DummyScheme::Fp8 { .. } => 1.0,
    };
    match &spec.kind {
        ParamKind::Vector { shape: [rows, cols] } => 4.0 * *rows as f64 * *cols as f64,
        ParamKind::Linear { parts, k, .. } => parts
            .iter()
            .map(|(part, n)| {
                let scheme = if is_quantised(&join(&spec.name, part)) { scheme } else { DummyScheme::Bf16 };
                EACH + *n as f64 * *k as f64 * bytes(scheme)
            })
            .sum(),
        ParamKind::Experts { num_experts, hidden, intermediate } => {
            3.0 * *num_experts as f64 * (EACH + *hidden as f64 * *intermediate as f64 * bytes(scheme))
        }
    }
}

fn total_memory() -> f64 {
    let info = rustix::system::sysinfo();
    info.totalram as f64 * f64::from(info.mem_unit)
}

/// The linear layers that published checkpoints quantise.
fn is_quantised(module: &str) -> bool {
    let plain = ["visual", "embed_tokens", "lm_head"].iter().any(|part| module.contains(part));
    !plain && !module.ends_with("mlp.gate")
}

fn scheme_of(config: &Value) -> DummyScheme {
    let quantization = &config["quantization_config"];
    let method = quantization["quant_method"].as_str().unwrap_or("");
    let format = quantization["format"].as_str().unwrap_or("");
    let algorithm = quantization["quant_algo"].as_str().unwrap_or("");
    let groups = quantization["config_groups"].as_object();
    let weights = groups.and_then(|groups| groups.values().next()).map(|group| &group["weights"]);
    let size =
        |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0);
    match (method, format, algorithm) {
        ("awq", ..) => {
            DummyScheme::Int4 { group: size(&quantization["group_size"]).unwrap_or(128), zeros: true }
        }
        (_, "nvfp4-pack-quantized", _) => DummyScheme::Nvfp4,
        (_, "pack-quantized", _) => {
            let weights = weights.unwrap_or(&Value::Null);
            let group = size(&weights["group_size"]).unwrap_or(128);
            DummyScheme::Int4 { group, zeros: weights["symmetric"] == false }
        }
        ("modelopt", _, algorithm) if algorithm.contains("NVFP4") => DummyScheme::Nvfp4,
        ("fp8", ..) | (_, "float-quantized", _) => DummyScheme::Fp8 { block: fp8_block(config) },
        ("modelopt", _, algorithm) if algorithm.contains("FP8") => {
            DummyScheme::Fp8 { block: fp8_block(config) }
        }
        _ => DummyScheme::Bf16,
    }
}

/// A stream of 64-bit numbers (splitmix64), seeded by a name.
struct Random(u64);

impl Random {
    fn new(seed: u64, name: &str) -> Self {
        let hash = blake3::hash(name.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hash.as_bytes()[..8]);
        Random(u64::from_le_bytes(first) ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// `len` bytes: random words, passed through `map`.
    fn bytes(&mut self, len: usize, map: impl Fn(u64) -> u64) -> Bytes {
        let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
        while bytes.len() < len {
            bytes.extend_from_slice(&map(self.next()).to_le_bytes());
        }
        bytes.truncate(len);
        bytes.into()
    }

    /// Norm weights are one, other tables small.
    fn vector(&mut self, name: &str, len: usize) -> Vec<f32> {
        if name.contains("norm") {
            let value = if name.ends_with("bias") { 0.0 } else { 1.0 };
            return vec![value; len];
        }
        (0..len).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32 * 0.04 - 0.02).collect()
    }

    /// Values of about `1 / sqrt(k)`, so that activations keep their size from layer to layer.
    fn matrix(&mut self, n: usize, k: usize, scheme: DummyScheme) -> Matrix {
        let typical = 1.0 / (k.max(1) as f32).sqrt();
        let data = match scheme {
            DummyScheme::Int4 { group, zeros } if k.is_multiple_of(group) && k.is_multiple_of(2) => {
                let scale = f16::from_f32(typical / 4.6).to_le_bytes().repeat(n * k / group);
                MatrixData::Int4 {
                    codes: self.bytes(n * k / 2, |word| word),
                    zeros: zeros.then(|| vec![8; n * k / group].into()),
                    scales: scale.into(),
                    scale_dtype: Dtype::F16,
                    group_size: group,
                }
            }
            DummyScheme::Nvfp4 if k.is_multiple_of(NVFP4_GROUP) => MatrixData::Nvfp4 {
                codes: self.bytes(n * k / 2, |word| word),
                // E4M3 1.0
                scales: vec![0x38; n * k / NVFP4_GROUP].into(),
                alpha: typical / 2.9,
            },
            DummyScheme::Fp8 { block } => MatrixData::Fp8 {
                // Sign, exponents of 1/8 to 1 (0x20 to 0x3f), any mantissa: never the NaN codes.
                values: self.bytes(n * k, |word| (word & 0x9f9f_9f9f_9f9f_9f9f) | 0x2020_2020_2020_2020),
                scales: vec![typical; n.div_ceil(block[0]) * k.div_ceil(block[1])],
                block,
            },
            _ => {
                // Random sign and mantissa under the exponent of the typical value, four numbers a word.
                let exponent = u64::from(bf16::from_f32(typical * 0.7).to_bits() & 0x7f80);
                let exponents = exponent * 0x0001_0001_0001_0001;
                let values = self.bytes(2 * n * k, |word| (word & 0x807f_807f_807f_807f) | exponents);
                MatrixData::Dense { dtype: Dtype::Bf16, values }
            }
        };
        Matrix { n, k, data }
    }
}
