//! The roofline of a model: bytes and operations of a step, from its configuration alone. No hardware.

use spark_models::{ModelConfig, MoeConfig, TextConfig};

/// How weights and KV cache are stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage {
    /// Bytes of a weight of the decoder's linear layers.
    pub(super) weight: f64,
    /// Bytes of a weight of the output head.
    pub(super) head: f64,
    /// Bytes of K or V of a head, for each of its numbers.
    pub(super) kv: f64,
}

/// What a decode step reads, on one rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct DecodeBytes {
    pub(super) attention: f64,
    /// Of the distinct experts that are hit.
    pub(super) experts: f64,
    pub(super) dense_mlp: f64,
    pub(super) router: f64,
    pub(super) head: f64,
    pub(super) kv: f64,
    pub(super) activations: f64,
    /// Distinct experts of a layer.
    pub(super) num_experts: f64,
}

impl DecodeBytes {
    pub(super) fn total(&self) -> f64 {
        self.attention + self.experts + self.dense_mlp + self.router + self.head + self.kv + self.activations
    }
}

/// A model over a number of ranks.
#[derive(Debug)]
pub(super) struct Roofline<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) storage: Storage,
    pub(super) ranks: usize,
}

/// Vectors of the hidden size that a layer reads and writes beside its weights, about: residual, norms, products.
const VECTORS: f64 = 12.0;
/// Bytes of a number in bf16.
const BF16: f64 = 2.0;

