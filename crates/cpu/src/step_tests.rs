//! Tests of whole steps: attention over the cache, its independence of batching and chunking, sampling state.

use crate::testing::{Random, assert_close, backend, tensor};
use crate::{CpuBackend, CpuTensor};
use spark_backend::{
    ActivationSpec, AttentionSpec, Backend, Dtype, KvDtype, KvSpec, LinearWeight, Matrix, MatrixData,
    SeqInput, SlotParams, StateSpec, StepInputs, TokenInput,
};
use std::ops::Range;

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 24;
const COLUMNS: usize = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
const INV_FREQ: [f32; 12] = [1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.007];
const SECTION: [usize; 3] = [5, 4, 3];

fn state_spec(dtype: KvDtype, block_size: usize) -> StateSpec {
    let kv = KvSpec {
        num_layers: 2,
        num_kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        block_size,
        num_blocks: 40,
        dtype,
    };
    StateSpec {
        kv,
        num_slots: 3,
        max_num_tokens: 256,
        vocab_size: 5,
        max_blocks_per_seq: 40,
        encoder_cache_bytes: 0,
        activations: ActivationSpec::default(),
    }
}

fn ready(dtype: Dtype, kv: KvDtype, block_size: usize, threads: usize) -> CpuBackend {
    let mut backend = CpuBackend::new(dtype, Some(threads)).unwrap();
    backend.allocate_state(state_spec(kv, block_size)).unwrap();
    backend
}

fn position(p: usize) -> [u32; 3] {
    [p as u32, (p / 2) as u32, (p / 3) as u32]
}

/// A sequence's qkv rows and the blocks it lives in.
struct Sequence {
    qkv: Vec<f32>,
    block_table: Vec<u32>,
}

/// One step over ranges of sequences: the attention output of each.
fn attend(backend: &mut CpuBackend, parts: &[(&Sequence, Range<usize>)], block_size: usize) -> Vec<Vec<f32>> {
    let (mut inputs, mut qkv) = (StepInputs::default(), Vec::new());
    for (slot, (sequence, range)) in parts.iter().enumerate() {
        inputs.seqs.push(SeqInput {
            slot,
            query_start: inputs.tokens.len(),
            query_len: range.len(),
            context_len: range.end,
            block_table: sequence.block_table.clone(),
        });
        for p in range.clone() {
            inputs.tokens.push(TokenInput::Known(0));
            inputs.positions.push(position(p));
            let block = u64::from(sequence.block_table[p / block_size]);
            inputs.slot_mapping.push(block * block_size as u64 + (p % block_size) as u64);
        }
        qkv.extend_from_slice(&sequence.qkv[range.start * COLUMNS..range.end * COLUMNS]);
    }
    let norm: Vec<f32> = (0..HEAD_DIM).map(|d| 0.5 + d as f32 / 48.0).collect();
    let (qkv, norm) = (tensor(backend, qkv, COLUMNS), tensor(backend, norm, HEAD_DIM));
    let mut out = None;
    backend
        .step(&inputs, &mut |b| {
            let spec = AttentionSpec {
                q_norm: &norm,
                k_norm: &norm,
                eps: 1e-6,
                num_heads: HEADS,
                num_kv_heads: KV_HEADS,
                head_dim: HEAD_DIM,
                inv_freq: &INV_FREQ,
                rope_factor: 1.5,
                mrope_section: SECTION,
            };
            out = Some(b.attend(&qkv, 1, &spec)?);
            Ok(())
        })
        .unwrap();
    backend.output().unwrap();
    let out = out.unwrap();
    assert_eq!(out.shape(), [inputs.tokens.len(), HEADS * HEAD_DIM]);
    let rows = |seq: &SeqInput| {
        out.values()[seq.query_start * HEADS * HEAD_DIM..][..seq.query_len * HEADS * HEAD_DIM].to_vec()
    };
    inputs.seqs.iter().map(rows).collect()
}

fn sequence(random: &mut Random, len: usize, blocks: impl IntoIterator<Item = u32>) -> Sequence {
    Sequence { qkv: random.normal(len * COLUMNS), block_table: blocks.into_iter().collect() }
}

