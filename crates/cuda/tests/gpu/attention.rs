//! The decoder's attention and its cache against the CPU backend: shapes, storage types, chunks, padding, long contexts.

use half::f16;
use spark_backend::{
    ActivationSpec, AttentionSpec, Backend, Dtype, KvDtype, KvSpec, SeqInput, StateSpec, StepInputs, StepKey,
    TokenInput,
};
use spark_cpu::{CpuBackend, E4M3_MAX, e4m3_bits};
use spark_cuda::{AttendArgs, KvCache, Pool, StepView, Tensor};
use spark_testing::{Random, rel_err, tolerance};

use super::{Bed, cpu, cpu_tensor};

const EPS: f32 = 1e-6;

/// Heads and cache of a test.
#[derive(Debug, Clone, Copy)]
struct Case {
    num_heads: usize,
    kv: KvSpec,
    /// Sections of the rotary embedding.
    section: [usize; 3],
    rope_factor: f32,
}

impl Case {
    fn new(head_dim: usize, num_kv_heads: usize, group: usize, dtype: KvDtype) -> Self {
        let kv = KvSpec { num_layers: 2, num_kv_heads, head_dim, block_size: 32, num_blocks: 64, dtype };
        let third = head_dim / 6;
        let section = [head_dim / 2 - 2 * third, third, third];
        Self { num_heads: num_kv_heads * group, kv, section, rope_factor: 1.0 }
    }

    fn columns(&self) -> usize {
        (self.num_heads + 2 * self.kv.num_kv_heads) * self.kv.head_dim
    }

    fn inv_freq(&self) -> Vec<f32> {
        let half = self.kv.head_dim / 2;
        (0..half).map(|j| 1.0 / 5e6f32.powf(j as f32 / half as f32)).collect()
    }
}

/// Sequences that grow on both devices alike.
struct Both {
    case: Case,
    bed: Bed,
    cpu: CpuBackend,
    cache: KvCache,
    pool: Pool,
    norms: [Vec<f32>; 2],
    random: Random,
    /// Tokens stored, and blocks in a random order.
    seqs: Vec<(usize, Vec<u32>)>,
    /// All rows so far: the GPU's, the CPU's.
    rows: [Vec<f32>; 2],
}

impl Both {
    /// `num_seqs` sequences that share the blocks equally.
    fn new(case: Case, num_seqs: usize, seed: u64) -> Self {
        let (bed, mut random, mut backend) = (Bed::new(), Random::new(seed), cpu(Dtype::Bf16));
        let state = StateSpec {
            kv: case.kv,
            num_slots: num_seqs,
            max_num_tokens: 1 << 17,
            vocab_size: 8,
            max_blocks_per_seq: case.kv.num_blocks,
            encoder_cache_bytes: 0,
            activations: ActivationSpec::default(),
        };
        backend.allocate_state(state).unwrap();
        let slice = bed.bytes(KvCache::num_bytes(&case.kv).unwrap());
        let cache = KvCache::new(&bed.stream, &slice, case.kv).unwrap();
        let pool = Pool::new(&bed.bytes(64 << 20));
        let mut blocks: Vec<u32> = (0..case.kv.num_blocks as u32).collect();
        (1..blocks.len()).rev().for_each(|i| blocks.swap(i, random.below(i + 1)));
        let seqs = blocks
            .chunks(case.kv.num_blocks / num_seqs)
            .take(num_seqs)
            .map(|own| (0, own.to_vec()))
            .collect();
        let norms =
            [(); 2].map(|()| random.bf16s(case.kv.head_dim, 1.0).iter().map(|w| 1.0 + 0.2 * w).collect());
        let norms =
            norms.map(|norm: Vec<f32>| norm.iter().map(|&w| half::bf16::from_f32(w).to_f32()).collect());
        Self { case, bed, cpu: backend, cache, pool, norms, random, seqs, rows: Default::default() }
    }

