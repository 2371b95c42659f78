//! `spark-engine kernels`: compiles the CUDA kernels ahead of time. Runs no model; `bench kernels` measures them.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use spark_cuda::{Arch, Cubins, Device, Driver, Nvrtc};

/// Compile the CUDA kernels.
#[derive(Args)]
pub(crate) struct KernelsArgs {
    #[command(subcommand)]
    command: KernelsCommand,
}

#[derive(Subcommand)]
enum KernelsCommand {
    /// Compile all kernels into a folder, for machines without the CUDA compiler. Needs no GPU.
    Build(BuildArgs),
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

pub(crate) fn run(args: KernelsArgs) -> anyhow::Result<()> {
    match args.command {
        KernelsCommand::Build(args) => build(args),
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
        for path in Cubins::build(&nvrtc, arch, &args.out, None)? {
            writeln!(stdout, "{}", path.display())?;
        }
    }
    Ok(())
}

/// GPU `ordinal` of this machine.
pub(crate) fn device(ordinal: usize) -> anyhow::Result<Device> {
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
        let KernelsCommand::Build(build) = line.args.command;
        assert_eq!(build.arch, [Arch::Sm90, Arch::Sm121a]);
        let error = Line::try_parse_from("x build --arch sm_121 --out f".split(' ')).err().unwrap();
        assert!(error.to_string().contains("sm_120a and sm_121a"), "{error}");
    }
}
