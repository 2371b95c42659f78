//! Every stored layout against numbers worked out by hand or by formula, and what is missing or damaged.

use spark_backend::{MatrixData, Rank};

use super::dequantize::{dequantize, e4m3};
use super::files::{Tensor, bf16s, f16s, f32s, folder, i32s, load, open, raw};
use crate::{Error, LoadOptions, LoadStrategy, ParamSpec, Shard, dummy};

const E: &str = "model.language_model.layers.0.mlp.experts";

fn one(n: usize, k: usize) -> Vec<ParamSpec> {
    vec![ParamSpec::linear("x", n, k, Shard::Rows)]
}

/// Loads a single linear layer and dequantises its only part.
fn values(tensors: &[Tensor], n: usize, k: usize) -> Vec<f32> {
    let mut params = load(tensors, &one(n, k)).unwrap();
    let weight = params.linear("x").unwrap();
    params.finish().unwrap();
    dequantize(&weight.parts[0])
}

fn failure(tensors: &[Tensor], specs: &[ParamSpec]) -> Error {
    load(tensors, specs).map(|_| ()).unwrap_err()
}

/// Dequantised gate, up and down of each expert.
fn experts(tensors: &[Tensor], count: usize, hidden: usize, inter: usize) -> Vec<[Vec<f32>; 3]> {
    let mut params = load(tensors, &[ParamSpec::experts(E, count, hidden, inter)]).unwrap();
    let weight = params.experts(E).unwrap();
    let each = |(up, down): &(spark_backend::LinearWeight, spark_backend::LinearWeight)| {
        [dequantize(&up.parts[0]), dequantize(&up.parts[1]), dequantize(&down.parts[0])]
    };
    weight.experts.iter().map(each).collect()
}

#[test]
fn plain_types_keep_their_values() {
    let numbers = [0.5, -1.25, 3.0, 0.0, -0.375, 96.0];
    for tensor in [
        f32s("x.weight", &[2, 3], &numbers),
        f16s("x.weight", &[2, 3], &numbers),
        bf16s("x.weight", &[2, 3], &numbers),
    ] {
        assert_eq!(values(&[tensor], 2, 3), numbers);
    }
}

#[test]
fn vectors_biases_and_convolutions() {
    let specs = vec![
        ParamSpec::vector("model.visual.norm.weight", [1, 2]),
        ParamSpec::linear("model.visual.patch_embed.proj", 2, 12, Shard::Replicated).with_bias(),
        ParamSpec::fused("model.layers.0.self_attn", &[("q_proj", 2), ("k_proj", 1)], 1, Shard::Rows)
            .with_bias(),
    ];
    let patch: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let tensors = [
        bf16s("visual.norm.weight", &[2], &[1.5, -2.0]),
        f32s("visual.patch_embed.proj.weight", &[2, 3, 2, 2], &patch),
        f32s("visual.patch_embed.proj.bias", &[2], &[7.0, 8.0]),
        f32s("language_model.model.layers.0.self_attn.q_proj.weight", &[2, 1], &[1.0, 2.0]),
        f32s("language_model.model.layers.0.self_attn.q_proj.bias", &[2], &[4.0, 5.0]),
        f16s("language_model.model.layers.0.self_attn.k_proj.weight", &[1, 1], &[3.0]),
        f16s("language_model.model.layers.0.self_attn.k_proj.bias", &[1], &[6.0]),
        f32s("language_model.model.layers.0.self_attn.k_proj.k_scale", &[], &[0.1]),
    ];
    let mut params = load(&tensors, &specs).unwrap();
    assert_eq!(params.vector("model.visual.norm.weight").unwrap().values, [1.5, -2.0]);
    let proj = params.linear("model.visual.patch_embed.proj").unwrap();
    assert_eq!((dequantize(&proj.parts[0]), proj.bias), (patch, Some(vec![7.0, 8.0])));
    let qk = params.linear("model.layers.0.self_attn").unwrap();
    assert_eq!((qk.n(), qk.k(), qk.bias), (3, 1, Some(vec![4.0, 5.0, 6.0])));
    assert!(matches!(params.linear("model.layers.0.self_attn"), Err(Error::Param { .. })));
    params.finish().unwrap();
}

