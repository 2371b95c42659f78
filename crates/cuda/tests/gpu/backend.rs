//! Whole steps through the `Backend` trait: against the CPU backend, and against themselves (replayed, padded, in flight).

use std::time::{Duration, Instant};

use spark_backend::{Backend, KvDtype, SlotParams, StepInputs, StepOutput};
use spark_cuda::{CudaBackend, CudaOptions, Profile};
use spark_testing::{Random, rel_err, tolerance};

use super::tiny::{BLOCK, Chunk, HIDDEN, Share, Tiny, VOCAB, inputs, prompts, state, state_of};
use super::{cpu, kernel_options};
use spark_backend::{Dtype, TokenInput, VectorWeight};

const SEED: u64 = 31;

pub(crate) fn options() -> CudaOptions {
    CudaOptions { kernels: kernel_options(), ..CudaOptions::default() }
}

/// A backend and its model, ready for steps.
pub(crate) struct Run<B: Backend> {
    pub(crate) backend: B,
    pub(crate) model: Tiny<B>,
}

impl<B: Backend> Run<B> {
    pub(crate) fn new(backend: B, num_slots: usize, kv_dtype: KvDtype) -> Self {
        Self::sharing(Share::Slices, backend, num_slots, kv_dtype)
    }

    /// A rank's, of which there may be several.
    pub(crate) fn sharing(share: Share, mut backend: B, num_slots: usize, kv_dtype: KvDtype) -> Self {
        let model = Tiny::load(&backend, SEED, share).unwrap();
        backend.allocate_state(state_of(backend.rank(), num_slots, kv_dtype)).unwrap();
        backend.prepare(&mut |b| model.forward(b, None, &mut |_| ())).unwrap();
        for slot in 0..num_slots {
            backend.admit(slot, SlotParams { logprobs: Some(3), ..SlotParams::greedy() }).unwrap();
        }
        Self { backend, model }
    }

    pub(crate) fn begin(&mut self, inputs: &StepInputs) -> spark_backend::Result<()> {
        let model = &self.model;
        self.backend.step(inputs, &mut |b| model.forward(b, None, &mut |_| ()))
    }

    pub(crate) fn step(&mut self, inputs: &StepInputs) -> StepOutput {
        self.begin(inputs).unwrap();
        self.backend.output().unwrap()
    }

    /// The logits of a step, row by row; nothing may be replayed.
    pub(crate) fn logits(
        &mut self,
        inputs: &StepInputs,
        media: Option<(usize, &B::Tensor, usize)>,
    ) -> Vec<Vec<f32>> {
        let (model, mut rows) = (&self.model, Vec::new());
        let step = self.backend.step(inputs, &mut |b| {
            let mut logits = None;
            model.forward(b, media, &mut |x| logits = Some(b.to_host(x)))?;
            let (values, [_, columns]) = logits.unwrap()?;
            rows = values.chunks(columns).take(inputs.logit_rows.len()).map(<[f32]>::to_vec).collect();
            Ok(())
        });
        step.unwrap();
        self.backend.output().unwrap();
        rows
    }
}

pub(crate) fn cuda(num_slots: usize, options: &CudaOptions) -> Run<CudaBackend> {
    Run::new(CudaBackend::new(options).unwrap(), num_slots, KvDtype::Bf16)
}

/// Eager, so that logits can be looked at.
fn eager(num_slots: usize, kv_dtype: KvDtype) -> Run<CudaBackend> {
    let options = CudaOptions { enforce_eager: true, ..options() };
    Run::new(CudaBackend::new(&options).unwrap(), num_slots, kv_dtype)
}

/// Rows must be alike, but for a few in which a rounding has changed the choice of an expert.
pub(crate) fn assert_rows_alike(got: &[Vec<f32>], want: &[Vec<f32>], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let errors: Vec<f64> = got.iter().zip(want).map(|(got, want)| rel_err(got, want)).collect();
    let rerouted = errors.iter().filter(|&&error| error > tolerance::BFLOAT16.logits).count();
    let first = |rows: &[Vec<f32>]| rows.first().map(|row| row[..row.len().min(6)].to_vec());
    assert!(
        rerouted <= errors.len() / 4 && errors.iter().all(|&error| error < 1.0),
        "{what}: relative errors {errors:?}; first row: got {:?}, want {:?}",
        first(got),
        first(want)
    );
}

