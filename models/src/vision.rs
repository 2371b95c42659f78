//! The Qwen3-VL vision encoder with its deepstack mergers.
//!
//! Mirrors `Qwen3VLVisionModel` of transformers. One call encodes media of one grid; attention never crosses frames.
//!
//! Where ranks split its weights, the first of each two layers gives a rank its heads or features, and the second a partial sum
//! of all of the width: two sums a block and one a merger. What is between the pairs every rank computes for itself.

use spark_backend::{Activation, Backend, VisionSpec};
use spark_weights::{Params, Shard};

use crate::{
    Result,
    config::{EncoderSplit, VisionConfig},
    param::{Loader, Specs},
    qwen3_vl::Encoded,
};

/// Epsilon of every LayerNorm of the encoder; a constant of the modelling code, not of the configuration.
const LAYER_NORM_EPS: f32 = 1e-6;

/// The encoder.
pub(crate) struct VisionEncoder<B: Backend> {
    patch_embed: B::Linear, // [hidden, 3 * temporal * patch * patch]
    pos_embed: B::Tensor,   // [side * side, hidden]
    blocks: Vec<VisionBlock<B>>,
    merger: PatchMerger<B>,
    deepstack_mergers: Vec<PatchMerger<B>>,
    deepstack_indexes: Vec<usize>,
    merged: usize, // merge^2 * hidden
    spec: VisionSpec,
}

/// Heads and features of this rank.
struct VisionBlock<B: Backend> {
    norm1: LayerNorm<B>,
    qkv: B::Linear,  // [3 * heads, hidden]
    proj: Second<B>, // [hidden, heads]
    norm2: LayerNorm<B>,
    linear_fc1: B::Linear, // [features, hidden]
    linear_fc2: Second<B>, // [hidden, features]
}

/// Four patches become one token: `[num_patches, hidden]` to `[num_patches / merge^2, out_hidden]`.
struct PatchMerger<B: Backend> {
    norm: LayerNorm<B>, // over hidden before the shuffle, or over merge^2 * hidden after it (deepstack)
    linear_fc1: B::Linear,
    linear_fc2: Second<B>,
}

/// The second of two layers, of whose inputs a rank may have a part.
struct Second<B: Backend> {
    weight: B::Linear,
    /// Whether its outputs are a partial sum.
    is_partial: bool,
}

struct LayerNorm<B: Backend> {
    weight: B::Tensor,
    bias: B::Tensor,
}

/// States the parameters of the encoder.
pub(crate) fn specs(config: &VisionConfig, specs: &mut Specs<'_>) {
    let hidden = config.hidden_size;
    let merged = hidden * config.spatial_merge_size * config.spatial_merge_size;
    let patch = config.in_channels * config.temporal_patch_size * config.patch_size * config.patch_size;
    let [qkv, first, second] = match config.split {
        EncoderSplit::Data => [Shard::Replicated; 3],
        EncoderSplit::Weights => [Shard::Stacked { count: 3 }, Shard::Rows, Shard::Columns],
    };
    let norm = |specs: &mut Specs<'_>, name: String, len| {
        specs.vector(&format!("{name}.weight"), [1, len]);
        specs.vector(&format!("{name}.bias"), [1, len]);
    };
    let merger = |specs: &mut Specs<'_>, name: String, norm_len| {
        norm(specs, format!("{name}.norm"), norm_len);
        specs.linear_with_bias(&format!("{name}.linear_fc1"), merged, merged, first);
        specs.linear_with_bias(&format!("{name}.linear_fc2"), config.out_hidden_size, merged, second);
    };
    specs.linear_with_bias("patch_embed.proj", hidden, patch, Shard::Replicated);
    specs.vector("pos_embed.weight", [config.num_position_embeddings, hidden]);
    for i in 0..config.depth {
        norm(specs, format!("blocks.{i}.norm1"), hidden);
        specs.linear_with_bias(&format!("blocks.{i}.attn.qkv"), 3 * hidden, hidden, qkv);
        specs.linear_with_bias(&format!("blocks.{i}.attn.proj"), hidden, hidden, second);
        norm(specs, format!("blocks.{i}.norm2"), hidden);
        specs.linear_with_bias(
            &format!("blocks.{i}.mlp.linear_fc1"),
            config.intermediate_size,
            hidden,
            first,
        );
        specs.linear_with_bias(
            &format!("blocks.{i}.mlp.linear_fc2"),
            hidden,
            config.intermediate_size,
            second,
        );
    }
    merger(specs, "merger".into(), hidden);
    for i in 0..config.deepstack_visual_indexes.len() {
        merger(specs, format!("deepstack_merger_list.{i}"), merged);
    }
}

