//! The sampler of the CPU backend and that of the GPU with the same slots, step by step. No tests.

use spark_backend::{
    ActivationSpec, Backend, Dtype, KvDtype, KvSpec, Rank, SeqInput, SlotParams, StateSpec, StepInputs,
    StepOutput, TokenInput, TokenLogprob,
};
use spark_cpu::CpuBackend;
use spark_cuda::{DeviceSlice, SampleOut, Sampler, StepLimits, StepView, Tensor, Wanted};
use spark_testing::Random;

use super::{Bed, cpu, cpu_tensor};

/// The CPU backend and the GPU with the same slots.
pub(super) struct Pair {
    pub(super) bed: Bed,
    pub(super) backend: CpuBackend,
    pub(super) sampler: Sampler,
    pub(super) out: SampleOut,
    pub(super) step: DeviceSlice,
    vocab: usize,
    columns: usize,
    /// Ranks whose shares of the tokens are sampled apart; 0: all tokens at once.
    pub(super) num_shares: usize,
    pub(super) params: Vec<SlotParams>,
    /// Of each slot, by the CPU.
    pub(crate) outputs: Vec<Vec<u32>>,
    /// Rows compared, and those with another token.
    num_rows: usize,
    different: Vec<String>,
}

impl Pair {
    pub(super) fn new(num_slots: usize, vocab: usize, columns: usize) -> Self {
        let bed = Bed::new();
        let mut backend = cpu(Dtype::F32);
        let kv = KvSpec {
            num_layers: 1,
            num_kv_heads: 1,
            head_dim: 2,
            block_size: 1,
            num_blocks: 1,
            dtype: KvDtype::F32,
        };
        let spec = StateSpec {
            kv,
            num_slots,
            max_num_tokens: 2 * num_slots,
            vocab_size: vocab,
            max_blocks_per_seq: 1,
            encoder_cache_bytes: 0,
            activations: ActivationSpec::default(),
        };
        backend.allocate_state(spec).unwrap();
        let limits = StepLimits {
            max_num_tokens: 2 * num_slots,
            num_slots: 2 * num_slots,
            max_logit_rows: 2 * num_slots,
            max_blocks_per_seq: 1,
            vocab_size: vocab,
        };
        let memory = bed.bytes(Sampler::num_bytes(num_slots, vocab));
        Self {
            sampler: Sampler::new(&bed.stream, &memory, num_slots, vocab).unwrap(),
            out: SampleOut::new(&bed.bytes(SampleOut::num_bytes(2 * num_slots)), 2 * num_slots).unwrap(),
            step: bed.bytes(limits.num_bytes() as u64),
            vocab,
            columns,
            num_shares: 0,
            params: vec![SlotParams::greedy(); num_slots],
            outputs: vec![Vec::new(); num_slots],
            num_rows: 0,
            different: Vec::new(),
            bed,
            backend,
        }
    }

    pub(super) fn admit(&mut self, slot: usize, params: &SlotParams) {
        self.backend.admit(slot, params.clone()).unwrap();
        self.admit_gpu(slot, params);
        self.outputs[slot].clone_from(&params.output);
        self.params[slot] = params.clone();
    }

    pub(super) fn admit_gpu(&mut self, slot: usize, params: &SlotParams) {
        self.bed.kernels.admit(&self.bed.stream, &mut self.sampler, slot, params).unwrap();
    }

    /// One row for each entry.
    pub(super) fn inputs(&self, rows: &[Row]) -> StepInputs {
        let seq = |slot, query_start| SeqInput {
            slot,
            query_start,
            query_len: 1,
            context_len: 1,
            block_table: vec![0],
        };
        let masks = rows.iter().filter_map(|row| Some((row.slot?, row.mask.clone()?)));
        StepInputs {
            tokens: vec![TokenInput::Known(0); rows.len()],
            positions: vec![[0; 3]; rows.len()],
            slot_mapping: vec![0; rows.len()],
            seqs: (0..rows.len()).map(|i| seq(rows[i].slot.unwrap_or(0), i)).collect(),
            logit_rows: (0..rows.len() as u32).collect(),
            sample_slots: rows.iter().map(|row| row.slot).collect(),
            prompt_targets: rows.iter().map(|row| row.target).collect(),
            masks: masks.collect(),
            has_media: false,
        }
    }

    pub(super) fn sample(&self, logits: &Tensor, inputs: &StepInputs) -> StepOutput {
        let wanted = Wanted::new(&self.sampler, inputs).unwrap();
        let view = StepView::upload(&self.bed.stream, &self.step, inputs, inputs.key(), self.vocab).unwrap();
        match self.num_shares {
            0 => self.bed.kernels.sample(&self.bed.stream, logits, &view, &self.sampler, &self.out).unwrap(),
            _ => {
                assert!(self.sampler.takes_shares(inputs));
                self.sample_shares(logits, &view);
            }
        }
        self.read(&wanted)
    }

