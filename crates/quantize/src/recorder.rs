//! A backend that is the CPU backend and remembers the inputs of the decoder's linear layers. The model runs on it as on
//! any other, so that nothing of the model's mathematics is repeated here.
//!
//! A backend is not told names. A weight is recognised by the address of its values, which stays the same on the way
//! from the checkpoint through the model's loading to here.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use spark_backend::{
    Activation, ActivationSpec, AttentionSpec, Backend, Dtype, ExpertsWeight, LinearWeight, Matrix,
    MatrixData, Result, RouterSpec, SlotParams, StateSpec, StepInputs, StepOutput, VectorWeight, VisionSpec,
};
use spark_cpu::{CpuBackend, CpuExperts, CpuLinear, CpuTensor, Routing};
use spark_weights::Param;

use crate::reservoir::Reservoir;

/// Rows kept of the inputs of a layer that all tokens use.
const ROWS: usize = 256;
/// Rows kept of the inputs of each expert: as many where experts are few, fewer where memory would not hold them.
const MAX_EXPERT_ROWS: usize = 256;
const MIN_EXPERT_ROWS: usize = 32;
const EXPERT_ROWS_OF_A_LAYER: usize = 4096;

/// The inputs of one parameter.
#[derive(Debug)]
pub(crate) struct Record {
    /// Of all rows.
    pub(crate) all: Reservoir,
    /// Of the rows routed to each expert, with the router's weight; empty for a linear layer.
    pub(crate) experts: Vec<Reservoir>,
}

/// Inputs by the names of the parameters' specs.
pub(crate) type Records = BTreeMap<String, Record>;

/// The backend.
pub(crate) struct Recorder {
    inner: CpuBackend,
    /// Address of the first part's values -> name.
    names: HashMap<usize, String>,
    /// One thread drives a backend.
    records: RefCell<Records>,
}

/// A weight and the name to record its inputs under, if they are wanted.
pub(crate) struct Named<T> {
    inner: T,
    name: Option<String>,
}

/// A layer's experts, likewise.
pub(crate) struct NamedExperts {
    inner: CpuExperts,
    count: usize,
    name: Option<String>,
}

impl Recorder {
    /// A recorder of the inputs of the parameters that [`Recorder::watch`] is told about.
    pub(crate) fn new(inner: CpuBackend) -> Self {
        Self { inner, names: HashMap::new(), records: RefCell::default() }
    }

    /// Records the inputs of `param` under `name`.
    pub(crate) fn watch(&mut self, name: &str, param: &Param) {
        let first = match param {
            Param::Linear(weight) => weight.parts.first(),
            Param::Experts(weight) => first_of(weight),
            Param::Vector(_) => None,
        };
        if let Some(address) = first.and_then(address) {
            self.names.insert(address, name.to_owned());
        }
    }

    /// What was recorded.
    pub(crate) fn into_records(self) -> Records {
        self.records.into_inner()
    }

    fn name_of(&self, matrix: Option<&Matrix>) -> Option<String> {
        self.names.get(&matrix.and_then(address)?).cloned()
    }

    fn record(&self, name: &str, x: &CpuTensor, routing: Option<(&Routing, usize)>) {
        let [rows, k] = x.shape();
        let count = routing.map_or(0, |(_, count)| count);
        let mut records = self.records.borrow_mut();
        let record = records.entry(name.to_owned()).or_insert_with(|| {
            let capacity = (EXPERT_ROWS_OF_A_LAYER / count.max(1)).clamp(MIN_EXPERT_ROWS, MAX_EXPERT_ROWS);
            Record { all: Reservoir::new(ROWS, k), experts: vec![Reservoir::new(capacity, k); count] }
        });
        for row in x.values().chunks_exact(k) {
            record.all.push(row, 1.0);
        }
        let Some((routing, _)) = routing else { return };
        let top_k = routing.experts().len() / rows.max(1);
        for (i, (&expert, &weight)) in routing.experts().iter().zip(routing.weights()).enumerate() {
            record.experts[expert as usize].push(&x.values()[i / top_k * k..][..k], weight);
        }
    }
}

fn first_of(weight: &ExpertsWeight) -> Option<&Matrix> {
    weight.experts.first().and_then(|(gate_up, _)| gate_up.parts.first())
}

fn address(matrix: &Matrix) -> Option<usize> {
    match &matrix.data {
        MatrixData::Dense { values, .. } if !values.is_empty() => Some(values.as_ptr().addr()),
        _ => None,
    }
}

impl Backend for Recorder {
    type Tensor = CpuTensor;
    type Linear = Named<CpuLinear>;
    type Experts = NamedExperts;
    type Routing = Routing;

    fn name(&self) -> &'static str {
        "recorder"
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn vector(&self, weight: VectorWeight) -> Result<CpuTensor> {
        self.inner.vector(weight)
    }

    fn linear_weight(&self, weight: LinearWeight) -> Result<Self::Linear> {
        let name = self.name_of(weight.parts.first());
        Ok(Named { inner: self.inner.linear_weight(weight)?, name })
    }

    fn experts_weight(&self, weight: ExpertsWeight) -> Result<Self::Experts> {
        let (name, count) = (self.name_of(first_of(&weight)), weight.experts.len());
        Ok(NamedExperts { inner: self.inner.experts_weight(weight)?, count, name })
    }

    fn activation_bytes(&self, spec: &ActivationSpec) -> u64 {
        self.inner.activation_bytes(spec)
    }

