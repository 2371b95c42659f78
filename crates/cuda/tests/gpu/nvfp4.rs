//! Products of NVFP4 weights with x quantised to NVFP4 (W4A4), where the device has them; elsewhere that they are refused. On the CPU their
//! kernels run in the tests of `nvfp4_tests.rs`.

use spark_backend::Dtype;
use spark_cuda::{Choice, Cubins, Kernels, Nvfp4Test, Pool, Prefill};
use spark_testing::{Random, tolerance};

use super::gemm::{Scheme, assert_close};
use super::moe::Layer;
use super::{Bed, cpu, gpu, kernel_options};

fn quantising() -> Option<Kernels> {
    let device = &gpu().device;
    let cubins = Cubins::get(device.arch(), &kernel_options()).unwrap();
    let kernels = Kernels::load(device, &cubins).unwrap();
    let prefill = Prefill { nvfp4: true, ..Prefill::default() };
    match (device.arch().has_fp4(), kernels.with_prefill(prefill)) {
        (true, kernels) => Some(kernels.unwrap()),
        (false, kernels) => {
            let error = kernels.unwrap_err().to_string();
            assert!(error.contains("NVFP4") && error.contains(device.arch().name()), "{error}");
            None
        }
    }
}

#[test]
fn a_device_passes_the_test_of_nvfp4_or_has_none() {
    let bed = Bed::new();
    let arch = gpu().device.arch();
    let found = bed.kernels.test_nvfp4(&gpu().device, &bed.stream).unwrap();
    println!("NVFP4: {found}");
    match arch.has_fp4() {
        true => assert!(found.has_passed(), "{found}"),
        false => assert_eq!(found, Nvfp4Test::NotOnThisArchitecture(arch)),
    }
}

#[test]
fn experts_in_nvfp4_are_the_cpu_backends_where_the_device_has_them() {
    let Some(kernels) = quantising() else { return };
    let (bed, mut random) = (Bed::new(), Random::new(43));
    let backend = cpu(Dtype::Bf16).with_nvfp4_activations();
    let (hidden, intermediate, rows, top_k) = (272, 160, 400, 3);
    let layer = Layer::new(&mut random, 4, [hidden, intermediate], Scheme::Nvfp4);
    let experts = layer.upload(&bed);
    let (x, routing, want) = layer.routed_on_cpu(&backend, &mut random, rows, top_k);
    let choice = Choice::new(bed.upload(routing.experts()), bed.upload(routing.weights()), top_k);
    let (x, out) =
        (bed.tensor(x.values(), [rows, hidden], Dtype::Bf16), bed.empty([rows, hidden], Dtype::Bf16));
    let pool = Pool::new(&bed.bytes(64 << 20));
    kernels.moe_gemm(&bed.stream, &pool, &x, &choice, &experts, &out).unwrap();
    // A number at the border of two codes may fall on either side: `inner` is rounded to bf16 before it is quantised.
    assert_close("experts", &bed.values(&out), want.values(), hidden, 4.0 * tolerance::KERNEL_BF16);
}
