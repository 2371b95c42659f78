//! Random weights of the right shapes and of the scheme that a configuration names (`--load-format dummy`): the engine
//! at full size without a checkpoint. The text that such a model makes is noise.
//!
//! Sizes of activations stay from layer to layer: weights have mean 0 and mean square `1 / k`, norms are 1. Tokens have to stay
//! different as well, or all of them choose the same experts after some layers. Two things would make them alike: weights
//! with a common sign, hence the mean of 0; and attention, which with random weights adds about the same mean of all
//! values to every token, hence a small output of attention. The bytes of any two matrices are different.

use std::ops::Range;

use bytes::Bytes;
use half::{bf16, f16};
use serde_json::Value;
use spark_backend::{Dtype, Matrix, MatrixData, Rank};

use crate::error::{Error, Result};
use crate::fill::{Fill, Pattern, Seed, fill_all};
use crate::load::{build, option};
use crate::params::Params;
use crate::region::{aligned, within};
use crate::scheme::{NVFP4_GROUP, fp8_block};
use crate::shard::{cut, experts, part};
use crate::spec::{ParamKind, ParamSpec, Shard, join};
use crate::stream::{Give, Source, Stream};

/// How much smaller the output of attention is than its input.
const ATTENTION_GAIN: f32 = 0.25;

/// Scheme of the quantised layers of a dummy model.
#[derive(Debug, Clone, Copy, PartialEq)]
enum DummyScheme {
    Bf16,
    Int4 { group: usize, zeros: bool },
    Nvfp4,
    Fp8 { block: [usize; 2] },
}

/// Random parameters for `specs`, made as they are taken: `rank`'s shards of the same model on every rank, without making the
/// rest of it. `config` is a `config.json`; its `quantization_config` decides the scheme of the decoder's linear layers. Router, embedding, lm_head and vision tower are
/// BF16, as are layers whose inputs the scheme cannot pack. The same seed gives the same values.
///
/// # Errors
/// When a name is stated twice, or when the weights would not fit this machine's memory; when a parameter that cannot be split
/// over the ranks is taken.
pub fn dummy(config: &Value, specs: &[ParamSpec], seed: u64, rank: Rank) -> Result<Params> {
    let scheme = scheme_of(config);
    expect_memory(specs.iter().map(|spec| estimate(spec, scheme, rank)).sum())?;
    stream(scheme, specs, seed, rank)
}

/// As [`dummy`], for a device with memory of its own: only a few parameters at a time have to fit this machine's memory.
///
/// # Errors
/// As [`dummy`], where a parameter has to fit this machine's memory instead of all.
pub fn dummy_for_device(config: &Value, specs: &[ParamSpec], seed: u64, rank: Rank) -> Result<Params> {
    let scheme = scheme_of(config);
    expect_memory(specs.iter().map(|spec| estimate(spec, scheme, rank)).fold(0.0, f64::max))?;
    stream(scheme, specs, seed, rank)
}

fn expect_memory(needed: f64) -> Result<()> {
    let info = rustix::system::sysinfo();
    let memory = info.totalram as f64 * f64::from(info.mem_unit);
    if needed > memory {
        let reason = format!("the weights would take {needed:.3e} bytes, this machine has {memory:.3e}");
        return Err(option("dummy weights", reason));
    }
    Ok(())
}

fn stream(scheme: DummyScheme, specs: &[ParamSpec], seed: u64, rank: Rank) -> Result<Params> {
    let mut names = std::collections::HashMap::with_capacity(specs.len());
    for (index, spec) in specs.iter().enumerate() {
        if names.insert(spec.name.clone(), index).is_some() {
            return Err(Error::Param { name: spec.name.clone(), reason: "is stated twice".to_owned() });
        }
    }
    let source = Dummy { scheme, specs: specs.to_vec(), seed, rank };
    Ok(Params::of_stream(Stream::new(names, Box::new(source), 1)?))
}

/// Makes parameters.
struct Dummy {
    scheme: DummyScheme,
    specs: Vec<ParamSpec>,
    seed: u64,
    rank: Rank,
}

