//! Wrapper of `kernels/vision_attention.cu`: the encoder's attention inside the frames of any number of images.

use spark_backend::{Dtype, VisionSpec};

use super::{Kernels, LoadedModule, disjoint, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{Error, Pool, Result, Stream, Tensor};

const OP: &str = "vision_attend";
/// Images of a launch; more are several launches.
const MAX_IMAGES: usize = 64;
/// Widths that the kernels are made for: a head is padded to the next one.
const WIDTHS: [usize; 6] = [32, 64, 72, 80, 96, 128];
/// Query rows and keys of a tile.
const TILE_ROWS: usize = 128;
const TILE_KEYS: usize = 64;
/// Up to this width q is in registers, and comes through one of three stages.
const MAX_NARROW: usize = 80;
/// Logarithm to base 2 of how much a weight may exceed 1 before its row is rescaled.
const SLACK: f32 = 8.0;
const NUM_THREADS: u32 = 128;
const PREPARE_THREADS: u32 = 256;

/// `Image` of `kernels/vision_attention.cu`: frames of one size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
struct Image {
    first_patch: u32,
    first_tile: u32,
    height: u32,
    width: u32,
}

/// `VisionAttentionParams` of `kernels/vision_attention.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct VisionAttentionParams {
    qkv: u64,
    rotated: u64,
    out: u64,
    num_patches: u32,
    num_heads: u32,
    head_dim: u32,
    merge: u32,
    num_images: u32,
    factor: f32,
    slack: f32,
    unused: u32,
    inv_freq: [f32; 32],
    images: [Image; MAX_IMAGES],
}

// SAFETY: the fields are those of the kernel's struct in the same order; 3 * 8 + 8 * 4 + 32 * 4 + 64 * 16 bytes, no padding.
unsafe impl Params for VisionAttentionParams {
    const NAME: &'static str = "VisionAttentionParams";
}

#[derive(Debug)]
pub(super) struct VisionAttention {
    /// Preparation and attention, by [`WIDTHS`].
    kernels: Vec<[Kernel<VisionAttentionParams>; 2]>,
}

impl VisionAttention {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        let both = |width: &usize| {
            Ok([
                Kernel::new(module, &format!("vision_prepare_{width}"), 0)?,
                Kernel::new(module, &format!("vision_attention_{width}"), shared_bytes(*width))?,
            ])
        };
        Ok(Self { kernels: WIDTHS.iter().map(both).collect::<Result<_>>()? })
    }
}

/// Shared memory of `vision_attention`: stages of K and V, for wide heads q too. Rows whose number of 16-byte vectors is no power
/// of two get an odd number of them.
fn shared_bytes(width: usize) -> u32 {
    let vectors = width / 8;
    let row_bytes = 16 * if vectors.is_power_of_two() { vectors } else { vectors | 1 };
    let rows = if width <= MAX_NARROW { 3 * 2 * TILE_KEYS } else { TILE_ROWS + 2 * 2 * TILE_KEYS };
    (rows * row_bytes) as u32
}

impl Kernels {
    /// Most bytes that [`Kernels::vision_attend_images`] takes from the pool for images of `num_patches` together.
    pub fn vision_attend_scratch_bytes(num_patches: usize, num_heads: usize, head_dim: usize) -> u64 {
        let width = WIDTHS.get(width_index(head_dim)).copied().unwrap_or(head_dim);
        // q and k, and v where its vectors are not whole multiples of 16 bytes.
        let parts = if head_dim.is_multiple_of(8) { 2 } else { 3 };
        2 * parts * num_heads as u64 * num_patches as u64 * width as u64
    }

    /// [`Kernels::vision_attend_images`] of one image or video: `grid` is its frames, rows and columns of patches.
    ///
    /// # Errors
    /// As there.
    pub fn vision_attend(
        &self,
        stream: &Stream,
        pool: &Pool,
        qkv: &Tensor,
        grid: [usize; 3],
        spec: &VisionSpec,
        out: &Tensor,
    ) -> Result<()> {
        self.vision_attend_images(stream, pool, qkv, &[grid], spec, out)
    }

