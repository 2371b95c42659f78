//! The kernels under the real compiler, without a GPU: `cargo xtask kernels` brings NVRTC and names it in `SPARK_NVRTC`. Not
//! part of a plain test run (`.config/nextest.toml`), because most machines have no NVRTC.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]
#![expect(clippy::print_stdout, reason = "the last line says what was compiled")]

use std::path::Path;

use spark_cuda::{Arch, CubinCache, Cubins, KernelOptions, MODULES, Nvrtc};

/// Most shared memory of a block on GB10, in bytes.
const SHARED_LIMIT: u32 = 101_376;

fn nvrtc() -> Nvrtc {
    Nvrtc::open(None).unwrap()
}

/// What ptxas says of one kernel.
#[derive(Debug, PartialEq, Eq)]
struct Usage {
    kernel: String,
    registers: u32,
    shared_bytes: u32,
    spilled_bytes: u32,
}

/// Reads ptxas's report: per kernel a line with its name, one with spills and one with registers.
fn usages(log: &str) -> Vec<Usage> {
    let number_before = |line: &str, word: &str| {
        let rest = line.split(word).next().unwrap_or_default().trim_end();
        line.contains(word).then(|| rest.rsplit([' ', ',']).next()?.parse::<u32>().ok()).flatten()
    };
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some(name) = line.split("Compiling entry function '").nth(1) {
            let kernel = name.split('\'').next().unwrap_or_default().to_owned();
            found.push(Usage { kernel, registers: 0, shared_bytes: 0, spilled_bytes: 0 });
        }
        let Some(usage) = found.last_mut() else { continue };
        for word in [" bytes spill stores", " bytes spill loads"] {
            usage.spilled_bytes += number_before(line, word).unwrap_or(0);
        }
        usage.registers = number_before(line, " registers").unwrap_or(usage.registers);
        usage.shared_bytes = number_before(line, " bytes smem").unwrap_or(usage.shared_bytes);
    }
    found
}

#[test]
fn all_kernels_compile_for_all_architectures_without_spills() {
    let nvrtc = nvrtc();
    let mut num_kernels = 0;
    for arch in Arch::ALL {
        num_kernels = 0;
        for module in MODULES {
            let mut options = module.options();
            options.push("--ptxas-options=-v".to_owned());
            let compiled = nvrtc.compile(module.name, &module.text().unwrap(), arch, &options).unwrap();
            assert!(compiled.cubin.starts_with(b"\x7fELF"), "{} for {arch}", module.name);
            assert!(!compiled.log.contains("warning"), "{}", compiled.log);
            let usages = usages(&compiled.log);
            assert!(!usages.is_empty(), "no kernel in the report:\n{}", compiled.log);
            for usage in usages {
                println!("{arch:8} {usage:?}");
                assert!(usage.registers > 0, "{usage:?}");
                assert_eq!(usage.spilled_bytes, 0, "{arch}: {usage:?}");
                assert!(usage.shared_bytes <= SHARED_LIMIT, "{arch}: {usage:?}");
                num_kernels += 1;
            }
        }
    }
    println!(
        "{num_kernels} kernels compiled for {} architectures by NVRTC {}",
        Arch::ALL.len(),
        nvrtc.version()
    );
    assert!(num_kernels >= MODULES.len());
}

#[test]
fn the_report_is_read() {
    let log = "ptxas info    : Compiling entry function 'a' for 'sm_90'\n\
        ptxas info    : Function properties for a\n    64 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n\
        ptxas info    : Used 128 registers, used 1 barriers, 64 bytes cumulative stack size, 33792 bytes smem";
    let want = Usage { kernel: "a".into(), registers: 128, shared_bytes: 33_792, spilled_bytes: 20 };
    assert_eq!(usages(log), [want]);
}

#[test]
fn a_wrong_line_is_named_with_its_file() {
    let text = "#line 1 \"a.cu\"\n#line 1 \"b.cuh\"\nint b;\n#line 2 \"a.cu\"\nint a = nothing;\n";
    let error = nvrtc().compile("a", text, Arch::Sm90, &[]).unwrap_err().to_string();
    assert!(error.starts_with("a.cu does not compile for sm_90 with NVRTC"), "{error}");
    assert!(error.contains("a.cu(2)") && error.contains("nothing"), "{error}");
}

#[test]
fn parameters_of_another_size_do_not_compile() {
    for module in MODULES {
        let options: Vec<String> =
            module.options().iter().map(|option| option.replace("Params=", "Params=1")).collect();
        let error =
            nvrtc().compile(module.name, &module.text().unwrap(), Arch::Sm121a, &options).unwrap_err();
        assert!(error.to_string().contains("has another size on the host"), "{error}");
    }
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn a_second_start_compiles_nothing_and_a_damaged_file_is_compiled_again() {
    let folder = tempfile::tempdir().unwrap();
    let options = KernelOptions { cache_dir: Some(folder.path().to_owned()), ..Default::default() };
    let first = Cubins::get(Arch::Sm90, &options).unwrap();
    assert_eq!(first.num_compiled, MODULES.len());
    let second = Cubins::get(Arch::Sm90, &options).unwrap();
    assert_eq!((second.num_compiled, &second.cubins), (0, &first.cubins));

    let damaged = &files(folder.path())[0];
    let mut bytes = std::fs::read(damaged).unwrap();
    bytes[100] ^= 0xff;
    std::fs::write(damaged, bytes).unwrap();
    let third = Cubins::get(Arch::Sm90, &options).unwrap();
    assert_eq!((third.num_compiled, &third.cubins), (1, &first.cubins));
    assert_eq!(Cubins::get(Arch::Sm90, &options).unwrap().num_compiled, 0);
    // Another architecture is no hit.
    assert_eq!(Cubins::get(Arch::Sm80, &options).unwrap().num_compiled, MODULES.len());
}

#[test]
fn a_cache_that_cannot_be_written_only_costs_time() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let options = KernelOptions { cache_dir: Some(file), ..Default::default() };
    assert_eq!(Cubins::get(Arch::Sm90, &options).unwrap().num_compiled, MODULES.len());
}

#[test]
fn a_built_folder_needs_no_compiler() {
    let folder = tempfile::tempdir().unwrap();
    let built = Cubins::build(&nvrtc(), Arch::Sm121a, folder.path()).unwrap();
    assert_eq!(built.len(), MODULES.len());
    let options = KernelOptions {
        kernel_dir: Some(folder.path().to_owned()),
        nvrtc: Some("absent/libnvrtc.so".into()),
        ..Default::default()
    };
    let read = Cubins::get(Arch::Sm121a, &options).unwrap();
    let cache = KernelOptions { cache_dir: Some(folder.path().join("cache")), ..Default::default() };
    assert_eq!(read.cubins, Cubins::get(Arch::Sm121a, &cache).unwrap().cubins);
    assert_eq!(CubinCache::new(folder.path()).folder(), folder.path());
}