impl Source for Dummy {
    fn sizes(&self) -> Vec<u64> {
        self.specs.iter().map(|spec| estimate(spec, self.scheme, self.rank) as u64).collect()
    }

    fn make(&self, indices: std::ops::Range<usize>, give: Give<'_>) -> Result<()> {
        for index in indices {
            let spec = &self.specs[index];
            let mut random = Maker { seed: Seed::new(self.seed, &spec.name), fills: Vec::new() };
            let (drafts, floats) = self.drafts(spec, &mut random)?;
            let mut buffers = fill_all(&random.fills).into_iter();
            let matrices =
                drafts.into_iter().map(|draft| draft.finish(spec, &mut buffers)).collect::<Result<_>>()?;
            give(index, build(spec, matrices, floats, self.rank)?)?;
        }
        Ok(())
    }
}

impl Dummy {
    /// The matrices of a parameter, to be filled, and its float values.
    fn drafts(&self, spec: &ParamSpec, random: &mut Maker) -> Result<(Vec<Draft>, Vec<Vec<f32>>)> {
        let (mut drafts, mut floats) = (Vec::new(), Vec::new());
        let kept = |slot, shape| part(spec, slot, shape, self.rank);
        match &spec.kind {
            &ParamKind::Vector { shape: [rows, cols] } => floats.push(random.vector(&spec.name, rows * cols)),
            ParamKind::Linear { parts, k, bias } => {
                for (slot, (part, n)) in parts.iter().enumerate() {
                    let module = join(&spec.name, part);
                    let gain = if module.ends_with("o_proj") { ATTENTION_GAIN } else { 1.0 };
                    let (shape, scheme) = ([*n, *k], part_scheme(&module, self.scheme));
                    let (count, seed) = (spec.shard.matrices(), random.seed);
                    let rows = n / count;
                    for matrix in 0..count {
                        // All are rows of one matrix, as they would be stored.
                        random.seed = seed;
                        let [kept, columns] = kept(slot, [rows, *k])?;
                        let kept = kept.start + matrix * rows..kept.end + matrix * rows;
                        drafts.push(random.matrix(shape, scheme, gain, [kept, columns]));
                    }
                    if *bias {
                        floats.push(vec![0.0; *n]);
                    }
                }
            }
            &ParamKind::Experts { num_experts, hidden, intermediate } => {
                let shapes = [[intermediate, hidden], [intermediate, hidden], [hidden, intermediate]];
                let held = experts(spec, self.rank)?;
                for slot in 0..3 * num_experts {
                    let shape = shapes[slot % 3];
                    let fills = random.fills.len();
                    let draft = random.matrix(shape, self.scheme, 1.0, kept(slot, shape)?);
                    if held.contains(&(slot / 3)) {
                        drafts.push(draft);
                    } else {
                        // Only its seeds are used up: every rank has the experts of the same model.
                        random.fills.truncate(fills);
                    }
                }
            }
        }
        Ok((drafts, floats))
    }
}

/// About the bytes of a rank's part of a parameter. In floating point: a configuration alone may claim any size.
fn estimate(spec: &ParamSpec, scheme: DummyScheme, rank: Rank) -> f64 {
    // What a matrix takes beside its weights, so that endless empty ones count too.
    const EACH: f64 = 64.0;
    let bytes = |scheme| match scheme {
        DummyScheme::Bf16 => 2.0,
        DummyScheme::Int4 { .. } | DummyScheme::Nvfp4 => 0.5,
        DummyScheme::Fp8 { .. } => 1.0,
    };
    let whole: f64 = match &spec.kind {
        ParamKind::Vector { shape: [rows, cols] } => 4.0 * *rows as f64 * *cols as f64,
        ParamKind::Linear { parts, k, .. } => parts
            .iter()
            .map(|(part, n)| {
                EACH + *n as f64 * *k as f64 * bytes(part_scheme(&join(&spec.name, part), scheme))
            })
            .sum(),
        ParamKind::Experts { num_experts, hidden, intermediate } => {
            3.0 * *num_experts as f64 * (EACH + *hidden as f64 * *intermediate as f64 * bytes(scheme))
        }
    };
    if spec.shard == Shard::Replicated { whole } else { whole / rank.world() as f64 }
}

