//! Times of attention at the shapes of the published models: decode over the cache by bytes a second, prompts and the vision
//! encoder by operations a second. The graphs are those of `bench.rs`.
//!
//! Decode goes through as many layers as it takes to leave the second-level cache, as a model does whose weights are read
//! in between. Prompts store random K and V before they read them.

use half::bf16;
use spark_backend::{Dtype, KvDtype, KvSpec, SeqInput, StepInputs, TokenInput, VisionSpec};

use crate::bench::Bench;
use crate::{
    Arena, ArenaPlan, AttendArgs, Device, DeviceSlice, Kernels, KvCache, Pool, Result, StepLimits, StepView,
    Stream, Tensor,
};

/// One measurement.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionTiming {
    /// The kernel and how K and V are stored.
    pub name: &'static str,
    /// Its shape, for people.
    pub shape: String,
    /// Median time of a call.
    pub micros: f64,
    /// Multiplications and additions of both products, of the pairs that see each other.
    pub num_operations: f64,
    /// Bytes of K and V that must be read; 0 where they are not the bound.
    pub num_bytes: u64,
}

/// All measurements of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionReport {
    /// Bytes a second of a plain copy, reads and writes counted, in units of 1e9.
    pub copy_gb_per_second: f64,
    /// The kernels.
    pub timings: Vec<AttentionTiming>,
}

impl std::fmt::Display for AttentionReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:14} {:34} {:>10} {:>8} {:>9} {:>9}",
            "attention", "shape", "us", "TFLOPS", "GB/s", "% of copy"
        )?;
        for timing in &self.timings {
            let tera = timing.num_operations / timing.micros / 1e6;
            let speed = timing.num_bytes as f64 / timing.micros / 1e3;
            let share = 100.0 * speed / self.copy_gb_per_second;
            let AttentionTiming { name, shape, micros, .. } = timing;
            writeln!(f, "{name:14} {shape:34} {micros:>10.2} {tera:>8.1} {speed:>9.1} {share:>9.1}")?;
        }
        Ok(())
    }
}

/// Query heads and kv heads: the 30B, and half of the 235B on one of two GPUs.
const HEADS: [[usize; 2]; 2] = [[32, 4], [32, 2]];
const HEAD_DIM: usize = 128;
const BLOCK_SIZE: usize = 32;
/// Sequences and their context.
const DECODES: [[usize; 2]; 9] =
    [[1, 300], [1, 4096], [1, 32_768], [4, 1024], [8, 4096], [8, 32_768], [32, 2048], [64, 1024], [128, 512]];
/// Sequences, their new tokens, and those in the cache before.
const PROMPTS: [[usize; 3]; 5] = [[1, 512, 0], [1, 2048, 0], [1, 8192, 0], [16, 2048, 0], [1, 2048, 30_720]];
/// Images and their side in patches: the real tower's 256, 512 and 1024 pixels.
const IMAGES: [[usize; 2]; 5] = [[16, 16], [1, 32], [16, 32], [1, 64], [16, 64]];
/// Bytes that a graph of decode steps goes through at least.
const COLD_BYTES: u64 = 256 << 20;
const MAX_LAYERS: u64 = 384;
/// Launches of a graph of prompts.
const PROMPT_LAUNCHES: usize = 4;
/// A vocabulary for the step's data.
const VOCAB: usize = 32;

/// Measures on `device`.
///
/// # Errors
/// What launching says; [`crate::Error::Memory`] with less than about 3 GB free.
pub fn run(device: &Device, kernels: &Kernels) -> Result<AttentionReport> {
    let bench = Bench { stream: Stream::new(device)?, kernels };
    let mut timings = Vec::new();
    for dtype in [KvDtype::Fp8, KvDtype::Bf16] {
        for [seqs, context] in DECODES {
            timings.push(decode(&bench, HEADS[0], dtype, seqs, context)?);
        }
        for [seqs, context] in [[1, 4096], [8, 32_768]] {
            timings.push(decode(&bench, HEADS[1], dtype, seqs, context)?);
        }
        for [seqs, len, stored] in PROMPTS {
            timings.push(prompt(&bench, HEADS[0], dtype, seqs, [len, stored])?);
        }
    }
    for [count, side] in IMAGES {
        timings.push(vision(&bench, count, side)?);
    }
    Ok(AttentionReport { copy_gb_per_second: bench.copy()?.gb_per_second(), timings })
}

/// A cache, a step over it and the tensors of a layer.
struct Layer {
    cache: KvCache,
    step: StepView,
    pool: Pool,
    norm: Tensor,
    qkv: Tensor,
    out: Tensor,
    heads: [usize; 2],
    inv_freq: Vec<f32>,
}

