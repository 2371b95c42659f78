//! One medium of a request: its size, its identity and its tokens from the headers alone, and its pixels later.

use std::sync::Arc;

use spark_api::MediaHash;
use spark_vision::{
    Alpha, DecodeOptions, ImageSize, SampleRate, VideoLayout, VideoProcessor, VisionError, decode, read_size,
};

use super::clip::{Clip, ClipInfo};
use super::names::{Known, Name};
use super::source::{Found, Kind, Payload, VideoOptions};
use super::{Part, Processed, Processors, names};
use crate::ApiError;

/// Memory that an image takes while it is decoded, as the vision crate states it.
const DECODING_BYTES_PER_PIXEL: usize = 9;
const DECODING_BYTES: usize = 16 << 20;
/// Bytes of a pixel in patches.
const PATCH_BYTES_PER_PIXEL: usize = 3;
/// What the child that decodes a video file takes: a dozen reference frames, and itself.
const CLIP_BYTES_PER_PIXEL: usize = 32;
const CLIP_BYTES: usize = 64 << 20;

/// Frames a second of frames that come one by one, where the request does not say: vLLM's.
const FRAME_LIST_FPS: f64 = 1.0;

/// A medium of which only the header has been read.
pub(crate) struct MediaFile {
    source: Source,
    /// Of the medium as a whole.
    pub(super) hash: MediaHash,
    /// Memory that it takes while it is decoded.
    pub(super) num_decoding_bytes: usize,
    /// Of its patches.
    pub(super) num_patch_bytes: usize,
    /// An image or a video.
    pub(crate) kind: Kind,
    /// Placeholder tokens of each of its parts.
    pub(crate) tokens_per_part: usize,
    /// Where each part of a video is, in seconds; empty for an image, which has one part.
    pub(crate) times: Vec<f64>,
    /// What it is called from now on, once it has been decoded.
    pub(super) name: Option<Name>,
}

enum Source {
    Image(Payload),
    Frames(Vec<Payload>, VideoLayout),
    Clip(Clip, Vec<usize>, VideoLayout),
    /// Nothing was sent, because it is in the cache: which one of its kind it is in the request.
    Cached(usize),
}

impl MediaFile {
    /// Runs of placeholders that it has in the prompt.
    pub(crate) fn num_parts(&self) -> usize {
        match self.kind {
            Kind::Image => 1,
            Kind::Video => self.times.len(),
        }
    }

    /// Placeholder tokens that it fills.
    pub(crate) fn num_tokens(&self) -> usize {
        self.num_parts().saturating_mul(self.tokens_per_part)
    }

    /// Identity and size of a medium, before any pixel is decoded.
    pub(super) fn inspect(
        processors: &Processors,
        kind: Kind,
        options: VideoOptions,
        found: Found,
    ) -> Result<Self, ApiError> {
        let file = match (kind, found) {
            (Kind::Image, Found::File(payload)) => inspect_image(processors, payload)?,
            (Kind::Image, Found::Frames(_)) => {
                return Err(ApiError::field(
                    "image_url",
                    "the URL holds frames of a video: send it as video_url",
                ));
            }
            (Kind::Video, found) => {
                let refuse = || ApiError::field("video_url", "this model does not take videos");
                let videos = processors.videos.as_ref().ok_or_else(refuse)?;
                match found {
                    Found::Frames(frames) => inspect_frames(videos, options, frames)?,
                    Found::File(payload) => inspect_clip(processors, videos, options, payload)?,
                }
            }
        };
        let (tokens, max_tokens) = (file.tokens_per_part, processors.max_tokens);
        if tokens > max_tokens {
            let what = if kind == Kind::Image { "an image" } else { "two frames of the video" };
            let message =
                format!("{what} would need {tokens} tokens; the limit is {max_tokens}: send a smaller one");
            return Err(ApiError::field(kind.param(), message));
        }
        Ok(file)
    }

    /// A medium of which nothing was sent but its name.
    pub(super) fn cached(known: &Known, kind: Kind, index: usize, name: Name) -> Self {
        Self {
            source: Source::Cached(index),
            hash: known.hash,
            num_decoding_bytes: 0,
            num_patch_bytes: known.num_patch_bytes,
            kind,
            tokens_per_part: known.tokens_per_part,
            times: known.times.clone(),
            name: Some(name),
        }
    }

    /// What has to be remembered of it to find it by its name.
    pub(super) fn known(&self) -> Known {
        Known {
            hash: self.hash,
            num_patch_bytes: self.num_patch_bytes,
            tokens_per_part: self.tokens_per_part,
            times: self.times.clone(),
        }
    }

    /// Its patches.
    pub(super) fn decode(self, processors: &Processors) -> Result<Processed, ApiError> {
        let refuse = |error: &VisionError| refuse(self.kind, error);
        let videos =
            || processors.videos.as_ref().ok_or_else(|| ApiError::internal(&"a video without a processor"));
        let cutter = match self.source {
            Source::Image(payload) => {
                let image = processors.images.process(&payload.bytes).map_err(|error| refuse(&error))?;
                let part = Part {
                    hash: image.hash,
                    patches: image.patches,
                    grid: image.grid_thw,
                    num_tokens: image.num_tokens,
                };
                return Ok(Processed { parts: vec![part] });
            }
            Source::Frames(frames, layout) => {
                let mut cutter = videos()?.cutter(layout);
                for frame in frames {
                    let frame = decode(&frame.bytes, &limits()).map_err(|error| refuse(&error))?;
                    cutter.push(&frame).map_err(|error| refuse(&error))?;
                }
                cutter
            }
            // It was there when the request was looked at, and has been forgotten since.
            Source::Cached(index) => return Err(names::miss(self.kind, index)),
            Source::Clip(clip, indices, layout) => {
                let mut cutter = videos()?.cutter(layout);
                clip.frames(&indices, &mut |frame| cutter.push(frame).map_err(|error| refuse(&error)))?;
                cutter
            }
        };
        let video = cutter.finish().map_err(|error| refuse(&error))?;
        let part = |group: spark_vision::FrameGroup| Part {
            hash: group.hash,
            patches: group.patches,
            grid: video.grid_thw,
            num_tokens: video.tokens_per_group,
        };
        Ok(Processed { parts: video.groups.into_iter().map(part).collect() })
    }
}