#[test]
fn awq() {
    // n = 8, k = 4, groups of 2. Logical column j sits in nibble [0, 4, 1, 5, 2, 6, 3, 7][j].
    let place = [0, 4, 1, 5, 2, 6, 3, 7];
    let pack =
        |codes: [u32; 8]| codes.iter().zip(place).map(|(code, nibble)| code << (4 * nibble)).sum::<u32>();
    let rows = [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [15; 8], [3, 1, 4, 1, 5, 9, 2, 6]];
    let zeros = [[8, 7, 6, 5, 4, 3, 2, 1], [0, 15, 0, 15, 0, 15, 0, 15]];
    let scales: Vec<f32> = (0..16).map(|i| 0.25 * (i + 1) as f32).collect();
    let tensors = [
        i32s("x.qweight", &[4, 1], &rows.map(pack)),
        i32s("x.qzeros", &[2, 1], &zeros.map(pack)),
        f16s("x.scales", &[2, 8], &scales),
    ];
    let got = values(&tensors, 8, 4);
    for output in 0..8 {
        for input in 0..4 {
            let (code, zero) = (rows[input][output] as f32, zeros[input / 2][output] as f32);
            assert_eq!(got[output * 4 + input], (code - zero) * scales[input / 2 * 8 + output]);
        }
    }
    assert!(
        matches!(failure(&tensors[..2], &one(8, 4)), Error::MissingCompanion { wanted, .. } if wanted.contains("scales"))
    );
    let gptq = [i32s("x.qweight", &[1, 16], &[0; 16])];
    assert!(
        matches!(failure(&gptq, &one(16, 8)), Error::Unsupported { reason, .. } if reason.contains("GPTQ"))
    );
}

#[test]
fn packed_int4() {
    // One word is eight inputs, low nibble first, with 8 added.
    let words = [0x7654_3210, 0xfedc_ba98];
    let mut tensors = vec![
        i32s("x.weight_packed", &[2, 1], &words),
        bf16s("x.weight_scale", &[2, 2], &[1.0, 2.0, 0.5, 4.0]),
        raw("x.weight_shape", "I64", &[2], [2_i64, 8].iter().flat_map(|dim| dim.to_le_bytes()).collect()),
    ];
    let symmetric = [-8., -7., -6., -5., -8., -6., -4., -2., 0., 0.5, 1., 1.5, 16., 20., 24., 28.];
    assert_eq!(values(&tensors, 2, 8), symmetric);
    // Zero points are packed along the outputs: row 0 in the low nibble. [group 0, group 1].
    tensors.push(i32s("x.weight_zero_point", &[1, 2], &[0x91, 0xf4]));
    let asymmetric = [-1., 0., 1., 2., 0., 2., 4., 6., -0.5, 0., 0.5, 1., -12., -8., -4., 0.];
    assert_eq!(values(&tensors, 2, 8), asymmetric);
    tensors[2] = raw("x.weight_shape", "I64", &[2], vec![9; 16]);
    assert!(
        matches!(failure(&tensors, &one(2, 8)), Error::Mismatch { tensor, .. } if tensor == "x.weight_shape")
    );
    tensors.push(i32s("x.weight_g_idx", &[8], &[0; 8]));
    assert!(
        matches!(failure(&tensors, &one(2, 8)), Error::Unsupported { reason, .. } if reason.contains("g_idx"))
    );
}

/// 16 inputs: codes 0 to 15, so all values of E2M1, low nibble first.
const ALL_CODES: [u8; 8] = [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe];
const ALL_VALUES: [f32; 16] = [0., 0.5, 1., 1.5, 2., 3., 4., 6., -0., -0.5, -1., -1.5, -2., -3., -4., -6.];

