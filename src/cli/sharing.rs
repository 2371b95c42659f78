//! The flags about what of a model ranks share, for commands with ranks and those that only count their bytes.

use clap::{Args, ValueEnum};
use spark_engine::{EncoderSplit, MoeParallel};

#[derive(Args)]
pub(crate) struct SharingArgs {
    /// How ranks share experts: a slice of every expert each (`tp`), so that all read the same number of bytes in every step, or as
    /// many whole experts each (`ep`), where a step waits for the rank that holds more of the chosen ones. Attention and the rest
    /// are shared alike in both.
    #[arg(long, value_enum, default_value = "tp", help_heading = "Ranks")]
    moe_parallel: MoeParallelArg,
    /// The same as --moe-parallel ep, in vLLM's words.
    #[arg(long, conflicts_with = "moe_parallel", help_heading = "Ranks")]
    enable_expert_parallel: bool,
    /// What ranks split of the vision encoder: its pictures, by patches, each rank with all of the weights; or its weights, so that
    /// each holds a part of them and all ranks encode every picture together.
    #[arg(long, value_enum, default_value = "data", value_name = "MODE", help_heading = "Ranks")]
    mm_encoder_tp_mode: EncoderTpMode,
}

#[derive(Clone, Copy, ValueEnum)]
enum MoeParallelArg {
    Tp,
    Ep,
}

#[derive(Clone, Copy, ValueEnum)]
enum EncoderTpMode {
    Data,
    Weights,
}

impl SharingArgs {
    /// How they share the experts.
    pub(crate) fn experts(&self) -> MoeParallel {
        match self.moe_parallel {
            MoeParallelArg::Tp if !self.enable_expert_parallel => MoeParallel::Tp,
            MoeParallelArg::Tp | MoeParallelArg::Ep => MoeParallel::Ep,
        }
    }

    /// What they split of the encoder.
    pub(crate) fn encoder(&self) -> EncoderSplit {
        match self.mm_encoder_tp_mode {
            EncoderTpMode::Data => EncoderSplit::Data,
            EncoderTpMode::Weights => EncoderSplit::Weights,
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
        args: SharingArgs,
    }

    #[test]
    fn both_words_for_whole_experts_mean_them() {
        let parse = |flags: &[&str]| Command::try_parse_from([&["command"], flags].concat());
        let parallel = |flags: &[&str]| parse(flags).ok().unwrap().args.experts();
        assert_eq!(parallel(&[]), MoeParallel::Tp);
        assert_eq!(parallel(&["--moe-parallel", "ep"]), MoeParallel::Ep);
        assert_eq!(parallel(&["--enable-expert-parallel"]), MoeParallel::Ep);
        assert!(
            parse(&["--enable-expert-parallel", "--moe-parallel", "tp"]).is_err(),
            "one of them is wrong"
        );
    }
}
