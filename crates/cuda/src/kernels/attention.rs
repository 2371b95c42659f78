//! Wrapper of `kernels/attention_decode.cu` and `kernels/attention_prefill.cu`: a decoder layer's attention over the step's
//! sequences.

use spark_backend::{Dtype, KvDtype, KvSpec};

use super::kv::MAX_SPLIT_PAIRS;
use super::{Kernels, KvCache, LoadedModule, disjoint, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{Device, DeviceSlice, Error, Pool, Result, StepView, Stream, Tensor};

const OP: &str = "attend";
/// Query heads of a kv head: rows of a product.
const MAX_GROUP: usize = 16;
/// Longest context: the kernels divide positions by multiplying.
const MAX_CONTEXT: usize = 1 << 20;
/// Threads of all three kernels.
const NUM_THREADS: u32 = 128;
/// Rows of a prefill tile.
const TILE_ROWS: usize = 128;
/// Most parts of a context: a lane of the warp that weighs them has one.
const MAX_SPLITS: usize = 32;

/// `AttentionParams` of `kernels/attention.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct AttentionParams {
    qkv: u64,
    q_norm: u64,
    k_norm: u64,
    out: u64,
    cache: u64,
    scales: u64,
    positions: u64,
    slot_mapping: u64,
    seqs: u64,
    block_tables: u64,
    token_seqs: u64,
    partial: u64,
    counters: u64,
    num_heads: u32,
    num_kv_heads: u32,
    group: u32,
    num_seqs: u32,
    block_size: u32,
    block_magic: u32,
    group_magic: u32,
    is_decode: u32,
    height_end: u32,
    width_end: u32,
    eps: f32,
    rope_factor: f32,
    inv_freq: [f32; 64],
}

// SAFETY: the fields are those of the kernel's struct in the same order; 13 * 8 + 12 * 4 + 64 * 4 bytes, no padding.
unsafe impl Params for AttentionParams {
    const NAME: &'static str = "AttentionParams";
}

/// What [`Kernels::attend`] needs besides qkv; see [`spark_backend::AttentionSpec`].
#[derive(Debug, Clone, Copy)]
pub struct AttendArgs<'a> {
    /// Of the model, from 0.
    pub layer: usize,
    /// `[1, head_dim]` bf16.
    pub q_norm: &'a Tensor,
    /// `[1, head_dim]` bf16.
    pub k_norm: &'a Tensor,
    /// Of both norms.
    pub eps: f32,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Of q, K and V.
    pub head_dim: usize,
    /// `[head_dim / 2]` inverse frequencies.
    pub inv_freq: &'a [f32],
    /// Factor on cosine and sine.
    pub rope_factor: f32,
    /// Frequencies of time, height, width.
    pub mrope_section: [usize; 3],
    /// Where K and V are stored.
    pub kv: &'a KvCache,
    /// The step.
    pub step: &'a StepView,
}

impl AttendArgs<'_> {
    /// Everything that the kernels take for granted about sizes.
    fn check(&self) -> Result<()> {
        let spec = self.kv.spec();
        if [self.num_kv_heads, self.head_dim] != [spec.num_kv_heads, spec.head_dim]
            || self.layer >= spec.num_layers
        {
            let got = (self.layer, self.num_kv_heads, self.head_dim);
            return Err(Error::shape(OP, format!("layer, kv heads and head_dim of {spec:?}"), got));
        }
        let whole = self.num_heads > 0 && self.num_heads.is_multiple_of(self.num_kv_heads);
        if !whole || self.num_heads / self.num_kv_heads > MAX_GROUP {
            let expected = format!("1 to {MAX_GROUP} heads for each of {} kv heads", self.num_kv_heads);
            return Err(Error::shape(OP, expected, self.num_heads));
        }
        if self.inv_freq.len() != self.head_dim / 2 {
            return Err(Error::shape(
                OP,
                format!("{} inverse frequencies", self.head_dim / 2),
                self.inv_freq.len(),
            ));
        }
        if let Some(section) = self.mrope_section.iter().find(|&&section| section > self.inv_freq.len()) {
            return Err(Error::shape(OP, format!("sections of at most {}", self.inv_freq.len()), section));
        }
        // The contexts of a decode step are data.
        let longest = self.step.host_seqs.iter().map(|&(_, context_len)| context_len).max();
        match longest.filter(|&longest| longest > MAX_CONTEXT) {
            Some(longest) => {
                Err(Error::shape(OP, format!("contexts of at most {MAX_CONTEXT} tokens"), longest))
            }
            None => Ok(()),
        }
    }

    /// Query heads of a kv head.
    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Memory that the kernels read and do not write.
    fn inputs(&self) -> [&DeviceSlice; 7] {
        let step = self.step;
        [
            self.q_norm.slice(),
            self.k_norm.slice(),
            &step.positions,
            &step.slot_mapping,
            &step.seqs,
            &step.block_tables,
            &step.token_seqs,
        ]
    }
}