impl<B: Backend> VisionEncoder<B> {
    pub(crate) fn load(
        config: &VisionConfig,
        mean_std: ([f32; 3], [f32; 3]),
        prefix: &str,
        params: &mut Params,
        backend: &B,
    ) -> Result<Self> {
        let parts = config.parts(backend.rank().world());
        let mut w = Loader { prefix, params, backend };
        let is_partial = parts > 1;
        let blocks = (0..config.depth).map(|i| VisionBlock::load(&format!("blocks.{i}"), is_partial, &mut w));
        let blocks = blocks.collect::<Result<_>>()?;
        let mergers = (0..config.deepstack_visual_indexes.len())
            .map(|i| PatchMerger::load(&format!("deepstack_merger_list.{i}"), is_partial, &mut w));
        Ok(Self {
            blocks,
            deepstack_mergers: mergers.collect::<Result<_>>()?,
            patch_embed: w.linear("patch_embed.proj")?,
            pos_embed: w.vector("pos_embed.weight")?,
            merger: PatchMerger::load("merger", is_partial, &mut w)?,
            deepstack_indexes: config.deepstack_visual_indexes.clone(),
            merged: config.hidden_size * config.spatial_merge_size * config.spatial_merge_size,
            spec: VisionSpec {
                num_heads: config.num_heads / parts,
                hidden_size: config.hidden_size / parts,
                patch_size: config.patch_size,
                temporal_patch_size: config.temporal_patch_size,
                merge_size: config.spatial_merge_size,
                image_mean: mean_std.0,
                image_std: mean_std.1,
            },
        })
    }

    /// Encodes media of `grid` `[frames, rows, columns]` patches each, by their pixels: for each the embeddings and one tensor a
    /// deepstack level, each `[num_tokens, out_hidden]`, to be kept. `tap` sees named intermediate results of all of them. Media are
    /// frames to the encoder, which looks at each frame alone.
    pub(crate) fn forward(
        &self,
        b: &B,
        pixels: &[&[u8]],
        grid: [usize; 3],
        tap: &mut dyn FnMut(&str, &B::Tensor),
    ) -> spark_backend::Result<Vec<Encoded<B>>> {
        let count = pixels.len();
        let num_tokens = grid.iter().product::<usize>() / (self.spec.merge_size * self.spec.merge_size);
        let grid = [grid[0] * count, grid[1], grid[2]];
        let merged = self.merged;
        let mut x = {
            let patches = b.patches(pixels, grid.iter().product(), &self.spec)?;
            tap("pixel_values", &patches);
            b.linear(&patches, &self.patch_embed)?
        };
        tap("patch_embed", &x);
        b.add_position(&mut x, &self.pos_embed, grid, &self.spec)?;
        let mut deepstack: Vec<Vec<B::Tensor>> = (0..count).map(|_| Vec::new()).collect();
        for (i, block) in self.blocks.iter().enumerate() {
            block.forward(b, &mut x, grid, &self.spec)?;
            tap(&format!("vblock{i}_out"), &x);
            if let Some(level) = self.deepstack_indexes.iter().position(|&index| index == i) {
                let merger = &self.deepstack_mergers[level];
                let normed = merger.norm.forward(b, &b.reshape(&x, merged)?)?;
                let rows = merger.merge(b, &normed)?;
                tap(&format!("deepstack{level}"), &rows);
                for (i, levels) in deepstack.iter_mut().enumerate() {
                    levels.push(b.keep_rows(&rows, i * num_tokens, num_tokens)?);
                }
            }
        }
        let normed = self.merger.norm.forward(b, &x)?;
        let embeddings = self.merger.merge(b, &b.reshape(&normed, merged)?)?;
        tap("merger", &embeddings);
        let encoded = deepstack.into_iter().enumerate().map(|(i, deepstack)| {
            let embeddings = b.keep_rows(&embeddings, i * num_tokens, num_tokens)?;
            Ok(Encoded { embeddings, deepstack })
        });
        encoded.collect()
    }
}

