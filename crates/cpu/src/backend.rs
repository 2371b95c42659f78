//! The `Backend` trait for the CPU: each operation is a call into the file of its family.

use crate::attention::attend;
use crate::group::Group;
use crate::linear::{embed, linear, linear_f32};
use crate::moe::{CpuExperts, Routing, moe_mlp, route};
use crate::norm::{activate, add_into, layer_norm, reduce_norm, row_ranges, swiglu};
use crate::state::State;
use crate::tensor::{Compute, CpuTensor};
use crate::vision::{add_position, patches, vision_attend};
use crate::weight::CpuLinear;
use spark_backend::{
    Activation, ActivationSpec, AttentionSpec, Backend, Collective, Dtype, Error, ExpertTally, ExpertsWeight,
    LinearWeight, Rank, Result, RouterSpec, SlotParams, StateSpec, StepInputs, StepOutput, VectorWeight,
    VisionSpec,
};
use std::cell::{Ref, RefCell, RefMut};

/// The reference backend. Rows of a step never influence each other's numbers: a sequence gets bit-identical results
/// alone, batched, chunked, from the prefix cache, and on any number of threads.
pub struct CpuBackend {
    pub(crate) compute: Compute,
    /// One thread drives a backend, and no operation calls another one: a cell is enough.
    state: RefCell<Option<State>>,
    pub(crate) group: Group,
    expert_tally: ExpertTally,
}

impl CpuBackend {
    /// A backend that computes in `dtype`: float32 without rounding, or bfloat16, where every result is rounded that
    /// Hugging Face's model would store. `threads` of its own; `None` takes rayon's global pool.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for float16; [`Error::Device`] when threads cannot be started.
    pub fn new(dtype: Dtype, threads: Option<usize>) -> Result<Self> {
        Ok(Self {
            compute: Compute::new(dtype, threads)?,
            state: RefCell::new(None),
            group: Group::single(),
            expert_tally: ExpertTally::default(),
        })
    }

    /// The same backend as one rank of a group. Weights have to be this rank's shards from now on; every rank has to run the
    /// same steps in the same order.
    #[must_use]
    pub fn with_group(mut self, collective: Box<dyn Collective>) -> Self {
        self.group = Group::new(collective);
        self
    }

    /// The same backend, which counts the experts of decode steps while `tally` is on.
    #[must_use]
    pub fn with_expert_tally(self, tally: ExpertTally) -> Self {
        Self { expert_tally: tally, ..self }
    }

    /// The same backend, which rounds activations to NVFP4 before they meet NVFP4 weights, as tensor cores with FP4 want them: to
    /// measure what that costs in accuracy. Slower than without.
    #[must_use]
    pub fn with_nvfp4_activations(mut self) -> Self {
        self.compute.nvfp4_rows = true;
        self
    }

