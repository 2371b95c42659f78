//! What persists between operations: KV pool, slots, the current step and its output. The rows that are sampled here
//! go through `sampler.rs` one by one.

use crate::kv::KvPool;
use crate::sampler::{Logprobs, Slot};
use crate::tensor::{Compute, CpuTensor};
use spark_backend::{
    Error, Result, SampledToken, SlotParams, StateSpec, StepInputs, StepOutput, TokenInput, TokenLogprob,
};
use std::collections::VecDeque;

/// Most outputs that wait to be taken.
const MAX_OUTPUTS: usize = 2;

/// The backend's state, allocated by `allocate_state`.
pub(crate) struct State {
    pub(crate) pool: KvPool,
    slots: Vec<Option<Slot>>,
    spec: StateSpec,
    pub(crate) inputs: StepInputs,
    /// The step's tokens, those that were pending resolved.
    pub(crate) tokens: Vec<u32>,
    /// Of the steps whose output was not taken, oldest first; the last is the current step's.
    pub(crate) outputs: VecDeque<StepOutput>,
}

/// What comes of one row of logits.
struct Row {
    sampled: Option<SampledToken>,
    prompt: Option<(u32, TokenLogprob, Vec<TokenLogprob>)>,
}

impl State {
    pub(crate) fn new(spec: StateSpec) -> Result<Self> {
        let pool = KvPool::new(spec.kv)?;
        let slots = (0..spec.num_slots).map(|_| None).collect();
        let inputs = StepInputs::default();
        Ok(Self { pool, slots, spec, inputs, tokens: Vec::new(), outputs: VecDeque::new() })
    }

    pub(crate) fn admit(&mut self, slot: usize, params: SlotParams) -> Result<()> {
        let num_slots = self.slots.len();
        let Some(place) = self.slots.get_mut(slot) else {
            return Err(Error::shape("admit slot", format!("under {num_slots}"), slot));
        };
        *place = Some(Slot::new(params));
        Ok(())
    }

    fn slot(&self, op: &'static str, slot: usize) -> Result<&Slot> {
        let found = self.slots.get(slot).and_then(Option::as_ref);
        found.ok_or_else(|| Error::shape(op, "an admitted slot", slot))
    }

    /// Takes the inputs of a step.
    pub(crate) fn begin(&mut self, inputs: &StepInputs) -> Result<()> {
        let rows = inputs.logit_rows.len();
        let got = [inputs.sample_slots.len(), inputs.prompt_targets.len()];
        if got != [rows, rows] {
            return Err(Error::shape("step sample_slots and prompt_targets", [rows, rows], got));
        }
        if inputs.tokens.len() > self.spec.max_num_tokens {
            let expected = format!("at most {} tokens", self.spec.max_num_tokens);
            return Err(Error::shape("step", expected, inputs.tokens.len()));
        }
        let token = |input: &TokenInput| match *input {
            TokenInput::Known(token) => Ok(token),
            TokenInput::Pending(slot) => {
                let last = self.slot("step pending token", slot)?.last;
                last.ok_or_else(|| Error::shape("step pending token", "a slot that has sampled", slot))
            }
        };
        let tokens = inputs.tokens.iter().map(token).collect::<Result<_>>()?;
        if self.outputs.len() == MAX_OUTPUTS {
            return Err(Error::shape("step", format!("under {MAX_OUTPUTS} outputs not taken"), MAX_OUTPUTS));
        }
        (self.tokens, self.inputs) = (tokens, inputs.clone());
        self.outputs.push_back(StepOutput::default());
        Ok(())
    }

    /// The oldest output that was not taken.
    pub(crate) fn take_output(&mut self) -> Result<StepOutput> {
        self.outputs
            .pop_front()
            .ok_or_else(|| Error::shape("output", "a step whose output was not taken", "none"))
    }

    /// Samples the step's rows into `output` and updates the slots.
    pub(crate) fn sample(&mut self, compute: &Compute, logits: &CpuTensor) -> Result<()> {
        let vocab = self.spec.vocab_size;
        let rows = self.inputs.logit_rows.len();
        if logits.rows() != rows || logits.columns() < vocab {
            return Err(Error::shape("sample", format!("[{rows}, at least {vocab}]"), logits.shape));
        }
        let indices: Vec<usize> = (0..rows).collect();
        let results = compute.map(&indices, rows * vocab * 4, |&i| self.row(i, logits.row(i)));
        let mut output = StepOutput::default();
        for row in results {
            let row = row?;
            if let Some(sampled) = row.sampled {
                if let Some(Some(slot)) = self.slots.get_mut(sampled.slot) {
                    slot.push(sampled.token);
                }
                output.sampled.push(sampled);
            }
            output.prompt_logprobs.extend(row.prompt);
        }
        if let Some(current) = self.outputs.back_mut() {
            *current = output;
        }
        Ok(())
    }

    /// Row `i` of the logits, padding included.
    fn row(&self, i: usize, all: &[f32]) -> Result<Row> {
        let inputs = &self.inputs;
        let vocab = self.spec.vocab_size;
        let logits = &all[..vocab];
        let outside = |token| Error::shape("sample token", format!("under {}", logits.len()), token);
        let prompt = match inputs.prompt_targets[i] {
            None => None,
            Some((target, alternatives)) => {
                let logprobs = Logprobs::new(all, vocab);
                let target = logprobs.of(target).ok_or_else(|| outside(target))?;
                Some((inputs.logit_rows[i], target, logprobs.top(alternatives)))
            }
        };
        let sampled = match inputs.sample_slots[i] {
            None => None,
            Some(index) => {
                let slot = self.slot("sample", index)?;
                let mask =
                    inputs.masks.iter().find(|(slot, _)| *slot == index).map(|(_, words)| words.as_slice());
                if let Some(mask) = mask
                    && mask.len() < logits.len().div_ceil(32)
                {
                    return Err(Error::shape("sample mask words", logits.len().div_ceil(32), mask.len()));
                }
                let token = slot.choose(logits, mask);
                let (mut logprobs, mut named) = (None, Vec::new());
                if let Some(alternatives) = slot.params.logprobs {
                    let all = Logprobs::new(all, vocab);
                    let chosen = all.of(token).ok_or_else(|| outside(token))?;
                    let names = &slot.params.named_tokens;
                    let values = names.iter().map(|&token| all.value(token).ok_or_else(|| outside(token)));
                    named = values.collect::<Result<_>>()?;
                    let alternatives = if names.is_empty() { alternatives } else { 0 };
                    logprobs = Some((chosen, all.top(alternatives)));
                }
                Some(SampledToken { slot: index, token, logprobs, named })
            }
        };
        Ok(Row { sampled, prompt })
    }
}