/// The scheme of a linear layer in a model of `scheme`, as published checkpoints have it.
fn part_scheme(module: &str, scheme: DummyScheme) -> DummyScheme {
    let is_plain = ["visual", "embed_tokens", "lm_head"].iter().any(|part| module.contains(part));
    if is_plain || module.ends_with("mlp.gate") { DummyScheme::Bf16 } else { scheme }
}

fn scheme_of(config: &Value) -> DummyScheme {
    let quantization = &config["quantization_config"];
    let method = quantization["quant_method"].as_str().unwrap_or("");
    let format = quantization["format"].as_str().unwrap_or("");
    let algorithm = quantization["quant_algo"].as_str().unwrap_or("");
    let groups = quantization["config_groups"].as_object();
    let weights = groups.and_then(|groups| groups.values().next()).map(|group| &group["weights"]);
    let size =
        |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0);
    match (method, format, algorithm) {
        ("awq", ..) => {
            DummyScheme::Int4 { group: size(&quantization["group_size"]).unwrap_or(128), zeros: true }
        }
        (_, "nvfp4-pack-quantized", _) => DummyScheme::Nvfp4,
        (_, "pack-quantized", _) => {
            let weights = weights.unwrap_or(&Value::Null);
            let group = size(&weights["group_size"]).unwrap_or(128);
            DummyScheme::Int4 { group, zeros: weights["symmetric"] == false }
        }
        ("modelopt", _, algorithm) if algorithm.contains("NVFP4") => DummyScheme::Nvfp4,
        ("fp8", ..) | (_, "float-quantized", _) => DummyScheme::Fp8 { block: fp8_block(config) },
        ("modelopt", _, algorithm) if algorithm.contains("FP8") => {
            DummyScheme::Fp8 { block: fp8_block(config) }
        }
        _ => DummyScheme::Bf16,
    }
}

/// A region of a matrix whose random bytes are still to be made: its values or codes, then its zero points where it has any.
struct Draft {
    n: usize,
    k: usize,
    data: MatrixData,
    /// Rows and columns that the rank keeps of it.
    keep: [Range<usize>; 2],
}

impl Draft {
    fn finish(self, spec: &ParamSpec, buffers: &mut impl Iterator<Item = Vec<u8>>) -> Result<Matrix> {
        let Self { n, k, mut data, keep: [rows, columns] } = self;
        let mut next = || Bytes::from(buffers.next().unwrap_or_default());
        match &mut data {
            MatrixData::Dense { values, .. } | MatrixData::Fp8 { values, .. } => *values = next(),
            MatrixData::Nvfp4 { codes, .. } => *codes = next(),
            MatrixData::Int4 { codes, zeros, .. } => {
                *codes = next();
                if let Some(zeros) = zeros {
                    *zeros = next();
                }
            }
        }
        cut(spec, Matrix { n, k, data }, rows, columns)
    }
}

/// Plans the random bytes of a parameter.
struct Maker {
    seed: Seed,
    fills: Vec<Fill>,
}

