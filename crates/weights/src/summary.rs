//! What a checkpoint contains and what each rank would hold, for `inspect`. Reads no data.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::plan::{Item, Plan, Recipe};
use crate::scheme::{NVFP4_GROUP, Scheme};
use crate::shard::{Rank, part};
use crate::spec::{ParamKind, ParamSpec, Shard};

/// Bytes and schemes of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Parts of the model that it has, in the order embedding, attention, experts, mlp, router, norms, vision,
    /// lm_head, other.
    pub parts: Vec<PartSummary>,
    /// Bytes of the tensors that are loaded, as stored.
    pub file_bytes: u64,
    /// Weights that they stand for.
    pub parameters: u64,
    /// Bytes in canonical host form of what each rank holds, by rank.
    pub rank_bytes: Vec<u64>,
}

/// One part of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PartSummary {
    /// `embedding`, `attention`, `experts`, `mlp`, `router`, `norms`, `vision`, `lm_head` or `other`.
    pub part: &'static str,
    /// Its schemes by label, for example `bf16`, `awq-int4-g128`, `nvfp4`, `fp8-block-128x128`.
    pub schemes: BTreeMap<String, SchemeSummary>,
    /// Bytes as stored.
    pub bytes: u64,
}

/// What a part has of one scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct SchemeSummary {
    /// Weight tensors (of a fused expert tensor: one per expert).
    pub tensors: u64,
    /// Bytes as stored, scales included.
    pub bytes: u64,
    /// Weights.
    pub parameters: u64,
}

const PARTS: [&str; 9] =
    ["embedding", "attention", "experts", "mlp", "router", "norms", "vision", "lm_head", "other"];

/// The part that a parameter or tensor name belongs to.
fn part_of(name: &str) -> &'static str {
    let has = |what: &str| name.contains(what);
    if has("visual.") {
        "vision"
    } else if has("embed_tokens") {
        "embedding"
    } else if has("lm_head") {
        "lm_head"
    } else if has("norm") {
        "norms"
    } else if has("mlp.experts") {
        "experts"
    } else if has("mlp.gate.") || name.ends_with("mlp.gate") {
        "router"
    } else if has("attn") {
        "attention"
    } else if has("mlp.") {
        "mlp"
    } else {
        "other"
    }
}

/// Follows the plan of a load and adds up.
pub(crate) fn summarise(checkpoint: &Checkpoint, specs: &[ParamSpec], world: usize) -> Result<Summary> {
    let ranks = (0..world).map(|rank| Rank::new(rank, world)).collect::<Result<Vec<_>>>()?;
    Rank::new(0, world)?;
    let plan = Plan::new(checkpoint, specs)?;
    let mut parts: BTreeMap<&'static str, PartSummary> = BTreeMap::new();
    let mut summary = Summary { parts: Vec::new(), file_bytes: 0, parameters: 0, rank_bytes: vec![0; world] };
    for item in &plan.items {
        let name = &checkpoint.tensors[item.segments[0].tensor].normalised;
        let (label, parameters) = match &item.recipe {
            Recipe::Floats { dtype } => {
                (format!("{dtype:?}").to_lowercase(), (item.segments[0].len / dtype.size()) as u64)
            }
            Recipe::Matrix(layout) => (layout.scheme.label(), (layout.n * layout.k) as u64),
        };
        let bytes = item.segments.iter().map(|segment| segment.len as u64).sum::<u64>();
        let part_name = part_of(name);
        let part = parts.entry(part_name).or_insert_with(|| PartSummary {
            part: part_name,
            schemes: BTreeMap::new(),
            bytes: 0,
        });
        let scheme = part.schemes.entry(label).or_default();
        scheme.tensors += 1;
        scheme.bytes += bytes;
        scheme.parameters += parameters;
        part.bytes += bytes;
        summary.file_bytes += bytes;
        summary.parameters += parameters;
        for (rank, total) in ranks.iter().zip(&mut summary.rank_bytes) {
            *total += rank_bytes(item, &specs[item.spec], *rank)?;
        }
    }
    summary.parts = PARTS.iter().filter_map(|part| parts.remove(part)).collect();
    Ok(summary)
}

/// Host bytes of an item on a rank.
fn rank_bytes(item: &Item, spec: &ParamSpec, rank: Rank) -> Result<u64> {
    match &item.recipe {
        Recipe::Floats { dtype } => {
            let count = item.segments[0].len / dtype.size();
            let split = match (spec.shard, &spec.kind) {
                (Shard::Replicated, _) => count,
                (Shard::Vocab, ParamKind::Vector { shape: [rows, cols] }) => rank.range(*rows).len() * cols,
                // The bias of a row-parallel layer is rank 0's.
                (Shard::Columns, ParamKind::Linear { .. }) => {
                    if rank.is_first() {
                        count
                    } else {
                        0
                    }
                }
                _ => rank.range(count).len(),
            };
            Ok(4 * split as u64)
        }
        Recipe::Matrix(layout) => {
            let mut bytes = 0;
            for output in 0..layout.outputs {
                let [rows, columns] =
                    part(spec, item.slot + output, [layout.n / layout.outputs, layout.k], rank)?;
                bytes += host_bytes(&layout.scheme, rows.len() as u64, columns.len() as u64);
            }
            Ok(bytes)
        }
    }
}

/// Bytes of `[n, k]` in canonical form; of groups that a cut makes smaller, the whole ones are counted.
fn host_bytes(scheme: &Scheme, n: u64, k: u64) -> u64 {
    match scheme {
        Scheme::Dense { dtype } => n * k * dtype.size() as u64,
        Scheme::Awq { group, scale_dtype } => {
            n * k / 2 + n * k.div_ceil(*group as u64) * (1 + scale_dtype.size() as u64)
        }
        Scheme::PackedInt4 { group, scale_dtype, zeros, .. } => {
            n * k / 2 + n * k.div_ceil(*group as u64) * (u64::from(*zeros) + scale_dtype.size() as u64)
        }
        Scheme::Nvfp4 { .. } => n * k / 2 + n * k / NVFP4_GROUP as u64,
        Scheme::Fp8 { block, .. } => n * k + 4 * n.div_ceil(block[0] as u64) * k.div_ceil(block[1] as u64),
    }
}
