//! The files of a model on another machine: which are there, and taking those that are not. The sender is `ranks/copy.rs`. Only
//! the files of one folder, as the fingerprint of a model has them.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use spark_engine::{
    comm::{Hello, join},
    fingerprint::{self, FileMark},
};

/// How long the two machines wait for each other.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Ending of a file that has not come whole.
const UNFINISHED: &str = "unfinished";

/// A file's name and what tells it from others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileOf {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// Hash of its contents, of samples if it is large; in hexadecimal digits.
    pub(crate) mark: String,
}

impl FileOf {
    /// The files of a model in `folder`, by name; none if there is no such folder.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(crate) fn all(folder: &Path) -> anyhow::Result<Vec<Self>> {
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let marks = fingerprint::files(folder).with_context(|| folder.display().to_string())?;
        let file = |FileMark { name, bytes, hash }| Self { name, bytes, mark: super::hex(hash) };
        Ok(marks.into_iter().map(file).collect())
    }
}

/// A model that a machine should have.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Wanted {
    /// Where it is on the machine that asks.
    pub(crate) folder: String,
    /// Name of a folder for it where that path cannot be: its last part and a hash.
    pub(crate) name: String,
    pub(crate) files: Vec<FileOf>,
}

/// What the machine has of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Held {
    /// Where it is, or where it will be.
    pub(crate) folder: String,
    /// Names of files that are missing or different.
    pub(crate) missing: Vec<String>,
    pub(crate) free_bytes: Option<u64>,
}

impl Wanted {
    /// Looks in the same folder, and in this user's cache if there can be no such folder here.
    pub(super) fn look(&self) -> anyhow::Result<Held> {
        ensure!(is_name(&self.name), "{:?} is no name for a folder", self.name);
        let folder = match fs::create_dir_all(&self.folder) {
            Ok(()) if is_writable(Path::new(&self.folder)) => PathBuf::from(&self.folder),
            // A model that is complete may be read-only.
            _ if self.missing(Path::new(&self.folder)).is_ok_and(|missing| missing.is_empty()) => {
                PathBuf::from(&self.folder)
            }
            _ => {
                let home = std::env::var_os("HOME").context("HOME is not set")?;
                let folder = Path::new(&home).join(".cache/spark-engine/models").join(&self.name);
                fs::create_dir_all(&folder).with_context(|| {
                    format!("neither {} nor {} can be made", self.folder, folder.display())
                })?;
                folder
            }
        };
        let missing = self.missing(&folder)?;
        let stat = rustix::fs::statvfs(&folder).ok();
        let free_bytes = stat.map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        let folder = folder.into_os_string().into_string().ok().context("a folder that is not UTF-8")?;
        Ok(Held { folder, missing, free_bytes })
    }

    fn missing(&self, folder: &Path) -> anyhow::Result<Vec<String>> {
        let held: HashMap<String, FileOf> =
            FileOf::all(folder)?.into_iter().map(|file| (file.name.clone(), file)).collect();
        let is_missing = |file: &&FileOf| held.get(&file.name) != Some(*file);
        Ok(self.files.iter().filter(is_missing).map(|file| file.name.clone()).collect())
    }
}

fn is_writable(folder: &Path) -> bool {
    rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok()
}

/// Whether `name` is one part of a path, and not hidden.
fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0'])
}

/// Pieces of files, in order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Packet {
    /// A file begins.
    Begin {
        /// Its name.
        name: String,
    },
    /// The next bytes of it.
    Bytes(Bytes),
    /// It ends; the hash of all of it.
    End([u8; 32]),
}

/// Bytes that are sent as they are, not number by number.
#[derive(Debug)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}

/// What both sides of a transfer agree on.
pub(crate) fn hello(token: String) -> Hello {
    Hello { token, version: env!("CARGO_PKG_VERSION").to_owned(), model: [0; 32], settings: [0; 32] }
}