/// The definition in f64, without cache.
fn naive(qkv: &[f32]) -> Vec<f64> {
    let len = qkv.len() / COLUMNS;
    let head = |p: usize, index: usize| -> Vec<f64> {
        qkv[p * COLUMNS + index * HEAD_DIM..][..HEAD_DIM].iter().map(|&v| f64::from(v)).collect()
    };
    let rotated = |p: usize, index: usize| -> Vec<f64> {
        let x = head(p, index);
        let root = (x.iter().map(|v| v * v).sum::<f64>() / HEAD_DIM as f64 + 1e-6).sqrt();
        let x: Vec<f64> = x.iter().enumerate().map(|(d, v)| v / root * (0.5 + d as f64 / 48.0)).collect();
        let angle = |d: usize| {
            let j = d % (HEAD_DIM / 2);
            let axis = (1..3).find(|&axis| j % 3 == axis && j < 3 * SECTION[axis]).unwrap_or(0);
            f64::from(position(p)[axis]) * f64::from(INV_FREQ[j])
        };
        let pair = |d: usize| if d < HEAD_DIM / 2 { -x[d + HEAD_DIM / 2] } else { x[d - HEAD_DIM / 2] };
        (0..HEAD_DIM).map(|d| 1.5 * (x[d] * angle(d).cos() + pair(d) * angle(d).sin())).collect()
    };
    let mut out = Vec::new();
    for p in 0..len {
        for h in 0..HEADS {
            let kv = h / (HEADS / KV_HEADS);
            let q = rotated(p, h);
            let scores: Vec<f64> = (0..=p)
                .map(|key| {
                    let k = rotated(key, HEADS + kv);
                    (q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / (HEAD_DIM as f64).sqrt()).exp()
                })
                .collect();
            let total: f64 = scores.iter().sum();
            let values: Vec<Vec<f64>> = (0..=p).map(|key| head(key, HEADS + KV_HEADS + kv)).collect();
            out.extend(
                (0..HEAD_DIM).map(|d| scores.iter().zip(&values).map(|(s, v)| s * v[d]).sum::<f64>() / total),
            );
        }
    }
    out
}

#[test]
fn attention_matches_the_definition() {
    let mut random = Random::new(21);
    let sequence = sequence(&mut random, 75, [7, 3, 9, 0, 12]);
    let want = naive(&sequence.qkv);
    let got = attend(&mut ready(Dtype::F32, KvDtype::F32, 16, 2), &[(&sequence, 0..75)], 16);
    assert_close(&got[0], &want, 1e-5);
    // bfloat16 has 8 significant bits, E4M3 four: errors of K and V average out over the keys, less so early on.
    for (kv, tolerance) in [(KvDtype::Bf16, 0.01), (KvDtype::Fp8, 0.1)] {
        let got = attend(&mut ready(Dtype::F32, kv, 16, 2), &[(&sequence, 0..75)], 16);
        assert_close(&got[0], &want, tolerance);
    }
}

#[test]
fn chunks_batches_blocks_and_threads_do_not_change_a_bit() {
    let mut random = Random::new(22);
    let (long, other) = (sequence(&mut random, 101, [5, 2, 30, 11]), sequence(&mut random, 40, [1, 3]));
    let mut short_blocks = sequence(&mut random, 0, (13..40).rev());
    short_blocks.qkv.clone_from(&long.qkv);
    for (dtype, kv) in [
        (Dtype::F32, KvDtype::F32),
        (Dtype::Bf16, KvDtype::Bf16),
        (Dtype::Bf16, KvDtype::Fp8),
        (Dtype::F32, KvDtype::Fp8),
    ] {
        let whole = attend(&mut ready(dtype, kv, 32, 1), &[(&long, 0..101)], 32).remove(0);
        assert_eq!(whole, attend(&mut ready(dtype, kv, 32, 3), &[(&long, 0..101)], 32)[0]);
        assert_eq!(whole, attend(&mut ready(dtype, kv, 4, 2), &[(&short_blocks, 0..101)], 4)[0]);
        // In chunks, the other sequence decoding and prefilling beside it.
        let mut backend = ready(dtype, kv, 32, 2);
        let (mut chunked, mut beside) = (Vec::new(), Vec::new());
        for (range, others) in [(0..33, 0..10), (33..34, 10..11), (34..100, 11..39), (100..101, 39..40)] {
            let mut out = attend(&mut backend, &[(&other, others), (&long, range)], 32);
            chunked.extend(out.remove(1));
            beside.extend(out.remove(0));
        }
        assert_eq!(whole, chunked);
        assert_eq!(beside, attend(&mut ready(dtype, kv, 32, 2), &[(&other, 0..40)], 32)[0]);
    }
}

