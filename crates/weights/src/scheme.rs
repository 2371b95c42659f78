//! Which quantisation scheme a stored weight has, decided from its own tensors: their names, dtypes and shapes. Never
//! from a configuration's ignore list, which published checkpoints get wrong. Reads no data.

use std::cell::RefCell;

use serde_json::Value;
use spark_backend::Dtype;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::header::DiskType;

/// Inputs per scale of NVFP4.
pub(crate) const NVFP4_GROUP: usize = 16;

/// A scheme and what is needed to read it. The comment is the order of the segments.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Scheme {
    /// `weight`
    Dense { dtype: Dtype },
    /// `qweight, qzeros, scales`: `[k, n / 8]`, `[k / group, n / 8]`, `[k / group, n]`
    Awq { group: usize, scale_dtype: Dtype },
    /// `weight_packed, weight_scale[, weight_zero_point][, weight_shape]`: `[n, k / 8]`, `[n, k / group]`,
    /// `[n / 8, k / group]`, `[2]`, where `shape` is what the last has to say.
    PackedInt4 { group: usize, scale_dtype: Dtype, zeros: bool, shape: Option<[usize; 2]> },
    /// `codes, scales, global`: `[n, k / 2]`, `[n, k / 16]`, one or one per output
    Nvfp4 { divide: bool },
    /// `values, scales`: `[n, k]`, `[ceil(n / block[0]), ceil(k / block[1])]`
    Fp8 { block: [usize; 2], scale_dtype: DiskType },
}

impl Scheme {
    /// The name that `inspect` prints.
    pub(crate) fn label(&self) -> String {
        match self {
            Scheme::Dense { dtype: Dtype::F32 } => "f32".to_owned(),
            Scheme::Dense { dtype: Dtype::F16 } => "f16".to_owned(),
            Scheme::Dense { dtype: Dtype::Bf16 } => "bf16".to_owned(),
            Scheme::Awq { group, .. } => format!("awq-int4-g{group}"),
            Scheme::PackedInt4 { group, zeros: false, .. } => format!("w4a16-g{group}"),
            Scheme::PackedInt4 { group, .. } => format!("w4a16-g{group}-asymmetric"),
            Scheme::Nvfp4 { .. } => "nvfp4".to_owned(),
            Scheme::Fp8 { block: [rows, _], .. } if *rows == 1 => "fp8-channel".to_owned(),
            Scheme::Fp8 { block: [rows, columns], .. } => format!("fp8-block-{rows}x{columns}"),
        }
    }
}

/// A byte range of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) tensor: usize,
    /// From the beginning of the file.
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

/// A weight as it is stored: `[n, k]`, or `[k, n]` if `transposed`, of `outputs` matrices of `n / outputs` rows each.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    pub(crate) scheme: Scheme,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) outputs: usize,
    pub(crate) transposed: bool,
}

/// The shape that a model wants of a weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Matrices stacked along the rows (2 for a fused gate and up).
    pub(crate) outputs: usize,
    pub(crate) transposed: bool,
}

/// A tensor, or one expert's part of a stacked one.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) dtype: DiskType,
    pub(crate) shape: Vec<usize>,
    pub(crate) segment: Segment,
}

/// The tensors of one linear layer.
pub(crate) struct Module<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) used: &'a RefCell<Vec<bool>>,
    /// Normalised name without `.weight`.
    pub(crate) base: String,
    /// Expert and number of experts, when the tensors are stacked over experts.
    pub(crate) stacked: Option<(usize, usize)>,
    /// `[rows, columns]` of FP8 blocks according to the configuration.
    pub(crate) fp8_block: [usize; 2],
}

