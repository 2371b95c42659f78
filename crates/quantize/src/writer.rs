//! The output folder: shards of safetensors with their index, side files, written beside the goal and renamed at the
//! end. Knows names and bytes, no formats.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub(crate) use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    /// `bytes` has as many bytes as `dtype` and `shape` ask for.
    pub(crate) fn new(name: String, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        Self { name, dtype, shape: shape.to_vec(), bytes }
    }
}

/// Extensions of files that hold weights; every other file of a checkpoint is copied.
const WEIGHTS: &[&str] = &["safetensors", "bin", "pt", "pth", "gguf", "onnx", "msgpack", "h5"];
const INDEX: &str = "model.safetensors.index.json";

/// A checkpoint folder being written. Dropped before [`Output::finish`], it leaves nothing behind.
pub(crate) struct Output {
    goal: PathBuf,
    partial: PathBuf,
    shard_bytes: usize,
    /// Tensors of the next shard and their bytes.
    pending: Vec<Tensor>,
    pending_bytes: usize,
    /// Names of the tensors of each written shard.
    shards: Vec<Vec<String>>,
    total_bytes: u64,
    finished: bool,
}

impl Output {
    /// Where a folder is written that will be `goal`, which must not exist or be empty. Creates nothing.
    pub(crate) fn check(goal: &Path) -> Result<PathBuf> {
        let taken = |path: &Path, reason| Error::Output { path: path.to_owned(), reason };
        if goal.exists() {
            let entries = std::fs::read_dir(goal).map_err(io(goal, "cannot read the output folder"))?;
            if entries.count() > 0 {
                return Err(taken(goal, "is not empty; give a folder that does not exist"));
            }
        }
        let Some(name) = goal.file_name() else {
            return Err(taken(goal, "has no name of its own; give a folder to be created"));
        };
        let mut partial = name.to_owned();
        partial.push(".partial");
        let partial = goal.with_file_name(partial);
        if partial.exists() {
            let reason =
                "is in the way: an earlier run was stopped, or another one writes here; delete it to go on";
            return Err(taken(&partial, reason));
        }
        Ok(partial)
    }

    /// Begins a folder that will be `goal`, which [`check`](Self::check) accepts. Shards have about `shard_bytes`.
    pub(crate) fn create(goal: &Path, shard_bytes: usize) -> Result<Self> {
        let partial = Self::check(goal)?;
        std::fs::create_dir_all(&partial).map_err(io(&partial, "cannot create the folder"))?;
        Ok(Self {
            goal: goal.to_owned(),
            partial,
            shard_bytes,
            pending: Vec::new(),
            pending_bytes: 0,
            shards: Vec::new(),
            total_bytes: 0,
            finished: false,
        })
    }

    /// Adds tensors; writes a shard when enough have come.
    pub(crate) fn add(&mut self, tensors: impl IntoIterator<Item = Tensor>) -> Result<()> {
        for tensor in tensors {
            if self.pending_bytes > 0 && self.pending_bytes + tensor.bytes.len() > self.shard_bytes {
                self.write_shard()?;
            }
            self.pending_bytes += tensor.bytes.len();
            self.pending.push(tensor);
        }
        Ok(())
    }

