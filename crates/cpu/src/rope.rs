//! Rotary embeddings: angles of M-RoPE (text) and of 2-D rope (vision), and the rotation of one head. No attention.

use spark_backend::{Error, Result};

/// Cosines and sines of a set of rows, each `[rows, half]`.
pub(crate) struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Angles {
    /// `half` angles per row, times nothing; cos and sin times `factor`.
    fn new(half: usize, angles: impl Iterator<Item = f32>, factor: f32) -> Self {
        let (cos, sin) = angles.map(|angle| (angle.cos() * factor, angle.sin() * factor)).unzip();
        Self { cos, sin, half }
    }

    /// Interleaved M-RoPE: which of the three positions (time, height, width) turns frequency `j` is
    /// [`axis`]'s answer. With equal positions this is ordinary rope.
    ///
    /// # Errors
    /// When the sections ask for more frequencies than there are.
    pub(crate) fn mrope(
        positions: &[[u32; 3]],
        inv_freq: &[f32],
        factor: f32,
        section: [usize; 3],
    ) -> Result<Self> {
        let half = inv_freq.len();
        if section.iter().any(|&s| s > half) {
            return Err(Error::shape("attend mrope_section", format!("sections of at most {half}"), section));
        }
        let axes: Vec<usize> = (0..half).map(|j| axis(j, section)).collect();
        let angles = positions.iter().flat_map(|position| {
            axes.iter().zip(inv_freq).map(|(&axis, inv_freq)| position[axis] as f32 * inv_freq)
        });
        Ok(Self::new(half, angles, factor))
    }

    /// The vision encoder's: the first half of the frequencies turns with the row, the second with the column; base
    /// 10000 over `head_dim / 2`.
    pub(crate) fn two_dimensional(coordinates: &[[usize; 2]], head_dim: usize) -> Self {
        let quarter = head_dim / 4;
        let inv_freq: Vec<f32> =
            (0..quarter).map(|j| 1.0 / 10_000f32.powf(2.0 * j as f32 / (head_dim / 2) as f32)).collect();
        let angles = coordinates.iter().flat_map(|coordinate| {
            coordinate.iter().flat_map(|&c| inv_freq.iter().map(move |inv_freq| c as f32 * inv_freq))
        });
        Self::new(2 * quarter, angles, 1.0)
    }

    /// Turns one head (`[2 * half]`) by the angles of `row`: element `j` pairs with `j + half` ("rotate half").
    #[inline(always)]
    pub(crate) fn rotate(&self, row: usize, head: &mut [f32]) {
        let cos = &self.cos[row * self.half..][..self.half];
        let sin = &self.sin[row * self.half..][..self.half];
        let (first, second) = head.split_at_mut(self.half);
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// The axis (0 time, 1 height, 2 width) of frequency `j`.
fn axis(j: usize, section: [usize; 3]) -> usize {
    match j % 3 {
        1 if j < 3 * section[1] => 1,
        2 if j < 3 * section[2] => 2,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::assert_close;

    #[test]
    fn axes_are_interleaved_up_to_their_sections() {
        let axes: Vec<usize> = (0..12).map(|j| axis(j, [6, 3, 2])).collect();
        assert_eq!(axes, [0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 0, 0]);
        assert!((0..12).all(|j| axis(j, [12, 0, 0]) == 0));
    }

    #[test]
    fn rotation_by_hand() {
        // Two frequencies: time 3 at 1 rad, height 5 at 0.1 rad.
        let angles = Angles::mrope(&[[3, 5, 7]], &[1.0, 0.1], 2.0, [1, 1, 0]).unwrap();
        let mut head = [1.0, 2.0, 3.0, 4.0];
        angles.rotate(0, &mut head);
        let (a, b) = (3.0f64, 0.5f64);
        let want = [
            2.0 * (a.cos() - 3.0 * a.sin()),
            2.0 * (2.0 * b.cos() - 4.0 * b.sin()),
            2.0 * (3.0 * a.cos() + a.sin()),
            2.0 * (4.0 * b.cos() + 2.0 * b.sin()),
        ];
        assert_close(&head, &want, 1e-6);
        assert!(Angles::mrope(&[], &[1.0], 1.0, [2, 0, 0]).is_err());
    }

    #[test]
    fn vision_rows_then_columns() {
        let angles = Angles::two_dimensional(&[[2, 5]], 8);
        let mut head = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        angles.rotate(0, &mut head);
        let slow = 10_000f64.powf(-0.5);
        let want: Vec<f64> = [2.0, 2.0 * slow, 5.0, 5.0 * slow].map(f64::cos).to_vec();
        assert_close(&head[..4], &want, 1e-6);
    }
}
