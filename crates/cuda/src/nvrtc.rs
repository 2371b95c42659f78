//! NVRTC, the run-time compiler, opened where it is. Its nine functions are bound here and not by a crate, because the
//! choice of the file matters: the library opens its builtins by bare name, so they must be opened before, from beside it.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::library::{self, Wanted};
use crate::{Arch, Error, Result, Version};

/// Names a file: the libnvrtc to use.
pub const NVRTC_VARIABLE: &str = "SPARK_NVRTC";

const SYMBOLS: &[&str] = &[
    "nvrtcVersion",
    "nvrtcGetErrorString",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcCompileProgram",
    "nvrtcGetCUBINSize",
    "nvrtcGetCUBIN",
    "nvrtcGetProgramLogSize",
    "nvrtcGetProgramLog",
];

type Program = *mut std::ffi::c_void;
type Status = c_int;

/// The opened compiler. May be used by several threads at once.
#[derive(Debug)]
pub struct Nvrtc {
    functions: Functions,
    version: Version,
    path: PathBuf,
    /// Held open: NVRTC finds it loaded when it asks for it by name.
    _builtins: Option<Library>,
    /// Last, so that it outlives the functions.
    _library: Library,
}

#[derive(Debug)]
struct Functions {
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
}

/// What the compiler made of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// Machine code for one architecture.
    pub cubin: Vec<u8>,
    /// What the compiler had to say, with warnings.
    pub log: String,
}

