//! A bounded, fair sample of rows: of however many are shown, each is kept with the same probability. Seeded, so that
//! equal prompts give equal checkpoints.

/// Rows kept of all that were pushed.
#[derive(Debug, Clone)]
pub(crate) struct Reservoir {
    capacity: usize,
    state: u64,
    /// Rows pushed.
    pub(crate) seen: u64,
    /// Kept rows, `[kept, k]`.
    pub(crate) rows: Vec<f32>,
    /// What each kept row counts.
    pub(crate) weights: Vec<f32>,
    /// Sum of the magnitudes of each channel over all pushed rows.
    abs_sum: Vec<f64>,
}

impl Reservoir {
    /// Keeps at most `capacity` rows of `k` channels.
    pub(crate) fn new(capacity: usize, k: usize) -> Self {
        Self { capacity, state: 0, seen: 0, rows: Vec::new(), weights: Vec::new(), abs_sum: vec![0.0; k] }
    }

    /// Shows a row that counts `weight`.
    pub(crate) fn push(&mut self, row: &[f32], weight: f32) {
        self.abs_sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.abs()));
        self.seen += 1;
        if self.weights.len() < self.capacity {
            self.rows.extend_from_slice(row);
            self.weights.push(weight);
            return;
        }
        let place = (self.random() % self.seen) as usize;
        if place < self.capacity {
            self.rows[place * row.len()..][..row.len()].copy_from_slice(row);
            self.weights[place] = weight;
        }
    }

    /// Mean magnitude of each channel over all rows.
    pub(crate) fn mean_abs(&self) -> Vec<f32> {
        self.abs_sum.iter().map(|sum| (sum / self.seen.max(1) as f64) as f32).collect()
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_rows_have_a_fair_chance() {
        let mut sample = Reservoir::new(1000, 1);
        for i in 0..100_000 {
            sample.push(&[i as f32], 1.0);
        }
        assert_eq!((sample.seen, sample.rows.len()), (100_000, 1000));
        let mean = sample.rows.iter().sum::<f32>() / 1000.0;
        // The mean of 1000 uniform draws has a deviation of 913.
        assert!((mean - 50_000.0).abs() < 4000.0, "{mean}");
        assert_eq!(sample.mean_abs(), [49_999.5]);
    }
}
