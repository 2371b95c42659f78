//! The roofline of a model: bytes and operations of a step, from its configuration alone. No hardware. What of the weights a rank holds
//! is said by the rules that loading follows.

use std::collections::BTreeMap;

use spark_engine::{KvCacheDtype, ModelFiles, MoeParallel, Rank};
use spark_models::{MoeConfig, TextConfig};
use spark_weights::{HeldNumbers, held_numbers};

use super::fullest::fullest;
use crate::cli::inspect::kv_bytes_per_token;

/// How weights and KV cache are stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage {
    /// Bytes of a weight of the decoder's linear layers.
    pub(super) weight: f64,
    /// Bytes of a weight of the output head.
    pub(super) head: f64,
    /// Of the KV cache.
    pub(super) kv: KvCacheDtype,
}

/// What a decode step reads, on the rank that reads most.
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
    /// Distinct experts of a layer, of all ranks together.
    pub(super) num_experts: f64,
}

impl DecodeBytes {
    pub(super) fn total(&self) -> f64 {
        self.attention + self.experts + self.dense_mlp + self.router + self.head + self.kv + self.activations
    }
}

/// A model over a number of ranks: rank 0, which holds what each holds and what only one of them has.
#[derive(Debug)]
pub(super) struct Roofline<'a> {
    text: &'a TextConfig,
    storage: Storage,
    pub(super) ranks: usize,
    /// By the part of the model.
    held: BTreeMap<&'static str, HeldNumbers>,
    has_lm_head: bool,
    /// Bytes of K and V of one token in all layers.
    pub(super) kv_bytes: f64,
}

/// Vectors of the hidden size that a layer reads and writes beside its weights, about: residual, norms, products.
const VECTORS: f64 = 12.0;
/// Bytes of a number in bf16.
const BF16: f64 = 2.0;
/// Bytes of a number of a norm, a bias or a table.
const F32: f64 = 4.0;

impl<'a> Roofline<'a> {
    /// # Errors
    /// The model cannot be split over so many ranks.
    pub(super) fn new(files: &'a ModelFiles, storage: Storage, ranks: usize) -> anyhow::Result<Self> {
        files.config.check_ranks(ranks)?;
        let rank = Rank::new(0, ranks).unwrap_or(Rank::SINGLE);
        Ok(Self {
            text: &files.config.text,
            storage,
            ranks,
            held: held_numbers(&files.specs, rank)?,
            has_lm_head: files.has_lm_head,
            kv_bytes: kv_bytes_per_token(&files.config, storage.kv, rank)? as f64,
        })
    }

    fn held(&self, part: &str) -> HeldNumbers {
        self.held.get(part).copied().unwrap_or_default()
    }

    /// Weights of this rank in the matrices of a part of the model.
    fn weights(&self, part: &str) -> f64 {
        self.held(part).matrices as f64
    }

    fn layers(&self) -> f64 {
        self.text.num_hidden_layers as f64
    }

    /// Weights of the matrix that makes logits.
    fn head_weights(&self) -> f64 {
        self.weights(if self.has_lm_head { "lm_head" } else { "embedding" })
    }

    /// Experts of a layer that `tokens` tokens hit, if each chooses evenly and by itself. Real tokens choose more alike.
    fn distinct_experts(moe: &MoeConfig, tokens: f64) -> f64 {
        let missed = 1.0 - moe.num_experts_per_tok as f64 / moe.num_experts as f64;
        moe.num_experts as f64 * (1.0 - missed.powf(tokens))
    }

    /// Which share of what it holds of experts a rank reads where `hit` of a layer are hit. Of whole experts: the rank that holds most of
    /// these, for which the others wait.
    fn share_of_experts(&self, moe: &MoeConfig, hit: f64) -> f64 {
        match moe.parallel {
            MoeParallel::Tp => hit / moe.num_experts as f64,
            MoeParallel::Ep => {
                let each = moe.num_experts / self.ranks;
                fullest(each, self.ranks, hit) / each as f64
            }
        }
    }

    /// What a rank reads to decode one token of each of `batch` sequences of `context` tokens.
    pub(super) fn decode(&self, batch: f64, context: f64) -> DecodeBytes {
        let weight = self.storage.weight;
        let (num_experts, share) = match &self.text.moe {
            Some(moe) => {
                let hit = Self::distinct_experts(moe, batch);
                (hit, self.share_of_experts(moe, hit))
            }
            None => (0.0, 0.0),
        };
        DecodeBytes {
            attention: self.weights("attention") * weight,
            experts: self.weights("experts") * weight * share,
            dense_mlp: self.weights("mlp") * weight,
            router: self.weights("router") * BF16,
            head: self.head_weights() * self.storage.head,
            kv: batch * context * self.kv_bytes,
            activations: batch * self.layers() * self.text.hidden_size as f64 * BF16 * VECTORS,
            num_experts,
        }
    }

    /// Operations of one token of a prompt on one rank, without those of attention over other tokens. The tokens of a prompt are so many
    /// that ranks with whole experts have about as many of them.
    pub(super) fn linear_flops(&self) -> f64 {
        let chosen = self.text.moe.as_ref().map_or(0.0, |moe| {
            self.weights("experts") * moe.num_experts_per_tok as f64 / moe.num_experts as f64
        });
        2.0 * (self.weights("attention") + chosen + self.weights("router") + self.weights("mlp"))
    }

