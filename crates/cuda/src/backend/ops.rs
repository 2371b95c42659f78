//! The operations: memory for the result, the wrapper's call, and the name under which its time is taken.

use spark_backend::{Activation, AttentionSpec, Dtype, Error, Result, RouterSpec, StateSpec, VisionSpec};

use super::{CudaBackend, CudaTensor, Routing};
use crate::kernels::{After, RouterRule, RowRange};
use crate::{AttendArgs, Choice, Experts, Linear, Mailboxes, ReduceNorm, StepView, Tensor};

/// Widths of heads that attention has kernels for, and the widest of the encoder.
const HEAD_DIMS: [usize; 3] = [32, 64, 128];
const MAX_VISION_HEAD_DIM: usize = 128;
/// Longest context that attention takes.
const MAX_CONTEXT: usize = 1 << 20;

/// What [`CudaBackend::op_rows`] does with rows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rows {
    Set,
    Add,
}

/// An error for models that the kernels do not take, said before any memory is planned.
pub(super) fn check_model(spec: &StateSpec) -> Result<()> {
    let unsupported = |reason: String| {
        Err(Error::Unsupported { op: "allocate_state", reason: format!("{reason}: use --device cpu") })
    };
    let (head_dim, vision) = (spec.kv.head_dim, spec.activations.vision_head_dim);
    if !HEAD_DIMS.contains(&head_dim) {
        return unsupported(format!("head_dim must be one of {HEAD_DIMS:?} on a GPU, and is {head_dim}"));
    }
    let longest = spec.max_blocks_per_seq.saturating_mul(spec.kv.block_size);
    if longest > MAX_CONTEXT.next_multiple_of(spec.kv.block_size.max(1)) {
        return unsupported(format!("sequences have at most {MAX_CONTEXT} tokens on a GPU, not {longest}"));
    }
    if vision > MAX_VISION_HEAD_DIM {
        return unsupported(format!(
            "the encoder's heads are {vision} wide, on a GPU at most {MAX_VISION_HEAD_DIM}"
        ));
    }
    let widths = [
        ("hidden_size", spec.activations.hidden_size, 16),
        ("moe_intermediate_size", spec.activations.moe_intermediate_size, 16),
        ("intermediate_size", spec.activations.intermediate_size, 16),
        ("the encoder's hidden_size", spec.activations.vision_hidden_size, 8),
        ("the encoder's intermediate_size", spec.activations.vision_intermediate_size, 8),
    ];
    match widths.iter().find(|(_, width, multiple)| !width.is_multiple_of(*multiple)) {
        Some((what, width, multiple)) => {
            unsupported(format!("{what} must be a multiple of {multiple} on a GPU, and is {width}"))
        }
        None => Ok(()),
    }
}

impl CudaBackend {
    /// Memory for a result in the compute dtype.
    pub(super) fn result(&self, op: &'static str, shape: [usize; 2]) -> Result<Tensor> {
        Ok(self.state(op)?.pool.tensor(op, shape, Dtype::Bf16)?)
    }

    fn view(&self, op: &'static str) -> Result<StepView> {
        Ok(self.state(op)?.view(op)?)
    }

    pub(super) fn op_embed(&self, table: &Linear, vocab_rows: usize) -> Result<CudaTensor> {
        let first_row = self.first_row("embed", table, vocab_rows)?;
        let step = self.view("embed")?;
        let out = self.result("embed", [step.num_tokens, table.k()])?;
        let last_tokens = self.state("embed")?.sampler.last_tokens();
        self.measured(
            || "embed".to_owned(),
            || self.kernels.embed(&self.stream, &step.tokens, last_tokens, table, first_row, &out),
        )?;
        // Rows of the other ranks' tokens are zero here.
        self.sum_over_ranks(&out)?;
        Ok(out.into())
    }

    pub(super) fn op_reduce_norm(
        &self,
        partial: Option<CudaTensor>,
        residual: &mut CudaTensor,
        weight: &CudaTensor,
        eps: f32,
    ) -> Result<CudaTensor> {
        let (residual, weight) = (residual.tensor()?, weight.tensor()?);
        let partial = partial.map(|partial| partial.tensor()).transpose()?;
        let out = self.result("reduce_norm", residual.shape())?;
        let args = ReduceNorm { partial: partial.as_ref(), residual: &residual, weight: &weight, eps };
        if self.norm_in_halves(&args, &out)? {
            return Ok(out.into());
        }
        self.settle()?;
        let fits = |mailboxes: &&Mailboxes| partial.as_ref().is_some_and(|partial| mailboxes.takes(partial));
        if let Some(mailboxes) = self.mailboxes.as_ref().filter(fits) {
            self.measured(
                || "reduce_norm of ranks".to_owned(),
                || self.kernels.reduce_norm_ranks(&self.stream, mailboxes, args, &out),
            )?;
            return Ok(out.into());
        }
        partial.as_ref().map_or(Ok(()), |partial| self.sum_over_ranks(partial))?;
        self.measured(|| "reduce_norm".to_owned(), || self.kernels.reduce_norm(&self.stream, args, &out))?;
        Ok(out.into())
    }

