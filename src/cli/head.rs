//! The flag about the output head, which commands with a model and those that only count its bytes share.

use clap::{Args, ValueEnum};
use spark_engine::{EngineBuilder, HeadDtype};

#[derive(Args)]
pub(crate) struct HeadArgs {
    /// Output head: as the checkpoint has it (`auto`; `bf16` insists that it is not quantised), or made FP8 while it is loaded, with a
    /// scale for each row and 128 inputs: half of its bytes for every decoded token. Embeddings stay as they are.
    #[arg(long, value_enum, default_value = "auto", help_heading = "Loading")]
    lm_head_dtype: HeadDtypeArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum HeadDtypeArg {
    Auto,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

impl HeadArgs {
    /// How the head is kept.
    pub(crate) fn dtype(&self) -> HeadDtype {
        match self.lm_head_dtype {
            HeadDtypeArg::Auto => HeadDtype::Auto,
            HeadDtypeArg::Bf16 => HeadDtype::Bf16,
            HeadDtypeArg::Fp8 => HeadDtype::Fp8,
        }
    }

    /// Sets it.
    pub(crate) fn apply(&self, builder: EngineBuilder) -> EngineBuilder {
        builder.lm_head_dtype(self.dtype())
    }
}
