//! Where the memory goes: computed before anything runs, never probed. Knows bytes, not tensors.

use spark_backend::{ActivationSpec, Dtype, KvDtype, KvSpec, Memory, Rank, StateSpec};
use spark_models::ModelConfig;

use crate::{EngineOptions, Error, Result, options::MAX_PROMPT_LOGPROB_TOKENS};

/// What a running engine holds besides weights, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct MemoryPlan {
    /// The KV pool.
    pub kv: KvSpec,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Encoder cache when full.
    pub encoder_cache_bytes: u64,
    /// Sizes of the largest step and the largest medium.
    pub activations: ActivationSpec,
    /// What the backend sets aside for them.
    pub activation_bytes: u64,
}

/// The memory of a device at two times: what is between them, the engine's weights have taken.
#[derive(Debug, Clone, Copy)]
pub struct MemoryUse {
    /// Before any weight was loaded.
    pub before: Memory,
    /// With the weights in place.
    pub now: Memory,
}

impl MemoryUse {
    /// What the engine may still take when its share of all memory is `utilization`, as with vLLM's
    /// `--gpu-memory-utilization`. On a device with memory of its own the share is this engine's alone, so that two may
    /// live side by side; where the whole machine lives in it, what others use counts too: nothing else keeps it from
    /// running full.
    fn room(&self, utilization: f64) -> u64 {
        let allowed = (self.now.total as f64 * utilization) as u64;
        let used = if self.now.is_shared {
            self.now.total.saturating_sub(self.now.available)
        } else {
            self.before.available.saturating_sub(self.now.available)
        };
        allowed.saturating_sub(used).min(self.now.available)
    }

    /// What the weights took.
    fn weights(&self) -> u64 {
        self.before.available.saturating_sub(self.now.available)
    }
}