    fn write_shard(&mut self) -> Result<()> {
        let path = self.partial.join(unfinished_name(self.shards.len()));
        let tensors = std::mem::take(&mut self.pending);
        let shard = |source| Error::Shard { path: path.clone(), source };
        let mut views = Vec::with_capacity(tensors.len());
        for tensor in &tensors {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).map_err(shard)?;
            views.push((&tensor.name, view));
        }
        // transformers reads a shard only if it says whose tensors these are.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(views, Some(metadata), &path).map_err(shard)?;
        self.total_bytes += self.pending_bytes as u64;
        self.pending_bytes = 0;
        self.shards.push(tensors.into_iter().map(|tensor| tensor.name).collect());
        Ok(())
    }

    /// Copies every file of `folder` that is neither weights nor index nor `config.json`.
    pub(crate) fn copy_side_files(&self, folder: &Path) -> Result<()> {
        let entries = std::fs::read_dir(folder).map_err(io(folder, "cannot read the folder"))?;
        for entry in entries {
            let path = entry.map_err(io(folder, "cannot read the folder"))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            let skip = name.starts_with('.')
                || name == "config.json"
                || name == INDEX
                || WEIGHTS.contains(&extension);
            // Folders hold other people's formats (`original/`, `onnx/`), never what an engine reads.
            if skip || !path.is_file() {
                continue;
            }
            std::fs::copy(&path, self.partial.join(name)).map_err(io(&path, "cannot copy"))?;
        }
        Ok(())
    }

    /// Writes what is left, the index and `config`, and gives the folder its name. Returns the bytes of all tensors.
    pub(crate) fn finish(mut self, config: &Value) -> Result<u64> {
        if !self.pending.is_empty() {
            self.write_shard()?;
        }
        self.write_json("config.json", config)?;
        let ordinary = self.partial.join("config.json");
        let permissions = std::fs::metadata(&ordinary).map_err(io(&ordinary, "cannot stat"))?.permissions();
        let count = self.shards.len();
        let mut map = Map::new();
        for (number, names) in self.shards.iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            let from = self.partial.join(unfinished_name(number));
            // The writer of the format makes files that only their owner may read; a checkpoint is for anybody.
            std::fs::set_permissions(&from, permissions.clone())
                .map_err(io(&from, "cannot open to others"))?;
            std::fs::rename(&from, self.partial.join(&name)).map_err(io(&from, "cannot rename"))?;
            map.extend(names.iter().map(|tensor| (tensor.clone(), json!(name))));
        }
        if count > 1 {
            let index = json!({"metadata": {"total_size": self.total_bytes}, "weight_map": map});
            self.write_json(INDEX, &index)?;
        }
        if self.goal.exists() {
            // Empty, as `create` has seen; if it no longer is, this fails and nothing is lost.
            std::fs::remove_dir(&self.goal).map_err(io(&self.goal, "cannot replace the folder"))?;
        }
        std::fs::rename(&self.partial, &self.goal).map_err(io(&self.goal, "cannot rename the folder"))?;
        self.finished = true;
        Ok(self.total_bytes)
    }

    fn write_json(&self, name: &str, value: &Value) -> Result<()> {
        let path = self.partial.join(name);
        std::fs::write(&path, format!("{value:#}\n")).map_err(io(&path, "cannot write"))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.finished {
            // An error is on its way to the caller already; a folder that stays is named by the next run.
            let _ = std::fs::remove_dir_all(&self.partial);
        }
    }
}

fn unfinished_name(number: usize) -> String {
    format!("shard-{number}.safetensors")
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Io { path: path.to_owned(), action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, bytes: usize) -> Tensor {
        Tensor::new(name.to_owned(), Dtype::U8, &[bytes], vec![1; bytes])
    }

    #[test]
    fn shards_an_index_and_nothing_half_done() {
        let folder = tempfile::tempdir().unwrap();
        let goal = folder.path().join("out");
        let mut output = Output::create(&goal, 100).unwrap();
        output.add([tensor("a", 60), tensor("b", 30), tensor("c", 500), tensor("d", 1)]).unwrap();
        assert!(!goal.exists(), "nothing has the name before it is whole");
        assert_eq!(output.finish(&json!({"model_type": "x"})).unwrap(), 591);
        let index: Value = serde_json::from_slice(&std::fs::read(goal.join(INDEX)).unwrap()).unwrap();
        assert_eq!(index["weight_map"]["b"], "model-00001-of-00003.safetensors");
        assert_eq!(index["weight_map"]["c"], "model-00002-of-00003.safetensors");
        assert!(!folder.path().join("out.partial").exists());
        assert!(Output::create(&goal, 100).err().unwrap().to_string().contains("not empty"));
    }

    #[test]
    fn a_run_that_fails_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let goal = folder.path().join("out");
        let mut output = Output::create(&goal, 100).unwrap();
        let error = Output::create(&goal, 100).err().unwrap().to_string();
        assert!(error.contains("out.partial") && error.contains("delete"), "{error}");
        let wrong = Tensor::new("a".to_owned(), Dtype::I32, &[3], vec![0; 5]);
        output.add([wrong]).unwrap();
        assert!(output.finish(&json!({})).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
