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
    /// The same as --moe-parallel ep, in vLLM's words.
    #[arg(long, conflicts_with = "moe_parallel", help_heading = "Ranks")]
    enable_expert_parallel: bool,
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
            MoeParallelArg::Tp if !self.enable_expert_parallel => MoeParallel::Tp,
            MoeParallelArg::Tp | MoeParallelArg::Ep => MoeParallel::Ep,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: MoeParallelArgs,
    }

    #[test]
    fn both_words_for_whole_experts_mean_them() {
        let parse = |flags: &[&str]| Command::try_parse_from([&["command"], flags].concat());
        let parallel = |flags: &[&str]| parse(flags).ok().unwrap().args.get();
        assert_eq!(parallel(&[]), MoeParallel::Tp);
        assert_eq!(parallel(&["--moe-parallel", "ep"]), MoeParallel::Ep);
        assert_eq!(parallel(&["--enable-expert-parallel"]), MoeParallel::Ep);
        assert!(
            parse(&["--enable-expert-parallel", "--moe-parallel", "tp"]).is_err(),
            "one of them is wrong"
        );
    }
}