/// Steps after the prompts: the tokens are given, so that both backends see the same.
pub(crate) fn decodes(count: usize) -> Vec<StepInputs> {
    let mut random = Random::new(77);
    (0..count)
        .map(|i| {
            let mut token =
                |slot: usize, len: usize| Chunk::known(slot, len + i, &[random.below(VOCAB) as u32]);
            inputs(&[token(0, 5), token(1, 40), token(2, 17)])
        })
        .collect()
}

#[test]
fn steps_are_the_cpu_backends() {
    for kv_dtype in [KvDtype::Bf16, KvDtype::Fp8] {
        let mut gpu = eager(4, kv_dtype);
        let mut cpu = Run::new(cpu(Dtype::Bf16), 4, kv_dtype);
        let mut steps = vec![inputs(&prompts(1))];
        // Logits of every row of the prompts: more rows than sequences.
        let all = &mut steps[0];
        all.logit_rows = (0..all.tokens.len() as u32).collect();
        all.sample_slots = vec![None; all.tokens.len()];
        all.prompt_targets = vec![None; all.tokens.len()];
        steps.extend(decodes(3));
        // A chunk of a prompt beside decodes, over the border of a block.
        steps.push(inputs(&[
            Chunk::known(0, 8, &[5]),
            Chunk::known(3, 0, &[9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13, 14, 15, 16, 17, 18]),
            Chunk::known(2, 20, &[6]),
        ]));
        for (i, step) in steps.iter().enumerate() {
            let (got, want) = (gpu.logits(step, None), cpu.logits(step, None));
            assert_rows_alike(&got, &want, &format!("{kv_dtype:?} step {i}"));
        }
    }
}

/// Slot, token, the bits of its log-probability, alternatives with theirs.
pub(crate) type Bits = (usize, u32, u32, Vec<(u32, u32)>);

pub(crate) fn bits(output: &StepOutput) -> Vec<Bits> {
    let one = |sampled: &spark_backend::SampledToken| {
        let (chosen, top) = sampled.logprobs.as_ref().unwrap();
        let top = top.iter().map(|top| (top.token, top.logprob.to_bits())).collect();
        (sampled.slot, sampled.token, chosen.logprob.to_bits(), top)
    };
    output.sampled.iter().map(one).collect()
}

/// Prompts, then steps of pending tokens of fewer and fewer sequences.
pub(crate) fn pending_steps() -> Vec<StepInputs> {
    let mut steps = vec![inputs(&prompts(2))];
    for i in 0..6 {
        let live = 3 - i / 2;
        let chunks: Vec<Chunk> = [5, 40, 17][..live]
            .iter()
            .enumerate()
            .map(|(slot, &len)| Chunk::pending(slot, len + i))
            .collect();
        steps.push(inputs(&chunks));
    }
    steps
}

#[test]
fn replayed_steps_equal_eager_ones_bit_by_bit() {
    let steps = pending_steps();
    let run = |options: &CudaOptions| {
        let mut run = cuda(9, options);
        let outputs: Vec<_> = steps.iter().map(|step| bits(&run.step(step))).collect();
        (outputs, run.backend.num_replays())
    };
    let (eager, eager_replays) = run(&CudaOptions { enforce_eager: true, ..options() });
    let (replayed, replays) = run(&options());
    assert_eq!((eager_replays, replays), (0, 6));
    for (i, (eager, replayed)) in eager.iter().zip(&replayed).enumerate() {
        assert_eq!(eager, replayed, "step {i}");
    }
    let distinct: std::collections::BTreeSet<u32> = replayed.iter().flatten().map(|row| row.1).collect();
    assert!(distinct.len() > 5, "tokens must differ to show anything: {distinct:?}");
}

/// What padding rows find in memory must not matter.
#[test]
fn what_was_before_does_not_change_a_padded_step() {
    let steps = pending_steps();
    let mut clean = cuda(9, &options());
    let want: Vec<_> = steps.iter().map(|step| bits(&clean.step(step))).collect();
    let mut used = cuda(9, &options());
    let mut random = Random::new(8);
    let mut chunks: Vec<Chunk> =
        (0..9).map(|slot| Chunk::known(slot, 0, &[random.below(VOCAB) as u32; 9])).collect();
    used.step(&inputs(&chunks));
    for i in 0..4 {
        chunks = (0..8).map(|slot| Chunk::pending(slot, 9 + i)).collect();
        used.step(&inputs(&chunks));
    }
    for slot in 0..9 {
        used.backend.admit(slot, SlotParams { logprobs: Some(3), ..SlotParams::greedy() }).unwrap();
    }
    let got: Vec<_> = steps.iter().map(|step| bits(&used.step(step))).collect();
    assert_eq!(got, want);
    assert_eq!(used.backend.num_replays(), 10);
}