#[test]
fn nvfp4_of_both_producers() {
    // 0x40 is 2.0 in E4M3; a factor of 1/4 in both dialects.
    let wanted: Vec<f32> = ALL_VALUES.iter().map(|value| value * 0.5).collect();
    let ct = [
        raw("x.weight_packed", "U8", &[1, 8], ALL_CODES.to_vec()),
        raw("x.weight_scale", "F8_E4M3", &[1, 1], vec![0x40]),
        f32s("x.weight_global_scale", &[1], &[4.0]),
        f32s("x.input_global_scale", &[1], &[9.0]),
    ];
    assert_eq!(values(&ct, 1, 16), wanted);
    let modelopt = [
        raw("x.weight", "U8", &[1, 8], ALL_CODES.to_vec()),
        raw("x.weight_scale", "F8_E4M3", &[1, 1], vec![0x40]),
        f32s("x.weight_scale_2", &[], &[0.25]),
        f32s("x.input_scale", &[], &[9.0]),
    ];
    assert_eq!(values(&modelopt, 1, 16), wanted);
    assert!(
        matches!(failure(&ct[..2], &one(1, 16)), Error::MissingCompanion { wanted, .. } if wanted.contains("weight_global_scale"))
    );
    assert!(
        matches!(failure(&modelopt[..2], &one(1, 16)), Error::MissingCompanion { wanted, .. } if wanted.contains("weight_scale_2"))
    );
    let mut broken = ct.to_vec();
    broken[2] = f32s("x.weight_global_scale", &[1], &[0.0]);
    assert!(
        matches!(failure(&broken, &one(1, 16)), Error::Mismatch { tensor, .. } if tensor == "x.weight_global_scale")
    );
    broken[1].bytes = vec![0x7f];
    assert!(
        matches!(failure(&broken, &one(1, 16)), Error::NonFinite { tensor, count: 1, .. } if tensor == "x.weight_scale")
    );
}

#[test]
fn nvfp4_fused_experts_keep_a_factor_per_half() {
    // Two experts, hidden 16, intermediate 16; gate and up of expert e have factors 2^e and 2^e / 4.
    let codes = |rows: usize| ALL_CODES.repeat(2 * rows);
    let one = |rows: usize| vec![0x38; 2 * rows];
    let tensors = [
        raw(&format!("{E}.gate_up_proj"), "U8", &[2, 32, 8], codes(32)),
        raw(&format!("{E}.gate_up_proj_weight_scale"), "F8_E4M3", &[2, 32, 1], one(32)),
        f32s(&format!("{E}.gate_up_proj_weight_scale_2"), &[2, 2], &[1.0, 0.25, 2.0, 0.5]),
        f32s(&format!("{E}.gate_up_proj_input_scale"), &[], &[1.0]),
        raw(&format!("{E}.down_proj"), "U8", &[2, 16, 8], codes(16)),
        raw(&format!("{E}.down_proj_weight_scale"), "F8_E4M3", &[2, 16, 1], one(16)),
        f32s(&format!("{E}.down_proj_weight_scale_2"), &[2], &[3.0, 5.0]),
    ];
    let got = experts(&tensors, 2, 16, 16);
    for (expert, factors) in [(0, [1.0, 0.25, 3.0]), (1, [2.0, 0.5, 5.0])] {
        for (matrix, factor) in got[expert].iter().zip(factors) {
            assert_eq!(matrix.len(), 256);
            assert!(matrix.iter().zip(ALL_VALUES.iter().cycle()).all(|(got, value)| *got == value * factor));
        }
    }
}

#[test]
fn fp8_per_tensor_channel_and_block() {
    let bytes: Vec<u8> = (0..6).map(|i| 0x30 + i).collect();
    let weight = raw("x.weight", "F8_E4M3", &[2, 3], bytes.clone());
    let check = |scales: Tensor, scale: &dyn Fn(usize) -> f32| {
        let wanted: Vec<f32> = bytes.iter().enumerate().map(|(at, &byte)| e4m3(byte) * scale(at)).collect();
        assert_eq!(values(&[weight.clone(), scales], 2, 3), wanted);
    };
    check(f32s("x.weight_scale", &[], &[0.5]), &|_| 0.5);
    check(bf16s("x.weight_scale_inv", &[1, 1], &[2.0]), &|_| 2.0);
    check(f32s("x.weight_scale", &[2, 1], &[0.5, 3.0]), &|at| [0.5, 3.0][at / 3]);
    assert!(matches!(failure(std::slice::from_ref(&weight), &one(2, 3)), Error::MissingCompanion { .. }));
    let inf = [weight, f32s("x.weight_scale", &[2, 1], &[f32::INFINITY, 1.0])];
    assert!(matches!(failure(&inf, &one(2, 3)), Error::NonFinite { count: 1, total: 2, .. }));
    // Partial blocks at both edges: 130 x 257 in blocks of 128.
    let (n, k) = (130, 257);
    let bytes: Vec<u8> = (0..n * k).map(|i| (i % 0x7f) as u8).collect();
    let scales = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
    let tensors =
        [raw("x.weight", "F8_E4M3", &[n, k], bytes.clone()), bf16s("x.weight_scale_inv", &[2, 3], &scales)];
    let got = values(&tensors, n, k);
    for (at, value) in got.into_iter().enumerate() {
        assert_eq!(value, e4m3(bytes[at]) * scales[at / k / 128 * 3 + at % k / 128]);
    }
}