impl Module<'_> {
    /// Whether there is a weight, of any scheme.
    pub(crate) fn exists(&self) -> bool {
        ["weight", "weight_packed", "qweight"].iter().any(|kind| self.locate(kind).is_some())
    }

    /// Position of a companion tensor. Stacked experts also come as `base` itself, `base_weight_scale`,
    /// `base_scale_inv`.
    pub(crate) fn locate(&self, kind: &str) -> Option<usize> {
        let base = &self.base;
        if let Some(found) = self.checkpoint.find(&format!("{base}.{kind}")) {
            return Some(found);
        }
        self.stacked?;
        if kind == "weight" {
            return self.checkpoint.find(base);
        }
        let short = kind.strip_prefix("weight_");
        self.checkpoint
            .find(&format!("{base}_{kind}"))
            .or_else(|| self.checkpoint.find(&format!("{base}_{}", short?)))
    }

    /// The view of a companion, which is from now on consumed.
    fn view(&self, kind: &str) -> Result<Option<View>> {
        let Some(tensor) = self.locate(kind) else { return Ok(None) };
        self.used.borrow_mut()[tensor] = true;
        let info = &self.checkpoint.tensors[tensor].info;
        let mut view = View {
            dtype: info.dtype,
            shape: info.shape.clone(),
            segment: Segment { tensor, offset: info.offset, len: info.len },
        };
        let shared = info.len == info.dtype.size();
        if let Some((expert, experts)) = self.stacked.filter(|_| !shared) {
            if info.shape.first() != Some(&experts) {
                return Err(self.mismatch(&view, &format!("[{experts}, ..], stacked over experts")));
            }
            view.shape.remove(0);
            view.segment.len = info.len / experts;
            view.segment.offset += (expert * view.segment.len) as u64;
        }
        Ok(Some(view))
    }

    /// The view of a companion that `scheme` cannot do without.
    fn need(&self, kind: &str, scheme: &'static str) -> Result<View> {
        self.view(kind)?.ok_or_else(|| Error::MissingCompanion {
            module: self.base.clone(),
            scheme,
            wanted: format!("`{}.{kind}`", self.base),
        })
    }

    fn unsupported(&self, reason: impl Into<String>) -> Error {
        Error::Unsupported { module: self.base.clone(), reason: reason.into() }
    }

    /// The error of a tensor whose shape or dtype is not `expected`.
    fn mismatch(&self, view: &View, expected: &str) -> Error {
        let tensor = view.segment.tensor;
        Error::Mismatch {
            path: self.checkpoint.path_of(tensor).to_owned(),
            tensor: self.checkpoint.tensors[tensor].info.name.clone(),
            reason: format!("is {:?} {:?}, expected {expected}", view.dtype, view.shape),
        }
    }

    fn expect(&self, view: &View, dtype: DiskType, shape: [usize; 2]) -> Result<()> {
        if view.dtype == dtype && view.shape == shape {
            return Ok(());
        }
        Err(self.mismatch(view, &format!("{dtype:?} {shape:?}")))
    }

    fn float(&self, view: &View) -> Result<Dtype> {
        float_type(view.dtype).ok_or_else(|| self.mismatch(view, "F16, BF16 or F32"))
    }
}

