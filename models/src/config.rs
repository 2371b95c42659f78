//! `config.json` in all its dialects: the release form of transformers 4.57 and the re-saved form of transformers 5.
//!
//! Field names are those of the file. Every size is read, none is assumed; a missing `rope_theta` is an error because
//! the library default is not the value that any of these models was trained with.

use serde_json::Value;

use crate::{
    Error, Result,
    fields::Fields,
    ranks::MoeParallel,
    rope::{RopeConfig, parse_rope},
};

/// A whole model.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// `qwen3_vl_moe`, `qwen3_vl`, `qwen3_moe` or `qwen3`.
    pub model_type: String,
    /// The language model.
    pub text: TextConfig,
    /// The vision encoder; `None` for text-only models.
    pub vision: Option<VisionConfig>,
    /// Placeholder of an image embedding.
    pub image_token_id: Option<u32>,
    /// Placeholder of a video embedding.
    pub video_token_id: Option<u32>,
    /// The top-level flag: embeddings double as output head.
    pub tie_word_embeddings: bool,
    /// Tokens that end a sequence: `generation_config.json`'s list, else the configuration's.
    pub eos_token_ids: Vec<u32>,
}

/// The decoder.
#[derive(Debug, Clone)]
pub struct TextConfig {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside a dense MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// KV heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// RMSNorm epsilon.
    pub rms_norm_eps: f32,
    /// Longest sequence that the rotary embedding was made for.
    pub max_position_embeddings: usize,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Experts; `None` for a dense model.
    pub moe: Option<MoeConfig>,
}

/// Mixture of experts.
#[derive(Debug, Clone)]
pub struct MoeConfig {
    /// Routed experts (`num_experts`, or `num_local_experts` in re-saved files).
    pub num_experts: usize,
    /// Experts per token.
    pub num_experts_per_tok: usize,
    /// Width inside an expert.
    pub moe_intermediate_size: usize,
    /// Divide the chosen weights by their sum.
    pub norm_topk_prob: bool,
    /// Every how many layers experts are used.
    pub decoder_sparse_step: usize,
    /// Layers that stay dense.
    pub mlp_only_layers: Vec<usize>,
    /// How ranks share the experts: nothing of the file, see [`ModelConfig::share_experts`].
    pub parallel: MoeParallel,
}

impl TextConfig {
    /// Experts of layer `layer`, or `None` if it has a dense MLP.
    pub fn moe_at(&self, layer: usize) -> Option<&MoeConfig> {
        self.moe.as_ref().filter(|moe| {
            !moe.mlp_only_layers.contains(&layer) && (layer + 1).is_multiple_of(moe.decoder_sparse_step)
        })
    }
}

/// The vision encoder.
#[derive(Debug, Clone)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Heads.
    pub num_heads: usize,
    /// Width of the language model.
    pub out_hidden_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Frames of a patch.
    pub temporal_patch_size: usize,
    /// Side of a merge block in patches.
    pub spatial_merge_size: usize,
    /// Channels, 3.
    pub in_channels: usize,
    /// Entries of the (square) position table.
    pub num_position_embeddings: usize,
    /// Blocks whose output also enters the decoder.
    pub deepstack_visual_indexes: Vec<usize>,
    /// What ranks split of it. Not of the checkpoint: [`EncoderSplit::Data`] unless whoever runs the model says otherwise.
    pub split: EncoderSplit,
}

impl VisionConfig {
    /// Into how many parts `world` ranks split its weights: 1 where each has all of them.
    pub fn parts(&self, world: usize) -> usize {
        match self.split {
            EncoderSplit::Data => 1,
            EncoderSplit::Weights => world,
        }
    }
}

/// What ranks of a group split of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EncoderSplit {
    /// Its media: every rank has all weights and encodes some of them.
    #[default]
    Data,
    /// Its weights, heads and features as those of the decoder: all ranks encode all media together.
    Weights,
}

impl ModelConfig {
    /// Reads `config.json` and, for the end-of-sequence tokens, `generation_config.json`.
    ///
    /// # Errors
    /// Names the field that is missing, of the wrong type or inconsistent.
    pub fn parse(config: &Value, generation_config: Option<&Value>) -> Result<Self> {
        let root = Fields { value: config, path: "" };
        let model_type = root.string("model_type")?;
        let (moe, multimodal) = match model_type.as_str() {
            "qwen3_vl_moe" => (true, true),
            "qwen3_vl" => (false, true),
            "qwen3_moe" => (true, false),
            "qwen3" => (false, false),
            _ => return Err(Error::Architecture(model_type)),
        };
        let text_fields = if multimodal { root.child("text_config", "text_config.")? } else { root };
        // The language model of a multimodal checkpoint always renormalises: its modelling code ignores the flag.
        let text = parse_text(&text_fields, moe, multimodal)?;
        let vision = multimodal
            .then(|| parse_vision(&root.child("vision_config", "vision_config.")?, &text))
            .transpose()?;
        let eos_token_ids = eos_token_ids(&[generation_config, Some(config), Some(text_fields.value)])?;
        Ok(Self {
            text,
            vision,
            image_token_id: multimodal.then(|| root.token("image_token_id")).transpose()?,
            video_token_id: multimodal.then(|| root.token("video_token_id")).transpose()?,
            tie_word_embeddings: root.flag("tie_word_embeddings", false)?,
            eos_token_ids,
            model_type,
        })
    }

