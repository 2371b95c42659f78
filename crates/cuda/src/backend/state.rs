//! What lives from the start to the end besides weights: one arena cut into KV cache, sampler, step data and the pools; and
//! the steps that are on their way. Which kernels run is in `mod.rs`.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};

use spark_backend::{Rank, SlotParams, StateSpec, StepInputs, StepKey, StepOutput, TokenInput};

use super::kept::KeptStore;
use super::sizes;
use super::transfer::{Download, Upload};
use crate::step::{host_seqs, is_decode};
use crate::{
    Arena, ArenaPlan, Device, DeviceSlice, Error, Graph, Kernels, KvCache, PENDING, Pool, Prefill, Result,
    SampleOut, Sampler, StepLimits, StepView, Stream, Wanted,
};

/// Everything that `allocate_state` allocates.
pub(super) struct State {
    limits: StepLimits,
    /// Activations.
    pub(super) pool: Pool,
    pub(super) kept: KeptStore,
    pub(super) kv: KvCache,
    pub(super) sampler: Sampler,
    pub(super) sample_out: SampleOut,
    /// The step that is being put into the stream.
    view: RefCell<Option<StepView>>,
    /// Whether ranks keep their shares of that step's logits and exchange only the best of them.
    by_shares: Cell<bool>,
    /// Whether there are ranks.
    has_team: bool,
    /// Tokens of the head, padding included.
    pub(super) vocab_rows: usize,
    inputs: DeviceSlice,
    upload: Upload,
    pub(super) pixels: RefCell<Option<Upload>>,
    download: Download,
    /// What is wanted of the steps whose output was not taken.
    wanted: VecDeque<Wanted>,
    /// By bucket, and whether logits stay with the ranks.
    graphs: BTreeMap<(usize, bool), Graph>,
    pub(super) num_replays: u64,
}

impl State {
    /// Allocates everything for `spec`, the share of a rank if there are several, and seals the device.
    pub(super) fn new(
        device: &Device,
        stream: &Stream,
        spec: &StateSpec,
        rank: Option<Rank>,
        prefill: Prefill,
    ) -> Result<Self> {
        let limits = StepLimits {
            max_num_tokens: spec.max_num_tokens,
            num_slots: spec.num_slots,
            max_logit_rows: spec.activations.num_logit_rows.max(spec.num_slots),
            max_blocks_per_seq: spec.max_blocks_per_seq,
            vocab_size: spec.vocab_size,
        };
        let out_bytes = SampleOut::num_bytes(limits.max_logit_rows);
        let mut plan = ArenaPlan::default();
        let kv = plan.add("KV cache", KvCache::num_bytes(&spec.kv)?)?;
        let sampler = plan.add("sampler", Sampler::num_bytes(spec.num_slots, spec.vocab_size))?;
        let inputs = plan.add("step inputs", limits.num_bytes() as u64)?;
        let outputs = plan.add("step outputs", out_bytes)?;
        let activations = sizes::activation_bytes(&spec.activations, rank.unwrap_or(Rank::SINGLE), prefill);
        let activations = plan.add("activations", activations)?;
        let kept = plan.add("encoder cache", KeptStore::num_bytes(spec.encoder_cache_bytes))?;
        let arena = Arena::new(device, plan)?;
        // What was never written may be read beside what was, and masked: it must be finite.
        for region in [kv, inputs, outputs, activations] {
            stream.fill(&arena.region(region)?, 0)?;
        }
        tracing::info!("device memory besides weights:\n{}", arena.plan().report());
        let state = Self {
            limits,
            pool: Pool::new(&arena.region(activations)?),
            kept: KeptStore::new(&arena.region(kept)?, spec.encoder_cache_bytes)?,
            kv: KvCache::new(stream, &arena.region(kv)?, spec.kv)?,
            sampler: Sampler::new(stream, &arena.region(sampler)?, spec.num_slots, spec.vocab_size)?,
            sample_out: SampleOut::new(&arena.region(outputs)?, limits.max_logit_rows)?,
            view: RefCell::new(None),
            by_shares: Cell::new(false),
            has_team: rank.is_some(),
            vocab_rows: spec.activations.vocab_rows,
            inputs: arena.region(inputs)?,
            upload: Upload::new(device, limits.num_bytes())?,
            pixels: RefCell::new(
                (spec.activations.num_patches > 0).then(|| Upload::for_pixels(device)).transpose()?,
            ),
            download: Download::new(device, out_bytes as usize)?,
            wanted: VecDeque::new(),
            graphs: BTreeMap::new(),
            num_replays: 0,
        };
        stream.synchronize()?;
        device.seal();
        Ok(state)
    }