    /// 2-D rotary embedding of q and k, and full attention inside each frame of each grid: `qkv` `[num_patches, 3 * hidden]` (q, k, v
    /// stacked) to `out` `[num_patches, hidden]`, bf16, patches of all grids one after the other, each in merge-block order.
    ///
    /// # Errors
    /// [`Error::Shape`], also for heads that are not a multiple of 4 wide or wider than 128; [`Error::Memory`] when the pool is too
    /// small; [`Error::Driver`].
    pub fn vision_attend_images(
        &self,
        stream: &Stream,
        pool: &Pool,
        qkv: &Tensor,
        grids: &[[usize; 3]],
        spec: &VisionSpec,
        out: &Tensor,
    ) -> Result<()> {
        let head_dim = head_dim(spec)?;
        let width_index = width_index(head_dim);
        let hidden = spec.hidden_size;
        let num_patches = checked_patches(grids, spec.merge_size, qkv.rows())?;
        qkv.expect(OP, [num_patches, 3 * hidden], Dtype::Bf16)?;
        out.expect(OP, [num_patches, hidden], Dtype::Bf16)?;
        stream.uses(OP, &[qkv.slice(), out.slice()])?;
        disjoint(OP, out.slice(), &[qkv.slice()])?;
        let largest = grids.chunks(MAX_IMAGES).map(patches_of).max().unwrap_or(0);
        let scratch_bytes = Self::vision_attend_scratch_bytes(largest, spec.num_heads, head_dim);
        let rotated = pool.take("rotated q and k", scratch_bytes)?;
        stream.uses(OP, &[&rotated])?;
        let mut first_patch = 0;
        for grids in grids.chunks(MAX_IMAGES) {
            let (images, num_tiles) = images(grids)?;
            let patches = patches_of(grids);
            let row = |columns: usize| 2 * (first_patch * columns) as u64;
            let factor = std::f32::consts::LOG2_E / (head_dim as f32).sqrt();
            let params = VisionAttentionParams {
                qkv: qkv.address() + row(3 * hidden),
                rotated: rotated.address(),
                out: out.address() + row(hidden),
                num_patches: to_u32(OP, patches)?,
                num_heads: to_u32(OP, spec.num_heads)?,
                head_dim: to_u32(OP, head_dim)?,
                merge: to_u32(OP, spec.merge_size)?,
                num_images: to_u32(OP, grids.len())?,
                factor,
                slack: SLACK / factor,
                unused: 0,
                inv_freq: inv_freq(head_dim),
                images,
            };
            let [prepare, attention] = &self.vision_attention.kernels[width_index];
            let prepare_launch = Launch::blocks(params.num_patches, PREPARE_THREADS);
            let grid = [to_u32(OP, num_tiles)?, params.num_heads, 1];
            let shared_bytes = shared_bytes(WIDTHS[width_index]);
            // SAFETY: qkv and out have the shapes that the parameters say from these rows on and do not overlap; their rows start
            // at multiples of 8 bytes, as head_dim is a multiple of 4. The rotated vectors have the padded width.
            unsafe {
                prepare.launch(stream, prepare_launch, &params)?;
                attention.launch(stream, Launch { grid, num_threads: NUM_THREADS, shared_bytes }, &params)?;
            }
            first_patch += patches;
        }
        Ok(())
    }
}

fn head_dim(spec: &VisionSpec) -> Result<usize> {
    let (heads, hidden) = (spec.num_heads, spec.hidden_size);
    let whole = heads > 0 && hidden.is_multiple_of(heads);
    let widest = WIDTHS[WIDTHS.len() - 1];
    if !whole || !(hidden / heads).is_multiple_of(4) || !(1..=widest).contains(&(hidden / heads)) {
        let expected = format!("heads that are a multiple of 4 wide, up to {widest}");
        return Err(Error::shape(OP, expected, (hidden, heads)));
    }
    Ok(hidden / heads)
}

