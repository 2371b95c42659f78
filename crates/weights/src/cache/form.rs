//! The forms of parameters without their bytes: what the index of a cache holds. Bytes are numbered in the order in which
//! they lie in the file.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use spark_backend::{Dtype, ExpertsWeight, LinearWeight, Matrix, MatrixData, VectorWeight};

use crate::params::Param;

/// A parameter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Form {
    Vector([usize; 2]),
    Linear(Layer),
    /// `gate_up` and `down` of each expert.
    Experts(Vec<(Layer, Layer)>),
}

/// A linear layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Layer {
    parts: Vec<(usize, usize, Scheme)>,
    has_bias: bool,
}

/// A scheme of a matrix and its sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Scheme {
    Dense(Type),
    Int4 { has_zeros: bool, scale: Type, group: usize },
    Nvfp4 { alpha: u32 },
    Fp8 { block: [usize; 2] },
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum Type {
    F32,
    F16,
    Bf16,
}

impl From<Dtype> for Type {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Type::F32,
            Dtype::F16 => Type::F16,
            Dtype::Bf16 => Type::Bf16,
        }
    }
}

impl From<Type> for Dtype {
    fn from(dtype: Type) -> Self {
        match dtype {
            Type::F32 => Dtype::F32,
            Type::F16 => Dtype::F16,
            Type::Bf16 => Dtype::Bf16,
        }
    }
}

/// Takes a parameter apart.
pub(super) fn apart(param: &Param) -> (Form, Vec<Bytes>) {
    let mut blobs = Vec::new();
    let form = match param {
        Param::Vector(vector) => {
            blobs.push(bytes_of(&vector.values));
            Form::Vector(vector.shape)
        }
        Param::Linear(weight) => Form::Linear(layer_apart(weight, &mut blobs)),
        Param::Experts(weight) => {
            let mut expert = |(gate_up, down): &(LinearWeight, LinearWeight)| {
                (layer_apart(gate_up, &mut blobs), layer_apart(down, &mut blobs))
            };
            Form::Experts(weight.experts.iter().map(&mut expert).collect())
        }
    };
    (form, blobs)
}

fn layer_apart(weight: &LinearWeight, blobs: &mut Vec<Bytes>) -> Layer {
    let mut parts = Vec::with_capacity(weight.parts.len());
    for Matrix { n, k, data } in &weight.parts {
        let scheme = match data {
            MatrixData::Dense { dtype, values } => {
                blobs.push(values.clone());
                Scheme::Dense((*dtype).into())
            }
            MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
                blobs.extend([codes.clone(), scales.clone()]);
                blobs.extend(zeros.clone());
                Scheme::Int4 { has_zeros: zeros.is_some(), scale: (*scale_dtype).into(), group: *group_size }
            }
            MatrixData::Nvfp4 { codes, scales, alpha } => {
                blobs.extend([codes.clone(), scales.clone()]);
                Scheme::Nvfp4 { alpha: alpha.to_bits() }
            }
            MatrixData::Fp8 { values, scales, block } => {
                blobs.extend([values.clone(), bytes_of(scales)]);
                Scheme::Fp8 { block: *block }
            }
        };
        parts.push((*n, *k, scheme));
    }
    blobs.extend(weight.bias.as_deref().map(bytes_of));
    Layer { parts, has_bias: weight.bias.is_some() }
}

/// Puts a parameter together again; `None` when there are not as many blobs as its form asks for.
pub(super) fn together(form: &Form, blobs: Vec<Bytes>) -> Option<Param> {
    let mut blobs = blobs.into_iter();
    let param = match form {
        Form::Vector(shape) => {
            Param::Vector(VectorWeight { values: floats_of(&blobs.next()?), shape: *shape })
        }
        Form::Linear(layer) => Param::Linear(layer_together(layer, &mut blobs)?),
        Form::Experts(experts) => {
            let mut expert = |(gate_up, down): &(Layer, Layer)| {
                Some((layer_together(gate_up, &mut blobs)?, layer_together(down, &mut blobs)?))
            };
            Param::Experts(ExpertsWeight { experts: experts.iter().map(&mut expert).collect::<Option<_>>()? })
        }
    };
    blobs.next().is_none().then_some(param)
}

fn layer_together(layer: &Layer, blobs: &mut impl Iterator<Item = Bytes>) -> Option<LinearWeight> {
    let mut parts = Vec::with_capacity(layer.parts.len());
    for &(n, k, ref scheme) in &layer.parts {
        let data = match *scheme {
            Scheme::Dense(dtype) => MatrixData::Dense { dtype: dtype.into(), values: blobs.next()? },
            Scheme::Int4 { has_zeros, scale, group } => {
                let (codes, scales) = (blobs.next()?, blobs.next()?);
                let zeros = if has_zeros { Some(blobs.next()?) } else { None };
                MatrixData::Int4 { codes, zeros, scales, scale_dtype: scale.into(), group_size: group }
            }
            Scheme::Nvfp4 { alpha } => {
                let (codes, scales) = (blobs.next()?, blobs.next()?);
                MatrixData::Nvfp4 { codes, scales, alpha: f32::from_bits(alpha) }
            }
            Scheme::Fp8 { block } => {
                let (values, scales) = (blobs.next()?, floats_of(&blobs.next()?));
                MatrixData::Fp8 { values, scales, block }
            }
        };
        parts.push(Matrix { n, k, data });
    }
    let bias = if layer.has_bias { Some(floats_of(&blobs.next()?)) } else { None };
    Some(LinearWeight { parts, bias })
}

fn bytes_of(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}
