//! Activations rounded to NVFP4: what a GPU does to them whose tensor cores multiply NVFP4 by NVFP4, so that its error can be measured
//! without one. Weights in NVFP4 are in `weight.rs`.

use crate::dtype::{E4M3_MAX, e4m3_bits, e4m3_value};

/// Numbers that share a scale.
const GROUP: usize = 16;
/// The largest E2M1 number.
const E2M1_MAX: f32 = 6.0;
/// 2^-90: rows of smaller numbers become zero.
const LEAST: f32 = 8.077_936e-28;

/// Rounds a row to E2M1 codes, an E4M3 scale for each 16 numbers and a float32 factor for all, which is what its largest number
/// asks for. All of it becomes NaN if a number is not finite.
pub fn round_nvfp4(row: &mut [f32]) {
    let amax = largest(row);
    if row.iter().any(|value| !value.is_finite()) {
        return row.fill(f32::NAN);
    }
    let factor = amax / (E2M1_MAX * E4M3_MAX);
    for group in row.chunks_mut(GROUP) {
        let bits = if amax < LEAST { 0 } else { e4m3_bits(largest(group) / (E2M1_MAX * factor)) };
        let step = e4m3_value(bits) * factor;
        let inverse = if bits == 0 { 0.0 } else { 1.0 / step };
        group.iter_mut().for_each(|value| *value = round_e2m1(*value * inverse) * step);
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, value| value.abs().max(most))
}

/// The nearest E2M1 number, ties to the even code; at most 6. Steps are 0.5 below 2, 1 below 4, then 2.
fn round_e2m1(value: f32) -> f32 {
    let size = value.abs();
    let step = if size < 2.0 {
        0.5
    } else if size < 4.0 {
        1.0
    } else {
        2.0
    };
    ((size / step).round_ties_even() * step).min(E2M1_MAX).copysign(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CpuBackend;
    use crate::testing::Random;
    use spark_backend::{Backend, Dtype, LinearWeight, Matrix, MatrixData, VectorWeight};

    #[test]
    fn e2m1_numbers_are_the_nearest() {
        let values = [0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 4.9, 5.0, 5.1, 100.0, -1.6];
        let want = [0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 6.0, 6.0, -1.5];
        assert_eq!(values.map(round_e2m1), want);
    }

    /// What a format of 16 numbers with a scale loses of normal numbers: nine to ten percent.
    #[test]
    fn rows_keep_their_scale_and_lose_a_tenth() {
        let mut random = Random::new(3);
        for scale in [1e-20, 1.0, 1e20] {
            let x: Vec<f32> = random.normal(4096).into_iter().map(|value| value * scale).collect();
            let mut row = x.clone();
            round_nvfp4(&mut row);
            let square = |value: f32| f64::from(value / scale).powi(2);
            let error: f64 = row.iter().zip(&x).map(|(got, want)| square(got - want)).sum();
            let error = (error / x.iter().map(|&value| square(value)).sum::<f64>()).sqrt();
            assert!((0.08..0.11).contains(&error), "{error}");
        }
        let mut row = [0.0; 20];
        round_nvfp4(&mut row);
        assert_eq!(row, [0.0; 20]);
        row[3] = f32::INFINITY;
        round_nvfp4(&mut row);
        assert!(row.iter().all(|value| value.is_nan()));
    }

    #[test]
    fn the_backend_rounds_what_meets_nvfp4_weights_and_nothing_else() {
        let (mut random, n, k, rows) = (Random::new(4), 5, 48, 3);
        let nvfp4 = MatrixData::Nvfp4 {
            codes: random.bytes(n * k / 2).into(),
            scales: random.bytes(n * k / 16).into_iter().map(|byte| byte & 0x6f).collect::<Vec<_>>().into(),
            alpha: 0.5,
        };
        let dense = random.normal(n * k).iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        let dense = MatrixData::Dense { dtype: Dtype::F32, values: dense.into() };
        let plain = CpuBackend::new(Dtype::F32, Some(1)).unwrap();
        let rounding = CpuBackend::new(Dtype::F32, Some(1)).unwrap().with_nvfp4_activations();
        let x = random.normal(rows * k);
        let mut rounded = x.clone();
        rounded.chunks_mut(k).for_each(round_nvfp4);
        for (data, is_nvfp4) in [(nvfp4, true), (dense, false)] {
            let weight = || LinearWeight { parts: vec![Matrix { n, k, data: data.clone() }], bias: None };
            let product = |backend: &CpuBackend, x: &[f32]| {
                let x = backend.vector(VectorWeight { values: x.to_vec(), shape: [rows, k] }).unwrap();
                backend.linear(&x, &backend.linear_weight(weight()).unwrap()).unwrap().values().to_vec()
            };
            let want = product(&plain, if is_nvfp4 { &rounded } else { &x });
            assert_eq!(product(&rounding, &x), want);
            assert_eq!(product(&plain, &x) != want, is_nvfp4);
        }
    }
}
