//! Checkpoints of strangers: the header of a shard, and the index. What is accepted can be read.

use std::path::PathBuf;
use std::sync::LazyLock;

use spark_weights::{Checkpoint, OpenOptions};
use tempfile::TempDir;

use crate::folder::{model, scratch, write};

const CONFIG: &[u8] = br#"{"model_type": "qwen3"}"#;

/// A folder with a configuration, and one that has a shard as well.
static FOLDERS: LazyLock<[TempDir; 2]> = LazyLock::new(|| {
    let folders = [scratch(), scratch()];
    folders.iter().for_each(|folder| write(&folder.path().join("config.json"), CONFIG));
    let shard = std::fs::read(PathBuf::from(model()).join("model.safetensors"));
    write(&folders[1].path().join("a.safetensors"), &shard.unwrap_or_default());
    folders
});

/// Byte 0: a shard or an index. The rest is the file.
pub fn run(data: &[u8]) {
    let [kind, file @ ..] = data else { return };
    let (folder, name) = match kind & 1 {
        0 => (&FOLDERS[0], "model.safetensors"),
        _ => (&FOLDERS[1], "model.safetensors.index.json"),
    };
    write(&folder.path().join(name), file);
    let path = folder.path().to_str().expect("temporary folders have plain names");
    let Ok(checkpoint) = Checkpoint::open(path, &OpenOptions::default()) else { return };
    for tensor in checkpoint.tensors() {
        let size: usize = tensor.shape.iter().product::<usize>() * tensor.dtype.size();
        assert_eq!(size, tensor.len, "{tensor:?}");
        let bytes = checkpoint.read_tensor(&tensor.name).expect("the file is long enough for its tensors");
        assert_eq!(bytes.len(), tensor.len, "{tensor:?}");
    }
}
