//! The operations a model is written in.

use std::ops::Range;

use crate::{
    ActivationSpec, Dtype, Error, ExpertsWeight, LinearWeight, Memory, Rank, Result, SlotParams, StateSpec,
    StepInputs, StepOutput, VectorWeight,
};

/// A device that can run the models.
///
/// Activations are matrices `[rows, columns]` in the compute dtype. Inside [`step`](Backend::step) the operations
/// read the step's inputs (tokens, positions, block tables) from the backend; nothing is read back until
/// [`output`](Backend::output). One thread drives a backend.
///
/// A decoder layer is six calls: [`reduce_norm`](Backend::reduce_norm), [`linear`](Backend::linear) (qkv),
/// [`attend`](Backend::attend), `linear` (o), [`reduce_norm_route`](Backend::reduce_norm_route),
/// [`moe_mlp`](Backend::moe_mlp).
pub trait Backend: Send + Sized + 'static {
    /// An activation or a small dense weight.
    type Tensor: Send + Sync;
    /// A linear layer's weights, repacked for this device.
    type Linear: Send + Sync;
    /// One layer's experts, repacked for this device.
    type Experts: Send + Sync;
    /// The router's choice for each row: experts and weights.
    type Routing;

    // ---- start

    /// For logs and `inspect`.
    fn name(&self) -> &'static str;

    /// Which rank of its group this backend is. With more than one, weights are this rank's shards, and partial sums and
    /// logits are brought together inside the operations that say so.
    fn rank(&self) -> Rank {
        Rank::SINGLE
    }

    /// The compute dtype: results are rounded to it where Hugging Face's are.
    fn dtype(&self) -> Dtype;

    /// The memory that weights and state are taken from.
    ///
    /// # Errors
    /// Device failure.
    fn memory(&self) -> Result<Memory> {
        Ok(Memory::of_machine())
    }

    /// Takes a small dense weight.
    ///
    /// # Errors
    /// Out of memory.
    fn vector(&self, weight: VectorWeight) -> Result<Self::Tensor>;

    /// Takes a linear layer, repacking it.
    ///
    /// # Errors
    /// Unsupported shape, or out of memory.
    fn linear_weight(&self, weight: LinearWeight) -> Result<Self::Linear>;

    /// Takes a layer's experts, repacking them.
    ///
    /// # Errors
    /// Unsupported shape, or out of memory.
    fn experts_weight(&self, weight: ExpertsWeight) -> Result<Self::Experts>;

    /// Bytes of all activations that are alive at once in the largest step, or while the largest medium is encoded, and of the
    /// sampling state: what [`allocate_state`](Backend::allocate_state) sets aside besides KV pool and encoder cache, or an
    /// upper bound.
    fn activation_bytes(&self, spec: &ActivationSpec) -> u64;

    /// Allocates KV pool and slots. Nothing is allocated on the device afterwards.
    ///
    /// # Errors
    /// Out of memory.
    fn allocate_state(&mut self, spec: StateSpec) -> Result<()>;

    /// Gets ready for steps of any size, once, after [`allocate_state`](Backend::allocate_state): records `forward` where
    /// steps are replayed, so that no request waits for it.
    ///
    /// # Errors
    /// Device failure.
    fn prepare(&mut self, _forward: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()> {
        Ok(())
    }

    /// Steps that may be started before the [`output`](Backend::output) of the oldest is taken: 1 where `step` computes
    /// before it returns, so that no result waits for the next step.
    fn max_in_flight(&self) -> usize {
        1
    }

    // ---- per sequence and per step

    /// Sets a slot's sampling state.
    ///
    /// # Errors
    /// Device failure.
    fn admit(&mut self, slot: usize, params: SlotParams) -> Result<()>;

    /// Runs `forward` over `inputs`, or what was recorded of it for this [`StepKey`](crate::StepKey). Returns when the work is
    /// given to the device, which may still be at it.
    ///
    /// # Errors
    /// What `forward` returns, or device failure; two steps whose output was not taken.
    fn step(&mut self, inputs: &StepInputs, forward: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()>;

    /// Waits for the oldest step whose output was not taken yet and returns what it sampled.
    ///
    /// # Errors
    /// Device failure, or no such step.
    fn output(&mut self) -> Result<StepOutput>;

    // ---- decoder, inside a step

    /// Rows of a table of `vocab_rows` rows for the step's tokens: `[num_tokens, hidden]`. `table` holds this rank's
    /// [share](Rank::range) of it; the group brings the rows together.
    ///
    /// # Errors
    /// Device or peer failure.
    fn embed(&self, table: &Self::Linear, vocab_rows: usize) -> Result<Self::Tensor>;

    /// `residual += all_reduce(partial)`, then RMSNorm of it: statistic in float32, times `weight`.
    /// `residual`, `partial` and the result are `[rows, hidden]`.
    ///
    /// # Errors
    /// Shape mismatch, device or peer failure.
    fn reduce_norm(
        &self,
        partial: Option<Self::Tensor>,
        residual: &mut Self::Tensor,
        weight: &Self::Tensor,
        eps: f32,
    ) -> Result<Self::Tensor>;

    /// `x W^T + b`: `[rows, k]` to `[rows, n]`.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Linear) -> Result<Self::Tensor>;

    /// Per-head RMSNorm of q and k, interleaved M-RoPE, KV write, causal paged attention over the step's sequences.
    /// `qkv` is `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`, the result `[num_tokens, num_heads * head_dim]`.
    /// K and V are always read as stored, the current token's too, so that chunking does not change answers.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn attend(
        &self,
        qkv: &Self::Tensor,
        layer: usize,
        spec: &AttentionSpec<'_, Self>,
    ) -> Result<Self::Tensor>;

    /// [`reduce_norm`](Backend::reduce_norm), then the router: logits `x W^T`, softmax over all experts in float32,
    /// `top_k` of them, renormalised to sum 1 if `renormalize`. Ties go to the lower expert. Every rank routes over all experts.
    ///
    /// # Errors
    /// Shape mismatch, device or peer failure.
    fn reduce_norm_route(
        &self,
        partial: Option<Self::Tensor>,
        residual: &mut Self::Tensor,
        weight: &Self::Tensor,
        eps: f32,
        router: &RouterSpec<'_, Self>,
    ) -> Result<(Self::Tensor, Self::Routing)>;

    /// `sum over chosen experts of weight * down(silu(gate(x)) * up(x))`, accumulated in float32, experts in
    /// ascending order. A partial sum where there are several ranks: `experts` are a part of each expert, or those that
    /// [`RouterSpec::experts`] names; a row that has chosen none of these gets zeros.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn moe_mlp(
        &self,
        x: &Self::Tensor,
        routing: &Self::Routing,
        experts: &Self::Experts,
    ) -> Result<Self::Tensor>;

    /// `silu(gate) * up` of `[rows, 2 * intermediate]`: `[rows, intermediate]`.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn swiglu(&self, gate_up: &Self::Tensor) -> Result<Self::Tensor>;

    /// Overwrites `rows` rows of `x` from `row` on with rows of `source` from `source_row` on.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn set_rows(
        &self,
        x: &mut Self::Tensor,
        row: usize,
        source: &Self::Tensor,
        source_row: usize,
        rows: usize,
    ) -> Result<()>;

    /// Adds them instead (deepstack). `x` is the replicated residual, never a partial sum.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn add_rows(
        &self,
        x: &mut Self::Tensor,
        row: usize,
        source: &Self::Tensor,
        source_row: usize,
        rows: usize,
    ) -> Result<()>;

    /// Logits of the step's `logit_rows`, in float32: `[num_logit_rows, vocab_rows]`. `head` holds this rank's
    /// [share](Rank::range) of the rows. Every rank ends with all logits, or with those of its share where that is enough to
    /// [sample](Backend::sample): then the result has only these columns.
    ///
    /// # Errors
    /// Shape mismatch, device or peer failure.
    fn logits(&self, x: &Self::Tensor, head: &Self::Linear, vocab_rows: usize) -> Result<Self::Tensor>;

    /// Samples the rows that have a slot and keeps the tokens on the device; computes what
    /// [`output`](Backend::output) returns.
    ///
    /// # Errors
    /// Device failure.
    fn sample(&self, logits: &Self::Tensor) -> Result<()>;

    // ---- vision encoder, outside a step

    /// Patch rows of media (each `[patches, 3, frames, patch, patch]` u8, all alike) as the encoder wants them: `(v - mean) / std` of
    /// `v / 255`, frames repeated up to `temporal`: `[num_patches, 3 * temporal * patch * patch]`, one medium after the other.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn patches(&self, pixels: &[&[u8]], num_patches: usize, spec: &VisionSpec) -> Result<Self::Tensor>;

    /// Adds the bilinearly interpolated rows of the square position table (`[side * side, hidden]`, corners aligned)
    /// to `x`, `[num_patches, hidden]` in merge-block order, one frame after the other.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn add_position(
        &self,
        x: &mut Self::Tensor,
        table: &Self::Tensor,
        grid: [usize; 3],
        spec: &VisionSpec,
    ) -> Result<()>;

    /// LayerNorm over columns; `weight` and `bias` are `[1, columns]`.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn layer_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        bias: &Self::Tensor,
        eps: f32,
    ) -> Result<Self::Tensor>;

    /// 2-D rotary embedding and full attention inside each frame: `qkv` `[num_patches, 3 * hidden]` (q, k, v stacked)
    /// to `[num_patches, hidden]`.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn vision_attend(&self, qkv: &Self::Tensor, grid: [usize; 3], spec: &VisionSpec) -> Result<Self::Tensor>;

    /// Applies an activation to every element.
    ///
    /// # Errors
    /// Device failure.
    fn activate(&self, x: &mut Self::Tensor, activation: Activation) -> Result<()>;

    /// `x += y`, same shapes.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;

    /// [`activate`](Backend::activate) of [`linear`](Backend::linear): rounded twice, as the two are.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn linear_activate(
        &self,
        x: &Self::Tensor,
        weight: &Self::Linear,
        activation: Activation,
    ) -> Result<Self::Tensor> {
        let mut out = self.linear(x, weight)?;
        self.activate(&mut out, activation)?;
        Ok(out)
    }

    /// [`add`](Backend::add)s [`linear`](Backend::linear) of `x` to `sum`: rounded twice, as the two are.
    ///
    /// # Errors
    /// Shape mismatch or device failure.
    fn linear_add(&self, sum: &mut Self::Tensor, x: &Self::Tensor, weight: &Self::Linear) -> Result<()> {
        self.add(sum, &self.linear(x, weight)?)
    }

    /// The same values in rows of another length: `[rows, columns]` to `[rows * columns / new, new]`. May share memory with `x`:
    /// while both exist, neither is to be changed.
    ///
    /// # Errors
    /// When the size is not divisible.
    fn reshape(&self, x: &Self::Tensor, columns: usize) -> Result<Self::Tensor>;

    /// A copy that outlives steps (encoder cache). All that is kept fits [`StateSpec::encoder_cache_bytes`].
    ///
    /// # Errors
    /// Out of memory.
    fn keep(&self, x: &Self::Tensor) -> Result<Self::Tensor>;

    /// [`keep`](Backend::keep) of `rows` rows of `x` from `row` on.
    ///
    /// # Errors
    /// Rows that `x` does not have, or out of memory.
    fn keep_rows(&self, x: &Self::Tensor, row: usize, rows: usize) -> Result<Self::Tensor>;

    /// `x` becomes the sum of what the ranks have of it, rounded once: for partial sums that no
    /// [`reduce_norm`](Backend::reduce_norm) takes, as the encoder's. Nothing happens without a group.
    ///
    /// # Errors
    /// Another shape on another rank, device or peer failure; by default for more than one rank.
    fn all_reduce(&self, _x: &mut Self::Tensor) -> Result<()> {
        match self.rank() {
            Rank::SINGLE => Ok(()),
            _ => Err(no_group("all_reduce")),
        }
    }

    /// `x` of rank `root` on every rank of the group: `shape`. The root brings it; what others bring is overwritten.
    ///
    /// # Errors
    /// Another shape, no tensor at the root, device or peer failure; by default for more than one rank.
    fn broadcast(&self, x: Option<Self::Tensor>, shape: [usize; 2], root: usize) -> Result<Self::Tensor> {
        const OP: &str = "broadcast";
        match (x, self.rank()) {
            (Some(x), Rank::SINGLE) if root == 0 => Ok(x),
            (_, Rank::SINGLE) => Err(Error::shape(OP, format_args!("a tensor {shape:?} of rank 0"), root)),
            _ => Err(no_group(OP)),
        }
    }

    /// The values on the host, float32, row-major: for tests, `--profile` and debugging, never inside a served step.
    ///
    /// # Errors
    /// Device failure.
    fn to_host(&self, x: &Self::Tensor) -> Result<(Vec<f32>, [usize; 2])>;
}