impl MemoryPlan {
    /// Divides what `memory` leaves: activations and encoder cache first, the KV pool takes the rest. `activation_bytes` is
    /// the backend's ([`Backend::activation_bytes`](spark_backend::Backend::activation_bytes)). Heads and intermediate features
    /// are those of `rank`; the rows of the head are whole, because every rank ends with all logits.
    ///
    /// # Errors
    /// Says which option asks for more than there is, or why the model cannot be split over so many ranks.
    pub fn new(
        model: &ModelConfig,
        options: &EngineOptions,
        compute: Dtype,
        memory: MemoryUse,
        rank: Rank,
        activation_bytes: impl Fn(&ActivationSpec) -> u64,
    ) -> Result<Self> {
        options.check(model)?;
        model.check_ranks(rank.world())?;
        let dtype = options.kv_cache_dtype.resolve(compute);
        let mut kv = kv_spec(model, rank, options.block_size, dtype);
        let encoder_cache_bytes = match model.vision {
            Some(_) => options.encoder_cache_tokens as u64 * encoder_bytes_per_token(model, compute),
            None => 0,
        };
        let activations = activations(model, rank, options);
        let activation_bytes = activation_bytes(&activations);
        let fixed = encoder_cache_bytes + activation_bytes;
        let budget = match options.kv_cache_memory_bytes {
            Some(bytes) if bytes <= memory.now.available => bytes,
            Some(bytes) => {
                let problem = format!("{bytes} bytes are asked for, {} are available", memory.now.available);
                return Err(Error::option("--kv-cache-memory-bytes", problem));
            }
            None => memory.room(options.gpu_memory_utilization).saturating_sub(fixed),
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
        let plan = Self { kv, max_model_len, encoder_cache_bytes, activations, activation_bytes };
        if max_model_len < 2 || options.max_model_len.is_some_and(|len| len > capacity) {
            return Err(Error::option("--max-model-len", plan.problem(longest, budget, memory)));
        }
        Ok(plan)
    }

    /// What a backend allocates for it. `vocab_size` is the number of real tokens.
    pub fn state(&self, options: &EngineOptions, vocab_size: usize) -> StateSpec {
        StateSpec {
            kv: self.kv,
            num_slots: options.max_num_seqs,
            max_num_tokens: options.batched_tokens(),
            vocab_size,
            max_blocks_per_seq: self.max_model_len.div_ceil(options.block_size),
            encoder_cache_bytes: self.encoder_cache_bytes,
            activations: self.activations,
        }
    }

    /// Why a sequence of `longest` tokens does not fit, with all numbers.
    fn problem(&self, longest: usize, budget: u64, memory: MemoryUse) -> String {
        let (total, available) = (memory.now.total, memory.now.available);
        format!(
            "a sequence of {longest} tokens needs {} bytes of KV cache, {budget} are left for it: of {total} bytes of \
             memory {available} are free beside the weights (which took {}), activations need {} and the encoder cache \
             {}; lower --max-model-len, --max-num-batched-tokens or --encoder-cache-tokens, use --kv-cache-dtype fp8, or \
             raise --gpu-memory-utilization or --kv-cache-memory-bytes",
            self.kv.bytes_per_token() as u64 * longest as u64,
            memory.weights(),
            self.activation_bytes,
            self.encoder_cache_bytes,
        )
    }
}

fn kv_spec(model: &ModelConfig, rank: Rank, block_size: usize, dtype: KvDtype) -> KvSpec {
    KvSpec {
        num_layers: model.text.num_hidden_layers,
        num_kv_heads: rank.kv_heads(model.text.num_key_value_heads).len(),
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

/// The largest step that the scheduler may plan, the largest medium that it may have encoded.
fn activations(model: &ModelConfig, rank: Rank, options: &EngineOptions) -> ActivationSpec {
    let (text, world) = (&model.text, rank.world());
    let has_dense_layers = (0..text.num_hidden_layers).any(|layer| text.moe_at(layer).is_none());
    let moe = text.moe.as_ref();
    let vision = model.vision.as_ref();
    let merge = vision.map_or(0, |v| v.spatial_merge_size * v.spatial_merge_size);
    let parts = vision.map_or(1, |v| v.parts(world));
    ActivationSpec {
        num_slots: options.max_num_seqs,
        num_tokens: options.batched_tokens(),
        num_logit_rows: options.max_num_seqs + MAX_PROMPT_LOGPROB_TOKENS,
        vocab_rows: text.vocab_size,
        hidden_size: text.hidden_size,
        num_heads: text.num_attention_heads / world,
        num_kv_heads: rank.kv_heads(text.num_key_value_heads).len(),
        head_dim: text.head_dim,
        intermediate_size: if has_dense_layers { text.intermediate_size / world } else { 0 },
        num_experts: moe.map_or(0, |m| m.num_experts),
        top_k: moe.map_or(0, |m| m.num_experts_per_tok),
        moe_intermediate_size: moe.map_or(0, |m| m.features_of(world)),
        num_patches: options.encoder_cache_tokens * merge,
        patch_size: vision.map_or(0, |v| 3 * v.temporal_patch_size * v.patch_size * v.patch_size),
        vision_hidden_size: vision.map_or(0, |v| v.hidden_size),
        vision_num_heads: vision.map_or(0, |v| v.num_heads / parts),
        vision_head_dim: vision.map_or(0, |v| v.hidden_size / v.num_heads.max(1)),
        vision_intermediate_size: vision.map_or(0, |v| v.intermediate_size / parts),
        patches_per_token: merge,
    }
}

#[cfg(test)]
mod tests {
    use spark_models::EncoderSplit;

    use super::*;

    fn model() -> ModelConfig {
        let text = spark_models::published("qwen3-vl-30b-a3b").unwrap();
        // serde_json is not a dependency here: the published shapes are parsed by the models crate itself.
        ModelConfig::published(text).unwrap()
    }

    const GIB: u64 = 1 << 30;

    fn bf16(spec: &ActivationSpec) -> u64 {
        spec.num_bytes(2)
    }

    /// A machine on which nothing runs that has no share of `available`.
    fn machine(total: u64, available: u64) -> MemoryUse {
        let now = Memory { total, available, is_shared: true };
        MemoryUse { before: now, now }
    }

    #[test]
    fn the_pool_is_no_larger_than_useful_and_no_larger_than_memory() {
        let options = EngineOptions { max_model_len: Some(4096), ..EngineOptions::default() };
        let plan = MemoryPlan::new(
            &model(),
            &options,
            Dtype::Bf16,
            machine(128 * GIB, 100 * GIB),
            Rank::SINGLE,
            bf16,
        )
        .unwrap();
        assert_eq!(plan.kv.num_blocks, 64 * 128, "64 sequences of 4096 tokens");
        assert_eq!(plan.kv.bytes_per_token(), 2 * 48 * 4 * 128 * 2);
        let tight = MemoryPlan::new(
            &model(),
            &options,
            Dtype::Bf16,
            machine(128 * GIB, 20 * GIB),
            Rank::SINGLE,
            bf16,
        )
        .unwrap();
        assert!(tight.kv.num_bytes() < 8 * GIB);
    }

    #[test]
    fn a_rank_has_its_heads_and_features() {
        let options = EngineOptions { max_model_len: Some(4096), ..EngineOptions::default() };
        let memory = machine(128 * GIB, 100 * GIB);
        // The encoder, which is whole on every rank, would need the most.
        let model = ModelConfig { vision: None, ..model() };
        let plan = |world| {
            let rank = Rank::new(world - 1, world).unwrap();
            MemoryPlan::new(&model, &options, Dtype::Bf16, memory, rank, bf16)
        };
        let [one, two, eight] = [1, 2, 8].map(|world| plan(world).unwrap());
        assert_eq!(two.kv.bytes_per_token() * 2, one.kv.bytes_per_token());
        assert_eq!(eight.kv.num_kv_heads, 1, "four heads, each on two ranks");
        let sizes = |plan: &MemoryPlan| {
            let spec = plan.activations;
            [spec.num_heads, spec.num_kv_heads, spec.moe_intermediate_size, spec.vocab_rows]
        };
        let [heads, kv_heads, features, vocab] = sizes(&one);
        assert_eq!(sizes(&two), [heads / 2, kv_heads / 2, features / 2, vocab]);
        assert_eq!(sizes(&eight), [heads / 8, 1, features / 8, vocab]);
        assert!(two.activation_bytes < one.activation_bytes);
        assert!(plan(3).unwrap_err().to_string().contains("3 ranks"));
        let mut model = model.clone();
        model.share_experts(spark_models::MoeParallel::Ep).unwrap();
        let rank = Rank::new(1, 2).unwrap();
        let whole = MemoryPlan::new(&model, &options, Dtype::Bf16, memory, rank, bf16).unwrap();
        assert_eq!(sizes(&whole), [heads / 2, kv_heads / 2, features, vocab], "whole experts");
    }

    #[test]
    fn ranks_that_split_the_encoder_have_a_part_of_its_heads_and_features() {
        let options = EngineOptions { max_model_len: Some(4096), ..EngineOptions::default() };
        let memory = machine(128 * GIB, 100 * GIB);
        let plan = |split| {
            let mut model = model();
            model.vision.as_mut().unwrap().split = split;
            let rank = Rank::new(1, 2).unwrap();
            MemoryPlan::new(&model, &options, Dtype::Bf16, memory, rank, bf16).unwrap()
        };
        let [whole, split] = [EncoderSplit::Data, EncoderSplit::Weights].map(plan);
        let sizes = |plan: &MemoryPlan| {
            let spec = plan.activations;
            [
                spec.vision_num_heads,
                spec.vision_intermediate_size,
                spec.vision_hidden_size,
                spec.vision_head_dim,
            ]
        };
        assert_eq!(sizes(&whole), [16, 4304, 1152, 72]);
        assert_eq!(sizes(&split), [8, 2152, 1152, 72]);
        assert!(split.activation_bytes < whole.activation_bytes, "the encoder needs the most");
    }

    #[test]
    fn a_share_is_of_all_memory_and_leaves_out_other_engines_of_a_gpu() {
        let gpu = |available| Memory { total: 80 * GIB, available, is_shared: false };
        // Another engine holds 40 GiB; this one has loaded 16.
        let two = MemoryUse { before: gpu(40 * GIB), now: gpu(24 * GIB) };
        assert_eq!(two.room(0.5), 24 * GIB, "its own half without its weights");
        assert_eq!(two.room(0.25), 4 * GIB);
        assert_eq!(two.room(0.9), 24 * GIB, "never more than there is");
        assert_eq!(two.room(0.1), 0);
        let shared = |available| Memory { total: 128 * GIB, available, is_shared: true };
        let machine = MemoryUse { before: shared(100 * GIB), now: shared(84 * GIB) };
        assert_eq!(machine.room(0.5), 20 * GIB, "what others use counts");
    }

    #[test]
    fn the_rest_of_a_gpu_is_for_the_cache() {
        let options = EngineOptions { max_num_seqs: 128, ..EngineOptions::default() };
        let gpu = |available| Memory { total: 80 * GIB, available, is_shared: false };
        let memory = MemoryUse { before: gpu(79 * GIB), now: gpu(61 * GIB) };
        let plan = MemoryPlan::new(&model(), &options, Dtype::Bf16, memory, Rank::SINGLE, bf16).unwrap();
        let whole = plan.kv.num_bytes() + plan.activation_bytes + plan.encoder_cache_bytes;
        let block = plan.kv.bytes_per_token() as u64 * 32;
        assert!(
            whole <= 54 * GIB && whole + block > 54 * GIB,
            "0.9 of 80 GiB less 18 for the weights: {plan:?}"
        );
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let options = EngineOptions { max_model_len: Some(262_144), ..EngineOptions::default() };
        let error =
            MemoryPlan::new(&model(), &options, Dtype::Bf16, machine(16 * GIB, GIB), Rank::SINGLE, bf16)
                .unwrap_err()
                .to_string();
        assert!(error.contains("--max-model-len") && error.contains("262144"), "{error}");
        assert!(error.contains(&GIB.to_string()) && error.contains(&(16 * GIB).to_string()), "{error}");
    }
}
