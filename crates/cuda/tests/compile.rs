//! The kernels under the real compiler, without a GPU: `cargo xtask kernels` brings NVRTC and names it in `SPARK_NVRTC`. Not
//! part of a plain test run (`.config/nextest.toml`), because most machines have no NVRTC.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]
#![expect(clippy::print_stdout, reason = "the last line says what was compiled")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use spark_cuda::{
    Arch, CubinCache, CubinKey, Cubins, KernelOptions, MODULES, ModuleSource, Nvrtc, modules_for,
};

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

/// Every kernel of every architecture is compiled once: the folders are tested with the same machine code.
#[test]
fn all_kernels_compile_for_all_architectures_without_spills_and_are_kept() {
    let (nvrtc, folder) = (nvrtc(), tempfile::tempdir().unwrap());
    let cache = CubinCache::new(folder.path());
    let modules: Vec<_> = Arch::ALL
        .into_iter()
        .flat_map(|arch| modules_for(arch).into_iter().map(move |module| (arch, module)))
        .collect();
    let (next, threads) = (AtomicUsize::new(0), std::thread::available_parallelism().map_or(1, usize::from));
    let work = || {
        let mut found = Vec::new();
        while let Some(&(arch, module)) = modules.get(next.fetch_add(1, Ordering::Relaxed)) {
            found.extend(compile(&nvrtc, arch, module, &cache).into_iter().map(|usage| (arch, usage)));
        }
        found
    };
    let mut found: Vec<(Arch, Usage)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    found.sort_by_key(|(arch, usage)| (arch.name(), usage.kernel.clone()));
    for (arch, usage) in &found {
        println!("{arch:8} {usage:?}");
        assert!(usage.registers > 0, "{usage:?}");
        assert_eq!(usage.spilled_bytes, 0, "{arch}: {usage:?}");
        assert!(usage.shared_bytes <= SHARED_LIMIT, "{arch}: {usage:?}");
    }
    // Older ones lack some of the probe's.
    let num_kernels = found.iter().filter(|(arch, _)| *arch == Arch::Sm121a).count();
    assert!(num_kernels >= MODULES.len());

    products_of_nvfp4_are_one_instruction(&cache);
    what_is_kept_is_not_compiled_again(&nvrtc, &cache);
    what_cannot_be_kept_only_costs_time(&nvrtc, &cache);
    a_built_folder_needs_no_compiler(&nvrtc, &cache);
    println!(
        "{num_kernels} kernels compiled for {} architectures by NVRTC {}",
        Arch::ALL.len(),
        nvrtc.version()
    );
}

/// Compiles a module, puts it where the program would keep it, and returns what ptxas says.
fn compile(nvrtc: &Nvrtc, arch: Arch, module: &ModuleSource, cache: &CubinCache) -> Vec<Usage> {
    let (text, mut options) = (module.text().unwrap(), module.options());
    options.push("--ptxas-options=-v".to_owned());
    let compiled = nvrtc.compile(module.name, &text, arch, &options).unwrap();
    assert!(compiled.cubin.starts_with(b"\x7fELF"), "{} for {arch}", module.name);
    assert!(!compiled.log.contains("warning"), "{}", compiled.log);
    let usages = usages(&compiled.log);
    assert!(!usages.is_empty(), "no kernel in the report:\n{}", compiled.log);
    cache.write(&CubinKey::new(module, &text, arch, Some(nvrtc.version())), &compiled.cubin).unwrap();
    usages
}

/// What `cargo xtask kernels` names besides the compiler.
const NVDISASM_VARIABLE: &str = "SPARK_NVDISASM";