    /// A step in which the sequences of `parts` get so many tokens more.
    fn inputs(&mut self, parts: &[(usize, usize)]) -> StepInputs {
        let mut inputs = StepInputs::default();
        for &(slot, query_len) in parts {
            let (stored, blocks) = &mut self.seqs[slot];
            let query_start = inputs.tokens.len();
            for position in *stored..*stored + query_len {
                let block_size = self.case.kv.block_size;
                let block = u64::from(blocks[position / block_size]);
                inputs.slot_mapping.push(block * block_size as u64 + (position % block_size) as u64);
                // Three different axes, as inside an image.
                inputs.positions.push([position as u32, position as u32 / 3 + 7, position as u32 * 2]);
                inputs.tokens.push(TokenInput::Known(0));
            }
            *stored += query_len;
            let needed = stored.div_ceil(self.case.kv.block_size);
            let block_table = blocks[..needed].to_vec();
            inputs.seqs.push(SeqInput { slot, query_start, query_len, context_len: *stored, block_table });
        }
        inputs.logit_rows =
            inputs.seqs.iter().map(|seq| (seq.query_start + seq.query_len - 1) as u32).collect();
        inputs.sample_slots = vec![None; inputs.logit_rows.len()];
        inputs.prompt_targets = vec![None; inputs.logit_rows.len()];
        inputs
    }

    fn qkv(&mut self, rows: usize) -> Vec<f32> {
        self.random.bf16s(rows * self.case.columns(), 1.5)
    }

    fn on_cpu(&mut self, inputs: &StepInputs, layer: usize, qkv: &[f32]) -> Vec<f32> {
        let case = self.case;
        let rows = inputs.tokens.len();
        let inv_freq = case.inv_freq();
        let [q_norm, k_norm] = [0, 1].map(|i| cpu_tensor(&self.cpu, &self.norms[i], [1, case.kv.head_dim]));
        let qkv = cpu_tensor(&self.cpu, qkv, [rows, case.columns()]);
        let spec = AttentionSpec {
            q_norm: &q_norm,
            k_norm: &k_norm,
            eps: EPS,
            num_heads: case.num_heads,
            num_kv_heads: case.kv.num_kv_heads,
            head_dim: case.kv.head_dim,
            inv_freq: &inv_freq,
            rope_factor: case.rope_factor,
            mrope_section: case.section,
        };
        let mut out = Vec::new();
        self.cpu
            .step(inputs, &mut |backend| {
                out = backend.attend(&qkv, layer, &spec)?.values().to_vec();
                Ok(())
            })
            .unwrap();
        self.cpu.output().unwrap();
        out
    }

    /// The rows of a step padded to `key`.
    fn on_gpu(&self, inputs: &StepInputs, key: StepKey, layer: usize, qkv: &[f32]) -> Vec<f32> {
        let (case, bed) = (self.case, &self.bed);
        let step_bytes = bed.bytes(1 << 20);
        let step = StepView::upload(&bed.stream, &step_bytes, inputs, key, 8).unwrap();
        let mut padded = qkv.to_vec();
        padded.resize(key.num_tokens * case.columns(), f32::NAN);
        let qkv = bed.tensor(&padded, [key.num_tokens, case.columns()], Dtype::Bf16);
        let out = bed.empty([key.num_tokens, case.num_heads * case.kv.head_dim], Dtype::Bf16);
        let [q_norm, k_norm] = [0, 1].map(|i| bed.tensor(&self.norms[i], [1, case.kv.head_dim], Dtype::Bf16));
        let inv_freq = case.inv_freq();
        let args = AttendArgs {
            layer,
            q_norm: &q_norm,
            k_norm: &k_norm,
            eps: EPS,
            num_heads: case.num_heads,
            num_kv_heads: case.kv.num_kv_heads,
            head_dim: case.kv.head_dim,
            inv_freq: &inv_freq,
            rope_factor: case.rope_factor,
            mrope_section: case.section,
            kv: &self.cache,
            step: &step,
        };
        bed.kernels.attend(&bed.stream, &self.pool, &qkv, &args, &out).unwrap();
        bed.values(&out)
    }

