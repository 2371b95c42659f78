//! Bicubic resizing of `u8` images with antialiasing, equal to the last bit with torchvision (`InterpolationMode.BICUBIC`,
//! `antialias=True`) on the CPU. Floating-point images and other filters are not here.
//!
//! Columns first, then rows, each pass rounded and clipped to `u8`. Weights are made in f64 and quantised to i16 at the
//! finest precision that keeps the largest of a pass below 2^15, so that the sums are exact integers and any order of
//! summation gives the same bytes.

use crate::RgbImage;

/// Resizes to `height` x `width` pixels. A pass that keeps its size is skipped (it would be the identity).
///
/// # Panics
/// Never for sizes of at least 1; a zero size is taken as 1.
pub fn resize_bicubic(image: &RgbImage, height: usize, width: usize) -> RgbImage {
    let (height, width) = (height.max(1), width.max(1));
    let narrowed;
    let columns_done = if width == image.width() {
        image.pixels()
    } else {
        narrowed = resize_columns(image.pixels(), image.width(), &Taps::new(image.width(), width));
        &narrowed
    };
    let pixels = if height == image.height() {
        columns_done.to_vec()
    } else {
        resize_rows(columns_done, width, &Taps::new(image.height(), height))
    };
    RgbImage::new(height, width, pixels).expect("each pass writes outputs * 3 values a line")
}

/// Filter weights of one pass: for each output index, the run of input indices that it is made of.
struct Taps {
    /// First input index of each output, and the end of its weights in `weights` (they start where the last ended).
    runs: Vec<(usize, usize)>, // [n_out]
    weights: Vec<i16>,
    /// Fraction bits of the weights.
    precision: u32,
}

impl Taps {
    /// Weights that turn `n_in` samples into `n_out`.
    fn new(n_in: usize, n_out: usize) -> Self {
        let scale = n_in as f64 / n_out as f64;
        // When shrinking the filter widens with the ratio: that is the antialiasing.
        let support = 2.0 * scale.max(1.0);
        let inv_scale = if scale >= 1.0 { 1.0 / scale } else { 1.0 };
        let mut runs = Vec::with_capacity(n_out);
        let mut exact: Vec<f64> = Vec::new();
        for out_idx in 0..n_out {
            let centre = scale * (out_idx as f64 + 0.5);
            // `as usize` truncates and turns a negative bound into 0, as the reference does.
            let start = (centre - support + 0.5) as usize;
            let end = ((centre + support + 0.5) as usize).min(n_in);
            let first = exact.len();
            exact.extend((start..end).map(|idx| cubic((idx as f64 - centre + 0.5) * inv_scale)));
            let total: f64 = exact[first..].iter().sum();
            if total != 0.0 {
                exact[first..].iter_mut().for_each(|weight| *weight /= total);
            }
            runs.push((start, exact.len()));
        }
        let precision = finest_precision(exact.iter().copied().fold(0.0, f64::max));
        let unit = f64::from(1u32 << precision);
        let weights = exact.iter().map(|&weight| (weight * unit + 0.5_f64.copysign(weight)) as i16).collect();
        Self { runs, weights, precision }
    }

    /// For each output: first input index and weights.
    fn iter(&self) -> impl Iterator<Item = (usize, &[i16])> {
        let starts = std::iter::once(0).chain(self.runs.iter().map(|run| run.1));
        self.runs
            .iter()
            .zip(starts)
            .map(|(&(first_input, end), begin)| (first_input, &self.weights[begin..end]))
    }

    /// An integer sum that starts with one half, back to a pixel.
    fn to_pixel(&self, sum: i32) -> u8 {
        (sum >> self.precision).clamp(0, 255) as u8
    }

    fn half(&self) -> i32 {
        1 << (self.precision - 1)
    }
}

/// Most fraction bits with which `largest` still rounds to below 2^15; 22 at most.
fn finest_precision(largest: f64) -> u32 {
    (1..=22).take_while(|&bits| largest * f64::from(1u32 << bits) + 0.5 < 32768.0).last().unwrap_or(1)
}

/// The Keys cubic kernel with a = -0.5, in the Horner form of the reference.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    } else {
        0.0
    }
}

/// `[rows, width_in, 3]` to `[rows, n_out, 3]`.
fn resize_columns(pixels: &[u8], width_in: usize, taps: &Taps) -> Vec<u8> {
    let rows = pixels.len() / (width_in * 3);
    let mut out = Vec::with_capacity(rows * taps.runs.len() * 3);
    for row in pixels.chunks_exact(width_in * 3) {
        for (first, weights) in taps.iter() {
            let mut sums = [taps.half(); 3];
            let window = row[first * 3..(first + weights.len()) * 3].as_chunks::<3>().0;
            for (pixel, &weight) in window.iter().zip(weights) {
                for channel in 0..3 {
                    sums[channel] += i32::from(pixel[channel]) * i32::from(weight);
                }
            }
            out.extend(sums.map(|sum| taps.to_pixel(sum)));
        }
    }
    out
}

/// `[height_in, width, 3]` to `[n_out, width, 3]`.
fn resize_rows(pixels: &[u8], width: usize, taps: &Taps) -> Vec<u8> {
    let row_len = width * 3;
    let mut out = Vec::with_capacity(taps.runs.len() * row_len);
    let mut sums = vec![0i32; row_len];
    for (first, weights) in taps.iter() {
        sums.fill(taps.half());
        for (row, &weight) in pixels[first * row_len..].chunks_exact(row_len).zip(weights) {
            let weight = i32::from(weight);
            for (sum, &value) in sums.iter_mut().zip(row) {
                *sum += i32::from(value) * weight;
            }
        }
        out.extend(sums.iter().map(|&sum| taps.to_pixel(sum)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_each_output_sum_to_one_within_rounding() {
        for (n_in, n_out) in [(1, 64), (7, 3), (101, 96), (96, 101), (5000, 32), (32768, 1)] {
            let taps = Taps::new(n_in, n_out);
            let one = 1i64 << taps.precision;
            for (first, weights) in taps.iter() {
                let sum: i64 = weights.iter().map(|&w| i64::from(w)).sum();
                assert!(
                    (sum - one).unsigned_abs() as usize <= weights.len().div_ceil(2),
                    "{n_in} to {n_out}"
                );
                assert!(!weights.is_empty() && first + weights.len() <= n_in);
            }
        }
    }

    #[test]
    fn one_colour_stays_one_colour() {
        let image = RgbImage::new(37, 53, [9u8, 128, 255].repeat(37 * 53)).unwrap();
        for (h, w) in [(1, 1), (37, 90), (100, 53), (64, 64)] {
            let out = resize_bicubic(&image, h, w);
            assert_eq!((out.height(), out.width()), (h, w));
            assert_eq!(out.pixels(), [9u8, 128, 255].repeat(h * w));
        }
    }
}
