//! Seeded data and comparisons for this crate's unit tests. Compiled for tests only.

use crate::{CpuBackend, CpuTensor};
use spark_backend::{Backend, Dtype, VectorWeight};

/// SplitMix64 with a normal distribution on top.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.bits() as u8).collect()
    }

    /// Sums of four uniforms, close enough to normal with variance 1.
    pub(crate) fn normal(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (((0..4).map(|_| self.uniform()).sum::<f64>() - 2.0) * 1.732) as f32).collect()
    }
}

/// The largest difference must be at most `tolerance` times the root mean square of `want` (times 4 for the tail).
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let rms = (want.iter().map(|v| v * v).sum::<f64>() / want.len().max(1) as f64).sqrt();
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(g) - w).abs();
        assert!(
            error <= tolerance * (rms * 4.0 + w.abs()) + 1e-12,
            "element {i}: {g} is not {w} (rms {rms})"
        );
    }
}

pub(crate) fn backend(dtype: Dtype) -> CpuBackend {
    CpuBackend::new(dtype, Some(2)).unwrap()
}

pub(crate) fn tensor(backend: &CpuBackend, values: Vec<f32>, columns: usize) -> CpuTensor {
    let shape = [values.len() / columns, columns];
    backend.vector(VectorWeight { values, shape }).unwrap()
}