impl Nvrtc {
    /// Opens `file`, or without one the file that `SPARK_NVRTC` names, or else the first libnvrtc that is found: by name, in
    /// the usual CUDA folders, in the active Python environment.
    ///
    /// # Errors
    /// [`Error::LibraryMissing`] or [`Error::LibraryTooOld`].
    pub fn open(file: Option<&Path>) -> Result<Self> {
        let named = file.map(Path::to_owned).or_else(|| std::env::var_os(NVRTC_VARIABLE).map(Into::into));
        let candidates = named.map_or_else(candidates, |file| vec![file]);
        let (library, name) = library::open(&Wanted {
            library: "NVRTC (the CUDA run-time compiler)",
            candidates,
            symbols: SYMBOLS,
            advice: "install the CUDA toolkit 12.9 or newer or the Python package nvidia-cuda-nvrtc and let SPARK_NVRTC name its \
                     libnvrtc.so, or use --kernel-dir with compiled kernels",
        })?;
        let path = if name.contains('/') {
            PathBuf::from(name)
        } else {
            library::loaded_path("libnvrtc.so").unwrap_or(name.into())
        };
        let version = version(&library)?;
        let builtins = path.parent().and_then(|folder| {
            let file = folder.join(format!("libnvrtc-builtins.so.{version}"));
            // SAFETY: a library of data without initialisers.
            unsafe { Library::new(file) }.ok()
        });
        let functions = Functions::load(&library)?;
        Ok(Self { functions, version, path, _builtins: builtins, _library: library })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Compiles `text` (named `module`.cu in messages) to a cubin.
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's words when the source is wrong, [`Error::Nvrtc`] for anything else.
    pub fn compile(&self, module: &str, text: &str, arch: Arch, options: &[String]) -> Result<Compiled> {
        let program = self.create(module, text)?;
        let arch_option = format!("--gpu-architecture={arch}");
        let options: Vec<CString> = std::iter::once(&arch_option)
            .chain(options)
            .map(|option| self.c_string("an option", option))
            .collect::<Result<_>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program lives; the options are strings that live until the call returns.
        let status =
            unsafe { (self.functions.compile)(program.handle, pointers.len() as c_int, pointers.as_ptr()) };
        let log = program.log()?;
        if status != 0 {
            // Anything but an error of the source (6) says its reason in the status, such as missing builtins.
            let log = if log.trim().is_empty() { self.message(status) } else { log };
            return Err(Error::Compile {
                module: module.into(),
                arch: arch.name(),
                version: self.version,
                log,
            });
        }
        Ok(Compiled { cubin: program.cubin()?, log })
    }

    fn create(&self, module: &str, text: &str) -> Result<OpenProgram<'_>> {
        let (text, name) =
            (self.c_string("a source", text)?, self.c_string("a name", &format!("{module}.cu"))?);
        let mut handle = std::ptr::null_mut();
        // SAFETY: the strings live until the call returns, which copies them; there are no headers.
        let status = unsafe {
            (self.functions.create)(
                &raw mut handle,
                text.as_ptr(),
                name.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        self.check("nvrtcCreateProgram", status)?;
        Ok(OpenProgram { nvrtc: self, handle })
    }

    fn c_string(&self, what: &str, text: &str) -> Result<CString> {
        CString::new(text).map_err(|_| Error::Nvrtc {
            version: self.version,
            call: "nvrtcCreateProgram",
            message: format!("{what} holds a zero byte"),
        })
    }

    fn message(&self, status: Status) -> String {
        // SAFETY: takes any number and answers with a string that lives forever.
        let text = unsafe { CStr::from_ptr((self.functions.error_string)(status)) };
        text.to_string_lossy().into_owned()
    }

    fn check(&self, call: &'static str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        Err(Error::Nvrtc { version: self.version, call, message: self.message(status) })
    }
}

impl Functions {
    fn load(library: &Library) -> Result<Self> {
        // SAFETY: the types are those of nvrtc.h, unchanged since CUDA 11.2; the pointers are kept beside the library.
        unsafe {
            Ok(Self {
                error_string: function(library, "nvrtcGetErrorString")?,
                create: function(library, "nvrtcCreateProgram")?,
                destroy: function(library, "nvrtcDestroyProgram")?,
                compile: function(library, "nvrtcCompileProgram")?,
                cubin_size: function(library, "nvrtcGetCUBINSize")?,
                cubin: function(library, "nvrtcGetCUBIN")?,
                log_size: function(library, "nvrtcGetProgramLogSize")?,
                log: function(library, "nvrtcGetProgramLog")?,
            })
        }
    }
}

/// # Safety
/// `F` must be the type of the function, and must not be called after the library is closed.
unsafe fn function<F: Copy>(library: &Library, name: &'static str) -> Result<F> {
    // SAFETY: the caller's promise.
    let symbol = unsafe { library.get::<F>(name.as_bytes()) };
    symbol.map(|symbol| *symbol).map_err(|error| Error::Nvrtc {
        version: Version { major: 0, minor: 0 },
        call: name,
        message: error.to_string(),
    })
}

fn version(library: &Library) -> Result<Version> {
    // SAFETY: the type is that of nvrtc.h; called before the library can be closed.
    let get = unsafe {
        function::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status>(library, "nvrtcVersion")
    }?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the pointers are valid.
    let status = unsafe { get(&raw mut major, &raw mut minor) };
    let version = Version { major: major.unsigned_abs(), minor: minor.unsigned_abs() };
    if status == 0 {
        return Ok(version);
    }
    Err(Error::Nvrtc { version, call: "nvrtcVersion", message: format!("status {status}") })
}

/// A program of the compiler, destroyed when dropped.
struct OpenProgram<'a> {
    nvrtc: &'a Nvrtc,
    handle: Program,
}

impl OpenProgram<'_> {
    fn log(&self) -> Result<String> {
        let bytes =
            self.bytes("nvrtcGetProgramLog", self.nvrtc.functions.log_size, self.nvrtc.functions.log)?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.trim_end_matches('\0').trim_end().to_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>> {
        self.bytes("nvrtcGetCUBIN", self.nvrtc.functions.cubin_size, self.nvrtc.functions.cubin)
    }

    fn bytes(
        &self,
        call: &'static str,
        size: unsafe extern "C" fn(Program, *mut usize) -> Status,
        get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ) -> Result<Vec<u8>> {
        let mut num_bytes = 0;
        // SAFETY: the program lives; the pointer is valid.
        self.nvrtc.check(call, unsafe { size(self.handle, &raw mut num_bytes) })?;
        let mut bytes = vec![0u8; num_bytes];
        // SAFETY: the program lives and writes the number of bytes that it just said.
        self.nvrtc.check(call, unsafe { get(self.handle, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for OpenProgram<'_> {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe { (self.nvrtc.functions.destroy)(&raw mut self.handle) };
    }
}

/// Newest first, and what the system knows by name before folders.
fn candidates() -> Vec<PathBuf> {
    let names = ["libnvrtc.so.13", "libnvrtc.so.12"];
    let mut folders: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from)
        .chain([PathBuf::from("/usr/local/cuda")])
        .map(|cuda| cuda.join("lib64"))
        .collect();
    if let Some(environment) = std::env::var_os("VIRTUAL_ENV") {
        folders.extend(wheel_folders(Path::new(&environment)));
    }
    let in_folders = folders.iter().flat_map(|folder| names.map(|name| folder.join(name)));
    names.iter().map(PathBuf::from).chain(in_folders).collect()
}

/// Where NVIDIA's Python packages put the library: `lib/python3.*/site-packages/nvidia/<package>/lib`.
fn wheel_folders(environment: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(environment.join("lib")) else { return Vec::new() };
    let mut pythons: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    pythons.sort();
    let nvidia = |python: &PathBuf| {
        ["cu13", "cuda_nvrtc"].map(|package| python.join("site-packages/nvidia").join(package).join("lib"))
    };
    pythons.iter().flat_map(nvidia).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_compiler_is_refused_by_name() {
        let error = Nvrtc::open(Some(Path::new("absent/libnvrtc.so.13"))).unwrap_err().to_string();
        assert!(error.contains("tried absent/libnvrtc.so.13;") && error.contains("--kernel-dir"), "{error}");
        let error = Nvrtc::open(Some(Path::new("libc.so.6"))).unwrap_err().to_string();
        assert!(error.contains("(libc.so.6) is too old: it has no function `nvrtcVersion`"), "{error}");
    }

    #[test]
    fn names_come_before_folders_and_new_before_old() {
        let names: Vec<String> = candidates().iter().map(|path| path.display().to_string()).collect();
        assert_eq!(names[..2], ["libnvrtc.so.13", "libnvrtc.so.12"]);
        assert!(names.contains(&"/usr/local/cuda/lib64/libnvrtc.so.13".to_owned()));
    }

    #[test]
    fn python_packages_are_searched() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("lib/python3.12")).unwrap();
        let found = wheel_folders(folder.path());
        assert!(found[0].ends_with("lib/python3.12/site-packages/nvidia/cu13/lib"));
        assert!(wheel_folders(&folder.path().join("absent")).is_empty());
    }
}
