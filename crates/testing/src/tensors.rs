//! Golden tensors: a safetensors file read whole into plain vectors. For tests, not for weights (see `spark-weights`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::{Error, Result};

/// Elements of one tensor, row major.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// F32; F16 and BF16 are widened.
    F32(Vec<f32>),
    /// I32; I64 is narrowed when it fits.
    I32(Vec<i32>),
    /// U8.
    U8(Vec<u8>),
}

/// All tensors of one file.
#[derive(Debug, Clone)]
pub struct Tensors {
    path: PathBuf,
    map: BTreeMap<String, (Values, Vec<usize>)>,
}

impl Tensors {
    /// Reads a file below the fixtures folder, such as `vision/resize.safetensors`.
    ///
    /// # Errors
    /// As [`Tensors::open`].
    pub fn fixture(relative: &str) -> Result<Self> {
        Self::open(&crate::fixtures_dir().join(relative))
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Safetensors`], or [`Error::Dtype`] for an element type that [`Values`] cannot hold.
    pub fn open(path: &Path) -> Result<Self> {
        let path = path.to_owned();
        let bytes = fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|source| Error::Safetensors { path: path.clone(), source })?;
        let mut map = BTreeMap::new();
        for (name, view) in file.tensors() {
            let Some(values) = decode(view.dtype(), view.data()) else {
                let found = format!("{:?}", view.dtype());
                return Err(Error::Dtype {
                    path,
                    name,
                    found,
                    wanted: "F32, F16, BF16, I32, I64 in range or U8",
                });
            };
            map.insert(name, (values, view.shape().to_vec()));
        }
        Ok(Self { path, map })
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// Whether there is such a tensor.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// Values and shape of a tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn get(&self, name: &str) -> Result<(&Values, &[usize])> {
        match self.map.get(name) {
            Some((values, shape)) => Ok((values, shape)),
            None => Err(self.missing(name)),
        }
    }

    /// Values and shape of a float tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::Dtype`] when it is not a float tensor.
    pub fn f32(&self, name: &str) -> Result<(&[f32], &[usize])> {
        match self.get(name)? {
            (Values::F32(values), shape) => Ok((values, shape)),
            (other, _) => Err(self.wrong(name, other, "F32")),
        }
    }

    /// Values and shape of an integer tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::Dtype`] when it is not an integer tensor.
    pub fn i32(&self, name: &str) -> Result<(&[i32], &[usize])> {
        match self.get(name)? {
            (Values::I32(values), shape) => Ok((values, shape)),
            (other, _) => Err(self.wrong(name, other, "I32")),
        }
    }

    /// Values and shape of a byte tensor, such as an image `[height, width, 3]`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::Dtype`] when it is not a byte tensor.
    pub fn u8(&self, name: &str) -> Result<(&[u8], &[usize])> {
        match self.get(name)? {
            (Values::U8(values), shape) => Ok((values, shape)),
            (other, _) => Err(self.wrong(name, other, "U8")),
        }
    }

    fn missing(&self, name: &str) -> Error {
        let case = name.split('/').next().unwrap_or(name);
        let near = self.names().filter(|n| n.starts_with(case)).take(8).map(str::to_owned).collect();
        Error::MissingTensor { path: self.path.clone(), name: name.to_owned(), near }
    }

    fn wrong(&self, name: &str, values: &Values, wanted: &'static str) -> Error {
        let found = match values {
            Values::F32(_) => "F32",
            Values::I32(_) => "I32",
            Values::U8(_) => "U8",
        };
        Error::Dtype { path: self.path.clone(), name: name.to_owned(), found: found.to_owned(), wanted }
    }
}

/// `None` when the element type is not handled or an I64 does not fit.
fn decode(dtype: Dtype, data: &[u8]) -> Option<Values> {
    Some(match dtype {
        Dtype::F32 => Values::F32(words(data).map(f32::from_le_bytes).collect()),
        Dtype::F16 => Values::F32(words(data).map(|b| f16::from_le_bytes(b).to_f32()).collect()),
        Dtype::BF16 => Values::F32(words(data).map(|b| bf16::from_le_bytes(b).to_f32()).collect()),
        Dtype::I32 => Values::I32(words(data).map(i32::from_le_bytes).collect()),
        Dtype::I64 => {
            let narrow = words(data).map(|b| i32::try_from(i64::from_le_bytes(b)).ok());
            Values::I32(narrow.collect::<Option<_>>()?)
        }
        Dtype::U8 => Values::U8(data.to_vec()),
        _ => return None,
    })
}

/// `data` in pieces of `N` bytes; the safetensors reader has checked that they divide it.
fn words<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> {
    data.as_chunks::<N>().0.iter().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_bytes_and_shapes() {
        let t = Tensors::fixture("vision/decode.safetensors").unwrap();
        let (pixels, shape) = t.u8("rgb.png").unwrap();
        assert_eq!(shape, [37, 45, 3]);
        assert_eq!(pixels.len(), 37 * 45 * 3);
        assert!(matches!(t.f32("rgb.png"), Err(Error::Dtype { .. })));
        assert!(matches!(t.u8("rgb.gif"), Err(Error::MissingTensor { .. })));
    }

    #[test]
    fn widens_and_narrows() {
        let half = [bf16::from_f32(1.5).to_le_bytes(), bf16::from_f32(-2.0).to_le_bytes()].concat();
        assert_eq!(decode(Dtype::BF16, &half), Some(Values::F32(vec![1.5, -2.0])));
        let long = [(-3i64).to_le_bytes(), 7i64.to_le_bytes()].concat();
        assert_eq!(decode(Dtype::I64, &long), Some(Values::I32(vec![-3, 7])));
        assert_eq!(decode(Dtype::I64, &i64::MAX.to_le_bytes()), None);
        assert_eq!(decode(Dtype::F64, &[0; 8]), None);
    }
}