    /// One of the [`published`](crate::published) shapes.
    ///
    /// # Errors
    /// `text` is not JSON, or as for [`ModelConfig::parse`].
    pub fn published(text: &str) -> Result<Self> {
        let value = serde_json::from_str(text).map_err(|e| Error::config("", e.to_string()))?;
        Self::parse(&value, None)
    }

    /// Visual token embeddings that enter the decoder in each of its first layers.
    pub fn num_deepstack(&self) -> usize {
        self.vision.as_ref().map_or(0, |vision| vision.deepstack_visual_indexes.len())
    }
}

/// Bounds on what is built one by one; several times those of any published model.
const MAX_LAYERS: usize = 1024;
const MAX_EXPERTS: usize = 8192;

fn parse_text(f: &Fields<'_>, moe: bool, always_renormalize: bool) -> Result<TextConfig> {
    f.expect_str("hidden_act", "silu")?;
    if f.flag("attention_bias", false)? {
        return Err(f.error("attention_bias", "biases in attention are not supported"));
    }
    if f.flag("use_sliding_window", false)? {
        return Err(f.error("use_sliding_window", "sliding windows are not supported"));
    }
    let num_attention_heads = f.size("num_attention_heads")?;
    let hidden_size = f.size("hidden_size")?;
    let head_dim = f.size_or("head_dim", hidden_size / num_attention_heads)?;
    let config = TextConfig {
        vocab_size: f.size("vocab_size")?,
        hidden_size,
        intermediate_size: f.size_or("intermediate_size", 0)?,
        num_hidden_layers: f.small_size("num_hidden_layers", MAX_LAYERS)?,
        num_attention_heads,
        num_key_value_heads: f.size_or("num_key_value_heads", num_attention_heads)?,
        head_dim,
        rms_norm_eps: f.float("rms_norm_eps")?,
        max_position_embeddings: f.size("max_position_embeddings")?,
        rope: parse_rope(f, head_dim)?,
        moe: moe.then(|| parse_moe(f, always_renormalize)).transpose()?,
    };
    if !config.head_dim.is_multiple_of(2) {
        return Err(f.error("head_dim", "must be even for the rotary embedding"));
    }
    if config.num_key_value_heads == 0
        || !config.num_attention_heads.is_multiple_of(config.num_key_value_heads)
    {
        return Err(f.error("num_key_value_heads", "must divide num_attention_heads"));
    }
    let needs_dense = (0..config.num_hidden_layers).any(|layer| config.moe_at(layer).is_none());
    if needs_dense && config.intermediate_size == 0 {
        return Err(f.error("intermediate_size", "missing, but at least one layer has a dense MLP"));
    }
    Ok(config)
}

fn parse_moe(f: &Fields<'_>, always_renormalize: bool) -> Result<MoeConfig> {
    let num_experts = match f.get("num_experts") {
        Some(_) => f.small_size("num_experts", MAX_EXPERTS)?,
        None => f.small_size("num_local_experts", MAX_EXPERTS)?,
    };
    let moe = MoeConfig {
        num_experts,
        num_experts_per_tok: f.size("num_experts_per_tok")?,
        moe_intermediate_size: f.size("moe_intermediate_size")?,
        norm_topk_prob: always_renormalize || f.flag("norm_topk_prob", false)?,
        decoder_sparse_step: f.size_or("decoder_sparse_step", 1)?,
        mlp_only_layers: f.sizes("mlp_only_layers")?,
        parallel: MoeParallel::default(),
    };
    if moe.num_experts_per_tok > num_experts {
        return Err(
            f.error("num_experts_per_tok", format!("must be between 1 and num_experts ({num_experts})"))
        );
    }
    Ok(moe)
}

fn parse_vision(f: &Fields<'_>, text: &TextConfig) -> Result<VisionConfig> {
    f.expect_str("hidden_act", "gelu_pytorch_tanh")?;
    let vision = VisionConfig {
        depth: f.small_size("depth", MAX_LAYERS)?,
        hidden_size: f.size("hidden_size")?,
        intermediate_size: f.size("intermediate_size")?,
        num_heads: f.size("num_heads")?,
        out_hidden_size: f.size("out_hidden_size")?,
        patch_size: f.small_size("patch_size", 256)?,
        temporal_patch_size: f.small_size("temporal_patch_size", 16)?,
        spatial_merge_size: f.small_size("spatial_merge_size", 16)?,
        in_channels: f.size_or("in_channels", 3)?,
        num_position_embeddings: f.size("num_position_embeddings")?,
        deepstack_visual_indexes: f.sizes("deepstack_visual_indexes")?,
        split: EncoderSplit::default(),
    };
    if !vision.hidden_size.is_multiple_of(4 * vision.num_heads) {
        return Err(f.error(
            "num_heads",
            "hidden_size must be a multiple of 4 * num_heads for the 2-D rotary embedding",
        ));
    }
    if vision.out_hidden_size != text.hidden_size {
        return Err(
            f.error("out_hidden_size", format!("must equal text_config.hidden_size ({})", text.hidden_size))
        );
    }
    if vision.in_channels != 3 {
        return Err(f.error("in_channels", "only 3 channels are supported"));
    }
    let side = vision.num_position_embeddings.isqrt();
    if side * side != vision.num_position_embeddings {
        return Err(f.error("num_position_embeddings", "must be a square number"));
    }
    let levels = &vision.deepstack_visual_indexes;
    let in_order = levels.is_sorted_by(|a, b| a < b) && levels.iter().all(|&i| i < vision.depth);
    if levels.len() > text.num_hidden_layers || !in_order {
        let problem = "must name blocks of the encoder in order, at most one per decoder layer";
        return Err(f.error("deepstack_visual_indexes", problem));
    }
    Ok(vision)
}

