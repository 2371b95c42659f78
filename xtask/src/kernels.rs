//! `cargo xtask kernels` and `cargo xtask gpu-test`: the CUDA kernels under NVIDIA's compiler, and on a GPU.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::process;

/// The tests of both tasks find the compiler's library here.
const NVRTC_VARIABLE: &str = "SPARK_NVRTC";
/// The disassembler, for the test of what was compiled.
const NVDISASM_VARIABLE: &str = "SPARK_NVDISASM";
/// The tests on a GPU find compiled kernels here.
const KERNEL_DIR_VARIABLE: &str = "SPARK_KERNEL_DIR";

/// Tests that need a GPU: package and name. The kernels alone, then the whole engine.
const PROGRAMS: [(&str, &str); 2] = [("spark-cuda", "gpu"), ("spark-engine", "gpu_engine")];
/// Arguments of their runs; measurements go alone, because other tests would share the GPU.
const RUNS: [&[&str]; 2] = [&["--skip", "measurements", "--nocapture"], &["measurements", "--nocapture"]];

/// Compiles all kernels for all architectures and tests the cache, without a GPU; runs on the CPU what no GPU at hand can.
///
/// # Errors
/// Names what failed.
pub(crate) fn check(root: &Path) -> anyhow::Result<()> {
    let nvrtc = nvrtc(root)?;
    let nvdisasm = in_environment(root, "nvdisasm")?;
    // The whole workspace, as in `ci`: a single package could select other features of a dependency.
    let mut command = cargo(root);
    command.args(["nextest", "run", "--locked", "--workspace", "--ignore-default-filter"]);
    command.args([
        "-E",
        "binary_id(spark-cuda::compile) | binary_id(spark-cuda) & test(emulated)",
        "--success-output",
        "final",
    ]);
    process::run(command.env(NVRTC_VARIABLE, nvrtc).env(NVDISASM_VARIABLE, nvdisasm))
}

/// Builds the tests that need a GPU and their kernels for `arch` into one folder, and runs them if this machine has one.
///
/// # Errors
/// Names what failed.
pub(crate) fn gpu_test(root: &Path, arch: &str) -> anyhow::Result<()> {
    let folder = process::target(root).join("gpu-test");
    let kernels = folder.join("kernels");
    // Kernels of other versions would be carried along.
    if folder.exists() {
        std::fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    std::fs::create_dir_all(&kernels).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut build = cargo(root);
    build
        .args(["run", "--locked", "--quiet", "--", "kernels", "build", "--arch", arch, "--out"])
        .arg(&kernels);
    process::run(build.env(NVRTC_VARIABLE, nvrtc(root)?))?;

    let mut programs = Vec::new();
    for (package, test) in PROGRAMS {
        let (program, built) = (folder.join(test), test_program(root, package, test)?);
        std::fs::copy(&built, &program).with_context(|| format!("cannot copy {}", built.display()))?;
        programs.push(program);
    }
    if !Path::new("/dev/nvidiactl").exists() {
        let shown = |path: &Path| path.strip_prefix(root).unwrap_or(path).display().to_string();
        println!(
            "\nno GPU here; where there is one, run in the root of the repository the tests, then the measurements alone:"
        );
        for arguments in RUNS {
            for program in &programs {
                let line = format!("{KERNEL_DIR_VARIABLE}={} {}", shown(&kernels), shown(program));
                println!("  {line} {}", arguments.join(" "));
            }
        }
        return Ok(());
    }
    for arguments in RUNS {
        for program in &programs {
            process::run(
                Command::new(program).args(arguments).current_dir(root).env(KERNEL_DIR_VARIABLE, &kernels),
            )?;
        }
    }
    Ok(())
}

fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

/// Builds `test` of `package` and returns its program.
fn test_program(root: &Path, package: &str, test: &str) -> anyhow::Result<PathBuf> {
    let mut command = cargo(root);
    command.args(["test", "--locked", "-p", package, "--test", test, "--no-run", "--message-format=json"]);
    let output = command.output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("building the test `{test}` failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let program =
        executable(&String::from_utf8_lossy(&output.stdout)).context("cargo named no test program")?;
    Ok(program)
}

/// The value of the last `"executable":"…"` of a test in cargo's messages; other programs are built beside it.
fn executable(messages: &str) -> Option<PathBuf> {
    let of_tests = messages.lines().filter(|line| line.contains("\"kind\":[\"test\"]"));
    let (_, rest) = of_tests.filter_map(|line| line.rsplit_once("\"executable\":\"")).next_back()?;
    rest.split_once('"').map(|(path, _)| PathBuf::from(path))
}

/// The compiler's library: the one that the environment names, or the pinned Python package in a folder of its own.
fn nvrtc(root: &Path) -> anyhow::Result<PathBuf> {
    if let Some(named) = std::env::var_os(NVRTC_VARIABLE) {
        return Ok(named.into());
    }
    in_environment(root, "libnvrtc.so.13")
}

/// A file of the pinned Python packages, which are in a folder of their own.
fn in_environment(root: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let python = process::python(root, "nvrtc", &root.join("crates/cuda/tests/nvrtc.txt"))?;
    let environment = python.parent().and_then(Path::parent).context("a Python lies in bin/")?;
    find(&environment.join("lib"), name, 6)
        .with_context(|| format!("no {name} under {}", environment.display()))
}

/// The first file of this name, at most `depth` folders down.
fn find(folder: &Path, name: &str, depth: usize) -> Option<PathBuf> {
    let file = folder.join(name);
    if file.is_file() || depth == 0 {
        return file.is_file().then_some(file);
    }
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    folders.sort();
    folders.iter().filter(|path| path.is_dir()).find_map(|path| find(path, name, depth - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_program_of_cargos_messages_is_taken() {
        let messages = "{\"executable\":null}\n\
            {\"target\":{\"kind\":[\"test\"]},\"executable\":\"a/b\",\"fresh\":true}\n\
            {\"target\":{\"kind\":[\"bin\"]},\"executable\":\"a/c\"}\n{\"success\":true}\n";
        assert_eq!(executable(messages), Some(PathBuf::from("a/b")));
        assert_eq!(executable("{\"kind\":[\"test\"],\"executable\":null}"), None);
    }
}
