//! Patches and positions of the vision encoder against the CPU backend.

use spark_backend::{Backend, Dtype, VisionSpec};
use spark_testing::Random;

use super::{Bed, cpu, cpu_tensor};

fn spec(patch_size: usize, temporal_patch_size: usize, merge_size: usize) -> VisionSpec {
    VisionSpec {
        num_heads: 1,
        hidden_size: 8,
        patch_size,
        temporal_patch_size,
        merge_size,
        image_mean: [0.5, 0.481_454_66, 0.25],
        image_std: [0.5, 0.268_629_54, 1.0],
    }
}

#[test]
fn patches_are_the_cpu_backends() {
    let (bed, mut random) = (Bed::new(), Random::new(51));
    let backend = cpu(Dtype::Bf16);
    for (num_patches, patch_size, temporal, frames) in [
        (1, 2, 2, 1),
        (3, 3, 1, 1),
        (5, 2, 3, 2),
        (77, 14, 2, 1),
        (100, 16, 2, 1),
        (40, 16, 2, 2),
        (9, 4, 4, 3),
    ] {
        let spec = spec(patch_size, temporal, 2);
        let pixels = random.bytes(num_patches * 3 * frames * patch_size * patch_size);
        let want = backend.patches(&[&pixels], num_patches, &spec).unwrap();
        let out = bed.empty(want.shape(), Dtype::Bf16);
        bed.kernels.patches(&bed.stream, &bed.upload(&pixels), &spec, &out).unwrap();
        assert_eq!(bed.values(&out), want.values(), "{num_patches} {patch_size} {temporal} {frames}");
    }
}

#[test]
fn positions_are_the_cpu_backends() {
    let (bed, mut random) = (Bed::new(), Random::new(52));
    let backend = cpu(Dtype::Bf16);
    for (grid, merge, side, hidden) in [
        ([1, 1, 1], 1, 1, 8),
        ([1, 2, 4], 2, 5, 24),
        ([2, 6, 10], 2, 7, 40),
        ([1, 64, 48], 2, 48, 1152),
        ([3, 12, 9], 3, 48, 64),
    ] {
        let (spec, rows) = (spec(16, 2, merge), grid.iter().product::<usize>());
        let (x, table) = (random.normals(rows * hidden, 1.0), random.normals(side * side * hidden, 1.0));
        let mut want = cpu_tensor(&backend, &x, [rows, hidden]);
        let host_table = cpu_tensor(&backend, &table, [side * side, hidden]);
        backend.add_position(&mut want, &host_table, grid, &spec).unwrap();
        let device = bed.tensor(&x, [rows, hidden], Dtype::Bf16);
        let table = bed.tensor(&table, [side * side, hidden], Dtype::Bf16);
        bed.kernels.add_position(&bed.stream, &device, &table, grid, &spec).unwrap();
        assert_eq!(bed.values(&device), want.values(), "{grid:?} {merge} {side} {hidden}");
    }
}

#[test]
fn wrong_grids_and_sizes_are_refused() {
    let bed = Bed::new();
    let spec = spec(2, 2, 2);
    let patches = |num_bytes: usize, rows: usize| {
        let out = bed.empty([rows, 24], Dtype::Bf16);
        bed.kernels.patches(&bed.stream, &bed.upload(&vec![0u8; num_bytes]), &spec, &out)
    };
    assert!(patches(24, 2).is_ok());
    assert!(patches(23, 2).is_err() && patches(72, 2).is_err());
    let (x, table) = (bed.empty([8, 16], Dtype::Bf16), bed.empty([9, 16], Dtype::Bf16));
    let add = |table, grid| bed.kernels.add_position(&bed.stream, &x, table, grid, &spec);
    assert!(add(&table, [1, 2, 4]).is_ok());
    assert!(add(&table, [1, 1, 8]).is_err() && add(&table, [1, 4, 4]).is_err());
    assert!(add(&bed.empty([8, 16], Dtype::Bf16), [1, 2, 4]).is_err());
}
