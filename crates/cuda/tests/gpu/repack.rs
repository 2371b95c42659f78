//! Weights that the device repacks against those that the host packs, byte for byte; and how fast they come.

use std::time::Instant;

use half::f16;
use spark_backend::{Bytes, Dtype, ExpertsWeight, LinearWeight, Matrix, MatrixData};
use spark_cuda::{DeviceSlice, Experts, ExpertsHost, HostBuffer, Linear, PackedHost, Staging, WeightLoader};
use spark_testing::Random;

use super::Bed;

/// Forms of a matrix: scheme and the types of its numbers.
#[derive(Debug, Clone, Copy)]
enum Form {
    Dense(Dtype),
    Int4 { group_size: usize, scales: Dtype, zeros: bool },
    Nvfp4,
    Fp8([usize; 2]),
}

/// Larger than any matrix: a scale for all of it.
const WHOLE: usize = 1 << 20;

const FORMS: [Form; 11] = [
    Form::Dense(Dtype::F32),
    Form::Dense(Dtype::F16),
    Form::Dense(Dtype::Bf16),
    Form::Int4 { group_size: 32, scales: Dtype::F16, zeros: true },
    Form::Int4 { group_size: 64, scales: Dtype::Bf16, zeros: false },
    Form::Int4 { group_size: 128, scales: Dtype::F32, zeros: true },
    Form::Int4 { group_size: 128, scales: Dtype::F16, zeros: false },
    Form::Nvfp4,
    Form::Fp8([128, 128]),
    Form::Fp8([1, WHOLE]),
    Form::Fp8([WHOLE, WHOLE]),
];

fn floats(random: &mut Random, len: usize, dtype: Dtype) -> Bytes {
    let value = |random: &mut Random| random.uniform(1e-4, 0.02);
    match dtype {
        Dtype::F16 => (0..len).flat_map(|_| f16::from_f32(value(random)).to_le_bytes()).collect(),
        Dtype::Bf16 => (0..len).flat_map(|_| half::bf16::from_f32(value(random)).to_le_bytes()).collect(),
        Dtype::F32 => (0..len).flat_map(|_| value(random).to_le_bytes()).collect(),
    }
}

fn matrix(random: &mut Random, n: usize, k: usize, form: Form) -> Matrix {
    let data = match form {
        Form::Dense(dtype) => {
            let mut values = random.bytes(n * k * dtype.size());
            if dtype == Dtype::F16 {
                // Below 2, subnormal numbers as well; without NaN, whose other bits are the conversion's choice.
                values.iter_mut().skip(1).step_by(2).for_each(|byte| *byte &= 0xbf);
            }
            MatrixData::Dense { dtype, values: values.into() }
        }
        Form::Int4 { group_size, scales, zeros } => {
            let len = n * k.div_ceil(group_size);
            let points: Vec<u8> = (0..len).map(|_| random.below(16) as u8).collect();
            MatrixData::Int4 {
                codes: random.bytes(n * k / 2).into(),
                zeros: zeros.then(|| points.into()),
                scales: floats(random, len, scales),
                scale_dtype: scales,
                group_size,
            }
        }
        Form::Nvfp4 => MatrixData::Nvfp4 {
            codes: random.bytes(n * k / 2).into(),
            scales: random.bytes(n * k / 16).into(),
            alpha: random.uniform(0.001, 0.4),
        },
        Form::Fp8(block) => {
            let len = n.div_ceil(block[0]) * k.div_ceil(block[1]);
            let scales = (0..len).map(|_| random.uniform(0.001, 0.4)).collect();
            MatrixData::Fp8 { values: random.bytes(n * k).into(), scales, block }
        }
    };
    Matrix { n, k, data }
}

/// All bytes of both; says where they differ first.
fn assert_same(bed: &Bed, got: &DeviceSlice, want: &DeviceSlice, what: &str) {
    let bytes = |slice: &DeviceSlice| bed.stream.download::<u8>(slice, slice.num_bytes() as usize).unwrap();
    let (got, want) = (bytes(got), bytes(want));
    assert_eq!(got.len(), want.len(), "{what}");
    let wrong: Vec<usize> = (0..got.len()).filter(|&i| got[i] != want[i]).collect();
    let first: Vec<_> = wrong.iter().take(8).map(|&i| (i, got[i], want[i])).collect();
    assert!(wrong.is_empty(), "{what}: {} of {} bytes, (at, got, want) {first:?}", wrong.len(), got.len());
}

