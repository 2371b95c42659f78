//! Qwen3-VL, MoE and dense, and the text-only Qwen3-MoE and Qwen3: the same decoder with or without an encoder.
//!
//! Mirrors `modeling_qwen3_vl_moe.py` and `modeling_qwen3_vl.py` of transformers. Names on disk that differ between
//! tools are brought to the names used here by `spark-weights`.

use spark_backend::{Backend, VisualRows};
use spark_weights::{ParamSpec, Params, Shard};

use crate::{
    Result,
    config::ModelConfig,
    decoder::{self, DecoderLayer},
    head::{Head, LM_HEAD},
    param::{Loader, Specs},
    vision::{self, VisionEncoder},
};

const LANGUAGE_MODEL: &str = "model.language_model";
const VISUAL: &str = "model.visual";

/// The network.
pub struct Qwen3Vl<B: Backend> {
    config: ModelConfig,
    embed_tokens: B::Linear, // [vocab, hidden], rows of this rank
    layers: Vec<DecoderLayer<B>>,
    norm: B::Tensor,            // [1, hidden]
    lm_head: Option<B::Linear>, // [vocab, hidden]; None: the embeddings are the head
    visual: Option<VisionEncoder<B>>,
}

/// A medium as the decoder sees it.
pub struct Encoded<B: Backend> {
    /// `[num_tokens, hidden]`, in place of the placeholders' embeddings.
    pub embeddings: B::Tensor,
    /// One `[num_tokens, hidden]` per deepstack level, added after the first decoder layers.
    pub deepstack: Vec<B::Tensor>,
}

impl ModelConfig {
    /// Every parameter of the model. `has_lm_head` says whether the checkpoint brings its own output head: it then
    /// counts whatever the tie flag says.
    pub fn specs(&self, has_lm_head: bool) -> Vec<ParamSpec> {
        let mut out = Vec::new();
        let (vocab, hidden) = (self.text.vocab_size, self.text.hidden_size);
        out.push(ParamSpec::linear(format!("{LANGUAGE_MODEL}.embed_tokens"), vocab, hidden, Shard::Vocab));
        for layer in 0..self.text.num_hidden_layers {
            let prefix = format!("{LANGUAGE_MODEL}.layers.{layer}");
            decoder::specs(&self.text, layer, &mut Specs { prefix: &prefix, out: &mut out });
        }
        Specs { prefix: LANGUAGE_MODEL, out: &mut out }.vector("norm.weight", [1, hidden]);
        if has_lm_head {
            out.push(ParamSpec::linear(LM_HEAD, vocab, hidden, Shard::Vocab));
        }
        if let Some(vision) = &self.vision {
            vision::specs(vision, &mut Specs { prefix: VISUAL, out: &mut out });
        }
        out
    }
}

impl<B: Backend> Qwen3Vl<B> {
    /// Takes all parameters, which are the shards of the backend's rank, to the backend. `head` says what the output head is: of a checkpoint
    /// as it is, whether it has its own. `mean_std` are the image processor's, per channel.
    ///
    /// # Errors
    /// A parameter is missing, the backend cannot take it, the head is quantised and another format is wanted, or the backend's group has a number of ranks that the model cannot be split
    /// over.
    pub fn load(
        config: ModelConfig,
        head: impl Into<Head>,
        mean_std: ([f32; 3], [f32; 3]),
        params: &mut Params,
        backend: &B,
    ) -> Result<Self> {
        config.check_ranks(backend.rank().world())?;
        let norm = Loader { prefix: LANGUAGE_MODEL, params, backend }.vector("norm.weight")?;
        let embeddings = params.linear(&format!("{LANGUAGE_MODEL}.embed_tokens"))?;
        let lm_head = head.into().weight(params, &embeddings)?;
        let embed_tokens = backend.linear_weight(embeddings)?;
        let lm_head = lm_head.map(|head| backend.linear_weight(head)).transpose()?;
        let layers = (0..config.text.num_hidden_layers)
            .map(|i| {
                DecoderLayer::load(&config.text, i, &format!("{LANGUAGE_MODEL}.layers.{i}"), params, backend)
            })
            .collect::<Result<_>>()?;
        let visual = match &config.vision {
            Some(vision) => Some(VisionEncoder::load(vision, mean_std, VISUAL, params, backend)?),
            None => None,
        };
        Ok(Self { config, embed_tokens, layers, norm, lm_head, visual })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The closure of a step: embeds the step's tokens, puts in the `visual` rows, runs all layers, samples.
    ///
    /// `tap` sees `layer{i}_in` (the residual stream that enters layer `i`, so what layer `i - 1` and its deepstack
    /// level made of it), `norm_in` (what leaves the last layer), all `[num_tokens, hidden]`, and `logits`; pass a no-op
    /// outside tests.
    ///
    /// # Errors
    /// Backend failure.
    pub fn forward(
        &self,
        b: &B,
        visual: &[VisualRows<'_, B::Tensor>],
        tap: &mut dyn FnMut(&str, &B::Tensor),
    ) -> spark_backend::Result<()> {
        let mut residual = b.embed(&self.embed_tokens, self.config.text.vocab_size)?; // [num_tokens, hidden]
        for v in visual {
            b.set_rows(&mut residual, v.token_row, v.embeddings, v.source_row, v.rows)?;
        }
        let mut partial = None;
        for (i, layer) in self.layers.iter().enumerate() {
            partial = Some(layer.forward(b, &self.config.text, i, &mut residual, partial, tap)?);
            for v in visual {
                if let Some(level) = v.deepstack.get(i) {
                    b.add_rows(&mut residual, v.token_row, level, v.source_row, v.rows)?;
                }
            }
        }
        let x = b.reduce_norm(partial, &mut residual, &self.norm, self.config.text.rms_norm_eps)?;
        tap("norm_in", &residual);
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        let logits = b.logits(&x, head, self.config.text.vocab_size)?;
        tap("logits", &logits);
        b.sample(&logits)
    }

    /// Encodes one medium (see [`spark_backend::Backend::patches`] for `pixels`), `grid` in patches.
    ///
    /// # Errors
    /// The model has no encoder, or the backend failed.
    pub fn encode(
        &self,
        b: &B,
        pixels: &[u8],
        grid: [usize; 3],
        tap: &mut dyn FnMut(&str, &B::Tensor),
    ) -> spark_backend::Result<Encoded<B>> {
        let one = self.encode_all(b, &[pixels], grid, tap)?.pop();
        Ok(one.expect("as many are encoded as were asked for"))
    }

    /// Encodes media of equal `grid` in one pass. A pass over many small media takes little longer than over one.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_all(
        &self,
        b: &B,
        pixels: &[&[u8]],
        grid: [usize; 3],
        tap: &mut dyn FnMut(&str, &B::Tensor),
    ) -> spark_backend::Result<Vec<Encoded<B>>> {
        let visual = self.visual.as_ref().ok_or_else(|| spark_backend::Error::Unsupported {
            op: "encode",
            reason: "the model is text-only: it has no encoder for images or videos".into(),
        })?;
        visual.forward(b, pixels, grid, tap)
    }
}