/// The first source that has `eos_token_id`, as one id or a list.
fn eos_token_ids(sources: &[Option<&Value>]) -> Result<Vec<u32>> {
    for source in sources.iter().flatten() {
        match source.get("eos_token_id") {
            None | Some(Value::Null) => {}
            Some(Value::Array(ids)) => return ids.iter().map(eos_id).collect(),
            Some(id) => return Ok(vec![eos_id(id)?]),
        }
    }
    Err(Error::config("eos_token_id", "found neither in generation_config.json nor in config.json"))
}

fn eos_id(value: &Value) -> Result<u32> {
    value
        .as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| Error::config("eos_token_id", format!("{value} is not a token id")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The release form of a small multimodal MoE.
    fn release() -> Value {
        json!({
            "model_type": "qwen3_vl_moe", "image_token_id": 270, "video_token_id": 271, "tie_word_embeddings": false,
            "text_config": {
                "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": 288,
                "max_position_embeddings": 4096, "rope_theta": 5_000_000, "eos_token_id": 258,
                "rope_scaling": {"rope_type": "default", "mrope_interleaved": true, "mrope_section": [6, 5, 5]},
                "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": true,
            },
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0], "hidden_act": "gelu_pytorch_tanh",
            },
        })
    }

    fn parse(config: &Value) -> Result<ModelConfig> {
        ModelConfig::parse(config, None)
    }

    #[test]
    fn both_dialects_mean_the_same() {
        let released = parse(&release()).unwrap();
        let mut resaved = release();
        let text = resaved["text_config"].as_object_mut().unwrap();
        let mut rope = text.remove("rope_scaling").unwrap();
        rope["rope_theta"] = text.remove("rope_theta").unwrap();
        text.insert("rope_parameters".into(), rope);
        let experts = text.remove("num_experts").unwrap();
        text.insert("num_local_experts".into(), experts);
        text.insert("sliding_window".into(), Value::Null);
        text.insert("tie_word_embeddings".into(), true.into());
        let resaved = parse(&resaved).unwrap();
        assert_eq!(resaved.text.rope, released.text.rope);
        assert_eq!(resaved.text.moe_at(0).unwrap().num_experts, 8);
        assert!(!resaved.tie_word_embeddings, "the top-level flag wins");
    }

    #[test]
    fn end_tokens_come_from_the_generation_config_first() {
        let generation = json!({"eos_token_id": [258, 256]});
        assert_eq!(ModelConfig::parse(&release(), Some(&generation)).unwrap().eos_token_ids, [258, 256]);
        assert_eq!(parse(&release()).unwrap().eos_token_ids, [258]);
    }

    #[test]
    fn layers_are_sparse_as_the_file_says() {
        let mut config = release();
        config["text_config"]["mlp_only_layers"] = json!([1]);
        let text = parse(&config).unwrap().text;
        assert!(text.moe_at(0).is_some() && text.moe_at(1).is_none());
        config["text_config"]["decoder_sparse_step"] = json!(2);
        assert!(parse(&config).unwrap().text.moe_at(0).is_none());
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_name() {
        let cases: [(&str, &str, Value); 8] = [
            ("/text_config/rope_theta", "rope_theta", Value::Null),
            ("/text_config/num_experts_per_tok", "num_experts_per_tok", json!(9)),
            ("/text_config/num_key_value_heads", "num_key_value_heads", json!(3)),
            ("/text_config/hidden_size", "hidden_size", json!(-1)),
            ("/text_config/vocab_size", "vocab_size", json!(1e18)),
            ("/text_config/rope_scaling/mrope_section", "mrope_section", json!([1, 2, 3])),
            ("/vision_config/deepstack_visual_indexes", "deepstack_visual_indexes", json!([5])),
            ("/vision_config/num_position_embeddings", "num_position_embeddings", json!(65)),
        ];
        for (place, field, value) in cases {
            let mut config = release();
            *config.pointer_mut(place).unwrap() = value;
            let error = parse(&config).unwrap_err().to_string();
            assert!(error.contains(field), "{place}: {error}");
        }
        let error = parse(&json!({"model_type": "llama"})).unwrap_err().to_string();
        assert!(error.contains("llama") && error.contains("qwen3_vl_moe"), "{error}");
    }
}