    /// One step on both, with `extra` rows and sequences of padding. No row may be far off; how far they are is for
    /// [`Both::check`].
    fn step(&mut self, parts: &[(usize, usize)], extra: usize) {
        let inputs = self.inputs(parts);
        let qkv = self.qkv(inputs.tokens.len());
        let want = self.on_cpu(&inputs, 1, &qkv);
        let real = inputs.key();
        let key = StepKey {
            num_tokens: real.num_tokens + extra,
            num_seqs: real.num_seqs + extra,
            num_logit_rows: real.num_logit_rows + extra,
        };
        let mut got = self.on_gpu(&inputs, key, 1, &qkv);
        let padding = got.split_off(want.len());
        assert!(padding.iter().all(|&value| value == 0.0), "{:?} {parts:?}: padding rows", self.case);
        let position = self.seqs[parts[0].0].0;
        expect_close(&got, &want, f64::INFINITY, &format!("{:?} {parts:?} up to {position}", self.case));
        self.rows[0].extend(got);
        self.rows[1].extend(want);
    }

    /// All rows together within the tolerance of a kernel: in a single row of few keys, weights rounded to bf16 may come out
    /// worse.
    fn check(&self) {
        let what = format!("{:?}, all {} rows", self.case, self.seqs.iter().map(|seq| seq.0).sum::<usize>());
        expect_close(&self.rows[0], &self.rows[1], tolerance::KERNEL_BF16, &what);
    }
}

/// `rel_err` within `tolerance` as a whole, and within four times that of a kernel in every 32 numbers: no small part may be wrong.
fn expect_close(got: &[f32], want: &[f32], tolerance: f64, what: &str) {
    let error = rel_err(got, want);
    let worst = got.chunks(32).zip(want.chunks(32)).map(|(a, b)| rel_err(a, b)).enumerate();
    let (at, most) = worst.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0));
    if error <= tolerance && most < 4.0 * tolerance::KERNEL_BF16 {
        return;
    }
    let far = (0..want.len()).filter(|&i| is_far(got[i], want[i]));
    let wrong: Vec<_> = far.take(8).map(|i| (i, got[i], want[i])).collect();
    panic!(
        "{what}: error {error}, in 32 numbers from {} on {most}; first {wrong:?} (index, got, want)",
        32 * at
    );
}

/// More than two roundings to bf16 apart, or no number.
pub(super) fn is_far(got: f32, want: f32) -> bool {
    let difference = (got - want).abs();
    difference.is_nan() || difference > 0.02 * want.abs() + 0.01
}

const DTYPES: [KvDtype; 2] = [KvDtype::Bf16, KvDtype::Fp8];

#[test]
fn decode_is_the_cpu_backends() {
    for dtype in DTYPES {
        for (i, (head_dim, kv_heads, group)) in
            [(32, 1, 1), (32, 2, 4), (64, 2, 2), (64, 1, 7), (128, 4, 8), (128, 1, 16), (128, 2, 1)]
                .into_iter()
                .enumerate()
        {
            let mut both = Both::new(Case::new(head_dim, kv_heads, group, dtype), 2, 10 + i as u64);
            // From the first token on: chunks of 16, blocks of 32, parts of 64.
            for _ in 0..67 {
                both.step(&[(0, 1)], 0);
            }
            both.check();
        }
    }
}

#[test]
fn prefill_is_the_cpu_backends() {
    for dtype in DTYPES {
        for (i, (head_dim, kv_heads, group, len)) in [
            (32, 1, 1, 200),
            (32, 2, 4, 33),
            (64, 2, 2, 129),
            (64, 1, 7, 65),
            (128, 4, 8, 300),
            (128, 1, 16, 77),
            (128, 2, 1, 2),
            (128, 2, 3, 131),
        ]
        .into_iter()
        .enumerate()
        {
            let mut both = Both::new(Case::new(head_dim, kv_heads, group, dtype), 1, 30 + i as u64);
            both.step(&[(0, len)], 0);
            both.check();
        }
    }
}

