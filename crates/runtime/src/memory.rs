//! Where the memory goes: computed before anything runs, never probed. Knows bytes, not tensors.

use std::{fs, io};

use spark_backend::{Dtype, KvDtype, KvSpec};
use spark_models::ModelConfig;

use crate::{EngineOptions, Error, Result, options::MAX_PROMPT_LOGPROB_TOKENS};

/// The machine's memory. On a DGX Spark the GPU shares it.
#[derive(Debug, Clone, Copy)]
pub struct HostMemory {
    /// All of it, in bytes.
    pub total: u64,
    /// What programs can still take without swapping, in bytes.
    pub available: u64,
}

impl HostMemory {
    /// Reads `/proc/meminfo`; where `/proc` is not mounted it asks the kernel, whose count of free memory leaves out the
    /// page cache and so is on the low side.
    ///
    /// # Errors
    /// `/proc/meminfo` cannot be read, or has no such lines.
    pub fn read() -> Result<Self> {
        let text = match fs::read_to_string("/proc/meminfo") {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let info = rustix::system::sysinfo();
                let unit = u64::from(info.mem_unit.max(1));
                // The kernel's fields are as wide as a machine word.
                return Ok(Self {
                    total: info.totalram as u64 * unit,
                    available: info.freeram as u64 * unit,
                });
            }
            Err(source) => return Err(Error::Io { what: "reading /proc/meminfo", source }),
        };
        let field = |name: &str| parse_meminfo(&text, name);
        match (field("MemTotal"), field("MemAvailable")) {
            (Some(total), Some(available)) => Ok(Self { total, available }),
            _ => Err(Error::option("/proc/meminfo", "has no MemTotal or MemAvailable line")),
        }
    }
}

fn parse_meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// What a running engine holds besides weights, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct MemoryPlan {
    /// The KV pool.
    pub kv: KvSpec,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Encoder cache when full.
    pub encoder_cache_bytes: u64,
    /// Activations of the largest step.
    pub activation_bytes: u64,
}

impl MemoryPlan {
    /// Divides `memory` (as it is once the weights are in place).
    ///
    /// # Errors
    /// Says which option asks for more than there is.
    pub fn new(
        model: &ModelConfig,
        options: &EngineOptions,
        compute: Dtype,
        memory: HostMemory,
    ) -> Result<Self> {
        options.check(model)?;
        let dtype = options.kv_cache_dtype.resolve(compute);
        let mut kv = kv_spec(model, options.block_size, dtype);
        let encoder_cache_bytes = match model.vision {
            Some(_) => options.encoder_cache_tokens as u64 * encoder_bytes_per_token(model, compute),
            None => 0,
        };
        let activation_bytes = activation_bytes(model, options, compute);
        let budget = match options.kv_cache_memory_bytes {
            Some(bytes) if bytes <= memory.available => bytes,
            Some(bytes) => {
                let problem = format!("{bytes} bytes are asked for, {} are available", memory.available);
                return Err(Error::option("--kv-cache-memory-bytes", problem));
            }
            None => {
                let used = memory.total - memory.available.min(memory.total);
                let allowed = (memory.total as f64 * options.gpu_memory_utilization) as u64;
                allowed.saturating_sub(used).saturating_sub(encoder_cache_bytes + activation_bytes)
            }
        };
        let block_bytes = kv.bytes_per_token() as u64 * kv.block_size as u64;
        let affordable = (budget / block_bytes) as usize;
        let longest = options.max_model_len.unwrap_or(model.text.max_position_embeddings);
        let useful = options.max_num_seqs.saturating_mul(longest.div_ceil(kv.block_size));
        kv.num_blocks =
            if options.kv_cache_memory_bytes.is_some() { affordable } else { affordable.min(useful) };
        kv.num_blocks = kv.num_blocks.min(u32::MAX as usize);
        let capacity = kv.num_blocks * kv.block_size;
        let max_model_len = longest.min(capacity);
        if max_model_len < 2 || options.max_model_len.is_some_and(|len| len > capacity) {
            return Err(Error::option(
                "--max-model-len",
                format!(
                    "a sequence of {longest} tokens needs {} bytes of KV cache, {budget} are available: lower \
                     --max-model-len, use --kv-cache-dtype fp8, or raise --gpu-memory-utilization or \
                     --kv-cache-memory-bytes",
                    kv.bytes_per_token() as u64 * longest as u64
                ),
            ));
        }
        Ok(Self { kv, max_model_len, encoder_cache_bytes, activation_bytes })
    }
}

