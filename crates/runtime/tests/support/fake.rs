//! A backend that computes nothing: its "KV cache" holds token ids, and the next token is a hash of what a sequence's blocks
//! hold. So every token of an answer depends on positions, block tables and pending tokens being right.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use spark_backend::{
    Activation, ActivationSpec, AttentionSpec, Backend, Dtype, Error, ExpertsWeight, LinearWeight, Result,
    RouterSpec, SampledToken, SlotParams, StateSpec, StepInputs, StepOutput, TokenInput, VectorWeight,
    VisionSpec,
};

/// Counters that outlive the backend, which the engine owns.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Most steps between `step` and `output`.
    pub(crate) most_in_flight: AtomicUsize,
    /// Calls of `prepare`.
    pub(crate) num_prepared: AtomicUsize,
    /// Calls of `step` that did not fail.
    pub(crate) num_steps: AtomicUsize,
    /// Sum of the bytes of all pixels.
    pub(crate) pixels: AtomicUsize,
    /// Set by a test: steps have no result until it is cleared.
    pub(crate) hangs: AtomicBool,
}

/// See the top of the file.
pub(crate) struct Fake {
    max_in_flight: usize,
    /// Which step fails, counted from 0.
    fails_at: Option<usize>,
    /// Whether tokens are hashes; else they are all 1, which takes no time.
    hashes: bool,
    num_steps: usize,
    vocab_size: u32,
    block_size: usize,
    cache: Vec<u32>,
    last: Vec<u32>,
    outputs: VecDeque<StepOutput>,
    seen: Arc<Seen>,
}

/// The token that follows `tokens`.
pub(crate) fn next_token(tokens: &[u32], vocab_size: u32) -> u32 {
    let mut hasher = DefaultHasher::new();
    tokens.hash(&mut hasher);
    (hasher.finish() % u64::from(vocab_size)) as u32
}

/// `token`, or the first after it that `mask` allows; the vocabulary is a circle.
pub(crate) fn first_allowed(token: u32, mask: &[u32], vocab_size: u32) -> u32 {
    let is_allowed = |id: &u32| mask[*id as usize / 32] >> (id % 32) & 1 == 1;
    let mut circle = (0..vocab_size).map(|i| (token + i) % vocab_size);
    circle.find(is_allowed).expect("a mask allows something")
}

impl Fake {
    pub(crate) fn new(max_in_flight: usize, hashes: bool, fails_at: Option<usize>) -> Self {
        Self {
            max_in_flight,
            fails_at,
            hashes,
            num_steps: 0,
            vocab_size: 1,
            block_size: 1,
            cache: Vec::new(),
            last: Vec::new(),
            outputs: VecDeque::new(),
            seen: Arc::default(),
        }
    }

    pub(crate) fn seen(&self) -> Arc<Seen> {
        self.seen.clone()
    }

    fn run(&mut self, inputs: &StepInputs) -> StepOutput {
        for (token, &place) in inputs.tokens.iter().zip(&inputs.slot_mapping) {
            self.cache[place as usize] = match *token {
                TokenInput::Known(id) => id,
                TokenInput::Pending(slot) => self.last[slot],
            };
        }
        let mut output = StepOutput::default();
        for (slot, row) in inputs.sample_slots.iter().zip(&inputs.logit_rows) {
            let Some(slot) = *slot else { continue };
            let token = if self.hashes { self.token_after(inputs, *row as usize) } else { 1 };
            let mask = inputs.masks.iter().find(|(of, _)| *of == slot);
            let token = mask.map_or(token, |(_, mask)| first_allowed(token, mask, self.vocab_size));
            self.last[slot] = token;
            output.sampled.push(SampledToken { slot, token, logprobs: None, named: Vec::new() });
        }
        output
    }

    fn token_after(&self, inputs: &StepInputs, row: usize) -> u32 {
        let seq = inputs.seqs.iter().find(|seq| seq.query_start + seq.query_len == row + 1);
        let seq = seq.expect("the last row of a sequence is sampled");
        let place =
            |i: usize| seq.block_table[i / self.block_size] as usize * self.block_size + i % self.block_size;
        let tokens: Vec<u32> = (0..seq.context_len).map(|i| self.cache[place(i)]).collect();
        next_token(&tokens, self.vocab_size)
    }
}

impl Backend for Fake {
    type Tensor = ();
    type Linear = ();
    type Experts = ();
    type Routing = ();

