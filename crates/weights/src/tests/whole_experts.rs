//! Ranks that hold whole experts: each reads its own, to the byte, and nothing of the others. How experts are cut is tested in `ranks.rs`.

use std::path::Path;

use spark_backend::Rank;

use super::files::{Tensor, folder, open};
use super::layout::{Format, Size, specs, tensors, write_hollow};
use super::ranks::{load_counted, matrices, rank, stacked};
use crate::plan::Plan;
use crate::{LoadOptions, LoadStrategy, ParamKind, ParamSpec, Shard};

const FORMATS: [Format; 3] = [Format::Awq, Format::Nvfp4, Format::Fp8];

/// The same parameters, of whose experts ranks hold whole ones.
fn whole_experts(mut specs: Vec<ParamSpec>) -> Vec<ParamSpec> {
    for spec in specs.iter_mut().filter(|spec| matches!(spec.kind, ParamKind::Experts { .. })) {
        spec.shard = Shard::WholeExperts;
    }
    specs
}

/// Where the bytes of experts lie that a rank reads, in order, and each other's neighbours joined.
fn ranges(dir: &Path, specs: &[ParamSpec], rank: Rank) -> Vec<(usize, u64, u64)> {
    let checkpoint = open(dir).unwrap();
    let plan = Plan::new(&checkpoint, specs, rank).unwrap();
    let items = plan.items.iter().filter(|item| matches!(specs[item.spec].kind, ParamKind::Experts { .. }));
    let mut all: Vec<_> = items
        .flat_map(|item| &item.segments)
        .map(|at| (checkpoint.tensors[at.tensor].file, at.offset, at.offset + at.len as u64))
        .collect();
    all.sort_unstable();
    all.dedup_by(|next, last| {
        let is_next = next.0 == last.0 && next.1 == last.2;
        last.2 = if is_next { next.2 } else { last.2 };
        is_next
    });
    all
}

fn num_bytes(ranges: &[(usize, u64, u64)]) -> u64 {
    ranges.iter().map(|(_, begin, end)| end - begin).sum()
}

#[test]
fn every_byte_of_experts_is_read_by_one_rank() {
    for format in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        write_hollow(dir.path(), format, Size::WHOLE);
        let specs = whole_experts(specs(Size::WHOLE));
        let all = num_bytes(&ranges(dir.path(), &specs, Rank::SINGLE));
        let summary = open(dir.path()).unwrap().summary(&specs, 4).unwrap();
        let experts = summary.parts.iter().find(|part| part.part == "experts").unwrap();
        assert_eq!(all, experts.bytes, "{format:?}");
        let mut together = Vec::new();
        for (index, counted) in summary.ranks.iter().enumerate() {
            let own = ranges(dir.path(), &specs, rank(index, 4));
            assert_eq!(num_bytes(&own) * 4, all, "{format:?}, rank {index}");
            together.extend(own);
            // Attention and what is replicated come on top.
            assert!(
                counted.bytes_read > all / 4 && counted.bytes_read < all * 2 / 5,
                "{format:?}: {counted:?}"
            );
        }
        together.sort_unstable();
        assert!(together.windows(2).all(|two| two[0].0 < two[1].0 || two[0].2 <= two[1].1), "{format:?}");
    }
}

#[test]
fn a_rank_has_its_experts_as_they_are() {
    let size = Size { layers: 1, experts: 4, vocab: 1001, has_vision: false };
    for format in FORMATS {
        let specs = whole_experts(specs(size));
        let dir = folder(&tensors(format, size));
        let summary = open(dir.path()).unwrap().summary(&specs, 2).unwrap();
        let spec = specs.iter().find(|spec| spec.shard == Shard::WholeExperts).unwrap();
        let all = matrices(&mut load_counted(dir.path(), &specs, Rank::SINGLE).0, spec);
        for (index, counted) in summary.ranks.iter().enumerate() {
            let (mut params, read) = load_counted(dir.path(), &specs, rank(index, 2));
            assert_eq!(read, counted.bytes_read, "{format:?}");
            let held = matrices(&mut params, spec);
            assert!(held == all[6 * index..6 * index + 6], "{format:?}, rank {index}");
        }
        let error = open(dir.path()).unwrap().summary(&specs, 3).unwrap_err().to_string();
        assert!(error.contains("evenly") && error.contains("3 ranks"), "{error}");
    }
}

/// One tensor for all experts of a layer, in every layout; a number of features that ranks could not share.
#[test]
fn stacked_experts_come_apart_whole() {
    let kinds = [
        "bf16, transposed",
        "fp8 by block",
        "fp8 by output",
        "fp8 by matrix",
        "fp8 by block, transposed",
        "nvfp4",
    ];
    let name = "model.layers.0.mlp.experts";
    for kind in kinds {
        let tensors: Vec<_> = stacked(kind)
            .into_iter()
            .map(|tensor| Tensor { name: tensor.name.replace("e.", &format!("{name}.")), ..tensor })
            .collect();
        let dir = folder(&tensors);
        let spec = ParamSpec::experts(name, 2, 64, 192).sharded(Shard::WholeExperts);
        let specs = [spec.clone()];
        let all = matrices(&mut load_counted(dir.path(), &specs, Rank::SINGLE).0, &spec);
        let bytes = num_bytes(&ranges(dir.path(), &specs, Rank::SINGLE));
        for index in [0, 1] {
            let rank = rank(index, 2);
            assert_eq!(2 * num_bytes(&ranges(dir.path(), &specs, rank)), bytes, "{kind}");
            for strategy in [LoadStrategy::Eager, LoadStrategy::Lazy] {
                let options = LoadOptions { rank, strategy, ..LoadOptions::default() };
                let mut params = open(dir.path()).unwrap().load(&specs, &options).unwrap();
                let held = matrices(&mut params, &spec);
                assert!(held == all[3 * index..3 * index + 3], "{kind}: rank {index}");
            }
        }
        let uneven = LoadOptions { rank: rank(0, 3), ..LoadOptions::default() };
        let error = open(dir.path()).unwrap().load(&specs, &uneven).unwrap_err().to_string();
        assert!(error.contains("2 experts cannot be shared evenly by 3 ranks"), "{error}");
    }
}

#[test]
fn random_experts_of_a_rank_are_those_of_one() {
    use serde_json::json;
    let spec = ParamSpec::experts("model.layers.0.mlp.experts", 4, 64, 48).sharded(Shard::WholeExperts);
    let specs = [spec.clone(), ParamSpec::linear("model.layers.0.self_attn.o_proj", 64, 64, Shard::Columns)];
    for scheme in [json!({}), json!({"quant_method": "awq", "group_size": 16})] {
        let config = json!({ "quantization_config": scheme });
        let all = matrices(&mut crate::dummy(&config, &specs, 9, Rank::SINGLE).unwrap(), &spec);
        for index in 0..4 {
            let mut params = crate::dummy(&config, &specs, 9, rank(index, 4)).unwrap();
            assert!(matrices(&mut params, &spec) == all[3 * index..3 * index + 3], "{scheme}: rank {index}");
        }
        let Err(error) = crate::dummy(&config, &specs, 9, rank(0, 3)).unwrap().experts(&spec.name) else {
            panic!("4 experts on 3 ranks")
        };
        assert!(error.to_string().contains("4 experts cannot be shared evenly by 3 ranks"), "{error}");
    }
}
