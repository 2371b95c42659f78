//! First frame of a GIF, as Pillow shows it. Later frames and timing are not read.

use std::io::Cursor;

use gif::{ColorOutput, DecodeOptions as GifOptions, Decoder, Frame, MemoryLimit};

use super::{Alpha, DecodeOptions, ImageFormat, ImageSize};
use crate::rgb::flatten;
use crate::{RgbImage, VisionError};

const CORRUPT: VisionError = VisionError::Corrupt { format: ImageFormat::Gif };

pub(super) fn read_size(bytes: &[u8], options: &DecodeOptions) -> Result<ImageSize, VisionError> {
    let (_, frame, canvas) = open(bytes, options)?;
    drop(frame);
    Ok(canvas)
}

pub(super) fn decode(bytes: &[u8], options: &DecodeOptions) -> Result<RgbImage, VisionError> {
    let (mut decoder, frame, canvas) = open(bytes, options)?;
    let colors = palette(&decoder, options.alpha, frame.transparent)?;
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (frame_w, frame_h) = (usize::from(frame.width), usize::from(frame.height));
    let mut indices = vec![0; frame_w * frame_h]; // [frame_h, frame_w]
    decoder.read_into_buffer(&mut indices).map_err(|_| CORRUPT)?;
    // Where the frame does not reach, Pillow shows the transparent colour, or the first one if none is transparent.
    let background = colors[usize::from(frame.transparent.unwrap_or(0))];
    let mut pixels = background.repeat(canvas.width * canvas.height);
    for (y, row) in indices.chunks_exact(frame_w).enumerate() {
        let start = ((top + y) * canvas.width + left) * 3;
        let line = pixels[start..start + frame_w * 3].as_chunks_mut::<3>().0;
        for (pixel, &index) in line.iter_mut().zip(row) {
            *pixel = colors[usize::from(index)];
        }
    }
    RgbImage::new(canvas.height, canvas.width, pixels).ok_or(CORRUPT)
}

type Reader<'a> = Decoder<Cursor<&'a [u8]>>;

/// Reads up to the first frame's data and checks the size. A frame that sticks out of the screen enlarges it.
fn open<'a>(
    bytes: &'a [u8],
    options: &DecodeOptions,
) -> Result<(Reader<'a>, Frame<'static>, ImageSize), VisionError> {
    let mut gif = GifOptions::new();
    gif.set_color_output(ColorOutput::Indexed);
    // The library's own buffers: at most one byte a pixel.
    gif.set_memory_limit(MemoryLimit::Bytes(options.max_pixels.max(1).try_into().map_err(|_| CORRUPT)?));
    let mut decoder = gif.read_info(Cursor::new(bytes)).map_err(|_| CORRUPT)?;
    let frame = decoder.next_frame_info().map_err(|_| CORRUPT)?.ok_or(CORRUPT)?.clone();
    let reach =
        |start: u16, len: u16, screen: u16| (usize::from(start) + usize::from(len)).max(screen.into());
    let canvas = ImageSize {
        width: reach(frame.left, frame.width, decoder.width()),
        height: reach(frame.top, frame.height, decoder.height()),
    };
    options.check(canvas)?;
    if frame.width == 0 || frame.height == 0 {
        return Err(CORRUPT);
    }
    Ok((decoder, frame, canvas))
}

/// Colours of all 256 indices; those that the file leaves out are black.
fn palette(
    decoder: &Reader<'_>,
    alpha: Alpha,
    transparent: Option<u8>,
) -> Result<[[u8; 3]; 256], VisionError> {
    let stored = decoder.palette().map_err(|_| CORRUPT)?.as_chunks::<3>().0;
    let mut colors = [[0; 3]; 256];
    for (color, &rgb) in colors.iter_mut().zip(stored) {
        *color = rgb;
    }
    if let Some(index) = transparent {
        let [r, g, b] = colors[usize::from(index)];
        colors[usize::from(index)] = flatten([r, g, b, 0], alpha);
    }
    Ok(colors)
}
