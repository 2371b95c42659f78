//! What ranks read: no more than promised of a checkpoint of real layout, and nothing else than what they need.

use std::sync::{Arc, Mutex};

use spark_backend::{LinearWeight, Rank};

use super::dequantize::dequantize;
use super::files::{Tensor, f32s, folder, open, raw};
use super::layout::{Format, Size, specs, tensors, write_hollow};
use crate::shard::part;
use crate::{LoadOptions, LoadProgress, LoadStrategy, ParamKind, ParamSpec, Params, Shard};

/// Shares of the bytes that each of two ranks may read.
const LIMITS: [(Format, f64); 3] = [(Format::Awq, 0.85), (Format::Nvfp4, 0.70), (Format::Fp8, 0.70)];

pub(super) fn rank(index: usize, world: usize) -> Rank {
    Rank::new(index, world).unwrap()
}

#[test]
fn each_of_two_ranks_reads_a_part_of_a_published_checkpoint() {
    for (format, limit) in LIMITS {
        let dir = tempfile::tempdir().unwrap();
        write_hollow(dir.path(), format, Size::WHOLE);
        let summary = open(dir.path()).unwrap().summary(&specs(Size::WHOLE), 2).unwrap();
        for rank in summary.ranks {
            let share = rank.bytes_read as f64 / summary.file_bytes as f64;
            assert!(share < limit && share > 0.5, "{format:?}: {share}");
            assert!(rank.bytes_held < rank.bytes_read, "{format:?}");
        }
    }
}

/// Loads a rank and counts the bytes that its reader has read.
pub(super) fn load_counted(dir: &std::path::Path, specs: &[ParamSpec], rank: Rank) -> (Params, u64) {
    let read = Arc::new(Mutex::new(0));
    let progress = Arc::clone(&read);
    let options = LoadOptions {
        rank,
        progress: Some(Arc::new(move |now: LoadProgress| {
            let mut read = progress.lock().unwrap();
            *read = now.bytes_read.max(*read);
        })),
        ..LoadOptions::default()
    };
    let params = open(dir).unwrap().load(specs, &options).unwrap();
    let read = *read.lock().unwrap();
    (params, read)
}

/// A linear layer's values, in float32.
fn values(weight: &LinearWeight) -> Vec<Vec<f32>> {
    weight.parts.iter().map(dequantize).collect()
}

/// The layers of a parameter, three an expert.
pub(super) fn matrices(params: &mut Params, spec: &ParamSpec) -> Vec<Vec<f32>> {
    if matches!(spec.kind, ParamKind::Linear { .. }) {
        return values(&params.linear(&spec.name).unwrap());
    }
    let experts = params.experts(&spec.name).unwrap().experts;
    experts.iter().flat_map(|(gate_up, down)| values(gate_up).into_iter().chain(values(down))).collect()
}

/// `rank`'s part of whole matrices, by definition.
fn parts(spec: &ParamSpec, whole: &[Vec<f32>], shapes: &[[usize; 2]], rank: Rank) -> Vec<Vec<f32>> {
    let cut = |(slot, (values, &[n, k])): (usize, (&Vec<f32>, &[usize; 2]))| {
        let [rows, columns] = part(spec, slot, [n, k], rank).unwrap();
        rows.flat_map(|row| values[row * k..][columns.clone()].to_vec()).collect()
    };
    whole.iter().zip(shapes.iter().cycle()).enumerate().map(cut).collect()
}

#[test]
fn what_is_read_is_what_is_counted_and_what_is_needed() {
    let size = Size { layers: 1, experts: 2, vocab: 1001, has_vision: false };
    for (format, limit) in LIMITS {
        let specs = specs(size);
        let dir = folder(&tensors(format, size));
        let summary = open(dir.path()).unwrap().summary(&specs, 2).unwrap();
        let (mut whole, all) = load_counted(dir.path(), &specs, Rank::SINGLE);
        assert!(all.abs_diff(summary.file_bytes) < 1000, "one rank reads everything");
        let mut ranks = [0, 1].map(|index| load_counted(dir.path(), &specs, rank(index, 2)));
        for ((_, read), counted) in ranks.iter().zip(&summary.ranks) {
            assert_eq!(*read, counted.bytes_read, "{format:?}");
            assert!(*read as f64 <= limit * summary.file_bytes as f64, "{format:?}: {read}");
        }
        for spec in specs.iter().filter(|spec| spec.name.ends_with("experts") || spec.name.contains("o_proj"))
        {
            let shapes = match &spec.kind {
                ParamKind::Linear { parts, k, .. } => parts.iter().map(|part| [part.1, *k]).collect(),
                &ParamKind::Experts { hidden, intermediate, .. } => {
                    vec![[intermediate, hidden], [intermediate, hidden], [hidden, intermediate]]
                }
                ParamKind::Vector { .. } => Vec::new(),
            };
            let whole = matrices(&mut whole, spec);
            for (index, (params, _)) in ranks.iter_mut().enumerate() {
                let want = parts(spec, &whole, &shapes, rank(index, 2));
                assert!(matrices(params, spec) == want, "{format:?}, rank {index}: {}", spec.name);
            }
        }
    }
}

