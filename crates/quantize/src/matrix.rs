//! Float32 matrices, rows of calibration inputs, and the one product everything here is measured with. No formats.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use spark_backend::{LinearWeight, Matrix};

use crate::error::{Error, Result};

/// A weight `[n, k]`, row-major float32.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Weight {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) values: Vec<f32>,
}

impl Weight {
    /// From host form; `module` is for the error of values that are no numbers.
    pub(crate) fn of(matrix: &Matrix, module: &str) -> Result<Self> {
        let values = spark_cpu::dequantize(matrix)?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err(Error::NonFinite { module: module.to_owned() });
        }
        Ok(Self { n: matrix.n, k: matrix.k, values })
    }

    /// All parts of a linear layer.
    pub(crate) fn parts(weight: &LinearWeight, module: &str) -> Result<Vec<Self>> {
        weight.parts.iter().map(|part| Self::of(part, module)).collect()
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.k..][..self.k]
    }

    /// Multiplies column `j` by `scale[j]`.
    pub(crate) fn scale_columns(&mut self, scale: &[f32]) {
        for row in self.values.chunks_exact_mut(self.k) {
            row.iter_mut().zip(scale).for_each(|(value, scale)| *value *= scale);
        }
    }

    /// Divides row `i` by `scale[i]`.
    pub(crate) fn divide_rows(&mut self, scale: &[f32]) {
        for (row, scale) in self.values.chunks_exact_mut(self.k).zip(scale) {
            row.iter_mut().for_each(|value| *value /= scale);
        }
    }

    /// `[k, n]`.
    pub(crate) fn transposed(&self) -> Self {
        let mut values = vec![0.0; self.values.len()];
        for (j, column) in values.chunks_exact_mut(self.n).enumerate() {
            column.iter_mut().enumerate().for_each(|(i, value)| *value = self.values[i * self.k + j]);
        }
        Self { n: self.k, k: self.n, values }
    }

    /// Mean of the magnitudes of each column, each row counted relative to the largest magnitude of its groups.
    pub(crate) fn column_weight(&self, group_size: usize) -> Vec<f32> {
        let mut sum = vec![0.0f32; self.k];
        for row in self.values.chunks_exact(self.k) {
            for (group, sum) in row.chunks(group_size).zip(sum.chunks_mut(group_size)) {
                let largest = group.iter().fold(0.0f32, |m, v| m.max(v.abs())) + 1e-6;
                sum.iter_mut().zip(group).for_each(|(sum, value)| *sum += value.abs() / largest);
            }
        }
        sum.iter().map(|sum| sum / self.n as f32).collect()
    }
}

/// Inputs `[rows, k]` of a linear layer, each already multiplied by what it counts, and the mean magnitude of each
/// channel.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Inputs {
    pub(crate) k: usize,
    pub(crate) values: Vec<f32>,
    pub(crate) mean_abs: Vec<f32>,
    /// The same values in tiles of `LANES` rows, `[ceil(rows / LANES), k, LANES]`, the last filled up with zeros.
    tiles: Vec<f32>,
}

impl Inputs {
    /// From `values` `[rows, k]`.
    pub(crate) fn new(k: usize, values: Vec<f32>, mean_abs: Vec<f32>) -> Self {
        let rows = values.len() / k;
        let mut tiles = vec![0.0; rows.div_ceil(LANES) * LANES * k];
        for (row, x) in values.chunks_exact(k).enumerate() {
            let tile = &mut tiles[row / LANES * LANES * k..];
            x.iter().enumerate().for_each(|(j, &x)| tile[j * LANES + row % LANES] = x);
        }
        Self { k, values, mean_abs, tiles }
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.values.len() / self.k
    }

    /// `x W^T`, `[rows, n]`.
    pub(crate) fn times(&self, weight: &Weight) -> Vec<f32> {
        let arch = Arch::new();
        let mut out = vec![0.0; self.num_rows() * weight.n];
        let rows = out.par_chunks_mut(weight.n).zip(self.values.par_chunks(self.k));
        rows.for_each(|(out, x)| arch.dispatch(Times { weight, x, out }));
        out
    }

    /// For each group of `group_size` channels the matrix of inner products `[group_size, group_size]`.
    pub(crate) fn grams(&self, group_size: usize) -> Vec<Vec<f32>> {
        let group = |first: usize| {
            let mut gram = vec![0.0f32; group_size * group_size];
            for row in self.values.chunks_exact(self.k) {
                let x = &row[first..first + group_size];
                for (line, &a) in gram.chunks_exact_mut(group_size).zip(x) {
                    line.iter_mut().zip(x).for_each(|(sum, &b)| *sum += a * b);
                }
            }
            gram
        };
        (0..self.k / group_size).into_par_iter().map(|g| group(g * group_size)).collect()
    }
}

