//! Wrappers of `kernels/vision.cu`: patches and the position table of the vision encoder.

use spark_backend::{Dtype, VisionSpec};

use super::{Kernels, LoadedModule, disjoint, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{DeviceSlice, Error, Result, Stream, Tensor};

/// Elements of 16 bytes.
const VECTOR: usize = 8;
const NUM_THREADS: u32 = 256;
/// Largest value of a pixel.
const PIXEL_MAX: f32 = 255.0;

/// `PatchesParams` of `kernels/vision.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct PatchesParams {
    pixels: u64,
    out: u64,
    num_elements: u64,
    area: u32,
    temporal: u32,
    frames: u32,
    mean: [f32; 3],
    std: [f32; 3],
    unused: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 3 * 8 + 10 * 4 bytes, no padding.
unsafe impl Params for PatchesParams {
    const NAME: &'static str = "PatchesParams";
}

/// `PositionParams` of `kernels/vision.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct PositionParams {
    x: u64,
    table: u64,
    row_vectors: u32,
    height: u32,
    width: u32,
    merge: u32,
    side: u32,
    unused: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 2 * 8 + 6 * 4 bytes, no padding.
unsafe impl Params for PositionParams {
    const NAME: &'static str = "PositionParams";
}

#[derive(Debug)]
pub(super) struct Vision {
    patches: Kernel<PatchesParams>,
    patches_any: Kernel<PatchesParams>,
    add_position: Kernel<PositionParams>,
}

impl Vision {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        Ok(Self {
            patches: Kernel::new(module, "patches_v8", 0)?,
            patches_any: Kernel::new(module, "patches_v1", 0)?,
            add_position: Kernel::new(module, "add_position", 0)?,
        })
    }
}

impl Kernels {
    /// `(v - mean) / std` of `v / 255` for `pixels`, all of a slice `[num_patches, 3, frames, patch, patch]` u8; the last frame
    /// is repeated: `out` `[num_patches, 3 * temporal * patch * patch]` bf16.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn patches(
        &self,
        stream: &Stream,
        pixels: &DeviceSlice,
        spec: &VisionSpec,
        out: &Tensor,
    ) -> Result<()> {
        const OP: &str = "patches";
        let frames = frames(out.rows(), pixels.num_bytes(), spec)?;
        let (area, temporal) = (spec.patch_size * spec.patch_size, spec.temporal_patch_size);
        out.expect(OP, [out.rows(), 3 * temporal * area], Dtype::Bf16)?;
        stream.uses(OP, &[pixels, out.slice()])?;
        disjoint(OP, out.slice(), &[pixels])?;
        let num_elements = out.rows() * out.columns();
        let params = PatchesParams {
            pixels: pixels.address(),
            out: out.address(),
            num_elements: num_elements as u64,
            area: to_u32(OP, area)?,
            temporal: to_u32(OP, temporal)?,
            frames: to_u32(OP, frames)?,
            mean: spec.image_mean.map(|mean| mean * PIXEL_MAX),
            std: spec.image_std.map(|std| std * PIXEL_MAX),
            unused: 0,
        };
        let by_vectors = area.is_multiple_of(VECTOR) && pixels.address().is_multiple_of(VECTOR as u64);
        let (kernel, each) =
            if by_vectors { (&self.vision.patches, VECTOR) } else { (&self.vision.patches_any, 1) };
        let num_blocks = num_elements.div_ceil(each * NUM_THREADS as usize);
        // SAFETY: pixels and result have the sizes that the parameters say; both are aligned for the vectors that are used.
        unsafe { kernel.launch(stream, Launch::blocks(to_u32(OP, num_blocks)?, NUM_THREADS), &params) }
    }

    /// Adds the bilinearly interpolated rows of the square position `table` (`[side * side, hidden]`) to `x`
    /// (`[frames * height * width, hidden]`, merge blocks one after the other), both bf16; `grid` is frames, height and
    /// width in patches.
    ///
    /// # Errors
    /// [`Error::Shape`], also for a hidden size that is not a multiple of 8; [`Error::Driver`].
    pub fn add_position(
        &self,
        stream: &Stream,
        x: &Tensor,
        table: &Tensor,
        grid: [usize; 3],
        spec: &VisionSpec,
    ) -> Result<()> {
        const OP: &str = "add_position";
        let hidden = x.columns();
        x.expect(OP, [x.rows(), hidden], Dtype::Bf16)?;
        check_grid(OP, grid, spec.merge_size, x.rows())?;
        let side = table.rows().isqrt();
        if side == 0 || side * side != table.rows() || !hidden.is_multiple_of(VECTOR) {
            let expected = format!("a square table with a multiple of {VECTOR} columns");
            return Err(Error::shape(OP, expected, table.shape()));
        }
        table.expect(OP, [side * side, hidden], Dtype::Bf16)?;
        stream.uses(OP, &[x.slice(), table.slice()])?;
        disjoint(OP, x.slice(), &[table.slice()])?;
        let params = PositionParams {
            x: x.address(),
            table: table.address(),
            row_vectors: to_u32(OP, hidden / VECTOR)?,
            height: to_u32(OP, grid[1])?,
            width: to_u32(OP, grid[2])?,
            merge: to_u32(OP, spec.merge_size)?,
            side: to_u32(OP, side)?,
            unused: 0,
        };
        // Table rows are counted in 32 bits, as the patches of a frame are.
        to_u32(OP, table.rows())?;
        let num_threads = params.row_vectors.next_multiple_of(32).clamp(32, NUM_THREADS);
        let launch = Launch::blocks(to_u32(OP, x.rows())?, num_threads);
        // SAFETY: `x` and the table have the sizes that the parameters say, in aligned vectors; the grid is that of `x`.
        unsafe { self.vision.add_position.launch(stream, launch, &params) }
    }
}

