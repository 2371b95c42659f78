//! A step plan becomes tensors: inputs, encoder outputs, one pass of the model. Not policy: it does what the plan says.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use spark_api::{MediaHash, MediaItem};
use spark_backend::{
    Backend, Error, Result, SampledToken, SeqInput, StateSpec, StepInputs, StepOutput, TokenInput,
    TokenLogprob, VisualRows,
};
use spark_models::{Encoded, Qwen3Vl, RopeIndex};
use spark_scheduler::{PlanToken, PlannedSeq, SeqId, StepId, StepPlan};

use crate::{admission::Admission, pipeline::Steps};

/// Backend, model and the state that steps share. Every rank has one.
pub struct ModelRunner<B: Backend> {
    pub(crate) backend: B,
    pub(crate) model: Qwen3Vl<B>,
    block_size: usize,
    slots: Vec<Option<Occupant>>,
    pub(crate) encoder_cache: HashMap<MediaHash, Encoded<B>>,
    /// Launched and not collected, oldest first.
    in_flight: VecDeque<Launched>,
}

/// A step in flight: what is needed to read its output.
struct Launched {
    id: StepId,
    rows: Vec<LaunchedRows>,
}

/// The rows of one sequence in a step in flight.
struct LaunchedRows {
    seq: SeqId,
    slot: usize,
    /// Index in prompt and output of the first row.
    start: usize,
    num_rows: usize,
}

/// The sequence in a slot.
pub(crate) struct Occupant {
    rope: RopeIndex,
    pub(crate) media: Arc<[MediaItem]>,
    prompt_logprobs: Option<(Arc<[u32]>, usize)>,
}

/// A plan with what the runner does not know yet. The same on every rank.
#[derive(Serialize, Deserialize)]
pub(crate) struct StepWork {
    pub(crate) plan: StepPlan,
    pub(crate) admissions: Vec<Admission>,
    /// Slot and allowed tokens, one bit each.
    pub(crate) masks: Vec<(usize, Vec<u32>)>,
    /// Uploads that no sequence needs from this step on.
    pub(crate) forget: Vec<u64>,
}

/// What a step produced, by sequence.
pub(crate) struct StepResult {
    pub(crate) id: StepId,
    pub(crate) sampled: Vec<(SeqId, SampledToken)>,
    /// Sequence, index of the prompt token that is described, its log-probability and the alternatives.
    pub(crate) prompt_logprobs: Vec<(SeqId, usize, TokenLogprob, Vec<TokenLogprob>)>,
}

impl<B: Backend> ModelRunner<B> {
    /// Allocates KV pool and slots.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(mut backend: B, model: Qwen3Vl<B>, state: StateSpec) -> Result<Self> {
        backend.allocate_state(state)?;
        let slots = (0..state.num_slots).map(|_| None).collect();
        Ok(Self {
            backend,
            model,
            block_size: state.kv.block_size,
            slots,
            encoder_cache: HashMap::new(),
            in_flight: VecDeque::new(),
        })
    }

    /// Lets the backend get ready for steps. Once, before the first one.
    ///
    /// # Errors
    /// Device failure.
    pub fn prepare(&mut self) -> Result<()> {
        let model = &self.model;
        self.backend.prepare(&mut |b| model.forward(b, &[], &mut |_, _| {}))
    }

    fn admit(&mut self, admission: Admission) -> Result<()> {
        let Admission { slot, params, prompt_len, media, prompt_logprobs, .. } = admission;
        self.backend.admit(slot, params)?;
        let grids: Vec<_> = media.iter().map(|m| (m.offset, [m.grid.t, m.grid.h, m.grid.w])).collect();
        let merge_size = self.model.config().vision.as_ref().map_or(1, |vision| vision.spatial_merge_size);
        let rope = RopeIndex::new(prompt_len, &grids, merge_size);
        self.slots[slot] = Some(Occupant { rope, media, prompt_logprobs });
        Ok(())
    }

    pub(crate) fn occupant(&self, slot: usize) -> &Occupant {
        self.slots[slot]
            .as_ref()
            .expect("the scheduler admits a sequence to its slot before planning rows for it")
    }

    /// Pixels are needed until the last row of the last medium is computed; a sequence that comes back after a
    /// preemption brings them again.
    fn drop_pixels(&mut self, plan: &StepPlan) {
        for planned in &plan.seqs {
            if let Some(occupant) = &mut self.slots[planned.slot]
                && occupant
                    .media
                    .last()
                    .is_some_and(|last| last.offset + last.num_tokens <= planned.context_len)
            {
                occupant.media = Arc::new([]);
            }
        }
    }

    /// The inputs of `plan`, whose block tables move into them.
    fn inputs(&self, plan: &mut StepPlan) -> StepInputs {
        let mut inputs = StepInputs::default();
        inputs.tokens.reserve(plan.num_tokens);
        inputs.positions.reserve(plan.num_tokens);
        inputs.slot_mapping.reserve(plan.num_tokens);
        inputs.seqs.reserve(plan.seqs.len());
        for planned in &mut plan.seqs {
            let occupant = self.occupant(planned.slot);
            let query_start = inputs.tokens.len();
            for (i, token) in planned.tokens.iter().enumerate() {
                let index = planned.start + i;
                inputs.tokens.push(match token {
                    PlanToken::Known(id) => TokenInput::Known(*id),
                    PlanToken::Pending => TokenInput::Pending(planned.slot),
                });
                inputs.positions.push(occupant.rope.position(index));
                let block = u64::from(planned.block_table[index / self.block_size]);
                inputs.slot_mapping.push(block * self.block_size as u64 + (index % self.block_size) as u64);
            }
            inputs.seqs.push(SeqInput {
                slot: planned.slot,
                query_start,
                query_len: planned.tokens.len(),
                context_len: planned.context_len,
                block_table: std::mem::take(&mut planned.block_table),
            });
            push_logit_rows(&mut inputs, planned, occupant, query_start);
        }
        inputs
    }
}