/// Rows of a weight that are multiplied together, to read the inputs once for all of them.
pub(crate) const BLOCK: usize = 4;
/// Inputs that are multiplied together: some vector registers, none of which has to be summed up at the end.
const LANES: usize = 32;

// What is run with the vector instructions of the machine is a struct, not a closure: the compiler inlines it into the
// function that may use them, whatever its size.

/// `x W^T` of one row.
struct Times<'a> {
    weight: &'a Weight,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Times<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (row, out) in self.out.iter_mut().enumerate() {
            let (w, w_rest) = self.weight.row(row).as_chunks::<LANES>();
            let (x, x_rest) = self.x.as_chunks::<LANES>();
            let mut sums = [0.0f32; LANES];
            for (w, x) in w.iter().zip(x) {
                for lane in 0..LANES {
                    sums[lane] = w[lane].mul_add(x[lane], sums[lane]);
                }
            }
            *out = sums.iter().sum::<f32>() + w_rest.iter().zip(x_rest).map(|(w, x)| w * x).sum::<f32>();
        }
    }
}

/// See [`squares`].
struct Squares<'a> {
    rows: &'a [f32],
    inputs: Option<&'a Inputs>,
}

impl WithSimd for Squares<'_> {
    type Output = [f64; BLOCK];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> [f64; BLOCK] {
        let k = self.rows.len() / BLOCK;
        let mut sums = [0.0f64; BLOCK];
        if let Some(inputs) = self.inputs {
            let rows: [&[f32]; BLOCK] = std::array::from_fn(|row| &self.rows[row * k..][..k]);
            for tile in inputs.tiles.chunks_exact(k * LANES) {
                let mut products = [[0.0f32; LANES]; BLOCK];
                for (j, x) in tile.as_chunks::<LANES>().0.iter().enumerate() {
                    for row in 0..BLOCK {
                        let w = rows[row][j];
                        for lane in 0..LANES {
                            products[row][lane] = w.mul_add(x[lane], products[row][lane]);
                        }
                    }
                }
                for row in 0..BLOCK {
                    let square: f32 = products[row].iter().map(|y| y * y).sum();
                    sums[row] += f64::from(square);
                }
            }
        } else {
            for (sum, row) in sums.iter_mut().zip(self.rows.chunks_exact(k)) {
                *sum = row.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
            }
        }
        sums
    }
}

/// For each of `BLOCK` rows (`[BLOCK, k]`) the sum of squares of its products with all inputs; without inputs its own
/// sum of squares.
pub(crate) fn squares(arch: Arch, rows: &[f32], inputs: Option<&Inputs>) -> [f64; BLOCK] {
    arch.dispatch(Squares { rows, inputs })
}

/// Sum over all rows of `weight` of the squares of what `difference` makes of them. `difference(row, out)` writes the
/// `[k]` values of row `row`. The order of additions is fixed.
pub(crate) fn total_squares(
    weight: &Weight,
    inputs: Option<&Inputs>,
    difference: impl Fn(usize, &mut [f32]) + Sync,
) -> f64 {
    let arch = Arch::new();
    let sums: Vec<f64> = (0..weight.n.div_ceil(BLOCK))
        .into_par_iter()
        .map_init(
            || vec![0.0; BLOCK * weight.k],
            |rows, block| {
                rows.fill(0.0);
                for (row, out) in (block * BLOCK..weight.n).zip(rows.chunks_exact_mut(weight.k)) {
                    difference(row, out);
                }
                squares(arch, rows, inputs).iter().sum()
            },
        )
        .collect();
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use spark_testing::Random;

    use super::*;

    #[test]
    fn products_of_any_width() {
        let mut random = Random::new(5);
        for (n, k) in [(1, 1), (5, 16), (6, 40), (9, 77)] {
            let weight = Weight { n, k, values: random.normals(n * k, 1.0) };
            let inputs = Inputs::new(k, random.normals(37 * k, 1.0), Vec::new());
            let product = |x: &[f32], row: usize| -> f64 {
                x.iter().zip(weight.row(row)).map(|(x, w)| f64::from(x * w)).sum()
            };
            let want: Vec<f64> = inputs
                .values
                .chunks(k)
                .flat_map(|x| (0..n).map(move |row| (x, row)))
                .map(|(x, row)| product(x, row))
                .collect();
            for (got, want) in inputs.times(&weight).iter().zip(&want) {
                assert!((f64::from(*got) - want).abs() < 1e-4, "{got} {want}");
            }
            let total =
                total_squares(&weight, Some(&inputs), |row, out| out.copy_from_slice(weight.row(row)));
            let squares: f64 = want.iter().map(|value| value * value).sum();
            assert!((total / squares - 1.0).abs() < 1e-4, "{total} {squares}");
            let own = total_squares(&weight, None, |row, out| out.copy_from_slice(weight.row(row)));
            let squares: f64 = weight.values.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
            assert!((own / squares - 1.0).abs() < 1e-6);
            assert_eq!(weight.transposed().transposed(), weight);
        }
    }
}