    pub(super) fn op_linear(&self, x: &CudaTensor, weight: &Linear) -> Result<CudaTensor> {
        let x = x.tensor()?;
        let out = self.result("linear", [x.rows(), weight.n()])?;
        self.in_halves(&x, &out, |x, out| self.put_linear("linear", x, weight, out))?;
        Ok(out.into())
    }

    pub(super) fn put_linear(
        &self,
        op: &'static str,
        x: &Tensor,
        weight: &Linear,
        out: &Tensor,
    ) -> Result<()> {
        let pool = &self.state(op)?.pool;
        self.measured(
            || format!("{op} {} x {}", weight.n(), weight.k()),
            || self.kernels.linear(&self.stream, pool, x, weight, out),
        )
    }

    pub(super) fn put_linear_then(
        &self,
        x: &Tensor,
        weight: &Linear,
        after: After,
        out: &Tensor,
    ) -> Result<()> {
        let pool = &self.state("linear")?.pool;
        self.measured(
            || format!("linear {} x {}, {after}", weight.n(), weight.k()),
            || self.kernels.linear_then(&self.stream, pool, x, weight, after, out),
        )
    }

    pub(super) fn op_attend(
        &self,
        qkv: &CudaTensor,
        layer: usize,
        spec: &AttentionSpec<'_, Self>,
    ) -> Result<CudaTensor> {
        self.settle()?;
        let (state, step) = (self.state("attend")?, self.view("attend")?);
        let (qkv, q_norm, k_norm) = (qkv.tensor()?, spec.q_norm.tensor()?, spec.k_norm.tensor()?);
        let out = self.result("attend", [qkv.rows(), spec.num_heads * spec.head_dim])?;
        let args = AttendArgs {
            layer,
            q_norm: &q_norm,
            k_norm: &k_norm,
            eps: spec.eps,
            num_heads: spec.num_heads,
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            inv_freq: spec.inv_freq,
            rope_factor: spec.rope_factor,
            mrope_section: spec.mrope_section,
            kv: &state.kv,
            step: &step,
        };
        self.measured(
            || "attend".to_owned(),
            || self.kernels.attend(&self.stream, &state.pool, &qkv, &args, &out),
        )?;
        Ok(out.into())
    }

    pub(super) fn op_route(&self, x: &CudaTensor, router: &RouterSpec<'_, Self>) -> Result<Routing> {
        self.route_in_halves(&x.tensor()?, router)
    }

    pub(super) fn put_route(&self, x: &Tensor, spec: &RouterSpec<'_, Self>) -> Result<Choice> {
        let state = self.state("route")?;
        // Rows of padding choose no experts, so that none is read for them.
        let step = state.view("route")?;
        let counts = (step.num_tokens == x.rows()).then_some(&step.counts);
        let &RouterSpec { router, top_k, renormalize, experts: ref held } = spec;
        let rule = RouterRule { router, top_k, renormalize, held: held.clone(), counts };
        let choice = self.measured(
            || "route".to_owned(),
            || self.kernels.route_for_experts(&self.stream, &state.pool, x, &rule),
        )?;
        if self.expert_tally.is_on() && step.is_decode {
            match x.rows() {
                // Its experts choose for themselves: nothing is to be read.
                1 => self.expert_tally.add_number(top_k),
                rows => {
                    let chosen = self.stream.download::<u32>(choice.experts(), rows * top_k)?;
                    self.expert_tally.add(&chosen, router.n());
                }
            }
        }
        Ok(choice)
    }

    pub(super) fn op_moe_mlp(
        &self,
        x: &CudaTensor,
        routing: &Routing,
        experts: &Experts,
    ) -> Result<CudaTensor> {
        let x = x.tensor()?;
        let out = self.result("moe_mlp", x.shape())?;
        self.experts_in_halves(&x, routing, experts, &out)?;
        Ok(out.into())
    }

    pub(super) fn put_experts(
        &self,
        x: &Tensor,
        choice: &Choice,
        experts: &Experts,
        out: &Tensor,
    ) -> Result<()> {
        let pool = &self.state("moe_mlp")?.pool;
        self.measured(
            || "moe_mlp".to_owned(),
            || self.kernels.moe_mlp(&self.stream, pool, x, choice, experts, out),
        )
    }

    pub(super) fn op_swiglu(&self, gate_up: &CudaTensor) -> Result<CudaTensor> {
        self.settle()?;
        let gate_up = gate_up.tensor()?;
        let out = self.result("swiglu", [gate_up.rows(), gate_up.columns() / 2])?;
        self.measured(|| "swiglu".to_owned(), || self.kernels.swiglu(&self.stream, &gate_up, &out))?;
        Ok(out.into())
    }

