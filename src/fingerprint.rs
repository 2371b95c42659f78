//! Whether two machines have the same model and the same program, told by 32 bytes each. Not a checksum of every byte: a
//! checkpoint of 120 GB is compared in milliseconds.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Bytes that are read at the beginning, in the middle and at the end of a large file.
const SAMPLE: u64 = 64 << 10;
/// Files up to this size are read whole.
const SMALL: u64 = 4 << 20;

/// What a folder with a checkpoint holds: names and sizes of its files, the contents of small ones, samples of large ones.
/// Hidden files and folders do not count.
///
/// # Errors
/// A file cannot be read.
pub fn model(folder: &Path) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    for (name, path, len) in list(folder)? {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(&len.to_le_bytes());
        add_contents(&mut hasher, &path, len)?;
    }
    Ok(hasher.finalize().into())
}

/// A file of a checkpoint, and what tells it from another one of the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMark {
    /// Its name in the folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Hash of its contents, or of samples if it is large.
    pub hash: [u8; 32],
}

/// The files that [`model`] looks at, by name.
///
/// # Errors
/// A file cannot be read.
pub fn files(folder: &Path) -> io::Result<Vec<FileMark>> {
    let mark = |(name, path, bytes): (String, PathBuf, u64)| {
        let mut hasher = blake3::Hasher::new();
        add_contents(&mut hasher, &path, bytes)?;
        Ok(FileMark { name, bytes, hash: hasher.finalize().into() })
    };
    list(folder)?.into_iter().map(mark).collect()
}

/// Name, path and size of each file that is not hidden.
fn list(folder: &Path) -> io::Result<Vec<(String, PathBuf, u64)>> {
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    let mut files = Vec::new();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // The target's: checkpoints of the hub's cache are links.
        let metadata = fs::metadata(&path)?;
        if !name.starts_with('.') && metadata.is_file() {
            files.push((name, path, metadata.len()));
        }
    }
    Ok(files)
}

fn add_contents(hasher: &mut blake3::Hasher, path: &Path, len: u64) -> io::Result<()> {
    if len <= SMALL {
        hasher.update(&fs::read(path)?);
        return Ok(());
    }
    let file = File::open(path)?;
    let mut sample = vec![0; SAMPLE as usize];
    for offset in [0, len / 2, len - SAMPLE] {
        file.read_exact_at(&mut sample, offset)?;
        hasher.update(&sample);
    }
    Ok(())
}

/// The program that is running, every byte of it.
///
/// # Errors
/// The file of the program cannot be read.
pub fn program() -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(std::env::current_exe()?)?)?;
    Ok(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_a_name_and_a_size_show() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("config.json"), "{}").unwrap();
        fs::write(path("model.safetensors"), vec![7u8; SMALL as usize + 100]).unwrap();
        let before = model(folder.path()).unwrap();
        fs::write(path(".lock"), "x").unwrap();
        fs::create_dir(path("logs")).unwrap();
        assert_eq!(model(folder.path()).unwrap(), before, "hidden files and folders do not count");
        fs::write(path("config.json"), "[]").unwrap();
        let changed = model(folder.path()).unwrap();
        assert_ne!(changed, before);
        let mut weights = vec![7u8; SMALL as usize + 100];
        *weights.last_mut().unwrap() = 8;
        fs::write(path("model.safetensors"), weights).unwrap();
        let sampled = model(folder.path()).unwrap();
        assert_ne!(sampled, changed, "the end of a large file is sampled");
        fs::rename(path("config.json"), path("configs.json")).unwrap();
        assert_ne!(model(folder.path()).unwrap(), sampled);
        assert!(model(&path("nowhere")).is_err());
    }
}
