//! Opening NVIDIA's libraries at run time, so that one program runs on machines with and without them.

use std::path::PathBuf;

use libloading::Library;

use crate::{Error, Result};

/// What a library is called and what to say when it is missing.
pub(crate) struct Wanted {
    /// For people.
    pub(crate) library: &'static str,
    /// File names or paths, in the order in which they are tried.
    pub(crate) candidates: Vec<PathBuf>,
    /// Functions that it must have.
    pub(crate) symbols: &'static [&'static str],
    /// What to do when it is missing or too old.
    pub(crate) advice: &'static str,
}

/// Opens the first candidate that exists; also returns under which name.
///
/// # Errors
/// [`Error::LibraryMissing`], or [`Error::LibraryTooOld`] when it lacks a function.
pub(crate) fn open(wanted: &Wanted) -> Result<(Library, String)> {
    let opened = wanted.candidates.iter().find_map(|candidate| {
        // SAFETY: the candidates are NVIDIA's libraries, whose initialisers have no requirements.
        let library = unsafe { Library::new(candidate) }.ok()?;
        Some((library, candidate.display().to_string()))
    });
    let Some((library, path)) = opened else {
        let tried = wanted.candidates.iter().map(|path| path.display().to_string()).collect();
        return Err(Error::LibraryMissing { library: wanted.library, tried, advice: wanted.advice });
    };
    for &symbol in wanted.symbols {
        // SAFETY: the address is looked up and not used.
        if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
            return Err(Error::LibraryTooOld {
                library: wanted.library,
                path,
                symbol,
                advice: wanted.advice,
            });
        }
    }
    Ok((library, path))
}

/// Where a loaded library lies, found by the start of its file name; `None` where the system does not say.
pub(crate) fn loaded_path(name_starts_with: &str) -> Option<PathBuf> {
    find_mapped(&std::fs::read_to_string("/proc/self/maps").ok()?, name_starts_with)
}

fn find_mapped(maps: &str, name_starts_with: &str) -> Option<PathBuf> {
    maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..]))).find(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(name_starts_with))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(candidates: &[&str], symbols: &'static [&'static str]) -> Wanted {
        let candidates = candidates.iter().map(PathBuf::from).collect();
        Wanted { library: "a library", candidates, symbols, advice: "install it" }
    }

    #[test]
    fn a_missing_library_is_one_sentence_with_all_names() {
        let error = open(&wanted(&["libabsent.so.13", "absent/libabsent.so"], &[])).err().unwrap();
        assert_eq!(
            error.to_string(),
            "a library is not on this machine: tried libabsent.so.13, absent/libabsent.so; install it"
        );
    }

    #[test]
    fn the_first_that_opens_is_taken_and_its_functions_are_checked() {
        let (_, path) = open(&wanted(&["libabsent.so", "libc.so.6"], &["malloc"])).unwrap();
        assert_eq!(path, "libc.so.6");
        let error = open(&wanted(&["libc.so.6"], &["malloc", "cuInit"])).err().unwrap();
        assert_eq!(
            error.to_string(),
            "a library (libc.so.6) is too old: it has no function `cuInit`; install it"
        );
    }

    #[test]
    fn loaded_libraries_are_found() {
        let maps = "7f00-7f01 r-xp 0 00:00 1  /opt/a b/libnvrtc.so.13.0.88\n7f02-7f03 rw-p 0 00:00 0\n";
        assert_eq!(find_mapped(maps, "libnvrtc.so"), Some(PathBuf::from("/opt/a b/libnvrtc.so.13.0.88")));
        assert_eq!(find_mapped(maps, "libcuda.so"), None);
        assert!(loaded_path("libc.so").is_some_and(|path| path.is_absolute()));
    }
}