#[test]
fn chunks_and_decodes_in_one_step_are_the_cpu_backends() {
    for dtype in DTYPES {
        for (head_dim, kv_heads, group) in [(32, 2, 2), (64, 1, 4), (128, 2, 8)] {
            let mut case = Case::new(head_dim, kv_heads, group, dtype);
            case.kv.num_blocks = 80;
            case.rope_factor = 1.25;
            let mut both = Both::new(case, 5, 50);
            both.step(&[(0, 150), (1, 1), (2, 40)], 0);
            both.step(&[(1, 1), (0, 70), (3, 17), (2, 1)], 0);
            both.step(&[(0, 1), (1, 1), (2, 1), (3, 1)], 0);
            both.step(&[(4, 2), (3, 100), (0, 64), (1, 130), (2, 1)], 0);
            // Padding in a decode step and in a mixed one.
            both.step(&[(2, 1), (0, 1), (4, 1)], 5);
            both.step(&[(2, 3), (0, 1), (4, 5)], 7);
            both.check();
        }
    }
}

#[test]
fn blocks_of_other_sizes_are_read_where_they_are() {
    for (block_size, dtype) in
        [(16, KvDtype::Bf16), (16, KvDtype::Fp8), (48, KvDtype::Fp8), (272, KvDtype::Bf16)]
    {
        let mut case = Case::new(64, 2, 4, dtype);
        case.kv.block_size = block_size;
        case.kv.num_blocks = 2400 / block_size;
        let mut both = Both::new(case, 2, 60);
        both.step(&[(0, 333), (1, 500)], 0);
        both.step(&[(0, 1), (1, 1)], 0);
        both.step(&[(0, 90), (1, 1)], 0);
        both.check();
    }
}

#[test]
fn a_chunked_prompt_and_decoded_tokens_equal_the_whole_prompt() {
    for dtype in DTYPES {
        let case = Case::new(128, 2, 8, dtype);
        let rows_of = |parts: &[usize]| {
            let mut both = Both::new(case, 1, 70);
            let len: usize = parts.iter().sum();
            let qkv = Random::new(71).bf16s(len * case.columns(), 1.5);
            let mut out = Vec::new();
            for &part in parts {
                let start = out.len() / (case.num_heads * 128);
                let inputs = both.inputs(&[(0, part)]);
                let rows = &qkv[start * case.columns()..(start + part) * case.columns()];
                out.extend(both.on_gpu(&inputs, inputs.key(), 0, rows));
            }
            out
        };
        let whole = rows_of(&[400]);
        let cut = rows_of(&[100, 1, 64, 1, 1, 33, 128, 72]);
        expect_close(&cut, &whole, tolerance::KERNEL_BF16, "chunks");
        let decoded = rows_of(&[vec![380], vec![1; 20]].concat());
        expect_close(&decoded, &whole, tolerance::KERNEL_BF16, "decoded tokens");
        assert_eq!(rows_of(&[400]), whole, "the same bits again");
        assert_eq!(rows_of(&[100, 1, 64, 1, 1, 33, 128, 72]), cut, "the same bits again");
    }
}

#[test]
fn long_contexts_are_the_cpu_backends() {
    for dtype in DTYPES {
        let mut case = Case::new(128, 1, 4, dtype);
        case.kv = KvSpec { num_layers: 2, num_blocks: 1300, ..case.kv };
        let mut both = Both::new(case, 1, 80);
        // Stored in chunks on both sides; the CPU backend takes the quadratic time of the last chunk only.
        let len = 40_000;
        let inputs = both.inputs(&[(0, len)]);
        // What the cache holds does not need attention: prepare alone, by sequences of their own for each chunk.
        let qkv = both.qkv(len);
        for start in (0..len).step_by(400) {
            let chunk = StepInputs {
                tokens: inputs.tokens[start..start + 400].to_vec(),
                positions: inputs.positions[start..start + 400].to_vec(),
                slot_mapping: inputs.slot_mapping[start..start + 400].to_vec(),
                seqs: vec![SeqInput {
                    slot: 0,
                    query_start: 0,
                    query_len: 400,
                    context_len: 400,
                    block_table: inputs.seqs[0].block_table[..13].to_vec(),
                }],
                ..Default::default()
            };
            let rows = &qkv[start * case.columns()..][..400 * case.columns()];
            // Wrong attention over stored tokens, the same on both: only what is stored counts here.
            both.on_cpu(&chunk, 1, rows);
            both.on_gpu(&chunk, chunk.key(), 1, rows);
        }
        both.step(&[(0, 1)], 0);
        both.step(&[(0, 1)], 3);
        both.step(&[(0, 20)], 0);
        both.step(&[(0, 1)], 0);
        both.check();
    }
}

