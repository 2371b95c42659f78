//! A model of two layers over any backend, written by hand, with the same random weights on each: what the tests of
//! the backend run. One layer of experts in 4 bits, one dense layer in bfloat16. A rank of several loads its share.

use std::ops::Range;

use spark_backend::{
    ActivationSpec, AttentionSpec, Backend, Dtype, ExpertsWeight, KvDtype, KvSpec, LinearWeight, Matrix,
    MatrixData, Rank, Result, RouterSpec, SeqInput, StateSpec, StepInputs, TokenInput, VectorWeight,
};
use spark_testing::Random;

pub(crate) const HIDDEN: usize = 256;
/// Real tokens, and rows of the table: the others are padding.
pub(crate) const VOCAB: usize = 290;
const VOCAB_ROWS: usize = 300;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;
const EXPERT_WIDTH: usize = 64;
const WIDTH: usize = 192;
const EPS: f32 = 1e-6;
pub(crate) const BLOCK: usize = 16;

/// How ranks share the experts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Share {
    /// A slice of each.
    Slices,
    /// Some of them whole.
    Whole,
}

impl Share {
    /// The experts of which a rank has anything.
    fn held(self, rank: Rank) -> Range<usize> {
        match self {
            Share::Slices => 0..EXPERTS,
            Share::Whole => rank.range(EXPERTS),
        }
    }
}

/// The model.
pub(crate) struct Tiny<B: Backend> {
    embed: B::Linear,
    head: B::Linear,
    layers: [Layer<B>; 2],
    norm: B::Tensor,
    router: B::Linear,
    experts: B::Experts,
    held: Range<usize>,
    gate_up: B::Linear,
    down: B::Linear,
    inv_freq: Vec<f32>,
    rank: Rank,
}

struct Layer<B: Backend> {
    norms: [B::Tensor; 2],
    qkv: B::Linear,
    heads: [B::Tensor; 2],
    out: B::Linear,
}

/// Random weights.
struct Weights {
    random: Random,
}

impl Weights {
    fn dense(&mut self, n: usize, k: usize, std: f32) -> LinearWeight {
        let values = self.random.bf16s(n * k, std);
        let values: Vec<u8> = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        let data = MatrixData::Dense { dtype: Dtype::Bf16, values: values.into() };
        LinearWeight { parts: vec![Matrix { n, k, data }], bias: None }
    }

    fn int4(&mut self, n: usize, k: usize) -> Matrix {
        let scale = 1.0 / (5.0 * (k as f32).sqrt());
        let scales = (0..n * k / 32)
            .flat_map(|_| half::f16::from_f32(scale * self.random.uniform(0.5, 1.5)).to_le_bytes());
        let scales: Vec<u8> = scales.collect();
        let codes = self.random.bytes(n * k / 2).into();
        let data = MatrixData::Int4 {
            codes,
            zeros: None,
            scales: scales.into(),
            scale_dtype: Dtype::F16,
            group_size: 32,
        };
        Matrix { n, k, data }
    }

    fn experts(&mut self) -> ExpertsWeight {
        let linear = |parts| LinearWeight { parts, bias: None };
        let expert = |_| {
            let gate_up = vec![self.int4(EXPERT_WIDTH, HIDDEN), self.int4(EXPERT_WIDTH, HIDDEN)];
            (linear(gate_up), linear(vec![self.int4(HIDDEN, EXPERT_WIDTH)]))
        };
        ExpertsWeight { experts: (0..EXPERTS).map(expert).collect() }
    }

    fn norm(&mut self, len: usize) -> VectorWeight {
        VectorWeight {
            values: self.random.normals(len, 0.2).iter().map(|v| 1.0 + v).collect(),
            shape: [1, len],
        }
    }
}

/// Values of `bytes` (rows of `row_bytes`) in `rows`, of each row those in `columns`, in bytes.
fn cut(bytes: &[u8], row_bytes: usize, rows: &Range<usize>, columns: &Range<usize>) -> Vec<u8> {
    let rows = &bytes[rows.start * row_bytes..rows.end * row_bytes];
    rows.chunks(row_bytes).flat_map(|row| &row[columns.clone()]).copied().collect()
}