    /// Operations of attention of one token over `context` tokens, on one rank.
    pub(super) fn attention_flops(&self, context: f64) -> f64 {
        let width = (self.text.num_attention_heads * self.text.head_dim) as f64;
        4.0 * context * width * self.layers() / self.ranks as f64
    }

    /// Weights that a rank holds, in bytes, without the vision encoder.
    pub(super) fn weight_bytes(&self) -> f64 {
        let parts = self.held.iter().filter(|(part, _)| **part != "vision");
        let parts =
            parts.map(|(part, held)| held.matrices as f64 * self.bytes_of(part) + held.floats as f64 * F32);
        // Embeddings that are also the head stay as they are beside one in FP8.
        let second = !self.has_lm_head && self.storage.head < BF16;
        let head = if second { self.head_weights() * self.storage.head } else { 0.0 };
        parts.sum::<f64>() + head
    }

    /// Bytes of a weight in the matrices of a part.
    fn bytes_of(&self, part: &str) -> f64 {
        match part {
            "attention" | "experts" | "mlp" => self.storage.weight,
            "lm_head" => self.storage.head,
            _ => BF16,
        }
    }

    /// Weights of the vision encoder that a rank holds, in bytes.
    pub(super) fn vision_bytes(&self) -> f64 {
        let HeldNumbers { matrices, floats } = self.held("vision");
        matrices as f64 * BF16 + floats as f64 * F32
    }

    /// All-reduces of a step, and the bytes of each for `rows` rows.
    pub(super) fn collectives(&self, rows: f64) -> (f64, f64) {
        let count = if self.ranks > 1 { 2.0 * self.layers() } else { 0.0 };
        (count, rows * self.text.hidden_size as f64 * BF16)
    }
}

#[cfg(test)]
mod tests {
    use spark_engine::EncoderSplit;

    use super::*;

    fn model(name: &str) -> ModelFiles {
        ModelFiles::open_config(name, None, None).unwrap()
    }

    /// AWQ in groups of 128, a bf16 head, an FP8 cache.
    const AWQ: Storage = Storage { weight: 4.15625 / 8.0, head: 2.0, kv: KvCacheDtype::Fp8 };

    #[test]
    fn the_235b_on_two_ranks_reads_what_was_worked_out_by_hand() {
        let model = model("qwen3-vl-235b-a22b");
        let roofline = Roofline::new(&model, AWQ, 2).unwrap();
        let bytes = roofline.decode(4.0, 4096.0);
        let gigabytes = |bytes: f64| (bytes / 1e7).round() / 100.0;
        assert_eq!((bytes.num_experts * 10.0).round(), 291.0);
        assert_eq!(
            [bytes.attention, bytes.experts, bytes.router, bytes.head].map(gigabytes),
            [1.74, 13.42, 0.1, 0.62]
        );
        // 0.79 for the numbers, and the scales.
        assert_eq!(gigabytes(bytes.kv), 0.8);
        assert_eq!(gigabytes(bytes.total()), 16.72);
        assert_eq!((roofline.weight_bytes() / 1e8).round(), 621.0);
        assert_eq!(roofline.collectives(4.0), (188.0, 32_768.0));
    }

    #[test]
    fn whole_experts_are_as_many_bytes_but_more_of_them_are_read() {
        let sliced = model("qwen3-vl-235b-a22b");
        let whole = model("qwen3-vl-235b-a22b").shared(MoeParallel::Ep, EncoderSplit::Data).unwrap();
        for (ranks, expected) in [(1, [1.0, 1.0, 1.0]), (2, [1.26, 1.13, 1.05])] {
            let [sliced, whole] = [&sliced, &whole].map(|model| Roofline::new(model, AWQ, ranks).unwrap());
            assert_eq!(sliced.held, whole.held);
            assert_eq!(sliced.linear_flops(), whole.linear_flops());
            for (batch, expected) in [1.0, 4.0, 16.0].into_iter().zip(expected) {
                let [sliced, whole] = [&sliced, &whole].map(|roofline| roofline.decode(batch, 1.0));
                assert_eq!((whole.experts / sliced.experts * 100.0).round() / 100.0, expected, "{batch}");
                assert_eq!(DecodeBytes { experts: sliced.experts, ..whole }, sliced);
            }
        }
    }

    #[test]
    fn an_encoder_whose_weights_are_split_leaves_room() {
        let whole = model("qwen3-vl-30b-a3b");
        let split = model("qwen3-vl-30b-a3b").shared(MoeParallel::Tp, EncoderSplit::Weights).unwrap();
        let bytes = |model: &ModelFiles| Roofline::new(model, AWQ, 2).unwrap().vision_bytes();
        let ratio = bytes(&split) / bytes(&whole);
        assert!((0.5..0.52).contains(&ratio), "norms, positions and patches are on both: {ratio}");
    }

    #[test]
    fn more_ranks_than_kv_heads_copy_them() {
        let model = model("qwen3-30b-a3b");
        let kv = |ranks| Roofline::new(&model, AWQ, ranks).unwrap().kv_bytes;
        assert_eq!((kv(4), kv(8)), (kv(1) / 4.0, kv(1) / 4.0));
    }

    #[test]
    fn a_dense_model_has_no_experts() {
        let model = model("qwen3-vl-8b");
        let bytes = Roofline::new(&model, AWQ, 1).unwrap().decode(1.0, 1.0);
        assert_eq!((bytes.experts, bytes.router, bytes.num_experts), (0.0, 0.0, 0.0));
        assert!(bytes.dense_mlp > bytes.attention);
    }
}
