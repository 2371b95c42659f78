//! The vision encoder's own operations: patches, position table, attention inside frames. Its other layers are
//! `linear.rs` and `norm.rs`.

use crate::attention::{KEY_BLOCK, KeyValues, Tile};
use crate::dot::LANES;
use crate::rope::Angles;
use crate::tensor::{Compute, CpuTensor};
use spark_backend::{Error, Result, VisionSpec};

/// Queries of one parallel task.
const TILE: usize = 256;

/// Normalised patch rows; see [`spark_backend::Backend::patches`]. Frames that are missing repeat the last one.
pub(crate) fn patches(
    compute: &Compute,
    pixels: &[&[u8]],
    num_patches: usize,
    spec: &VisionSpec,
) -> Result<CpuTensor> {
    let area = spec.patch_size * spec.patch_size;
    let temporal = spec.temporal_patch_size;
    let columns = 3 * temporal * area;
    let of_medium = num_patches.checked_div(pixels.len()).unwrap_or(0);
    let len = pixels.first().map_or(0, |medium| medium.len());
    let frames = len.checked_div(of_medium * 3 * area).unwrap_or(0);
    if of_medium * pixels.len() != num_patches
        || pixels.iter().any(|medium| medium.len() != of_medium * 3 * area * frames)
        || !(1..=temporal).contains(&frames)
    {
        let lengths: Vec<usize> = pixels.iter().map(|medium| medium.len()).collect();
        let expected =
            format!("equal media, together {num_patches} patches of 3 x (1 to {temporal}) x {area} bytes");
        return Err(Error::shape("patches", expected, lengths));
    }
    let mut values = vec![0.0; num_patches * columns];
    compute.for_chunks(&mut values, columns, num_patches * columns, |patch, out| {
        for (i, out) in out.chunks_exact_mut(area).enumerate() {
            let (channel, frame) = (i / temporal, (i % temporal).min(frames - 1));
            // Rescaling and normalising in one, as Hugging Face fuses them.
            let (mean, std) = (spec.image_mean[channel] * 255.0, spec.image_std[channel] * 255.0);
            let row = ((patch % of_medium * 3 + channel) * frames + frame) * area;
            let source = &pixels[patch / of_medium][row..][..area];
            for (out, &value) in out.iter_mut().zip(source) {
                *out = compute.rounded((f32::from(value) - mean) / std);
            }
        }
    });
    Ok(CpuTensor::new(values, [num_patches, columns]))
}

/// Row and column of every patch of a frame, merge block after merge block.
fn merge_order([_, height, width]: [usize; 3], merge: usize) -> Vec<[usize; 2]> {
    let mut order = Vec::with_capacity(height * width);
    for row in (0..height).step_by(merge) {
        for column in (0..width).step_by(merge) {
            for i in 0..merge * merge {
                order.push([row + i / merge, column + i % merge]);
            }
        }
    }
    order
}

/// Refuses a grid that is empty, not whole merge blocks, or not `rows` patches.
fn check_grid(op: &'static str, grid: [usize; 3], spec: &VisionSpec, rows: usize) -> Result<()> {
    let merge = spec.merge_size;
    let whole = merge > 0 && grid[1].is_multiple_of(merge) && grid[2].is_multiple_of(merge);
    let patches = grid.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    if whole && patches == Some(rows) && rows > 0 {
        Ok(())
    } else {
        Err(Error::shape(op, format!("a grid of {rows} patches in blocks of {merge}"), grid))
    }
}

/// The two table lines around patch `i` of `n`, and the weight of the second. Corners are aligned.
fn taps(i: usize, n: usize, side: usize) -> (usize, usize, f32) {
    let source = i as f32 * (side - 1) as f32 / (n - 1).max(1) as f32;
    let first = (source as usize).min(side - 1);
    (first, (first + 1).min(side - 1), source - first as f32)
}