    /// Sets the sampling state of `slot`.
    pub(super) fn admit(
        &mut self,
        kernels: &Kernels,
        stream: &Stream,
        slot: usize,
        params: &SlotParams,
    ) -> Result<()> {
        kernels.admit(stream, &mut self.sampler, slot, params)
    }

    /// Sends the inputs of a step and makes it the current one; the graph of its key where there is one.
    pub(super) fn begin(
        &mut self,
        stream: &Stream,
        inputs: &StepInputs,
        may_replay: bool,
    ) -> Result<Option<&Graph>> {
        if self.download.is_full() {
            return Err(Error::shape("step", "at most 2 steps whose output was not taken", 3));
        }
        self.check(inputs)?;
        // A recorded step writes where the pool was empty when it was recorded.
        self.pool.expect_empty()?;
        let is_decode = is_decode(inputs) && inputs.tokens.len() <= self.limits.num_slots;
        let key = if is_decode {
            bucket_key(bucket(inputs.tokens.len(), self.limits.num_slots))
        } else {
            inputs.key()
        };
        self.upload.inputs(stream, &self.inputs, inputs, key, self.limits.vocab_size)?;
        let by_shares = self.has_team && self.sampler.takes_shares(inputs);
        self.by_shares.set(by_shares);
        let is_recorded = may_replay && is_decode && !inputs.has_media;
        let graph = if is_recorded { self.graphs.get(&(key.num_tokens, by_shares)) } else { None };
        if graph.is_none() {
            let view =
                StepView::new(&self.inputs, key, self.limits.vocab_size, host_seqs(inputs), is_decode)?;
            self.view.replace(Some(view));
        }
        self.num_replays += u64::from(graph.is_some());
        Ok(graph)
    }

    /// What kernels take for granted of numbers that are data to them.
    fn check(&self, inputs: &StepInputs) -> Result<()> {
        const OP: &str = "step";
        let (limits, kv) = (&self.limits, self.kv.spec());
        let key = inputs.key();
        let most = [limits.max_num_tokens, limits.num_slots, limits.max_logit_rows];
        let sizes = [key.num_tokens, key.num_seqs, key.num_logit_rows];
        if sizes.iter().zip(most).any(|(&size, most)| size > most) {
            return Err(Error::shape(
                OP,
                format!("at most {most:?} tokens, sequences, rows of logits"),
                sizes,
            ));
        }
        for seq in &inputs.seqs {
            let is_pool = seq.block_table.iter().all(|&block| (block as usize) < kv.num_blocks);
            let needed = seq.context_len.div_ceil(kv.block_size);
            if !is_pool || seq.block_table.len() < needed || seq.slot >= limits.num_slots {
                let expected = format!("a slot and {needed} of {} blocks", kv.num_blocks);
                return Err(Error::shape(OP, expected, (seq.slot, &seq.block_table)));
            }
        }
        let end = (kv.num_blocks * kv.block_size) as u64;
        if let Some(place) = inputs.slot_mapping.iter().find(|&&place| place >= end) {
            return Err(Error::shape(OP, format!("places under {end}"), place));
        }
        let is_token = |token: &TokenInput| match *token {
            TokenInput::Known(token) => token < PENDING,
            TokenInput::Pending(slot) => slot < limits.num_slots,
        };
        match inputs.tokens.iter().find(|token| !is_token(token)) {
            Some(token) => Err(Error::shape(OP, "a token, or a slot that sampled it", token)),
            None => Ok(()),
        }
    }

    /// The current step's work is in the stream: what it gives comes back to the host.
    pub(super) fn end(&mut self, stream: &Stream, inputs: &StepInputs) -> Result<()> {
        self.view.replace(None);
        let wanted = Wanted::new(&self.sampler, inputs)?;
        self.download.begin(stream, &self.sample_out.bytes(&wanted)?)?;
        self.wanted.push_back(wanted);
        Ok(())
    }

