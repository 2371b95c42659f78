//! The `Backend` trait on a GPU: each operation takes memory for its result and calls the wrapper of its kernels. What
//! lives longer than an operation is in the other files of this folder.
//!
//! Everything runs on one stream, in the order of the calls. Nothing is waited for but in `output`, when a staging buffer is
//! still being copied, and where values are read back for tests.

mod kept;
mod ops;
mod overlap;
mod profile;
mod ranks;
mod sizes;
mod state;
mod tensor;
mod transfer;
mod weights;

use std::cell::{RefCell, RefMut};

use spark_backend::{
    Activation, ActivationSpec, AttentionSpec, Backend, Dtype, Error, ExpertTally, ExpertsWeight,
    LinearWeight, Memory, Rank, Result, RouterSpec, SlotParams, StateSpec, StepInputs, StepOutput,
    VectorWeight, VisionSpec,
};
use spark_comm::nccl::Group;

use self::overlap::Overlap;
pub use self::overlap::Routing;
pub use self::profile::{Profile, Time};
use self::state::State;
pub use self::tensor::CudaTensor;
use self::weights::WeightMemory;
use crate::{
    After, Cubins, Device, Driver, Experts, KernelOptions, Kernels, Linear, Mailboxes, Prefill, Stream, Team,
    WeightLoader,
};

/// How the backend is made.
#[derive(Debug, Clone, Default)]
pub struct CudaOptions {
    /// Which GPU of those that the process sees.
    pub ordinal: usize,
    /// Where its kernels come from.
    pub kernels: KernelOptions,
    /// Products of many rows with 4-bit integer weights quantise their activations to FP8: nearly twice the speed where tensor cores have
    /// FP8 instructions of this kind, at 2 to 3 % of error in each product.
    pub fp8_activations: bool,
    /// Products of many rows with NVFP4 weights quantise their activations to NVFP4, if the device has the instructions and passes
    /// [`Kernels::test_nvfp4`]; else they stay in bfloat16, which one line of the log says.
    pub native_fp4: bool,
    /// Launch the kernels of every step one by one instead of replaying recorded steps: for tests.
    pub enforce_eager: bool,
    /// Takes the time of every operation; nothing is recorded then, and steps are slower.
    pub profile: Option<Profile>,
    /// Counts the experts of decode steps while it is on; those steps are launched kernel by kernel, and read back. Not for ranks of a group.
    pub expert_tally: ExpertTally,
    /// The ranks that share the model with this one; `None`: it is alone.
    pub group: Option<Group>,
    /// Fewest rows of a step of prompts whose sums over the ranks run beside other work; `None`: as many as it was found to be
    /// worth for.
    pub overlap_rows: Option<usize>,
    /// All sums over the ranks go through NCCL, also where GPUs reach each other's memory: for tests and comparison.
    pub no_mailboxes: bool,
}

/// A GPU as a backend. Computes in bfloat16 with float32 sums, rounding where the CPU backend does.
///
/// A sequence's numbers may depend on the number of rows of its steps, because kernels add in another order; at equal
/// steps they are equal bit by bit, replayed or not.
pub struct CudaBackend {
    device: Device,
    stream: Stream,
    kernels: Kernels,
    weights: RefCell<WeightMemory>,
    /// Until all weights are there.
    loader: RefCell<Option<WeightLoader>>,
    state: Option<State>,
    enforce_eager: bool,
    profile: Option<Profile>,
    expert_tally: ExpertTally,
    /// Behind the graphs of `state`, which hold on to it.
    team: Option<Team>,
    /// Where the ranks' GPUs reach each other, once the state is allocated.
    mailboxes: Option<Mailboxes>,
    no_mailboxes: bool,
    /// With ranks, unless operations are timed.
    overlap: Option<Overlap>,
}