/// The kernels of one head_dim and storage type.
#[derive(Debug)]
struct ByShape {
    decode: Kernel<AttentionParams>,
    prepare: Kernel<AttentionParams>,
    prefill: Kernel<AttentionParams>,
}

#[derive(Debug)]
pub(super) struct Attention {
    /// By head_dim (32, 64, 128), then bf16 and FP8.
    kernels: [[ByShape; 2]; 3],
}

impl Attention {
    pub(super) fn new(decode: &LoadedModule, prefill: &LoadedModule) -> Result<Self> {
        let shape = |head_dim: usize, is_fp8: bool| {
            let suffix = format!("{}_{head_dim}", if is_fp8 { "fp8" } else { "bf16" });
            Ok::<_, Error>(ByShape {
                decode: Kernel::overlapping(
                    decode,
                    &format!("decode_{suffix}"),
                    decode_bytes(head_dim, is_fp8),
                )?,
                prepare: Kernel::new(prefill, &format!("prepare_{suffix}"), 0)?,
                prefill: Kernel::new(prefill, &format!("prefill_{suffix}"), prefill_bytes(head_dim, is_fp8))?,
            })
        };
        let both = |head_dim| Ok::<_, Error>([shape(head_dim, false)?, shape(head_dim, true)?]);
        Ok(Self { kernels: [both(32)?, both(64)?, both(128)?] })
    }

    fn by_shape(&self, spec: &KvSpec) -> &ByShape {
        &self.kernels[spec.head_dim.ilog2() as usize - 5][usize::from(spec.dtype == KvDtype::Fp8)]
    }
}

/// Shared memory of `attention_decode`: the pipelines of four warps, of 16 tokens a stage.
fn decode_bytes(head_dim: usize, is_fp8: bool) -> u32 {
    let (stages, stage) = if is_fp8 { (4, 2 * 16 * head_dim + 64) } else { (2, 2 * 16 * 2 * head_dim) };
    4 * stages * stage as u32
}

/// Shared memory of `attention_prefill`: q, two stages of 64 keys, and for FP8 the same keys as bf16.
fn prefill_bytes(head_dim: usize, is_fp8: bool) -> u32 {
    let (stage, wide) =
        if is_fp8 { (2 * 64 * head_dim + 256, 2 * 64 * 2 * head_dim) } else { (2 * 64 * 2 * head_dim, 0) };
    (TILE_ROWS * 2 * head_dim + 2 * stage + wide) as u32
}

/// Parts of a context, so that about two blocks for each multiprocessor run; parts of all sequences and kv heads at most
/// four for each multiprocessor.
fn num_splits(num_decodes: usize, num_seqs: usize, num_kv_heads: usize, num_sms: u32) -> usize {
    let (num_sms, pairs) = (num_sms as usize, (num_seqs * num_kv_heads).max(1));
    if pairs > MAX_SPLIT_PAIRS {
        return 1;
    }
    let wanted = 2 * num_sms / (num_decodes * num_kv_heads).max(1);
    wanted.min(4 * num_sms / pairs).clamp(1, MAX_SPLITS)
}

/// Bytes of what the parts leave for each other: sums, maximum and weight of every query head.
fn partial_bytes(pairs: usize, num_splits: usize, group: usize, head_dim: usize) -> u64 {
    let is_split = num_splits > 1;
    if is_split { 4 * (pairs * num_splits * (group * head_dim + 2 * MAX_GROUP)) as u64 } else { 0 }
}

impl Kernels {
    /// Most bytes that [`Kernels::attend`] takes from the pool, whatever the step.
    pub fn attend_scratch_bytes(
        device: &Device,
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
    ) -> u64 {
        let group = num_heads.div_ceil(num_kv_heads.max(1));
        partial_bytes(4 * device.properties().num_sms as usize, MAX_SPLITS, group, head_dim)
            / MAX_SPLITS as u64
    }

