//! Runs the calibration prompts through the model in float32, one after the other, and gives what its linear layers saw.

use std::sync::{Arc, Mutex, PoisonError};

use spark_backend::{
    ActivationSpec, Backend, Dtype, KvDtype, KvSpec, SlotParams, StateSpec, StepInputs, VisualRows,
};
use spark_cpu::CpuBackend;
use spark_models::{ModelConfig, Qwen3Vl, RopeIndex};
use spark_weights::{Checkpoint, LoadOptions, Param, ParamKind, Params};

use crate::Progress;
use crate::error::{Error, Result};
use crate::recorder::{Recorder, Records};

/// One prompt to calibrate with.
#[derive(Debug, Clone)]
pub struct CalibrationPrompt {
    /// Token ids; placeholder runs are as long as their media need.
    pub ids: Vec<u32>,
    /// Media in the order of their placeholder runs.
    pub media: Vec<CalibrationMedium>,
}

/// A medium of a prompt.
#[derive(Debug, Clone)]
pub struct CalibrationMedium {
    /// Pixels as patch rows in merge-block order, `[num_patches, 3, frames, patch, patch]` u8.
    pub patches: Arc<[u8]>,
    /// Time, height and width in patches.
    pub grid: [usize; 3],
    /// Index of the first placeholder in the prompt.
    pub offset: usize,
}

/// Tokens of a KV block; only the prompt in work has any.
const BLOCK: usize = 32;

/// The model and its prompts' sizes.
pub(crate) struct Calibration<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) config: &'a ModelConfig,
    pub(crate) image_mean_std: ([f32; 3], [f32; 3]),
    pub(crate) progress: &'a (dyn Fn(Progress) + Sync),
}

impl Calibration<'_> {
    /// What the decoder's linear layers get when the model reads `prompts`.
    pub(crate) fn run(&self, prompts: &[CalibrationPrompt]) -> Result<Records> {
        for (index, prompt) in prompts.iter().enumerate() {
            self.check(prompt).map_err(|reason| Error::Prompt { index, reason })?;
        }
        let mut recorder = Recorder::new(CpuBackend::new(Dtype::F32, None)?);
        let model = self.load(&mut recorder)?;
        let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        recorder.allocate_state(self.state(longest))?;
        recorder.admit(0, SlotParams::greedy())?;
        for (index, prompt) in prompts.iter().enumerate() {
            self.read(&model, &mut recorder, prompt)?;
            (self.progress)(Progress::Calibrated { done: index + 1, total: prompts.len() });
        }
        Ok(recorder.into_records())
    }

    /// What makes a prompt impossible to run, checked before the model is loaded.
    fn check(&self, prompt: &CalibrationPrompt) -> std::result::Result<(), String> {
        let vocab = self.config.text.vocab_size;
        if prompt.ids.is_empty() {
            return Err("has no tokens".to_owned());
        }
        if let Some(id) = prompt.ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(format!("has the token {id}; the vocabulary has {vocab}"));
        }
        if prompt.media.is_empty() {
            return Ok(());
        }
        let Some(vision) = &self.config.vision else {
            return Err("has media, but the model is text-only".to_owned());
        };
        let merge = vision.spatial_merge_size;
        let mut end = 0;
        for CalibrationMedium { grid, offset, patches } in &prompt.media {
            let [_, h, w] = *grid;
            let patch_bytes = 3 * vision.patch_size * vision.patch_size;
            let num_patches = grid.iter().try_fold(1usize, |all, &side| all.checked_mul(side)).unwrap_or(0);
            let tokens = num_patches / (merge * merge);
            let whole = h.is_multiple_of(merge) && w.is_multiple_of(merge) && tokens > 0;
            let room = prompt.ids.len().checked_sub(*offset).is_some_and(|room| tokens <= room);
            if !whole || !room || *offset < end {
                return Err(format!(
                    "has a medium of {grid:?} patches at token {offset}, which does not fit its {} tokens",
                    prompt.ids.len()
                ));
            }
            if patches.is_empty() || !patches.len().is_multiple_of(num_patches * patch_bytes) {
                return Err(format!("has a medium of {grid:?} patches with {} bytes", patches.len()));
            }
            end = offset + tokens;
        }
        Ok(())
    }

    fn load(&self, recorder: &mut Recorder) -> Result<Qwen3Vl<Recorder>> {
        let has_lm_head = self.checkpoint.has_module("lm_head");
        let specs = self.config.specs(has_lm_head);
        let loaded: Mutex<Vec<(usize, Param)>> = Mutex::new(Vec::with_capacity(specs.len()));
        self.checkpoint.load_each(&specs, &LoadOptions::default(), &|index, param| {
            loaded.lock().unwrap_or_else(PoisonError::into_inner).push((index, param));
            Ok(())
        })?;
        let loaded = loaded.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (index, param) in &loaded {
            let spec = &specs[*index];
            let decoder = spec.name.contains(".layers.") && !spec.name.ends_with(".mlp.gate");
            if decoder && !matches!(spec.kind, ParamKind::Vector { .. }) {
                recorder.watch(&spec.name, param);
            }
        }
        let mut params =
            Params::new(loaded.into_iter().map(|(index, param)| (specs[index].name.clone(), param)))?;
        let model =
            Qwen3Vl::load(self.config.clone(), has_lm_head, self.image_mean_std, &mut params, recorder)?;
        params.finish()?;
        Ok(model)
    }

    fn state(&self, longest: usize) -> StateSpec {
        let text = &self.config.text;
        let kv = KvSpec {
            num_layers: text.num_hidden_layers,
            num_kv_heads: text.num_key_value_heads,
            head_dim: text.head_dim,
            block_size: BLOCK,
            num_blocks: longest.div_ceil(BLOCK),
            dtype: KvDtype::F32,
        };
        // The CPU backend takes memory for activations as it needs it.
        StateSpec {
            kv,
            num_slots: 1,
            max_num_tokens: longest,
            vocab_size: text.vocab_size,
            max_blocks_per_seq: kv.num_blocks,
            encoder_cache_bytes: 0,
            activations: ActivationSpec::default(),
        }
    }

    /// Prefills one prompt.
    fn read(
        &self,
        model: &Qwen3Vl<Recorder>,
        recorder: &mut Recorder,
        prompt: &CalibrationPrompt,
    ) -> Result<()> {
        let merge = self.config.vision.as_ref().map_or(1, |vision| vision.spatial_merge_size);
        let encoded = prompt
            .media
            .iter()
            .map(|medium| model.encode(recorder, &medium.patches, medium.grid, &mut |_, _| ()))
            .collect::<spark_backend::Result<Vec<_>>>()?;
        let visual: Vec<_> = prompt
            .media
            .iter()
            .zip(&encoded)
            .map(|(medium, encoded)| VisualRows {
                embeddings: &encoded.embeddings,
                deepstack: &encoded.deepstack,
                token_row: medium.offset,
                source_row: 0,
                rows: medium.grid.iter().product::<usize>() / (merge * merge),
            })
            .collect();
        recorder.step(&inputs(prompt, merge), &mut |b| model.forward(b, &visual, &mut |_, _| ()))?;
        recorder.output()?;
        Ok(())
    }
}

