//! From the bytes of an image file, or the frames of a video, to rows of patches: decoding, exact resizing, patch order.
//! CPU only. Video files are decoded elsewhere.
//!
//! This crate knows no model, no device and no network: it gets bytes that somebody else fetched, and gives `u8` patch
//! rows that the device normalises. M-RoPE positions are the model's business, caching of processed images the
//! server's. Nothing here trusts its input: every size is checked from the file's header before memory is taken for it.
//!
//! The reference is `transformers` with the torchvision image processor; decoded pixels and resized
//! pixels are equal to the last bit.
#![forbid(unsafe_code)]

mod config;
mod decode;
mod error;
mod patches;
mod processor;
mod resize;
mod rgb;
mod smart_resize;
mod video;
mod video_config;

pub use config::{ImageProcessorConfig, ImageProcessorOverrides, SizeOverride};
pub use decode::{Alpha, DecodeOptions, ImageFormat, ImageSize, decode, read_size};
pub use error::VisionError;
pub use processor::{ImageProcessor, ProcessedImage};
pub use resize::resize_bicubic;
pub use rgb::RgbImage;
pub use smart_resize::{MAX_ASPECT_RATIO, smart_resize, smart_resize_video};
pub use video::{FrameGroup, ProcessedVideo, VideoCutter, VideoLayout, VideoProcessor};
pub use video_config::{SampleRate, VideoProcessorConfig};