#[test]
fn fused_transposed_experts() {
    // Number at (row, column) of a matrix of expert e; small enough to be exact in BF16.
    let (count, hidden, inter) = (2, 3, 5);
    let gate_up = |e: usize, row: usize, column: usize| (100 * e + 10 * row + column) as f32;
    let stored = |transposed: bool| {
        let (mut up, mut down) = (Vec::new(), Vec::new());
        for e in 0..count {
            if transposed {
                up.extend((0..hidden).flat_map(|c| (0..2 * inter).map(move |r| gate_up(e, r, c))));
                down.extend((0..inter).flat_map(|c| (0..hidden).map(move |r| gate_up(e, r, c))));
            } else {
                up.extend((0..2 * inter).flat_map(|r| (0..hidden).map(move |c| gate_up(e, r, c))));
                down.extend((0..hidden).flat_map(|r| (0..inter).map(move |c| gate_up(e, r, c))));
            }
        }
        let shapes = if transposed {
            [[count, hidden, 2 * inter], [count, inter, hidden]]
        } else {
            [[count, 2 * inter, hidden], [count, hidden, inter]]
        };
        [
            bf16s(&format!("{E}.gate_up_proj"), &shapes[0], &up),
            bf16s(&format!("{E}.down_proj"), &shapes[1], &down),
        ]
    };
    for transposed in [false, true] {
        let got = experts(&stored(transposed), count, hidden, inter);
        for (e, [gate, up, down]) in got.iter().enumerate() {
            let matrix = |rows: std::ops::Range<usize>, columns: usize| {
                rows.flat_map(|r| (0..columns).map(move |c| gate_up(e, r, c))).collect::<Vec<_>>()
            };
            assert_eq!(gate, &matrix(0..inter, hidden));
            assert_eq!(up, &matrix(inter..2 * inter, hidden));
            assert_eq!(down, &matrix(0..hidden, inter));
        }
    }
    let mixed = [stored(true)[0].clone(), stored(false)[1].clone()];
    assert!(matches!(
        failure(&mixed, &[ParamSpec::experts(E, count, hidden, inter)]),
        Error::Unsupported { .. }
    ));
}

#[test]
fn fused_fp8_scales_follow_the_orientation_and_a_cut_block() {
    // hidden 130 (two blocks), intermediate 96: the seam of gate and up, at row 96, cuts the first block of 128.
    let (hidden, inter) = (130, 96);
    let byte = |row: usize, column: usize| ((row * 3 + column * 7) % 0x7e) as u8;
    let scale = |row: usize, column: usize| (1 + row / 128 * 2 + column / 128) as f32;
    let up: Vec<u8> = (0..hidden).flat_map(|c| (0..2 * inter).map(move |r| byte(r, c))).collect();
    let down: Vec<u8> = (0..inter).flat_map(|c| (0..hidden).map(move |r| byte(r, c))).collect();
    let tensors = [
        raw(&format!("{E}.gate_up_proj"), "F8_E4M3", &[1, hidden, 2 * inter], up),
        // Stored [in blocks, out blocks]: scale of (row block, column block) is 1 + 2 r + c.
        bf16s(&format!("{E}.gate_up_proj_scale_inv"), &[1, 2, 2], &[1.0, 3.0, 2.0, 4.0]),
        raw(&format!("{E}.down_proj"), "F8_E4M3", &[1, inter, hidden], down),
        bf16s(&format!("{E}.down_proj_scale_inv"), &[1, 1, 2], &[1.0, 3.0]),
    ];
    let got = experts(&tensors, 1, hidden, inter);
    let wanted = |from: usize, rows: usize, columns: usize| {
        (from..from + rows)
            .flat_map(|r| (0..columns).map(move |c| e4m3(byte(r, c)) * scale(r, c)))
            .collect::<Vec<_>>()
    };
    assert_eq!(got[0], [wanted(0, inter, hidden), wanted(inter, inter, hidden), wanted(0, hidden, inter)]);
}

