//! Weight rows that are all zero: what is left of a file that was not written to its end, or of a tool that went wrong. They
//! are told by name and loaded all the same, because padded vocabularies and pruned experts look alike.

use std::sync::Mutex;

use spark_backend::{Dtype, Matrix, MatrixData, VectorWeight};

use crate::load::lock;
use crate::scheme::NVFP4_GROUP;
use crate::spec::{ParamKind, ParamSpec, Shard, join};

/// Names that are told; of the others the number.
const MAX_NAMES: usize = 8;

/// What loading finds on its way, told when all is loaded.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    names: Vec<String>,
    weights: u64,
    rows: u64,
}

impl Findings {
    /// Looks at a matrix that a rank keeps, which is number `slot` of `spec`.
    pub(crate) fn look_at(&self, spec: &ParamSpec, slot: usize, matrix: &Matrix) {
        let rows = zero_rows(matrix);
        let padding = (0..matrix.n).rev().zip(rows.iter().rev()).take_while(|(a, b)| a == *b).count();
        // A vocabulary is often filled up to a round size.
        let is_padded = spec.shard == Shard::Vocab && padding < matrix.n;
        self.note(rows.len() - if is_padded { padding } else { 0 }, matrix.n, || name(spec, slot));
    }

    /// Looks at the weights of a norm or a table.
    pub(crate) fn look_at_vector(&self, spec: &ParamSpec, vector: &VectorWeight) {
        let [rows, columns] = vector.shape;
        // A bias may well be zero.
        if columns > 0 && !spec.name.ends_with("bias") {
            let is_zero = |row: &&[f32]| row.iter().all(|&value| value == 0.0);
            self.note(vector.values.chunks_exact(columns).filter(is_zero).count(), rows, || {
                spec.name.clone()
            });
        }
    }

    fn note(&self, zero: usize, rows: usize, name: impl Fn() -> String) {
        if zero == 0 {
            return;
        }
        let mut found = lock(&self.found);
        found.weights += 1;
        found.rows += zero as u64;
        if found.names.len() < MAX_NAMES {
            found.names.push(format!("{} ({zero} of {rows})", name()));
        }
    }

    /// What was found since the last call, in one sentence.
    pub(crate) fn message(&self) -> Option<String> {
        let Found { names, weights, rows } = std::mem::take(&mut *lock(&self.found));
        if names.is_empty() {
            return None;
        }
        let more = weights - names.len() as u64;
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Some(format!(
            "{rows} rows of {weights} weights are all zero: {}{more}; unless they are padding, the checkpoint is damaged",
            names.join(", ")
        ))
    }

    /// Logs it.
    pub(crate) fn tell(&self) {
        if let Some(message) = self.message() {
            tracing::warn!("{message}");
        }
    }
}

/// What matrix `slot` of a parameter is called.
fn name(spec: &ParamSpec, slot: usize) -> String {
    match &spec.kind {
        ParamKind::Linear { parts, .. } => join(&spec.name, parts.get(slot).map_or("", |part| &part.0)),
        ParamKind::Experts { .. } => {
            let projection = ["gate_proj", "up_proj", "down_proj"][slot % 3];
            format!("{}.{}.{projection}", spec.name, slot / 3)
        }
        ParamKind::Vector { .. } => spec.name.clone(),
    }
}

/// Rows of which every weight is zero. An ordinary row is left at its first group, so most bytes are not looked at.
fn zero_rows(matrix: &Matrix) -> Vec<usize> {
    let &Matrix { n, k, ref data } = matrix;
    if k == 0 {
        return Vec::new();
    }
    let find = |is_zero: &dyn Fn(usize) -> bool| (0..n).filter(|&row| is_zero(row)).collect();
    match data {
        MatrixData::Dense { dtype, values } => {
            let width = k * dtype.size();
            find(&|row| is_zero(&values[row * width..][..width], *dtype))
        }
        MatrixData::Int4 { codes, zeros, scales, scale_dtype, group_size } => {
            let (groups, size) = (k.div_ceil(*group_size), scale_dtype.size());
            find(&|row| {
                let codes = codes[row * k / 2..][..k / 2].chunks(group_size / 2);
                codes.enumerate().all(|(group, codes)| {
                    let at = row * groups + group;
                    let zero = zeros.as_ref().map_or(8, |zeros| zeros[at]);
                    let both = zero | zero << 4;
                    codes.iter().all(|&byte| byte == both)
                        || is_zero(&scales[at * size..][..size], *scale_dtype)
                })
            })
        }
        MatrixData::Nvfp4 { codes, scales, alpha } => {
            let groups = k.div_ceil(NVFP4_GROUP);
            // Both zeros of E2M1, both of E4M3.
            find(&|row| {
                let codes = codes[row * k / 2..][..k / 2].chunks(NVFP4_GROUP / 2);
                let mut groups = codes.zip(&scales[row * groups..][..groups]);
                *alpha == 0.0
                    || groups
                        .all(|(codes, scale)| scale & 0x7f == 0 || codes.iter().all(|&byte| byte & 0x77 == 0))
            })
        }
        MatrixData::Fp8 { values, scales, block } => {
            let blocks = k.div_ceil(block[1]);
            find(&|row| {
                let scales = &scales[row / block[0] * blocks..][..blocks];
                let mut parts = values[row * k..][..k].chunks(block[1]).zip(scales);
                parts.all(|(values, &scale)| scale == 0.0 || values.iter().all(|&value| value & 0x7f == 0))
            })
        }
    }
}