fn kv_spec(model: &ModelConfig, block_size: usize, dtype: KvDtype) -> KvSpec {
    KvSpec {
        num_layers: model.text.num_hidden_layers,
        num_kv_heads: model.text.num_key_value_heads,
        head_dim: model.text.head_dim,
        block_size,
        num_blocks: 0,
        dtype,
    }
}

/// Main embedding and one row a deepstack level.
fn encoder_bytes_per_token(model: &ModelConfig, compute: Dtype) -> u64 {
    ((1 + model.num_deepstack()) * model.text.hidden_size * compute.size()) as u64
}

/// An upper bound: the widest tensors of a layer alive together, the logits, and the encoder's widest pair.
fn activation_bytes(model: &ModelConfig, options: &EngineOptions, compute: Dtype) -> u64 {
    let text = &model.text;
    let qkv = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim;
    let inner = text.moe.as_ref().map_or(0, |m| m.num_experts_per_tok * m.moe_intermediate_size);
    let widest = qkv.max(2 * inner.max(text.intermediate_size));
    let step = options.max_num_batched_tokens * (4 * text.hidden_size + 2 * widest) * compute.size();
    let logits = (options.max_num_seqs + MAX_PROMPT_LOGPROB_TOKENS) * text.vocab_size * 4;
    let encoder = model.vision.as_ref().map_or(0, |v| {
        let patches = options.encoder_cache_tokens * v.spatial_merge_size * v.spatial_merge_size;
        patches * (3 * v.hidden_size + v.intermediate_size) * compute.size()
    });
    (step + logits + encoder) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ModelConfig {
        let text = spark_models::published("qwen3-vl-30b-a3b").unwrap();
        // serde_json is not a dependency here: the published shapes are parsed by the models crate itself.
        ModelConfig::published(text).unwrap()
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn meminfo_lines_are_found_by_their_whole_name() {
        let text = "MemTotal:       100 kB\nMemAvailable:    50 kB\nMemTotalX: 7 kB\n";
        assert_eq!(parse_meminfo(text, "MemTotal"), Some(102_400));
        assert_eq!(parse_meminfo(text, "MemFree"), None);
    }

    #[test]
    fn the_pool_is_no_larger_than_useful_and_no_larger_than_memory() {
        let memory = HostMemory { total: 128 * GIB, available: 100 * GIB };
        let options = EngineOptions { max_model_len: Some(4096), ..EngineOptions::default() };
        let plan = MemoryPlan::new(&model(), &options, Dtype::Bf16, memory).unwrap();
        assert_eq!(plan.kv.num_blocks, 64 * 128, "64 sequences of 4096 tokens");
        assert_eq!(plan.kv.bytes_per_token(), 2 * 48 * 4 * 128 * 2);
        let small = HostMemory { total: 128 * GIB, available: 20 * GIB };
        let tight = MemoryPlan::new(&model(), &options, Dtype::Bf16, small).unwrap();
        assert!(tight.kv.num_bytes() < 8 * GIB);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let memory = HostMemory { total: 16 * GIB, available: GIB };
        let options = EngineOptions { max_model_len: Some(262_144), ..EngineOptions::default() };
        let error = MemoryPlan::new(&model(), &options, Dtype::Bf16, memory).unwrap_err().to_string();
        assert!(error.contains("--max-model-len") && error.contains("262144"), "{error}");
    }
}