    /// RMSNorm and rotary embedding of q and k, K and V to the cache, causal attention of every row over its sequence:
    /// `qkv` `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]` to `out` `[num_tokens, num_heads * head_dim]`, bf16. Rows of padding
    /// become zero. Rounds where the CPU backend does, and the weights of the softmax to bf16 besides.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Memory`] when the pool is too small, [`Error::Driver`].
    pub fn attend(
        &self,
        stream: &Stream,
        pool: &Pool,
        qkv: &Tensor,
        args: &AttendArgs<'_>,
        out: &Tensor,
    ) -> Result<()> {
        args.check()?;
        let (step, head_dim) = (args.step, args.head_dim);
        let columns = (args.num_heads + 2 * args.num_kv_heads) * head_dim;
        qkv.expect(OP, [step.num_tokens, columns], Dtype::Bf16)?;
        out.expect(OP, [step.num_tokens, args.num_heads * head_dim], Dtype::Bf16)?;
        args.q_norm.expect(OP, [1, head_dim], Dtype::Bf16)?;
        args.k_norm.expect(OP, [1, head_dim], Dtype::Bf16)?;
        stream.uses(OP, &[qkv.slice(), out.slice(), args.kv.slice()])?;
        stream.uses(OP, &args.inputs())?;
        disjoint(OP, out.slice(), &[qkv.slice(), args.kv.slice()])?;
        disjoint(OP, out.slice(), &args.inputs())?;
        disjoint(OP, args.kv.slice(), &[qkv.slice()])?;
        disjoint(OP, args.kv.slice(), &args.inputs())?;
        if step.num_tokens == 0 {
            return Ok(());
        }
        let work = Work::of(args, stream.num_sms());
        let pairs = step.num_seqs * args.num_kv_heads;
        let partial_bytes = partial_bytes(pairs, work.num_splits, args.group(), head_dim);
        let partial = pool.take("parts of the attention", partial_bytes)?;
        stream.uses(OP, &[&partial])?;
        let params = params(qkv, args, &partial, out)?;
        self.launch_attention(stream, args, &work, &params)
    }

    fn launch_attention(
        &self,
        stream: &Stream,
        args: &AttendArgs<'_>,
        work: &Work,
        params: &AttentionParams,
    ) -> Result<()> {
        let (head_dim, spec) = (args.head_dim, args.kv.spec());
        let is_fp8 = spec.dtype == KvDtype::Fp8;
        let kernels = self.attention.by_shape(spec);
        let launch =
            |grid: [u32; 3], shared_bytes: u32| Launch { grid, num_threads: NUM_THREADS, shared_bytes };
        // SAFETY: qkv, out and the norms have the shapes that the parameters say, the cache was made for these sizes, and nothing
        // that is written overlaps with anything else; all are aligned to 16 bytes. The parts' memory holds one
        // for each sequence, kv head and split. What the step's data say (block tables, slots, rows) was checked against the cache's and
        // the step's sizes when the step was packed.
        unsafe {
            if work.num_tiles > 0 || work.has_padding {
                let prepare = [to_u32(OP, args.step.num_tokens)?, 1, 1];
                kernels.prepare.launch(stream, launch(prepare, 0), params)?;
            }
            if work.num_tiles > 0 {
                let tiles = [params.num_kv_heads, to_u32(OP, work.num_tiles)?, 1];
                kernels.prefill.launch(stream, launch(tiles, prefill_bytes(head_dim, is_fp8)), params)?;
            }
            if work.num_decodes > 0 {
                let grid = [to_u32(OP, work.num_splits)?, params.num_kv_heads, params.num_seqs];
                kernels.decode.launch(stream, launch(grid, decode_bytes(head_dim, is_fp8)), params)?;
            }
        }
        Ok(())
    }
}

/// What a step asks of the kernels.
struct Work {
    /// Sequences with one row; in a decode step all, padding included.
    num_decodes: usize,
    /// Tiles of the others.
    num_tiles: usize,
    /// Rows that no sequence has, outside a decode step.
    has_padding: bool,
    /// Parts of a context.
    num_splits: usize,
}

