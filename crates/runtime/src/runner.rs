//! A step plan becomes tensors: inputs, encoder outputs, one pass of the model. Not policy: it does what the plan says.

use std::{collections::HashMap, sync::Arc};

use spark_api::{MediaHash, MediaItem};
use spark_backend::{
    Backend, Result, SampledToken, SeqInput, StateSpec, StepInputs, TokenInput, TokenLogprob, VisualRows,
};
use spark_models::{Encoded, Qwen3Vl, RopeIndex};
use spark_scheduler::{PlanToken, PlannedSeq, SeqId, StepId, StepPlan};

use crate::admission::Admission;

/// Backend, model and the state that steps share. Every rank has one.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Qwen3Vl<B>,
    block_size: usize,
    slots: Vec<Option<Occupant>>,
    encoder_cache: HashMap<MediaHash, Encoded<B>>,
}

/// The sequence in a slot.
struct Occupant {
    rope: Arc<RopeIndex>,
    media: Arc<[MediaItem]>,
    prompt_logprobs: Option<(Arc<[u32]>, usize)>,
}

/// A plan with what the runner does not know yet.
pub(crate) struct StepWork {
    pub(crate) plan: StepPlan,
    pub(crate) admissions: Vec<Admission>,
    /// Slot and allowed tokens, one bit each.
    pub(crate) masks: Vec<(usize, Vec<u32>)>,
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
        Ok(Self { backend, model, block_size: state.kv.block_size, slots, encoder_cache: HashMap::new() })
    }

    /// Runs one step to its end.
    pub(crate) fn run(&mut self, work: StepWork) -> Result<StepResult> {
        let StepWork { plan, admissions, masks } = work;
        for admission in admissions {
            self.admit(admission)?;
        }
        self.encode(&plan)?;
        let mut inputs = self.inputs(&plan);
        inputs.masks = masks;
        let visual = visual_rows::<B>(&self.encoder_cache, &plan);
        let (model, visual) = (&self.model, visual.as_slice());
        self.backend.step(&inputs, &mut |b| model.forward(b, visual, &mut |_, _| {}))?;
        let output = self.backend.output()?;
        self.drop_pixels(&plan);
        let by_slot: HashMap<usize, SeqId> = plan.seqs.iter().map(|p| (p.slot, p.seq)).collect();
        let sampled = output.sampled.into_iter().map(|token| (by_slot[&token.slot], token)).collect();
        let prompt_logprobs = output.prompt_logprobs.into_iter().map(|(row, target, top)| {
            let planned = planned_at_row(&plan, row as usize);
            (planned.1.seq, planned.1.start + (row as usize - planned.0) + 1, target, top)
        });
        Ok(StepResult { id: plan.id, sampled, prompt_logprobs: prompt_logprobs.collect() })
    }

    fn admit(&mut self, admission: Admission) -> Result<()> {
        let Admission { slot, params, rope, media, prompt_logprobs } = admission;
        self.backend.admit(slot, params)?;
        self.slots[slot] = Some(Occupant { rope, media, prompt_logprobs });
        Ok(())
    }

    fn occupant(&self, slot: usize) -> &Occupant {
        self.slots[slot]
            .as_ref()
            .expect("the scheduler admits a sequence to its slot before planning rows for it")
    }

    /// Drops and fills encoder-cache entries as the plan says.
    fn encode(&mut self, plan: &StepPlan) -> Result<()> {
        for hash in &plan.evict_media {
            self.encoder_cache.remove(hash);
        }
        for encode in &plan.encode {
            let planned = plan.seqs.iter().find(|p| p.seq == encode.seq);
            let slot = planned.expect("media are encoded in a step that uses them").slot;
            let item = &self.occupant(slot).media[encode.media_idx];
            let grid = [item.grid.t, item.grid.h, item.grid.w];
            let encoded = self.model.encode(&self.backend, &item.patches, grid, &mut |_, _| {})?;
            self.encoder_cache.insert(encode.hash, encoded);
        }
        Ok(())
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

    fn inputs(&self, plan: &StepPlan) -> StepInputs {
        let mut inputs = StepInputs::default();
        for planned in &plan.seqs {
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
                block_table: planned.block_table.clone(),
            });
            push_logit_rows(&mut inputs, planned, occupant, query_start);
        }
        inputs
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

/// The planned sequence that step row `row` belongs to, with its first row.
fn planned_at_row(plan: &StepPlan, row: usize) -> (usize, &PlannedSeq) {
    let mut query_start = 0;
    for planned in &plan.seqs {
        if row < query_start + planned.tokens.len() {
            return (query_start, planned);
        }
        query_start += planned.tokens.len();
    }
    unreachable!("the backend only returns rows that it was given");
}