/// Adds the interpolated position table; see [`spark_backend::Backend::add_position`].
pub(crate) fn add_position(
    compute: &Compute,
    x: &mut CpuTensor,
    table: &CpuTensor,
    grid: [usize; 3],
    spec: &VisionSpec,
) -> Result<()> {
    check_grid("add_position", grid, spec, x.rows())?;
    let hidden = x.columns();
    let side = table.rows().isqrt();
    if side == 0 || side * side != table.rows() || table.columns() != hidden {
        return Err(Error::shape("add_position table", format!("[a square, {hidden}]"), table.shape));
    }
    let order = merge_order(grid, spec.merge_size);
    let work = 8 * x.values.len();
    compute.for_chunks(&mut x.values, hidden, work, |patch, out| {
        let [row, column] = order[patch % order.len()];
        let (r0, r1, dr) = taps(row, grid[1], side);
        let (c0, c1, dc) = taps(column, grid[2], side);
        let corner = |r: usize, c: usize, weight: f32| (table.row(r * side + c), weight);
        let corners = [
            corner(r0, c0, (1.0 - dr) * (1.0 - dc)),
            corner(r0, c1, (1.0 - dr) * dc),
            corner(r1, c0, dr * (1.0 - dc)),
            corner(r1, c1, dr * dc),
        ];
        for (i, value) in out.iter_mut().enumerate() {
            let position: f32 = corners.iter().map(|(line, weight)| line[i] * weight).sum();
            *value = compute.rounded(*value + position);
        }
    });
    Ok(())
}

/// Keys and values of one head of one frame, in the rows of `qkv`.
struct FrameKeyValues<'a> {
    /// `[num_patches, 3 * hidden]`.
    qkv: &'a CpuTensor,
    first_row: usize,
    head: usize,
    head_dim: usize,
}

impl KeyValues for FrameKeyValues<'_> {
    #[inline(always)]
    fn load(&self, first: usize, count: usize, keys: &mut [f32], values: &mut [f32]) {
        let (hidden, head_dim) = (self.qkv.columns() / 3, self.head_dim);
        let width = head_dim.next_multiple_of(LANES);
        for (j, values) in values.chunks_exact_mut(width).take(count).enumerate() {
            let row = self.qkv.row(self.first_row + first + j);
            let key = &row[hidden + self.head * head_dim..][..head_dim];
            key.iter().enumerate().for_each(|(d, &value)| keys[d * KEY_BLOCK + j] = value);
            values[..head_dim].copy_from_slice(&row[2 * hidden + self.head * head_dim..][..head_dim]);
        }
    }
}