impl CudaBackend {
    /// Opens the GPU, compiles or reads its kernels, and loads them. With a group, connects with its other ranks, which must do
    /// the same.
    ///
    /// # Errors
    /// No driver, no such GPU, one that the kernels are not made for, no compiler and no kernels; ranks that do not come.
    pub fn new(options: &CudaOptions) -> crate::Result<Self> {
        let device = Driver::open()?.device(options.ordinal)?;
        let cubins = Cubins::get(device.arch(), &options.kernels)?;
        let kernels = Kernels::load(&device, &cubins)?;
        let stream = Stream::new(&device)?;
        let nvfp4 = options.native_fp4 && has_native_fp4(&kernels, &device, &stream)?;
        let kernels = kernels.with_prefill(Prefill { fp8: options.fp8_activations, nvfp4 })?;
        // After all that may take long on one rank: the others wait.
        let team = options.group.as_ref().map(|group| Team::connect(&device, &stream, group)).transpose()?;
        let has_overlap = team.is_some() && options.profile.is_none();
        let overlap = has_overlap.then(|| Overlap::new(&device, options.overlap_rows)).transpose()?;
        Ok(Self {
            stream,
            weights: RefCell::new(WeightMemory::new(&device)),
            loader: RefCell::new(Some(WeightLoader::new(&device, WeightLoader::CAPACITY)?)),
            kernels,
            device,
            state: None,
            enforce_eager: options.enforce_eager
                || options.profile.as_ref().is_some_and(Profile::is_of_operations),
            profile: options.profile.clone(),
            expert_tally: options.expert_tally.clone(),
            team,
            mailboxes: None,
            no_mailboxes: options.no_mailboxes,
            overlap,
        })
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes that the weights take.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.borrow().num_bytes
    }

    /// Steps that were replayed from a recording.
    pub fn num_replays(&self) -> u64 {
        self.state.as_ref().map_or(0, |state| state.num_replays)
    }

    /// Sums over the ranks that ran beside other work.
    pub fn num_overlaps(&self) -> u64 {
        self.overlap.as_ref().map_or(0, Overlap::count)
    }

    /// Bytes of the pool of activations that were ever in use, and all of them.
    pub fn activation_use(&self) -> [u64; 2] {
        self.state.as_ref().map_or([0; 2], |state| [state.pool.high_water(), state.pool.num_bytes()])
    }

    fn state(&self, op: &'static str) -> Result<&State> {
        self.state.as_ref().ok_or_else(|| unallocated(op))
    }

    fn state_mut(&mut self, op: &'static str) -> Result<&mut State> {
        self.state.as_mut().ok_or_else(|| unallocated(op))
    }

    fn begin_empty(&mut self, bucket: Option<usize>, by_shares: bool) -> Result<()> {
        let Self { state, stream, .. } = self;
        Ok(state.as_mut().ok_or_else(|| unallocated("prepare"))?.begin_empty(stream, bucket, by_shares)?)
    }

    fn loader(&self, op: &'static str) -> Result<RefMut<'_, WeightLoader>> {
        let late = |_| Error::Unsupported { op, reason: "weights come before allocate_state".to_owned() };
        RefMut::filter_map(self.loader.borrow_mut(), Option::as_mut).map_err(late)
    }

    /// Runs one operation; takes its time if that is asked for, under the name that `name` gives.
    fn measured<T>(
        &self,
        name: impl FnOnce() -> String,
        work: impl FnOnce() -> crate::Result<T>,
    ) -> Result<T> {
        Ok(match &self.profile {
            Some(profile) if profile.is_of_operations() => profile.measure(&self.stream, name(), work)?,
            _ => work()?,
        })
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Pinned buffers are freed behind this: no copy may be under way. An error has been seen before, or is nobody's.
        let _ = self.stream.synchronize();
    }
}

/// Whether the device multiplies NVFP4 as it must; says what was found.
fn has_native_fp4(kernels: &Kernels, device: &Device, stream: &Stream) -> crate::Result<bool> {
    let found = kernels.test_nvfp4(device, stream)?;
    if found.has_passed() {
        tracing::info!("NVFP4 products of prompts are W4A4: the test at the start {found}");
    } else {
        tracing::warn!("NVFP4 products of prompts are W4A16, with activations in bfloat16: {found}");
    }
    Ok(found.has_passed())
}

fn unallocated(op: &'static str) -> Error {
    Error::Unsupported { op, reason: "allocate_state must be called first".to_owned() }
}

/// An error for inputs that the kernels do not take, said while the model is loaded.
fn check_width(op: &'static str, what: &'static str, width: usize, multiple: usize) -> Result<()> {
    match width.is_multiple_of(multiple) {
        true => Ok(()),
        false => Err(Error::Unsupported {
            op,
            reason: format!(
                "{what} must be a multiple of {multiple} on a GPU, and is {width}: use --device cpu"
            ),
        }),
    }
}

impl Backend for CudaBackend {
    type Tensor = CudaTensor;
    type Linear = Linear;
    type Experts = Experts;
    type Routing = Routing;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn rank(&self) -> Rank {
        self.team.as_ref().map_or(Rank::SINGLE, Team::rank)
    }

