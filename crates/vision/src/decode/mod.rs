//! Bytes of an image file to RGB pixels: which format, how large, may it be decoded. The formats are in the files beside
//! this one; URLs, base64 and MIME types are the server's.
//!
//! Pixels are those of `transformers.image_utils.load_image` (Pillow): the first frame, turned as EXIF says,
//! converted to RGB without colour management; [`Alpha`] decides about transparency. Known differences: a file whose
//! compressed data are damaged is refused where Pillow may show what it could save, and a GIF without any palette is
//! refused.

mod gif;
mod jpeg;
mod raster;

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{RgbImage, VisionError};

/// What to do with transparency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpha {
    /// Ignore it and show the colours below, as `convert("RGB")` of `load_image` does. Text that a person cannot see
    /// can then reach the model.
    Drop,
    /// Show the image on white, as a person sees it: what vLLM, `qwen-vl-utils` and the image processors of
    /// transformers 5 do.
    OverWhite,
}

/// Limits and choices for decoding. Memory while decoding is at most about 12 bytes a pixel (16-bit RGBA, progressive
/// CMYK; usually 3 to 6), plus 16 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Largest width and largest height, in pixels.
    pub max_side: u64,
    /// Largest width times height, in pixels.
    pub max_pixels: u64,
    /// Most scans of a JPEG. Encoders write 1 to 14; each costs a pass over the image.
    pub max_jpeg_scans: u32,
    /// Transparency.
    pub alpha: Alpha,
}

impl DecodeOptions {
    /// The default limits: 32,768 pixels a side, 64 Mi pixels (8192 x 8192: four times what the processor keeps of it),
    /// 64 scans.
    pub fn new(alpha: Alpha) -> Self {
        Self { max_side: 32_768, max_pixels: 64 << 20, max_jpeg_scans: 64, alpha }
    }

    /// Refuses a size that the limits forbid. Every decoder calls this before it takes memory.
    ///
    /// # Errors
    /// [`VisionError::Empty`] and [`VisionError::TooLarge`].
    pub fn check(&self, size: ImageSize) -> Result<(), VisionError> {
        let (width, height) = (size.width as u64, size.height as u64);
        if width == 0 || height == 0 {
            return Err(VisionError::Empty { width, height });
        }
        if width.max(height) > self.max_side || width.saturating_mul(height) > self.max_pixels {
            let (max_side, max_pixels) = (self.max_side, self.max_pixels);
            return Err(VisionError::TooLarge { width, height, max_side, max_pixels });
        }
        Ok(())
    }
}

/// Width and height in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSize {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl ImageSize {
    fn transposed(self) -> Self {
        Self { width: self.height, height: self.width }
    }
}

/// The formats that are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// Portable Network Graphics; of an animated one the default image.
    Png,
    /// JPEG: baseline, progressive, arithmetic; grey, RGB, YCbCr, CMYK, YCCK.
    Jpeg,
    /// WebP; of an animated one the first frame.
    WebP,
    /// GIF, first frame.
    Gif,
    /// Windows bitmap.
    Bmp,
}

impl ImageFormat {
    /// The format by the first bytes, whatever the file is called.
    pub fn sniff(bytes: &[u8]) -> Option<Self> {
        let starts = |magic: &[u8]| bytes.starts_with(magic);
        if starts(b"\x89PNG\r\n\x1a\n") {
            Some(Self::Png)
        } else if starts(b"\xff\xd8\xff") {
            Some(Self::Jpeg)
        } else if starts(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
            Some(Self::WebP)
        } else if starts(b"GIF87a") || starts(b"GIF89a") {
            Some(Self::Gif)
        } else if starts(b"BM") {
            Some(Self::Bmp)
        } else {
            None
        }
    }
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
        })
    }
}

/// Size of the decoded image (EXIF orientation applied), from the header alone: no pixel is decoded.
///
/// # Errors
/// As [`decode`], as far as the header shows it.
pub fn read_size(bytes: &[u8], options: &DecodeOptions) -> Result<ImageSize, VisionError> {
    guarded(bytes, |format| match format {
        ImageFormat::Jpeg => jpeg::read_size(bytes, options),
        ImageFormat::Gif => gif::read_size(bytes, options),
        _ => raster::read_size(bytes, format, options),
    })
}

/// Decodes the first frame to RGB.
///
/// # Errors
/// [`VisionError::UnsupportedFormat`], [`VisionError::Empty`], [`VisionError::TooLarge`], [`VisionError::TooManyScans`];
/// and [`VisionError::Corrupt`] for a file that ends early or is damaged: half an image is never returned.
pub fn decode(bytes: &[u8], options: &DecodeOptions) -> Result<RgbImage, VisionError> {
    guarded(bytes, |format| match format {
        ImageFormat::Jpeg => jpeg::decode(bytes, options),
        ImageFormat::Gif => gif::decode(bytes, options),
        _ => raster::decode(bytes, format, options),
    })
}

/// Finds the format and runs `work` on it. A panic in a decoding library is a damaged file, not the end of the request's
/// thread: these libraries read hostile bytes, and an arithmetic check that fires in one of them is no reason to stop.
fn guarded<T>(
    bytes: &[u8],
    work: impl FnOnce(ImageFormat) -> Result<T, VisionError>,
) -> Result<T, VisionError> {
    let format = ImageFormat::sniff(bytes).ok_or(VisionError::UnsupportedFormat)?;
    // Nothing outlives a panic here: the closure owns its decoder and gives back its value or nothing.
    catch_unwind(AssertUnwindSafe(|| work(format))).unwrap_or(Err(VisionError::Corrupt { format }))
}
