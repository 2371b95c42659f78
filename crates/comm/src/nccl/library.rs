//! Opening libnccl.so.2 and binding the eleven functions that are used. Bound here and not by a crate, because the library
//! is looked for where Python packages put it, too, and its absence is an error and no panic.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::Library;

use super::{Error, Result};

/// Names a file: the libnccl.so.2 to use.
pub const NCCL_VARIABLE: &str = "SPARK_NCCL";

const FILE: &str = "libnccl.so.2";
/// Where a Python environment keeps it, below `site-packages`.
const IN_PACKAGES: &str = "nvidia/nccl/lib";

pub(super) type Status = c_int;
pub(super) type Handle = *mut c_void;
type RawStream = *mut c_void;

/// `ncclUniqueId`, which C passes by value.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RawId(pub(super) [u8; UniqueId::LEN]);

/// What ranks of one group know in common: made by rank 0, sent to the others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; UniqueId::LEN]);

impl UniqueId {
    /// Its bytes.
    pub const LEN: usize = 128;

    /// To be sent to the other ranks.
    pub fn bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl From<[u8; Self::LEN]> for UniqueId {
    fn from(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }
}

/// Who knows it can join: it is not shown.
impl std::fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UniqueId")
    }
}

/// The functions, with the types of nccl.h; unchanged since NCCL 2.4 (`get_last_error` since 2.13).
#[derive(Debug)]
pub(super) struct Functions {
    pub(super) error_string: unsafe extern "C" fn(Status) -> *const c_char,
    pub(super) last_error: unsafe extern "C" fn(Handle) -> *const c_char,
    pub(super) unique_id: unsafe extern "C" fn(*mut RawId) -> Status,
    pub(super) init: unsafe extern "C" fn(*mut Handle, c_int, RawId, c_int) -> Status,
    pub(super) destroy: unsafe extern "C" fn(Handle) -> Status,
    pub(super) abort: unsafe extern "C" fn(Handle) -> Status,
    pub(super) async_error: unsafe extern "C" fn(Handle, *mut Status) -> Status,
    pub(super) all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, RawStream) -> Status,
    pub(super) all_gather:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, RawStream) -> Status,
    pub(super) broadcast:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, RawStream) -> Status,
}

impl Functions {
    fn load(library: &Library, path: &Path) -> Result<Self> {
        // SAFETY: the types are those of nccl.h; the library is never closed (`Nccl::open`).
        unsafe {
            Ok(Self {
                error_string: function(library, path, "ncclGetErrorString")?,
                last_error: function(library, path, "ncclGetLastError")?,
                unique_id: function(library, path, "ncclGetUniqueId")?,
                init: function(library, path, "ncclCommInitRank")?,
                destroy: function(library, path, "ncclCommDestroy")?,
                abort: function(library, path, "ncclCommAbort")?,
                async_error: function(library, path, "ncclCommGetAsyncError")?,
                all_reduce: function(library, path, "ncclAllReduce")?,
                all_gather: function(library, path, "ncclAllGather")?,
                broadcast: function(library, path, "ncclBroadcast")?,
            })
        }
    }
}

/// # Safety
/// `F` must be the type of the function, and must not be called after the library is closed.
unsafe fn function<F: Copy>(library: &Library, path: &Path, symbol: &'static str) -> Result<F> {
    // SAFETY: the caller's promise.
    let found = unsafe { library.get::<F>(symbol.as_bytes()) };
    found.map(|found| *found).map_err(|_| Error::NoFunction { path: path.to_owned(), symbol })
}

/// The opened library. Clones are the same.
#[derive(Debug, Clone)]
pub struct Nccl {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    functions: Functions,
    version: NcclVersion,
    path: PathBuf,
}

impl Nccl {
    /// Opens the file that `SPARK_NCCL` names, or else the first libnccl.so.2 that is found: by the system's name, in the active
    /// Python environment, in those of the system. Call [`super::prepare_environment`] before.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::NoFunction`]; [`Error::TooOld`] unless `allow_old`.
    pub fn open(allow_old: bool) -> Result<Self> {
        let named = std::env::var_os(NCCL_VARIABLE).map(|file| vec![file.into()]);
        let nccl = Self::open_first(named.unwrap_or_else(candidates))?;
        let Inner { version, path, .. } = &*nccl.inner;
        match too_old(*version, std::env::consts::ARCH) {
            Some((least, reason)) if !allow_old => {
                let (path, version) = (path.clone(), *version);
                return Err(Error::TooOld { path, version, least, arch: std::env::consts::ARCH, reason });
            }
            Some((least, reason)) => {
                tracing::warn!(
                    "NCCL {version} is older than {least} and allowed by --allow-old-nccl: {reason}"
                );
            }
            None => {}
        }
        tracing::info!("NCCL {version} ({}); {}", path.display(), super::environment::in_force());
        Ok(nccl)
    }

