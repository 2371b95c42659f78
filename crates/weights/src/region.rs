//! The part of a stored matrix that a rank has to read. Storage is row-major over its outer dimension: a cut along it is one
//! run of bytes; a cut along the inner one would be a run a row, a few hundred bytes to some KiB in every real model, so
//! then the whole is read and cut in memory. Reads no data.

use std::ops::Range;

use spark_backend::Rank;

use crate::error::Result;
use crate::plan::{Item, Recipe};
use crate::scheme::{Layout, NVFP4_GROUP, Scheme, Segment};
use crate::shard::{expect_units, part};
use crate::spec::ParamSpec;

/// Narrows an item, which is whole, to what `rank` has to read of it, and notes what it keeps of that. Stacked matrices come
/// apart where each is a run of its own.
pub(crate) fn narrow(mut item: Item, spec: &ParamSpec, rank: Rank) -> Result<Vec<Item>> {
    let Recipe::Matrix(layout) = &item.recipe else { return Ok(vec![item]) };
    let rows = layout.n / layout.outputs;
    let kept: Vec<_> = (0..layout.outputs)
        .map(|output| part(spec, item.slot + output, [rows, layout.k], rank))
        .collect::<Result<_>>()?;
    let together = match layout.scheme {
        Scheme::Nvfp4 { .. } => NVFP4_GROUP,
        Scheme::Awq { .. } | Scheme::PackedInt4 { .. } => 2,
        Scheme::Dense { .. } | Scheme::Fp8 { .. } => 1,
    };
    for [_, columns] in kept.iter().filter(|[_, columns]| columns.len() < layout.k) {
        expect_units(spec, columns, together)?;
    }
    let outer = Outer::of(layout);
    let is_whole = |[n, k]: &[Range<usize>; 2]| match outer {
        Outer::Rows => n.len() == rows,
        Outer::Columns => k.len() == layout.k,
    };
    if kept.iter().all(is_whole) || (outer == Outer::Columns && layout.outputs > 1) {
        item.keep = kept;
        return Ok(vec![item]);
    }
    let narrowed = |(output, kept): (usize, &[Range<usize>; 2])| {
        let (layout, segments, keep) = region(layout, &item.segments, output, kept);
        let slot = item.slot + output;
        Item { spec: item.spec, slot, recipe: Recipe::Matrix(layout), segments, keep: vec![keep] }
    };
    Ok(kept.iter().enumerate().map(narrowed).collect())
}

/// Which dimension of a matrix is the outer one of its storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outer {
    Rows,
    Columns,
}

impl Outer {
    fn of(layout: &Layout) -> Self {
        match layout.scheme {
            Scheme::Awq { .. } => Outer::Columns,
            _ if layout.transposed => Outer::Columns,
            _ => Outer::Rows,
        }
    }
}

/// What has to be read of matrix `output` of a layout for the rows and columns `kept` of it: a layout of its own, its
/// segments, and what to keep of it.
fn region(
    layout: &Layout,
    segments: &[Segment],
    output: usize,
    kept: &[Range<usize>; 2],
) -> (Layout, Vec<Segment>, [Range<usize>; 2]) {
    let rows = layout.n / layout.outputs;
    // In the coordinates of the whole storage.
    let kept = [kept[0].start + output * rows..kept[0].end + output * rows, kept[1].clone()];
    let (size, wanted) = match Outer::of(layout) {
        Outer::Rows => (layout.n, kept[0].clone()),
        Outer::Columns => (layout.k, kept[1].clone()),
    };
    let unit = unit(layout, &wanted);
    let read = aligned(&wanted, unit, size);
    let segments = segments
        .iter()
        .enumerate()
        .map(|(number, segment)| {
            let stored = stored_rows(layout, number);
            stored.map_or_else(|| shared(layout, *segment, output), |per| slice(*segment, per, size, &read))
        })
        .collect();
    let (n, k, keep) = match Outer::of(layout) {
        Outer::Rows => (read.len(), layout.k, [within(&kept[0], &read), kept[1].clone()]),
        Outer::Columns => (layout.n, read.len(), [kept[0].clone(), within(&kept[1], &read)]),
    };
    let mut scheme = layout.scheme.clone();
    if let Scheme::Fp8 { block, .. } = &mut scheme {
        // A region inside one block has that block's scales for itself.
        *block = [block[0].min(n), block[1].min(k)];
    }
    (Layout { scheme, n, k, outputs: 1, transposed: layout.transposed }, segments, keep)
}

/// Rows of the outer dimension that can only be read together, because they share scales or words.
fn unit(layout: &Layout, wanted: &Range<usize>) -> usize {
    match (&layout.scheme, Outer::of(layout)) {
        (Scheme::Awq { group, .. }, _) => *group,
        (Scheme::PackedInt4 { zeros: true, .. }, _) => 8,
        (Scheme::Nvfp4 { .. }, Outer::Columns) => NVFP4_GROUP,
        (Scheme::Fp8 { block, .. }, outer) => {
            let block = if outer == Outer::Rows { block[0] } else { block[1] };
            let is_inside_one = wanted.start / block == wanted.end.saturating_sub(1) / block;
            if is_inside_one { 1 } else { block }
        }
        _ => 1,
    }
}

/// Rows of the outer dimension that one stored row of segment `number` stands for; `None` for what is not stored by rows.
fn stored_rows(layout: &Layout, number: usize) -> Option<usize> {
    let is_transposed = Outer::of(layout) == Outer::Columns;
    match (&layout.scheme, number) {
        (Scheme::Awq { group, .. }, 1 | 2) => Some(*group),
        (Scheme::PackedInt4 { zeros: true, .. }, 2) => Some(8),
        (Scheme::PackedInt4 { .. }, 2..) | (Scheme::Nvfp4 { .. }, 2) => None,
        (Scheme::Nvfp4 { .. }, number) if is_transposed => Some(if number == 0 { 2 } else { NVFP4_GROUP }),
        (Scheme::Fp8 { block, .. }, 1) => Some(if is_transposed { block[1] } else { block[0] }),
        _ => Some(1),
    }
}

/// The stored rows of a segment that hold `read` of its `size` outer rows, `per` of which are in a stored one.
fn slice(segment: Segment, per: usize, size: usize, read: &Range<usize>) -> Segment {
    let row = segment.len / size.div_ceil(per);
    let (begin, end) = (read.start / per, read.end.div_ceil(per));
    Segment { offset: segment.offset + (begin * row) as u64, len: (end - begin) * row, ..segment }
}

/// What outputs share, or have one value each of.
fn shared(layout: &Layout, segment: Segment, output: usize) -> Segment {
    match layout.scheme {
        Scheme::Nvfp4 { .. } if segment.len > 4 => {
            Segment { offset: segment.offset + 4 * output as u64, len: 4, ..segment }
        }
        _ => segment,
    }
}

/// The smallest range of whole units that holds `range`, within `size`.
pub(crate) fn aligned(range: &Range<usize>, unit: usize, size: usize) -> Range<usize> {
    // A configuration may claim any unit.
    range.start / unit * unit..range.end.checked_next_multiple_of(unit).map_or(size, |end| end.min(size))
}

/// `range` from the beginning of `read`.
pub(crate) fn within(range: &Range<usize>, read: &Range<usize>) -> Range<usize> {
    range.start - read.start..range.end - read.start
}