impl Layer {
    /// `seqs` sequences that each get `len` tokens after `stored` others.
    fn new(
        bench: &Bench<'_>,
        heads: [usize; 2],
        kv: KvSpec,
        seqs: usize,
        [len, stored]: [usize; 2],
    ) -> Result<Self> {
        let inputs = step_inputs(seqs, len, stored);
        let (rows, columns) = (seqs * len, (heads[0] + 2 * heads[1]) * HEAD_DIM);
        let limits = StepLimits {
            max_num_tokens: rows,
            num_slots: seqs,
            max_logit_rows: seqs,
            max_blocks_per_seq: kv.num_blocks / seqs,
            vocab_size: VOCAB,
        };
        let pool_bytes = Kernels::attend_scratch_bytes(bench.device(), heads[0], heads[1], HEAD_DIM);
        let mut plan = ArenaPlan::default();
        let regions = [
            plan.add("cache", KvCache::num_bytes(&kv)?)?,
            plan.add("step", limits.num_bytes() as u64)?,
            plan.add("pool", pool_bytes)?,
            plan.add("norm", 2 * HEAD_DIM as u64)?,
            plan.add("qkv", 2 * (rows * columns) as u64)?,
            plan.add("out", 2 * (rows * heads[0] * HEAD_DIM) as u64)?,
        ];
        let arena = Arena::new(bench.device(), plan)?;
        let [cache, step, pool, norm, qkv, out] = regions.map(|region| arena.region(region));
        let (cache, step, norm, qkv, out) = (cache?, step?, norm?, qkv?, out?);
        // 0.01 in bf16, 1.5 in e4m3, 1.1 as a scale.
        bench.stream.fill(&cache, 0x3c)?;
        bench.stream.upload(&norm, &[bf16::ONE; HEAD_DIM])?;
        bench.stream.upload(&qkv, &arbitrary(rows * columns))?;
        let half = HEAD_DIM / 2;
        Ok(Self {
            cache: KvCache::new(&bench.stream, &cache, kv)?,
            step: StepView::upload(&bench.stream, &step, &inputs, inputs.key(), VOCAB)?,
            pool: Pool::new(&pool?),
            norm: Tensor::new(&norm, [1, HEAD_DIM], Dtype::Bf16)?,
            qkv: Tensor::new(&qkv, [rows, columns], Dtype::Bf16)?,
            out: Tensor::new(&out, [rows, heads[0] * HEAD_DIM], Dtype::Bf16)?,
            heads,
            inv_freq: (0..half).map(|j| 1.0 / 5e6f32.powf(j as f32 / half as f32)).collect(),
        })
    }

    fn attend(&self, bench: &Bench<'_>, layer: usize) -> Result<()> {
        let args = AttendArgs {
            layer,
            q_norm: &self.norm,
            k_norm: &self.norm,
            eps: 1e-6,
            num_heads: self.heads[0],
            num_kv_heads: self.heads[1],
            head_dim: HEAD_DIM,
            inv_freq: &self.inv_freq,
            rope_factor: 1.0,
            mrope_section: [24, 20, 20],
            kv: &self.cache,
            step: &self.step,
        };
        bench.kernels.attend(&bench.stream, &self.pool, &self.qkv, &args, &self.out)
    }
}

pub(crate) fn decode(
    bench: &Bench<'_>,
    heads: [usize; 2],
    dtype: KvDtype,
    seqs: usize,
    context: usize,
) -> Result<AttentionTiming> {
    let mut kv = spec(heads, dtype, seqs, context);
    let bytes_per_token = kv.bytes_per_token() as u64;
    let num_bytes = bytes_per_token * (seqs * context) as u64;
    kv.num_layers = COLD_BYTES.div_ceil(num_bytes).clamp(1, MAX_LAYERS) as usize;
    let layer = Layer::new(bench, heads, kv, seqs, [1, context - 1])?;
    let launches = kv.num_layers.max(8);
    let micros = bench.time(launches, |i| layer.attend(bench, i % kv.num_layers))?;
    Ok(AttentionTiming {
        name: if dtype == KvDtype::Fp8 { "decode fp8" } else { "decode bf16" },
        shape: format!("{seqs} x {context}, {}/{} heads", heads[0], heads[1]),
        micros,
        num_operations: 4.0 * (seqs * context * heads[0] * HEAD_DIM) as f64,
        num_bytes,
    })
}

fn prompt(
    bench: &Bench<'_>,
    heads: [usize; 2],
    dtype: KvDtype,
    seqs: usize,
    [len, stored]: [usize; 2],
) -> Result<AttentionTiming> {
    let layer = Layer::new(bench, heads, spec(heads, dtype, seqs, len + stored), seqs, [len, stored])?;
    let micros = bench.time(PROMPT_LAUNCHES, |_| layer.attend(bench, 0))?;
    // Row i of a sequence sees stored + i + 1 tokens.
    let pairs = (seqs * len) as f64 * (stored as f64 + (len + 1) as f64 / 2.0);
    Ok(AttentionTiming {
        name: if dtype == KvDtype::Fp8 { "prompt fp8" } else { "prompt bf16" },
        shape: format!("{seqs} x {len} after {stored}, {}/{} heads", heads[0], heads[1]),
        micros,
        num_operations: 4.0 * pairs * (heads[0] * HEAD_DIM) as f64,
        num_bytes: 0,
    })
}

