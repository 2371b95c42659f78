//! `spark-engine kernels`: compiles the CUDA kernels ahead of time, and measures them. Runs no model.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use spark_cuda::{Arch, Cubins, Device, Driver, KernelOptions, Kernels, Nvrtc, bench};

/// Compile or measure the CUDA kernels.
#[derive(Args)]
pub(crate) struct KernelsArgs {
    #[command(subcommand)]
    command: KernelsCommand,
}

#[derive(Subcommand)]
enum KernelsCommand {
    /// Compile all kernels into a folder, for machines without the CUDA compiler. Needs no GPU.
    Build(BuildArgs),
    /// Measure all kernels on this machine's GPU: time, bytes moved a second, share of what a copy reaches.
    Bench(BenchArgs),
}

#[derive(Args)]
struct BuildArgs {
    /// sm_80 (Ampere, Ada), sm_90 (Hopper), sm_120a (RTX 50), sm_121a (DGX Spark); repeat for several. By default that of
    /// this machine's GPU.
    #[arg(long, value_name = "ARCH")]
    arch: Vec<Arch>,
    /// The folder; give it to other commands as --kernel-dir.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// The compiler's library (libnvrtc.so).
    #[arg(long, env = spark_cuda::NVRTC_VARIABLE, value_name = "FILE")]
    nvrtc: Option<PathBuf>,
}

#[derive(Args)]
struct BenchArgs {
    /// A folder made by `kernels build`, instead of compiling here.
    #[arg(long, value_name = "FOLDER")]
    kernel_dir: Option<PathBuf>,
    /// Number of the GPU.
    #[arg(long, default_value_t = 0, value_name = "N")]
    gpu: usize,
}

pub(crate) fn run(args: KernelsArgs) -> anyhow::Result<()> {
    match args.command {
        KernelsCommand::Build(args) => build(args),
        KernelsCommand::Bench(args) => measure(args),
    }
}

fn build(args: BuildArgs) -> anyhow::Result<()> {
    let archs = match args.arch.is_empty() {
        true => vec![device(0).context("without --arch, kernels are built for this machine's GPU")?.arch()],
        false => args.arch,
    };
    let nvrtc = Nvrtc::open(args.nvrtc.as_deref())?;
    tracing::info!(version = %nvrtc.version(), library = %nvrtc.path().display(), "compiling");
    let mut stdout = std::io::stdout().lock();
    for arch in archs {
        for path in Cubins::build(&nvrtc, arch, &args.out)? {
            writeln!(stdout, "{}", path.display())?;
        }
    }
    Ok(())
}

fn measure(args: BenchArgs) -> anyhow::Result<()> {
    let device = device(args.gpu)?;
    let options = KernelOptions { kernel_dir: args.kernel_dir, ..Default::default() };
    let cubins = Cubins::get(device.arch(), &options)?;
    tracing::info!(
        compiled = cubins.num_compiled,
        milliseconds = cubins.elapsed.as_millis(),
        "kernels are ready"
    );
    let report = bench::run(&device, &Kernels::load(&device, &cubins)?)?;
    let properties = device.properties();
    let mut stdout = std::io::stdout().lock();
    writeln!(
        stdout,
        "{}, {}, {} multiprocessors, driver CUDA {}",
        properties.name, properties.arch, properties.num_sms, properties.driver
    )?;
    write!(stdout, "{report}")?;
    Ok(())
}

fn device(ordinal: usize) -> anyhow::Result<Device> {
    Ok(Driver::open()?.device(ordinal)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: KernelsArgs,
    }

    #[test]
    fn architectures_are_repeated_and_wrong_ones_refused() {
        let line = Line::try_parse_from("x build --arch sm_90 --arch sm_121a --out f".split(' ')).unwrap();
        let KernelsCommand::Build(build) = line.args.command else { panic!("another command") };
        assert_eq!(build.arch, [Arch::Sm90, Arch::Sm121a]);
        let error = Line::try_parse_from("x build --arch sm_121 --out f".split(' ')).err().unwrap();
        assert!(error.to_string().contains("sm_120a and sm_121a"), "{error}");
    }
}
