//! `cargo xtask binary`: what a built program asks of the machine it runs on. The program is one file that needs glibc
//! and nothing else; a C dependency that finds a system library, or a newer symbol, would break that unseen. Reads just
//! the two lists that the dynamic linker reads, from 64-bit little-endian ELF files.

use std::path::Path;

use anyhow::{Context as _, bail};

/// The glibc of DGX OS: symbols of a later one do not load there.
const NEWEST_GLIBC: (u32, u32) = (2, 39);
/// glibc itself and the unwinder of its compiler; a name that ends in `*` is a prefix.
const LIBRARIES: [&str; 7] =
    ["libc.so.6", "libm.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux*"];

/// Section types of the ELF specification and of its GNU extension.
const SHT_DYNAMIC: u32 = 6;
const SHT_GNU_VERNEED: u32 = 0x6fff_fffe;
/// Tag of a dynamic entry that names a library.
const DT_NEEDED: usize = 1;

/// What the dynamic linker has to find.
#[derive(Debug, Default)]
struct Needs {
    libraries: Vec<String>,
    /// Symbol versions, for example `GLIBC_2.34`.
    versions: Vec<String>,
}

/// Checks the program at `path` and prints what it needs.
///
/// # Errors
/// When it needs a library or a symbol version that DGX OS does not have, or is no such program.
pub(crate) fn run(path: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let needs = needs(&bytes)
        .with_context(|| format!("{}: not a whole 64-bit little-endian ELF file", path.display()))?;
    let newest = needs.versions.iter().filter_map(|version| glibc(version)).max();
    let newest = newest.map_or_else(|| "none".to_owned(), |(major, minor)| format!("{major}.{minor}"));
    println!("\n{}: needs {}; glibc {newest}", path.display(), needs.libraries.join(", "));
    let problems = problems(&needs);
    if !problems.is_empty() {
        bail!("{}: {}", path.display(), problems.join("; "));
    }
    Ok(())
}

fn problems(needs: &Needs) -> Vec<String> {
    let allowed = |library: &str| {
        LIBRARIES.iter().any(|name| match name.strip_suffix('*') {
            Some(prefix) => library.starts_with(prefix),
            None => library == *name,
        })
    };
    let libraries = needs.libraries.iter().filter(|library| !allowed(library)).map(|library| {
        format!("links `{library}`, which a machine may lack: build that dependency from its source")
    });
    let (major, minor) = NEWEST_GLIBC;
    let versions = needs.versions.iter().filter(|version| glibc(version) > Some(NEWEST_GLIBC));
    let versions = versions.map(|version| format!("needs {version}; DGX OS has GLIBC_{major}.{minor}"));
    libraries.chain(versions).collect()
}

/// `GLIBC_2.34` as (2, 34); versions of other libraries, and private ones, have none.
fn glibc(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.strip_prefix("GLIBC_")?.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// `None` if `file` is not what the module says, or ends early.
fn needs(file: &[u8]) -> Option<Needs> {
    // Magic, 64 bits, little-endian.
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (start, size, count) = (number(file, 0x28, 8)?, number(file, 0x3a, 2)?, number(file, 0x3c, 2)?);
    let headers = file.get(start..start.checked_add(size * count)?)?;
    let section = |index: usize| headers.get(index.checked_mul(size)?..);
    let contents = |header: &[u8]| {
        let (start, len) = (number(header, 0x18, 8)?, number(header, 0x20, 8)?);
        file.get(start..start.checked_add(len)?)
    };
    let mut needs = Needs::default();
    for index in 0..count {
        let header = section(index)?;
        let kind = number(header, 4, 4)? as u32;
        if kind != SHT_DYNAMIC && kind != SHT_GNU_VERNEED {
            continue;
        }
        let (table, names) = (contents(header)?, contents(section(number(header, 0x28, 4)?)?)?);
        if kind == SHT_DYNAMIC {
            for entry in table.chunks_exact(16).filter(|entry| number(entry, 0, 8) == Some(DT_NEEDED)) {
                needs.libraries.push(name(names, number(entry, 8, 8)?)?);
            }
        } else {
            needs.versions = versions(table, names, number(header, 0x2c, 4)?)?;
        }
    }
    Some(needs)
}

/// The names in a table of needed versions: `num_libraries` records, each with a list of versions. Offsets are relative
/// to the record they stand in.
fn versions(table: &[u8], names: &[u8], num_libraries: usize) -> Option<Vec<String>> {
    let (mut found, mut record) = (Vec::new(), table);
    for _ in 0..num_libraries {
        let mut version = record.get(number(record, 8, 4)?..)?;
        for _ in 0..number(record, 2, 2)? {
            found.push(name(names, number(version, 8, 4)?)?);
            version = version.get(number(version, 12, 4)?..)?;
        }
        record = record.get(number(record, 12, 4)?..)?;
    }
    Some(found)
}

/// The unsigned number of `len` bytes at `at`.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(len)?)?;
    usize::try_from(bytes.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte))).ok()
}

/// The text at `at`, up to its zero byte.
fn name(names: &[u8], at: usize) -> Option<String> {
    let rest = names.get(at..)?;
    let len = rest.iter().position(|&byte| byte == 0)?;
    String::from_utf8(rest[..len].to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_test() -> Vec<u8> {
        std::fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    #[test]
    fn the_needs_of_this_very_test_are_found() {
        let needs = needs(&this_test()).unwrap();
        assert!(needs.libraries.iter().any(|library| library == "libc.so.6"), "{needs:?}");
        // Every program starts through this symbol: 2.34 or, where it was built on an older system, 2.2.5 or 2.17.
        assert!(needs.versions.iter().any(|version| glibc(version) >= Some((2, 2))), "{needs:?}");
        assert_eq!(problems(&needs), [""; 0]);
    }

    #[test]
    fn a_truncated_program_is_refused() {
        let file = this_test();
        // The section headers are the end of the file, so every cut loses some.
        for len in [0, 5, 6, 63, 64, 1000, file.len() / 2, file.len() - 1] {
            assert!(needs(&file[..len]).is_none(), "{len} bytes");
        }
    }

    #[test]
    fn foreign_libraries_and_newer_symbols_are_problems() {
        let texts = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let mut needs = Needs {
            libraries: texts(&["libc.so.6", "ld-linux-aarch64.so.1", "libgcc_s.so.1"]),
            versions: texts(&["GLIBC_2.4", "GLIBC_2.39", "GCC_4.2.0", "GLIBC_2.2.5"]),
        };
        assert_eq!(problems(&needs), [""; 0]);
        needs.libraries.push("libpcre2-8.so.0".into());
        needs.versions.push("GLIBC_2.40".into());
        let found = problems(&needs);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("libpcre2-8.so.0") && found[1].contains("GLIBC_2.40"), "{found:?}");
    }
}