    pub(super) fn op_rows(
        &self,
        what: Rows,
        x: &mut CudaTensor,
        row: usize,
        source: &CudaTensor,
        source_row: usize,
        rows: usize,
    ) -> Result<()> {
        self.settle()?;
        let (x, source) = (x.tensor()?, source.tensor()?);
        let range = RowRange { row, source_row, rows };
        let stream = &self.stream;
        match what {
            Rows::Set => {
                self.measured(|| "set_rows".to_owned(), || self.kernels.set_rows(stream, &x, &source, range))
            }
            Rows::Add => {
                self.measured(|| "add_rows".to_owned(), || self.kernels.add_rows(stream, &x, &source, range))
            }
        }
    }

    pub(super) fn op_logits(&self, x: &CudaTensor, head: &Linear, vocab_rows: usize) -> Result<CudaTensor> {
        self.settle()?;
        self.first_row("logits", head, vocab_rows)?;
        let (step, x) = (self.view("logits")?, x.tensor()?);
        let rows = match step.is_decode {
            true => x,
            false => {
                let rows = self.result("logits", [step.num_logit_rows, x.columns()])?;
                self.measured(
                    || "gather_rows".to_owned(),
                    || self.kernels.gather_rows(&self.stream, &x, &step.logit_rows, &rows),
                )?;
                rows
            }
        };
        let out = match &self.team {
            Some(team) if !self.state("logits")?.is_by_shares() => {
                self.gathered_logits(team, &rows, head, vocab_rows)?
            }
            _ => {
                let shape = [step.num_logit_rows, head.n()];
                let out = self.state("logits")?.pool.tensor("logits", shape, Dtype::F32)?;
                self.put_linear("logits", &rows, head, &out)?;
                out
            }
        };
        Ok(out.into())
    }

    pub(super) fn op_sample(&self, logits: &CudaTensor) -> Result<()> {
        let (state, step, logits) = (self.state("sample")?, self.view("sample")?, logits.tensor()?);
        if let Some(team) = self.team.as_ref().filter(|_| state.is_by_shares()) {
            return self.sample_shares(team, &logits);
        }
        self.measured(
            || "sample".to_owned(),
            || self.kernels.sample(&self.stream, &logits, &step, &state.sampler, &state.sample_out),
        )
    }

    pub(super) fn op_patches(
        &self,
        pixels: &[&[u8]],
        num_patches: usize,
        spec: &VisionSpec,
    ) -> Result<CudaTensor> {
        let state = self.state("patches")?;
        let columns = 3 * spec.temporal_patch_size * spec.patch_size * spec.patch_size;
        let num_bytes: usize = pixels.iter().map(|medium| medium.len()).sum();
        let on_device = state.pool.take("pixels", num_bytes as u64)?;
        let mut upload = state.pixels.borrow_mut();
        let Some(upload) = upload.as_mut() else {
            let reason = "the state was allocated for a model without an encoder".to_owned();
            return Err(Error::Unsupported { op: "patches", reason });
        };
        upload.pixels(&self.stream, &on_device, pixels)?;
        let out = self.result("patches", [num_patches, columns])?;
        self.measured(
            || "patches".to_owned(),
            || self.kernels.patches(&self.stream, &on_device, spec, &out),
        )?;
        Ok(out.into())
    }

    pub(super) fn op_add_position(
        &self,
        x: &mut CudaTensor,
        table: &CudaTensor,
        grid: [usize; 3],
        spec: &VisionSpec,
    ) -> Result<()> {
        let (x, table) = (x.tensor()?, table.tensor()?);
        self.measured(
            || "add_position".to_owned(),
            || self.kernels.add_position(&self.stream, &x, &table, grid, spec),
        )
    }

    pub(super) fn op_layer_norm(
        &self,
        x: &CudaTensor,
        weight: &CudaTensor,
        bias: &CudaTensor,
        eps: f32,
    ) -> Result<CudaTensor> {
        let (x, weight, bias) = (x.tensor()?, weight.tensor()?, bias.tensor()?);
        let out = self.result("layer_norm", x.shape())?;
        self.measured(
            || "layer_norm".to_owned(),
            || self.kernels.layer_norm(&self.stream, &x, [&weight, &bias], eps, &out),
        )?;
        Ok(out.into())
    }

    pub(super) fn op_vision_attend(
        &self,
        qkv: &CudaTensor,
        grid: [usize; 3],
        spec: &VisionSpec,
    ) -> Result<CudaTensor> {
        let (pool, qkv) = (&self.state("vision_attend")?.pool, qkv.tensor()?);
        let out = self.result("vision_attend", [qkv.rows(), spec.hidden_size])?;
        self.measured(
            || "vision_attend".to_owned(),
            || self.kernels.vision_attend(&self.stream, pool, &qkv, grid, spec, &out),
        )?;
        Ok(out.into())
    }

    pub(super) fn op_activate(&self, x: &mut CudaTensor, activation: Activation) -> Result<()> {
        let x = x.tensor()?;
        self.measured(|| "activate".to_owned(), || self.kernels.activate(&self.stream, &x, activation))
    }

    pub(super) fn op_add(&self, x: &mut CudaTensor, y: &CudaTensor) -> Result<()> {
        let (x, y) = (x.tensor()?, y.tensor()?);
        self.measured(|| "add".to_owned(), || self.kernels.add(&self.stream, &x, &y))
    }
}