fn no_group(op: &'static str) -> Error {
    Error::Unsupported { op, reason: "this backend has no group".to_owned() }
}

/// Elementwise functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU, tanh approximation (encoder blocks).
    GeluTanh,
    /// GELU with erf (mergers).
    GeluErf,
    /// SiLU.
    Silu,
}

/// What [`Backend::attend`] needs besides qkv.
pub struct AttentionSpec<'a, B: Backend> {
    /// `[1, head_dim]`.
    pub q_norm: &'a B::Tensor,
    /// `[1, head_dim]`.
    pub k_norm: &'a B::Tensor,
    /// Of `q_norm` and `k_norm`.
    pub eps: f32,
    /// Query heads of this rank.
    pub num_heads: usize,
    /// KV heads of this rank.
    pub num_kv_heads: usize,
    /// Head dimension.
    pub head_dim: usize,
    /// `[1, head_dim / 2]` inverse frequencies (float32), YaRN applied.
    pub inv_freq: &'a [f32],
    /// Factor on cos and sin (YaRN); 1 otherwise.
    pub rope_factor: f32,
    /// Frequencies of time, height, width; `[half, 0, 0]` for ordinary rope. Interleaved: frequency `j` turns with the
    /// height if `j % 3 == 1 && j < 3 * section[1]`, with the width if `j % 3 == 2 && j < 3 * section[2]`, else time.
    pub mrope_section: [usize; 3],
}

/// A router and the rule of its choice.
pub struct RouterSpec<'a, B: Backend> {
    /// `[num_experts, hidden]`, the same on every rank.
    pub router: &'a B::Linear,
    /// Experts of a row.
    pub top_k: usize,
    /// Whether their weights are made to sum to 1.
    pub renormalize: bool,
    /// The experts that [`Backend::moe_mlp`] is given for this choice, of `0..num_experts`: all, or those that this rank holds
    /// whole. The weights of a row are over all that it has chosen.
    pub experts: Range<usize>,
}

/// Geometry of the vision encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionSpec {
    /// Heads of this rank.
    pub num_heads: usize,
    /// Width of these heads together: the encoder's where they are all of it.
    pub hidden_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Frames of a patch.
    pub temporal_patch_size: usize,
    /// Side of a merge block in patches.
    pub merge_size: usize,
    /// Per channel.
    pub image_mean: [f32; 3],
    /// Per channel.
    pub image_std: [f32; 3],
}