#[test]
fn unfused_experts_in_both_namings() {
    for projection_major in [false, true] {
        let mut tensors = Vec::new();
        for expert in 0..2 {
            for (projection, number) in [("gate_proj", 1.0), ("up_proj", 2.0), ("down_proj", 3.0)] {
                let name = if projection_major {
                    format!("{projection}.{expert}")
                } else {
                    format!("{expert}.{projection}")
                };
                tensors.push(f32s(&format!("{E}.{name}.weight"), &[1, 1], &[number + 10.0 * expert as f32]));
            }
        }
        let got = experts(&tensors, 2, 1, 1);
        assert_eq!(got, [[vec![1.0], vec![2.0], vec![3.0]], [vec![11.0], vec![12.0], vec![13.0]]]);
    }
}

#[test]
fn everything_missing_and_left_over_is_listed() {
    let tensors =
        [f32s("x.weight", &[1, 1], &[1.0]), f32s("spare.weight", &[1], &[1.0]), f32s("x.bias", &[1], &[1.0])];
    let specs = [
        ParamSpec::linear("x", 1, 1, Shard::Rows),
        ParamSpec::linear("y", 1, 1, Shard::Rows),
        ParamSpec::vector("model.norm.weight", [1, 4]),
        ParamSpec::experts(E, 1, 1, 1),
    ];
    let Error::Incomplete { unfilled, unused } = failure(&tensors, &specs) else { panic!("wrong error") };
    assert_eq!(unused, ["spare.weight", "x.bias"]);
    let experts =
        ["gate_proj", "up_proj", "down_proj"].map(|projection| format!("{E}.0.{projection}.weight"));
    assert_eq!(unfilled[..2], ["y.weight", "model.language_model.norm.weight"]);
    assert_eq!(unfilled[2..], experts);
    assert!(matches!(failure(&tensors, &[specs[0].clone(), specs[0].clone()]), Error::Param { .. }));
}

#[test]
fn wrong_shapes_and_types_name_the_tensor() {
    for tensor in [f32s("x.weight", &[3, 2], &[0.0; 6]), raw("x.weight", "I64", &[2, 3], vec![0; 48])] {
        let message = failure(&[tensor], &one(2, 3)).to_string();
        assert!(message.contains("`x"), "{message}");
    }
}

#[test]
fn lazy_equals_eager_even_unaligned() {
    // Three bytes of something else put the weight at an odd address.
    let tensors = [
        raw("a.weight", "F8_E4M3", &[1, 3], vec![1, 2, 3]),
        f32s("b", &[1], &[1.0]),
        f32s("x.weight", &[1, 2], &[5.0, 6.0]),
    ];
    let mut specs = one(1, 2);
    specs.push(ParamSpec::linear("a", 1, 3, Shard::Rows));
    specs.push(ParamSpec::vector("b", [1, 1]));
    let mut all = tensors.to_vec();
    all.push(f32s("a.weight_scale", &[1], &[1.0]));
    let dir = folder(&all);
    for strategy in [LoadStrategy::Eager, LoadStrategy::Lazy] {
        let options = LoadOptions { strategy, ..LoadOptions::default() };
        let mut params = open(dir.path()).unwrap().load(&specs, &options).unwrap();
        assert_eq!(dequantize(&params.linear("x").unwrap().parts[0]), [5.0, 6.0]);
        let MatrixData::Fp8 { values, .. } = &params.linear("a").unwrap().parts[0].data else {
            panic!("not fp8")
        };
        assert_eq!(values[..], [1, 2, 3]);
        assert_eq!(params.num_bytes(), 4);
    }
}

