//! What a checkpoint contains and what each rank would hold, for `inspect`; and what a rank would hold of a model without one, for
//! `plan`. Reads no data.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;
use spark_backend::Rank;

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::exchange::table::Table;
use crate::load::requests;
use crate::plan::{Item, Plan, Recipe};
use crate::read::num_bytes;
use crate::scheme::{NVFP4_GROUP, Scheme};
use crate::shard::{experts, part};
use crate::spec::{ParamKind, ParamSpec, Shard, join};

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
    /// What each rank reads and holds, by rank.
    pub ranks: Vec<RankSummary>,
}

/// One rank's part of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RankSummary {
    /// Weight tensors that it holds at least a part of.
    pub tensors: u64,
    /// Bytes that it reads from the files: where its part of a tensor is scattered, the whole tensor.
    pub bytes_read: u64,
    /// Bytes that it reads where ranks read for each other (`--load-exchange`).
    pub bytes_read_in_exchange: u64,
    /// Bytes that it holds, in canonical host form.
    pub bytes_held: u64,
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
    let ranks = (0..world).map_while(|index| Rank::new(index, world));
    let table = Table::new(checkpoint, specs, world)?;
    let ranks =
        ranks.map(|rank| summarise_rank(checkpoint, specs, rank, &table)).collect::<Result<Vec<_>>>()?;
    let mut parts: BTreeMap<&'static str, PartSummary> = BTreeMap::new();
    let mut summary = Summary { parts: Vec::new(), file_bytes: 0, parameters: 0, ranks };
    for item in &Plan::new(checkpoint, specs, Rank::SINGLE)?.items {
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
    }
    summary.parts = PARTS.iter().filter_map(|part| parts.remove(part)).collect();
    Ok(summary)
}

/// What one rank reads and holds.
fn summarise_rank(
    checkpoint: &Checkpoint,
    specs: &[ParamSpec],
    rank: Rank,
    table: &Table,
) -> Result<RankSummary> {
    let items = Plan::new(checkpoint, specs, rank)?.items;
    let mut summary = RankSummary { tensors: 0, bytes_read: 0, bytes_read_in_exchange: 0, bytes_held: 0 };
    for item in &items {
        let bytes = held_bytes(item, &specs[item.spec], rank);
        summary.tensors += u64::from(bytes > 0);
        summary.bytes_held += bytes;
    }
    let mut requests = requests(checkpoint, &items);
    summary.bytes_read = num_bytes(&mut requests);
    requests.retain(|request| table.is_read_by(rank.index(), items[request.item].spec, request));
    summary.bytes_read_in_exchange = num_bytes(&mut requests);
    Ok(summary)
}

/// Host bytes of an item on a rank.
fn held_bytes(item: &Item, spec: &ParamSpec, rank: Rank) -> u64 {
    match &item.recipe {
        Recipe::Floats { dtype } => {
            let count = item.segments[0].len / dtype.size();
            4 * held_floats(spec, item.slot, count, rank).unwrap_or(0)
        }
        Recipe::Matrix(layout) => {
            let bytes = |[rows, columns]: &[Range<usize>; 2]| {
                host_bytes(&layout.scheme, rows.len() as u64, columns.len() as u64)
            };
            item.keep.iter().map(bytes).sum()
        }
    }
}

/// Numbers that a rank holds of the `count` of a vector, or of the bias of part `slot`.
fn held_floats(spec: &ParamSpec, slot: usize, count: usize, rank: Rank) -> Result<u64> {
    let held = match (&spec.kind, spec.shard) {
        (ParamKind::Vector { .. }, Shard::Replicated) => count,
        (&ParamKind::Vector { shape: [rows, cols] }, Shard::Vocab) => rank.range(rows).len() * cols,
        (ParamKind::Vector { .. }, _) => rank.range(count).len(),
        // The bias of a row-parallel layer is rank 0's.
        (_, Shard::Columns) if rank.is_first() => count,
        (_, Shard::Columns) => 0,
        _ => part(spec, slot, [count, 1], rank)?[0].len(),
    };
    Ok(held as u64)
}

/// Numbers of a part of a model that one rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeldNumbers {
    /// In matrices, whatever their scheme.
    pub matrices: u64,
    /// In norms, biases and tables: float32 on the host.
    pub floats: u64,
}

/// What `rank` holds of a model that is only described, by the parts of a [`Summary`].
///
/// # Errors
/// A parameter that cannot be split over the ranks.
pub fn held_numbers(specs: &[ParamSpec], rank: Rank) -> Result<BTreeMap<&'static str, HeldNumbers>> {
    let mut parts: BTreeMap<&'static str, HeldNumbers> = BTreeMap::new();
    for spec in specs {
        let held = |slot, shape| {
            Ok(part(spec, slot, shape, rank)?.iter().map(|kept| kept.len() as u64).product::<u64>())
        };
        match &spec.kind {
            &ParamKind::Vector { shape: [rows, cols] } => {
                parts.entry(part_of(&spec.name)).or_default().floats +=
                    held_floats(spec, 0, rows * cols, rank)?;
            }
            ParamKind::Linear { parts: modules, k, bias } => {
                for (slot, (module, n)) in modules.iter().enumerate() {
                    let numbers = parts.entry(part_of(&join(&spec.name, module))).or_default();
                    let count = spec.shard.matrices();
                    numbers.matrices += count as u64 * held(slot, [n / count, *k])?;
                    if *bias {
                        numbers.floats += held_floats(spec, slot, *n, rank)?;
                    }
                }
            }
            &ParamKind::Experts { hidden, intermediate, .. } => {
                let shapes = [[intermediate, hidden], [intermediate, hidden], [hidden, intermediate]];
                let each = (0..3).map(|slot| held(slot, shapes[slot])).sum::<Result<u64>>()?;
                parts.entry(part_of(&spec.name)).or_default().matrices +=
                    experts(spec, rank)?.len() as u64 * each;
            }
        }
    }
    Ok(parts)
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