/// Bytes that are finite in every type, and different.
fn codes(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8 & 0xb7).collect()
}

fn scales(name: &str, shape: &[usize]) -> Tensor {
    let count = shape.iter().product::<usize>();
    f32s(name, shape, &(0..count).map(|i| 0.5 + i as f32 / 7.0).collect::<Vec<_>>())
}

/// Stacked experts as several tools store them: gate and up in one, transposed or not, scales by block, output or tensor.
pub(super) fn stacked(kind: &str) -> Vec<Tensor> {
    let (experts, hidden, inter) = (2, 64, 192);
    let fp8 = |name: &str, shape: [usize; 2]| {
        raw(name, "F8_E4M3", &[experts, shape[0], shape[1]], codes(experts * shape[0] * shape[1]))
    };
    let u8s = |name: &str, shape: [usize; 2]| {
        raw(name, "U8", &[experts, shape[0], shape[1]], codes(experts * shape[0] * shape[1]))
    };
    match kind {
        "bf16, transposed" => {
            let bf16 = |name: &str, shape: [usize; 2]| {
                let bytes = codes(2 * experts * shape[0] * shape[1]);
                raw(name, "BF16", &[experts, shape[0], shape[1]], bytes)
            };
            vec![bf16("e.gate_up_proj", [hidden, 2 * inter]), bf16("e.down_proj", [inter, hidden])]
        }
        "fp8 by block" => vec![
            fp8("e.gate_up_proj", [2 * inter, hidden]),
            scales("e.gate_up_proj_scale_inv", &[experts, 3, 1]),
            fp8("e.down_proj", [hidden, inter]),
            scales("e.down_proj_scale_inv", &[experts, 1, 2]),
        ],
        "fp8 by output" => vec![
            fp8("e.gate_up_proj", [2 * inter, hidden]),
            scales("e.gate_up_proj_scale", &[experts, 2 * inter, 1]),
            fp8("e.down_proj", [hidden, inter]),
            scales("e.down_proj_scale", &[experts, hidden, 1]),
        ],
        "fp8 by matrix" => vec![
            fp8("e.gate_up_proj", [2 * inter, hidden]),
            scales("e.gate_up_proj_scale", &[experts, 2]),
            fp8("e.down_proj", [hidden, inter]),
            scales("e.down_proj_scale", &[experts, 1]),
        ],
        "fp8 by block, transposed" => vec![
            fp8("e.gate_up_proj", [hidden, 2 * inter]),
            scales("e.gate_up_proj_scale_inv", &[experts, 1, 3]),
            fp8("e.down_proj", [inter, hidden]),
            scales("e.down_proj_scale_inv", &[experts, 2, 1]),
        ],
        _ => vec![
            u8s("e.gate_up_proj", [2 * inter, hidden / 2]),
            raw(
                "e.gate_up_proj_weight_scale",
                "F8_E4M3",
                &[experts, 2 * inter, hidden / 16],
                codes(experts * 24 * hidden),
            ),
            scales("e.gate_up_proj_weight_scale_2", &[experts, 2]),
            u8s("e.down_proj", [hidden, inter / 2]),
            raw(
                "e.down_proj_weight_scale",
                "F8_E4M3",
                &[experts, hidden, inter / 16],
                codes(experts * 12 * hidden),
            ),
            scales("e.down_proj_weight_scale_2", &[experts, 1]),
        ],
    }
}

#[test]
fn stacked_experts_of_every_layout_come_apart_exactly() {
    let kinds = [
        "bf16, transposed",
        "fp8 by block",
        "fp8 by output",
        "fp8 by matrix",
        "fp8 by block, transposed",
        "nvfp4",
    ];
    for kind in kinds {
        let tensors: Vec<_> = stacked(kind)
            .into_iter()
            .map(|tensor| Tensor { name: tensor.name.replace("e.", "model.layers.0.mlp.experts."), ..tensor })
            .collect();
        let dir = folder(&tensors);
        let spec = ParamSpec::experts("model.layers.0.mlp.experts", 2, 64, 192);
        let specs = [spec.clone()];
        let shapes = [[192, 64], [192, 64], [64, 192]];
        let whole = matrices(&mut load_counted(dir.path(), &specs, Rank::SINGLE).0, &spec);
        for world in [2, 3, 4] {
            for index in 0..world {
                let rank = rank(index, world);
                for strategy in [LoadStrategy::Eager, LoadStrategy::Lazy] {
                    let options = LoadOptions { rank, strategy, ..LoadOptions::default() };
                    let mut params = open(dir.path()).unwrap().load(&specs, &options).unwrap();
                    let want = parts(&spec, &whole, &shapes, rank);
                    assert!(matrices(&mut params, &spec) == want, "{kind}: rank {index} of {world}");
                }
            }
        }
    }
}

