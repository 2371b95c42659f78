//! The sandbox of the video decoder: a hidden command that limits the process that it is and then becomes ffmpeg. What a
//! broken file can do to a decoder then ends at this process: it reads the program's libraries and the file, writes to its
//! pipe, and that is all. The server that starts it is `crates/server/src/media/clip.rs`.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Args;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Name of the command.
const COMMAND: &str = "decode-video";
/// Memory of the child, code and libraries included: 8K frames of a codec with many references fit.
const MAX_MEMORY: u64 = 3 << 30;
/// Files that it may have open.
const MAX_FILES: u64 = 64;
/// What a shell ends with when there is no such program; the server knows it.
const NOT_FOUND: i32 = 127;
/// Where programs and libraries are, on one system or another.
const LIBRARIES: [&str; 8] = [
    "/usr",
    "/lib",
    "/lib64",
    "/opt",
    "/nix/store",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
];
/// What the kernel starts before a program, by architecture.
const LOADERS: [&str; 2] = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];

/// Becomes ffmpeg or ffprobe, in a sandbox.
#[derive(Args)]
pub(crate) struct DecodeVideoArgs {
    /// Processor seconds.
    #[arg(long)]
    cpu_seconds: u64,
    /// `ffmpeg` or `ffprobe`.
    program: String,
    /// Its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// The words before the program and its arguments.
pub(crate) fn sandbox(timeout: Duration) -> Vec<OsString> {
    // Not the path of this program: that file may have been replaced by a newer version meanwhile.
    let words = ["/proc/self/exe", COMMAND, "--cpu-seconds"].map(OsString::from);
    let cpu_seconds = timeout.as_secs().saturating_add(1).to_string();
    words.into_iter().chain([cpu_seconds.into()]).collect()
}

/// Does not return when it succeeds.
pub(crate) fn run(args: &DecodeVideoArgs) -> anyhow::Result<()> {
    ensure!(matches!(&*args.program, "ffmpeg" | "ffprobe"), "{COMMAND}: only ffmpeg and ffprobe are started");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|folder| folder.join(&args.program)).find(|file| file.is_file());
    let Some(program) = found else { std::process::exit(NOT_FOUND) };
    let program = program.canonicalize().with_context(|| program.display().to_string())?;
    for (resource, limit) in [
        (Resource::Cpu, args.cpu_seconds),
        (Resource::As, MAX_MEMORY),
        (Resource::Nofile, MAX_FILES),
        (Resource::Fsize, 0),
        (Resource::Core, 0),
    ] {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })
            .with_context(|| format!("{COMMAND}: {resource:?}"))?;
    }
    // Priority below everything that answers somebody.
    rustix::process::nice(10).context("nice")?;
    restrict(&program).context("landlock")?;
    Err(Command::new(program).args(&args.args).env_clear().exec().into())
}

/// No file but libraries, no program but this one, no writing, no network; as far as the kernel can (Landlock is in Linux since
/// 5.13, its part for networks since 6.7).
fn restrict(program: &Path) -> anyhow::Result<()> {
    let abi = ABI::V6;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?;
    let readable = LIBRARIES.iter().map(PathBuf::from).chain(program.parent().map(Path::to_owned));
    for path in readable {
        // What is not there need not be read.
        if let Ok(fd) = PathFd::new(&path) {
            let access = if path.is_dir() { read } else { AccessFs::ReadFile.into() };
            rules = rules.add_rule(PathBeneath::new(fd, access))?;
        }
    }
    for path in LOADERS.iter().map(Path::new).chain([program]) {
        if let Ok(fd) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(fd, AccessFs::ReadFile | AccessFs::Execute))?;
        }
    }
    rules.restrict_self()?;
    Ok(())
}
