//! The answers of one model fixture: `oracle.json` and `oracle.safetensors` as plain structs.
//!
//! Keys and shapes are listed in `tests/fixtures/README.md`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;

use crate::fixtures::json_file;
use crate::{Divergence, Error, Result, Tensors, first_divergence, model_dir};

/// What transformers computed in float32 for one checkpoint.
#[derive(Debug, Clone)]
pub struct Oracle {
    /// `moe_vl`, `dense_vl`, `text_moe` or `text_dense`.
    pub family: String,
    /// Quantisation scheme, or the storage type of a plain checkpoint.
    pub scheme: String,
    /// Smallest top-two margin of any greedy step of any case.
    pub min_margin: f32,
    /// Cases by name: `text`, `chat`, `image0` ...
    pub cases: BTreeMap<String, Case>,
}

/// One conversation and what the model answers.
#[derive(Debug, Clone)]
pub struct Case {
    /// Its name, the first part of its tensor names.
    pub name: String,
    /// The conversation in the form of a chat request; images are names in `media/`.
    pub messages: serde_json::Value,
    /// Images of the conversation in order, as names for [`crate::media_path`].
    pub media: Vec<String>,
    /// Prompt with image placeholders expanded.
    pub prompt_ids: Vec<u32>,
    /// Position of every prompt token: temporal, height, width. Each `[num_prompt_tokens]`.
    pub positions: [Vec<i32>; 3],
    /// Position of the next token minus the number of tokens so far.
    pub rope_delta: i64,
    /// `[t, h, w]` of every image, in patches.
    pub grid_thw: Vec<[u32; 3]>,
    /// What greedy sampling chooses, stop tokens ignored.
    pub greedy_ids: Vec<u32>,
    /// Log-probability of the best minus that of the second token, per greedy step.
    pub margins: Vec<f32>,
    /// Step at which a stop token would have ended the run.
    pub eos_at: Option<usize>,
    /// The best tokens of every greedy step.
    pub steps: Vec<RankedStep>,
    tensors: Arc<Tensors>,
}

/// The best tokens of one step, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct RankedStep {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Natural logarithms of their probabilities over the whole vocabulary.
    pub logprobs: Vec<f32>,
}

#[derive(Deserialize)]
struct OracleFile {
    family: String,
    scheme: String,
    min_margin: f32,
    cases: BTreeMap<String, CaseFile>,
}

#[derive(Deserialize)]
struct CaseFile {
    messages: serde_json::Value,
    media: Vec<String>,
    prompt_ids: Vec<u32>,
    rope_delta: i64,
    grid_thw: Vec<[u32; 3]>,
    greedy_ids: Vec<u32>,
    margins: Vec<f32>,
    eos_at: Option<usize>,
}

impl Oracle {
    /// Reads the oracle of one model fixture.
    ///
    /// # Errors
    /// Any [`Error`]: the files are missing, not readable, or contradict each other.
    pub fn load(model: &str) -> Result<Self> {
        let path = model_dir(model).join("oracle.json");
        let file: OracleFile = json_file(&path)?;
        let tensors = Arc::new(Tensors::open(&path.with_file_name("oracle.safetensors"))?);
        let mut cases = BTreeMap::new();
        for (name, case) in file.cases {
            let case = Case::new(&name, case, &tensors).map_err(|e| match e {
                Error::Inconsistent { case, rule, .. } => {
                    Error::Inconsistent { path: path.clone(), case, rule }
                }
                other => other,
            })?;
            cases.insert(name, case);
        }
        Ok(Self { family: file.family, scheme: file.scheme, min_margin: file.min_margin, cases })
    }
}