/// Sizes whose words and groups do not end with a rank's share, and heads that several ranks hold.
#[test]
fn packed_integers_and_shared_heads_come_apart_exactly() {
    let (n, k) = (24, 64);
    let mut tensors = Vec::new();
    for (part, n) in [("q_proj", n), ("k_proj", n / 2), ("v_proj", n / 2)] {
        let name = |kind: &str| format!("model.layers.0.self_attn.{part}.{kind}");
        tensors.push(raw(&name("weight_packed"), "I32", &[n, k / 8], codes(n * k / 2)));
        tensors.push(scales_f16(&name("weight_scale"), &[n, 2]));
        tensors.push(raw(&name("weight_zero_point"), "I32", &[n.div_ceil(8), 2], codes(n.div_ceil(8) * 8)));
        let shape = [n as u64, k as u64].iter().flat_map(|side| side.to_le_bytes()).collect();
        tensors.push(raw(&name("weight_shape"), "I64", &[2], shape));
    }
    let spec = ParamSpec::fused(
        "model.layers.0.self_attn",
        &[("q_proj", n), ("k_proj", n / 2), ("v_proj", n / 2)],
        k,
        Shard::Qkv { num_kv_heads: 3 },
    );
    let (dir, specs) = (folder(&tensors), [spec.clone()]);
    let whole = matrices(&mut load_counted(dir.path(), &specs, Rank::SINGLE).0, &spec);
    let shapes = [[n, k], [n / 2, k], [n / 2, k]];
    for world in [3, 6] {
        for index in 0..world {
            let got = matrices(&mut load_counted(dir.path(), &specs, rank(index, world)).0, &spec);
            assert!(got == parts(&spec, &whole, &shapes, rank(index, world)), "rank {index} of {world}");
            assert_eq!([got[0].len(), got[1].len()], [n / world * k, 4 * k], "a KV head each");
        }
    }
    let uneven = LoadOptions { rank: rank(0, 2), ..LoadOptions::default() };
    let error = open(dir.path()).unwrap().load(&specs, &uneven).unwrap_err().to_string();
    assert!(error.contains("3 KV heads") && error.contains("2 ranks"), "{error}");
}

fn scales_f16(name: &str, shape: &[usize]) -> Tensor {
    let count = shape.iter().product::<usize>();
    super::files::f16s(name, shape, &(0..count).map(|i| 0.5 + i as f32 / 8.0).collect::<Vec<_>>())
}

#[test]
fn random_weights_of_a_rank_are_a_part_of_those_of_one() {
    use serde_json::json;
    let specs = [
        ParamSpec::linear("model.embed_tokens", 101, 64, Shard::Vocab),
        ParamSpec::fused(
            "model.layers.0.self_attn",
            &[("q_proj", 192), ("k_proj", 48), ("v_proj", 48)],
            64,
            Shard::Qkv { num_kv_heads: 2 },
        ),
        ParamSpec::linear("model.layers.0.self_attn.o_proj", 64, 192, Shard::Columns).with_bias(),
        ParamSpec::experts("model.layers.0.mlp.experts", 2, 64, 384),
        ParamSpec::linear("model.visual.blocks.0.attn.qkv", 288, 64, Shard::Stacked { count: 3 }),
    ];
    let schemes = [
        json!({}),
        json!({"quant_method": "awq", "group_size": 32}),
        json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
        json!({"quant_method": "fp8", "weight_block_size": [32, 32]}),
    ];
    for scheme in schemes {
        let config = json!({ "quantization_config": scheme });
        let load = |rank| crate::dummy(&config, &specs, 9, rank).unwrap();
        let mut whole = load(Rank::SINGLE);
        for spec in &specs {
            let all = matrices(&mut whole, spec);
            let shapes: Vec<[usize; 2]> = match &spec.kind {
                ParamKind::Linear { parts, k, .. } => {
                    parts.iter().map(|part| [part.1 / spec.shard.matrices(), *k]).collect()
                }
                _ => vec![[384, 64], [384, 64], [64, 384]],
            };
            for (index, world) in [(0, 2), (1, 2), (3, 4), (1, 3)] {
                if world == 3 && spec.name.ends_with("self_attn") {
                    let Err(error) = load(rank(index, world)).linear(&spec.name) else { panic!("{spec:?}") };
                    assert!(error.to_string().contains("2 KV heads"), "{error}");
                    continue;
                }
                let got = matrices(&mut load(rank(index, world)), spec);
                assert!(got == parts(spec, &all, &shapes, rank(index, world)), "{scheme}: {}", spec.name);
            }
        }
        let qkv = ParamSpec { shard: Shard::Replicated, ..specs[4].clone() };
        let mut unsplit = crate::dummy(&config, std::slice::from_ref(&qkv), 9, Rank::SINGLE).unwrap();
        let stacked = matrices(&mut load(Rank::SINGLE), &specs[4]);
        assert!(
            matrices(&mut unsplit, &qkv) == [stacked.concat()],
            "{scheme}: split or not, the same numbers"
        );
        let o = load(rank(1, 2)).linear(&specs[2].name).unwrap();
        assert!(o.bias.is_none(), "the bias is rank 0's");
    }
}