/// Takes `num_files` files into `folder`. A file has its name only when it is whole, so an interrupted transfer goes on with the
/// file that it was at.
pub(super) fn receive(
    folder: &str,
    leader: SocketAddr,
    token: String,
    num_files: usize,
) -> anyhow::Result<usize> {
    let mut team = join(leader, 1, 2, &hello(token), TIMEOUT)?;
    for _ in 0..num_files {
        let taken = take(Path::new(folder), || team.recv_bulk());
        // The sender is told file by file: it stops at the first that could not be written.
        let told = taken.as_ref().map(|_| ()).map_err(|error| format!("{error:#}"));
        team.send_bulk(&told)?;
        taken?;
    }
    Ok(num_files)
}

fn take(folder: &Path, mut next: impl FnMut() -> spark_engine::comm::Result<Packet>) -> anyhow::Result<()> {
    let Packet::Begin { name } = next()? else { bail!("a file without a beginning") };
    ensure!(is_name(&name), "{name:?} is no name of a file");
    let (path, unfinished) = (folder.join(&name), folder.join(format!(".{name}.{UNFINISHED}")));
    let mut hasher = blake3::Hasher::new();
    // A full disk is told at the end: the rest of the file is on its way and has to be read.
    let mut written = File::create(&unfinished);
    loop {
        match next()? {
            Packet::Begin { name } => bail!("{name} began before the end of another file"),
            Packet::Bytes(Bytes(bytes)) => {
                hasher.update(&bytes);
                written = written.and_then(|mut file| file.write_all(&bytes).map(|()| file));
            }
            Packet::End(hash) => {
                let file = written.with_context(|| format!("writing {}", unfinished.display()))?;
                ensure!(hasher.finalize() == hash, "{name} was changed on its way, or while it was sent");
                file.sync_data()
                    .and_then(|()| fs::rename(&unfinished, &path))
                    .with_context(|| format!("writing {}", path.display()))?;
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packets(bytes: &[u8], hash: [u8; 32]) -> Vec<Packet> {
        let pieces = bytes.chunks(3).map(|piece| Packet::Bytes(Bytes(piece.to_vec())));
        let begin = Packet::Begin { name: "a.safetensors".into() };
        std::iter::once(begin).chain(pieces).chain([Packet::End(hash)]).collect()
    }

    #[test]
    fn a_file_gets_its_name_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let bytes = b"many bytes";
        let mut damaged = packets(bytes, *blake3::hash(b"other").as_bytes()).into_iter();
        let error = take(folder.path(), || Ok(damaged.next().unwrap())).unwrap_err();
        assert!(error.to_string().contains("was changed") && !path.exists(), "{error}");
        let mut whole = packets(bytes, *blake3::hash(bytes).as_bytes()).into_iter();
        take(folder.path(), || Ok(whole.next().unwrap())).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes);
        assert_eq!(FileOf::all(folder.path()).unwrap().len(), 1, "nothing else is left");
    }

    #[test]
    fn names_stay_in_their_folder() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["", "../x", "/etc/passwd", ".bashrc", "a/b"] {
            let mut packets = vec![Packet::Begin { name: name.into() }].into_iter();
            assert!(take(folder.path(), || Ok(packets.next().unwrap())).is_err(), "{name}");
            assert!(!is_name(name));
        }
    }

    #[test]
    fn what_is_missing_or_different_is_found() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (folder, name, text) in [
            (&here, "config.json", "{}"),
            (&here, "a.safetensors", "aaa"),
            (&here, "b.safetensors", "bbb"),
            (&there, "config.json", "{}"),
            (&there, "a.safetensors", "aab"),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let files = FileOf::all(here.path()).unwrap();
        let wanted = Wanted { folder: there.path().display().to_string(), name: "model-1".into(), files };
        let held = wanted.look().unwrap();
        assert_eq!(held.missing, ["a.safetensors", "b.safetensors"]);
        assert_eq!(held.folder, wanted.folder);
        assert!(Wanted { name: "../up".into(), ..wanted }.look().is_err());
    }
}
