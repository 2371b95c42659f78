//! What a model says about its parameters: names, shapes, how they are fused and split. Not where they are stored.

/// One parameter of a model, stated by the model beside its mathematics.
///
/// Names are Hugging Face's in the form `model.language_model.X`, `model.visual.X`, `lm_head`; other dialects are
/// brought into it on both sides (see [`normalise`](crate::normalise)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// Key of the parameter; unique in a list of specs.
    pub name: String,
    /// What it is.
    pub kind: ParamKind,
    /// How ranks share it.
    pub shard: Shard,
}

/// Kinds of parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParamKind {
    /// A small dense tensor, float32 on the host (norm, position table). `name` is the whole tensor name, with
    /// `.weight` or `.bias` where it has one. Further dimensions of the tensor are flattened into the columns.
    Vector {
        /// Rows and columns; a vector has one row.
        shape: [usize; 2],
    },
    /// A linear layer. The tensors of a part are `name.part.weight` or its quantised companions, and `name.part.bias`.
    /// An empty part means `name` itself is the module (`name.weight`), an empty name means the part is.
    Linear {
        /// Part names and their output features, in output order.
        parts: Vec<(String, usize)>,
        /// Input features.
        k: usize,
        /// Whether every part must have a bias (a bias that is there but not expected is an unused tensor).
        bias: bool,
    },
    /// The routed experts of a layer; `name` ends with `mlp.experts`.
    Experts {
        /// Experts.
        num_experts: usize,
        /// Inputs of gate and up, outputs of down.
        hidden: usize,
        /// Outputs of gate and of up, inputs of down.
        intermediate: usize,
    },
}

/// How the ranks of a tensor-parallel group share a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shard {
    /// Every rank holds all of it.
    Replicated,
    /// Column parallel: the outputs of each part are split.
    Rows,
    /// Row parallel: the inputs are split; a bias stays on rank 0, because the partial sums are added.
    Columns,
    /// As `Rows`, for the fused parts q, k, v of attention: q is split evenly, k and v by heads, of which each is held by
    /// several ranks where ranks are more ([`Rank::kv_heads`](spark_backend::Rank::kv_heads)).
    Qkv {
        /// Heads in k and in v.
        num_kv_heads: usize,
    },
    /// As `Rows`, for a linear layer of one module that is several layers of as many outputs, one below the other (the encoder's
    /// q, k, v): each of them is split, and becomes a part of its own.
    Stacked {
        /// Layers.
        count: usize,
    },
    /// Each expert is split along its intermediate size.
    Experts,
    /// Every rank holds some experts whole: its [range](spark_backend::Rank::range) of them.
    WholeExperts,
    /// The vocabulary rows are split.
    Vocab,
}

impl ParamSpec {
    /// A replicated [`ParamKind::Vector`].
    pub fn vector(name: impl Into<String>, shape: [usize; 2]) -> Self {
        ParamSpec { name: name.into(), kind: ParamKind::Vector { shape }, shard: Shard::Replicated }
    }

    /// A linear layer `[n, k]` of one part without bias, whose module is `name`.
    pub fn linear(name: impl Into<String>, n: usize, k: usize, shard: Shard) -> Self {
        ParamSpec::fused(name, &[("", n)], k, shard)
    }

    /// A linear layer of fused parts without bias: `name.part` are the modules, each with its output features.
    pub fn fused(name: impl Into<String>, parts: &[(&str, usize)], k: usize, shard: Shard) -> Self {
        let parts = parts.iter().map(|&(part, n)| (part.to_owned(), n)).collect();
        ParamSpec { name: name.into(), kind: ParamKind::Linear { parts, k, bias: false }, shard }
    }

    /// The same linear layer with a bias on every part; other kinds are returned unchanged.
    #[must_use]
    pub fn with_bias(mut self) -> Self {
        if let ParamKind::Linear { bias, .. } = &mut self.kind {
            *bias = true;
        }
        self
    }

    /// The routed experts under `name`, split along their intermediate size.
    pub fn experts(name: impl Into<String>, num_experts: usize, hidden: usize, intermediate: usize) -> Self {
        let kind = ParamKind::Experts { num_experts, hidden, intermediate };
        ParamSpec { name: name.into(), kind, shard: Shard::Experts }
    }

    /// The same parameter, shared by another rule.
    #[must_use]
    pub fn sharded(self, shard: Shard) -> Self {
        Self { shard, ..self }
    }
}

impl Shard {
    /// Matrices that each module of a linear layer becomes.
    pub(crate) fn matrices(self) -> usize {
        match self {
            Shard::Stacked { count } => count,
            _ => 1,
        }
    }
}

/// `prefix.part`, where either may be empty.
pub(crate) fn join(prefix: &str, part: &str) -> String {
    match (prefix.is_empty(), part.is_empty()) {
        (true, _) => part.to_owned(),
        (_, true) => prefix.to_owned(),
        _ => format!("{prefix}.{part}"),
    }
}