    fn allocate_state(&mut self, spec: StateSpec) -> Result<()> {
        self.inner.allocate_state(spec)
    }

    fn admit(&mut self, slot: usize, params: SlotParams) -> Result<()> {
        self.inner.admit(slot, params)
    }

    fn step(&mut self, inputs: &StepInputs, forward: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()> {
        // The CPU backend keeps a step's inputs until the next one begins: beginning it is enough.
        self.inner.step(inputs, &mut |_| Ok(()))?;
        forward(self)
    }

    fn output(&mut self) -> Result<StepOutput> {
        self.inner.output()
    }

    fn embed(&self, table: &Self::Linear, vocab_rows: usize) -> Result<CpuTensor> {
        self.inner.embed(&table.inner, vocab_rows)
    }

    fn reduce_norm(
        &self,
        partial: Option<CpuTensor>,
        residual: &mut CpuTensor,
        weight: &CpuTensor,
        eps: f32,
    ) -> Result<CpuTensor> {
        self.inner.reduce_norm(partial, residual, weight, eps)
    }

    fn linear(&self, x: &CpuTensor, weight: &Self::Linear) -> Result<CpuTensor> {
        if let Some(name) = &weight.name {
            self.record(name, x, None);
        }
        self.inner.linear(x, &weight.inner)
    }

    fn attend(&self, qkv: &CpuTensor, layer: usize, spec: &AttentionSpec<'_, Self>) -> Result<CpuTensor> {
        let spec = AttentionSpec {
            q_norm: spec.q_norm,
            k_norm: spec.k_norm,
            eps: spec.eps,
            num_heads: spec.num_heads,
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            inv_freq: spec.inv_freq,
            rope_factor: spec.rope_factor,
            mrope_section: spec.mrope_section,
        };
        self.inner.attend(qkv, layer, &spec)
    }

    fn reduce_norm_route(
        &self,
        partial: Option<CpuTensor>,
        residual: &mut CpuTensor,
        weight: &CpuTensor,
        eps: f32,
        router: &RouterSpec<'_, Self>,
    ) -> Result<(CpuTensor, Routing)> {
        let router = RouterSpec {
            router: &router.router.inner,
            top_k: router.top_k,
            renormalize: router.renormalize,
            experts: router.experts.clone(),
        };
        self.inner.reduce_norm_route(partial, residual, weight, eps, &router)
    }

    fn moe_mlp(&self, x: &CpuTensor, routing: &Routing, experts: &NamedExperts) -> Result<CpuTensor> {
        if let Some(name) = &experts.name {
            self.record(name, x, Some((routing, experts.count)));
        }
        self.inner.moe_mlp(x, routing, &experts.inner)
    }

    fn swiglu(&self, gate_up: &CpuTensor) -> Result<CpuTensor> {
        self.inner.swiglu(gate_up)
    }

    fn set_rows(
        &self,
        x: &mut CpuTensor,
        row: usize,
        source: &CpuTensor,
        source_row: usize,
        rows: usize,
    ) -> Result<()> {
        self.inner.set_rows(x, row, source, source_row, rows)
    }

    fn add_rows(
        &self,
        x: &mut CpuTensor,
        row: usize,
        source: &CpuTensor,
        source_row: usize,
        rows: usize,
    ) -> Result<()> {
        self.inner.add_rows(x, row, source, source_row, rows)
    }

    fn logits(&self, x: &CpuTensor, head: &Self::Linear, vocab_rows: usize) -> Result<CpuTensor> {
        self.inner.logits(x, &head.inner, vocab_rows)
    }

    fn sample(&self, logits: &CpuTensor) -> Result<()> {
        self.inner.sample(logits)
    }

    fn patches(&self, pixels: &[&[u8]], num_patches: usize, spec: &VisionSpec) -> Result<CpuTensor> {
        self.inner.patches(pixels, num_patches, spec)
    }

    fn add_position(
        &self,
        x: &mut CpuTensor,
        table: &CpuTensor,
        grid: [usize; 3],
        spec: &VisionSpec,
    ) -> Result<()> {
        self.inner.add_position(x, table, grid, spec)
    }

    fn layer_norm(&self, x: &CpuTensor, weight: &CpuTensor, bias: &CpuTensor, eps: f32) -> Result<CpuTensor> {
        self.inner.layer_norm(x, weight, bias, eps)
    }

    fn vision_attend(&self, qkv: &CpuTensor, grid: [usize; 3], spec: &VisionSpec) -> Result<CpuTensor> {
        self.inner.vision_attend(qkv, grid, spec)
    }

    fn activate(&self, x: &mut CpuTensor, activation: Activation) -> Result<()> {
        self.inner.activate(x, activation)
    }

    fn add(&self, x: &mut CpuTensor, y: &CpuTensor) -> Result<()> {
        self.inner.add(x, y)
    }

    fn reshape(&self, x: &CpuTensor, columns: usize) -> Result<CpuTensor> {
        self.inner.reshape(x, columns)
    }

    fn keep(&self, x: &CpuTensor) -> Result<CpuTensor> {
        self.inner.keep(x)
    }

    fn keep_rows(&self, x: &CpuTensor, row: usize, rows: usize) -> Result<CpuTensor> {
        self.inner.keep_rows(x, row, rows)
    }

    fn to_host(&self, x: &CpuTensor) -> Result<(Vec<f32>, [usize; 2])> {
        self.inner.to_host(x)
    }
}