fn vision(bench: &Bench<'_>, count: usize, side: usize) -> Result<AttentionTiming> {
    let spec = VisionSpec {
        num_heads: 16,
        hidden_size: 1152,
        patch_size: 16,
        temporal_patch_size: 2,
        merge_size: 2,
        image_mean: [0.5; 3],
        image_std: [0.5; 3],
    };
    let (rows, hidden) = (count * side * side, spec.hidden_size);
    let mut plan = ArenaPlan::default();
    let regions = [
        plan.add("qkv", 6 * (rows * hidden) as u64)?,
        plan.add("out", 2 * (rows * hidden) as u64)?,
        plan.add(
            "pool",
            Kernels::vision_attend_scratch_bytes(rows, spec.num_heads, hidden / spec.num_heads),
        )?,
    ];
    let arena = Arena::new(bench.device(), plan)?;
    let [qkv, out, pool] = regions.map(|region| arena.region(region));
    let (qkv, out): (DeviceSlice, DeviceSlice) = (qkv?, out?);
    bench.stream.upload(&qkv, &arbitrary(3 * rows * hidden))?;
    let pool = Pool::new(&pool?);
    let qkv = Tensor::new(&qkv, [rows, 3 * hidden], Dtype::Bf16)?;
    let out = Tensor::new(&out, [rows, hidden], Dtype::Bf16)?;
    let grids = vec![[1, side, side]; count];
    let micros = bench.time(PROMPT_LAUNCHES, |_| {
        bench.kernels.vision_attend_images(&bench.stream, &pool, &qkv, &grids, &spec, &out)
    })?;
    let frame = (side * side) as f64;
    Ok(AttentionTiming {
        name: "vision",
        shape: format!("{count} x {side}² patches, 16 x 72"),
        micros,
        num_operations: 4.0 * count as f64 * frame * frame * hidden as f64,
        num_bytes: 0,
    })
}

/// One layer with room for `seqs` contexts.
fn spec(heads: [usize; 2], dtype: KvDtype, seqs: usize, context: usize) -> KvSpec {
    KvSpec {
        num_layers: 1,
        num_kv_heads: heads[1],
        head_dim: HEAD_DIM,
        block_size: BLOCK_SIZE,
        num_blocks: seqs * context.div_ceil(BLOCK_SIZE),
        dtype,
    }
}

/// `seqs` sequences with `len` new tokens after `stored`; their blocks alternate.
fn step_inputs(seqs: usize, len: usize, stored: usize) -> StepInputs {
    let context_len = stored + len;
    let mut inputs = StepInputs::default();
    for slot in 0..seqs {
        let block_table: Vec<u32> =
            (0..context_len.div_ceil(BLOCK_SIZE)).map(|i| (i * seqs + slot) as u32).collect();
        let query_start = inputs.tokens.len();
        for position in stored..context_len {
            let block = block_table[position / BLOCK_SIZE] as usize;
            inputs.slot_mapping.push((block * BLOCK_SIZE + position % BLOCK_SIZE) as u64);
            inputs.positions.push([position as u32; 3]);
            inputs.tokens.push(TokenInput::Known(0));
        }
        inputs.logit_rows.push((inputs.tokens.len() - 1) as u32);
        inputs.sample_slots.push(None);
        inputs.prompt_targets.push(None);
        inputs.seqs.push(SeqInput { slot, query_start, query_len: len, context_len, block_table });
    }
    inputs
}

/// Numbers between -2 and 2, spread by a multiplicative hash.
fn arbitrary(len: usize) -> Vec<bf16> {
    (0..len as u32)
        .map(|i| bf16::from_f32((i.wrapping_mul(2_654_435_769) >> 16) as f32 / 16_384.0 - 2.0))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_its_rows_and_blocks() {
        let inputs = step_inputs(3, 2, 40);
        assert_eq!(inputs.key().num_tokens, 6);
        assert_eq!(inputs.seqs[1].block_table, [1, 4]);
        assert_eq!(inputs.slot_mapping, [3, 4, 5].map(|block| [32 * block + 8, 32 * block + 9]).concat());
        assert_eq!((inputs.seqs[2].query_start, inputs.seqs[2].context_len), (4, 42));
    }

    #[test]
    fn numbers_are_spread() {
        let numbers = arbitrary(4096);
        let mean = numbers.iter().map(|x| x.to_f32()).sum::<f32>() / 4096.0;
        assert!(mean.abs() < 0.01 && numbers.iter().all(|x| x.to_f32().abs() <= 2.0), "{mean}");
    }
}
