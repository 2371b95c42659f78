//! What a rank of a tensor-parallel group holds: ranges, and canonical matrices cut to them. Exact for every scheme: a
//! cut inside a quantisation group makes groups smaller and repeats their scales.

use std::ops::Range;

use bytes::Bytes;
use spark_backend::{Matrix, MatrixData, Rank, VectorWeight};

use crate::convert::gcd;
use crate::error::{Error, Result};
use crate::scheme::NVFP4_GROUP;
use crate::spec::{ParamKind, ParamSpec, Shard};

/// `rank`'s share of `size` features of `spec`, which have to be split evenly.
fn even(spec: &ParamSpec, size: usize, rank: Rank) -> Result<Range<usize>> {
    if size.is_multiple_of(rank.world()) {
        return Ok(rank.range(size));
    }
    Err(Error::Param {
        name: spec.name.clone(),
        reason: format!("{size} features cannot be split evenly over {} ranks", rank.world()),
    })
}

/// The outputs of part `slot` of q, k, v that `rank` holds, of `n`.
fn heads(spec: &ParamSpec, slot: usize, n: usize, num_kv_heads: usize, rank: Rank) -> Result<Range<usize>> {
    if slot == 0 {
        return even(spec, n, rank);
    }
    let world = rank.world();
    let fits = num_kv_heads > 0
        && n.is_multiple_of(num_kv_heads)
        && (num_kv_heads.is_multiple_of(world) || world.is_multiple_of(num_kv_heads));
    if !fits {
        let reason = format!("{num_kv_heads} KV heads in {n} features cannot be shared by {world} ranks");
        return Err(Error::Param { name: spec.name.clone(), reason });
    }
    let (heads, width) = (rank.kv_heads(num_kv_heads), n / num_kv_heads);
    Ok(heads.start * width..heads.end * width)
}

/// The experts of `spec` of which `rank` holds matrices; none of what has no experts.
///
/// # Errors
/// Experts that cannot be shared evenly.
pub(crate) fn experts(spec: &ParamSpec, rank: Rank) -> Result<Range<usize>> {
    match (&spec.kind, spec.shard) {
        (&ParamKind::Experts { num_experts, .. }, Shard::WholeExperts) => {
            if num_experts.is_multiple_of(rank.world()) {
                return Ok(rank.range(num_experts));
            }
            let reason = format!("{num_experts} experts cannot be shared evenly by {} ranks", rank.world());
            Err(Error::Param { name: spec.name.clone(), reason })
        }
        (&ParamKind::Experts { num_experts, .. }, _) => Ok(0..num_experts),
        _ => Ok(0..0),
    }
}

/// The rows and columns of matrix `slot` of `spec`, `[n, k]`, that `rank` holds, if it holds any of that matrix.
pub(crate) fn part(
    spec: &ParamSpec,
    slot: usize,
    [n, k]: [usize; 2],
    rank: Rank,
) -> Result<[Range<usize>; 2]> {
    Ok(match (spec.shard, &spec.kind) {
        (Shard::Replicated, _) | (Shard::WholeExperts, ParamKind::Experts { .. }) => [0..n, 0..k],
        (Shard::Vocab, _) => [rank.range(n), 0..k],
        (Shard::Rows | Shard::Stacked { .. }, _) => [even(spec, n, rank)?, 0..k],
        (Shard::Columns, _) => [0..n, even(spec, k, rank)?],
        (Shard::Qkv { num_kv_heads }, ParamKind::Linear { .. }) => {
            [heads(spec, slot, n, num_kv_heads, rank)?, 0..k]
        }
        // Gate and up give the intermediate features, down (every third) takes them.
        (Shard::Experts, ParamKind::Experts { .. }) if slot % 3 == 2 => [0..n, even(spec, k, rank)?],
        (Shard::Experts, ParamKind::Experts { .. }) => [even(spec, n, rank)?, 0..k],
        (Shard::Experts | Shard::WholeExperts | Shard::Qkv { .. }, _) => {
            let reason = format!("cannot be split by the rule {:?}", spec.shard);
            return Err(Error::Param { name: spec.name.clone(), reason });
        }
    })
}

/// `rank`'s part of a vector: of its columns when it has one row, else of its rows.
pub(crate) fn shard_vector(spec: &ParamSpec, vector: VectorWeight, rank: Rank) -> Result<VectorWeight> {
    let [rows, cols] = vector.shape;
    let range = match spec.shard {
        Shard::Replicated => return Ok(vector),
        Shard::Vocab => rank.range(rows),
        _ => even(spec, if rows == 1 { cols } else { rows }, rank)?,
    };
    if rows == 1 && spec.shard != Shard::Vocab {
        return Ok(VectorWeight { shape: [1, range.len()], values: vector.values[range].to_vec() });
    }
    let values = vector.values[range.start * cols..range.end * cols].to_vec();
    Ok(VectorWeight { values, shape: [range.len(), cols] })
}

