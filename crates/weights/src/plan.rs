//! From a model's parameters to the byte ranges that fill them. Reads no data; `load` and `summary` follow it.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;

use spark_backend::Rank;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::header::DiskType;
use crate::names::{may_be_unused, normalise};
use crate::region::narrow;
use crate::scheme::{
    Layout, Module, Scheme, Segment, Wanted, detect, float_type, fp8_block, orientation, product,
};
use crate::shard::experts;
use crate::spec::{ParamKind, ParamSpec, join};

/// Missing tensors after which experts are no longer counted: a configuration may claim any number of them.
const MAX_UNFILLED: usize = 10_000;

/// What a group of segments becomes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Recipe {
    /// Float32 values of a vector, or of the bias of part `slot`.
    Floats { dtype: DiskType },
    /// `layout.outputs` matrices, from `slot` on.
    Matrix(Layout),
}

/// Segments that are converted together.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    /// Position of the parameter in the specs.
    pub(crate) spec: usize,
    /// Linear: the part. Experts: three per expert (gate, up, down).
    pub(crate) slot: usize,
    pub(crate) recipe: Recipe,
    pub(crate) segments: Vec<Segment>,
    /// Rows and columns that the rank keeps of each matrix that comes out.
    pub(crate) keep: Vec<[Range<usize>; 2]>,
}

impl Item {
    /// Whether the bytes of a segment become a part of the result as they are, without a copy.
    pub(crate) fn stays(&self, segment: usize) -> bool {
        let Recipe::Matrix(layout) = &self.recipe else { return false };
        let as_stored = match layout.scheme {
            Scheme::Awq { .. } => false,
            Scheme::Dense { .. } | Scheme::Fp8 { .. } => segment == 0,
            Scheme::PackedInt4 { .. } | Scheme::Nvfp4 { .. } => segment < 2,
        };
        as_stored && !layout.transposed && self.keep.iter().all(|[_, columns]| *columns == (0..layout.k))
    }
}

/// Everything that has to be read and what it becomes.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) items: Vec<Item>,
}

impl Plan {
    /// Matches `specs` and the checkpoint, and narrows what is read to what `rank` needs.
    ///
    /// # Errors
    /// When a parameter is not filled, a tensor is not consumed, shapes and companions do not fit, or a parameter cannot be
    /// split over the ranks.
    pub(crate) fn new(checkpoint: &Checkpoint, specs: &[ParamSpec], rank: Rank) -> Result<Self> {
        Planner::plan(checkpoint, specs)?.finish(true)?.narrowed(specs, rank)
    }

    /// [`Plan::new`] of each rank of a group of `world`, by rank.
    pub(crate) fn of_ranks(checkpoint: &Checkpoint, specs: &[ParamSpec], world: usize) -> Result<Vec<Self>> {
        let whole = Planner::plan(checkpoint, specs)?.finish(true)?;
        let narrowed = |rank| Plan { items: whole.items.clone() }.narrowed(specs, rank);
        (0..world).map_while(|index| Rank::new(index, world)).map(narrowed).collect()
    }

    /// As [`Plan::new`], for a part of the checkpoint: tensors may be left over.
    pub(crate) fn of_some(checkpoint: &Checkpoint, specs: &[ParamSpec], rank: Rank) -> Result<Self> {
        Planner::plan(checkpoint, specs)?.finish(false)?.narrowed(specs, rank)
    }

    fn narrowed(self, specs: &[ParamSpec], rank: Rank) -> Result<Self> {
        let mut items = Vec::with_capacity(self.items.len());
        for item in self.items {
            let spec = &specs[item.spec];
            let is_expert = matches!(spec.kind, ParamKind::Experts { .. });
            if is_expert && !experts(spec, rank)?.contains(&(item.slot / 3)) {
                continue;
            }
            items.extend(narrow(item, spec, rank)?);
        }
        Ok(Plan { items })
    }
}

