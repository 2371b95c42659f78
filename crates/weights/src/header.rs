//! The header of a safetensors file, read strictly: every number is checked against the file before it is used. Not
//! the meaning of the tensors. Format: 8 bytes little-endian header length, JSON, then the data without holes.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::error::{Error, Result};

/// Largest header that is read, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;

/// Element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are those of the safetensors format")]
pub enum DiskType {
    Bool,
    U8,
    I8,
    F8E4m3,
    F8E5m2,
    F8E8m0,
    U16,
    I16,
    F16,
    Bf16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
}

impl DiskType {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "BOOL" => DiskType::Bool,
            "U8" => DiskType::U8,
            "I8" => DiskType::I8,
            "F8_E4M3" => DiskType::F8E4m3,
            "F8_E5M2" => DiskType::F8E5m2,
            "F8_E8M0" => DiskType::F8E8m0,
            "U16" => DiskType::U16,
            "I16" => DiskType::I16,
            "F16" => DiskType::F16,
            "BF16" => DiskType::Bf16,
            "U32" => DiskType::U32,
            "I32" => DiskType::I32,
            "F32" => DiskType::F32,
            "U64" => DiskType::U64,
            "I64" => DiskType::I64,
            "F64" => DiskType::F64,
            _ => return None,
        })
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DiskType::Bool | DiskType::U8 | DiskType::I8 => 1,
            DiskType::F8E4m3 | DiskType::F8E5m2 | DiskType::F8E8m0 => 1,
            DiskType::U16 | DiskType::I16 | DiskType::F16 | DiskType::Bf16 => 2,
            DiskType::U32 | DiskType::I32 | DiskType::F32 => 4,
            DiskType::U64 | DiskType::I64 | DiskType::F64 => 8,
        }
    }
}

/// One tensor of a shard; every field has been checked against the file.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Name as the file has it.
    pub name: String,
    /// Element type.
    pub dtype: DiskType,
    /// Dimensions; their product times the element size is `len`.
    pub shape: Vec<usize>,
    /// First byte, from the beginning of the file.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

/// Entries of a JSON object in order, where a repeated key is an error (serde_json alone would keep the last).
pub(crate) struct UniqueMap<V>(pub(crate) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut entries, mut seen) = (Vec::new(), HashSet::new());
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!("`{key}` appears twice")));
                    }
                    if key == "__metadata__" {
                        // The format allows strings only, so nothing can nest here.
                        map.next_value::<HashMap<String, String>>()?;
                    } else {
                        entries.push((key, map.next_value()?));
                    }
                }
                Ok(UniqueMap(entries))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Reads the header of the shard at `path`: its tensors in file order.
pub(crate) fn read_header(path: &Path) -> Result<Vec<TensorInfo>> {
    let io = |action: &'static str| {
        move |source| Error::Io { path: path.to_owned(), action, offset: None, source }
    };
    let mut file = File::open(path).map_err(io("cannot open"))?;
    let meta = file.metadata().map_err(io("cannot stat"))?;
    if !meta.is_file() {
        return Err(Error::Header { path: path.to_owned(), reason: "not a regular file".to_owned() });
    }
    parse_header(path, &mut file, meta.len())
}

/// Parses a header from `reader`, whose whole size is `file_len`.
pub(crate) fn parse_header(path: &Path, reader: &mut dyn Read, file_len: u64) -> Result<Vec<TensorInfo>> {
    let wrong = |reason: String| Error::Header { path: path.to_owned(), reason };
    let Some(after_length) = file_len.checked_sub(8) else {
        return Err(wrong(format!("{file_len} bytes is too short for a safetensors file")));
    };
    let mut length = [0; 8];
    let io = |offset| {
        move |source| Error::Io {
            path: path.to_owned(),
            action: "cannot read the header",
            offset: Some(offset),
            source,
        }
    };
    reader.read_exact(&mut length).map_err(io(0))?;
    let length = u64::from_le_bytes(length);
    if length > after_length {
        return Err(wrong(format!(
            "header length {length} exceeds the {after_length} bytes that follow; truncated?"
        )));
    }
    if length > MAX_HEADER {
        return Err(wrong(format!("header length {length} exceeds the limit of {MAX_HEADER}")));
    }
    let length =
        usize::try_from(length).map_err(|_| wrong(format!("header length {length} does not fit")))?;
    let mut json = vec![0; length];
    reader.read_exact(&mut json).map_err(io(8))?;
    let UniqueMap(entries) =
        serde_json::from_slice(&json).map_err(|source| Error::Json { path: path.to_owned(), source })?;
    check_entries(path, entries, 8 + length as u64, file_len)
}

/// Checks each entry, then that together they tile the data without hole or overlap.
fn check_entries(
    path: &Path,
    entries: Vec<(String, Entry)>,
    data_start: u64,
    file_len: u64,
) -> Result<Vec<TensorInfo>> {
    let data_len = file_len - data_start;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        tensors.push(check_entry(path, name, &entry, data_start, data_len)?);
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.len));
    let mut end = data_start;
    for tensor in &tensors {
        if tensor.offset != end {
            let what = if tensor.offset < end {
                "overlaps the tensor before it, which ends"
            } else {
                "leaves a hole after"
            };
            return Err(Error::Tensor {
                path: path.to_owned(),
                tensor: tensor.name.clone(),
                offset: tensor.offset - data_start,
                reason: format!("{what} at {}", end - data_start),
            });
        }
        end += tensor.len as u64;
    }
    if end != file_len {
        let reason = format!(
            "{} bytes follow the last tensor; the header does not describe this file",
            file_len - end
        );
        return Err(Error::Header { path: PathBuf::from(path), reason });
    }
    Ok(tensors)
}

fn check_entry(
    path: &Path,
    name: String,
    entry: &Entry,
    data_start: u64,
    data_len: u64,
) -> Result<TensorInfo> {
    let [begin, end] = entry.data_offsets;
    let wrong = |reason: String| {
        Err(Error::Tensor { path: path.to_owned(), tensor: name.clone(), offset: begin, reason })
    };
    let Some(dtype) = DiskType::parse(&entry.dtype) else {
        return wrong(format!("dtype `{}` is not known", entry.dtype));
    };
    if entry.shape.len() > MAX_DIMS {
        return wrong(format!("{} dimensions, at most {MAX_DIMS} are allowed", entry.shape.len()));
    }
    if begin > end {
        return wrong(format!("ends at {end}, before it begins"));
    }
    if end > data_len {
        return wrong(format!("ends at {end}, beyond the {data_len} bytes of data in the file; truncated?"));
    }
    let bytes = entry.shape.iter().try_fold(dtype.size() as u64, |all, &dim| all.checked_mul(dim));
    if bytes != Some(end - begin) {
        let needs = bytes.map_or("more than 2^64".to_owned(), |bytes| bytes.to_string());
        return wrong(format!(
            "{} {:?} needs {needs} bytes, its offsets give {}",
            entry.dtype,
            entry.shape,
            end - begin
        ));
    }
    let shape = entry.shape.iter().map(|&dim| usize::try_from(dim)).collect::<Result<Vec<_>, _>>();
    match (shape, usize::try_from(end - begin)) {
        (Ok(shape), Ok(len)) => Ok(TensorInfo { name, dtype, shape, offset: data_start + begin, len }),
        _ => wrong("does not fit the address space".to_owned()),
    }
}