#[test]
fn dummy_weights_are_of_the_named_scheme_and_finite() {
    let specs = [
        ParamSpec::linear("lm_head", 8, 128, Shard::Vocab),
        ParamSpec::fused("model.layers.0.self_attn", &[("q_proj", 8)], 128, Shard::Rows),
        ParamSpec::experts(E, 2, 128, 128),
        ParamSpec::vector("model.norm.weight", [1, 128]),
    ];
    let configs = [
        ("{}", "bf16"),
        (r#"{"quantization_config":{"quant_method":"awq","group_size":64}}"#, "int4"),
        (
            r#"{"quantization_config":{"quant_method":"compressed-tensors","format":"nvfp4-pack-quantized"}}"#,
            "nvfp4",
        ),
        (r#"{"quantization_config":{"quant_method":"modelopt","quant_algo":"NVFP4"}}"#, "nvfp4"),
        (r#"{"quantization_config":{"quant_method":"fp8","weight_block_size":[128,128]}}"#, "fp8"),
    ];
    for (config, scheme) in configs {
        let config = serde_json::from_str(config).unwrap();
        let build = |seed| dummy(&config, &specs, seed, Rank::SINGLE).unwrap();
        let (mut params, mut same) = (build(1), build(1));
        let q = params.linear("model.layers.0.self_attn").unwrap();
        let found = match &q.parts[0].data {
            MatrixData::Dense { .. } => "bf16",
            MatrixData::Int4 { .. } => "int4",
            MatrixData::Nvfp4 { .. } => "nvfp4",
            MatrixData::Fp8 { .. } => "fp8",
        };
        assert_eq!(found, scheme);
        let numbers = dequantize(&q.parts[0]);
        let mean_square = numbers.iter().map(|value| value * value).sum::<f32>() / numbers.len() as f32;
        // The typical size is 1 / sqrt(k): within a factor of two, and never NaN.
        assert!((mean_square * 128.0).sqrt().log2().abs() < 1.0, "{scheme}: {mean_square}");
        assert_eq!(numbers, dequantize(&same.linear("model.layers.0.self_attn").unwrap().parts[0]));
        assert!(matches!(params.linear("lm_head").unwrap().parts[0].data, MatrixData::Dense { .. }));
        assert_eq!(params.experts(E).unwrap().experts.len(), 2);
        assert_eq!(params.vector("model.norm.weight").unwrap().values, vec![1.0; 128]);
    }
}

/// Without a mean of 0 all tokens would turn into one direction after some layers, and choose the same experts.
#[test]
fn dummy_weights_have_no_common_sign_and_differ() {
    let (n, k) = (256, 512);
    let specs = [
        ParamSpec::fused("model.layers.0.self_attn", &[("q_proj", n), ("k_proj", n)], k, Shard::Rows),
        ParamSpec::linear("model.layers.0.self_attn.o_proj", n, k, Shard::Columns),
        ParamSpec::linear("model.layers.0.mlp.gate", n, k, Shard::Replicated),
    ];
    let int4 = |symmetric: bool| {
        let weights = serde_json::json!({ "group_size": 64, "symmetric": symmetric });
        serde_json::json!({ "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": { "a": { "weights": weights } },
        } })
    };
    let nvfp4 =
        serde_json::json!({ "quantization_config": { "quant_method": "modelopt", "quant_algo": "NVFP4" } });
    let fp8 = serde_json::json!({ "quantization_config": { "quant_method": "fp8", "weight_block_size": [128, 128] } });
    for config in [int4(true), int4(false), nvfp4, fp8, serde_json::json!({})] {
        let mut params = dummy(&config, &specs, 3, Rank::SINGLE).unwrap();
        let size = |values: &[f32]| {
            let len = values.len() as f64;
            let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / len;
            let square = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / len;
            // In units of 1 / sqrt(k): the mean of 131,072 random weights is below a hundredth of their size.
            ((mean * (k as f64).sqrt()).abs(), (square * k as f64).sqrt())
        };
        let qk = params.linear(&specs[0].name).unwrap();
        let (q, k) = (dequantize(&qk.parts[0]), dequantize(&qk.parts[1]));
        assert_ne!(q, k);
        for (values, want) in [
            (q, 1.0),
            (dequantize(&params.linear(&specs[1].name).unwrap().parts[0]), 0.25),
            (dequantize(&params.linear(&specs[2].name).unwrap().parts[0]), 1.0),
        ] {
            let (mean, size) = size(&values);
            assert!(mean < 0.014 * want, "{config}: mean {mean}");
            assert!((size / want).log2().abs() < 0.6, "{config}: size {size}, not {want}");
        }
    }
}
