//! The flag about the encoder and ranks, which commands with ranks and those that only count their bytes share.

use clap::{Args, ValueEnum};
use spark_engine::EncoderSplit;

#[derive(Args)]
pub(crate) struct EncoderArgs {
    /// What ranks split of the vision encoder: its pictures, by patches, each rank with all of the weights; or its weights, so that
    /// each holds a part of them and all ranks encode every picture together.
    #[arg(long, value_enum, default_value = "data", value_name = "MODE", help_heading = "Ranks")]
    mm_encoder_tp_mode: EncoderTpMode,
}

#[derive(Clone, Copy, ValueEnum)]
enum EncoderTpMode {
    Data,
    Weights,
}

impl EncoderArgs {
    /// What is split.
    pub(crate) fn split(&self) -> EncoderSplit {
        match self.mm_encoder_tp_mode {
            EncoderTpMode::Data => EncoderSplit::Data,
            EncoderTpMode::Weights => EncoderSplit::Weights,
        }
    }
}
