//! Softmax attention: the loop over keys shared by decoder and encoder, and the decoder's `attend`. K and V come from
//! `kv.rs` as they are stored, or from the encoder's rows.

use crate::CpuBackend;
use crate::dot::{LANES, accumulate, sum_by};
use crate::kv::{KvPool, PagedKeyValues};
use crate::math::exp;
use crate::norm::rms_norm_row;
use crate::rope::Angles;
use crate::tensor::{Compute, CpuTensor};
use pulp::{Simd, WithSimd};
use spark_backend::{AttentionSpec, Error, Result, SeqInput, StepInputs};

/// Keys that pass through the softmax together. Blocks start at multiples of this position in the sequence, whatever
/// the cache's block size, so that a query adds up its keys in one order however the sequence was cut into steps.
pub(crate) const KEY_BLOCK: usize = 32;

/// Queries (rows times heads of a group) of one parallel task: K and V are converted once for all of them.
const TILE: usize = 256;

/// Where keys and values come from.
pub(crate) trait KeyValues: Sync {
    /// Keys `first..first + count` (`count <= KEY_BLOCK`) transposed into `keys`, `[head_dim, KEY_BLOCK]`, and their
    /// values into `values`, `[KEY_BLOCK, head_dim padded to 16]`.
    fn load(&self, first: usize, count: usize, keys: &mut [f32], values: &mut [f32]);
}

/// Some queries over the same keys.
pub(crate) struct Tile<'a, K> {
    /// `[rows, head_dim]`.
    pub(crate) queries: &'a [f32],
    /// `[rows]` how many keys each query sees, from the first.
    pub(crate) limits: &'a [usize],
    pub(crate) source: &'a K,
    pub(crate) head_dim: usize,
}

impl<K: KeyValues> WithSimd for Tile<'_, K> {
    /// `[rows, head_dim padded to 16]`, float32.
    type Output = Vec<f32>;

    /// Online softmax (Milakov and Gimelshein 2018): a running maximum and sum per query, results rescaled whenever the
    /// maximum grows. A block without visible keys leaves a query's numbers as they are.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let rows = self.limits.len();
        let width = self.head_dim.next_multiple_of(LANES);
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let mut keys = vec![0.0; self.head_dim * KEY_BLOCK];
        let mut values = vec![0.0; KEY_BLOCK * width];
        let mut scores = vec![0.0; rows * KEY_BLOCK];
        let mut out = vec![0.0; rows * width];
        let mut maxima = vec![f32::NEG_INFINITY; rows];
        let mut sums = vec![0.0f32; rows];
        let last = self.limits.iter().copied().max().unwrap_or(0);
        for first in (0..last).step_by(KEY_BLOCK) {
            let count = KEY_BLOCK.min(last - first);
            self.source.load(first, count, &mut keys, &mut values);
            scores.fill(0.0);
            accumulate(simd, self.queries, self.head_dim, &keys, KEY_BLOCK, &mut scores);
            for (row, scores) in scores.chunks_exact_mut(KEY_BLOCK).enumerate() {
                let seen = self.limits[row].saturating_sub(first).min(KEY_BLOCK);
                let out = &mut out[row * width..][..width];
                softmax_block(scores, seen, scale, &mut maxima[row], &mut sums[row], out);
            }
            // Keys past `count` have probability 0, and their values are 0 or those of the block before: finite.
            accumulate(simd, &scores, KEY_BLOCK, &values, width, &mut out);
        }
        for (out, &sum) in out.chunks_exact_mut(width).zip(&sums) {
            let factor = if sum > 0.0 { 1.0 / sum } else { 0.0 };
            out.iter_mut().for_each(|value| *value *= factor);
        }
        out
    }
}

/// Turns one query's scores of a block into unnormalised probabilities, and rescales what it has so far.
#[inline(always)]
fn softmax_block(
    scores: &mut [f32],
    seen: usize,
    scale: f32,
    maximum: &mut f32,
    sum: &mut f32,
    out: &mut [f32],
) {
    scores[seen..].fill(f32::NEG_INFINITY);
    if seen == 0 {
        scores.fill(0.0);
        return;
    }
    let mut highest = *maximum;
    for score in scores.iter_mut() {
        *score *= scale;
        highest = if *score > highest { *score } else { highest };
    }
    let correction = exp(*maximum - highest);
    scores.iter_mut().for_each(|score| *score = exp(*score - highest));
    *sum = sum.mul_add(correction, sum_by(scores, |p| p));
    *maximum = highest;
    if correction != 1.0 {
        out.iter_mut().for_each(|value| *value *= correction);
    }
}

/// The decoder's attention over the step's sequences; see [`spark_backend::Backend::attend`].
pub(crate) fn attend(
    compute: &Compute,
    pool: &mut KvPool,
    inputs: &StepInputs,
    qkv: &CpuTensor,
    layer: usize,
    spec: &AttentionSpec<'_, CpuBackend>,
) -> Result<CpuTensor> {
    check(pool, inputs, qkv, layer, spec)?;
    let (heads, kv_heads, head_dim) = (spec.num_heads, spec.num_kv_heads, spec.head_dim);
    let angles = Angles::mrope(&inputs.positions, spec.inv_freq, spec.rope_factor, spec.mrope_section)?;
    let columns = qkv.columns();
    let mut rotated = qkv.values.clone();
    let work = 16 * rotated.len();
    compute.for_chunks(&mut rotated, columns, work, |row, values| {
        compute.arch.dispatch(
            #[inline(always)]
            || {
                let (q, rest) = values.split_at_mut(heads * head_dim);
                let k = &mut rest[..kv_heads * head_dim];
                for (part, weight) in [(q, spec.q_norm), (k, spec.k_norm)] {
                    for head in part.chunks_exact_mut(head_dim) {
                        rms_norm_row(compute, head, &weight.values, spec.eps);
                        angles.rotate(row, head);
                        head.iter_mut().for_each(|x| *x = compute.rounded(*x));
                    }
                }
            },
        );
    });
    for (row, &slot) in rotated.chunks_exact(columns).zip(&inputs.slot_mapping) {
        let kv = row[heads * head_dim..].chunks_exact(head_dim).enumerate();
        kv.for_each(|(i, values)| pool.write(layer, slot as usize, i % kv_heads, i / kv_heads, values));
    }
    let mut out = vec![0.0; qkv.rows() * heads * head_dim];
    run_tiles(compute, pool, inputs, &rotated, layer, spec, &mut out);
    compute.round(&mut out);
    Ok(CpuTensor::new(out, [qkv.rows(), heads * head_dim]))
}

