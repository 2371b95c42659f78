//! Writes small checkpoints: tensors from numbers, packers written from the formats' definitions.

use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::{Checkpoint, LoadOptions, OpenOptions, ParamSpec, Params, Result};

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) fn raw(name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Tensor {
    Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
}

pub(crate) fn f32s(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    raw(name, "F32", shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

pub(crate) fn f16s(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    raw(name, "F16", shape, values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect())
}

pub(crate) fn bf16s(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    raw(name, "BF16", shape, values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect())
}

pub(crate) fn i32s(name: &str, shape: &[usize], words: &[u32]) -> Tensor {
    raw(name, "I32", shape, words.iter().flat_map(|word| word.to_le_bytes()).collect())
}

/// A whole safetensors file.
pub(crate) fn file(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut data = Vec::new();
    for tensor in tensors {
        let begin = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry =
            json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()] });
        header.insert(tensor.name.clone(), entry);
    }
    with_header(&Value::Object(header).to_string(), &data)
}

/// A file of any header and data.
pub(crate) fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A folder with one weight file.
pub(crate) fn folder(tensors: &[Tensor]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("model.safetensors"), file(tensors)).unwrap();
    dir
}

pub(crate) fn open(dir: &Path) -> Result<Checkpoint> {
    Checkpoint::open(dir.to_str().unwrap(), &OpenOptions::default())
}

/// Writes, opens and loads.
pub(crate) fn load(tensors: &[Tensor], specs: &[ParamSpec]) -> Result<Params> {
    let dir = folder(tensors);
    open(dir.path())?.load(specs, &LoadOptions::default())
}