/// Whether all values are a zero of either sign.
fn is_zero(bytes: &[u8], dtype: Dtype) -> bool {
    match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().all(|&word| u32::from_le_bytes(word) << 1 == 0),
        Dtype::F16 | Dtype::Bf16 => {
            bytes.as_chunks::<2>().0.iter().all(|&word| u16::from_le_bytes(word) << 1 == 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// Three rows of 64 inputs, ordinary but for row 1, which is zero in a way of its own.
    fn matrices() -> Vec<(&'static str, MatrixData)> {
        let rows =
            |ordinary: Vec<u8>, zero: Vec<u8>| -> Bytes { [&ordinary[..], &zero, &ordinary].concat().into() };
        let half = |value: f32| half::f16::from_f32(value).to_le_bytes().to_vec();
        // Only the last value of a row is other than zero.
        let last = |len: usize, value: u8| [vec![0; len - 1], vec![value]].concat();
        let int4 = |codes, zeros: Option<Vec<u8>>, scales: Bytes| MatrixData::Int4 {
            codes,
            zeros: zeros.map(Bytes::from),
            scales,
            scale_dtype: Dtype::F16,
            group_size: 32,
        };
        let ones = rows([half(1.0), half(1.0)].concat(), [half(1.0), half(1.0)].concat());
        let negative = [[0, 0x80].repeat(63), vec![0, 0]].concat();
        let fp8 = |values, scales| MatrixData::Fp8 { values, scales, block: [1, 32] };
        let nvfp4 = |codes, scales| MatrixData::Nvfp4 { codes, scales, alpha: 1.0 };
        vec![
            ("bf16", MatrixData::Dense { dtype: Dtype::Bf16, values: rows(last(128, 1), negative) }),
            ("f32", MatrixData::Dense { dtype: Dtype::F32, values: rows(last(256, 1), vec![0; 256]) }),
            ("int4", int4(rows([vec![0x88; 31], vec![0x87]].concat(), vec![0x88; 32]), None, ones.clone())),
            (
                "int4 with zero points",
                int4(
                    rows(vec![0x31; 32], [vec![0x55; 16], vec![0x33; 16]].concat()),
                    Some(vec![1, 3, 5, 3, 1, 3]),
                    ones,
                ),
            ),
            (
                "int4 without scales",
                int4(
                    rows(vec![0x31; 32], vec![0x31; 32]),
                    None,
                    rows([half(0.0), half(1.0)].concat(), half(0.0).repeat(2)),
                ),
            ),
            ("nvfp4", nvfp4(rows(last(32, 0x10), vec![0x80; 32]), vec![0x38; 12].into())),
            ("nvfp4 without scales", nvfp4(vec![0x11; 96].into(), rows(last(4, 0x38), vec![0x80; 4]))),
            ("fp8", fp8(rows(last(64, 0x81), vec![0x80; 64]), vec![1.0; 6])),
            ("fp8 without scales", fp8(vec![0x38; 192].into(), vec![0.0, 1.0, 0.0, 0.0, 1.0, 0.0])),
        ]
    }

    #[test]
    fn zero_rows_of_every_scheme_are_counted_and_named() {
        let spec = ParamSpec::experts("model.layers.3.mlp.experts", 9, 1, 1);
        for (slot, (kind, data)) in matrices().into_iter().enumerate() {
            let findings = Findings::default();
            findings.look_at(&spec, slot, &Matrix { n: 3, k: 64, data });
            let message = findings.message().unwrap_or_default();
            let projection = ["gate_proj", "up_proj", "down_proj"][slot % 3];
            let name = format!("model.layers.3.mlp.experts.{}.{projection} (1 of 3)", slot / 3);
            assert!(
                message.starts_with("1 rows of 1 weights") && message.contains(&name),
                "{kind}: {message}"
            );
            assert_eq!(findings.message(), None, "told once");
        }
    }

    #[test]
    fn the_padding_of_a_vocabulary_does_not_count() {
        for (values, want) in [
            ([1.0, 0.0, 2.0, 0.0, 0.0], Some("1 of 5")),
            ([0.0; 5], Some("5 of 5")),
            ([1.0, 2.0, 1.0, 0.0, -0.0], None),
        ] {
            let values = values.iter().flat_map(|value: &f32| value.to_le_bytes()).collect();
            let matrix = Matrix { n: 5, k: 1, data: MatrixData::Dense { dtype: Dtype::F32, values } };
            let findings = Findings::default();
            findings.look_at(&ParamSpec::linear("lm_head", 5, 1, Shard::Vocab), 0, &matrix);
            let message = findings.message();
            assert_eq!(message.is_some(), want.is_some());
            assert!(message.unwrap_or_default().contains(want.unwrap_or_default()));
        }
    }

    #[test]
    fn vectors_count_and_names_do_not_pile_up() {
        let findings = Findings::default();
        let vector = |values: Vec<f32>| VectorWeight { shape: [values.len() / 2, 2], values };
        findings.look_at_vector(&ParamSpec::vector("norm.bias", [1, 2]), &vector(vec![0.0; 2]));
        findings.look_at_vector(&ParamSpec::vector("norm.weight", [2, 2]), &vector(vec![0.0, 1.0, 1.0, 0.0]));
        assert_eq!(findings.message(), None);
        findings
            .look_at_vector(&ParamSpec::vector("norm.weight", [2, 2]), &vector(vec![0.0, -0.0, 1.0, 0.0]));
        let spec = ParamSpec::fused("attn", &[("q", 1), ("k", 1)], 1, Shard::Rows);
        for i in 0..20 {
            let data = MatrixData::Dense { dtype: Dtype::F32, values: vec![0; 4].into() };
            findings.look_at(&spec, i % 2, &Matrix { n: 1, k: 1, data });
        }
        let message = findings.message().unwrap();
        assert!(message.starts_with(
            "21 rows of 21 weights are all zero: norm.weight (1 of 2), attn.q (1 of 1), attn.k"
        ));
        assert!(message.contains(" and 13 more;"), "{message}");
    }
}