impl Roofline<'_> {
    fn text(&self) -> &TextConfig {
        &self.config.text
    }

    fn layers(&self) -> f64 {
        self.text().num_hidden_layers as f64
    }

    fn moe_layers(&self) -> f64 {
        (0..self.text().num_hidden_layers).filter(|&layer| self.text().moe_at(layer).is_some()).count() as f64
    }

    /// Weights of q, k, v and o of a layer, all ranks together.
    fn attention_weights(&self) -> f64 {
        let t = self.text();
        let heads = (2 * t.num_attention_heads + 2 * self.kv_heads_of_all_ranks()) as f64;
        t.hidden_size as f64 * heads * t.head_dim as f64
    }

    /// Heads of KV are copied where there are fewer than ranks.
    fn kv_heads_of_all_ranks(&self) -> usize {
        self.text().num_key_value_heads.max(self.ranks)
    }

    fn expert_weights(&self, moe: &MoeConfig) -> f64 {
        3.0 * self.text().hidden_size as f64 * moe.moe_intermediate_size as f64
    }

    fn dense_weights(&self) -> f64 {
        let t = self.text();
        3.0 * t.hidden_size as f64 * t.intermediate_size as f64
    }

    fn head_weights(&self) -> f64 {
        (self.text().vocab_size * self.text().hidden_size) as f64
    }

    /// Bytes of K and V of one token in all layers, on one rank.
    pub(super) fn kv_bytes(&self) -> f64 {
        let heads = self.kv_heads_of_all_ranks() as f64 / self.ranks as f64;
        2.0 * self.layers() * heads * self.text().head_dim as f64 * self.storage.kv
    }

    /// Experts of a layer that `tokens` tokens hit, if each chooses evenly and by itself. Real tokens choose more alike.
    pub(super) fn distinct_experts(moe: &MoeConfig, tokens: f64) -> f64 {
        let missed = 1.0 - moe.num_experts_per_tok as f64 / moe.num_experts as f64;
        moe.num_experts as f64 * (1.0 - missed.powf(tokens))
    }

    /// What one rank reads to decode one token of each of `batch` sequences of `context` tokens.
    pub(super) fn decode(&self, batch: f64, context: f64) -> DecodeBytes {
        let (ranks, weight) = (self.ranks as f64, self.storage.weight);
        let (layers, moe_layers, hidden) = (self.layers(), self.moe_layers(), self.text().hidden_size as f64);
        let (num_experts, experts, router) = match &self.text().moe {
            Some(moe) => {
                let hit = Self::distinct_experts(moe, batch);
                let experts = moe_layers * hit * self.expert_weights(moe) * weight / ranks;
                (hit, experts, moe_layers * moe.num_experts as f64 * hidden * BF16)
            }
            None => (0.0, 0.0, 0.0),
        };
        DecodeBytes {
            attention: layers * self.attention_weights() * weight / ranks,
            experts,
            dense_mlp: (layers - moe_layers) * self.dense_weights() * weight / ranks,
            router,
            head: self.head_weights() * self.storage.head / ranks,
            kv: batch * context * self.kv_bytes(),
            activations: batch * layers * hidden * BF16 * VECTORS,
            num_experts,
        }
    }

    /// Operations of one token of a prompt on one rank, without those of attention over other tokens.
    pub(super) fn linear_flops(&self) -> f64 {
        let moe = self.text().moe.as_ref().map_or(0.0, |moe| {
            let router = (moe.num_experts * self.text().hidden_size) as f64;
            self.moe_layers() * (moe.num_experts_per_tok as f64 * self.expert_weights(moe) + router)
        });
        let dense = (self.layers() - self.moe_layers()) * self.dense_weights();
        2.0 * (self.layers() * self.attention_weights() + moe + dense) / self.ranks as f64
    }

    /// Operations of attention of one token over `context` tokens, on one rank.
    pub(super) fn attention_flops(&self, context: f64) -> f64 {
        let t = self.text();
        4.0 * context * (t.num_attention_heads * t.head_dim) as f64 * self.layers() / self.ranks as f64
    }

    /// Weights that one rank holds, in bytes, without the vision encoder.
    pub(super) fn weight_bytes(&self) -> f64 {
        let ranks = self.ranks as f64;
        let moe = self.text().moe.as_ref().map_or(0.0, |moe| {
            let experts = moe.num_experts as f64 * self.expert_weights(moe) * self.storage.weight / ranks;
            self.moe_layers() * (experts + (moe.num_experts * self.text().hidden_size) as f64 * BF16)
        });
        let dense = (self.layers() - self.moe_layers()) * self.dense_weights() * self.storage.weight / ranks;
        let attention = self.layers() * self.attention_weights() * self.storage.weight / ranks;
        let tables = if self.config.tie_word_embeddings { 0.0 } else { self.head_weights() * BF16 / ranks };
        moe + dense + attention + tables + self.head_weights() * self.storage.head / ranks
    }

    /// Weights of the vision encoder in bytes; every rank has all of them.
    pub(super) fn vision_bytes(&self) -> f64 {
        let Some(v) = &self.config.vision else { return 0.0 };
        let (hidden, inner) = (v.hidden_size as f64, v.intermediate_size as f64);
        let merged = hidden * (v.spatial_merge_size * v.spatial_merge_size) as f64;
        let mergers = (1 + v.deepstack_visual_indexes.len()) as f64;
        let blocks = v.depth as f64 * (4.0 * hidden * hidden + 2.0 * hidden * inner);
        BF16 * (blocks + mergers * merged * (merged + v.out_hidden_size as f64))
    }

    /// All-reduces of a step, and the bytes of each for `rows` rows.
    pub(super) fn collectives(&self, rows: f64) -> (f64, f64) {
        let count = if self.ranks > 1 { 2.0 * self.layers() } else { 0.0 };
        (count, rows * self.text().hidden_size as f64 * BF16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str) -> ModelConfig {
        ModelConfig::published(spark_models::published(name).unwrap()).unwrap()
    }

    /// AWQ in groups of 128, a bf16 head, an FP8 cache without its scales.
    const AWQ: Storage = Storage { weight: 4.15625 / 8.0, head: 2.0, kv: 1.0 };

    #[test]
    fn the_235b_on_two_ranks_reads_what_was_worked_out_by_hand() {
        let config = config("qwen3-vl-235b-a22b");
        let roofline = Roofline { config: &config, storage: AWQ, ranks: 2 };
        let bytes = roofline.decode(4.0, 4096.0);
        let gigabytes = |bytes: f64| (bytes / 1e7).round() / 100.0;
        assert_eq!((bytes.num_experts * 10.0).round(), 291.0);
        assert_eq!(
            [bytes.attention, bytes.experts, bytes.router, bytes.head].map(gigabytes),
            [1.74, 13.42, 0.1, 0.62]
        );
        assert_eq!(gigabytes(bytes.kv), 0.79);
        assert_eq!(gigabytes(bytes.total()), 16.71);
        assert_eq!((roofline.weight_bytes() / 1e8).round(), 621.0);
        assert_eq!(roofline.collectives(4.0), (188.0, 32_768.0));
    }

    #[test]
    fn more_ranks_than_kv_heads_copy_them() {
        let config = config("qwen3-30b-a3b");
        let kv = |ranks| Roofline { config: &config, storage: AWQ, ranks }.kv_bytes();
        assert_eq!(kv(1), 2.0 * 48.0 * 4.0 * 128.0);
        assert_eq!((kv(4), kv(8)), (kv(1) / 4.0, kv(1) / 4.0));
    }

    #[test]
    fn a_dense_model_has_no_experts() {
        let config = config("qwen3-vl-8b");
        let bytes = Roofline { config: &config, storage: AWQ, ranks: 1 }.decode(1.0, 1.0);
        assert_eq!((bytes.experts, bytes.router, bytes.num_experts), (0.0, 0.0, 0.0));
        assert!(bytes.dense_mlp > bytes.attention);
    }
}