/// K of every token by the formulas, as bf16 and as FP8: the bytes of the cache.
#[test]
fn the_cache_holds_what_the_cpu_backend_stores() {
    let mut case = Case::new(64, 2, 2, KvDtype::Fp8);
    // Positions 0 alone turn nothing; the angles' own test is the comparison of results.
    case.section = [32, 0, 0];
    for dtype in DTYPES {
        case.kv.dtype = dtype;
        let mut both = Both::new(case, 2, 90);
        let (prompt, decodes) = (45, 5);
        let mut rows = Vec::new();
        for part in std::iter::once(prompt).chain([1; 5]) {
            let mut inputs = both.inputs(&[(0, part)]);
            inputs.positions.iter_mut().for_each(|position| *position = [0; 3]);
            let qkv = both.qkv(part);
            both.on_gpu(&inputs, inputs.key(), 1, &qkv);
            rows.extend(qkv);
        }
        let bytes: Vec<u8> =
            both.bed.stream.download(both.cache.slice(), both.cache.slice().num_bytes() as usize).unwrap();
        let (kv, columns, d) = (case.kv, case.columns(), 64);
        let mut different = 0;
        for token in 0..prompt + decodes {
            for (half, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let start = token * columns + (case.num_heads + half * kv.num_kv_heads + head) * d;
                let mut vector = rows[start..start + d].to_vec();
                if half == 0 {
                    norm(&mut vector, &both.norms[1]);
                }
                let block = both.seqs[0].1[token / 32] as usize;
                let index = (((kv.num_blocks + block) * kv.num_kv_heads + head) * 2 + half) * 32 + token % 32;
                if dtype == KvDtype::Bf16 {
                    let stored: Vec<f32> = (0..d)
                        .map(|i| {
                            let at = 2 * (index * d + i);
                            half::bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
                        })
                        .collect();
                    different += stored.iter().zip(&vector).filter(|(a, b)| a != b).count();
                    continue;
                }
                let amax = vector.iter().fold(0.0f32, |amax, value| amax.max(value.abs()));
                let scale = f16::from_f32(amax / E4M3_MAX);
                let scales = 2 * kv.num_blocks * kv.num_kv_heads * 2 * 32 * d;
                let at = scales + 2 * index;
                let stored = f16::from_le_bytes([bytes[at], bytes[at + 1]]);
                assert_eq!(stored, scale, "scale of token {token}, half {half}, head {head}");
                different +=
                    (0..d).filter(|&i| bytes[index * d + i] != e4m3_bits(vector[i] / scale.to_f32())).count();
            }
        }
        // The mean square is added in another order: a few numbers may be rounded the other way. V is equal.
        let total = (prompt + decodes) * 4 * d;
        assert!(different * 1000 <= total, "{dtype:?}: {different} of {total} numbers differ");
    }
}

/// RMSNorm as the CPU backend rounds it.
fn norm(vector: &mut [f32], weight: &[f32]) {
    let rounded = |x: f32| half::bf16::from_f32(x).to_f32();
    let mean = vector.iter().map(|x| x * x).sum::<f32>() / vector.len() as f32;
    let factor = 1.0 / (mean + EPS).sqrt();
    vector.iter_mut().zip(weight).for_each(|(x, w)| *x = rounded(rounded(*x * factor) * w));
}