#[test]
fn bad_attention_inputs_are_errors() {
    let good = StepInputs {
        tokens: vec![TokenInput::Known(0)],
        positions: vec![[0; 3]],
        slot_mapping: vec![0],
        seqs: vec![SeqInput { slot: 0, query_start: 0, query_len: 1, context_len: 1, block_table: vec![0] }],
        ..StepInputs::default()
    };
    let mut backend = ready(Dtype::F32, KvDtype::F32, 32, 1);
    let qkv = tensor(&backend, vec![0.5; COLUMNS], COLUMNS);
    let norm = tensor(&backend, vec![1.0; HEAD_DIM], HEAD_DIM);
    let mut run = |inputs: &StepInputs, layer: usize, change: fn(&mut AttentionSpec<'_, CpuBackend>)| {
        backend.step(inputs, &mut |b| {
            let mut spec = AttentionSpec {
                q_norm: &norm,
                k_norm: &norm,
                eps: 1e-6,
                num_heads: HEADS,
                num_kv_heads: KV_HEADS,
                head_dim: HEAD_DIM,
                inv_freq: &INV_FREQ,
                rope_factor: 1.0,
                mrope_section: [12, 0, 0],
            };
            change(&mut spec);
            b.attend(&qkv, layer, &spec).map(drop)
        })
    };
    assert!(run(&good, 1, |_| ()).is_ok());
    assert!(run(&good, 2, |_| ()).is_err());
    assert!(run(&good, 0, |spec| spec.num_heads = 5).is_err());
    assert!(run(&good, 0, |spec| spec.num_heads = 0).is_err());
    assert!(run(&good, 0, |spec| spec.num_kv_heads = 0).is_err());
    assert!(run(&good, 0, |spec| spec.head_dim = 16).is_err());
    assert!(run(&good, 0, |spec| spec.inv_freq = &INV_FREQ[1..]).is_err());
    assert!(run(&good, 0, |spec| spec.mrope_section = [0, 13, 0]).is_err());
    let changes: [fn(&mut StepInputs); 6] = [
        |inputs| inputs.positions.clear(),
        |inputs| inputs.slot_mapping[0] = 40 * 32,
        |inputs| inputs.seqs[0].context_len = 33,
        |inputs| inputs.seqs[0].query_len = 2,
        |inputs| inputs.seqs[0].context_len = 0,
        |inputs| inputs.seqs[0].block_table[0] = 40,
    ];
    for change in changes {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(run(&bad, 0, |_| ()).is_err(), "{bad:?}");
    }
}

fn params() -> SlotParams {
    SlotParams { seed: 1, logprobs: Some(2), prompt: vec![1], ..SlotParams::greedy() }
}

/// A table that is the identity: token `t` embeds as unit vector `t`. Six rows, the last one padding of the vocabulary.
fn identity(b: &CpuBackend) -> crate::CpuLinear {
    let values: Vec<u8> =
        (0..36).flat_map(|i| if i / 6 == i % 6 { 1.0f32 } else { 0.0 }.to_le_bytes()).collect();
    let data = MatrixData::Dense { dtype: Dtype::F32, values: values.into() };
    b.linear_weight(LinearWeight { parts: vec![Matrix { n: 6, k: 6, data }], bias: None }).unwrap()
}

fn tokens(b: &mut CpuBackend, inputs: &StepInputs) -> spark_backend::Result<spark_backend::StepOutput> {
    let table = identity(b);
    b.step(inputs, &mut |b| {
        let x: CpuTensor = b.embed(&table, table.n)?;
        let logits = b.logits(&x, &table, table.n)?;
        b.sample(&logits)
    })?;
    b.output()
}