/// Frames of each patch in `num_bytes` of pixels: 1 to those of the encoder.
fn frames(num_patches: usize, num_bytes: u64, spec: &VisionSpec) -> Result<usize> {
    let per_frame = (num_patches * 3 * spec.patch_size * spec.patch_size) as u64;
    let frames = num_bytes.checked_div(per_frame).unwrap_or(0);
    if per_frame * frames != num_bytes || !(1..=spec.temporal_patch_size as u64).contains(&frames) {
        let expected = format!("{per_frame} bytes for each of 1 to {} frames", spec.temporal_patch_size);
        return Err(Error::shape("patches", expected, num_bytes));
    }
    Ok(frames as usize)
}

/// An error unless `grid` is `rows` patches in whole merge blocks.
fn check_grid(op: &'static str, grid: [usize; 3], merge: usize, rows: usize) -> Result<()> {
    let whole = merge > 0 && grid[1].is_multiple_of(merge) && grid[2].is_multiple_of(merge);
    let patches = grid.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    match whole && patches == Some(rows) && rows > 0 {
        true => Ok(()),
        false => Err(Error::shape(op, format!("a grid of {rows} patches in blocks of {merge}"), grid)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VisionSpec {
        VisionSpec {
            num_heads: 1,
            hidden_size: 8,
            patch_size: 2,
            temporal_patch_size: 2,
            merge_size: 2,
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
        }
    }

    #[test]
    fn pixels_are_whole_frames() {
        assert_eq!(frames(5, 60, &spec()).unwrap(), 1);
        assert_eq!(frames(5, 120, &spec()).unwrap(), 2);
        for (num_patches, num_bytes) in [(5, 180), (5, 61), (5, 0), (0, 0), (0, 12)] {
            assert!(frames(num_patches, num_bytes, &spec()).is_err(), "{num_patches} {num_bytes}");
        }
    }

    #[test]
    fn grids_are_whole_merge_blocks() {
        assert!(check_grid("op", [2, 4, 6], 2, 48).is_ok());
        for (grid, merge, rows) in [
            ([1, 3, 4], 2, 12),
            ([1, 4, 3], 2, 12),
            ([1, 4, 4], 0, 16),
            ([1, 4, 4], 2, 17),
            ([0, 4, 4], 2, 0),
            ([usize::MAX, 2, 2], 2, 4),
        ] {
            assert!(check_grid("op", grid, merge, rows).is_err(), "{grid:?} {merge} {rows}");
        }
    }
}
