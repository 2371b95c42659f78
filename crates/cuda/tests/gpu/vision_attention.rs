//! The encoder's attention against the CPU backend: head widths, odd frames, videos, several images in one call.

use spark_backend::{Backend, Dtype, VisionSpec};
use spark_cuda::Pool;
use spark_testing::{Random, rel_err, tolerance};

use super::attention::is_far;
use super::{Bed, cpu, cpu_tensor};

fn spec(num_heads: usize, head_dim: usize) -> VisionSpec {
    VisionSpec {
        num_heads,
        hidden_size: num_heads * head_dim,
        patch_size: 16,
        temporal_patch_size: 2,
        merge_size: 2,
        image_mean: [0.5; 3],
        image_std: [0.5; 3],
    }
}

/// Both devices' results for some images in one call on the GPU, one after the other on the CPU.
fn compare(grids: &[[usize; 3]], spec: &VisionSpec, seed: u64) {
    compare_grown(grids, spec, seed, 1.0);
}

/// The same, with vectors that grow from the first patch to the last, `growth` times as long as the first.
fn compare_grown(grids: &[[usize; 3]], spec: &VisionSpec, seed: u64, growth: f32) {
    let (bed, backend, hidden) = (Bed::new(), cpu(Dtype::Bf16), spec.hidden_size);
    let patches: Vec<usize> = grids.iter().map(|grid| grid.iter().product()).collect();
    let rows: usize = patches.iter().sum();
    let mut x = Random::new(seed).bf16s(rows * 3 * hidden, 1.0);
    for (i, row) in x.chunks_exact_mut(3 * hidden).enumerate() {
        let factor = 1.0 + (growth - 1.0) * i as f32 / rows as f32;
        row[..2 * hidden].iter_mut().for_each(|v| *v = half::bf16::from_f32(*v * factor).to_f32());
    }
    let mut want = Vec::new();
    for (i, (&grid, &count)) in grids.iter().zip(&patches).enumerate() {
        let first: usize = patches[..i].iter().sum();
        let own = cpu_tensor(&backend, &x[first * 3 * hidden..][..count * 3 * hidden], [count, 3 * hidden]);
        want.extend_from_slice(backend.vision_attend(&own, grid, spec).unwrap().values());
    }
    let pool = Pool::new(&bed.bytes(128 << 20));
    let (qkv, out) =
        (bed.tensor(&x, [rows, 3 * hidden], Dtype::Bf16), bed.empty([rows, hidden], Dtype::Bf16));
    bed.kernels.vision_attend_images(&bed.stream, &pool, &qkv, grids, spec, &out).unwrap();
    let got = bed.values(&out);
    let error = rel_err(&got, &want);
    let far = (0..want.len()).filter(|&i| is_far(got[i], want[i]));
    let wrong: Vec<_> = far.take(8).map(|i| (i / hidden, i % hidden, got[i], want[i])).collect();
    let what = format!("{grids:?} {} x {}", spec.num_heads, hidden / spec.num_heads);
    assert!(error < tolerance::KERNEL_BF16, "{what}: {error}; {wrong:?} (row, column, got, want)");
    assert!(wrong.is_empty(), "{what}: {wrong:?} (row, column, got, want)");
}

#[test]
fn every_width_is_the_cpu_backends() {
    for (i, head_dim) in [4, 8, 16, 20, 32, 36, 64, 68, 72, 80, 84, 96, 100, 128].into_iter().enumerate() {
        compare(&[[1, 14, 10]], &spec(2, head_dim), 100 + i as u64);
    }
}

#[test]
fn frames_of_any_size_are_the_cpu_backends() {
    // One block, less than a tile, a tile of keys, one more, a tile of rows, many tiles; videos.
    for (i, grid) in [
        [1, 2, 2],
        [1, 6, 6],
        [1, 8, 8],
        [1, 2, 34],
        [1, 8, 16],
        [1, 34, 30],
        [3, 2, 2],
        [2, 12, 14],
        [5, 10, 8],
    ]
    .into_iter()
    .enumerate()
    {
        compare(&[grid], &spec(3, 72), 120 + i as u64);
    }
}

#[test]
fn the_real_heads_are_the_cpu_backends() {
    compare(&[[1, 32, 32]], &spec(16, 72), 140);
}

#[test]
fn maxima_that_grow_are_the_cpu_backends() {
    for (i, (head_dim, growth)) in [(32, 3.0), (64, 4.0), (72, 6.0), (80, 3.0)].into_iter().enumerate() {
        compare_grown(&[[1, 20, 22]], &spec(2, head_dim), 160 + i as u64, growth);
    }
}

#[test]
fn images_of_a_call_do_not_see_each_other() {
    compare(&[[1, 4, 6], [2, 12, 12], [1, 2, 2], [1, 16, 10], [3, 4, 4]], &spec(2, 72), 150);
    // More than one launch takes.
    let many: Vec<[usize; 3]> = (0..70).map(|i| [1 + i % 2, 2 + 2 * (i % 3), 4]).collect();
    compare(&many, &spec(1, 40), 151);
}

#[test]
fn wrong_grids_are_refused_before_the_launch() {
    let bed = Bed::new();
    let pool = Pool::new(&bed.bytes(1 << 20));
    let (qkv, out) = (bed.empty([16, 432], Dtype::Bf16), bed.empty([16, 144], Dtype::Bf16));
    let attend = |grid, spec: &VisionSpec| {
        bed.kernels
            .vision_attend(&bed.stream, &pool, &qkv, grid, spec, &out)
            .map_err(|error| error.to_string())
    };
    attend([1, 4, 4], &spec(2, 72)).unwrap();
    for (grid, spec, part) in [
        ([1, 4, 2], spec(2, 72), "8 rows, as in the grids"),
        ([1, 16, 1], spec(2, 72), "whole blocks of 2"),
        ([1, 4, 4], spec(1, 144), "multiple of 4 wide, up to 128"),
        ([1, 4, 4], spec(0, 72), "multiple of 4 wide"),
        ([1, 4, 4], spec(24, 6), "multiple of 4 wide"),
        ([1, 4, 4], spec(2, 68), "[16, 408]"),
    ] {
        let error = attend(grid, &spec).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    bed.stream.synchronize().unwrap();
}