    fn open_first(candidates: Vec<PathBuf>) -> Result<Self> {
        let opened = candidates.iter().find_map(|path| {
            // SAFETY: the candidates are NCCL, whose initialisers have no requirements.
            let library = unsafe { Library::new(path) }.ok()?;
            Some((library, path.clone()))
        });
        let Some((library, path)) = opened else { return Err(Error::Missing { tried: candidates }) };
        let functions = Functions::load(&library, &path)?;
        let version = version(&library, &path)?;
        // NCCL has threads of its own: it stays loaded for the life of the process.
        std::mem::forget(library);
        Ok(Self { inner: Arc::new(Inner { functions, version, path }) })
    }

    /// Its version.
    pub fn version(&self) -> NcclVersion {
        self.inner.version
    }

    /// The file that was opened, or the name by which the system found it.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// What a new group is known by. This process then waits for the others in the background, so rank 0 asks for it.
    ///
    /// # Errors
    /// [`Error::Call`], for example without a network interface.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = RawId([0; UniqueId::LEN]);
        // SAFETY: the pointer is valid for the bytes of the id.
        let status = unsafe { (self.functions().unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", status)?;
        Ok(UniqueId(id.0))
    }

    /// A library of these functions.
    #[cfg(test)]
    pub(super) fn of(functions: Functions) -> Self {
        let version = NcclVersion::new(2, 30, 4);
        Self { inner: Arc::new(Inner { functions, version, path: "test".into() }) }
    }

    pub(super) fn functions(&self) -> &Functions {
        &self.inner.functions
    }

    /// An error of `call` unless it succeeded.
    pub(super) fn check(&self, call: &'static str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let functions = self.functions();
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: not null, and NCCL's strings end and live forever, or until the next error, which is not yet.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned(),
        };
        // SAFETY: takes any number.
        let words = text(unsafe { (functions.error_string)(status) });
        // SAFETY: without a communicator it is the last error of the process.
        let detail = text(unsafe { (functions.last_error)(std::ptr::null_mut()) });
        let message = if detail.is_empty() { words } else { format!("{words}: {detail}") };
        Err(Error::Call { call, code: status, message })
    }
}

fn version(library: &Library, path: &Path) -> Result<NcclVersion> {
    // SAFETY: the type is that of nccl.h; called while the library is open.
    let get =
        unsafe { function::<unsafe extern "C" fn(*mut c_int) -> Status>(library, path, "ncclGetVersion") }?;
    let mut code = 0;
    // SAFETY: the pointer is valid. It cannot fail but for a null pointer.
    unsafe { get(&raw mut code) };
    Ok(NcclVersion::from_code(code.unsigned_abs()))
}

/// A version of NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NcclVersion {
    major: u32,
    minor: u32,
    patch: u32,
}

impl NcclVersion {
    const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// From the number that the library gives: 22803 is 2.28.3, and before 2.9 it was 2804 for 2.8.4.
    fn from_code(code: u32) -> Self {
        let major = if code < 10_000 { 1000 } else { 10_000 };
        Self::new(code / major, code % major / 100, code % 100)
    }
}

impl std::fmt::Display for NcclVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// As [`Display`](std::fmt::Display) writes it; parts that are missing are 0.
impl std::str::FromStr for NcclVersion {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let mut parts = text.split('.').map(str::parse);
        let mut part = || parts.next().unwrap_or(Ok(0));
        Ok(Self::new(part()?, part()?, part()?))
    }
}

/// The first version that may be used on processors of `arch` and why, if `version` is older.
pub fn too_old(version: NcclVersion, arch: &str) -> Option<(NcclVersion, &'static str)> {
    let (least, reason) = match arch {
        "aarch64" => (
            NcclVersion::new(2, 29, 3),
            "before it, ranks on ARM stop for ever after a while, because operations of its proxy get lost",
        ),
        _ => (NcclVersion::new(2, 27, 0), "older ones were never tried"),
    };
    (version < least).then_some((least, reason))
}