    /// The current step failed.
    pub(super) fn abandon(&self) {
        self.view.replace(None);
    }

    /// The output of the oldest step that was not taken.
    pub(super) fn output(&mut self) -> Result<StepOutput> {
        let bytes = self.download.take()?;
        let Some(wanted) = self.wanted.pop_front() else {
            return Err(Error::shape("output", "a step whose output was not taken", "none"));
        };
        self.sample_out.decode(bytes, &wanted)
    }

    /// The current step.
    pub(super) fn view(&self, op: &'static str) -> Result<StepView> {
        self.view.borrow().clone().ok_or_else(|| Error::shape(op, "a call inside a step", "one outside"))
    }

    /// Whether the current step has `rows` and is no decode step.
    pub(super) fn is_prompt_step(&self, rows: usize) -> bool {
        self.view.borrow().as_ref().is_some_and(|step| !step.is_decode && step.num_tokens == rows)
    }

    /// Whether logits of the current step stay with the ranks.
    pub(super) fn is_by_shares(&self) -> bool {
        self.by_shares.get()
    }

    /// The ways to sample, each of which has its graphs: whether by shares.
    pub(super) fn variants(&self) -> &'static [bool] {
        if self.has_team { &[false, true] } else { &[false] }
    }

    /// Makes a step current whose rows are all padding: a decode step of `bucket` rows, or else the largest step.
    pub(super) fn begin_empty(
        &mut self,
        stream: &Stream,
        bucket: Option<usize>,
        by_shares: bool,
    ) -> Result<()> {
        self.by_shares.set(by_shares);
        let (limits, vocab_size) = (&self.limits, self.limits.vocab_size);
        let largest = StepKey {
            num_tokens: limits.max_num_tokens,
            num_seqs: limits.num_slots,
            num_logit_rows: limits.max_logit_rows.min(limits.max_num_tokens),
        };
        let key = bucket.map_or(largest, bucket_key);
        self.upload.inputs(stream, &self.inputs, &StepInputs::default(), key, vocab_size)?;
        let view = StepView::new(&self.inputs, key, vocab_size, Vec::new(), bucket.is_some())?;
        self.view.replace(Some(view));
        Ok(())
    }

    /// Keeps the graph of the decode steps of `bucket` sequences.
    pub(super) fn add_graph(&mut self, bucket: usize, by_shares: bool, graph: Graph) {
        self.graphs.insert((bucket, by_shares), graph);
    }

    /// Sizes of decode steps, ascending.
    pub(super) fn buckets(&self) -> Vec<usize> {
        let mut all = Vec::new();
        let mut size = 0;
        while size < self.limits.num_slots {
            size = bucket(size + 1, self.limits.num_slots);
            all.push(size);
        }
        all
    }
}

/// The key of a decode step.
fn bucket_key(bucket: usize) -> StepKey {
    StepKey { num_tokens: bucket, num_seqs: bucket, num_logit_rows: bucket }
}

/// The size that a decode step of `num_seqs` is padded to, at most `num_slots`: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, then
/// multiples of 64. Padding rows cost little beside what is read for the others; each size costs the time and the memory of
/// a graph.
fn bucket(num_seqs: usize, num_slots: usize) -> usize {
    let size = match num_seqs {
        0..=8 => num_seqs.next_power_of_two(),
        9..=32 => num_seqs.next_multiple_of(8),
        33..=64 => num_seqs.next_multiple_of(16),
        65..=128 => num_seqs.next_multiple_of(32),
        _ => num_seqs.next_multiple_of(64),
    };
    size.min(num_slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_is_padded_to_them() {
        let sizes: Vec<usize> = (1..=200).map(|n| bucket(n, 1000)).collect();
        let mut distinct = sizes.clone();
        distinct.dedup();
        assert_eq!(distinct, [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]);
        assert!(sizes.iter().zip(1..).all(|(&size, n)| size >= n));
        assert_eq!((bucket(5, 6), bucket(6, 6), bucket(1, 6)), (6, 6, 1));
    }
}