fn check(bed: &Bed, loader: &mut WeightLoader, weight: &LinearWeight, what: &str) {
    let host = PackedHost::pack_parts(weight).unwrap();
    let num_bytes = WeightLoader::linear_bytes(weight).unwrap();
    assert_eq!(num_bytes, Linear::num_bytes(&host), "{what}");
    let (want, got) = (bed.bytes(num_bytes), bed.bytes(num_bytes));
    Linear::upload(&bed.stream, &want, &host).unwrap();
    bed.stream.synchronize().unwrap();
    let linear = loader.linear(bed.kernels, &got, weight).unwrap();
    assert_eq!((linear.n(), linear.k()), (weight.n(), weight.k()), "{what}");
    loader.finish().unwrap();
    assert_same(bed, &got, &want, what);
}

/// Both ways to the kernels, with staging areas that hold all and that hold some rows.
fn loaders(bed: &Bed) -> Vec<WeightLoader> {
    [(Staging::Device, 1 << 20), (Staging::Device, 40_000), (Staging::Host, 1 << 20), (Staging::Host, 40_000)]
        .map(|(staging, capacity)| {
            WeightLoader::with_staging(bed.stream.device(), capacity, staging).unwrap()
        })
        .into()
}

#[test]
fn linear_layers_come_as_the_host_packs_them() {
    let (bed, mut random) = (Bed::new(), Random::new(61));
    let mut loaders = loaders(&bed);
    // The smallest, tails in every dimension, whole tiles, parts that meet inside a tile, a real projection of a layer.
    for (rows, k) in [
        (vec![1], 16),
        (vec![33], 208),
        (vec![33, 5], 40),
        (vec![32], 128),
        (vec![40, 7, 17], 144),
        (vec![48, 96], 1152),
        (vec![512, 64, 64], 2048),
    ] {
        // Only dense layers have inputs that are not whole groups of 16.
        let forms = FORMS.into_iter().filter(|form| k % 16 == 0 || matches!(form, Form::Dense(_)));
        for form in forms {
            let parts = rows.iter().map(|&n| matrix(&mut random, n, k, form)).collect();
            let n: usize = rows.iter().sum();
            let bias = n.is_multiple_of(2).then(|| random.normals(n, 1.0));
            let weight = LinearWeight { parts, bias };
            for (i, loader) in loaders.iter_mut().enumerate() {
                check(&bed, loader, &weight, &format!("{rows:?} x {k} {form:?}, loader {i}"));
            }
        }
    }
}

#[test]
fn schemes_side_by_side_come_apart() {
    let (bed, mut random) = (Bed::new(), Random::new(62));
    let forms = [FORMS[7], FORMS[0], FORMS[2], FORMS[8], FORMS[5]];
    let parts: Vec<Matrix> = forms
        .into_iter()
        .zip([40, 3, 9, 16, 33])
        .map(|(form, n)| matrix(&mut random, n, 256, form))
        .collect();
    let n = parts.iter().map(|part| part.n).sum();
    let weight = LinearWeight { parts, bias: Some(random.normals(n, 1.0)) };
    for loader in &mut loaders(&bed) {
        check(&bed, loader, &weight, "mixed");
    }
}

fn experts(random: &mut Random, count: usize, [hidden, inter]: [usize; 2], form: Form) -> ExpertsWeight {
    let mut expert = || {
        let parts = vec![matrix(random, inter, hidden, form), matrix(random, inter, hidden, form)];
        let down = vec![matrix(random, hidden, inter, form)];
        (LinearWeight { parts, bias: None }, LinearWeight { parts: down, bias: None })
    };
    ExpertsWeight { experts: (0..count).map(|_| expert()).collect() }
}

#[test]
fn experts_come_as_the_host_packs_them() {
    let (bed, mut random) = (Bed::new(), Random::new(63));
    let mut loaders = loaders(&bed);
    for (count, sizes) in [(1, [16, 16]), (5, [80, 48]), (9, [256, 96]), (128, [64, 32])] {
        for form in FORMS {
            let weight = experts(&mut random, count, sizes, form);
            let host = ExpertsHost::pack(&weight).unwrap();
            let num_bytes = WeightLoader::experts_bytes(&weight).unwrap();
            assert_eq!(num_bytes, host.num_bytes());
            let want = bed.bytes(num_bytes);
            Experts::upload(&bed.stream, &want, &host).unwrap();
            for (i, loader) in loaders.iter_mut().enumerate() {
                let got = bed.bytes(num_bytes);
                bed.stream.synchronize().unwrap();
                let loaded = loader.experts(bed.kernels, &got, &weight).unwrap();
                assert_eq!(
                    (loaded.num_experts(), loaded.hidden(), loaded.intermediate()),
                    (count, sizes[0], sizes[1])
                );
                loader.finish().unwrap();
                assert_same(&bed, &got, &want, &format!("{count} of {sizes:?} {form:?}, loader {i}"));
            }
        }
    }
}

