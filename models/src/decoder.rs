//! The Qwen3 decoder layer, MoE or dense: six backend calls.
//!
//! Mirrors `Qwen3VLMoeTextDecoderLayer` and `Qwen3DecoderLayer` of transformers. The residual stream is replicated;
//! what a layer returns is a partial sum that the next `reduce_norm` reduces and adds.

use std::ops::Range;

use spark_backend::{AttentionSpec, Backend, Rank, RouterSpec};
use spark_weights::{Params, Shard};

use crate::{
    Result,
    config::TextConfig,
    param::{Loader, Specs},
};

/// One decoder layer.
pub(crate) struct DecoderLayer<B: Backend> {
    input_layernorm: B::Tensor, // [1, hidden]
    self_attn: Attention<B>,
    post_attention_layernorm: B::Tensor, // [1, hidden]
    mlp: Mlp<B>,
}

struct Attention<B: Backend> {
    qkv_proj: B::Linear, // [(num_heads + 2 * num_kv_heads) * head_dim, hidden], heads of this rank
    q_norm: B::Tensor,   // [1, head_dim]
    k_norm: B::Tensor,   // [1, head_dim]
    o_proj: B::Linear,   // [hidden, num_heads * head_dim]
}

enum Mlp<B: Backend> {
    Moe { gate: B::Linear, experts: B::Experts, held: Range<usize>, top_k: usize, renormalize: bool },
    Dense { gate_up_proj: B::Linear, down_proj: B::Linear },
}

/// States the parameters of layer `layer`.
pub(crate) fn specs(config: &TextConfig, layer: usize, specs: &mut Specs<'_>) {
    let (hidden, head_dim) = (config.hidden_size, config.head_dim);
    let (q, kv) = (config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim);
    let shard = Shard::Qkv { num_kv_heads: config.num_key_value_heads };
    specs.vector("input_layernorm.weight", [1, hidden]);
    specs.fused("self_attn", &[("q_proj", q), ("k_proj", kv), ("v_proj", kv)], hidden, shard);
    specs.vector("self_attn.q_norm.weight", [1, head_dim]);
    specs.vector("self_attn.k_norm.weight", [1, head_dim]);
    specs.linear("self_attn.o_proj", hidden, q, Shard::Columns);
    specs.vector("post_attention_layernorm.weight", [1, hidden]);
    match config.moe_at(layer) {
        Some(moe) => {
            specs.linear("mlp.gate", moe.num_experts, hidden, Shard::Replicated);
            specs.experts("mlp.experts", moe, hidden);
        }
        None => {
            let inter = config.intermediate_size;
            specs.fused("mlp", &[("gate_proj", inter), ("up_proj", inter)], hidden, Shard::Rows);
            specs.linear("mlp.down_proj", hidden, inter, Shard::Columns);
        }
    }
}

impl<B: Backend> DecoderLayer<B> {
    pub(crate) fn load(
        config: &TextConfig,
        layer: usize,
        prefix: &str,
        params: &mut Params,
        backend: &B,
    ) -> Result<Self> {
        let mut w = Loader { prefix, params, backend };
        let input_layernorm = w.vector("input_layernorm.weight")?;
        let self_attn = Attention {
            qkv_proj: w.linear("self_attn")?,
            q_norm: w.vector("self_attn.q_norm.weight")?,
            k_norm: w.vector("self_attn.k_norm.weight")?,
            o_proj: w.linear("self_attn.o_proj")?,
        };
        let post_attention_layernorm = w.vector("post_attention_layernorm.weight")?;
        let mlp = match config.moe_at(layer) {
            Some(moe) => Mlp::Moe {
                gate: w.linear("mlp.gate")?,
                experts: w.experts("mlp.experts")?,
                held: moe.experts_of(backend.rank()),
                top_k: moe.num_experts_per_tok,
                renormalize: moe.norm_topk_prob,
            },
            None => Mlp::Dense { gate_up_proj: w.linear("mlp")?, down_proj: w.linear("mlp.down_proj")? },
        };
        Ok(Self { input_layernorm, self_attn, post_attention_layernorm, mlp })
    }

    /// Adds `partial` (the previous layer's output) to `residual`, runs the layer, returns its own partial output.
    /// `residual`, `partial` and the result are `[num_tokens, hidden]`.
    pub(crate) fn forward(
        &self,
        b: &B,
        config: &TextConfig,
        layer: usize,
        residual: &mut B::Tensor,
        partial: Option<B::Tensor>,
        tap: &mut dyn FnMut(&str, &B::Tensor),
    ) -> spark_backend::Result<B::Tensor> {
        let eps = config.rms_norm_eps;
        let partial = {
            let x = b.reduce_norm(partial, residual, &self.input_layernorm, eps)?;
            tap(&format!("layer{layer}_in"), residual);
            Some(self.self_attn.forward(b, config, layer, &x)?)
        };
        let norm = &self.post_attention_layernorm;
        Ok(match &self.mlp {
            Mlp::Moe { gate, experts, held, top_k, renormalize } => {
                let (top_k, renormalize) = (*top_k, *renormalize);
                let router = RouterSpec { router: gate, top_k, renormalize, experts: held.clone() };
                let (x, routing) = b.reduce_norm_route(partial, residual, norm, eps, &router)?;
                b.moe_mlp(&x, &routing, experts)?
            }
            Mlp::Dense { gate_up_proj, down_proj } => {
                let x = b.reduce_norm(partial, residual, norm, eps)?;
                let gate_up = b.linear(&x, gate_up_proj)?;
                b.linear(&b.swiglu(&gate_up)?, down_proj)?
            }
        })
    }
}

impl<B: Backend> Attention<B> {
    /// `[num_tokens, hidden]` to the same. Everything in between is given back here: on a GPU it is the largest after the
    /// experts.
    fn forward(
        &self,
        b: &B,
        config: &TextConfig,
        layer: usize,
        x: &B::Tensor,
    ) -> spark_backend::Result<B::Tensor> {
        let qkv = b.linear(x, &self.qkv_proj)?;
        let attended = b.attend(&qkv, layer, &self.spec(config, b.rank()))?;
        b.linear(&attended, &self.o_proj)
    }

    fn spec<'a>(&'a self, config: &'a TextConfig, rank: Rank) -> AttentionSpec<'a, B> {
        AttentionSpec {
            q_norm: &self.q_norm,
            k_norm: &self.k_norm,
            eps: config.rms_norm_eps,
            num_heads: config.num_attention_heads / rank.world(),
            num_kv_heads: rank.kv_heads(config.num_key_value_heads).len(),
            head_dim: config.head_dim,
            inv_freq: &config.rope.inv_freq,
            rope_factor: config.rope.factor,
            mrope_section: config.rope.mrope_section,
        }
    }
}