/// The machine code of a module, as text.
fn disassembled(cubin: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), cubin).unwrap();
    let program = std::env::var_os(NVDISASM_VARIABLE).unwrap_or_else(|| "nvdisasm".into());
    let output = Command::new(program).arg("-c").arg(file.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What no device here can run is at least what it is meant to be: block-scaled FP4 products in the machine code, as many as the source
/// has, half of them with scales from the other lanes; nothing in local memory.
fn products_of_nvfp4_are_one_instruction(cache: &CubinCache) {
    const PRODUCT: &str = "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X";
    // Two kernels; blocks that are full, half and a quarter full; two products of 4 row tiles by 8, 4, 2 token tiles.
    const COUNT: usize = 2 * (8 + 4 + 2) * 4 * 2;
    for arch in Arch::ALL.into_iter().filter(|arch| arch.has_fp4()) {
        let cubins = get(arch, cache);
        let index = modules_for(arch).iter().position(|module| module.name == "nvfp4_mma").unwrap();
        let text = disassembled(&cubins.cubins[index]);
        let products: Vec<&str> = text.lines().filter(|line| line.contains(PRODUCT)).collect();
        assert_eq!(products.len(), COUNT, "{arch}");
        // The last operand says which lanes: the zero register, or one with the second's.
        let first = products
            .iter()
            .filter(|line| line.trim_end().trim_end_matches(';').trim_end().ends_with("URZ"))
            .count();
        assert_eq!(first, COUNT / 2, "{arch}");
        assert!(!text.lines().any(|line| line.contains(" LDL") || line.contains(" STL")), "{arch}");
        println!("{arch}: {COUNT} x {PRODUCT}");
    }
}

/// Where the cache has a module that is compiled quickly.
fn small_file(nvrtc: &Nvrtc, arch: Arch, cache: &CubinCache) -> PathBuf {
    let module = MODULES.iter().find(|module| module.name == "embed").unwrap();
    let key = CubinKey::new(module, &module.text().unwrap(), arch, Some(nvrtc.version()));
    cache.folder().join(key.file_name())
}

fn get(arch: Arch, cache: &CubinCache) -> Cubins {
    let options = KernelOptions { cache_dir: Some(cache.folder().to_owned()), ..Default::default() };
    Cubins::get(arch, &options).unwrap()
}

fn what_is_kept_is_not_compiled_again(nvrtc: &Nvrtc, cache: &CubinCache) {
    for arch in Arch::ALL {
        assert_eq!(get(arch, cache).num_compiled, 0, "{arch}");
    }
    let damaged = small_file(nvrtc, Arch::Sm90, cache);
    let mut bytes = std::fs::read(&damaged).unwrap();
    bytes[100] ^= 0xff;
    std::fs::write(&damaged, bytes).unwrap();
    let [repaired, kept] = [(); 2].map(|()| get(Arch::Sm90, cache));
    assert_eq!((repaired.num_compiled, kept.num_compiled), (1, 0));
    assert!(repaired.cubins == kept.cubins, "what was kept is not what was compiled");
    // The file of another architecture is no hit.
    std::fs::remove_file(small_file(nvrtc, Arch::Sm80, cache)).unwrap();
    assert_eq!(get(Arch::Sm80, cache).num_compiled, 1);
    assert_eq!(get(Arch::Sm80, cache).num_compiled, 0);
}

/// A folder in the place of a file can neither be read nor written.
fn what_cannot_be_kept_only_costs_time(nvrtc: &Nvrtc, cache: &CubinCache) {
    let file = small_file(nvrtc, Arch::Sm120a, cache);
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    let [first, second] = [(); 2].map(|()| get(Arch::Sm120a, cache));
    assert_eq!((first.num_compiled, second.num_compiled), (1, 1));
    assert!(first.cubins == second.cubins, "compiled twice, with another result");
}

fn a_built_folder_needs_no_compiler(nvrtc: &Nvrtc, cache: &CubinCache) {
    let folder = tempfile::tempdir().unwrap();
    let built = Cubins::build(nvrtc, Arch::Sm121a, folder.path(), Some(cache)).unwrap();
    assert_eq!(built.len(), MODULES.len());
    let options = KernelOptions {
        kernel_dir: Some(folder.path().to_owned()),
        nvrtc: Some("absent/libnvrtc.so".into()),
        ..Default::default()
    };
    let read = Cubins::get(Arch::Sm121a, &options).unwrap();
    assert_eq!(read.num_compiled, 0);
    assert!(read.cubins == get(Arch::Sm121a, cache).cubins, "the folder holds other code");
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
    for module in modules_for(Arch::Sm121a) {
        let options: Vec<String> =
            module.options().iter().map(|option| option.replace("Params=", "Params=1")).collect();
        let error =
            nvrtc().compile(module.name, &module.text().unwrap(), Arch::Sm121a, &options).unwrap_err();
        assert!(error.to_string().contains("has another size on the host"), "{error}");
    }
}