fn part(matrix: &Matrix, rows: &Range<usize>, columns: &Range<usize>) -> Matrix {
    let scaled = |times: usize, by: usize| times * columns.start / by..times * columns.end / by;
    let data = match &matrix.data {
        MatrixData::Dense { dtype, values } => {
            let values = cut(values, 2 * matrix.k, rows, &scaled(2, 1)).into();
            MatrixData::Dense { dtype: *dtype, values }
        }
        MatrixData::Int4 { codes, zeros: None, scales, scale_dtype, group_size } => MatrixData::Int4 {
            codes: cut(codes, matrix.k / 2, rows, &scaled(1, 2)).into(),
            zeros: None,
            scales: cut(scales, 2 * matrix.k / group_size, rows, &scaled(2, *group_size)).into(),
            scale_dtype: *scale_dtype,
            group_size: *group_size,
        },
        _ => unreachable!("the model has no others"),
    };
    Matrix { n: rows.len(), k: columns.len(), data }
}

/// All columns of some rows of a layer, one matrix for each range.
fn rows_of(weight: &LinearWeight, ranges: &[Range<usize>]) -> LinearWeight {
    let whole = &weight.parts[0];
    let parts = ranges.iter().map(|rows| part(whole, rows, &(0..whole.k))).collect();
    LinearWeight { parts, bias: None }
}

/// All rows of some columns of a layer.
fn columns_of(weight: &LinearWeight, columns: &Range<usize>) -> LinearWeight {
    let whole = &weight.parts[0];
    LinearWeight { parts: vec![part(whole, &(0..whole.n), columns)], bias: None }
}

/// `range` of things that are `size` wide, behind `start` others.
fn times(range: &Range<usize>, size: usize, start: usize) -> Range<usize> {
    (start + range.start) * size..(start + range.end) * size
}

/// The share of a rank.
fn shard_experts(rank: Rank, share: Share, weight: &ExpertsWeight) -> ExpertsWeight {
    if let Share::Whole = share {
        return ExpertsWeight { experts: weight.experts[share.held(rank)].to_vec() };
    }
    let width = rank.range(EXPERT_WIDTH);
    let expert = |(gate_up, down): &(LinearWeight, LinearWeight)| {
        let parts = gate_up.parts.iter().map(|matrix| part(matrix, &width, &(0..HIDDEN))).collect();
        (LinearWeight { parts, bias: None }, columns_of(down, &width))
    };
    ExpertsWeight { experts: weight.experts.iter().map(expert).collect() }
}

