//! How fast a disk gives a file past the page cache, in pieces as the loader reads them, by one thread and by several.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{thread, time::Instant};

use anyhow::{Context, ensure};
use rustix::fs::OFlags;
use serde_json::{Value, json};

use super::number;

/// Alignment of offsets, lengths and addresses of direct reads.
const ALIGN: usize = 4096;
/// A read of the loader.
const PIECE: usize = 16 << 20;
/// Most that is read of a file.
const MOST: u64 = 4 << 30;
/// Size of a file that is written to be read.
const WRITTEN: u64 = 1 << 30;
const THREADS: [usize; 3] = [1, 4, 8];

/// Measures with `file`, or with one that is made in the current folder and removed.
pub(super) fn measure(file: Option<&Path>) -> anyhow::Result<Value> {
    let (direct, path, write_speed) = match file {
        Some(path) => (open(path)?, path.to_owned(), None),
        None => {
            let Written { file, path, gb_per_second } = Written::new()?;
            (file, path, Some(gb_per_second))
        }
    };
    let whole = direct.metadata()?.len().min(MOST) / ALIGN as u64 * ALIGN as u64;
    ensure!(whole > 0, "{}: smaller than {ALIGN} bytes; name a larger file with --file", path.display());
    let mut speeds = serde_json::Map::new();
    for threads in THREADS {
        let start = Instant::now();
        read(&direct, whole, threads).with_context(|| path.display().to_string())?;
        let speed = whole as f64 / start.elapsed().as_secs_f64() / 1e9;
        speeds.insert(format!("direct_read_{threads}_threads_gb_per_s"), number(speed));
    }
    let mut disk = json!({
        "bytes": whole,
        "piece_bytes": PIECE,
        "was_written_for_this": write_speed.is_some(),
        "write_gb_per_s": write_speed.map(number),
    });
    if let Some(disk) = disk.as_object_mut() {
        disk.extend(speeds);
    }
    Ok(disk)
}

/// For reads past the page cache.
fn open(path: &Path) -> anyhow::Result<File> {
    let flags = i32::try_from(OFlags::DIRECT.bits()).context("the flag of direct reads")?;
    OpenOptions::new().read(true).custom_flags(flags).open(path).with_context(|| {
        format!(
            "{}: cannot be read past the page cache (a folder in memory?); name another with --file",
            path.display()
        )
    })
}

/// Reads the first `whole` bytes of `file`, a piece at a time, by `threads` threads.
fn read(file: &File, whole: u64, threads: usize) -> std::io::Result<()> {
    let next = AtomicU64::new(0);
    let reader = || -> std::io::Result<()> {
        let mut memory = vec![0; PIECE + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        let buffer = &mut memory[start..start + PIECE];
        loop {
            let mut from = next.fetch_add(PIECE as u64, Ordering::Relaxed);
            let end = whole.min(from.saturating_add(PIECE as u64));
            while from < end {
                match file.read_at(&mut buffer[..(end - from) as usize], from)? {
                    0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                    got => from += got as u64,
                }
            }
            if end == whole {
                return Ok(());
            }
        }
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(reader)).collect();
        readers.into_iter().try_for_each(|reader| {
            reader.join().unwrap_or_else(|_| Err(std::io::Error::other("a reading thread ended early")))
        })
    })
}

/// A file that has no name any more, so that it goes with this process, however that ends.
struct Written {
    /// For reads past the page cache.
    file: File,
    /// What it was called.
    path: PathBuf,
    /// How fast it reached the disk.
    gb_per_second: f64,
}

impl Written {
    fn new() -> anyhow::Result<Self> {
        Self::with_bytes(Path::new("."), WRITTEN)
    }

    fn with_bytes(folder: &Path, num_bytes: u64) -> anyhow::Result<Self> {
        let path = folder.join(format!("spark-engine-probe-{}.tmp", std::process::id()));
        let failed = || format!("{}: name a file on the disk with --file", path.display());
        let mut out = OpenOptions::new().write(true).create_new(true).open(&path).with_context(failed)?;
        let opened = open(&path);
        fs::remove_file(&path).with_context(failed)?;
        let file = opened?;
        // No disk makes less of these bytes.
        let mut random = fastrand::Rng::with_seed(1);
        let mut piece = vec![0; PIECE];
        random.fill(&mut piece);
        let start = Instant::now();
        let mut left = num_bytes;
        while left > 0 {
            let part = left.min(PIECE as u64);
            // Pieces differ from each other.
            piece[..8].copy_from_slice(&left.to_le_bytes());
            out.write_all(&piece[..part as usize]).with_context(failed)?;
            left -= part;
        }
        out.sync_all().with_context(failed)?;
        let gb_per_second = num_bytes as f64 / start.elapsed().as_secs_f64() / 1e9;
        Ok(Self { file, path, gb_per_second })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_to_their_end_by_any_number_of_threads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, vec![7; 2 * PIECE + 8192]).unwrap();
        let file = File::open(&path).unwrap();
        for threads in [1, 2, 5] {
            read(&file, 2 * PIECE as u64 + 8192, threads).unwrap();
            read(&file, 4096, threads).unwrap();
        }
        let error = read(&file, 3 * PIECE as u64, 2).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_file_that_is_written_for_this_has_no_name_while_it_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let written = Written::with_bytes(folder.path(), PIECE as u64 + 8192);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        match written {
            Ok(written) => assert_eq!(written.file.metadata().unwrap().len(), PIECE as u64 + 8192),
            // A folder in memory cannot be read past the page cache everywhere.
            Err(error) => assert!(error.to_string().contains("--file"), "{error:#}"),
        }
    }

    #[test]
    fn a_file_that_is_missing_or_too_small_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("small");
        fs::write(&path, [1; 100]).unwrap();
        let error = format!("{:#}", measure(Some(&path)).unwrap_err());
        assert!(error.contains("small") && error.contains("--file"), "{error}");
        let error = format!("{:#}", measure(Some(&folder.path().join("absent"))).unwrap_err());
        assert!(error.contains("absent"), "{error}");
    }
}