impl<'a> Planner<'a> {
    fn plan(checkpoint: &'a Checkpoint, specs: &[ParamSpec]) -> Result<Self> {
        let mut planner = Planner {
            checkpoint,
            used: RefCell::new(vec![false; checkpoint.tensors.len()]),
            fp8_block: fp8_block(checkpoint.config()),
            items: Vec::new(),
            unfilled: Vec::new(),
        };
        let mut seen = HashSet::new();
        for (index, spec) in specs.iter().enumerate() {
            if !seen.insert(&spec.name) {
                return Err(Error::Param { name: spec.name.clone(), reason: "is stated twice".to_owned() });
            }
            if has_empty_side(&spec.kind) {
                let reason = "has a side of length zero; the configuration is wrong".to_owned();
                return Err(Error::Param { name: spec.name.clone(), reason });
            }
            planner.spec(index, spec)?;
        }
        Ok(planner)
    }
}

/// Whether any dimension is zero: nothing real has such weights, and group sizes are quotients of dimensions.
fn has_empty_side(kind: &ParamKind) -> bool {
    match kind {
        ParamKind::Vector { shape } => shape.contains(&0),
        ParamKind::Linear { parts, k, .. } => {
            *k == 0 || parts.is_empty() || parts.iter().any(|(_, n)| *n == 0)
        }
        ParamKind::Experts { num_experts, hidden, intermediate } => {
            [num_experts, hidden, intermediate].contains(&&0)
        }
    }
}

struct Planner<'a> {
    checkpoint: &'a Checkpoint,
    used: RefCell<Vec<bool>>,
    fp8_block: [usize; 2],
    items: Vec<Item>,
    unfilled: Vec<String>,
}

impl<'a> Planner<'a> {
    fn spec(&mut self, index: usize, spec: &ParamSpec) -> Result<()> {
        match &spec.kind {
            ParamKind::Vector { shape } => {
                let name = normalise(&spec.name);
                self.floats(index, 0, &name, *shape)
            }
            ParamKind::Linear { parts, k, bias } => {
                let outputs = spec.shard.matrices();
                for (slot, (part, n)) in parts.iter().enumerate() {
                    if !n.is_multiple_of(outputs) {
                        let reason = format!("{n} features are not {outputs} layers of as many");
                        return Err(Error::Param { name: spec.name.clone(), reason });
                    }
                    let wanted = Wanted { n: *n, k: *k, outputs, transposed: false };
                    self.linear(index, slot * outputs, &join(&spec.name, part), wanted, *bias)?;
                }
                Ok(())
            }
            &ParamKind::Experts { num_experts, hidden, intermediate } => {
                self.experts(index, &normalise(&spec.name), num_experts, hidden, intermediate)
            }
        }
    }

    /// The plan; an error when parameters are not filled, or `all` tensors had to be used and some are not.
    fn finish(self, all: bool) -> Result<Plan> {
        let used = self.used.into_inner();
        let unused: Vec<String> = self
            .checkpoint
            .tensors
            .iter()
            .zip(&used)
            .filter(|(tensor, used)| all && !**used && !may_be_unused(&tensor.normalised))
            .map(|(tensor, _)| tensor.info.name.clone())
            .collect();
        if self.unfilled.is_empty() && unused.is_empty() {
            return Ok(Plan { items: self.items });
        }
        Err(Error::Incomplete { unfilled: self.unfilled, unused })
    }

