//! Files of this machine as media: those below one folder that the operator has named, and nothing else. The kernel keeps
//! the path below the folder while it opens the file, so no link and no rename in between leads outside.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use rustix::io::Errno;
use url::Url;

use super::source::{Hold, Kind};
use crate::ApiError;

/// How often a file is tried to be opened that something else stands in the way of.
const OPEN_ATTEMPTS: usize = 100;

/// The folder of `--allowed-local-media-path`.
#[derive(Debug)]
pub struct LocalMedia {
    folder: OwnedFd,
    /// Its path as it was given and as it is without links: requests may use both.
    paths: [PathBuf; 2],
}

impl LocalMedia {
    /// Opens the folder. What it is renamed to later does not matter.
    ///
    /// # Errors
    /// When there is none, or the kernel cannot keep a path below a folder (before Linux 5.6).
    pub fn open(path: &Path) -> io::Result<Self> {
        let real = path.canonicalize()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(&real, flags, Mode::empty())?;
        openat2(CWD, &real, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)?;
        let given = std::path::absolute(path)?;
        Ok(Self { folder, paths: [given, real] })
    }

    /// The file at a `file:` address, at most `max_bytes`, with its share of the budget. Blocks.
    ///
    /// # Errors
    /// 422 for everything that is not a regular file below the folder, in one and the same words: which files there are
    /// elsewhere is not told. 503 when the budget is spent.
    pub(super) fn read(
        &self,
        kind: Kind,
        url: &str,
        max_bytes: usize,
        mut hold: Hold,
    ) -> Result<(Vec<u8>, Hold), ApiError> {
        let refuse = |rule: &str| ApiError::Unprocessable {
            param: kind.param(),
            message: format!("{}: {rule}", kind.param()),
        };
        let file = self.open_below(url).ok_or_else(|| {
            refuse("the file is not one that can be read below the folder of --allowed-local-media-path")
        })?;
        let mut bytes = Vec::new();
        let mut file = file.take(max_bytes as u64 + 1);
        let mut piece = vec![0; 1 << 16];
        loop {
            let len = file.read(&mut piece).map_err(|_| refuse("the file cannot be read"))?;
            if len == 0 {
                break;
            }
            hold.grow(len)?;
            bytes.extend_from_slice(&piece[..len]);
        }
        match bytes.len() {
            0 => Err(refuse("the file is empty")),
            len if len > max_bytes => Err(refuse("the file is over the limit of this server")),
            _ => Ok((bytes, hold)),
        }
    }

    fn open_below(&self, url: &str) -> Option<File> {
        let path = Url::parse(url).ok()?.to_file_path().ok()?;
        let below = self.paths.iter().find_map(|folder| path.strip_prefix(folder).ok())?;
        // Neither waits for the writer of a pipe nor takes a terminal.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        // While anything on the machine is renamed, the kernel cannot tell where a ".." leads and says: again.
        let open = || openat2(&self.folder, below, flags, Mode::empty(), resolve);
        let again = |result: &rustix::io::Result<_>| matches!(result, Err(Errno::AGAIN));
        let file = (0..OPEN_ATTEMPTS).map(|_| open()).find(|result| !again(result))?.ok()?;
        let stat = fstat(&file).ok()?;
        (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then(|| file.into())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::source::Budget;
    use super::*;

    #[test]
    fn only_regular_files_below_the_folder_are_read() {
        let outer = tempfile::tempdir().unwrap();
        let (inside, real) = (outer.path().join("link"), outer.path().join("real"));
        std::fs::create_dir_all(real.join("sub")).unwrap();
        symlink(&real, &inside).unwrap();
        std::fs::write(outer.path().join("secret"), "secret").unwrap();
        std::fs::write(outer.path().join("real-too"), "secret").unwrap();
        std::fs::write(real.join("a b.png"), "one").unwrap();
        std::fs::write(real.join("sub/large"), vec![1; 11]).unwrap();
        std::fs::write(real.join("empty"), "").unwrap();
        symlink("../a b.png", real.join("sub/good")).unwrap();
        symlink("../../secret", real.join("sub/up")).unwrap();
        symlink(outer.path().join("secret"), real.join("absolute")).unwrap();
        symlink("/proc/self/root", real.join("root")).unwrap();
        rustix::fs::mknodat(CWD, real.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();

        let local = LocalMedia::open(&inside).unwrap();
        let budget = Budget::new(1000);
        let read = |path: &str| local.read(Kind::Image, &format!("file://{path}"), 10, budget.hold());
        let at = |path: &str| read(&format!("{}/{path}", inside.display()));
        for path in ["a%20b.png", "sub/good", "sub/../a%20b.png", "./a b.png", "sub/%2e%2e/a b.png"] {
            assert_eq!(at(path).unwrap().0, b"one", "{path}");
        }
        assert_eq!(read(&format!("{}/a b.png", real.display())).unwrap().0, b"one");
        for path in [
            "",
            "sub",
            "pipe",
            "empty",
            "sub/large",
            "absent",
            "sub/up",
            "absolute",
            "root/etc/passwd",
            "../secret",
            "%2e%2e/secret",
            "..%2fsecret",
            "sub/../../secret",
            "a b.png%00x",
        ] {
            let error = at(path).err().unwrap_or_else(|| panic!("{path} was read"));
            assert_eq!(error.status(), 422, "{path}");
            assert!(!error.to_string().contains(&*outer.path().to_string_lossy()), "{error}");
        }
        for url in ["/etc/passwd", "/dev/zero", "/proc/self/environ", "example.com/x", "", "localhost"] {
            assert!(read(url).is_err(), "{url}");
        }
        let beside = format!("{}-too", real.display());
        assert!(read(&beside).is_err(), "a name that begins as the folder's");
        assert!(LocalMedia::open(&outer.path().join("absent")).is_err());
    }

    #[test]
    fn a_folder_that_is_swapped_for_a_link_leads_nowhere() {
        let outer = tempfile::tempdir().unwrap();
        let (folder, secrets) = (outer.path().join("media/sub"), outer.path().join("secrets"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir(&secrets).unwrap();
        std::fs::write(folder.join("x"), "right").unwrap();
        std::fs::write(secrets.join("x"), "secret").unwrap();
        let local = LocalMedia::open(&outer.path().join("media")).unwrap();
        let budget = Budget::new(1000);
        let url = format!("file://{}/x", folder.display());
        std::thread::scope(|scope| {
            let swap = scope.spawn(|| {
                for _ in 0..300 {
                    std::fs::rename(&folder, outer.path().join("aside")).unwrap();
                    symlink(&secrets, &folder).unwrap();
                    std::fs::remove_file(&folder).unwrap();
                    std::fs::rename(outer.path().join("aside"), &folder).unwrap();
                }
            });
            while !swap.is_finished() {
                if let Ok((bytes, _)) = local.read(Kind::Image, &url, 10, budget.hold()) {
                    assert_eq!(bytes, b"right");
                }
            }
        });
    }
}