#[test]
fn two_steps_are_in_flight_and_come_back_in_order() {
    let steps = pending_steps();
    let mut one_by_one = cuda(4, &options());
    let want: Vec<_> = steps.iter().map(|step| bits(&one_by_one.step(step))).collect();
    let mut run = cuda(4, &options());
    assert_eq!(run.backend.max_in_flight(), 2);
    let error = run.backend.output().unwrap_err().to_string();
    assert!(error.contains("a step whose output was not taken"), "{error}");
    run.begin(&steps[0]).unwrap();
    let mut got = Vec::new();
    for step in &steps[1..] {
        run.begin(step).unwrap();
        let error = run.begin(step).unwrap_err().to_string();
        assert!(error.contains("at most 2 steps"), "{error}");
        got.push(bits(&run.backend.output().unwrap()));
    }
    got.push(bits(&run.backend.output().unwrap()));
    assert_eq!(got, want);
}

#[test]
fn nothing_is_allocated_after_the_state() {
    let mut run = cuda(5, &options());
    let before = run.backend.device().num_allocations();
    for step in pending_steps() {
        run.step(&step);
    }
    assert_eq!(run.backend.device().num_allocations(), before);
    let [used, all] = run.backend.activation_use();
    assert!(used > 0 && used < all, "{used} of {all}");
    let late = VectorWeight { values: vec![1.0; 16], shape: [1, 16] };
    assert!(run.backend.vector(late).is_err());
    // A tensor that is held from one step to the next would be overwritten: it is refused.
    let (model, mut held) = (&run.model, None);
    let first = inputs(&[Chunk::known(0, 0, &[1, 2])]);
    let step =
        run.backend.step(&first, &mut |b| model.forward(b, None, &mut |logits| held = Some(logits.clone())));
    step.unwrap();
    run.backend.output().unwrap();
    assert!(run.begin(&first).unwrap_err().to_string().contains("in use"));
    drop(held);
    run.step(&first);
}

#[test]
fn masks_prompt_logprobs_and_bad_steps() {
    let mut run = cuda(4, &options());
    let mut step = inputs(&[Chunk::known(1, 0, &[3, 4, 5])]);
    (step.logit_rows, step.sample_slots) = (vec![0, 1, 2], vec![None, None, Some(1)]);
    step.prompt_targets = vec![Some((4, 2)), Some((5, 0)), None];
    let mut mask = vec![0; VOCAB.div_ceil(32)];
    mask[7] = 1 << 5;
    step.masks = vec![(1, mask.clone())];
    let output = run.step(&step);
    assert_eq!((output.sampled[0].slot, output.sampled[0].token), (1, 7 * 32 + 5));
    let prompt: Vec<_> =
        output.prompt_logprobs.iter().map(|(row, target, top)| (*row, target.token, top.len())).collect();
    assert_eq!(prompt, [(0, 4, 2), (1, 5, 0)]);
    let mut cpu = Run::new(cpu(Dtype::Bf16), 4, KvDtype::Bf16);
    let want = cpu.step(&step);
    for (got, want) in output.prompt_logprobs.iter().zip(&want.prompt_logprobs) {
        assert!((got.1.logprob - want.1.logprob).abs() < tolerance::BFLOAT16_MOE_LOGPROB, "{got:?} {want:?}");
    }
    // A replayed step under a mask.
    let mut next = inputs(&[Chunk::pending(1, 3)]);
    mask[7] = 1 << 6;
    next.masks = vec![(1, mask)];
    assert_eq!(run.step(&next).sampled[0].token, 7 * 32 + 6);
    assert_eq!(run.backend.num_replays(), 1);
    let changes: [fn(&mut StepInputs); 8] = [
        |inputs| inputs.tokens[0] = TokenInput::Pending(4),
        |inputs| inputs.tokens[0] = TokenInput::Known(u32::MAX),
        |inputs| inputs.slot_mapping[0] = 16 * BLOCK as u64,
        |inputs| inputs.seqs[0].block_table[0] = 16,
        |inputs| inputs.seqs[0].block_table.clear(),
        |inputs| inputs.seqs[0].slot = 4,
        |inputs| inputs.sample_slots[0] = Some(4),
        |inputs| inputs.logit_rows[0] = 1,
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut bad = inputs(&[Chunk::known(1, 4, &[5])]);
        change(&mut bad);
        assert!(run.begin(&bad).is_err(), "change {i}");
    }
    run.step(&inputs(&[Chunk::known(1, 4, &[5])]));
}