impl Work {
    fn of(args: &AttendArgs<'_>, num_sms: u32) -> Self {
        let step = args.step;
        let splits = |num_decodes| num_splits(num_decodes, step.num_seqs, args.num_kv_heads, num_sms);
        if step.is_decode {
            // The number of parts is that of the graph's, whatever is padding.
            let (num_decodes, num_splits) = (step.num_seqs, splits(step.num_seqs));
            return Self { num_decodes, num_tiles: 0, has_padding: false, num_splits };
        }
        let tile_tokens = TILE_ROWS / args.group();
        let lens = || step.host_seqs.iter().map(|&(query_len, _)| query_len);
        let num_decodes = lens().filter(|&len| len == 1).count();
        Self {
            num_decodes,
            num_tiles: lens().filter(|&len| len > 1).map(|len| len.div_ceil(tile_tokens)).sum(),
            has_padding: lens().sum::<usize>() < step.num_tokens,
            num_splits: splits(num_decodes),
        }
    }
}

fn params(
    qkv: &Tensor,
    args: &AttendArgs<'_>,
    partial: &DeviceSlice,
    out: &Tensor,
) -> Result<AttentionParams> {
    let (step, spec) = (args.step, args.kv.spec());
    let [cache, scales] = args.kv.layer(args.layer);
    let mut inv_freq = [0.0; 64];
    inv_freq[..args.inv_freq.len()].copy_from_slice(args.inv_freq);
    let (block_size, group) = (to_u32(OP, spec.block_size)?, to_u32(OP, args.group())?);
    Ok(AttentionParams {
        qkv: qkv.address(),
        q_norm: args.q_norm.address(),
        k_norm: args.k_norm.address(),
        out: out.address(),
        cache,
        scales,
        positions: step.positions.address(),
        slot_mapping: step.slot_mapping.address(),
        seqs: step.seqs.address(),
        block_tables: step.block_tables.address(),
        token_seqs: step.token_seqs.address(),
        partial: partial.address(),
        counters: args.kv.counters(),
        num_heads: to_u32(OP, args.num_heads)?,
        num_kv_heads: to_u32(OP, args.num_kv_heads)?,
        group,
        num_seqs: to_u32(OP, step.num_seqs)?,
        block_size,
        block_magic: block_magic(block_size),
        group_magic: (1 << 16) / group + 1,
        is_decode: step.is_decode.into(),
        height_end: to_u32(OP, 3 * args.mrope_section[1])?,
        width_end: to_u32(OP, 3 * args.mrope_section[2])?,
        eps: args.eps,
        rope_factor: args.rope_factor,
        inv_freq,
    })
}

/// `floor(2^32 / block_size) + 1`: the high word of its product with a position is the position's block.
fn block_magic(block_size: u32) -> u32 {
    ((1u64 << 32) / u64::from(block_size) + 1) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_divided_by_multiplying() {
        for block_size in [16u32, 32, 48, 64, 144, 1008, 4096] {
            let magic = u64::from(block_magic(block_size));
            let positions = (0..MAX_CONTEXT as u32).step_by(7).chain([MAX_CONTEXT as u32 - 1]);
            for position in positions.chain((1..4096).map(|block| block * block_size % MAX_CONTEXT as u32)) {
                assert_eq!((u64::from(position) * magic) >> 32, u64::from(position / block_size));
            }
        }
    }

    #[test]
    fn splits_fill_the_device_once() {
        assert_eq!(num_splits(1, 1, 4, 132), 32);
        assert_eq!(num_splits(8, 8, 4, 132), 8);
        assert_eq!(num_splits(64, 64, 4, 132), 1);
        assert_eq!(num_splits(1, 1, 4, 48), 24);
        assert_eq!(num_splits(1, 300, 4, 132), 1, "more pairs than counters");
        assert_eq!(num_splits(1, 100, 4, 132), 1, "one decode among many prompts");
        assert!((1..400).all(|seqs| {
            let splits = num_splits(1, seqs, 4, 132);
            splits == 1 || 4 * seqs * splits <= 4 * 132
        }));
        assert_eq!(partial_bytes(4, 32, 8, 128), 4 * 4 * 32 * (8 * 128 + 32));
        assert_eq!(partial_bytes(256, 1, 8, 128), 0);
    }

    #[test]
    fn shared_memory_fits_every_device() {
        for head_dim in [32, 64, 128] {
            for is_fp8 in [false, true] {
                // Besides, the decode kernel declares at most 5.5 KiB.
                assert!(decode_bytes(head_dim, is_fp8) + 5632 <= 101_376);
                assert!(prefill_bytes(head_dim, is_fp8) <= 101_376);
            }
        }
    }
}
