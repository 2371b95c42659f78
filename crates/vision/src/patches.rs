//! Pixels to patch rows, in the order in which the vision encoder's merger wants them. No normalisation: the device
//! does that.

use crate::RgbImage;

/// Cuts the resized frames of one temporal patch (an image is one frame) into patches:
/// `[grid_h * grid_w, 3, frames, patch, patch]`, with the `merge` x `merge` patches of one output token in consecutive
/// rows (`_preprocess` of `image_processing_qwen2_vl.py` and of `video_processing_qwen3_vl.py`).
///
/// `frames` is not empty and its frames are of one size, both sides multiples of `patch * merge`.
pub(crate) fn to_patches(frames: &[&RgbImage], patch: usize, merge: usize) -> Vec<u8> {
    let (height, width) = frames.first().map_or((0, 0), |frame| (frame.height(), frame.width()));
    let block = patch * merge;
    debug_assert!(height.is_multiple_of(block) && width.is_multiple_of(block));
    let mut rows = Vec::with_capacity(height * width * 3 * frames.len());
    for block_y in (0..height).step_by(block) {
        for block_x in (0..width).step_by(block) {
            for patch_y in (block_y..block_y + block).step_by(patch) {
                for patch_x in (block_x..block_x + block).step_by(patch) {
                    push_patch(frames, patch_y, patch_x, patch, &mut rows);
                }
            }
        }
    }
    rows
}

/// Appends one patch, `[3, frames, patch, patch]`: the only place where channels move from last to first.
fn push_patch(frames: &[&RgbImage], top: usize, left: usize, patch: usize, rows: &mut Vec<u8>) {
    for channel in 0..3 {
        for frame in frames {
            for y in top..top + patch {
                let line = &frame.pixels()[(y * frame.width() + left) * 3..][..patch * 3];
                rows.extend(line.iter().skip(channel).step_by(3));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_of_one_merge_block_are_neighbours() {
        // 4 x 8 pixels of value 10 * y + x in red, +100 in green, +200 in blue (wrapping never happens: 37 + 200).
        let pixels = (0..4u8)
            .flat_map(|y| (0..8u8).flat_map(move |x| [0, 100, 200].map(|c| c + 10 * y + x)))
            .collect();
        let rows = to_patches(&[&RgbImage::new(4, 8, pixels).unwrap()], 2, 2);
        let corners: Vec<u8> = rows.chunks_exact(12).map(|patch| patch[0]).collect();
        assert_eq!(corners, [0, 2, 20, 22, 4, 6, 24, 26]);
        assert_eq!(rows[..12], [0, 1, 10, 11, 100, 101, 110, 111, 200, 201, 210, 211]);
    }
}
