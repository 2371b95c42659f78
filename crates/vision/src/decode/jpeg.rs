//! JPEG by libjpeg-turbo, the library that Pillow uses: equal pixels. EXIF orientation is read here; colour profiles are
//! ignored, as by Pillow.

use image::metadata::Orientation;
use turbojpeg::{Colorspace, DecompressHeader, Decompressor, Error, Image, PixelFormat};

use super::{DecodeOptions, ImageFormat, ImageSize};
use crate::rgb::{cmyk_to_rgb, swaps_sides};
use crate::{RgbImage, VisionError};

const CORRUPT: VisionError = VisionError::Corrupt { format: ImageFormat::Jpeg };

pub(super) fn read_size(bytes: &[u8], options: &DecodeOptions) -> Result<ImageSize, VisionError> {
    let (_, header) = open(bytes, options)?;
    let size = ImageSize { width: header.width, height: header.height };
    Ok(if swaps_sides(orientation(bytes)) { size.transposed() } else { size })
}

pub(super) fn decode(bytes: &[u8], options: &DecodeOptions) -> Result<RgbImage, VisionError> {
    let (mut decompressor, header) = open(bytes, options)?;
    let (height, width) = (header.height, header.width);
    let is_cmyk = matches!(header.colorspace, Colorspace::CMYK | Colorspace::YCCK);
    let format = if is_cmyk { PixelFormat::CMYK } else { PixelFormat::RGB };
    let pitch = width * format.size();
    let mut pixels = vec![0; height * pitch];
    let output = Image { pixels: pixels.as_mut_slice(), width, pitch, height, format };
    match decompressor.decompress(bytes, output) {
        Ok(()) => {}
        Err(Error::TurboJpegError(message)) if is_harmless(&message) => {}
        Err(Error::TurboJpegError(message)) if message.contains("scans") => {
            return Err(VisionError::TooManyScans { max_scans: options.max_jpeg_scans });
        }
        Err(_) => return Err(CORRUPT),
    }
    if is_cmyk {
        // Pillow takes every four-channel JPEG to be inverted, as Adobe's are.
        let ink = pixels.as_chunks::<4>().0.iter();
        pixels = ink.flat_map(|pixel| cmyk_to_rgb(pixel.map(|value| 255 - value))).collect();
    }
    Ok(RgbImage::new(height, width, pixels).ok_or(CORRUPT)?.oriented(orientation(bytes)))
}

/// Reads the header and checks the size: libjpeg-turbo would take memory for whatever the header claims.
fn open(bytes: &[u8], options: &DecodeOptions) -> Result<(Decompressor, DecompressHeader), VisionError> {
    let mut decompressor = Decompressor::new().map_err(|_| CORRUPT)?;
    decompressor.set_scan_limit(options.max_jpeg_scans).map_err(|_| CORRUPT)?;
    let header = decompressor.read_header(bytes).map_err(|_| CORRUPT)?;
    options.check(ImageSize { width: header.width, height: header.height })?;
    Ok((decompressor, header))
}

/// libjpeg-turbo's warning about stray bytes between segments, which cameras write. The image is complete; a file that
/// ends early has another last warning. (The header was read without a warning before, so this one is from decoding,
/// which goes on after warnings.)
fn is_harmless(message: &str) -> bool {
    message.contains("extraneous bytes before marker")
}

/// EXIF orientation from the first APP1 segment that holds EXIF data.
fn orientation(bytes: &[u8]) -> Orientation {
    exif(bytes).and_then(Orientation::from_exif_chunk).unwrap_or(Orientation::NoTransforms)
}

/// The TIFF part of the EXIF segment. Segments are `ff`, marker, big-endian length (with itself), data; the compressed
/// data begin after SOS.
fn exif(bytes: &[u8]) -> Option<&[u8]> {
    const SOS: u8 = 0xda;
    const APP1: u8 = 0xe1;
    let mut rest = bytes.get(2..)?;
    loop {
        let [0xff, marker, tail @ ..] = rest else { return None };
        match *marker {
            0xff => rest = &rest[1..], // a fill byte
            SOS => return None,
            marker => {
                let len = usize::from(u16::from_be_bytes(*tail.first_chunk()?));
                let data = tail.get(2..len)?;
                if marker == APP1 && data.starts_with(b"Exif\0\0") {
                    return data.get(6..);
                }
                rest = &tail[len..];
            }
        }
    }
}