/// Which of [`WIDTHS`] a head of at most the last one is padded to.
fn width_index(head_dim: usize) -> usize {
    WIDTHS.partition_point(|&width| width < head_dim)
}

/// Patches of all grids, which must be `rows`.
fn checked_patches(grids: &[[usize; 3]], merge: usize, rows: usize) -> Result<usize> {
    let mut sum = 0usize;
    for grid in grids {
        let whole = merge > 0 && grid[1].is_multiple_of(merge) && grid[2].is_multiple_of(merge);
        let patches = grid.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let total = patches.filter(|&patches| whole && patches > 0).and_then(|n| sum.checked_add(n));
        let Some(total) = total else {
            return Err(Error::shape(OP, format!("grids of whole blocks of {merge}"), grid));
        };
        sum = total;
    }
    if sum == rows { Ok(sum) } else { Err(Error::shape(OP, format!("{sum} rows, as in the grids"), rows)) }
}

fn patches_of(grids: &[[usize; 3]]) -> usize {
    grids.iter().map(|grid| grid.iter().product::<usize>()).sum()
}

/// The grids as the kernel has them, and how many tiles they are in all.
fn images(grids: &[[usize; 3]]) -> Result<([Image; MAX_IMAGES], usize)> {
    let mut images = [Image::default(); MAX_IMAGES];
    let (mut first_patch, mut first_tile) = (0, 0);
    for (image, &[frames, height, width]) in images.iter_mut().zip(grids) {
        *image = Image {
            first_patch: to_u32(OP, first_patch)?,
            first_tile: to_u32(OP, first_tile)?,
            height: to_u32(OP, height)?,
            width: to_u32(OP, width)?,
        };
        first_patch += frames * height * width;
        first_tile += frames * (height * width).div_ceil(TILE_ROWS);
    }
    Ok((images, first_tile))
}

/// Inverse frequencies of a row or a column, computed as the CPU backend does.
fn inv_freq(head_dim: usize) -> [f32; 32] {
    let mut inv_freq = [0.0; 32];
    for (j, value) in inv_freq.iter_mut().take(head_dim / 4).enumerate() {
        *value = 1.0 / 10_000f32.powf(2.0 * j as f32 / (head_dim / 2) as f32);
    }
    inv_freq
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_padded_to_the_next_width() {
        let width = |head_dim| WIDTHS[width_index(head_dim)];
        assert_eq!([4, 32, 36, 64, 72, 76, 84, 128].map(width), [32, 32, 64, 64, 72, 80, 96, 128]);
    }

    #[test]
    fn shared_memory_fits_every_device() {
        assert!(WIDTHS.iter().all(|&width| shared_bytes(width) <= 101_376));
        assert_eq!([72, 80, 96].map(shared_bytes), [384 * 144, 384 * 176, 384 * 208]);
    }

    #[test]
    fn images_follow_each_other() {
        let (images, num_tiles) = images(&[[2, 12, 12], [1, 4, 4], [3, 8, 16]]).unwrap();
        let image = |first_patch, first_tile, height, width| Image { first_patch, first_tile, height, width };
        assert_eq!(images[..3], [image(0, 0, 12, 12), image(288, 4, 4, 4), image(304, 5, 8, 16)]);
        assert_eq!(num_tiles, 8);
    }

    #[test]
    fn grids_must_be_whole_and_cover_the_rows() {
        assert_eq!(checked_patches(&[[1, 2, 4], [2, 2, 2]], 2, 16).unwrap(), 16);
        let error = |grids: &[[usize; 3]], merge| checked_patches(grids, merge, 16).unwrap_err().to_string();
        assert!(error(&[[1, 3, 4]], 2).contains("whole blocks of 2"));
        assert!(error(&[[0, 2, 4]], 2).contains("whole blocks"));
        assert!(error(&[[1, 2, 4]], 0).contains("whole blocks of 0"));
        assert!(error(&[[usize::MAX, 4, 4]], 2).contains("whole blocks"));
        assert!(error(&[[1, 2, 4]], 2).contains("8 rows, as in the grids, got 16"));
    }
}