/// A part of a matrix: whole groups and blocks.
struct Region {
    /// `[n, k]` of the matrix.
    whole: [usize; 2],
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Maker {
    /// Random bytes for a region of a buffer that has one for every `per` inputs, `size` of them each.
    fn fill(&mut self, region: &Region, [per, size]: [usize; 2], pattern: Pattern) -> Bytes {
        let [rows, k] = region.whole;
        let bytes = |column: usize| column.div_ceil(per) * size;
        self.fills.push(Fill {
            rows,
            stride: bytes(k),
            wanted: region.rows.clone(),
            bytes: bytes(region.columns.start)..bytes(region.columns.end),
            seed: self.seed.next(),
            pattern,
        });
        Bytes::new()
    }

    /// Norm weights are one, other tables small.
    fn vector(&mut self, name: &str, len: usize) -> Vec<f32> {
        if name.contains("norm") {
            let value = if name.ends_with("bias") { 0.0 } else { 1.0 };
            return vec![value; len];
        }
        (0..len).map(|_| (self.seed.next().number() >> 40) as f32 / (1 << 24) as f32 * 0.04 - 0.02).collect()
    }

    /// The region that holds some rows and columns of a matrix `[n, k]` of values of about `gain / sqrt(k)`.
    fn matrix(
        &mut self,
        [n, k]: [usize; 2],
        scheme: DummyScheme,
        gain: f32,
        [rows, columns]: [Range<usize>; 2],
    ) -> Draft {
        let scheme = match scheme {
            DummyScheme::Int4 { group, .. } if !k.is_multiple_of(group) || !k.is_multiple_of(2) => {
                DummyScheme::Bf16
            }
            DummyScheme::Nvfp4 if !k.is_multiple_of(NVFP4_GROUP) => DummyScheme::Bf16,
            scheme => scheme,
        };
        let units = match scheme {
            DummyScheme::Int4 { group, .. } => [1, group],
            DummyScheme::Nvfp4 => [1, NVFP4_GROUP],
            DummyScheme::Fp8 { block } => block,
            DummyScheme::Bf16 => [1, 1],
        };
        let region = Region {
            whole: [n, k],
            rows: aligned(&rows, units[0], n),
            columns: aligned(&columns, units[1], k),
        };
        let keep = [within(&rows, &region.rows), within(&columns, &region.columns)];
        let data = self.data(&region, scheme, gain / (k.max(1) as f32).sqrt());
        Draft { n: region.rows.len(), k: region.columns.len(), data, keep }
    }

    /// Values of about `typical`.
    fn data(&mut self, region: &Region, scheme: DummyScheme, typical: f32) -> MatrixData {
        let (n, k) = (region.rows.len(), region.columns.len());
        match scheme {
            DummyScheme::Int4 { group, zeros } => {
                // Codes 0 to 15 around 7.5, or 1 to 15 around 8.
                let spread = if zeros { 4.6 } else { 4.5 };
                let codes = if zeros { Pattern::Any } else { Pattern::Codes1To15 };
                MatrixData::Int4 {
                    codes: self.fill(region, [2, 1], codes),
                    zeros: zeros.then(|| self.fill(region, [group, 1], Pattern::Bytes7Or8)),
                    scales: f16::from_f32(typical / spread).to_le_bytes().repeat(n * k / group).into(),
                    scale_dtype: Dtype::F16,
                    group_size: group,
                }
            }
            DummyScheme::Nvfp4 => MatrixData::Nvfp4 {
                codes: self.fill(region, [2, 1], Pattern::Any),
                // E4M3 1.0
                scales: vec![0x38; n * k / NVFP4_GROUP].into(),
                alpha: typical / 2.9,
            },
            DummyScheme::Fp8 { block } => MatrixData::Fp8 {
                // Sign, exponents of 1/8 to 1 (0x20 to 0x3f), any mantissa: never the NaN codes.
                values: self.fill(region, [1, 1], Pattern::Bits { keep: [0x9f; 8], set: [0x20; 8] }),
                scales: vec![typical; n.div_ceil(block[0]) * k.div_ceil(block[1])],
                block,
            },
            DummyScheme::Bf16 => {
                // Random sign and mantissa under one exponent, four numbers a word: their size is 1.53 times the power of two,
                // so with the power next to `typical / 1.53` within a factor of the root of 2.
                let power = typical / 1.53 * std::f32::consts::SQRT_2;
                let [low, high] = (bf16::from_f32(power).to_bits() & 0x7f80).to_le_bytes();
                let set = [low, high, low, high, low, high, low, high];
                let keep = [0x7f, 0x80, 0x7f, 0x80, 0x7f, 0x80, 0x7f, 0x80];
                let values = self.fill(region, [1, 2], Pattern::Bits { keep, set });
                MatrixData::Dense { dtype: Dtype::Bf16, values }
            }
        }
    }
}