/// Most numbers of V are tiny beside the largest: subnormal in e4m3.
#[test]
fn subnormal_values_of_an_fp8_cache_count() {
    for parts in [vec![(0, 40)], vec![(0, 1)]] {
        let case = Case::new(64, 1, 2, KvDtype::Fp8);
        let mut both = Both::new(case, 1, 95);
        let inputs = both.inputs(&parts);
        let rows = inputs.tokens.len();
        let mut qkv = both.qkv(rows);
        for row in qkv.chunks_mut(case.columns()) {
            let v = &mut row[3 * 64..];
            v.iter_mut().for_each(|value| *value *= 1.0 / 256.0);
            v[0] = 4.0;
        }
        let want = both.on_cpu(&inputs, 0, &qkv);
        let got = both.on_gpu(&inputs, inputs.key(), 0, &qkv);
        for (got, want) in got.chunks(64).zip(want.chunks(64)) {
            expect_close(&got[1..], &want[1..], f64::INFINITY, "small values");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_before_the_launch() {
    let case = Case::new(64, 2, 2, KvDtype::Bf16);
    let mut both = Both::new(case, 1, 99);
    let inputs = both.inputs(&[(0, 3)]);
    let bed = Bed::new();
    let step = StepView::upload(&bed.stream, &bed.bytes(1 << 16), &inputs, inputs.key(), 8).unwrap();
    let norm = bed.empty([1, 64], Dtype::Bf16);
    let inv_freq = case.inv_freq();
    let args = AttendArgs {
        layer: 1,
        q_norm: &norm,
        k_norm: &norm,
        eps: EPS,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 64,
        inv_freq: &inv_freq,
        rope_factor: 1.0,
        mrope_section: case.section,
        kv: &both.cache,
        step: &step,
    };
    let (qkv, out) = (bed.empty([3, 512], Dtype::Bf16), bed.empty([3, 256], Dtype::Bf16));
    let attend = |args: &AttendArgs<'_>, qkv: &Tensor, out: &Tensor| {
        let result = bed.kernels.attend(&bed.stream, &both.pool, qkv, args, out);
        result.map_err(|error| error.to_string())
    };
    attend(&args, &qkv, &out).unwrap();
    let long = vec![1.0; 64];
    for (wrong, part) in [
        (AttendArgs { layer: 2, ..args }, "layer, kv heads"),
        (AttendArgs { num_heads: 5, ..args }, "1 to 16 heads"),
        (AttendArgs { num_heads: 34, ..args }, "1 to 16 heads"),
        (AttendArgs { inv_freq: &long, ..args }, "32 inverse frequencies"),
        (AttendArgs { mrope_section: [0, 33, 0], ..args }, "at most 32"),
    ] {
        let error = attend(&wrong, &qkv, &out).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    assert!(attend(&args, &bed.empty([3, 256], Dtype::Bf16), &out).is_err());
    assert!(attend(&args, &qkv, &bed.empty([2, 256], Dtype::Bf16)).is_err());
    assert!(attend(&args, &qkv, &qkv).is_err());
    bed.stream.synchronize().unwrap();
}

/// Not a bound on speed, which is the reader's.
#[test]
fn measurements_of_attention() {
    let gpu = super::gpu();
    let report = spark_cuda::bench_attention::run(&gpu.device, &gpu.kernels).unwrap();
    println!("{report}");
    assert!(report.timings.iter().all(|timing| timing.micros > 0.0), "{report}");
}

/// What an FP8 cache costs: the results of the same rows over both caches, as a share of what they are over bf16.
#[test]
fn measurements_of_an_fp8_cache() {
    println!(
        "attention over an FP8 cache against bf16, head_dim 128, 8 query heads, 2 kv heads: relative difference"
    );
    for (context, outlier) in [(64, 1.0), (300, 1.0), (2048, 1.0), (2048, 16.0), (16_384, 1.0)] {
        let results = [KvDtype::Bf16, KvDtype::Fp8].map(|dtype| {
            let mut case = Case::new(128, 2, 4, dtype);
            case.kv.num_blocks = 1024;
            // Equal seeds: equal weights, rows and blocks.
            let mut both = Both::new(case, 1, 77);
            let mut rows = |count: usize| {
                let inputs = both.inputs(&[(0, count)]);
                let mut qkv = both.qkv(count);
                // Of every vector one number is larger, as in real models.
                qkv.chunks_exact_mut(128).for_each(|vector| vector[5] *= outlier);
                both.on_gpu(&inputs, inputs.key(), 1, &qkv)
            };
            [rows(context - 1), rows(1)]
        });
        let [[prompt, row], [prompt_fp8, row_fp8]] = results;
        let (prompt, row) = (rel_err(&prompt_fp8, &prompt), rel_err(&row_fp8, &row));
        println!(
            "context {context:6}, one number of 128 {outlier:2} times as large: prompt {prompt:.5}, last row {row:.5}"
        );
        assert!(prompt < 0.06 && row < 0.06, "{context}: {prompt} {row}");
    }
}