#[test]
fn what_the_kernels_do_not_take_is_said_at_the_start() {
    let mut backend = CudaBackend::new(&options()).unwrap();
    assert!(backend.output().is_err() && backend.admit(0, SlotParams::greedy()).is_err());
    let mut spec = state(2, KvDtype::Bf16);
    spec.kv.head_dim = 48;
    let error = backend.allocate_state(spec).unwrap_err().to_string();
    assert!(
        error.contains("head_dim must be one of [32, 64, 128]") && error.contains("--device cpu"),
        "{error}"
    );
    let mut spec = state(2, KvDtype::Bf16);
    spec.activations.hidden_size = HIDDEN + 8;
    let error = backend.allocate_state(spec).unwrap_err().to_string();
    assert!(error.contains("hidden_size must be a multiple of 16"), "{error}");
    let mut spec = state(2, KvDtype::Bf16);
    spec.kv.num_blocks = 1 << 40;
    let error = backend.allocate_state(spec).unwrap_err();
    assert!(matches!(error, spark_backend::Error::Memory { .. }), "{error}");
    backend.allocate_state(state(2, KvDtype::Bf16)).unwrap();
}

#[test]
fn a_profile_names_the_operations() {
    let profile = Profile::default();
    let mut run = cuda(3, &CudaOptions { profile: Some(profile.clone()), ..options() });
    profile.clear();
    run.step(&inputs(&prompts(3)));
    run.step(&inputs(&[Chunk::pending(0, 5)]));
    assert_eq!(run.backend.num_replays(), 0);
    let times = profile.times();
    for (name, count) in [("attend", 4), ("moe_mlp", 2), ("embed", 2), ("sample", 2), ("linear 256 x 192", 2)]
    {
        let time = times.get(name).unwrap_or_else(|| panic!("{name} is not in {times:?}"));
        assert!(time.count == count && time.micros > 0.0, "{name}: {time:?}");
    }
    println!("{profile}");
}

/// What a step costs besides its kernels: the tiny model has about thirty short ones. Not a bound on speed.
#[test]
fn measurements_of_steps() {
    const STEPS: usize = 400;
    for num_seqs in [1, 8] {
        for enforce_eager in [false, true] {
            let mut run = cuda(8, &CudaOptions { enforce_eager, ..options() });
            let chunk = |slot: usize| Chunk::known(slot, 0, &[slot as u32]);
            run.step(&inputs(&(0..num_seqs).map(chunk).collect::<Vec<_>>()));
            // The same position again and again: the context does not grow.
            let step = inputs(&(0..num_seqs).map(|slot| Chunk::pending(slot, 1)).collect::<Vec<_>>());
            run.step(&step);
            let start = Instant::now();
            for _ in 0..STEPS {
                run.step(&step);
            }
            let alone = start.elapsed().as_micros() as f64 / STEPS as f64;
            let start = Instant::now();
            run.begin(&step).unwrap();
            let mut host = Duration::ZERO;
            for _ in 1..STEPS {
                let begun = Instant::now();
                run.begin(&step).unwrap();
                host += begun.elapsed();
                run.backend.output().unwrap();
            }
            run.backend.output().unwrap();
            let in_flight = start.elapsed().as_micros() as f64 / STEPS as f64;
            let host = host.as_micros() as f64 / STEPS as f64;
            println!(
                "{num_seqs} sequences, {}: {alone:.1} us a step one by one, {in_flight:.1} us with two in flight, of \
                 which {host:.1} us to begin",
                if enforce_eager { "eager" } else { "replayed" }
            );
            assert!(alone > 0.0 && in_flight > 0.0);
        }
    }
}