    fn name(&self) -> &'static str {
        "fake"
    }

    fn dtype(&self) -> Dtype {
        Dtype::Bf16
    }

    fn vector(&self, _: VectorWeight) -> Result<()> {
        Ok(())
    }

    fn linear_weight(&self, _: LinearWeight) -> Result<()> {
        Ok(())
    }

    fn experts_weight(&self, _: ExpertsWeight) -> Result<()> {
        Ok(())
    }

    fn activation_bytes(&self, _: &ActivationSpec) -> u64 {
        0
    }

    fn allocate_state(&mut self, spec: StateSpec) -> Result<()> {
        self.vocab_size = spec.vocab_size as u32;
        self.block_size = spec.kv.block_size;
        self.cache = vec![0; spec.kv.num_blocks * spec.kv.block_size];
        self.last = vec![0; spec.num_slots];
        Ok(())
    }

    fn prepare(&mut self, forward: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()> {
        self.seen.num_prepared.fetch_add(1, Ordering::Relaxed);
        forward(self)
    }

    fn max_in_flight(&self) -> usize {
        self.max_in_flight
    }

    fn admit(&mut self, slot: usize, params: SlotParams) -> Result<()> {
        self.last[slot] = params.output.last().copied().unwrap_or(0);
        Ok(())
    }

    fn step(&mut self, inputs: &StepInputs, forward: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()> {
        if self.fails_at == Some(self.num_steps) {
            return Err(Error::Device { op: "step", message: "as told".into() });
        }
        self.num_steps += 1;
        self.seen.num_steps.fetch_add(1, Ordering::Relaxed);
        forward(self)?;
        let output = self.run(inputs);
        self.outputs.push_back(output);
        self.seen.most_in_flight.fetch_max(self.outputs.len(), Ordering::Relaxed);
        Ok(())
    }

    fn output(&mut self) -> Result<StepOutput> {
        while self.seen.hangs.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        let none = || Error::Device { op: "output", message: "no step is in flight".into() };
        self.outputs.pop_front().ok_or_else(none)
    }

    fn embed(&self, (): &(), _: usize) -> Result<()> {
        Ok(())
    }

    fn reduce_norm(&self, _: Option<()>, (): &mut (), (): &(), _: f32) -> Result<()> {
        Ok(())
    }

    fn linear(&self, (): &(), (): &()) -> Result<()> {
        Ok(())
    }

    fn attend(&self, (): &(), _: usize, _: &AttentionSpec<'_, Self>) -> Result<()> {
        Ok(())
    }

    fn reduce_norm_route(
        &self,
        _: Option<()>,
        (): &mut (),
        (): &(),
        _: f32,
        _: &RouterSpec<'_, Self>,
    ) -> Result<((), ())> {
        Ok(((), ()))
    }

    fn moe_mlp(&self, (): &(), (): &(), (): &()) -> Result<()> {
        Ok(())
    }

    fn swiglu(&self, (): &()) -> Result<()> {
        Ok(())
    }

    fn set_rows(&self, (): &mut (), _: usize, (): &(), _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn add_rows(&self, (): &mut (), _: usize, (): &(), _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn logits(&self, (): &(), (): &(), _: usize) -> Result<()> {
        Ok(())
    }

    fn sample(&self, (): &()) -> Result<()> {
        Ok(())
    }

    fn patches(&self, pixels: &[&[u8]], _: usize, _: &VisionSpec) -> Result<()> {
        let sum = pixels.iter().copied().flatten().map(|&byte| usize::from(byte)).sum();
        self.seen.pixels.fetch_add(sum, Ordering::Relaxed);
        Ok(())
    }

    fn add_position(&self, (): &mut (), (): &(), _: [usize; 3], _: &VisionSpec) -> Result<()> {
        Ok(())
    }

    fn layer_norm(&self, (): &(), (): &(), (): &(), _: f32) -> Result<()> {
        Ok(())
    }

    fn vision_attend(&self, (): &(), _: [usize; 3], _: &VisionSpec) -> Result<()> {
        Ok(())
    }

    fn activate(&self, (): &mut (), _: Activation) -> Result<()> {
        Ok(())
    }

    fn add(&self, (): &mut (), (): &()) -> Result<()> {
        Ok(())
    }

    fn reshape(&self, (): &(), _: usize) -> Result<()> {
        Ok(())
    }

    fn keep(&self, (): &()) -> Result<()> {
        Ok(())
    }

    fn keep_rows(&self, (): &(), _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn to_host(&self, (): &()) -> Result<(Vec<f32>, [usize; 2])> {
        Ok((Vec::new(), [0, 0]))
    }
}
