//! Stating and taking parameters below a name prefix; no mathematics.

use spark_backend::{Backend, Error};
use spark_weights::{ParamSpec, Params, Shard};

use crate::{Result, config::MoeConfig};

/// Collects the parameters of one module.
pub(crate) struct Specs<'a> {
    pub(crate) prefix: &'a str,
    pub(crate) out: &'a mut Vec<ParamSpec>,
}

impl Specs<'_> {
    /// A small tensor by its full name; the same on every rank.
    pub(crate) fn vector(&mut self, name: &str, shape: [usize; 2]) {
        self.out.push(ParamSpec::vector(self.name(name), shape));
    }

    /// A layer without bias.
    pub(crate) fn linear(&mut self, module: &str, n: usize, k: usize, shard: Shard) {
        self.out.push(ParamSpec::linear(self.name(module), n, k, shard));
    }

    /// Layers `module.part` over the same input, fused into one without bias under the name `module`.
    pub(crate) fn fused(&mut self, module: &str, parts: &[(&str, usize)], k: usize, shard: Shard) {
        self.out.push(ParamSpec::fused(self.name(module), parts, k, shard));
    }

    /// A layer with bias (vision encoder).
    pub(crate) fn linear_with_bias(&mut self, module: &str, n: usize, k: usize, shard: Shard) {
        self.out.push(ParamSpec::linear(self.name(module), n, k, shard).with_bias());
    }

    /// The routed experts of a layer.
    pub(crate) fn experts(&mut self, module: &str, moe: &MoeConfig, hidden: usize) {
        let spec = ParamSpec::experts(self.name(module), moe.num_experts, hidden, moe.moe_intermediate_size);
        self.out.push(spec.sharded(moe.shard()));
    }

    fn name(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }
}

/// Takes the parameters of one module to a backend.
pub(crate) struct Loader<'a, B: Backend> {
    pub(crate) prefix: &'a str,
    pub(crate) params: &'a mut Params,
    pub(crate) backend: &'a B,
}

impl<B: Backend> Loader<'_, B> {
    pub(crate) fn vector(&mut self, name: &str) -> Result<B::Tensor> {
        Ok(self.backend.vector(self.params.vector(&format!("{}.{name}", self.prefix))?)?)
    }

    pub(crate) fn linear(&mut self, name: &str) -> Result<B::Linear> {
        let name = format!("{}.{name}", self.prefix);
        Ok(self.backend.linear_weight(self.params.linear(&name)?).map_err(of_parameter(&name))?)
    }

    pub(crate) fn experts(&mut self, name: &str) -> Result<B::Experts> {
        let name = format!("{}.{name}", self.prefix);
        Ok(self.backend.experts_weight(self.params.experts(&name)?).map_err(of_parameter(&name))?)
    }
}

/// Names the parameter that a backend does not take.
fn of_parameter(name: &str) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Unsupported { op, reason } => Error::Unsupported { op, reason: format!("{name}: {reason}") },
        other => other,
    }
}