    fn dtype(&self) -> Dtype {
        Dtype::Bf16
    }

    fn memory(&self) -> Result<Memory> {
        Ok(self.device.memory()?)
    }

    fn vector(&self, weight: VectorWeight) -> Result<CudaTensor> {
        let VectorWeight { values, shape } = weight;
        if shape[0].checked_mul(shape[1]) != Some(values.len()) {
            return Err(Error::shape("vector", shape, values.len()));
        }
        let values: Vec<half::bf16> = values.into_iter().map(half::bf16::from_f32).collect();
        let slice = self.weights.borrow_mut().take(size_of_val(&values[..]) as u64)?;
        self.loader("vector")?.upload(&slice, &values)?;
        Ok(crate::Tensor::new(&slice, shape, Dtype::Bf16)?.into())
    }

    fn linear_weight(&self, weight: LinearWeight) -> Result<Linear> {
        check_width("linear_weight", "the number of inputs of a linear layer", weight.k(), 8)?;
        let slice = self.weights.borrow_mut().take(WeightLoader::linear_bytes(&weight)?)?;
        Ok(self.loader("linear_weight")?.linear(&self.kernels, &slice, &weight)?)
    }

    fn experts_weight(&self, weight: ExpertsWeight) -> Result<Experts> {
        if let Some((gate_up, down)) = weight.experts.first() {
            check_width("experts_weight", "hidden_size", gate_up.k(), 16)?;
            check_width("experts_weight", "moe_intermediate_size", down.k(), 16)?;
        }
        let slice = self.weights.borrow_mut().take(WeightLoader::experts_bytes(&weight)?)?;
        Ok(self.loader("experts_weight")?.experts(&self.kernels, &slice, &weight)?)
    }

    fn activation_bytes(&self, spec: &ActivationSpec) -> u64 {
        let mailboxes = Mailboxes::num_bytes(self.rank().world(), spec.hidden_size);
        sizes::activation_bytes(spec, self.rank(), self.kernels.prefill())
            + sizes::state_bytes(spec)
            + mailboxes
    }

    fn allocate_state(&mut self, spec: StateSpec) -> Result<()> {
        ops::check_model(&spec)?;
        if let Some(mut loader) = self.loader.take() {
            loader.finish()?;
        }
        tracing::info!("weights take {:.2} GiB of the GPU", self.weight_bytes() as f64 / f64::from(1 << 30));
        if let Some(team) = self.team.as_ref().filter(|_| !self.no_mailboxes) {
            let columns = spec.activations.hidden_size;
            self.mailboxes = Mailboxes::open(&self.device, &self.stream, team, columns)?;
        }
        let (rank, prefill) = (self.team.as_ref().map(Team::rank), self.kernels.prefill());
        self.state = Some(State::new(&self.device, &self.stream, &spec, rank, prefill)?);
        Ok(())
    }

