//! Flags about what computes, and in what.

use std::path::PathBuf;

use clap::{Args, ValueEnum, builder::RangedU64ValueParser};
use spark_engine::{Device, Dtype, EngineBuilder, NativeFp4, PrefillActivations};

#[derive(Args)]
#[command(next_help_heading = "Device")]
pub(crate) struct DeviceArgs {
    /// Compute on: `auto` takes a GPU if there is one, else the CPU.
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceArg,
    /// Compute in: `auto` takes the checkpoint's dtype, with half precision computed in bfloat16. float32 needs the CPU.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: DtypeArg,
    /// Activations of products of many rows (prompts) with 4-bit integer weights: bfloat16, or FP8 with a scale for each row, which is nearly
    /// twice as fast where tensor cores have the instructions (GB10) and adds 2 to 3 % of error to each product (docs/kernels/gemm.md).
    #[arg(long, value_enum, default_value = "bf16")]
    prefill_activations: ActivationsArg,
    /// Products of many rows (prompts) with NVFP4 weights: `auto` quantises their activations to NVFP4 (W4A4) on a GPU that multiplies FP4
    /// (GB10) and passes a test of it at the start, at about 10 % of error in each product (docs/kernels/nvfp4.md); else, and with `off`,
    /// they stay in bfloat16 (W4A16). `emulate` does it on the CPU, in every product, to measure the error.
    #[arg(long, value_enum, default_value = "off")]
    native_fp4: NativeFp4Arg,
    /// CPU threads, 1024 at most; by default one per core.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    threads: Option<usize>,
    /// A folder of GPU kernels made by `kernels build`; by default they are compiled at the first start and kept.
    #[arg(long, env = "SPARK_KERNEL_DIR", value_name = "FOLDER")]
    kernel_dir: Option<PathBuf>,
    /// Give every step to the GPU call by call instead of as a recorded graph. Slower; for finding faults.
    #[arg(long)]
    enforce_eager: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeArg {
    Auto,
    #[value(alias = "bf16")]
    Bfloat16,
    #[value(alias = "float")]
    Float32,
}

#[derive(Clone, Copy, ValueEnum)]
enum ActivationsArg {
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

#[derive(Clone, Copy, ValueEnum)]
enum NativeFp4Arg {
    Auto,
    Off,
    Emulate,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceArg {
    Auto,
    Cpu,
    Cuda,
}

impl DeviceArgs {
    /// Sets them.
    pub(crate) fn apply(self, mut builder: EngineBuilder) -> EngineBuilder {
        builder = builder.enforce_eager(self.enforce_eager).device(match self.device {
            DeviceArg::Auto => Device::Auto,
            DeviceArg::Cpu => Device::Cpu,
            DeviceArg::Cuda => Device::Cuda,
        });
        builder = match self.dtype {
            DtypeArg::Auto => builder,
            DtypeArg::Bfloat16 => builder.dtype(Dtype::Bf16),
            DtypeArg::Float32 => builder.dtype(Dtype::F32),
        };
        builder = builder.prefill_activations(match self.prefill_activations {
            ActivationsArg::Bf16 => PrefillActivations::Bf16,
            ActivationsArg::Fp8 => PrefillActivations::Fp8,
        });
        builder = builder.native_fp4(match self.native_fp4 {
            NativeFp4Arg::Auto => NativeFp4::Auto,
            NativeFp4Arg::Off => NativeFp4::Off,
            NativeFp4Arg::Emulate => NativeFp4::Emulated,
        });
        if let Some(threads) = self.threads {
            builder = builder.threads(threads);
        }
        if let Some(folder) = self.kernel_dir {
            builder = builder.kernel_dir(folder);
        }
        builder
    }
}
