//! Temporary timing.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason="temporary")]
use spark_backend::*;
use spark_cpu::*;
use std::time::Instant;
fn main() {
    let (n, k) = (4096usize, 2048usize);
    let g = n * k / 128;
    let all = vec![
        ("bf16", MatrixData::Dense { dtype: Dtype::Bf16, values: vec![0x3f; 2 * n * k].into() }),
        ("f32", MatrixData::Dense { dtype: Dtype::F32, values: vec![0x3f; 4 * n * k].into() }),
        ("int4", MatrixData::Int4 { codes: vec![0x3f; n * k / 2].into(), zeros: Some(vec![3; g].into()), scales: vec![0x3c; 2 * g].into(), scale_dtype: Dtype::F16, group_size: 128 }),
        ("nvfp4", MatrixData::Nvfp4 { codes: vec![0x3f; n * k / 2].into(), scales: vec![0x3c; n * k / 16].into(), alpha: 0.5 }),
        ("fp8", MatrixData::Fp8 { values: vec![0x3c; n * k].into(), scales: vec![1.0; n * k / 128 / 128], block: [128, 128] }),
    ];
    for threads in [1, 2] {
        let b = CpuBackend::new(Dtype::Bf16, Some(threads)).unwrap();
        for (name, data) in &all {
            let w = b.linear_weight(LinearWeight { parts: vec![Matrix { n, k, data: data.clone() }], bias: None }).unwrap();
            for m in [1usize, 4, 16, 256] {
                let x = b.vector(VectorWeight { values: (0..m * k).map(|i| (i % 7) as f32 / 7.0 - 0.4).collect(), shape: [m, k] }).unwrap();
                b.linear(&x, &w).unwrap();
                let reps = if m > 64 { 3 } else { 20 };
                let mut best = f64::MAX;
                for _ in 0..reps { let t = Instant::now(); b.linear(&x, &w).unwrap(); best = best.min(t.elapsed().as_secs_f64()); }
                println!("{threads} threads {name:6} m={m:4} {:8.3} ms  {:7.1} GFLOP/s  {:6.2} Gweight/s", best * 1e3, 2.0 * (n * k * m) as f64 / best / 1e9, (n * k) as f64 / best / 1e9);
            }
        }
    }
    let mut b = CpuBackend::new(Dtype::Bf16, Some(2)).unwrap();
    for kvd in [KvDtype::Bf16, KvDtype::Fp8] {
    let kv = KvSpec { num_layers: 1, num_kv_heads: 4, head_dim: 128, block_size: 32, num_blocks: 128, dtype: kvd };
    b.allocate_state(StateSpec { kv, num_slots: 1, max_num_tokens: 4096, vocab_size: 151_936 }).unwrap();
    for (q, ctx) in [(1024usize, 1024usize), (1, 4096)] {
        let inputs = StepInputs { tokens: vec![TokenInput::Known(0); q], positions: (ctx-q..ctx).map(|p| [p as u32; 3]).collect(), slot_mapping: (ctx-q..ctx).map(|p| p as u64).collect(),
            seqs: vec![SeqInput { slot: 0, query_start: 0, query_len: q, context_len: ctx, block_table: (0..128).collect() }], ..Default::default() };
        let qkv = b.vector(VectorWeight { values: (0..q * 40 * 128).map(|i| (i % 13) as f32 - 6.0).collect(), shape: [q, 40 * 128] }).unwrap();
        let w = b.vector(VectorWeight { values: vec![1.0; 128], shape: [1, 128] }).unwrap();
        let inv: Vec<f32> = (0..64).map(|j| 1e6f32.powf(-(j as f32) / 64.0)).collect();
        let mut best = f64::MAX;
        for _ in 0..3 { let t = Instant::now();
        b.step(&inputs, &mut |b| b.attend(&qkv, 0, &AttentionSpec { q_norm: &w, k_norm: &w, eps: 1e-6, num_heads: 32, num_kv_heads: 4, head_dim: 128, inv_freq: &inv, rope_factor: 1.0, mrope_section: [24, 20, 20] }).map(drop)).unwrap();
        best = best.min(t.elapsed().as_secs_f64()); }
        println!("{kvd:?} attend q={q} ctx={ctx}: {:.2} ms", best * 1e3);
    }}
    for (name, temperature, top_p) in [("greedy", 0.0, 1.0), ("t=1", 1.0, 1.0), ("top_p .9", 0.7, 0.9)] {
        b.admit(0, SlotParams { temperature, top_k: 0, top_p, min_p: 0.0, repetition_penalty: 1.0, presence_penalty: 0.0, frequency_penalty: 0.0, logit_bias: vec![], seed: 1, stop_token_ids: vec![], min_tokens: 0, logprobs: None, prompt: vec![], output: vec![] }).unwrap();
        let inputs = StepInputs { logit_rows: vec![0], sample_slots: vec![Some(0)], prompt_targets: vec![None], ..Default::default() };
        let logits = b.vector(VectorWeight { values: (0..151_936u32).map(|i| (i.wrapping_mul(2654435761) >> 16) as f32 / 8192.0).collect(), shape: [1, 151_936] }).unwrap();
        let mut best = f64::MAX;
        for _ in 0..5 { let t = Instant::now(); b.step(&inputs, &mut |b| b.sample(&logits)).unwrap(); best = best.min(t.elapsed().as_secs_f64()); }
        println!("sample {name}: {:.3} ms", best * 1e3);
    }
}
