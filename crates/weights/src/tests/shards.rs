//! Shards: the ranks' parts put together are the whole, for every scheme and for cuts inside groups.

use bytes::Bytes;
use spark_backend::{Dtype, Matrix, MatrixData, Rank};

use super::dequantize::dequantize;
use super::files::{f16s, f32s, folder, i32s, load, open};
use crate::shard::cut;
use crate::{LoadOptions, ParamSpec, Shard};

/// Bytes that repeat late.
fn noise(len: usize) -> Bytes {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect()
}

fn half_scales(count: usize) -> Bytes {
    (0..count).flat_map(|i| half::f16::from_f32(1.0 + (i % 64) as f32 / 8.0).to_le_bytes()).collect()
}

/// One matrix `[n, k]` of each scheme, with groups of 128.
fn matrices(n: usize, k: usize) -> Vec<Matrix> {
    let groups = k / 128;
    let int4 = |zeros| MatrixData::Int4 {
        codes: noise(n * k / 2),
        zeros,
        scales: half_scales(n * groups),
        scale_dtype: Dtype::F16,
        group_size: 128,
    };
    let finite = |len| noise(len).iter().map(|byte| byte & 0xbf).collect::<Bytes>();
    let fp8 = |block: [usize; 2]| MatrixData::Fp8 {
        values: finite(n * k),
        scales: (0..n.div_ceil(block[0]) * k.div_ceil(block[1])).map(|i| 1.0 + i as f32).collect(),
        block,
    };
    let all = [
        MatrixData::Dense {
            dtype: Dtype::F32,
            values: (0..n * k).flat_map(|i| (i as f32).to_le_bytes()).collect(),
        },
        int4(None),
        int4(Some((0..n * groups).map(|i| (i % 16) as u8).collect())),
        MatrixData::Nvfp4 { codes: noise(n * k / 2), scales: finite(n * k / 16), alpha: 0.5 },
        fp8([128, 128]),
        fp8([1, k]),
        fp8([n, k]),
    ];
    all.into_iter().map(|data| Matrix { n, k, data }).collect()
}

#[test]
fn parts_are_exact_for_every_scheme() {
    let spec = ParamSpec::linear("x", 1, 1, Shard::Rows);
    // The second of each is a cut inside an AWQ group and an FP8 block: 384 / 2 and 768 / 8.
    for (size, world) in [(256, 2), (384, 2), (768, 8), (384, 4)] {
        let other = 128;
        for along_columns in [false, true] {
            let (n, k) = if along_columns { (other, size) } else { (size, other) };
            for matrix in matrices(n, k) {
                let whole = dequantize(&matrix);
                for rank in 0..world {
                    let range = Rank::new(rank, world).unwrap().range(size);
                    let (rows, columns) = if along_columns { (0..n, range) } else { (range, 0..k) };
                    let part = cut(&spec, matrix.clone(), rows.clone(), columns.clone()).unwrap();
                    assert_eq!((part.n, part.k), (rows.len(), columns.len()));
                    let wanted: Vec<f32> = rows
                        .flat_map(|row| columns.clone().map(move |column| row * k + column))
                        .map(|at| whole[at])
                        .collect();
                    assert!(dequantize(&part) == wanted, "{size} / {world}, rank {rank}: {:?}", part.data);
                }
            }
        }
    }
}

#[test]
fn nvfp4_is_not_cut_inside_sixteen_inputs() {
    let spec = ParamSpec::linear("x", 1, 1, Shard::Columns);
    let matrix = matrices(16, 128).remove(3);
    assert!(cut(&spec, matrix, 0..16, 0..24).is_err());
}

