//! From the embedded sources to machine code: a folder of compiled kernels, or the cache, or the compiler, in parallel.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::cache::{CubinCache, CubinKey, Entry};
use crate::{Arch, Error, ModuleSource, Nvrtc, Result, Version, modules_for};

/// Where compiled kernels come from.
#[derive(Debug, Clone, Default)]
pub struct KernelOptions {
    /// A folder made by `spark-engine kernels build`: nothing is compiled.
    pub kernel_dir: Option<PathBuf>,
    /// Where compiled kernels are kept; by default [`CubinCache::user_folder`].
    pub cache_dir: Option<PathBuf>,
    /// The compiler's library; by default what [`Nvrtc::open`] finds.
    pub nvrtc: Option<PathBuf>,
}

/// Machine code of every module for one architecture, in the order of [`modules_for`].
#[derive(Debug, Clone)]
pub struct Cubins {
    /// Its architecture.
    pub arch: Arch,
    /// One per module.
    pub cubins: Vec<Vec<u8>>,
    /// Version of the compiler that made them; `None` for those of a folder, which does not say it.
    pub nvrtc: Option<Version>,
    /// How many had to be compiled.
    pub num_compiled: usize,
    /// How long it took.
    pub elapsed: Duration,
}

impl Cubins {
    /// The kernels for `arch`, as `options` say.
    ///
    /// # Errors
    /// [`Error::KernelDir`] when the folder lacks one; otherwise what opening the compiler or compiling says.
    pub fn get(arch: Arch, options: &KernelOptions) -> Result<Self> {
        let start = Instant::now();
        let (cubins, num_compiled, nvrtc) = match &options.kernel_dir {
            Some(folder) => (from_folder(arch, folder)?, 0, None),
            None => {
                let folder = options.cache_dir.clone().or_else(CubinCache::user_folder);
                let cache = folder.map(CubinCache::new);
                let nvrtc = Nvrtc::open(options.nvrtc.as_deref())?;
                let (cubins, num_compiled) = compile_all(&nvrtc, arch, cache.as_ref())?;
                (cubins, num_compiled, Some(nvrtc.version()))
            }
        };
        Ok(Self { arch, cubins, nvrtc, num_compiled, elapsed: start.elapsed() })
    }

    /// Compiles every module for `arch` into `folder`, or takes it from `kept`, for [`KernelOptions::kernel_dir`] on other
    /// machines. Returns the files.
    ///
    /// # Errors
    /// What compiling says, or [`Error::Io`].
    pub fn build(
        nvrtc: &Nvrtc,
        arch: Arch,
        folder: &Path,
        kept: Option<&CubinCache>,
    ) -> Result<Vec<PathBuf>> {
        let (cubins, _) = compile_all(nvrtc, arch, kept)?;
        let cache = CubinCache::new(folder);
        let write = |(module, cubin): (&ModuleSource, Vec<u8>)| {
            cache.write(&CubinKey::new(module, &module.text()?, arch, None), &cubin)
        };
        modules_for(arch).into_iter().zip(cubins).map(write).collect()
    }

    /// The code of the module `name`.
    pub(crate) fn module(&self, name: &'static str) -> Option<&[u8]> {
        let index = modules_for(self.arch).iter().position(|module| module.name == name)?;
        self.cubins.get(index).map(Vec::as_slice)
    }
}

fn from_folder(arch: Arch, folder: &Path) -> Result<Vec<Vec<u8>>> {
    let cache = CubinCache::new(folder);
    let read = |module: &ModuleSource| {
        let key = CubinKey::new(module, &module.text()?, arch, None);
        let problem = match cache.read(&key)? {
            Entry::Cubin(cubin) => return Ok(cubin),
            Entry::Missing => "is missing",
            Entry::Corrupt => "is damaged",
        };
        Err(Error::KernelDir { folder: folder.to_owned(), file: key.file_name(), problem, arch: arch.name() })
    };
    modules_for(arch).into_iter().map(read).collect()
}

/// The code of every module and how many were compiled, on as many threads as the machine has.
fn compile_all(nvrtc: &Nvrtc, arch: Arch, cache: Option<&CubinCache>) -> Result<(Vec<Vec<u8>>, usize)> {
    let modules = modules_for(arch);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(modules.len());
    let (next, num_compiled) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        let mut done = Vec::new();
        while let Some(&module) = modules.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push((module.name, get(nvrtc, module, arch, cache, &num_compiled)));
        }
        done
    };
    let mut done: Vec<(&str, Result<Vec<u8>>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    // Modules are listed by name.
    done.sort_by_key(|(name, _)| *name);
    let cubins = done.into_iter().map(|(_, cubin)| cubin).collect::<Result<_>>()?;
    Ok((cubins, num_compiled.into_inner()))
}

/// The code of one module. A cache that cannot be read or written costs time and nothing else.
fn get(
    nvrtc: &Nvrtc,
    module: &ModuleSource,
    arch: Arch,
    cache: Option<&CubinCache>,
    num_compiled: &AtomicUsize,
) -> Result<Vec<u8>> {
    let text = module.text()?;
    let key = CubinKey::new(module, &text, arch, Some(nvrtc.version()));
    match cache.map(|cache| cache.read(&key)) {
        Some(Ok(Entry::Cubin(cubin))) => return Ok(cubin),
        Some(Ok(Entry::Corrupt)) => {
            tracing::warn!(file = key.file_name(), "a cached kernel is damaged: compiling it again");
        }
        Some(Err(error)) => tracing::warn!("compiling without the cache: {error}"),
        Some(Ok(Entry::Missing)) | None => {}
    }
    let compiled = nvrtc.compile(module.name, &text, arch, &module.options())?;
    num_compiled.fetch_add(1, Ordering::Relaxed);
    if let Some(Err(error)) = cache.map(|cache| cache.write(&key, &compiled.cubin)) {
        tracing::warn!("compiled kernels are not kept: {error}");
    }
    Ok(compiled.cubin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MODULES;

    #[test]
    fn modules_are_listed_by_name() {
        assert!(MODULES.is_sorted_by_key(|module| module.name));
    }

    /// Stands in for a compiler, to test the folder without one.
    fn fill(folder: &Path, arch: Arch) -> CubinCache {
        let cache = CubinCache::new(folder);
        for module in modules_for(arch) {
            let key = CubinKey::new(module, &module.text().unwrap(), arch, None);
            cache.write(&key, module.name.as_bytes()).unwrap();
        }
        cache
    }

    #[test]
    fn a_kernel_folder_is_taken_whole_or_refused_with_the_command_that_makes_it() {
        let folder = tempfile::tempdir().unwrap();
        let options = KernelOptions { kernel_dir: Some(folder.path().to_owned()), ..Default::default() };
        let cache = fill(folder.path(), Arch::Sm121a);
        let cubins = Cubins::get(Arch::Sm121a, &options).unwrap();
        assert_eq!(cubins.module("norm"), Some(&b"norm"[..]));
        assert_eq!((cubins.module("absent"), cubins.num_compiled), (None, 0));

        let error = Cubins::get(Arch::Sm90, &options).unwrap_err().to_string();
        assert!(error.contains("is missing") && error.contains("kernels build --arch sm_90"), "{error}");
        let key = CubinKey::new(&MODULES[0], &MODULES[0].text().unwrap(), Arch::Sm121a, None);
        std::fs::write(cache.folder().join(key.file_name()), b"short").unwrap();
        let error = Cubins::get(Arch::Sm121a, &options).unwrap_err().to_string();
        assert!(error.contains(&key.file_name()) && error.contains("is damaged"), "{error}");
    }
}
