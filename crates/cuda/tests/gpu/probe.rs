//! Streams on a part of the multiprocessors, and what is measured with them: the GB10 proxy; the probe.

use spark_backend::Dtype;
use spark_cuda::{Cubins, Error, Stream, bench_proxy, probe};

use super::{Bed, gpu, kernel_options};

#[test]
fn a_part_of_the_multiprocessors_gives_the_same_numbers() {
    let bed = Bed::new();
    let device = &gpu().device;
    let most = device.properties().num_sms;
    assert_eq!(bed.stream.num_sms(), most);
    let values: Vec<f32> = (0..64 * 512).map(|i| (i * 37 % 1001) as f32 / 250.0 - 2.0).collect();
    let gate_up = bed.tensor(&values, [64, 512], Dtype::Bf16);
    let [whole, part] = [(); 2].map(|()| bed.empty([64, 256], Dtype::Bf16));
    bed.kernels.swiglu(&bed.stream, &gate_up, &whole).unwrap();
    let stream = Stream::on_sms(device, 16).unwrap();
    assert_eq!(stream.num_sms(), 16);
    stream.record(|| bed.kernels.swiglu(&stream, &gate_up, &part)).unwrap().launch(&stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(bed.values(&part), bed.values(&whole));
    for refused in [0, most + 1] {
        let error = Stream::on_sms(device, refused).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
}

#[test]
fn measurements_of_a_gb10_proxy() {
    let gpu = gpu();
    let cubins = Cubins::get(gpu.device.arch(), &kernel_options()).unwrap();
    let report = bench_proxy::run(&gpu.device, &cubins, &gpu.kernels, bench_proxy::GB10_SMS).unwrap();
    println!("{report}");
    assert!(report.copy.gb_per_second() > 10.0, "{report}");
    // Six layers and the norm, the router, the experts twice: at four batches.
    assert_eq!(report.kernels.len(), 36);
    for kernel in &report.kernels {
        assert!(kernel.timing.micros > 0.0 && kernel.times_gb10() > 0.0, "{kernel:?}");
    }
}

#[test]
fn measurements_of_the_probe() {
    let gpu = gpu();
    let cubins = Cubins::get(gpu.device.arch(), &kernel_options()).unwrap();
    let found = probe::run(&gpu.device, &cubins).unwrap();
    for (name, value) in found.device.iter().chain(&found.measured) {
        println!("{name:44} {value:.3}");
    }
    for (name, why) in &found.missing {
        println!("missing: {name}: {why}");
    }
    let value = |name: &str| {
        found.measured.iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}")).1
    };
    assert!(found.measured.iter().all(|(_, value)| value.is_finite() && *value >= 0.0));
    assert!(value("device_read_gb_per_s") > 50.0 && value("host_to_device_gb_per_s") > 1.0);
    assert!(value("mma_bf16_m16n8k16_tflops") > 10.0);
    assert!((200.0..5000.0).contains(&value("mma_bf16_m16n8k16_sm_clock_mhz")));
    assert!((0.1..100.0).contains(&value("launch_gap_us")) && (0.1..100.0).contains(&value("graph_gap_us")));
}
