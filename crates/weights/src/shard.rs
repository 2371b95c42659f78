//! What a rank of a tensor-parallel group holds: ranges, and canonical matrices cut to them. Exact for every scheme: a
//! cut inside a quantisation group makes groups smaller and repeats their scales.

use std::ops::Range;

use bytes::Bytes;
use spark_backend::{Matrix, MatrixData, VectorWeight};

use crate::convert::gcd;
use crate::error::{Error, Result};
use crate::load::option;
use crate::scheme::NVFP4_GROUP;
use crate::spec::{ParamKind, ParamSpec, Shard};

/// One rank of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rank {
    index: usize,
    world: usize,
}

impl Rank {
    pub(crate) fn new(index: usize, world: usize) -> Result<Self> {
        if world == 0 || index >= world {
            return Err(option(
                "rank",
                format!("is {index} of {world}; it has to be below the number of ranks"),
            ));
        }
        Ok(Rank { index, world })
    }

    /// This rank's share of `size`: equal parts, the first `size % world` ranks one more.
    pub(crate) fn range(self, size: usize) -> Range<usize> {
        let (each, more) = (size / self.world, size % self.world);
        let begin = self.index * each + self.index.min(more);
        begin..begin + each + usize::from(self.index < more)
    }

    /// Whether this is rank 0.
    pub(crate) fn is_first(self) -> bool {
        self.index == 0
    }

    /// Like [`Rank::range`], but fails when the parts would differ: features have to be split evenly.
    fn even(self, spec: &ParamSpec, size: usize) -> Result<Range<usize>> {
        if size.is_multiple_of(self.world) {
            return Ok(self.range(size));
        }
        Err(Error::Param {
            name: spec.name.clone(),
            reason: format!("{size} features cannot be split evenly over {} ranks", self.world),
        })
    }
}

/// The rows and columns of matrix `slot` of `spec`, `[n, k]`, that `rank` holds.
pub(crate) fn part(
    spec: &ParamSpec,
    slot: usize,
    [n, k]: [usize; 2],
    rank: Rank,
) -> Result<[Range<usize>; 2]> {
    Ok(match (spec.shard, &spec.kind) {
        (Shard::Replicated, _) => [0..n, 0..k],
        (Shard::Vocab, _) => [rank.range(n), 0..k],
        (Shard::Rows, _) => [rank.even(spec, n)?, 0..k],
        (Shard::Columns, _) => [0..n, rank.even(spec, k)?],
        // Gate and up give the intermediate features, down (every third) takes them.
        (Shard::Experts, ParamKind::Experts { .. }) if slot % 3 == 2 => [0..n, rank.even(spec, k)?],
        (Shard::Experts, ParamKind::Experts { .. }) => [rank.even(spec, n)?, 0..k],
        (Shard::Experts, _) => {
            let reason = "only experts can be split by the rule for experts".to_owned();
            return Err(Error::Param { name: spec.name.clone(), reason });
        }
    })
}

/// `rank`'s part of matrix `slot` of `spec`.
pub(crate) fn shard_matrix(spec: &ParamSpec, slot: usize, matrix: Matrix, rank: Rank) -> Result<Matrix> {
    let [rows, columns] = part(spec, slot, [matrix.n, matrix.k], rank)?;
    cut(spec, matrix, rows, columns)
}

/// `rank`'s part of a vector: of its columns when it has one row, else of its rows.
pub(crate) fn shard_vector(spec: &ParamSpec, vector: VectorWeight, rank: Rank) -> Result<VectorWeight> {
    let [rows, cols] = vector.shape;
    let range = match spec.shard {
        Shard::Replicated => return Ok(vector),
        Shard::Vocab => rank.range(rows),
        _ => rank.even(spec, if rows == 1 { cols } else { rows })?,
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
    for part in parts {
        let range = match spec.shard {
            Shard::Rows => rank.even(spec, part.len())?,
            Shard::Vocab => rank.range(part.len()),
            _ => 0..part.len(),
        };
        bias.extend_from_slice(&part[range]);
    }
    Ok(Some(bias))
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
    let uneven = |multiple: usize| Error::Param {
        name: spec.name.clone(),
        reason: format!(
            "a cut at input {} of {k} is not a multiple of {multiple}, as its scheme needs",
            columns.start
        ),
    };
    let whole = |multiple: usize| {
        let fits = columns.start.is_multiple_of(multiple) && columns.end.is_multiple_of(multiple);
        if fits { Ok(columns.start / multiple..columns.end / multiple) } else { Err(uneven(multiple)) }
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