/// Limits on the frames of a video are those of images.
fn limits() -> DecodeOptions {
    DecodeOptions::new(Alpha::OverWhite)
}

fn inspect_image(processors: &Processors, payload: Payload) -> Result<MediaFile, ApiError> {
    let processor = &processors.images;
    let refuse = |error: VisionError| refuse(Kind::Image, &error);
    let num_tokens = processor.num_tokens_of(&payload.bytes).map_err(refuse)?;
    // The processor has just applied the limits; this only reads the size again.
    let unlimited =
        DecodeOptions { max_side: u64::MAX, max_pixels: u64::MAX, ..DecodeOptions::new(Alpha::Drop) };
    let size = read_size(&payload.bytes, &unlimited).map_err(refuse)?;
    let side = processor.config().factor();
    Ok(MediaFile {
        hash: processor.hash(&payload.bytes),
        num_decoding_bytes: decoding_bytes(size),
        num_patch_bytes: num_tokens.saturating_mul(side * side * PATCH_BYTES_PER_PIXEL),
        kind: Kind::Image,
        tokens_per_part: num_tokens,
        times: Vec::new(),
        name: None,
        source: Source::Image(payload),
    })
}

fn decoding_bytes(size: ImageSize) -> usize {
    let num_pixels = size.width.saturating_mul(size.height);
    num_pixels.saturating_mul(DECODING_BYTES_PER_PIXEL).saturating_add(DECODING_BYTES)
}

/// Frames that came one by one: all of them are looked at.
fn inspect_frames(
    videos: &Arc<VideoProcessor>,
    options: VideoOptions,
    frames: Vec<Payload>,
) -> Result<MediaFile, ApiError> {
    let refuse = |error: VisionError| refuse(Kind::Video, &error);
    let mut first: Option<ImageSize> = None;
    for frame in &frames {
        let size = read_size(&frame.bytes, &limits()).map_err(refuse)?;
        let ImageSize { width: first_width, height: first_height } = *first.get_or_insert(size);
        if (size.width, size.height) != (first_width, first_height) {
            let ImageSize { width, height } = size;
            return Err(refuse(VisionError::FrameSize { width, height, first_width, first_height }));
        }
    }
    let size = first.ok_or_else(|| refuse(VisionError::NoFrames))?;
    let layout = videos.layout(frames.len(), size.height, size.width).map_err(refuse)?;
    let fps = match options.rate {
        SampleRate::PerSecond(fps) => fps,
        SampleRate::Frames(limit) if limit < frames.len() => {
            let rule =
                "media_io_kwargs.video.num_frames is for files: of frames that come one by one all are taken";
            return Err(ApiError::field("media_io_kwargs", rule));
        }
        SampleRate::Default | SampleRate::Frames(_) => FRAME_LIST_FPS,
    };
    let indices: Vec<usize> = (0..frames.len()).collect();
    let bytes: Vec<&[u8]> = frames.iter().map(|frame| &*frame.bytes).collect();
    Ok(MediaFile {
        hash: videos.hash(&[0], &bytes),
        num_decoding_bytes: decoding_bytes(size),
        num_patch_bytes: layout.num_patch_bytes(videos.config()),
        kind: Kind::Video,
        tokens_per_part: layout.tokens_per_group,
        times: videos.config().timestamps(&indices, fps),
        name: None,
        source: Source::Frames(frames, layout),
    })
}

/// A video file: a child process reads its header.
fn inspect_clip(
    processors: &Processors,
    videos: &Arc<VideoProcessor>,
    options: VideoOptions,
    payload: Payload,
) -> Result<MediaFile, ApiError> {
    let clip = Clip::open(processors.decoder.as_ref(), payload)?;
    let ClipInfo { num_frames, fps, size } = clip.info()?;
    limits().check(size).map_err(|error| refuse(Kind::Video, &error))?;
    let indices = videos.config().sample(num_frames, fps, options.rate);
    let layout = videos.layout(indices.len(), size.height, size.width);
    let layout = layout.map_err(|error| refuse(Kind::Video, &error))?;
    let variant: Vec<u64> = indices.iter().map(|&index| index as u64).collect();
    let num_pixels = size.width.saturating_mul(size.height);
    Ok(MediaFile {
        hash: videos.hash(&variant, &[clip.bytes()]),
        num_decoding_bytes: num_pixels.saturating_mul(CLIP_BYTES_PER_PIXEL).saturating_add(CLIP_BYTES),
        num_patch_bytes: layout.num_patch_bytes(videos.config()),
        kind: Kind::Video,
        tokens_per_part: layout.tokens_per_group,
        times: videos.config().timestamps(&indices, fps),
        name: None,
        source: Source::Clip(clip, indices, layout),
    })
}

/// The messages of the vision crate carry sizes and limits only, so the client may see them.
fn refuse(kind: Kind, error: &VisionError) -> ApiError {
    ApiError::field(kind.param(), error.to_string())
}
