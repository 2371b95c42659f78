//! From a plain checkpoint to an AWQ, NVFP4 or FP8 one that this engine and others load.
//!
//! [`quantize`] reads the decoder layer by layer, rounds its linear layers and writes a new checkpoint folder. With
//! calibration prompts (token ids and media: no text is known here), AWQ's search runs: `recorder` is a backend that
//! notes what the model's linear layers see, `search` finds scales and limits by their error on it, `fold` brings the
//! scales into norms and neighbours so that the model stays the same. `awq`, `nvfp4` and `fp8` are the formats, `writer`
//! the folder. No kernels and no serving: what is written is read by `spark-weights` like any other checkpoint.
#![forbid(unsafe_code)]

mod awq;
mod calibrate;
mod config;
mod error;
mod fold;
mod fp8;
mod layer;
mod linear;
mod matrix;
mod numbers;
mod nvfp4;
mod recorder;
mod report;
mod reservoir;
mod run;
mod search;
mod writer;

pub use calibrate::{CalibrationMedium, CalibrationPrompt};
pub use error::{Error, Result};
pub use report::{Kind, KindReport, Report};
pub use run::{check, quantize};

/// What to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// 4-bit integers with a scale and a zero point per group of inputs, as AutoAWQ writes them.
    Awq {
        /// Inputs per group: 16, 32, 64 or 128. `None` takes the largest but 16 that divides all input sizes. Other
        /// engines have kernels for 32, 64 and 128 only.
        group_size: Option<usize>,
        /// Whether to search for scales and limits; needs calibration prompts. Otherwise weights are rounded as they
        /// are.
        search: bool,
    },
    /// 4-bit floats with an E4M3 scale per 16 inputs, weights only, as compressed-tensors writes them.
    Nvfp4 {
        /// Whether to search for the scale of each block. Otherwise its largest weight becomes the largest code.
        search: bool,
    },
    /// E4M3 with a scale per block of 128 x 128.
    Fp8,
}

/// How to quantise.
#[derive(Debug, Clone)]
pub struct Options {
    /// What to write.
    pub format: Format,
    /// The image processor's mean and standard deviation per channel, for calibration prompts with media.
    pub image_mean_std: ([f32; 3], [f32; 3]),
    /// About how many bytes a shard of the output has.
    pub shard_bytes: usize,
}

impl Options {
    /// For `format`, with shards of 4 GB and the mean and deviation of Qwen3-VL's image processor.
    pub fn new(format: Format) -> Self {
        Self { format, image_mean_std: ([0.5; 3], [0.5; 3]), shard_bytes: 4_000_000_000 }
    }
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Calibration prompts read.
    Calibrated {
        /// So far.
        done: usize,
        /// Of how many.
        total: usize,
    },
    /// Layers written.
    Quantised {
        /// So far.
        done: usize,
        /// Of how many.
        total: usize,
    },
}