impl<B: Backend> VisionBlock<B> {
    fn load(name: &str, is_partial: bool, w: &mut Loader<'_, B>) -> Result<Self> {
        Ok(Self {
            norm1: LayerNorm::load(&format!("{name}.norm1"), w)?,
            qkv: w.linear(&format!("{name}.attn.qkv"))?,
            proj: Second::load(&format!("{name}.attn.proj"), is_partial, w)?,
            norm2: LayerNorm::load(&format!("{name}.norm2"), w)?,
            linear_fc1: w.linear(&format!("{name}.mlp.linear_fc1"))?,
            linear_fc2: Second::load(&format!("{name}.mlp.linear_fc2"), is_partial, w)?,
        })
    }

    fn forward(
        &self,
        b: &B,
        x: &mut B::Tensor,
        grid: [usize; 3],
        spec: &VisionSpec,
    ) -> spark_backend::Result<()> {
        self.attend(b, x, grid, spec)?;
        let normed = self.norm2.forward(b, x)?;
        let h = b.linear_activate(&normed, &self.linear_fc1, Activation::GeluTanh)?;
        // Its memory is free for what the second layer needs.
        drop(normed);
        self.linear_fc2.add_to(b, x, &h)
    }

    /// The first half: what it needs is given back before the second begins.
    fn attend(
        &self,
        b: &B,
        x: &mut B::Tensor,
        grid: [usize; 3],
        spec: &VisionSpec,
    ) -> spark_backend::Result<()> {
        let qkv = b.linear(&self.norm1.forward(b, x)?, &self.qkv)?;
        let attended = b.vision_attend(&qkv, grid, spec)?;
        self.proj.add_to(b, x, &attended)
    }
}

impl<B: Backend> PatchMerger<B> {
    fn load(name: &str, is_partial: bool, w: &mut Loader<'_, B>) -> Result<Self> {
        Ok(Self {
            norm: LayerNorm::load(&format!("{name}.norm"), w)?,
            linear_fc1: w.linear(&format!("{name}.linear_fc1"))?,
            linear_fc2: Second::load(&format!("{name}.linear_fc2"), is_partial, w)?,
        })
    }

    fn merge(&self, b: &B, x: &B::Tensor) -> spark_backend::Result<B::Tensor> {
        let h = b.linear_activate(x, &self.linear_fc1, Activation::GeluErf)?;
        self.linear_fc2.forward(b, &h)
    }
}

impl<B: Backend> Second<B> {
    fn load(name: &str, is_partial: bool, w: &mut Loader<'_, B>) -> Result<Self> {
        Ok(Self { weight: w.linear(name)?, is_partial })
    }

    fn forward(&self, b: &B, h: &B::Tensor) -> spark_backend::Result<B::Tensor> {
        let mut out = b.linear(h, &self.weight)?;
        if self.is_partial {
            b.all_reduce(&mut out)?;
        }
        Ok(out)
    }

    /// Adds it to `x`, in one operation where it is whole.
    fn add_to(&self, b: &B, x: &mut B::Tensor, h: &B::Tensor) -> spark_backend::Result<()> {
        match self.is_partial {
            true => b.add(x, &self.forward(b, h)?),
            false => b.linear_add(x, h, &self.weight),
        }
    }
}

impl<B: Backend> LayerNorm<B> {
    fn load(name: &str, w: &mut Loader<'_, B>) -> Result<Self> {
        Ok(Self { weight: w.vector(&format!("{name}.weight"))?, bias: w.vector(&format!("{name}.bias"))? })
    }

    fn forward(&self, b: &B, x: &B::Tensor) -> spark_backend::Result<B::Tensor> {
        b.layer_norm(x, &self.weight, &self.bias, LAYER_NORM_EPS)
    }
}