/// The type of a plain tensor.
pub(crate) fn float_type(dtype: DiskType) -> Option<Dtype> {
    match dtype {
        DiskType::F32 => Some(Dtype::F32),
        DiskType::F16 => Some(Dtype::F16),
        DiskType::Bf16 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// The scheme of a module and its segments; `None` when there is no weight at all.
pub(crate) fn detect(module: &Module<'_>, wanted: Wanted) -> Result<Option<(Layout, Vec<Segment>)>> {
    let found = if let Some(qweight) = module.view("qweight")? {
        awq(module, &qweight, wanted)?
    } else if let Some(packed) = module.view("weight_packed")? {
        match packed.dtype {
            DiskType::U8 => nvfp4(module, &packed, wanted, true)?,
            DiskType::I32 => packed_int4(module, &packed, wanted)?,
            _ => return Err(module.mismatch(&packed, "U8 (NVFP4) or I32 (INT4)")),
        }
    } else if let Some(weight) = module.view("weight")? {
        match weight.dtype {
            DiskType::U8 => nvfp4(module, &weight, wanted, false)?,
            DiskType::F8E4m3 => fp8(module, &weight, wanted)?,
            _ => dense(module, &weight, wanted)?,
        }
    } else {
        return Ok(None);
    };
    let (scheme, views) = found;
    let Wanted { n, k, outputs, transposed } = wanted;
    let segments = views.into_iter().map(|view| view.segment).collect();
    Ok(Some((Layout { scheme, n, k, outputs, transposed }, segments)))
}

/// Whether a stacked weight is stored `[k, n]`; `None` when its shape says both (a square) or the tensor is absent.
///
/// # Errors
/// When the shape is neither.
pub(crate) fn orientation(module: &Module<'_>, n: usize, k: usize) -> Result<Option<bool>> {
    if module.locate("qweight").is_some() {
        return Ok(Some(false));
    }
    let Some(weight) =
        module.view("weight_packed")?.map_or_else(|| module.view("weight"), |view| Ok(Some(view)))?
    else {
        return Ok(None);
    };
    let per_element = match weight.dtype {
        DiskType::U8 => 2,
        DiskType::I32 => 8,
        _ => 1,
    };
    let straight = weight.shape == [n, k / per_element];
    let transposed = weight.shape == [k / per_element, n];
    match (straight, transposed) {
        (true, true) => Ok(None),
        (true, false) => Ok(Some(false)),
        (false, true) => Ok(Some(true)),
        (false, false) => {
            let per = per_element;
            Err(module
                .mismatch(&weight, &format!("[{n}, {}] or [{}, {n}] for each expert", k / per, k / per)))
        }
    }
}

type Found = Result<(Scheme, Vec<View>)>;

fn dense(module: &Module<'_>, weight: &View, wanted: Wanted) -> Found {
    let Wanted { n, k, .. } = wanted;
    let Some(dtype) = float_type(weight.dtype) else {
        return Err(module.unsupported(format!("weights of type {:?} are not supported", weight.dtype)));
    };
    let fits = if wanted.transposed {
        weight.shape == [k, n]
    } else {
        // A convolution kernel that covers its stride is a linear layer over the flattened patch.
        weight.shape.first() == Some(&n) && product(&weight.shape[1..]) == Some(k)
    };
    if !fits {
        let [rows, columns] = stored([n, k], wanted.transposed);
        return Err(module.mismatch(weight, &format!("[{rows}, {columns}]")));
    }
    Ok((Scheme::Dense { dtype }, vec![weight.clone()]))
}

/// Product of dimensions, unless it overflows.
pub(crate) fn product(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |all, &dim| all.checked_mul(dim))
}

/// A shape as stored.
fn stored(shape: [usize; 2], transposed: bool) -> [usize; 2] {
    if transposed { [shape[1], shape[0]] } else { shape }
}

fn awq(module: &Module<'_>, qweight: &View, wanted: Wanted) -> Found {
    let Wanted { n, k, outputs, .. } = wanted;
    if module.locate("g_idx").is_some() || (k != n && k % 8 == 0 && qweight.shape == [k / 8, n]) {
        return Err(
            module.unsupported("is stored in GPTQ layout; AWQ (gemm) and compressed-tensors are supported")
        );
    }
    if !n.is_multiple_of(8 * outputs) || !k.is_multiple_of(2) {
        return Err(module.unsupported(format!("AWQ packs 8 outputs into a word; [{n}, {k}] does not fit")));
    }
    module.expect(qweight, DiskType::I32, [k, n / 8])?;
    let zeros = module.need("qzeros", "AWQ")?;
    let scales = module.need("scales", "AWQ")?;
    let scale_dtype = module.float(&scales)?;
    let groups = scales.shape.first().copied().unwrap_or(0);
    if groups == 0 || !k.is_multiple_of(groups) || scales.shape != [groups, n] {
        return Err(module.mismatch(&scales, &format!("[{k} / group size, {n}]")));
    }
    module.expect(&zeros, DiskType::I32, [groups, n / 8])?;
    Ok((Scheme::Awq { group: k / groups, scale_dtype }, vec![qweight.clone(), zeros, scales]))
}

fn packed_int4(module: &Module<'_>, packed: &View, wanted: Wanted) -> Found {
    const SCHEME: &str = "compressed-tensors INT4";
    let Wanted { n, k, .. } = wanted;
    if module.locate("weight_g_idx").is_some() {
        return Err(module.unsupported(
            "has `weight_g_idx` (activation order): inputs are permuted, which is not supported; \
             quantise with actorder=None or \"weight\" without saved indices",
        ));
    }
    if !k.is_multiple_of(8) || wanted.transposed {
        return Err(module.unsupported(format!(
            "INT4 packs 8 inputs into a word along the inputs; [{n}, {k}] does not fit"
        )));
    }
    module.expect(packed, DiskType::I32, [n, k / 8])?;
    let scales = module.need("weight_scale", SCHEME)?;
    let scale_dtype = module.float(&scales)?;
    let groups = scales.shape.get(1).copied().unwrap_or(0);
    if groups == 0 || !k.is_multiple_of(groups) || scales.shape != [n, groups] {
        return Err(module.mismatch(&scales, &format!("[{n}, {k} / group size]")));
    }
    let mut views = vec![packed.clone(), scales];
    let zeros = module.view("weight_zero_point")?;
    if let Some(zeros) = &zeros {
        module.expect(zeros, DiskType::I32, [n.div_ceil(8), groups])?;
    }
    let shape = module.view("weight_shape")?;
    if let Some(shape) = &shape
        && (shape.dtype != DiskType::I64 || shape.shape != [2])
    {
        return Err(module.mismatch(shape, "I64 [2]"));
    }
    let scheme = Scheme::PackedInt4 {
        group: k / groups,
        scale_dtype,
        zeros: zeros.is_some(),
        shape: shape.is_some().then_some([n, k]),
    };
    views.extend(zeros);
    views.extend(shape);
    Ok((scheme, views))
}

/// NVFP4 of both producers: the same bytes, but compressed-tensors stores the reciprocal of the factor (`divide`).
fn nvfp4(module: &Module<'_>, codes: &View, wanted: Wanted, divide: bool) -> Found {
    let Wanted { n, k, outputs, transposed } = wanted;
    let (scheme, global) = if divide {
        ("compressed-tensors NVFP4", "weight_global_scale")
    } else {
        ("ModelOpt NVFP4", "weight_scale_2")
    };
    if !k.is_multiple_of(NVFP4_GROUP) {
        return Err(module.unsupported(format!("NVFP4 needs inputs in multiples of {NVFP4_GROUP}, not {k}")));
    }
    module.expect(codes, DiskType::U8, stored([n, k / 2], transposed))?;
    let scales = module.need("weight_scale", scheme)?;
    module.expect(&scales, DiskType::F8E4m3, stored([n, k / NVFP4_GROUP], transposed))?;
    let global = module.need(global, scheme)?;
    let count = product(&global.shape);
    if global.dtype != DiskType::F32 || (count != Some(1) && count != Some(outputs)) {
        return Err(module.mismatch(&global, &format!("F32 of 1 or {outputs} values")));
    }
    Ok((Scheme::Nvfp4 { divide }, vec![codes.clone(), scales, global]))
}

fn fp8(module: &Module<'_>, values: &View, wanted: Wanted) -> Found {
    let Wanted { n, k, outputs, transposed } = wanted;
    module.expect(values, DiskType::F8E4m3, stored([n, k], transposed))?;
    let scales = match module.view("weight_scale_inv")? {
        Some(scales) => scales,
        None => module.need("weight_scale", "FP8")?,
    };
    module.float(&scales)?;
    let mut shape = scales.shape.clone();
    if transposed {
        shape.reverse();
    }
    let count = product(&shape);
    let blocks = |[rows, columns]: [usize; 2]| shape == [n.div_ceil(rows), k.div_ceil(columns)];
    let block = if count == Some(1) {
        [n, k]
    } else if shape == [n, 1] || shape == [n] {
        [1, k]
    } else if let Some(block) = [module.fp8_block, [128, 128]].into_iter().find(|&block| blocks(block)) {
        block
    } else if count == Some(outputs) && n.is_multiple_of(outputs) {
        [n / outputs, k]
    } else {
        let [rows, columns] = module.fp8_block;
        return Err(module.mismatch(
            &scales,
            &format!("one value, one per output ({n}), or one per block of {rows} x {columns} of [{n}, {k}]"),
        ));
    };
    let scale_dtype = scales.dtype;
    Ok((Scheme::Fp8 { block, scale_dtype }, vec![values.clone(), scales]))
}

/// The FP8 block size that a configuration states, else 128 x 128. Only a hint: shapes decide.
pub(crate) fn fp8_block(config: &Value) -> [usize; 2] {
    let quantization = &config["quantization_config"];
    let groups = quantization["config_groups"].as_object();
    let structures =
        groups.into_iter().flat_map(|groups| groups.values().map(|g| &g["weights"]["block_structure"]));
    std::iter::once(&quantization["weight_block_size"])
        .chain(structures)
        .find_map(|value| {
            let [rows, columns] = value.as_array()?.as_slice() else { return None };
            let size =
                |value: &Value| value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|&v| v > 0);
            Some([size(rows)?, size(columns)?])
        })
        .unwrap_or([128, 128])
}