impl<B: Backend> Steps for ModelRunner<B> {
    type Work = StepWork;
    type Output = StepResult;

    fn most_in_flight(&self) -> usize {
        self.backend.max_in_flight()
    }

    fn launch(&mut self, work: StepWork) -> Result<()> {
        let StepWork { mut plan, admissions, masks, .. } = work;
        for admission in admissions {
            self.admit(admission)?;
        }
        self.encode(&plan)?;
        let mut inputs = self.inputs(&mut plan);
        inputs.masks = masks;
        let visual = visual_rows::<B>(&self.encoder_cache, &plan);
        inputs.has_media = !visual.is_empty();
        let (model, visual) = (&self.model, visual.as_slice());
        self.backend.step(&inputs, &mut |b| model.forward(b, visual, &mut |_, _| {}))?;
        self.drop_pixels(&plan);
        let rows = plan.seqs.iter().map(|planned| LaunchedRows {
            seq: planned.seq,
            slot: planned.slot,
            start: planned.start,
            num_rows: planned.tokens.len(),
        });
        self.in_flight.push_back(Launched { id: plan.id, rows: rows.collect() });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepResult> {
        let output = self.backend.output()?;
        let step = self.in_flight.pop_front().expect("only what was launched is collected");
        step.result(output)
    }
}

impl Launched {
    /// Gives each row of `output` its sequence.
    fn result(&self, output: StepOutput) -> Result<StepResult> {
        let unknown = |what: &str, which: usize| Error::Device {
            op: "output",
            message: format!("{what} {which} is not of this step"),
        };
        let by_slot: HashMap<usize, SeqId> = self.rows.iter().map(|rows| (rows.slot, rows.seq)).collect();
        let sampled = output.sampled.into_iter().map(|token| {
            let seq = by_slot.get(&token.slot).ok_or_else(|| unknown("slot", token.slot))?;
            Ok((*seq, token))
        });
        let sampled = sampled.collect::<Result<_>>()?;
        let prompt_logprobs = output.prompt_logprobs.into_iter().map(|(row, target, top)| {
            let (seq, index) = self.token_at(row as usize).ok_or_else(|| unknown("row", row as usize))?;
            // A row describes the token after its own.
            Ok((seq, index + 1, target, top))
        });
        Ok(StepResult { id: self.id, sampled, prompt_logprobs: prompt_logprobs.collect::<Result<_>>()? })
    }

    /// The sequence that step row `row` belongs to, and the index of its token there.
    fn token_at(&self, row: usize) -> Option<(SeqId, usize)> {
        let mut first = 0;
        for rows in &self.rows {
            if row < first + rows.num_rows {
                return Some((rows.seq, rows.start + row - first));
            }
            first += rows.num_rows;
        }
        None
    }
}

/// The rows of encoded media that enter the step.
fn visual_rows<'a, B: Backend>(
    encoder_cache: &'a HashMap<MediaHash, Encoded<B>>,
    plan: &StepPlan,
) -> Vec<VisualRows<'a, B::Tensor>> {
    let mut rows = Vec::new();
    let mut query_start = 0;
    for planned in &plan.seqs {
        for media in &planned.media {
            let entry = &encoder_cache[&media.hash];
            rows.push(VisualRows {
                embeddings: &entry.embeddings,
                deepstack: &entry.deepstack,
                token_row: query_start + media.token_row,
                source_row: media.source_row,
                rows: media.rows,
            });
        }
        query_start += planned.tokens.len();
    }
    rows
}

/// The rows whose logits are needed: those that predict a prompt token (if asked for), and the one that is sampled.
fn push_logit_rows(inputs: &mut StepInputs, planned: &PlannedSeq, occupant: &Occupant, query_start: usize) {
    let mut push = |row: usize, slot, target| {
        inputs.logit_rows.push(row as u32);
        inputs.sample_slots.push(slot);
        inputs.prompt_targets.push(target);
    };
    if let Some((prompt, alternatives)) = &occupant.prompt_logprobs {
        for i in 0..planned.tokens.len() {
            if let Some(&target) = prompt.get(planned.start + i + 1) {
                push(query_start + i, None, Some((target, *alternatives)));
            }
        }
    }
    if planned.samples {
        push(query_start + planned.tokens.len() - 1, Some(planned.slot), None);
    }
}