/// Where it may be: what the system knows by name before folders.
fn candidates() -> Vec<PathBuf> {
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from);
    let user = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local"));
    let roots = environments.chain(user).chain(["/usr/local", "/usr"].map(PathBuf::from));
    let cuda = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from);
    let cuda = cuda.chain([PathBuf::from("/usr/local/cuda")]).map(|cuda| cuda.join("lib64").join(FILE));
    std::iter::once(PathBuf::from(FILE))
        .chain(cuda)
        .chain(roots.flat_map(|root| in_packages(&root)))
        .collect()
}

/// `lib/python3.*/{site,dist}-packages/nvidia/nccl/lib/libnccl.so.2` below `root` that exist.
fn in_packages(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root.join("lib")) else { return Vec::new() };
    let mut pythons: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    pythons.sort();
    let files = pythons.iter().flat_map(|python| {
        ["site-packages", "dist-packages"].map(|packages| python.join(packages).join(IN_PACKAGES).join(FILE))
    });
    files.filter(|file| file.exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_one_sentence_with_all_names() {
        let tried = vec![PathBuf::from("libabsent.so.2"), PathBuf::from("absent/libnccl.so.2")];
        let error = Nccl::open_first(tried).unwrap_err().to_string();
        assert!(
            error.starts_with(
                "NCCL is not on this machine: tried libabsent.so.2, absent/libnccl.so.2; install"
            )
        );
        assert!(error.contains("SPARK_NCCL") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_library_that_is_no_nccl_is_refused() {
        let error = Nccl::open_first(vec![PathBuf::from("libc.so.6")]).unwrap_err().to_string();
        assert!(error.contains("libc.so.6 is no NCCL") && error.contains("`ncclGetErrorString`"), "{error}");
    }

    #[test]
    fn versions_are_read_and_old_ones_refused_by_architecture() {
        let version = NcclVersion::from_code;
        assert_eq!(version(22_803).to_string(), "2.28.3");
        assert_eq!(version(23_203).to_string(), "2.32.3");
        assert_eq!(version(2804).to_string(), "2.8.4");
        assert_eq!("2.28.3".parse(), Ok(version(22_803)));
        assert_eq!("2.8".parse(), Ok(NcclVersion::new(2, 8, 0)));
        assert!("new".parse::<NcclVersion>().is_err());
        for (code, arch, is_refused) in [
            (22_902, "aarch64", true),
            (22_903, "aarch64", false),
            (23_004, "aarch64", false),
            (22_605, "x86_64", true),
            (22_700, "x86_64", false),
            (22_809, "x86_64", false),
        ] {
            assert_eq!(too_old(version(code), arch).is_some(), is_refused, "{code} {arch}");
        }
        let error = Error::TooOld {
            path: "libnccl.so.2".into(),
            version: version(22_809),
            least: NcclVersion::new(2, 29, 3),
            arch: "aarch64",
            reason: "it hangs",
        };
        let error = error.to_string();
        assert!(
            error.contains("2.28.9") && error.contains("2.29.3") && error.contains("--allow-old-nccl"),
            "{error}"
        );
    }

    /// On any machine: a version that may be used, with an id or a reason, or an error that says what is missing.
    #[test]
    fn opening_the_library_never_panics() {
        match Nccl::open(false) {
            Ok(nccl) => {
                assert!(too_old(nccl.version(), std::env::consts::ARCH).is_none());
                match nccl.unique_id() {
                    Ok(id) => assert_ne!(id, UniqueId::from([0; UniqueId::LEN])),
                    Err(error) => assert!(error.to_string().starts_with("ncclGetUniqueId: "), "{error}"),
                }
            }
            Err(error) => assert!(
                matches!(error, Error::Missing { .. } | Error::NoFunction { .. } | Error::TooOld { .. }),
                "{error}"
            ),
        }
    }

    #[test]
    fn python_packages_are_searched() {
        let folder = tempfile::tempdir().unwrap();
        let packages = folder.path().join("lib/python3.12/site-packages").join(IN_PACKAGES);
        assert!(in_packages(folder.path()).is_empty());
        std::fs::create_dir_all(&packages).unwrap();
        assert!(in_packages(folder.path()).is_empty());
        std::fs::write(packages.join(FILE), []).unwrap();
        assert_eq!(in_packages(folder.path()), [packages.join(FILE)]);
    }

    #[test]
    fn the_bytes_of_an_id_are_not_shown() {
        assert_eq!(format!("{:?}", UniqueId::from([7; UniqueId::LEN])), "UniqueId");
    }
}