impl<B: Backend> Tiny<B> {
    pub(crate) fn load(b: &B, seed: u64, share: Share) -> Result<Self> {
        let mut w = Weights { random: Random::new(seed) };
        let rank = b.rank();
        let (heads, kv_heads) = (rank.range(HEADS), rank.kv_heads(KV_HEADS));
        let (width, vocab) = (rank.range(WIDTH), [rank.range(VOCAB_ROWS)]);
        let qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
        let of_rank = [
            times(&heads, HEAD_DIM, 0),
            times(&kv_heads, HEAD_DIM, HEADS),
            times(&kv_heads, HEAD_DIM, HEADS + KV_HEADS),
        ];
        let std = |k: usize| 1.0 / (k as f32).sqrt();
        let layer = |w: &mut Weights| -> Result<Layer<B>> {
            Ok(Layer {
                norms: [b.vector(w.norm(HIDDEN))?, b.vector(w.norm(HIDDEN))?],
                qkv: b.linear_weight(rows_of(&w.dense(qkv, HIDDEN, std(HIDDEN)), &of_rank))?,
                heads: [b.vector(w.norm(HEAD_DIM))?, b.vector(w.norm(HEAD_DIM))?],
                out: b.linear_weight(columns_of(
                    &w.dense(HIDDEN, HEADS * HEAD_DIM, std(HIDDEN)),
                    &times(&heads, HEAD_DIM, 0),
                ))?,
            })
        };
        Ok(Self {
            embed: b.linear_weight(rows_of(&w.dense(VOCAB_ROWS, HIDDEN, 1.0), &vocab))?,
            head: b.linear_weight(rows_of(&w.dense(VOCAB_ROWS, HIDDEN, std(HIDDEN)), &vocab))?,
            layers: [layer(&mut w)?, layer(&mut w)?],
            norm: b.vector(w.norm(HIDDEN))?,
            // Far apart, so that roundings seldom change a choice.
            router: b.linear_weight(w.dense(EXPERTS, HIDDEN, 0.5))?,
            experts: b.experts_weight(shard_experts(rank, share, &w.experts()))?,
            held: share.held(rank),
            gate_up: b.linear_weight(rows_of(
                &w.dense(2 * WIDTH, HIDDEN, std(HIDDEN)),
                &[width.clone(), WIDTH + width.start..WIDTH + width.end],
            ))?,
            down: b.linear_weight(columns_of(&w.dense(HIDDEN, WIDTH, std(WIDTH)), &width))?,
            inv_freq: (0..HEAD_DIM / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / HEAD_DIM as f32)).collect(),
            rank,
        })
    }

    fn attention<'a>(&'a self, layer: &'a Layer<B>) -> AttentionSpec<'a, B> {
        AttentionSpec {
            q_norm: &layer.heads[0],
            k_norm: &layer.heads[1],
            eps: EPS,
            num_heads: self.rank.range(HEADS).len(),
            num_kv_heads: self.rank.kv_heads(KV_HEADS).len(),
            head_dim: HEAD_DIM,
            inv_freq: &self.inv_freq,
            rope_factor: 1.0,
            mrope_section: [12, 10, 10],
        }
    }

    /// A step; rows of `media` (first row, tensor) take the place of embeddings and are added again behind the first layer.
    /// `tap` sees the logits.
    pub(crate) fn forward(
        &self,
        b: &B,
        media: Option<(usize, &B::Tensor, usize)>,
        tap: &mut dyn FnMut(&B::Tensor),
    ) -> Result<()> {
        let mut residual = b.embed(&self.embed, VOCAB_ROWS)?;
        if let Some((row, source, rows)) = media {
            b.set_rows(&mut residual, row, source, 1, rows)?;
        }
        let mut partial = None;
        for (i, layer) in self.layers.iter().enumerate() {
            let x = b.reduce_norm(partial, &mut residual, &layer.norms[0], EPS)?;
            let qkv = b.linear(&x, &layer.qkv)?;
            let attended = b.attend(&qkv, i, &self.attention(layer))?;
            let added = Some(b.linear(&attended, &layer.out)?);
            let norm = &layer.norms[1];
            partial = Some(match i {
                0 => {
                    let router = RouterSpec {
                        router: &self.router,
                        top_k: TOP_K,
                        renormalize: true,
                        experts: self.held.clone(),
                    };
                    let (x, routing) = b.reduce_norm_route(added, &mut residual, norm, EPS, &router)?;
                    b.moe_mlp(&x, &routing, &self.experts)?
                }
                _ => {
                    let x = b.reduce_norm(added, &mut residual, norm, EPS)?;
                    b.linear(&b.swiglu(&b.linear(&x, &self.gate_up)?)?, &self.down)?
                }
            });
            if let Some((row, source, rows)) = media.filter(|_| i == 0) {
                b.add_rows(&mut residual, row, source, 1, rows)?;
            }
        }
        let x = b.reduce_norm(partial, &mut residual, &self.norm, EPS)?;
        let logits = b.logits(&x, &self.head, VOCAB_ROWS)?;
        tap(&logits);
        b.sample(&logits)
    }
}