/// The whole prompt as one step.
fn inputs(prompt: &CalibrationPrompt, merge: usize) -> StepInputs {
    let n = prompt.ids.len();
    let media: Vec<_> = prompt.media.iter().map(|medium| (medium.offset, medium.grid)).collect();
    let rope = RopeIndex::new(n, &media, merge);
    let positions = (0..n).map(|i| rope.position(i)).collect();
    // Nothing is asked of the last token; one row keeps the head's shapes ordinary.
    StepInputs::whole_prompt(&prompt.ids, positions, BLOCK, vec![n as u32 - 1])
}

#[cfg(test)]
mod tests {
    use spark_testing::{Oracle, model_dir};
    use spark_weights::OpenOptions;

    use super::*;

    /// Records of the oracle's text prompts, and how many tokens they have.
    fn records(model: &str) -> (Records, ModelConfig, u64) {
        let dir = model_dir(model).display().to_string();
        let checkpoint = Checkpoint::open(&dir, &OpenOptions::default()).unwrap();
        let config = ModelConfig::parse(checkpoint.config(), checkpoint.generation_config()).unwrap();
        let oracle = Oracle::load(model).unwrap();
        let texts = oracle.cases.values().filter(|case| case.media.is_empty());
        let prompt = |ids: &Vec<u32>| CalibrationPrompt { ids: ids.clone(), media: Vec::new() };
        let prompts: Vec<_> = texts.map(|case| prompt(&case.prompt_ids)).collect();
        let calibration = Calibration {
            checkpoint: &checkpoint,
            config: &config,
            image_mean_std: ([0.5; 3], [0.5; 3]),
            progress: &|_| (),
        };
        let records = calibration.run(&prompts).unwrap();
        let num_tokens = prompts.iter().map(|prompt| prompt.ids.len() as u64).sum();
        (records, config, num_tokens)
    }

    #[test]
    fn every_linear_layer_sees_every_token() {
        for (model, per_layer) in [("dense_vl_bf16", 4), ("moe_vl_bf16", 3)] {
            let (records, config, num_tokens) = records(model);
            assert_eq!(records.len(), per_layer * config.text.num_hidden_layers);
            for (name, record) in &records {
                assert_eq!(record.all.seen, num_tokens, "{name}");
                let Some(moe) = config.text.moe.as_ref().filter(|_| name.ends_with("experts")) else {
                    assert!(record.experts.is_empty(), "{name}");
                    continue;
                };
                let routed: u64 = record.experts.iter().map(|expert| expert.seen).sum();
                assert_eq!(routed, num_tokens * moe.num_experts_per_tok as u64, "{name}");
                let weights: f32 = record.experts.iter().flat_map(|expert| &expert.weights).sum();
                assert!((weights / num_tokens as f32 - 1.0).abs() < 1e-4, "the weights of a row sum to 1");
            }
        }
    }

    #[test]
    fn the_first_layer_sees_its_normed_embeddings() {
        let (records, config, _) = records("dense_vl_bf16");
        let dir = model_dir("dense_vl_bf16").display().to_string();
        let checkpoint = Checkpoint::open(&dir, &OpenOptions::default()).unwrap();
        let tensor = |name: &str| -> Vec<f32> {
            let bytes = checkpoint.read_tensor(&format!("model.language_model.{name}.weight")).unwrap();
            bytes.chunks(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        };
        let (embeddings, norm) = (tensor("embed_tokens"), tensor("layers.0.input_layernorm"));
        let hidden = config.text.hidden_size;
        let token = Oracle::load("dense_vl_bf16").unwrap().cases["text"].prompt_ids[3] as usize;
        let x = &embeddings[token * hidden..][..hidden];
        let rms = (x.iter().map(|x| x * x).sum::<f32>() / hidden as f32 + 1e-6).sqrt();
        let want: Vec<f32> = x.iter().zip(&norm).map(|(x, norm)| x / rms * norm).collect();
        let seen = &records["model.language_model.layers.0.self_attn"].all.rows;
        let near = |row: &[f32]| row.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + b.abs()));
        assert!(seen.chunks(hidden).any(near), "the token's row is among what was seen");
    }
}
