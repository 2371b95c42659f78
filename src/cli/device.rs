//! Flags about what computes, and in what.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use spark_engine::{Device, Dtype, EngineBuilder};

#[derive(Args)]
#[command(next_help_heading = "Device")]
pub(crate) struct DeviceArgs {
    /// Compute on: `auto` takes a GPU if there is one, else the CPU.
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceArg,
    /// Compute in: `auto` takes the checkpoint's dtype, with half precision computed in bfloat16. float32 needs the CPU.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: DtypeArg,
    /// CPU threads; by default one per core.
    #[arg(long, value_name = "N")]
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
        if let Some(threads) = self.threads {
            builder = builder.threads(threads);
        }
        if let Some(folder) = self.kernel_dir {
            builder = builder.kernel_dir(folder);
        }
        builder
    }
}
