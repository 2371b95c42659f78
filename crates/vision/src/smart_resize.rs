//! The size that an image or a video is resized to: `smart_resize` of Hugging Face's
//! `qwen2_vl/image_processing_qwen2_vl.py` and of its `qwen3_vl/video_processing_qwen3_vl.py`.

use crate::{VideoProcessorConfig, VisionError};

/// Longest side over shortest, at most: the limit of the reference.
pub const MAX_ASPECT_RATIO: u64 = 200;

/// Size in pixels that an image of `height` x `width` is resized to, as `(height, width)`: both multiples of `factor`
/// (patch size times merge size), the area between `min_pixels` and `max_pixels` where `factor` allows it, and the
/// aspect ratio nearly kept.
///
/// # Errors
/// [`VisionError::Empty`] for a zero side, [`VisionError::AspectRatio`] above [`MAX_ASPECT_RATIO`], and
/// [`VisionError::Setting`] for a zero `factor` or limit.
pub fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    min_pixels: u64,
    max_pixels: u64,
) -> Result<(usize, usize), VisionError> {
    let (height_px, width_px) = (height as u64, width as u64);
    if height == 0 || width == 0 {
        return Err(VisionError::Empty { width: width_px, height: height_px });
    }
    if factor == 0 || min_pixels == 0 || max_pixels == 0 {
        let value = format!("factor {factor}, min_pixels {min_pixels}, max_pixels {max_pixels}");
        return Err(VisionError::Setting { field: "size", value, rule: "each must be at least 1" });
    }
    // All in f64, in the order of the reference: the roundings decide which multiple is taken.
    let (h, w, unit) = (height as f64, width as f64, factor as f64);
    if h.max(w) / h.min(w) > MAX_ASPECT_RATIO as f64 {
        return Err(VisionError::AspectRatio {
            width: width_px,
            height: height_px,
            max_ratio: MAX_ASPECT_RATIO,
        });
    }
    // Python's `round` takes the even neighbour at a half. The result may be 0 for a small side; the second branch
    // repairs that.
    let (h_bar, w_bar) = ((h / unit).round_ties_even() * unit, (w / unit).round_ties_even() * unit);
    let (h_bar, w_bar) = if h_bar * w_bar > max_pixels as f64 {
        let beta = (h * w / max_pixels as f64).sqrt();
        let shrink = |side: f64| unit.max((side / beta / unit).floor() * unit);
        (shrink(h), shrink(w))
    } else if h_bar * w_bar < min_pixels as f64 {
        let beta = (min_pixels as f64 / (h * w)).sqrt();
        let grow = |side: f64| (side * beta / unit).ceil() * unit;
        (grow(h), grow(w))
    } else {
        (h_bar, w_bar)
    };
    Ok((h_bar as usize, w_bar as usize))
}

/// Size in pixels that each of `num_frames` frames of `height` x `width` is resized to, as `(height, width)`: as
/// [`smart_resize`], with the bounds over all frames. A side below the factor is brought up to it first, as transformers 5
/// does (4.57 refuses it). One frame counts as a whole temporal patch of it.
///
/// # Errors
/// As those of [`smart_resize`].
pub fn smart_resize_video(
    num_frames: usize,
    height: usize,
    width: usize,
    config: &VideoProcessorConfig,
) -> Result<(usize, usize), VisionError> {
    let (height_px, width_px) = (height as u64, width as u64);
    if height == 0 || width == 0 {
        return Err(VisionError::Empty { width: width_px, height: height_px });
    }
    let unit = config.factor() as f64;
    let (mut h, mut w) = (height as f64, width as f64);
    if h < unit || w < unit {
        let scale = (unit / h).max(unit / w);
        (h, w) = ((h * scale).trunc(), (w * scale).trunc());
    }
    if h.max(w) / h.min(w) > MAX_ASPECT_RATIO as f64 {
        let max_ratio = MAX_ASPECT_RATIO;
        return Err(VisionError::AspectRatio { width: width_px, height: height_px, max_ratio });
    }
    let temporal = config.temporal_patch_size as f64;
    let frames = (num_frames as f64).max(temporal);
    let (h_bar, w_bar) = ((h / unit).round_ties_even() * unit, (w / unit).round_ties_even() * unit);
    let volume = (frames / temporal).round_ties_even() * temporal * h_bar * w_bar;
    let (min_pixels, max_pixels) = (config.min_pixels as f64, config.max_pixels as f64);
    let (h_bar, w_bar) = if volume > max_pixels {
        let beta = (frames * h * w / max_pixels).sqrt();
        let shrink = |side: f64| unit.max((side / beta / unit).floor() * unit);
        (shrink(h), shrink(w))
    } else if volume < min_pixels {
        let beta = (min_pixels / (frames * h * w)).sqrt();
        let grow = |side: f64| (side * beta / unit).ceil() * unit;
        (grow(h), grow(w))
    } else {
        (h_bar, w_bar)
    };
    Ok((h_bar as usize, w_bar as usize))
}