    fn prepare(&mut self, forward: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()> {
        let state = self.state("prepare")?;
        let (buckets, variants) = (state.buckets(), state.variants());
        // The largest step of all and the largest decode step, as they are: what does not fit the memory shows now, and what
        // the driver and other libraries do at first uses is done outside of recordings.
        for bucket in [None, buckets.last().copied()] {
            for &by_shares in variants {
                self.begin_empty(bucket, by_shares)?;
                forward(self)?;
                self.settle()?;
                self.stream.synchronize()?;
                self.state("prepare")?.abandon();
            }
        }
        if self.enforce_eager {
            return Ok(());
        }
        let pairs = buckets.into_iter().rev().flat_map(|bucket| variants.iter().map(move |&by| (bucket, by)));
        for (bucket, by_shares) in pairs {
            self.begin_empty(Some(bucket), by_shares)?;
            let graph = self.stream.record(|| forward(self))?;
            graph.upload(&self.stream)?;
            let state = self.state_mut("prepare")?;
            state.abandon();
            state.add_graph(bucket, by_shares, graph);
        }
        Ok(self.stream.synchronize()?)
    }

    fn max_in_flight(&self) -> usize {
        2
    }

    fn admit(&mut self, slot: usize, params: SlotParams) -> Result<()> {
        let Self { state, kernels, stream, .. } = self;
        let state = state.as_mut().ok_or_else(|| unallocated("admit"))?;
        Ok(state.admit(kernels, stream, slot, &params)?)
    }

    fn step(&mut self, inputs: &StepInputs, forward: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()> {
        let Self { state, stream, team, profile, expert_tally, .. } = self;
        team.as_ref().map_or(Ok(()), Team::check)?;
        let state = state.as_mut().ok_or_else(|| unallocated("step"))?;
        let graph = state.begin(stream, inputs, !expert_tally.is_on())?;
        let is_recorded = graph.is_some();
        let launch = || graph.map_or(Ok(()), |graph| graph.launch(stream));
        match profile {
            Some(profile) => profile.step(stream, is_recorded, launch)?,
            None => launch()?,
        }
        let result = if is_recorded { Ok(()) } else { forward(self).and(self.settle().map_err(Error::from)) };
        self.state("step")?.abandon();
        result?;
        let Self { state, stream, .. } = self;
        Ok(state.as_mut().ok_or_else(|| unallocated("step"))?.end(stream, inputs)?)
    }

    fn output(&mut self) -> Result<StepOutput> {
        let output = self.state_mut("output")?.output()?;
        // What a group that fell apart has computed means nothing.
        self.team.as_ref().map_or(Ok(()), Team::check)?;
        if let Some(profile) = &self.profile {
            profile.collect()?;
        }
        Ok(output)
    }

    fn embed(&self, table: &Linear, vocab_rows: usize) -> Result<CudaTensor> {
        self.op_embed(table, vocab_rows)
    }

    fn reduce_norm(
        &self,
        partial: Option<CudaTensor>,
        residual: &mut CudaTensor,
        weight: &CudaTensor,
        eps: f32,
    ) -> Result<CudaTensor> {
        self.op_reduce_norm(partial, residual, weight, eps)
    }

    fn linear(&self, x: &CudaTensor, weight: &Linear) -> Result<CudaTensor> {
        self.op_linear(x, weight)
    }

    fn attend(&self, qkv: &CudaTensor, layer: usize, spec: &AttentionSpec<'_, Self>) -> Result<CudaTensor> {
        self.op_attend(qkv, layer, spec)
    }

    fn reduce_norm_route(
        &self,
        partial: Option<CudaTensor>,
        residual: &mut CudaTensor,
        weight: &CudaTensor,
        eps: f32,
        router: &RouterSpec<'_, Self>,
    ) -> Result<(CudaTensor, Routing)> {
        let x = self.op_reduce_norm(partial, residual, weight, eps)?;
        let routing = self.op_route(&x, router)?;
        Ok((x, routing))
    }

    fn moe_mlp(&self, x: &CudaTensor, routing: &Routing, experts: &Experts) -> Result<CudaTensor> {
        self.op_moe_mlp(x, routing, experts)
    }

    fn swiglu(&self, gate_up: &CudaTensor) -> Result<CudaTensor> {
        self.op_swiglu(gate_up)
    }

    fn set_rows(
        &self,
        x: &mut CudaTensor,
        row: usize,
        source: &CudaTensor,
        source_row: usize,
        rows: usize,
    ) -> Result<()> {
        self.op_rows(ops::Rows::Set, x, row, source, source_row, rows)
    }

    fn add_rows(
        &self,
        x: &mut CudaTensor,
        row: usize,
        source: &CudaTensor,
        source_row: usize,
        rows: usize,
    ) -> Result<()> {
        self.op_rows(ops::Rows::Add, x, row, source, source_row, rows)
    }

    fn logits(&self, x: &CudaTensor, head: &Linear, vocab_rows: usize) -> Result<CudaTensor> {
        self.op_logits(x, head, vocab_rows)
    }

    fn sample(&self, logits: &CudaTensor) -> Result<()> {
        self.op_sample(logits)
    }

    fn patches(&self, pixels: &[&[u8]], num_patches: usize, spec: &VisionSpec) -> Result<CudaTensor> {
        self.op_patches(pixels, num_patches, spec)
    }

    fn add_position(
        &self,
        x: &mut CudaTensor,
        table: &CudaTensor,
        grid: [usize; 3],
        spec: &VisionSpec,
    ) -> Result<()> {
        self.op_add_position(x, table, grid, spec)
    }

    fn layer_norm(
        &self,
        x: &CudaTensor,
        weight: &CudaTensor,
        bias: &CudaTensor,
        eps: f32,
    ) -> Result<CudaTensor> {
        self.op_layer_norm(x, weight, bias, eps)
    }

    fn vision_attend(&self, qkv: &CudaTensor, grid: [usize; 3], spec: &VisionSpec) -> Result<CudaTensor> {
        self.op_vision_attend(qkv, grid, spec)
    }

    fn activate(&self, x: &mut CudaTensor, activation: Activation) -> Result<()> {
        self.op_activate(x, activation)
    }

    fn add(&self, x: &mut CudaTensor, y: &CudaTensor) -> Result<()> {
        self.op_add(x, y)
    }

    fn linear_activate(&self, x: &CudaTensor, weight: &Linear, activation: Activation) -> Result<CudaTensor> {
        let x = x.tensor()?;
        let out = self.result("linear", [x.rows(), weight.n()])?;
        self.put_linear_then(&x, weight, After::Activate(activation), &out)?;
        Ok(out.into())
    }

    fn linear_add(&self, sum: &mut CudaTensor, x: &CudaTensor, weight: &Linear) -> Result<()> {
        self.put_linear_then(&x.tensor()?, weight, After::Add, &sum.tensor()?)
    }

    fn reshape(&self, x: &CudaTensor, columns: usize) -> Result<CudaTensor> {
        let x = x.tensor()?;
        let len = x.rows() * x.columns();
        if columns == 0 || !len.is_multiple_of(columns) {
            return Err(Error::shape("reshape columns", format!("a divisor of {len}"), columns));
        }
        Ok(crate::Tensor::new(x.slice(), [len / columns, columns], x.dtype())?.into())
    }

    fn keep(&self, x: &CudaTensor) -> Result<CudaTensor> {
        Ok(self.state("keep")?.kept.keep(&self.stream, &x.tensor()?)?)
    }

    fn keep_rows(&self, x: &CudaTensor, row: usize, rows: usize) -> Result<CudaTensor> {
        let x = x.tensor()?;
        let ([all, columns], size) = (x.shape(), x.dtype().size());
        if row.checked_add(rows).is_none_or(|end| end > all) {
            return Err(Error::shape("keep_rows", format!("rows of {all}"), (row, rows)));
        }
        let (offset, num_bytes) = (row * columns * size, rows * columns * size);
        let part = x.slice().slice(offset as u64, num_bytes as u64)?;
        let part = crate::Tensor::new(&part, [rows, columns], x.dtype())?;
        Ok(self.state("keep_rows")?.kept.keep(&self.stream, &part)?)
    }

    fn all_reduce(&self, x: &mut CudaTensor) -> Result<()> {
        self.settle()?;
        self.sum_over_ranks(&x.tensor()?)
    }

    fn broadcast(&self, x: Option<CudaTensor>, shape: [usize; 2], root: usize) -> Result<CudaTensor> {
        self.op_broadcast(x, shape, root)
    }

    fn to_host(&self, x: &CudaTensor) -> Result<(Vec<f32>, [usize; 2])> {
        self.settle()?;
        let x = x.tensor()?;
        let (shape, len) = (x.shape(), x.rows() * x.columns());
        let values = match x.dtype() {
            Dtype::F32 => self.stream.download(x.slice(), len)?,
            _ => {
                let values: Vec<half::bf16> = self.stream.download(x.slice(), len)?;
                values.into_iter().map(half::bf16::to_f32).collect()
            }
        };
        // Everything before is done: what ran outside of steps is summed here.
        if let Some(profile) = &self.profile {
            profile.collect()?;
        }
        Ok((values, shape))
    }
}