    /// What ranks do, one after the other.
    fn sample_shares(&self, logits: &Tensor, view: &StepView) {
        let (Bed { stream, kernels }, rows, world) = (&self.bed, logits.rows(), self.num_shares);
        let values = self.bed.values(logits);
        let num_bytes = 32 * rows as u64;
        let candidates = self.bed.bytes(num_bytes * world as u64);
        for index in 0..world {
            let share = Rank::new(index, world).unwrap().range(self.columns);
            let of_share: Vec<f32> =
                values.chunks(self.columns).flat_map(|row| &row[share.clone()]).copied().collect();
            let of_share = self.bed.tensor(&of_share, [rows, share.len()], Dtype::F32);
            let mine = candidates.slice(num_bytes * index as u64, num_bytes).unwrap();
            kernels.sample_share(stream, &of_share, share.start, view, &self.sampler, &mine).unwrap();
        }
        kernels.sample_choose(stream, &candidates, world, view, &self.sampler, &self.out).unwrap();
    }

    pub(super) fn read(&self, wanted: &Wanted) -> StepOutput {
        let slice = self.out.bytes(wanted).unwrap();
        let bytes = self.bed.stream.download::<u8>(&slice, slice.num_bytes() as usize).unwrap();
        self.out.decode(&bytes, wanted).unwrap()
    }

    /// Samples on both sides and compares. A token that differs is noted, and the slot goes on with the CPU's.
    pub(super) fn step(&mut self, logits: &[f32], rows: &[Row]) -> StepOutput {
        let inputs = self.inputs(rows);
        let shape = [rows.len(), self.columns];
        let device = self.bed.tensor(logits, shape, Dtype::F32);
        let got = self.sample(&device, &inputs);
        let host = cpu_tensor(&self.backend, logits, shape);
        self.backend.step(&inputs, &mut |b| b.sample(&host)).unwrap();
        let want = self.backend.output().unwrap();
        assert_eq!(got.sampled.len(), want.sampled.len());
        for (got, want) in got.sampled.iter().zip(&want.sampled) {
            assert_eq!(got.slot, want.slot);
            self.num_rows += 1;
            self.outputs[want.slot].push(want.token);
            if got.token == want.token {
                match (&got.logprobs, &want.logprobs) {
                    (None, None) => (),
                    (Some(got), Some(want)) => same_logprobs(got, want),
                    (got, want) => panic!("{got:?} {want:?}"),
                }
                let near = |(got, want): (&f32, &f32)| got == want || (got - want).abs() < 2e-5;
                let is_same = got.named.len() == want.named.len();
                let is_same = is_same && got.named.iter().zip(&want.named).all(near);
                assert!(is_same, "named tokens: got {:?}\nwant {:?}", got.named, want.named);
                continue;
            }
            let (slot, params) = (want.slot, &self.params[want.slot]);
            let row = rows.iter().position(|row| row.slot == Some(slot)).unwrap();
            let logit = |token: u32| logits[row * self.columns + token as usize];
            self.different.push(format!(
                "step {} of {params:?}: got {} with {}, want {} with {}",
                self.outputs[slot].len() - 1,
                got.token,
                logit(got.token),
                want.token,
                logit(want.token)
            ));
            let resumed = SlotParams { output: self.outputs[slot].clone(), ..params.clone() };
            self.admit_gpu(slot, &resumed);
        }
        assert_eq!(got.prompt_logprobs.len(), want.prompt_logprobs.len());
        for (got, want) in got.prompt_logprobs.iter().zip(&want.prompt_logprobs) {
            assert_eq!(got.0, want.0);
            same_logprobs(&(got.1, got.2.clone()), &(want.1, want.2.clone()));
        }
        want
    }

    /// At most this many rows differ: logarithms that round differently swap two candidates of nearly equal score.
    pub(super) fn expect_equal(&self, at_most: usize) {
        println!("{} of {} rows differ", self.different.len(), self.num_rows);
        let shown = &self.different[..self.different.len().min(5)];
        assert!(self.different.len() <= at_most, "{} rows: {shown:#?}", self.different.len());
    }

    pub(super) fn random_logits(&self, random: &mut Random, rows: usize, std: f32) -> Vec<f32> {
        random.normals(rows * self.columns, std)
    }
}

/// What becomes of a row.
#[derive(Debug, Clone, Default)]
pub(super) struct Row {
    pub(super) slot: Option<usize>,
    pub(super) mask: Option<Vec<u32>>,
    pub(super) target: Option<(u32, usize)>,
}

pub(super) fn sampled(slots: std::ops::Range<usize>) -> Vec<Row> {
    slots.map(|slot| Row { slot: Some(slot), ..Row::default() }).collect()
}

pub(super) fn same_logprobs(
    got: &(TokenLogprob, Vec<TokenLogprob>),
    want: &(TokenLogprob, Vec<TokenLogprob>),
) {
    let same = |got: &TokenLogprob, want: &TokenLogprob| {
        got.token == want.token && got.rank == want.rank && (got.logprob - want.logprob).abs() < 2e-5
    };
    let all = got.1.len() == want.1.len() && got.1.iter().zip(&want.1).all(|(got, want)| same(got, want));
    assert!(same(&got.0, &want.0) && all, "got {got:?}\nwant {want:?}");
}

pub(super) fn warm(seed: u64) -> SlotParams {
    SlotParams { temperature: 0.8, seed, ..SlotParams::greedy() }
}