#[test]
fn values_of_any_length_are_uploaded() {
    let (bed, mut random) = (Bed::new(), Random::new(64));
    for loader in &mut loaders(&bed) {
        for len in [0, 1, 10_000, 300_000] {
            let values = random.normals(len, 1.0);
            let target = bed.bytes(4 * len as u64);
            bed.stream.synchronize().unwrap();
            loader.upload(&target, &values).unwrap();
            loader.finish().unwrap();
            assert_eq!(bed.stream.download::<f32>(&target, len).unwrap(), values, "{len}");
        }
        assert!(loader.upload(&bed.bytes(8), &[0f32; 3]).is_err());
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (bed, mut random) = (Bed::new(), Random::new(65));
    let mut loader = WeightLoader::new(bed.stream.device(), 1 << 16).unwrap();
    let weight = LinearWeight { parts: vec![matrix(&mut random, 32, 128, FORMS[0])], bias: None };
    let num_bytes = WeightLoader::linear_bytes(&weight).unwrap();
    assert!(loader.linear(bed.kernels, &bed.bytes(num_bytes - 1), &weight).is_err());
    assert!(loader.linear(bed.kernels, &bed.bytes(num_bytes), &weight).is_ok());
    for (k, form) in [(12, FORMS[0]), (24, FORMS[7])] {
        let narrow = LinearWeight { parts: vec![matrix(&mut random, 32, k, form)], bias: None };
        assert!(WeightLoader::linear_bytes(&narrow).is_err(), "{k} {form:?}");
    }
    // A row that is larger than a staging area.
    let wide = LinearWeight { parts: vec![matrix(&mut random, 1, 1 << 16, FORMS[0])], bias: None };
    let target = bed.bytes(WeightLoader::linear_bytes(&wide).unwrap());
    let error = loader.linear(bed.kernels, &target, &wide).unwrap_err().to_string();
    assert!(error.contains("rows of at most 65536 bytes"), "{error}");
    loader.finish().unwrap();
}

/// Gigabytes a second of one layer of the 30B's experts and of its output head, and of the parts: memory of the host to memory of the
/// host, pinned memory to the device.
#[test]
fn measurements_of_loading() {
    let (bed, mut random) = (Bed::new(), Random::new(66));
    let device = bed.stream.device();
    let capacity = WeightLoader::CAPACITY;
    let mut pinned = HostBuffer::new(device, capacity as u64).unwrap();
    let source = random.bytes(capacity);
    let speed = |name: &str, num_bytes: u64, work: &mut dyn FnMut()| {
        work();
        let times = (0..5).map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        });
        let best = times.fold(f64::INFINITY, f64::min);
        println!(
            "load {name:34} {:8.1} MB {:8.2} ms {:7.2} GB/s",
            num_bytes as f64 / 1e6,
            best * 1e3,
            num_bytes as f64 / best / 1e9
        );
    };
    speed("host to pinned, one thread", capacity as u64, &mut || pinned.bytes_mut().copy_from_slice(&source));
    let target = bed.bytes(capacity as u64);
    speed("pinned to device", capacity as u64, &mut || {
        // SAFETY: the buffer is left alone until `synchronize` has returned.
        unsafe { bed.stream.upload_from(&target, &pinned, 0).unwrap() };
        bed.stream.synchronize().unwrap();
    });
    let forms = [("int4 g128", FORMS[6]), ("nvfp4", Form::Nvfp4), ("fp8", FORMS[8]), ("bf16", FORMS[2])];
    for (name, form) in forms {
        // One expert's buffers, shared by all: the time is that of copies and kernels.
        let one = experts(&mut random, 1, [2048, 768], form).experts.remove(0);
        let weight = ExpertsWeight { experts: vec![one; 128] };
        let num_bytes = WeightLoader::experts_bytes(&weight).unwrap();
        let target = bed.bytes(num_bytes);
        for staging in [Staging::Device, Staging::Host] {
            let mut loader = WeightLoader::with_staging(device, capacity, staging).unwrap();
            speed(&format!("128 experts {name} via {staging:?}"), num_bytes, &mut || {
                loader.experts(bed.kernels, &target, &weight).unwrap();
                loader.finish().unwrap();
            });
        }
    }
    // The same, from 300 MB that no cache holds.
    let weight = experts(&mut random, 128, [2048, 768], FORMS[6]);
    let num_bytes = WeightLoader::experts_bytes(&weight).unwrap();
    let target = bed.bytes(num_bytes);
    let mut loader = WeightLoader::new(device, capacity).unwrap();
    speed("128 experts int4 g128, own memory", num_bytes, &mut || {
        loader.experts(bed.kernels, &target, &weight).unwrap();
        loader.finish().unwrap();
    });
    let head = LinearWeight { parts: vec![matrix(&mut random, 151_936, 2048, FORMS[2])], bias: None };
    let num_bytes = WeightLoader::linear_bytes(&head).unwrap();
    let target = bed.bytes(num_bytes);
    speed("output head bf16", num_bytes, &mut || {
        loader.linear(bed.kernels, &target, &head).unwrap();
        loader.finish().unwrap();
    });
}