/// State for `num_slots` sequences of at most 64 tokens.
pub(crate) fn state(num_slots: usize, kv_dtype: KvDtype) -> StateSpec {
    state_of(Rank::SINGLE, num_slots, kv_dtype)
}

/// [`state`] of a rank.
pub(crate) fn state_of(rank: Rank, num_slots: usize, kv_dtype: KvDtype) -> StateSpec {
    let num_kv_heads = rank.kv_heads(KV_HEADS).len();
    let kv = KvSpec {
        num_layers: 2,
        num_kv_heads,
        head_dim: HEAD_DIM,
        block_size: BLOCK,
        num_blocks: 4 * num_slots,
        dtype: kv_dtype,
    };
    let activations = ActivationSpec {
        num_slots,
        num_tokens: 160,
        num_logit_rows: num_slots + 64,
        vocab_rows: VOCAB_ROWS,
        hidden_size: HIDDEN,
        num_heads: rank.range(HEADS).len(),
        num_kv_heads,
        head_dim: HEAD_DIM,
        intermediate_size: rank.range(WIDTH).len(),
        num_experts: EXPERTS,
        top_k: TOP_K,
        // Of whole experts; of slices less.
        moe_intermediate_size: EXPERT_WIDTH,
        num_patches: 256,
        patch_size: 96,
        vision_hidden_size: 144,
        vision_num_heads: 2,
        vision_head_dim: 72,
        vision_intermediate_size: 208,
        patches_per_token: 4,
    };
    StateSpec {
        kv,
        num_slots,
        max_num_tokens: 160,
        vocab_size: VOCAB,
        max_blocks_per_seq: 4,
        encoder_cache_bytes: 100 * 2 * HIDDEN as u64,
        activations,
    }
}

/// The next `tokens` of the sequence in `slot`, from position `start` on; its blocks lie in falling order.
pub(crate) struct Chunk {
    pub(crate) slot: usize,
    pub(crate) start: usize,
    pub(crate) tokens: Vec<TokenInput>,
}

impl Chunk {
    pub(crate) fn known(slot: usize, start: usize, tokens: &[u32]) -> Self {
        Self { slot, start, tokens: tokens.iter().map(|&token| TokenInput::Known(token)).collect() }
    }

    pub(crate) fn pending(slot: usize, start: usize) -> Self {
        Self { slot, start, tokens: vec![TokenInput::Pending(slot)] }
    }
}

/// A step of `chunks`, each of which samples in its last row.
pub(crate) fn inputs(chunks: &[Chunk]) -> StepInputs {
    let mut inputs = StepInputs::default();
    for Chunk { slot, start, tokens } in chunks {
        let query_start = inputs.tokens.len();
        let block_table: Vec<u32> = (0..4).map(|i| (4 * slot + 3 - i) as u32).collect();
        for (i, &token) in tokens.iter().enumerate() {
            let position = start + i;
            inputs.tokens.push(token);
            inputs.positions.push([position, position / 2, position / 3].map(|p| p as u32));
            let block = u64::from(block_table[position / BLOCK]);
            inputs.slot_mapping.push(block * BLOCK as u64 + (position % BLOCK) as u64);
        }
        inputs.logit_rows.push((inputs.tokens.len() - 1) as u32);
        inputs.sample_slots.push(Some(*slot));
        inputs.prompt_targets.push(None);
        let (query_len, context_len) = (tokens.len(), start + tokens.len());
        inputs.seqs.push(SeqInput { slot: *slot, query_start, query_len, context_len, block_table });
    }
    inputs
}

/// Three prompts in slots 0, 1 and 2.
pub(crate) fn prompts(seed: u64) -> Vec<Chunk> {
    let mut random = Random::new(seed);
    let mut prompt = |slot, len| {
        let tokens: Vec<u32> = (0..len).map(|_| random.below(VOCAB) as u32).collect();
        Chunk::known(slot, 0, &tokens)
    };
    vec![prompt(0, 5), prompt(1, 40), prompt(2, 17)]
}
