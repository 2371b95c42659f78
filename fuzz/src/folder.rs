//! Files for the targets: the fixtures of the repository, and a folder that is written anew for each input.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// The folder of a small model with images: a tokenizer, a template, configurations.
pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/dense_vl_bf16")
}

/// A folder in memory where there is one: a file is written for every input.
pub fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
    folder.expect("the machine has room for a temporary folder")
}

/// Writes a file into a folder of this process.
pub fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("a temporary folder can be written to");
}
