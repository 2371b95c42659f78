//! What a model consists of on disk: checkpoint, configuration, tokenizer, template, image processor. No weights yet.

use serde_json::json;
use spark_backend::Dtype;
use spark_models::{EncoderSplit, ModelConfig, MoeParallel, published};
use spark_server::SamplingDefaults;
use spark_weights::{Checkpoint, OpenOptions, ParamSpec};

use crate::{Error, Result};

/// Names of compute dtypes as flags spell them.
pub const DTYPES: [&str; 3] = ["auto", "bfloat16", "float32"];

/// Format of the decoder's linear layers when they are made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// 4-bit integers with zero points, in groups of 128.
    Awq,
    /// 4-bit floats in groups of 16.
    Nvfp4,
    /// 8-bit floats in blocks of 128 x 128.
    Fp8,
    /// bfloat16.
    None,
}

impl Quantization {
    /// As a `quantization_config` says it.
    fn config(self) -> serde_json::Value {
        match self {
            Self::Awq => json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true}),
            Self::Nvfp4 => json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
            Self::Fp8 => json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
            Self::None => serde_json::Value::Null,
        }
    }
}

/// An opened model.
pub struct ModelFiles {
    /// Files and tensors.
    pub checkpoint: Checkpoint,
    /// Parsed configuration.
    pub config: ModelConfig,
    /// Every parameter.
    pub specs: Vec<ParamSpec>,
    /// Whether the output head is a tensor of its own.
    pub has_lm_head: bool,
}

impl ModelFiles {
    /// Opens a folder, or a Hugging Face id that is in the local cache.
    ///
    /// # Errors
    /// When there is no such model, or its files contradict each other.
    pub fn open(model: &str, revision: Option<String>) -> Result<Self> {
        Self::new(Checkpoint::open(model, &OpenOptions { revision, ..OpenOptions::default() })?)
    }

    /// Opens the configuration alone, for dummy weights: the folder needs no safetensors files. `model` may also name
    /// a published shape (`qwen3-vl-30b-a3b`, in any case), which needs no folder at all. `quantization` takes the place of
    /// the configuration's own.
    ///
    /// # Errors
    /// As for [`ModelFiles::open`].
    pub fn open_config(
        model: &str,
        revision: Option<String>,
        quantization: Option<Quantization>,
    ) -> Result<Self> {
        let checkpoint = match published(&model.to_lowercase()) {
            Some(text) => {
                let config = serde_json::from_str(text).map_err(|e| Error::option("MODEL", e.to_string()))?;
                Checkpoint::of_config(config, model.into())
            }
            None => Checkpoint::open_config(model, &OpenOptions { revision, ..OpenOptions::default() })?,
        };
        let Some(quantization) = quantization else { return Self::new(checkpoint) };
        let mut config = checkpoint.config().clone();
        config["quantization_config"] = quantization.config();
        Self::new(Checkpoint::of_config(config, checkpoint.dir().to_owned()))
    }

    fn new(checkpoint: Checkpoint) -> Result<Self> {
        let config = ModelConfig::parse(checkpoint.config(), checkpoint.generation_config())?;
        let has_lm_head = match checkpoint.tensors().next() {
            Some(_) => checkpoint.has_module("lm_head"),
            None => !config.tie_word_embeddings,
        };
        if !has_lm_head && !config.tie_word_embeddings {
            tracing::warn!(
                "the checkpoint has no lm_head although tie_word_embeddings is false: using the embeddings"
            );
        }
        let specs = config.specs(has_lm_head);
        Ok(Self { checkpoint, config, specs, has_lm_head })
    }

    /// The same model, of which ranks share the experts as `experts` says and split what `encoder` says of the encoder. Without an
    /// encoder there is nothing to split.
    ///
    /// # Errors
    /// Whole experts of a model that has none.
    pub fn shared(mut self, experts: MoeParallel, encoder: EncoderSplit) -> Result<Self> {
        self.config
            .share_experts(experts)
            .map_err(|error| Error::option("--moe-parallel", format!("ep: {error}")))?;
        match &mut self.config.vision {
            Some(vision) => vision.split = encoder,
            None if encoder == EncoderSplit::Weights => {
                tracing::warn!("no effect: --mm-encoder-tp-mode weights: the model has no encoder");
            }
            None => {}
        }
        self.specs = self.config.specs(self.has_lm_head);
        Ok(self)
    }

    /// The compute dtype that `auto` means: float32 for a float32 checkpoint, else bfloat16. Half precision
    /// checkpoints are computed in bfloat16 too: their range overflows on long prompts.
    pub fn auto_dtype(&self) -> Dtype {
        let config = self.checkpoint.config();
        let text = config.get("text_config").unwrap_or(config);
        let named = |value: &serde_json::Value| {
            value.get("dtype").or(value.get("torch_dtype")).and_then(|v| v.as_str()).map(str::to_owned)
        };
        match named(text).or_else(|| named(config)).as_deref() {
            Some("float32" | "torch.float32") => Dtype::F32,
            _ => Dtype::Bf16,
        }
    }
}

/// Sampling defaults that `generation_config.json` asks for (`--generation-config auto`).
pub fn generation_defaults(checkpoint: &Checkpoint) -> Result<SamplingDefaults> {
    let mut defaults = SamplingDefaults::neutral();
    let Some(file) = checkpoint.generation_config() else { return Ok(defaults) };
    let number = |name: &str| -> Result<Option<f64>> {
        match file.get(name) {
            None | Some(serde_json::Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                Error::option("generation_config.json", format!("{name}: {value} is not a number"))
            }),
        }
    };
    if let Some(value) = number("repetition_penalty")? {
        defaults.repetition_penalty = value as f32;
    }
    defaults.max_tokens = number("max_new_tokens")?.map(|n| n.max(1.0) as usize);
    // transformers ignores the sampling values of a greedy configuration; so do we.
    if file.get("do_sample").and_then(serde_json::Value::as_bool) == Some(false) {
        defaults.temperature = 0.0;
        return Ok(defaults);
    }
    if let Some(value) = number("temperature")? {
        defaults.temperature = value as f32;
    }
    if let Some(value) = number("top_p")? {
        defaults.top_p = value as f32;
    }
    if let Some(value) = number("top_k")? {
        defaults.top_k = value.max(0.0) as u32;
    }
    if let Some(value) = number("min_p")? {
        defaults.min_p = value as f32;
    }
    Ok(defaults)
}