#[test]
fn ranks_load_their_parts_and_the_summary_counts_them() {
    let specs = [
        ParamSpec::fused("a", &[("q", 4), ("k", 2)], 2, Shard::Rows).with_bias(),
        ParamSpec::linear("o", 2, 4, Shard::Columns).with_bias(),
        ParamSpec::linear("visual.qkv", 6, 2, Shard::Stacked { count: 3 }).with_bias(),
        ParamSpec::linear("lm_head", 3, 2, Shard::Vocab),
        ParamSpec::experts("mlp.experts", 1, 2, 2),
        ParamSpec::vector("norm", [1, 2]),
    ];
    let count = |len: usize| (0..len).map(|i| i as f32).collect::<Vec<_>>();
    let tensors = [
        f32s("a.q.weight", &[4, 2], &count(8)),
        f32s("a.q.bias", &[4], &count(4)),
        f32s("a.k.weight", &[2, 2], &count(4)),
        f32s("a.k.bias", &[2], &count(2)),
        f32s("o.weight", &[2, 4], &count(8)),
        f32s("o.bias", &[2], &count(2)),
        f32s("visual.qkv.weight", &[6, 2], &count(12)),
        f32s("visual.qkv.bias", &[6], &count(6)),
        f32s("lm_head.weight", &[3, 2], &count(6)),
        f32s("mlp.experts.0.gate_proj.weight", &[2, 2], &count(4)),
        f32s("mlp.experts.0.up_proj.weight", &[2, 2], &count(4)),
        f32s("mlp.experts.0.down_proj.weight", &[2, 2], &count(4)),
        f32s("norm", &[2], &count(2)),
    ];
    let dir = folder(&tensors);
    let checkpoint = open(dir.path()).unwrap();
    let summary = checkpoint.summary(&specs, 2).unwrap();
    for rank in 0..2 {
        let options = LoadOptions { rank: Rank::new(rank, 2).unwrap(), ..LoadOptions::default() };
        let mut params = checkpoint.load(&specs, &options).unwrap();
        assert_eq!(params.num_bytes() as u64, summary.ranks[rank].bytes_held);
        let qk = params.linear("a").unwrap();
        let first = rank as f32;
        let parts: Vec<_> = qk.parts.iter().map(dequantize).collect();
        let from = |start: f32, len: usize| (0..len).map(|i| start + i as f32).collect::<Vec<_>>();
        assert_eq!(parts, [from(4.0 * first, 4), from(2.0 * first, 2)]);
        assert_eq!(qk.bias.unwrap(), [2.0 * first, 2.0 * first + 1.0, first]);
        let o = params.linear("o").unwrap();
        let c = 2.0 * first;
        assert_eq!(dequantize(&o.parts[0]), [c, c + 1.0, c + 4.0, c + 5.0]);
        assert_eq!(o.bias.is_some(), rank == 0);
        let qkv = params.linear("visual.qkv").unwrap();
        let parts: Vec<_> = qkv.parts.iter().map(dequantize).collect();
        assert_eq!(parts, [0.0, 4.0, 8.0].map(|row| from(row + c, 2)), "a row of each of q, k and v");
        assert_eq!(qkv.bias.unwrap(), [first, first + 2.0, first + 4.0]);
        assert_eq!(params.linear("lm_head").unwrap().n(), 2 - rank);
        let experts = params.experts("mlp.experts").unwrap();
        let (gate_up, down) = &experts.experts[0];
        assert_eq!(dequantize(&gate_up.parts[0]), [c, c + 1.0]);
        assert_eq!(dequantize(&down.parts[0]), [first, first + 2.0]);
        assert_eq!(params.vector("norm").unwrap().values, [0.0, 1.0]);
        params.finish().unwrap();
    }
    let uneven = LoadOptions { rank: Rank::new(0, 3).unwrap(), ..LoadOptions::default() };
    assert!(checkpoint.load(&specs, &uneven).is_err());
    let qkv = checkpoint.load(&specs, &LoadOptions::default()).unwrap().linear("visual.qkv").unwrap();
    assert_eq!(
        qkv.parts.iter().flat_map(dequantize).collect::<Vec<_>>(),
        count(12),
        "one rank has all of it"
    );
    assert_eq!(qkv.bias.unwrap(), count(6));
    let uneven = [ParamSpec::linear("visual.qkv", 6, 2, Shard::Stacked { count: 4 })];
    let error = checkpoint.load(&uneven, &LoadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("visual.qkv") && error.contains("4 layers"), "{error}");
}

#[test]
fn summary_tells_scheme_and_bytes_by_part() {
    let tensors = [
        i32s("model.layers.0.self_attn.q_proj.qweight", &[128, 1], &[0; 128]),
        i32s("model.layers.0.self_attn.q_proj.qzeros", &[1, 1], &[0]),
        f16s("model.layers.0.self_attn.q_proj.scales", &[1, 8], &[1.0; 8]),
        f16s("model.layers.0.self_attn.o_proj.weight", &[2, 8], &[1.0; 16]),
        f16s("model.layers.0.mlp.gate.weight", &[1, 2], &[1.0; 2]),
        f16s("model.norm.weight", &[2], &[1.0; 2]),
    ];
    let specs = [
        ParamSpec::linear("model.layers.0.self_attn.q_proj", 8, 128, Shard::Rows),
        ParamSpec::linear("model.layers.0.self_attn.o_proj", 2, 8, Shard::Columns),
        ParamSpec::linear("model.layers.0.mlp.gate", 1, 2, Shard::Replicated),
        ParamSpec::vector("model.norm.weight", [1, 2]),
    ];
    let dir = folder(&tensors);
    let summary = open(dir.path()).unwrap().summary(&specs, 1).unwrap();
    let names: Vec<_> = summary.parts.iter().map(|part| (part.part, part.bytes)).collect();
    assert_eq!(names, [("attention", 512 + 4 + 16 + 32), ("router", 4), ("norms", 4)]);
    let schemes: Vec<_> =
        summary.parts[0].schemes.iter().map(|(name, scheme)| (name.as_str(), scheme.bytes)).collect();
    assert_eq!(schemes, [("awq-int4-g128", 532), ("f16", 32)]);
    assert_eq!(summary.parameters, 1024 + 16 + 2 + 2);
    assert_eq!(summary.ranks[0].bytes_held, load(&tensors, &specs).unwrap().num_bytes() as u64);
    assert_eq!((summary.ranks[0].tensors, summary.ranks[0].bytes_read), (4, summary.file_bytes));
}
