//! Moving, adding and activating rows against the CPU backend.

use spark_backend::{Activation, Backend, Dtype, Rank};
use spark_cuda::RowRange;
use spark_testing::{Random, rel_err, tolerance};

use super::{Bed, cpu, cpu_tensor};

const DTYPE: Dtype = Dtype::Bf16;

#[test]
fn rows_are_gathered() {
    let (bed, mut random) = (Bed::new(), Random::new(41));
    for (source_rows, columns, num_rows) in [(1, 8, 1), (9, 72, 5), (300, 2048, 64), (33, 4096, 700)] {
        let values = random.bf16s(source_rows * columns, 1.0);
        let source = bed.tensor(&values, [source_rows, columns], DTYPE);
        // Two rows more than there are.
        let rows: Vec<u32> = random.token_ids(num_rows, source_rows + 2);
        let out = bed.empty([num_rows, columns], DTYPE);
        bed.kernels.gather_rows(&bed.stream, &source, &bed.upload(&rows), &out).unwrap();
        let zeros = vec![0.0; columns];
        let row = |i: u32| values.get(i as usize * columns..).and_then(|rest| rest.get(..columns));
        let want: Vec<f32> = rows.iter().flat_map(|&i| row(i).unwrap_or(&zeros)).copied().collect();
        assert_eq!(bed.values(&out), want, "{source_rows} {columns} {num_rows}");
    }
}

#[test]
fn columns_of_ranks_come_side_by_side() {
    let (bed, mut random) = (Bed::new(), Random::new(44));
    for (world, rows, columns) in
        [(2, 1, 300), (2, 5, 151_936), (3, 4, 1025), (8, 2, 5), (1, 3, 70), (2, 3, 2049)]
    {
        let want = random.normals(rows * columns, 1.0);
        let part_length = rows * columns.div_ceil(world) + 3;
        let mut parts = vec![f32::NAN; world * part_length];
        for index in 0..world {
            let share = Rank::new(index, world).unwrap().range(columns);
            for (row, values) in want.chunks(columns).enumerate() {
                let start = index * part_length + row * share.len();
                parts[start..start + share.len()].copy_from_slice(&values[share.clone()]);
            }
        }
        let (parts, out) = (bed.upload(&parts), bed.empty([rows, columns], Dtype::F32));
        bed.kernels.join_columns(&bed.stream, &parts, part_length, world, &out).unwrap();
        assert_eq!(bed.values(&out), want, "{world} ranks, {rows} x {columns}");
        let error = bed.kernels.join_columns(&bed.stream, &parts, part_length + 1, world, &out).unwrap_err();
        assert!(error.to_string().contains("values of 4 bytes"), "{error}");
        assert!(bed.kernels.join_columns(&bed.stream, &parts, part_length, 0, &out).is_err());
    }
}

#[test]
fn ranges_of_rows_are_set_and_added() {
    let (bed, mut random) = (Bed::new(), Random::new(42));
    let backend = cpu(DTYPE);
    for (rows, source_rows, columns, row, source_row, count) in
        [(1, 1, 8, 0, 0, 1), (9, 5, 72, 3, 1, 4), (600, 700, 2048, 17, 40, 512), (4, 4, 64, 1, 1, 0)]
    {
        let (x, source) = (random.bf16s(rows * columns, 1.0), random.bf16s(source_rows * columns, 1.0));
        let (device_x, device_source) =
            (bed.tensor(&x, [rows, columns], DTYPE), bed.tensor(&source, [source_rows, columns], DTYPE));
        let mut host_x = cpu_tensor(&backend, &x, [rows, columns]);
        let host_source = cpu_tensor(&backend, &source, [source_rows, columns]);
        let range = RowRange { row, source_row, rows: count };
        bed.kernels.add_rows(&bed.stream, &device_x, &device_source, range).unwrap();
        backend.add_rows(&mut host_x, row, &host_source, source_row, count).unwrap();
        assert_eq!(bed.values(&device_x), host_x.values(), "add {rows} {columns}");
        bed.kernels.set_rows(&bed.stream, &device_x, &device_source, range).unwrap();
        backend.set_rows(&mut host_x, row, &host_source, source_row, count).unwrap();
        assert_eq!(bed.values(&device_x), host_x.values(), "set {rows} {columns}");
    }
}

#[test]
fn sums_and_activations_are_the_cpu_backends() {
    let (bed, mut random) = (Bed::new(), Random::new(43));
    let backend = cpu(DTYPE);
    for (rows, columns) in [(1, 8), (3, 40), (65, 1152), (129, 4304)] {
        let [mut x, y] = [(); 2].map(|()| random.normals(rows * columns, 3.0));
        x[..8].copy_from_slice(&[0.0, -0.0, 1e4, -1e4, 1e30, -1e30, -90.0, 1e-30]);
        let mut host = cpu_tensor(&backend, &x, [rows, columns]);
        backend.add(&mut host, &cpu_tensor(&backend, &y, [rows, columns])).unwrap();
        let device = bed.tensor(&x, [rows, columns], DTYPE);
        bed.kernels.add(&bed.stream, &device, &bed.tensor(&y, [rows, columns], DTYPE)).unwrap();
        assert_eq!(bed.values(&device), host.values(), "{rows} x {columns}");
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf] {
            // The largest values would hide the others; far below zero the CPU leaves up to 1e-8 of a sigmoid.
            let mut host = cpu_tensor(&backend, &x, [rows, columns]);
            backend.activate(&mut host, activation).unwrap();
            let device = bed.tensor(&x, [rows, columns], DTYPE);
            bed.kernels.activate(&bed.stream, &device, activation).unwrap();
            let (got, want) = (bed.values(&device), host.values());
            let special = format!("{activation:?}: got {:?} want {:?}", &got[..8], &want[..8]);
            assert!(
                got[..8].iter().zip(want).all(|(a, b)| (a - b).abs() <= b.abs() * 0.01 + 1e-7),
                "{special}"
            );
            let error = rel_err(&got[8..], &want[8..]);
            assert!(error < tolerance::KERNEL_BF16, "{activation:?} {rows} x {columns}: {error}");
        }
    }
}

#[test]
fn rows_outside_and_other_shapes_are_refused() {
    let bed = Bed::new();
    let (x, y) = (bed.empty([4, 16], DTYPE), bed.empty([3, 16], DTYPE));
    let range = |row, source_row, rows| RowRange { row, source_row, rows };
    assert!(bed.kernels.add_rows(&bed.stream, &x, &y, range(1, 0, 3)).is_ok());
    for wrong in [range(2, 0, 3), range(0, 1, 3), range(usize::MAX, 0, 1)] {
        assert!(bed.kernels.add_rows(&bed.stream, &x, &y, wrong).is_err(), "{wrong:?}");
        assert!(bed.kernels.set_rows(&bed.stream, &x, &y, wrong).is_err(), "{wrong:?}");
    }
    assert!(bed.kernels.add(&bed.stream, &x, &y).is_err());
    assert!(bed.kernels.add(&bed.stream, &x, &x).is_err(), "what is written is read");
    assert!(bed.kernels.activate(&bed.stream, &bed.empty([1, 7], DTYPE), Activation::Silu).is_err());
    assert!(bed.kernels.activate(&bed.stream, &bed.empty([1, 8], Dtype::F32), Activation::Silu).is_err());
    let rows = bed.upload(&[0u32]);
    assert!(bed.kernels.gather_rows(&bed.stream, &x, &rows, &y).is_err());
}
