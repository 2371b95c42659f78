//! The kernels on a GPU against the CPU backend. Not part of a plain test run (`.config/nextest.toml`): these tests need a
//! GPU and fail without one. `cargo xtask gpu-test` builds this program and its kernels; it runs anywhere.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]
#![expect(clippy::print_stdout, reason = "the measurements are the result")]

mod attention;
mod backend;
mod device;
mod encoder;
mod fp8x;
mod gemm;
mod held;
mod linear;
mod moe;
mod moe_gemm;
mod nvfp4;
mod one_rank;
mod ops;
mod probe;
mod ranks;
mod repack;
mod router;
mod rows;
mod sampler;
mod sampler_pair;
mod team;
mod tiny;
mod vision;
mod vision_attention;

use std::path::PathBuf;
use std::sync::OnceLock;

use spark_backend::{Backend, Dtype, VectorWeight};
use spark_cpu::{CpuBackend, CpuTensor};
use spark_cuda::{
    Arena, ArenaPlan, Cubins, Device, DeviceSlice, Driver, Element, KernelOptions, Kernels, Stream, Tensor,
};

/// Names a folder of compiled kernels, for machines without NVRTC.
const KERNEL_DIR_VARIABLE: &str = "SPARK_KERNEL_DIR";

fn kernel_options() -> KernelOptions {
    KernelOptions {
        kernel_dir: std::env::var_os(KERNEL_DIR_VARIABLE).map(PathBuf::from),
        ..Default::default()
    }
}

/// The device and its kernels, shared by all tests.
struct Gpu {
    device: Device,
    kernels: Kernels,
}

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| {
        let device = Driver::open().unwrap().device(0).unwrap();
        let cubins = Cubins::get(device.arch(), &kernel_options()).unwrap();
        println!(
            "{:?}; {} modules compiled in {:?}",
            device.properties(),
            cubins.num_compiled,
            cubins.elapsed
        );
        Gpu { kernels: Kernels::load(&device, &cubins).unwrap(), device }
    })
}

/// A stream and memory of its own for a test.
struct Bed {
    stream: Stream,
    kernels: &'static Kernels,
}

impl Bed {
    fn new() -> Self {
        let gpu = gpu();
        Self { stream: Stream::new(&gpu.device).unwrap(), kernels: &gpu.kernels }
    }

    /// Uninitialised bytes, set to 0xff: NaN in every float type, so that what is not written is seen.
    fn bytes(&self, num_bytes: u64) -> DeviceSlice {
        let mut plan = ArenaPlan::default();
        let region = plan.add("test", num_bytes).unwrap();
        let slice = Arena::new(self.stream.device(), plan).unwrap().region(region).unwrap();
        self.stream.fill(&slice, 0xff).unwrap();
        slice
    }

    fn upload<T: Element>(&self, values: &[T]) -> DeviceSlice {
        let slice = self.bytes(size_of_val(values) as u64);
        self.stream.upload(&slice, values).unwrap();
        slice
    }

    /// `values` rounded to `dtype`.
    fn tensor(&self, values: &[f32], shape: [usize; 2], dtype: Dtype) -> Tensor {
        let slice = match dtype {
            Dtype::F32 => self.upload(values),
            _ => self.upload(&values.iter().map(|&v| half::bf16::from_f32(v)).collect::<Vec<_>>()),
        };
        Tensor::new(&slice, shape, dtype).unwrap()
    }

    fn empty(&self, shape: [usize; 2], dtype: Dtype) -> Tensor {
        let num_bytes = Tensor::num_bytes(shape, dtype).unwrap();
        Tensor::new(&self.bytes(num_bytes), shape, dtype).unwrap()
    }

    fn values(&self, tensor: &Tensor) -> Vec<f32> {
        let len = tensor.rows() * tensor.columns();
        match tensor.dtype() {
            Dtype::F32 => self.stream.download::<f32>(tensor.slice(), len).unwrap(),
            _ => {
                let values = self.stream.download::<half::bf16>(tensor.slice(), len).unwrap();
                values.into_iter().map(half::bf16::to_f32).collect()
            }
        }
    }
}

fn cpu(dtype: Dtype) -> CpuBackend {
    CpuBackend::new(dtype, None).unwrap()
}

fn cpu_tensor(backend: &CpuBackend, values: &[f32], shape: [usize; 2]) -> CpuTensor {
    backend.vector(VectorWeight { values: values.to_vec(), shape }).unwrap()
}
