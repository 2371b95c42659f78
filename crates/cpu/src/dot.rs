//! The inner loops of all products, in an order of additions that is part of their contract. No threads, no formats.
//!
//! A dot product keeps 16 partial sums, element `i` going to sum `i % 16` by a fused multiply-add, and folds them in
//! halves at the end. [`accumulate`] adds over its inner index in ascending order. Neither order depends on how many
//! rows a call has or on the width of the machine's vectors, so the same numbers come out alone or batched, on any CPU.

use pulp::Simd;

/// Partial sums of a dot product. Rows given to [`products`] are padded with zeros to a multiple of this.
pub(crate) const LANES: usize = 16;

/// Folds the partial sums in halves.
#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `sum of f(x[i])` in the fixed order.
#[inline(always)]
pub(crate) fn sum_by(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += f(value);
    }
    fold(lanes)
}

/// `R` rows of `w` times `T` rows of `x`, both `[rows, k]` with `k` a multiple of [`LANES`].
#[inline(always)]
fn tile<S: Simd, const R: usize, const T: usize>(simd: S, w: &[f32], x: &[f32], k: usize) -> [[f32; T]; R] {
    let w: [&[S::f32s]; R] = std::array::from_fn(|r| S::as_simd_f32s(&w[r * k..][..k]).0);
    let x: [&[S::f32s]; T] = std::array::from_fn(|t| S::as_simd_f32s(&x[t * k..][..k]).0);
    let vectors = k / S::F32_LANES;
    let w = w.map(|row| &row[..vectors]);
    let x = x.map(|row| &row[..vectors]);
    let mut lanes = [[[0.0f32; LANES]; T]; R];
    // Narrow vectors go over the rows once for each part of the 16 lanes, so that the sums stay in registers.
    let parts = LANES / S::F32_LANES;
    for part in 0..parts {
        let mut sums = [[simd.splat_f32s(0.0); T]; R];
        let mut i = part;
        while i < vectors {
            let columns: [S::f32s; T] = std::array::from_fn(|t| x[t][i]);
            for r in 0..R {
                let value = w[r][i];
                for t in 0..T {
                    sums[r][t] = simd.mul_add_f32s(value, columns[t], sums[r][t]);
                }
            }
            i += parts;
        }
        for r in 0..R {
            for t in 0..T {
                S::as_mut_simd_f32s(&mut lanes[r][t]).0[part] = sums[r][t];
            }
        }
    }
    // Plain loops: `array::map` is not always inlined, and then loses the vector instructions.
    let mut folded = [[0.0; T]; R];
    for r in 0..R {
        for t in 0..T {
            folded[r][t] = fold(lanes[r][t]);
        }
    }
    folded
}

/// `out[r * m + t] = w[r] . x[t]` for `rows` rows of `w` and `m` rows of `x`, each padded to `k`, a multiple of
/// [`LANES`].
#[inline(always)]
pub(crate) fn products<S: Simd>(
    simd: S,
    w: &[f32],
    rows: usize,
    x: &[f32],
    m: usize,
    k: usize,
    out: &mut [f32],
) {
    let mut t = 0;
    while t < m {
        let x = &x[t * k..];
        let wide = m - t >= 4;
        let mut r = 0;
        while r < rows {
            let w = &w[r * k..];
            let tall = rows - r >= 4;
            match (tall, wide) {
                (true, true) => store(tile::<S, 4, 4>(simd, w, x, k), r, t, m, out),
                (true, false) => store(tile::<S, 4, 1>(simd, w, x, k), r, t, m, out),
                (false, true) => store(tile::<S, 1, 4>(simd, w, x, k), r, t, m, out),
                (false, false) => store(tile::<S, 1, 1>(simd, w, x, k), r, t, m, out),
            }
            r += if tall { 4 } else { 1 };
        }
        t += if wide { 4 } else { 1 };
    }
}

#[inline(always)]
fn store<const R: usize, const T: usize>(sums: [[f32; T]; R], r: usize, t: usize, m: usize, out: &mut [f32]) {
    for (i, row) in sums.iter().enumerate() {
        out[(r + i) * m + t..][..T].copy_from_slice(row);
    }
}