#[test]
fn pending_tokens_masks_padding_and_prompt_logprobs() {
    let mut b = ready(Dtype::F32, KvDtype::F32, 32, 1);
    b.admit(2, params()).unwrap();
    let inputs = StepInputs {
        tokens: vec![TokenInput::Known(5), TokenInput::Known(3)],
        logit_rows: vec![0, 1],
        sample_slots: vec![None, Some(2)],
        prompt_targets: vec![Some((3, 1)), None],
        ..StepInputs::default()
    };
    // Row 0 has its only 1 in the padding row, which counts in the sum: the five real tokens are equally likely.
    let out = tokens(&mut b, &inputs).unwrap();
    let (row, target, top) = &out.prompt_logprobs[0];
    assert_eq!((*row, target.token, target.rank, top[0].token), (0, 3, 1, 0));
    assert_close(&[target.logprob], &[-((5.0 + std::f64::consts::E).ln())], 1e-6);
    let sampled = &out.sampled[0];
    assert_eq!((sampled.slot, sampled.token), (2, 3));
    let (chosen, alternatives) = sampled.logprobs.as_ref().unwrap();
    assert_close(&[chosen.logprob], &[1.0 - (5.0 + std::f64::consts::E).ln()], 1e-6);
    assert_eq!(alternatives.iter().map(|a| a.token).collect::<Vec<_>>(), [3, 0]);
    assert!(b.output().is_err(), "an output is given once");

    // The sampled token goes in again without the host knowing it; a mask then forbids it.
    let mut next = StepInputs {
        tokens: vec![TokenInput::Pending(2)],
        logit_rows: vec![0],
        sample_slots: vec![Some(2)],
        prompt_targets: vec![None],
        ..StepInputs::default()
    };
    assert_eq!(tokens(&mut b, &next).unwrap().sampled[0].token, 3);
    next.masks = vec![(2, vec![0b10010])];
    assert_eq!(tokens(&mut b, &next).unwrap().sampled[0].token, 1);
    next.masks.clear();
    assert_eq!(tokens(&mut b, &next).unwrap().sampled[0].token, 1);
}

#[test]
fn padding_is_never_sampled() {
    let mut b = ready(Dtype::F32, KvDtype::F32, 32, 1);
    b.admit(0, SlotParams { temperature: 100.0, ..params() }).unwrap();
    let inputs = StepInputs {
        tokens: vec![TokenInput::Known(5)],
        logit_rows: vec![0],
        sample_slots: vec![Some(0)],
        prompt_targets: vec![None],
        ..StepInputs::default()
    };
    let mut seen = [0; 5];
    for _ in 0..200 {
        seen[tokens(&mut b, &inputs).unwrap().sampled[0].token as usize] += 1;
    }
    assert!(seen.iter().all(|&count| count > 10), "{seen:?}");
}

#[test]
fn bad_steps_are_errors() {
    let mut bare = backend(Dtype::F32);
    assert!(bare.admit(0, params()).is_err());
    assert!(bare.output().is_err());
    assert!(CpuBackend::new(Dtype::F16, None).is_err());
    let mut b = ready(Dtype::F32, KvDtype::F32, 32, 1);
    assert!(b.admit(3, params()).is_err());
    b.admit(0, params()).unwrap();
    let good = StepInputs {
        tokens: vec![TokenInput::Known(0)],
        logit_rows: vec![0],
        sample_slots: vec![Some(0)],
        prompt_targets: vec![None],
        ..StepInputs::default()
    };
    assert!(tokens(&mut b, &good).is_ok());
    let changes: [fn(&mut StepInputs); 9] = [
        |inputs| inputs.tokens[0] = TokenInput::Known(6),
        |inputs| inputs.tokens[0] = TokenInput::Pending(1),
        |inputs| inputs.tokens[0] = TokenInput::Pending(9),
        |inputs| inputs.tokens = vec![TokenInput::Known(0); 257],
        |inputs| inputs.logit_rows[0] = 1,
        |inputs| inputs.sample_slots[0] = Some(1),
        |inputs| inputs.sample_slots.clear(),
        |inputs| inputs.prompt_targets[0] = Some((5, 0)),
        |inputs| inputs.masks = vec![(0, vec![])],
    ];
    for change in changes {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(tokens(&mut b, &bad).is_err(), "{bad:?}");
    }
}