/// `rank`'s part of the biases of fused parts, concatenated. Row-parallel partial sums are added up, so only rank 0
/// adds a bias to them.
pub(crate) fn shard_bias(spec: &ParamSpec, parts: Vec<Vec<f32>>, rank: Rank) -> Result<Option<Vec<f32>>> {
    if spec.shard == Shard::Columns && !rank.is_first() {
        return Ok(None);
    }
    let mut bias = Vec::new();
    for (slot, values) in parts.into_iter().enumerate() {
        for values in values.chunks_exact((values.len() / spec.shard.matrices()).max(1)) {
            let [range, _] = match spec.shard {
                Shard::Columns => [0..values.len(), 0..1],
                _ => part(spec, slot, [values.len(), 1], rank)?,
            };
            bias.extend_from_slice(&values[range]);
        }
    }
    Ok(Some(bias))
}

/// Fails where a rank's inputs do not begin and end with those that a scheme cannot tear apart.
pub(crate) fn expect_units(spec: &ParamSpec, columns: &Range<usize>, unit: usize) -> Result<()> {
    if columns.start.is_multiple_of(unit) && columns.end.is_multiple_of(unit) {
        return Ok(());
    }
    let reason = format!(
        "a rank would hold inputs {} to {}; its scheme packs {unit} of them together: use fewer ranks",
        columns.start, columns.end
    );
    Err(Error::Param { name: spec.name.clone(), reason })
}

/// Rows and columns of a matrix. Row ranges are slices of the same buffer, column ranges are copied.
pub(crate) fn cut(
    spec: &ParamSpec,
    matrix: Matrix,
    rows: Range<usize>,
    columns: Range<usize>,
) -> Result<Matrix> {
    let Matrix { n, k, data } = matrix;
    if rows == (0..n) && columns == (0..k) {
        return Ok(Matrix { n, k, data });
    }
    let whole = |multiple: usize| {
        expect_units(spec, &columns, multiple)?;
        Ok(columns.start / multiple..columns.end / multiple)
    };
    let data = match data {
        MatrixData::Dense { dtype, values } => {
            let bytes = columns.start * dtype.size()..columns.end * dtype.size();
            MatrixData::Dense { dtype, values: window(&values, k * dtype.size(), &rows, &bytes) }
        }
        MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
            let group = smaller_group(group_size, k, &columns);
            let groups = k / group_size;
            let regroup = |bytes: &Bytes, size: usize| {
                let rows = window(bytes, groups * size, &rows, &(0..groups * size));
                repeat_groups(&rows, [groups, size], [group_size, group], &columns)
            };
            MatrixData::Int4 {
                codes: window(&codes, k / 2, &rows, &whole(2)?),
                zeros: zeros.map(|zeros| regroup(&zeros, 1)),
                scales: regroup(&scales, scale_dtype.size()),
                scale_dtype,
                group_size: group,
            }
        }
        MatrixData::Nvfp4 { codes, scales, alpha } => MatrixData::Nvfp4 {
            codes: window(&codes, k / 2, &rows, &whole(2)?),
            scales: window(&scales, k / NVFP4_GROUP, &rows, &whole(NVFP4_GROUP)?),
            alpha,
        },
        MatrixData::Fp8 { values, scales, block } => {
            let new = [smaller_group(block[0], n, &rows), smaller_group(block[1], k, &columns)];
            let grid_columns = k.div_ceil(block[1]);
            let scale = |row: usize, column: usize| scales[row / block[0] * grid_columns + column / block[1]];
            let scales = rows
                .clone()
                .step_by(new[0])
                .flat_map(|row| columns.clone().step_by(new[1]).map(move |column| (row, column)))
                .map(|(row, column)| scale(row, column))
                .collect();
            MatrixData::Fp8 { values: window(&values, k, &rows, &columns), scales, block: new }
        }
    };
    Ok(Matrix { n: rows.len(), k: columns.len(), data })
}

/// The largest group that divides `group` and of which `range` is made. The whole of `size` keeps its group, and a
/// range that ends with `size` may end with a partial one.
fn smaller_group(group: usize, size: usize, range: &Range<usize>) -> usize {
    let group = gcd(group, range.start);
    if range.end == size { group } else { gcd(group, range.end) }
}

/// Rows `rows` and, of each, the bytes `bytes`, of a buffer with `stride` bytes a row.
fn window(buffer: &Bytes, stride: usize, rows: &Range<usize>, bytes: &Range<usize>) -> Bytes {
    if *bytes == (0..stride) {
        return buffer.slice(rows.start * stride..rows.end * stride);
    }
    let mut out = Vec::with_capacity(rows.len() * bytes.len());
    for row in rows.clone() {
        out.extend_from_slice(&buffer[row * stride + bytes.start..row * stride + bytes.end]);
    }
    out.into()
}

/// Per-group values (`size` bytes each) of whole rows of `groups` -> those of `columns`, in groups of `to` instead of
/// `from` inputs.
fn repeat_groups(
    bytes: &Bytes,
    [groups, size]: [usize; 2],
    [from, to]: [usize; 2],
    columns: &Range<usize>,
) -> Bytes {
    if *columns == (0..groups * from) {
        return bytes.clone();
    }
    let mut out = Vec::with_capacity(bytes.len());
    for row in bytes.chunks_exact(groups * size) {
        for column in columns.clone().step_by(to) {
            let group = column / from;
            out.extend_from_slice(&row[group * size..(group + 1) * size]);
        }
    }
    out.into()
}