/// `out += a b`: `a` is `[m, inner]`, `b` `[inner, columns]`, `out` `[m, columns]`, `columns` a multiple of [`LANES`].
/// Every element adds its terms one after the other, `inner` ascending.
#[inline(always)]
pub(crate) fn accumulate<S: Simd>(
    simd: S,
    a: &[f32],
    inner: usize,
    b: &[f32],
    columns: usize,
    out: &mut [f32],
) {
    let m = out.len() / columns;
    let b = S::as_simd_f32s(&b[..inner * columns]).0;
    let out = S::as_mut_simd_f32s(out).0;
    let width = columns / S::F32_LANES;
    let mut t = 0;
    while t < m {
        let wide = m - t >= 4;
        let a = &a[t * inner..];
        let mut c = 0;
        while c < width {
            let out = &mut out[t * width..];
            let vectors = match width - c {
                0 | 1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
            match (wide, vectors) {
                (true, 4) => strip::<S, 4, 4>(simd, a, inner, b, width, c, out),
                (true, 2) => strip::<S, 4, 2>(simd, a, inner, b, width, c, out),
                (true, _) => strip::<S, 4, 1>(simd, a, inner, b, width, c, out),
                (false, 4) => strip::<S, 1, 4>(simd, a, inner, b, width, c, out),
                (false, 2) => strip::<S, 1, 2>(simd, a, inner, b, width, c, out),
                (false, _) => strip::<S, 1, 1>(simd, a, inner, b, width, c, out),
            }
            c += vectors;
        }
        t += if wide { 4 } else { 1 };
    }
}

/// `T` rows and `C` vectors of columns of [`accumulate`].
#[inline(always)]
fn strip<S: Simd, const T: usize, const C: usize>(
    simd: S,
    a: &[f32],
    inner: usize,
    b: &[S::f32s],
    width: usize,
    column: usize,
    out: &mut [S::f32s],
) {
    let a: [&[f32]; T] = std::array::from_fn(|t| &a[t * inner..][..inner]);
    // Element by element in and out: a slice of `sums` would keep it in memory instead of registers.
    let mut sums = [[simd.splat_f32s(0.0); C]; T];
    for t in 0..T {
        for c in 0..C {
            sums[t][c] = out[t * width + column + c];
        }
    }
    for (i, row) in b.chunks_exact(width).take(inner).enumerate() {
        let row = &row[column..column + C];
        for t in 0..T {
            let factor = simd.splat_f32s(a[t][i]);
            for c in 0..C {
                sums[t][c] = simd.mul_add_f32s(factor, row[c], sums[t][c]);
            }
        }
    }
    for t in 0..T {
        for c in 0..C {
            out[t * width + column + c] = sums[t][c];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close};
    use pulp::{Arch, Scalar, WithSimd};

    struct Products<'a>(&'a [f32], usize, &'a [f32], usize, usize, &'a mut [f32]);

    impl WithSimd for Products<'_> {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            products(simd, self.0, self.1, self.2, self.3, self.4, self.5);
        }
    }

    struct Accumulate<'a>(&'a [f32], usize, &'a [f32], usize, &'a mut [f32]);

    impl WithSimd for Accumulate<'_> {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            accumulate(simd, self.0, self.1, self.2, self.3, self.4);
        }
    }

    #[test]
    fn products_are_right_and_the_same_on_every_vector_width() {
        let mut random = Random::new(1);
        for (rows, m, k) in [(1, 1, 16), (4, 4, 32), (7, 9, 48), (5, 3, 160), (8, 1, 2048)] {
            let (w, x) = (random.normal(rows * k), random.normal(m * k));
            let mut out = vec![0.0; rows * m];
            Arch::new().dispatch(Products(&w, rows, &x, m, k, &mut out));
            let mut scalar = vec![0.0; rows * m];
            Products(&w, rows, &x, m, k, &mut scalar).with_simd(Scalar);
            assert_eq!(out, scalar);
            let want: Vec<f64> = (0..rows * m)
                .map(|i| (0..k).map(|j| f64::from(w[i / m * k + j]) * f64::from(x[i % m * k + j])).sum())
                .collect();
            assert_close(&out, &want, 1e-5);
        }
    }

    #[test]
    fn accumulate_is_right_and_independent_of_the_number_of_rows() {
        let mut random = Random::new(2);
        for (m, inner, columns) in [(1, 1, 16), (4, 32, 128), (9, 72, 32), (6, 31, 80)] {
            let (a, b, start) =
                (random.normal(m * inner), random.normal(inner * columns), random.normal(m * columns));
            let mut out = start.clone();
            Arch::new().dispatch(Accumulate(&a, inner, &b, columns, &mut out));
            for t in 0..m {
                let mut alone = start[t * columns..][..columns].to_vec();
                Accumulate(&a[t * inner..][..inner], inner, &b, columns, &mut alone).with_simd(Scalar);
                assert_eq!(alone, out[t * columns..][..columns]);
            }
            let want: Vec<f64> = (0..m * columns)
                .map(|i| {
                    let (t, c) = (i / columns, i % columns);
                    let sum: f64 =
                        (0..inner).map(|j| f64::from(a[t * inner + j]) * f64::from(b[j * columns + c])).sum();
                    f64::from(start[i]) + sum
                })
                .collect();
            assert_close(&out, &want, 1e-5);
        }
    }

    #[test]
    fn sums_cover_every_element() {
        for n in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            assert_eq!(sum_by(&x, |v| v), (n * (n + 1) / 2) as f32);
        }
    }
}