impl Case {
    fn new(name: &str, file: CaseFile, tensors: &Arc<Tensors>) -> Result<Self> {
        let rows = |key: &str| tensors.i32(&format!("{name}/{key}"));
        let broken = |rule: &str| Error::Inconsistent {
            path: std::path::PathBuf::new(),
            case: name.to_owned(),
            rule: rule.to_owned(),
        };
        let (positions, shape) = rows("position_ids")?;
        if shape != [3, file.prompt_ids.len()] {
            return Err(broken("position_ids are [3, number of prompt ids]"));
        }
        let axis = |i: usize| positions[i * shape[1]..(i + 1) * shape[1]].to_vec();
        let steps = ranked_steps(name, tensors)?;
        let same = steps.iter().map(|s| s.ids.first()).eq(file.greedy_ids.iter().map(Some));
        if !same || file.margins.len() != steps.len() {
            return Err(broken("greedy_ids are the best token of every step, with one margin each"));
        }
        Ok(Self {
            name: name.to_owned(),
            messages: file.messages,
            media: file.media,
            prompt_ids: file.prompt_ids,
            positions: [axis(0), axis(1), axis(2)],
            rope_delta: file.rope_delta,
            grid_thw: file.grid_thw,
            greedy_ids: file.greedy_ids,
            margins: file.margins,
            eos_at: file.eos_at,
            steps,
            tensors: Arc::clone(tensors),
        })
    }

    /// A tensor of this case, such as `layer0_out`, with its shape.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] when this case does not have it, [`Error::Dtype`] when it is not a float tensor.
    pub fn tensor(&self, name: &str) -> Result<(&[f32], &[usize])> {
        self.tensors.f32(&format!("{}/{name}", self.name))
    }

    /// Whether this case has the tensor.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains(&format!("{}/{name}", self.name))
    }

    /// Applies the equality rule to a greedy run (see [`first_divergence`]).
    ///
    /// # Errors
    /// The [`Divergence`], when the run differs where it must not.
    pub fn check_greedy(&self, ids: &[u32], tolerance: f32) -> std::result::Result<usize, Divergence> {
        first_divergence(ids, &self.greedy_ids, &self.margins, tolerance)
    }
}

fn ranked_steps(case: &str, tensors: &Tensors) -> Result<Vec<RankedStep>> {
    let (ids, shape) = tensors.i32(&format!("{case}/top_ids"))?;
    let (logprobs, _) = tensors.f32(&format!("{case}/top_logprobs"))?;
    let width = shape.last().copied().unwrap_or(1).max(1);
    let rows = ids.chunks(width).zip(logprobs.chunks(width));
    Ok(rows
        .map(|(ids, logprobs)| RankedStep {
            ids: ids.iter().map(|&id| id.cast_unsigned()).collect(),
            logprobs: logprobs.to_vec(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_names;

    #[test]
    fn every_oracle_reads_and_agrees_with_itself() {
        for model in model_names("").unwrap() {
            let oracle = Oracle::load(&model).unwrap();
            for (name, case) in &oracle.cases {
                let at = format!("{model}/{name}");
                assert_eq!(case.greedy_ids.len(), 40, "{at}");
                assert_eq!(case.media.len(), case.grid_thw.len(), "{at}");
                assert!(case.margins.iter().all(|&m| m >= oracle.min_margin - 1e-6), "{at}");
                let (logits, shape) = case.tensor("logits").unwrap();
                let last = &logits[logits.len() - shape[1]..];
                let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
                assert_eq!(u32::try_from(best).unwrap(), case.greedy_ids[0], "{at}");
                let next = *case.positions.iter().flatten().max().unwrap() + 1;
                assert_eq!(i64::from(next), case.prompt_ids.len() as i64 + case.rope_delta, "{at}");
            }
            assert!(oracle.cases["text"].has("layer0_out"), "{model}");
        }
    }

    #[test]
    fn near_ties_were_avoided() {
        for model in model_names("").unwrap() {
            assert!(Oracle::load(&model).unwrap().min_margin > 5e-3, "{model}");
        }
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let oracle = Oracle::load("moe_vl_bf16").unwrap();
        let error = oracle.cases["text"].tensor("layer99_out").unwrap_err().to_string();
        assert!(error.contains("text/layer99_out") && error.contains("text/layer0_"), "{error}");
        assert!(matches!(Oracle::load("absent"), Err(Error::Io { .. })));
    }
}
