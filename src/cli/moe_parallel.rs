//! The flag about how ranks share experts, which commands with ranks and those that only count their bytes share.

use clap::{Args, ValueEnum};
use spark_engine::MoeParallel;

#[derive(Args)]
pub(crate) struct MoeParallelArgs {
    /// How ranks share experts: a slice of every expert each (`tp`), so that all read the same number of bytes in every step, or as
    /// many whole experts each (`ep`), where a step waits for the rank that holds more of the chosen ones. Attention and the rest
    /// are shared alike in both.
    #[arg(long, value_enum, default_value = "tp", help_heading = "Ranks")]
    moe_parallel: MoeParallelArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum MoeParallelArg {
    Tp,
    Ep,
}

impl MoeParallelArgs {
    /// How they share them.
    pub(crate) fn get(&self) -> MoeParallel {
        match self.moe_parallel {
            MoeParallelArg::Tp => MoeParallel::Tp,
            MoeParallelArg::Ep => MoeParallel::Ep,
        }
    }
}