/// 2-D rope and full attention inside each frame; see [`spark_backend::Backend::vision_attend`].
pub(crate) fn vision_attend(
    compute: &Compute,
    qkv: &CpuTensor,
    grid: [usize; 3],
    spec: &VisionSpec,
) -> Result<CpuTensor> {
    let (heads, hidden) = (spec.num_heads, spec.hidden_size);
    let rows = qkv.rows();
    check_grid("vision_attend", grid, spec, rows)?;
    qkv.expect("vision_attend", [rows, 3 * hidden])?;
    if heads == 0 || hidden % heads != 0 || hidden / heads % 4 != 0 {
        return Err(Error::shape("vision_attend head_dim", "a multiple of 4", (hidden, heads)));
    }
    let head_dim = hidden / heads;
    let frame = grid[1] * grid[2];
    let angles = Angles::two_dimensional(&merge_order(grid, spec.merge_size), head_dim);
    let mut rotated = qkv.clone();
    let work = 8 * rotated.values.len();
    compute.for_chunks(&mut rotated.values, 3 * hidden, work, |patch, values| {
        for head in values[..2 * hidden].chunks_exact_mut(head_dim) {
            angles.rotate(patch % frame, head);
            head.iter_mut().for_each(|x| *x = compute.rounded(*x));
        }
    });
    // (first row of the frame, first query row, query rows, head)
    let mut tasks = Vec::new();
    for first in (0..rows).step_by(frame) {
        for start in (0..frame).step_by(TILE) {
            tasks.extend((0..heads).map(|head| (first, first + start, TILE.min(frame - start), head)));
        }
    }
    let results = compute.map(&tasks, rows * frame * hidden, |&(first_row, start, count, head)| {
        let queries: Vec<f32> = (start..start + count)
            .flat_map(|row| &rotated.row(row)[head * head_dim..][..head_dim])
            .copied()
            .collect();
        let limits = vec![frame; count];
        let source = FrameKeyValues { qkv: &rotated, first_row, head, head_dim };
        compute.arch.dispatch(Tile { queries: &queries, limits: &limits, source: &source, head_dim })
    });
    let mut out = vec![0.0; rows * hidden];
    let width = head_dim.next_multiple_of(LANES);
    for (&(_, start, _, head), result) in tasks.iter().zip(results) {
        for (i, values) in result.chunks_exact(width).enumerate() {
            out[(start + i) * hidden + head * head_dim..][..head_dim].copy_from_slice(&values[..head_dim]);
        }
    }
    compute.round(&mut out);
    Ok(CpuTensor::new(out, [rows, hidden]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, backend, tensor};
    use spark_backend::{Backend, Dtype};

    fn spec(num_heads: usize, hidden_size: usize) -> VisionSpec {
        VisionSpec {
            num_heads,
            hidden_size,
            patch_size: 2,
            temporal_patch_size: 2,
            merge_size: 2,
            image_mean: [0.5, 0.25, 0.0],
            image_std: [0.5, 0.5, 1.0],
        }
    }

    #[test]
    fn patches_repeat_the_frame_and_normalise() {
        let b = backend(Dtype::F32);
        let pixels: Vec<u8> = (0..12).map(|i| i * 20).collect();
        let got = b.patches(&[&pixels], 1, &spec(1, 8)).unwrap();
        assert_eq!(got.shape(), [1, 24]);
        let mut want = Vec::new();
        for (channel, (mean, std)) in [(0.5, 0.5), (0.25, 0.5), (0.0, 1.0)].into_iter().enumerate() {
            for _ in 0..2 {
                want.extend(pixels[channel * 4..][..4].iter().map(|&v| (f64::from(v) / 255.0 - mean) / std));
            }
        }
        assert_close(got.values(), &want, 1e-6);
        let two: Vec<u8> = (0..24).collect();
        let got = b.patches(&[&two], 1, &spec(1, 8)).unwrap();
        assert_close(&[got.values()[23]], &[23.0 / 255.0], 1e-6);
        assert!(b.patches(&[&pixels[..11]], 1, &spec(1, 8)).is_err());
        assert!(b.patches(&[], 0, &spec(1, 8)).is_err());
        assert!(b.patches(&[&[]], 0, &spec(1, 8)).is_err());
        assert!(b.patches(&[&[0; 36]], 1, &spec(1, 8)).is_err(), "three frames in a patch of two");
    }

    #[test]
    fn media_follow_one_another() {
        let b = backend(Dtype::F32);
        let pixels: Vec<u8> = (0..48).collect();
        let together = b.patches(&[&pixels], 4, &spec(1, 8)).unwrap();
        let apart = b.patches(&[&pixels[..24], &pixels[24..]], 4, &spec(1, 8)).unwrap();
        assert_eq!((apart.values(), apart.shape()), (together.values(), [4, 24]));
        assert!(b.patches(&[&pixels[..12], &pixels[12..]], 4, &spec(1, 8)).is_err(), "unlike media");
        assert!(b.patches(&[&pixels[..24], &pixels[24..]], 3, &spec(1, 8)).is_err());
    }

    #[test]
    fn merge_blocks_come_one_after_the_other() {
        let order = merge_order([1, 2, 4], 2);
        assert_eq!(order, [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]);
    }

    #[test]
    fn positions_interpolate_a_linear_table_exactly() {
        // The table holds f(r, c) = 10 r + c: bilinear interpolation reproduces it at any point.
        let b = backend(Dtype::F32);
        let side = 5;
        let table: Vec<f32> = (0..25).map(|i| (10 * (i / side) + i % side) as f32).collect();
        let table = tensor(&b, table, 1);
        let grid = [2, 4, 6];
        let mut x = tensor(&b, vec![100.0; 48], 1);
        b.add_position(&mut x, &table, grid, &spec(1, 8)).unwrap();
        let order = merge_order(grid, 2);
        let want: Vec<f64> = (0..48)
            .map(|i| {
                let [r, c] = order[i % 24];
                100.0 + 10.0 * (r as f64 * 4.0 / 3.0) + c as f64 * 4.0 / 5.0
            })
            .collect();
        assert_close(x.values(), &want, 1e-6);
        assert!(b.add_position(&mut x, &table, [1, 4, 6], &spec(1, 8)).is_err());
        assert!(b.add_position(&mut x, &table, [16, 3, 1], &spec(1, 8)).is_err());
        let ragged = tensor(&b, vec![0.0; 24], 1);
        assert!(b.add_position(&mut x, &ragged, grid, &spec(1, 8)).is_err());
    }

    /// Naive attention in f64, frame by frame.
    fn naive(qkv: &[f32], grid: [usize; 3], heads: usize, hidden: usize) -> Vec<f64> {
        let (hd, frame) = (hidden / heads, grid[1] * grid[2]);
        let order = merge_order(grid, 2);
        let rotated = |row: usize, part: usize, head: usize| -> Vec<f64> {
            let x: Vec<f64> = qkv[row * 3 * hidden + part * hidden + head * hd..][..hd]
                .iter()
                .map(|&v| f64::from(v))
                .collect();
            let angle = |d: usize| {
                let (d, quarter) = (d % (hd / 2), hd / 4);
                let axis = order[row % frame][d / quarter] as f64;
                axis * 10_000f64.powf(-2.0 * (d % quarter) as f64 / (hd / 2) as f64)
            };
            let pair = |d: usize| if d < hd / 2 { -x[d + hd / 2] } else { x[d - hd / 2] };
            (0..hd).map(|d| x[d] * angle(d).cos() + pair(d) * angle(d).sin()).collect()
        };
        let mut out = vec![0.0; qkv.len() / 3];
        for row in 0..qkv.len() / 3 / hidden {
            for head in 0..heads {
                let q = rotated(row, 0, head);
                let keys = row / frame * frame..(row / frame + 1) * frame;
                let weights: Vec<f64> = keys
                    .clone()
                    .map(|key| {
                        let k = rotated(key, 1, head);
                        (q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / (hd as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for d in 0..hd {
                    let value = |key: usize| f64::from(qkv[key * 3 * hidden + 2 * hidden + head * hd + d]);
                    out[row * hidden + head * hd + d] =
                        keys.clone().zip(&weights).map(|(key, w)| w * value(key)).sum::<f64>() / total;
                }
            }
        }
        out
    }

    #[test]
    fn attention_stays_inside_frames() {
        let mut random = Random::new(13);
        let b = backend(Dtype::F32);
        for (grid, heads, hidden) in [([2, 6, 6], 2, 144), ([1, 2, 4], 3, 24), ([3, 10, 8], 1, 16)] {
            let rows = grid.iter().product::<usize>();
            let qkv = random.normal(rows * 3 * hidden);
            let want = naive(&qkv, grid, heads, hidden);
            let got = b.vision_attend(&tensor(&b, qkv, 3 * hidden), grid, &spec(heads, hidden)).unwrap();
            assert_close(got.values(), &want, 1e-5);
        }
        let qkv = tensor(&b, vec![0.0; 8 * 72], 72);
        assert!(b.vision_attend(&qkv, [1, 2, 2], &spec(3, 24)).is_err());
        assert!(b.vision_attend(&qkv, [1, 2, 4], &spec(5, 24)).is_err());
        assert!(b.vision_attend(&qkv, [1, 2, 4], &spec(0, 24)).is_err());
    }

    #[test]
    fn a_frame_is_the_same_alone_and_among_others() {
        let mut random = Random::new(14);
        let (heads, hidden, frame) = (2, 40, 24);
        let qkv = random.normal(2 * frame * 3 * hidden);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let b = backend(dtype);
            let run = |grid, values: &[f32]| {
                b.vision_attend(&tensor(&b, values.to_vec(), 3 * hidden), grid, &spec(heads, hidden))
                    .unwrap()
                    .values
            };
            let whole = run([2, 4, 6], &qkv);
            assert_eq!(whole[frame * hidden..], run([1, 4, 6], &qkv[frame * 3 * hidden..]));
        }
    }
}
