//! PNG, WebP and BMP by the `image` crate, with Pillow's rules for turning what they hold into RGB.

use std::io::Cursor;

use image::codecs::{bmp::BmpDecoder, png::PngDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{ColorType, ImageDecoder, ImageResult, Limits};

use super::{Alpha, DecodeOptions, ImageFormat, ImageSize};
use crate::rgb::{flatten, swaps_sides};
use crate::{RgbImage, VisionError};

/// Room for metadata and tables of a decoder beside the pixels.
const DECODER_SLACK: u64 = 16 << 20;

pub(super) fn read_size(
    bytes: &[u8],
    format: ImageFormat,
    options: &DecodeOptions,
) -> Result<ImageSize, VisionError> {
    let (mut decoder, size) = open(bytes, format, options)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    Ok(if swaps_sides(orientation) { size.transposed() } else { size })
}

pub(super) fn decode(
    bytes: &[u8],
    format: ImageFormat,
    options: &DecodeOptions,
) -> Result<RgbImage, VisionError> {
    let (mut decoder, size) = open(bytes, format, options)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let color = decoder.color_type();
    let mut raw = vec![0; size.height * size.width * usize::from(color.bytes_per_pixel())];
    decoder.read_image_boxed(&mut raw).map_err(|_| VisionError::Corrupt { format })?;
    let is_gray_file = format == ImageFormat::Png && bytes.get(25) == Some(&0);
    let pixels = to_rgb(raw, color, options.alpha, is_gray_file).ok_or(VisionError::Corrupt { format })?;
    let image = RgbImage::new(size.height, size.width, pixels).ok_or(VisionError::Corrupt { format })?;
    Ok(image.oriented(orientation))
}

/// Reads the header, checks the size and limits the decoder's memory.
fn open<'a>(
    bytes: &'a [u8],
    format: ImageFormat,
    options: &DecodeOptions,
) -> Result<(Box<dyn ImageDecoder + 'a>, ImageSize), VisionError> {
    let corrupt = || VisionError::Corrupt { format };
    let reader = Cursor::new(bytes);
    let opened: ImageResult<Box<dyn ImageDecoder + 'a>> = match format {
        ImageFormat::Png => {
            // The PNG decoder takes memory for a row when it is made, so the size is read here first.
            let size = png_size(bytes).ok_or_else(corrupt)?;
            options.check(size)?;
            PngDecoder::with_limits(reader, memory_limit(size)).map(|d| Box::new(d) as _)
        }
        ImageFormat::WebP => WebPDecoder::new(reader).map(|d| Box::new(d) as _),
        ImageFormat::Bmp => BmpDecoder::new(reader).map(|d| Box::new(d) as _),
        ImageFormat::Jpeg | ImageFormat::Gif => return Err(corrupt()),
    };
    let mut decoder = opened.map_err(|_| corrupt())?;
    let (width, height) = decoder.dimensions();
    let size = ImageSize { width: width as usize, height: height as usize };
    options.check(size)?;
    decoder.set_limits(memory_limit(size)).map_err(|_| corrupt())?;
    Ok((decoder, size))
}

/// What a decoder may take for an image of this size, whose pixels are at most 8 bytes (16-bit RGBA). A file that needs
/// more spends it on metadata, such as a compressed colour profile.
fn memory_limit(size: ImageSize) -> Limits {
    let mut limits = Limits::default();
    limits.max_alloc = Some(size.width as u64 * size.height as u64 * 8 + DECODER_SLACK);
    limits
}

/// The IHDR chunk must come first: length, name, width, height.
fn png_size(bytes: &[u8]) -> Option<ImageSize> {
    let header = bytes.get(8..24)?;
    if &header[4..8] != b"IHDR" {
        return None;
    }
    let side = |at: usize| Some(u32::from_be_bytes(*header.get(at..)?.first_chunk()?) as usize);
    Some(ImageSize { width: side(8)?, height: side(12)? })
}

/// Decoded samples to RGB as Pillow's `convert("RGB")`, `None` for a sample type that these formats never have. 16-bit
/// samples are native-endian here. Pillow keeps their high byte, but opens a 16-bit greyscale file as `I;16`, whose
/// conversion clips at 255 instead.
fn to_rgb(raw: Vec<u8>, color: ColorType, alpha: Alpha, is_gray_file: bool) -> Option<Vec<u8>> {
    let high = |sample: [u8; 2]| u16::from_ne_bytes(sample).to_be_bytes()[0];
    let gray16 = |sample: [u8; 2]| {
        let value = u16::from_ne_bytes(sample);
        if is_gray_file { u8::try_from(value).unwrap_or(u8::MAX) } else { high(sample) }
    };
    Some(match color {
        ColorType::Rgb8 => raw,
        ColorType::L8 => raw.iter().flat_map(|&v| [v; 3]).collect(),
        ColorType::La8 => pixels(&raw, |[v, a]| flatten([v, v, v, a], alpha)),
        ColorType::Rgba8 => pixels(&raw, |rgba| flatten(rgba, alpha)),
        ColorType::L16 => pixels(&raw, |v| [gray16(v); 3]),
        ColorType::La16 => pixels(&raw, |[v0, v1, a0, a1]| {
            let v = gray16([v0, v1]);
            flatten([v, v, v, high([a0, a1])], alpha)
        }),
        ColorType::Rgb16 => pixels(&raw, |[r0, r1, g0, g1, b0, b1]| [[r0, r1], [g0, g1], [b0, b1]].map(high)),
        ColorType::Rgba16 => pixels(&raw, |[r0, r1, g0, g1, b0, b1, a0, a1]| {
            flatten([[r0, r1], [g0, g1], [b0, b1], [a0, a1]].map(high), alpha)
        }),
        _ => return None,
    })
}

/// Maps each pixel of `N` bytes to RGB.
fn pixels<const N: usize>(raw: &[u8], convert: impl Fn([u8; N]) -> [u8; 3]) -> Vec<u8> {
    raw.as_chunks::<N>().0.iter().flat_map(|&pixel| convert(pixel)).collect()
}