/// Some rows of one sequence and one KV head: a parallel task.
struct Task<'a> {
    seq: &'a SeqInput,
    /// First row within the step.
    row: usize,
    rows: usize,
    kv_head: usize,
}

fn run_tiles(
    compute: &Compute,
    pool: &KvPool,
    inputs: &StepInputs,
    rotated: &[f32],
    layer: usize,
    spec: &AttentionSpec<'_, CpuBackend>,
    out: &mut [f32],
) {
    let head_dim = spec.head_dim;
    let group = spec.num_heads / spec.num_kv_heads;
    let columns = (spec.num_heads + 2 * spec.num_kv_heads) * head_dim;
    let tile = (TILE / group).max(1);
    let mut tasks = Vec::new();
    let mut work = 0;
    for seq in &inputs.seqs {
        work += seq.query_len * seq.context_len * spec.num_heads * head_dim;
        for start in (0..seq.query_len).step_by(tile) {
            let rows = tile.min(seq.query_len - start);
            let row = seq.query_start + start;
            tasks.extend((0..spec.num_kv_heads).map(|kv_head| Task { seq, row, rows, kv_head }));
        }
    }
    let results = compute.map(&tasks, work, |task| {
        let mut queries = Vec::with_capacity(task.rows * group * head_dim);
        let mut limits = Vec::with_capacity(task.rows * group);
        for row in task.row..task.row + task.rows {
            let q = &rotated[row * columns + task.kv_head * group * head_dim..][..group * head_dim];
            queries.extend_from_slice(q);
            let position = task.seq.context_len - task.seq.query_len + row - task.seq.query_start;
            limits.extend(std::iter::repeat_n(position + 1, group));
        }
        let source = PagedKeyValues { pool, layer, head: task.kv_head, seq: task.seq };
        compute.arch.dispatch(Tile { queries: &queries, limits: &limits, source: &source, head_dim })
    });
    let width = head_dim.next_multiple_of(LANES);
    for (task, result) in tasks.iter().zip(results) {
        for (i, values) in result.chunks_exact(width).enumerate() {
            let (row, head) = (task.row + i / group, task.kv_head * group + i % group);
            out[(row * spec.num_heads + head) * head_dim..][..head_dim].copy_from_slice(&values[..head_dim]);
        }
    }
}

/// Everything that later indexing relies on.
fn check(
    pool: &KvPool,
    inputs: &StepInputs,
    qkv: &CpuTensor,
    layer: usize,
    spec: &AttentionSpec<'_, CpuBackend>,
) -> Result<()> {
    let (kv, head_dim) = (&pool.spec, spec.head_dim);
    let tokens = inputs.tokens.len();
    if [spec.num_kv_heads, head_dim] != [kv.num_kv_heads, kv.head_dim] || layer >= kv.num_layers {
        return Err(Error::shape("attend cache", kv, (layer, spec.num_kv_heads, head_dim)));
    }
    if spec.num_heads == 0 || !spec.num_heads.is_multiple_of(spec.num_kv_heads) {
        return Err(Error::shape(
            "attend heads",
            format!("a multiple of {}", spec.num_kv_heads),
            spec.num_heads,
        ));
    }
    if spec.inv_freq.len() * 2 != head_dim {
        return Err(Error::shape("attend inv_freq", head_dim / 2, spec.inv_freq.len()));
    }
    qkv.expect("attend qkv", [tokens, (spec.num_heads + 2 * spec.num_kv_heads) * head_dim])?;
    spec.q_norm.expect("attend q_norm", [1, head_dim])?;
    spec.k_norm.expect("attend k_norm", [1, head_dim])?;
    if [inputs.positions.len(), inputs.slot_mapping.len()] != [tokens, tokens] {
        let got = [inputs.positions.len(), inputs.slot_mapping.len()];
        return Err(Error::shape("attend positions and slot_mapping", [tokens, tokens], got));
    }
    let slots = kv.num_blocks * kv.block_size;
    if let Some(slot) = inputs.slot_mapping.iter().find(|&&slot| slot >= slots as u64) {
        return Err(Error::shape("attend slot_mapping", format!("under {slots}"), slot));
    }
    for seq in &inputs.seqs {
        let fits = seq.query_start.checked_add(seq.query_len).is_some_and(|end| end <= tokens)
            && seq.query_len <= seq.context_len
            && seq.context_len.div_ceil(kv.block_size) <= seq.block_table.len()
            && seq.block_table.iter().all(|&block| (block as usize) < kv.num_blocks);
        if !fits {
            return Err(Error::shape(
                "attend sequence",
                format!("{tokens} tokens, {} blocks", kv.num_blocks),
                seq,
            ));
        }
    }
    Ok(())
}
