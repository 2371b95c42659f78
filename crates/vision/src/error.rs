//! The one error type of this crate. Messages carry sizes and limits, never text of a decoding library or an address.

use std::path::PathBuf;

use crate::decode::ImageFormat;

/// Why an image or a processor configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum VisionError {
    /// The first bytes belong to none of the formats that are decoded; the declared MIME type plays no part.
    #[error("the image format is not supported: send PNG, JPEG, WebP, GIF or BMP")]
    UnsupportedFormat,
    /// The header states more than the limits allow. Found before any pixel memory was taken.
    #[error(
        "the image is {width} x {height} pixels, over the limit of {max_side} on a side and {max_pixels} in all: send a smaller one"
    )]
    TooLarge {
        /// Width of the file, in pixels.
        width: u64,
        /// Height of the file, in pixels.
        height: u64,
        /// Largest side allowed.
        max_side: u64,
        /// Largest number of pixels allowed.
        max_pixels: u64,
    },
    /// A JPEG file that repeats its scans: cheap to send, expensive to decode.
    #[error("the JPEG image has more than {max_scans} scans: save it again with fewer")]
    TooManyScans {
        /// The limit.
        max_scans: u32,
    },
    /// The file ends early, contradicts itself, or uses a rare variant of its format.
    #[error("the {format} image is truncated, damaged or of an unsupported kind")]
    Corrupt {
        /// Format that the first bytes announce.
        format: ImageFormat,
    },
    /// A side of zero.
    #[error("the image is {width} x {height} pixels: both sides must be at least 1")]
    Empty {
        /// Width in pixels.
        width: u64,
        /// Height in pixels.
        height: u64,
    },
    /// One side is too long for the other.
    #[error(
        "the image is {width} x {height} pixels: the longer side may be at most {max_ratio} times the shorter"
    )]
    AspectRatio {
        /// Width in pixels.
        width: u64,
        /// Height in pixels.
        height: u64,
        /// Largest ratio allowed.
        max_ratio: u64,
    },
    /// A frame of a video that is not as large as the first.
    #[error(
        "a frame of the video is {width} x {height} pixels, the first {first_width} x {first_height}: all must have one size"
    )]
    FrameSize {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// Width of the first frame.
        first_width: usize,
        /// Height of the first frame.
        first_height: usize,
    },
    /// A video without a frame.
    #[error("the video has no frame that can be decoded")]
    NoFrames,
    /// Neither file that describes the image processor is there.
    #[error(
        "no processor_config.json with an image_processor and no preprocessor_config.json in {}: copy it from the original model",
        folder.display()
    )]
    NoProcessorConfig {
        /// The checkpoint folder.
        folder: PathBuf,
    },
    /// A processor file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A processor file is not the JSON that it should be.
    #[error("{} is not a valid processor configuration: {source}", path.display())]
    ParseConfig {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A processor setting that this engine cannot follow.
    #[error("image processor setting {field} is {value}: {rule}")]
    Setting {
        /// Name of the setting, as in the file.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
}