    fn module(&self, base: String, stacked: Option<(usize, usize)>) -> Module<'_> {
        Module { checkpoint: self.checkpoint, used: &self.used, base, stacked, fp8_block: self.fp8_block }
    }

    /// A plain tensor that becomes float32: `[rows, cols]`, where further dimensions count as columns.
    fn floats(&mut self, spec: usize, slot: usize, name: &str, shape: [usize; 2]) -> Result<()> {
        let Some(tensor) = self.checkpoint.find(name) else {
            self.unfilled.push(name.to_owned());
            return Ok(());
        };
        self.used.borrow_mut()[tensor] = true;
        let info = &self.checkpoint.tensors[tensor].info;
        let [rows, cols] = shape;
        let fits = product(&info.shape) == rows.checked_mul(cols)
            && (rows == 1 || info.shape.first() == Some(&rows))
            && float_type(info.dtype).is_some();
        if !fits {
            return Err(Error::Mismatch {
                path: self.checkpoint.path_of(tensor).to_owned(),
                tensor: info.name.clone(),
                reason: format!(
                    "is {:?} {:?}, expected a float tensor of {rows} x {cols}",
                    info.dtype, info.shape
                ),
            });
        }
        let segments = vec![Segment { tensor, offset: info.offset, len: info.len }];
        self.items.push(Item {
            spec,
            slot,
            recipe: Recipe::Floats { dtype: info.dtype },
            segments,
            keep: Vec::new(),
        });
        Ok(())
    }

    fn linear(&mut self, spec: usize, slot: usize, name: &str, wanted: Wanted, bias: bool) -> Result<()> {
        // The rules for prefixes look at whole tensor names.
        let weight = normalise(&format!("{name}.weight"));
        let base = weight.strip_suffix(".weight").unwrap_or(&weight).to_owned();
        let found = detect(&self.module(base.clone(), None), wanted)?;
        match found {
            Some((layout, segments)) => {
                self.items.push(Item {
                    spec,
                    slot,
                    recipe: Recipe::Matrix(layout),
                    segments,
                    keep: Vec::new(),
                });
            }
            None => self.unfilled.push(weight),
        }
        if bias {
            self.floats(spec, slot, &format!("{base}.bias"), [1, wanted.n])?;
        }
        Ok(())
    }

    fn experts(&mut self, spec: usize, base: &str, count: usize, hidden: usize, inter: usize) -> Result<()> {
        let fused = self.module(format!("{base}.gate_up_proj"), Some((0, count))).exists();
        if fused {
            return self.stacked_experts(
                spec,
                base,
                count,
                &[("gate_up_proj", 2 * inter, hidden, 0), ("down_proj", hidden, inter, 2)],
            );
        }
        let apart =
            [("gate_proj", inter, hidden, 0), ("up_proj", inter, hidden, 1), ("down_proj", hidden, inter, 2)];
        if self.module(format!("{base}.gate_proj"), Some((0, count))).exists() {
            return self.stacked_experts(spec, base, count, &apart);
        }
        // `experts.7.gate_proj`, or with ModelOpt's older exporters `experts.gate_proj.7`.
        let projection_major = self.module(format!("{base}.gate_proj.0"), None).exists();
        for expert in 0..count {
            if self.unfilled.len() > MAX_UNFILLED {
                break;
            }
            for (projection, n, k, slot) in apart {
                let name = if projection_major {
                    format!("{base}.{projection}.{expert}")
                } else {
                    format!("{base}.{expert}.{projection}")
                };
                let wanted = Wanted { n, k, outputs: 1, transposed: false };
                self.linear(spec, 3 * expert + slot, &name, wanted, false)?;
            }
        }
        Ok(())
    }

    /// Experts stacked in one tensor per projection (name, n, k, first slot), all in the same orientation.
    fn stacked_experts(
        &mut self,
        spec: usize,
        base: &str,
        count: usize,
        projections: &[(&str, usize, usize, usize)],
    ) -> Result<()> {
        let mut transposed = None;
        for &(projection, n, k, _) in projections {
            let found = orientation(&self.module(format!("{base}.{projection}"), Some((0, count))), n, k)?;
            match (transposed, found) {
                (Some(one), Some(other)) if one != other => {
                    return Err(Error::Unsupported {
                        module: base.to_owned(),
                        reason: "one projection is stored [out, in], another [in, out]".to_owned(),
                    });
                }
                (None, found) => transposed = found,
                _ => {}
            }
        }
        let Some(transposed) = transposed else {
            return Err(Error::Unsupported {
                module: base.to_owned(),
                reason: "all projections are square: their orientation cannot be told from the shapes"
                    .to_owned(),
            });
        };
        for expert in 0..count {
            for &(projection, n, k, slot) in projections {
                let outputs = if projection == "gate_up_proj" { 2 } else { 1 };
                let module = self.module(format!("{base}.{projection}"), Some((expert, count)));
                let found = detect(&module, Wanted { n, k, outputs, transposed })?;
                match found {
                    Some((layout, segments)) => {
                        let slot = 3 * expert + slot;
                        self.items.push(Item {
                            spec,
                            slot,
                            recipe: Recipe::Matrix(layout),
                            segments,
                            keep: Vec::new(),
                        });
                    }
                    None => {
                        self.unfilled.push(format!("{base}.{projection}"));
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }
}