    fn state(&self, op: &'static str) -> Result<Ref<'_, State>> {
        Ref::filter_map(self.state.borrow(), Option::as_ref).map_err(|_| unallocated(op))
    }

    fn state_mut(&self, op: &'static str) -> Result<RefMut<'_, State>> {
        RefMut::filter_map(self.state.borrow_mut(), Option::as_mut).map_err(|_| unallocated(op))
    }
}

fn unallocated(op: &'static str) -> Error {
    Error::Unsupported { op, reason: "allocate_state must be called first".to_owned() }
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Linear = CpuLinear;
    type Experts = CpuExperts;
    type Routing = Routing;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn rank(&self) -> Rank {
        self.group.rank()
    }

    fn dtype(&self) -> Dtype {
        self.compute.dtype
    }

    fn vector(&self, weight: VectorWeight) -> Result<CpuTensor> {
        let VectorWeight { mut values, shape } = weight;
        if shape[0].checked_mul(shape[1]) != Some(values.len()) {
            return Err(Error::shape("vector", shape, values.len()));
        }
        self.compute.round(&mut values);
        Ok(CpuTensor::new(values, shape))
    }

    fn linear_weight(&self, weight: LinearWeight) -> Result<CpuLinear> {
        CpuLinear::new(weight)
    }

    fn experts_weight(&self, weight: ExpertsWeight) -> Result<CpuExperts> {
        CpuExperts::new(weight)
    }

    fn activation_bytes(&self, spec: &ActivationSpec) -> u64 {
        // Every number is float32 in memory, whatever it was rounded to.
        spec.num_bytes(Dtype::F32.size())
    }

    fn allocate_state(&mut self, spec: StateSpec) -> Result<()> {
        self.state = RefCell::new(Some(State::new(spec)?));
        Ok(())
    }

    fn admit(&mut self, slot: usize, params: SlotParams) -> Result<()> {
        self.state_mut("admit")?.admit(slot, params)
    }

    fn step(&mut self, inputs: &StepInputs, forward: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()> {
        self.state_mut("step")?.begin(inputs)?;
        forward(self).inspect_err(|_| {
            // A step that failed has no output.
            if let Ok(mut state) = self.state_mut("step") {
                state.outputs.pop_back();
            }
        })
    }

    fn output(&mut self) -> Result<StepOutput> {
        self.state_mut("output")?.take_output()
    }

    fn embed(&self, table: &CpuLinear, vocab_rows: usize) -> Result<CpuTensor> {
        let share = self.group.share("embed", table, vocab_rows)?;
        let mut x = embed(&self.compute, table, share, vocab_rows, &self.state("embed")?.tokens)?;
        self.group.all_reduce(&mut x.values)?;
        Ok(x)
    }

    fn reduce_norm(
        &self,
        mut partial: Option<CpuTensor>,
        residual: &mut CpuTensor,
        weight: &CpuTensor,
        eps: f32,
    ) -> Result<CpuTensor> {
        if let Some(partial) = &mut partial {
            partial.expect("reduce_norm partial", residual.shape)?;
            self.all_reduce(partial)?;
        }
        reduce_norm(&self.compute, partial, residual, weight, eps)
    }

    fn linear(&self, x: &CpuTensor, weight: &CpuLinear) -> Result<CpuTensor> {
        linear(&self.compute, x, weight)
    }

    fn attend(&self, qkv: &CpuTensor, layer: usize, spec: &AttentionSpec<'_, Self>) -> Result<CpuTensor> {
        let state = &mut *self.state_mut("attend")?;
        attend(&self.compute, &mut state.pool, &state.inputs, qkv, layer, spec)
    }

    fn reduce_norm_route(
        &self,
        partial: Option<CpuTensor>,
        residual: &mut CpuTensor,
        weight: &CpuTensor,
        eps: f32,
        router: &RouterSpec<'_, Self>,
    ) -> Result<(CpuTensor, Routing)> {
        let x = self.reduce_norm(partial, residual, weight, eps)?;
        let routing = route(&self.compute, &x, router)?;
        if self.expert_tally.is_on() {
            let state = self.state("route")?;
            if state.inputs.seqs.iter().all(|seq| seq.query_len == 1) {
                self.expert_tally.add(routing.experts(), router.router.n);
            }
        }
        Ok((x, routing))
    }

    fn moe_mlp(&self, x: &CpuTensor, routing: &Routing, experts: &CpuExperts) -> Result<CpuTensor> {
        moe_mlp(&self.compute, x, routing, experts)
    }

    fn swiglu(&self, gate_up: &CpuTensor) -> Result<CpuTensor> {
        swiglu(&self.compute, gate_up)
    }

    fn set_rows(
        &self,
        x: &mut CpuTensor,
        row: usize,
        source: &CpuTensor,
        source_row: usize,
        rows: usize,
    ) -> Result<()> {
        let [to, from] = row_ranges("set_rows", [x, source], [row, source_row], rows)?;
        x.values[to].copy_from_slice(&source.values[from]);
        Ok(())
    }

    fn add_rows(
        &self,
        x: &mut CpuTensor,
        row: usize,
        source: &CpuTensor,
        source_row: usize,
        rows: usize,
    ) -> Result<()> {
        let [to, from] = row_ranges("add_rows", [x, source], [row, source_row], rows)?;
        add_into(&self.compute, &mut x.values[to], &source.values[from]);
        Ok(())
    }

    fn logits(&self, x: &CpuTensor, head: &CpuLinear, vocab_rows: usize) -> Result<CpuTensor> {
        self.group.share("logits", head, vocab_rows)?;
        let state = self.state("logits")?;
        let rows = &state.inputs.logit_rows;
        if let Some(row) = rows.iter().find(|&&row| row as usize >= x.rows()) {
            return Err(Error::shape("logits row", format!("under {}", x.rows()), row));
        }
        let values: Vec<f32> = rows.iter().flat_map(|&row| x.row(row as usize)).copied().collect();
        let local = linear_f32(&self.compute, &CpuTensor::new(values, [rows.len(), x.columns()]), head)?;
        self.group.gather_columns(local, vocab_rows)
    }

    fn sample(&self, logits: &CpuTensor) -> Result<()> {
        self.state_mut("sample")?.sample(&self.compute, logits)
    }

    fn patches(&self, pixels: &[&[u8]], num_patches: usize, spec: &VisionSpec) -> Result<CpuTensor> {
        patches(&self.compute, pixels, num_patches, spec)
    }

    fn add_position(
        &self,
        x: &mut CpuTensor,
        table: &CpuTensor,
        grid: [usize; 3],
        spec: &VisionSpec,
    ) -> Result<()> {
        add_position(&self.compute, x, table, grid, spec)
    }

    fn layer_norm(&self, x: &CpuTensor, weight: &CpuTensor, bias: &CpuTensor, eps: f32) -> Result<CpuTensor> {
        layer_norm(&self.compute, x, weight, bias, eps)
    }

    fn vision_attend(&self, qkv: &CpuTensor, grid: [usize; 3], spec: &VisionSpec) -> Result<CpuTensor> {
        vision_attend(&self.compute, qkv, grid, spec)
    }

    fn activate(&self, x: &mut CpuTensor, activation: Activation) -> Result<()> {
        activate(&self.compute, x, activation);
        Ok(())
    }

    fn add(&self, x: &mut CpuTensor, y: &CpuTensor) -> Result<()> {
        y.expect("add", x.shape)?;
        add_into(&self.compute, &mut x.values, &y.values);
        Ok(())
    }

    fn reshape(&self, x: &CpuTensor, columns: usize) -> Result<CpuTensor> {
        if columns == 0 || !x.values.len().is_multiple_of(columns) {
            return Err(Error::shape("reshape columns", format!("a divisor of {}", x.values.len()), columns));
        }
        let rows = x.values.len() / columns;
        Ok(CpuTensor::new(x.values.clone(), [rows, columns]))
    }

    fn all_reduce(&self, x: &mut CpuTensor) -> Result<()> {
        if self.group.all_reduce(&mut x.values)? {
            self.compute.round(&mut x.values);
        }
        Ok(())
    }

    fn broadcast(&self, x: Option<CpuTensor>, shape: [usize; 2], root: usize) -> Result<CpuTensor> {
        self.group.broadcast(x, shape, root)
    }

    fn keep(&self, x: &CpuTensor) -> Result<CpuTensor> {
        Ok(x.clone())
    }

    fn keep_rows(&self, x: &CpuTensor, row: usize, rows: usize) -> Result<CpuTensor> {
        let [all, columns] = x.shape;
        match row.checked_add(rows) {
            Some(end) if end <= all => {
                Ok(CpuTensor::new(x.values[row * columns..end * columns].to_vec(), [rows, columns]))
            }
            _ => Err(Error::shape("keep_rows", format!("rows of {all}"), (row, rows))),
        }
    }

    fn to_host(&self, x: &CpuTensor) -> Result<(Vec<f32>, [usize; 2])> {
        Ok((x.values.clone(), x.shape))
    }
}
