//! Settings of the video processor, read from a checkpoint folder, and the sampling of frames that they ask for. What
//! becomes of the pixels is in `video.rs`.

use std::path::Path;

use serde::Deserialize;

use crate::config::{SizeOverride, read_json, require};
use crate::{ImageProcessorConfig, VisionError};

/// Largest value of `max_pixels`, over all frames: more would be a mistake in a configuration.
const LARGEST_MAX_PIXELS: u64 = 1 << 28;
/// Largest value of `max_frames`.
const LARGEST_MAX_FRAMES: usize = 1 << 14;

/// What the video processor of a checkpoint does. Patches are cut and normalised as those of images.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoProcessorConfig {
    /// Least pixels after resizing, over all frames (`size.shortest_edge` in the file).
    pub min_pixels: u64,
    /// Most pixels after resizing, over all frames (`size.longest_edge`).
    pub max_pixels: u64,
    /// Frames a second that are taken of a file.
    pub fps: f64,
    /// Least frames taken, if the file has them.
    pub min_frames: usize,
    /// Most frames taken.
    pub max_frames: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Frames in a patch.
    pub temporal_patch_size: usize,
    /// Patches per side of the block that becomes one token.
    pub merge_size: usize,
}

/// `processor_config.json`, as far as videos are concerned.
#[derive(Deserialize)]
struct JointFile {
    video_processor: Option<VideoFile>,
}

/// `video_preprocessor_config.json`, or the video part of the joint file.
#[derive(Deserialize, Default)]
struct VideoFile {
    size: Option<SizeOverride>,
    fps: Option<f64>,
    min_frames: Option<usize>,
    max_frames: Option<usize>,
    patch_size: Option<usize>,
    temporal_patch_size: Option<usize>,
    merge_size: Option<usize>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    video_processor_type: Option<String>,
}

impl VideoProcessorConfig {
    /// Reads `video_processor` of `processor_config.json`, or else `video_preprocessor_config.json`, from a checkpoint
    /// folder. What is left out has the defaults of `Qwen3VLVideoProcessor`; patches must be those of `images`.
    ///
    /// # Errors
    /// [`VisionError::ReadConfig`], [`VisionError::ParseConfig`], and [`VisionError::Setting`] for a value that cannot be
    /// followed.
    pub fn from_folder(folder: &Path, images: &ImageProcessorConfig) -> Result<Self, VisionError> {
        let joint: Option<JointFile> = read_json(&folder.join("processor_config.json"))?;
        let file = match joint.and_then(|file| file.video_processor) {
            Some(file) => file,
            None => read_json(&folder.join("video_preprocessor_config.json"))?.unwrap_or_default(),
        };
        file.into_config(images)
    }

    /// Side of the square of pixels that becomes one token.
    pub fn factor(&self) -> usize {
        self.patch_size * self.merge_size
    }

    /// Which of `total` frames of a file with `source_fps` frames a second are looked at, `fps` a second (the
    /// checkpoint's, if `None`) or `num_frames` of them: `sample_frames` of `Qwen3VLVideoProcessor`. Ascending; empty
    /// only for an empty file.
    pub fn sample(&self, total: usize, source_fps: f64, rate: SampleRate) -> Vec<usize> {
        let by_rate = |fps: f64| {
            let wanted = (total as f64 / source_fps * fps) as usize; // cut off, as `int()` does
            wanted.max(self.min_frames).min(self.max_frames)
        };
        let count = match rate {
            SampleRate::Default => by_rate(self.fps),
            SampleRate::PerSecond(fps) => by_rate(fps),
            SampleRate::Frames(count) => count.min(self.max_frames),
        };
        let count = count.clamp(1, total.max(1));
        if total == 0 {
            return Vec::new();
        }
        // numpy's `linspace(0, total - 1, count).round()`, its last point exact.
        let step = (total - 1) as f64 / (count.max(2) - 1) as f64;
        let point = |i: usize| match i {
            0 => 0,
            i if i + 1 == count => total - 1,
            i => (i as f64 * step).round_ties_even() as usize,
        };
        (0..count).map(point).collect()
    }

    /// When each temporal patch is, in seconds: the middle of its first and its last frame. `indices` are the frames that
    /// are looked at, of a source with `source_fps` frames a second (`_calculate_timestamps` of `Qwen3VLProcessor`).
    pub fn timestamps(&self, indices: &[usize], source_fps: f64) -> Vec<f64> {
        let seconds = |index: usize| index as f64 / source_fps;
        let middle = |pair: &[usize]| {
            let first = pair.first().copied().unwrap_or_default();
            // Where frames are missing at the end, the last is repeated.
            let last = pair.last().copied().unwrap_or_default();
            (seconds(first) + seconds(last)) / 2.0
        };
        indices.chunks(self.temporal_patch_size).map(middle).collect()
    }

    fn check(&self) -> Result<(), VisionError> {
        let positive = "must be at least 1";
        require(self.min_pixels >= 1, "size.shortest_edge", &self.min_pixels, positive)?;
        let max_pixels = self.max_pixels;
        require(
            max_pixels >= self.min_pixels,
            "size.longest_edge",
            &max_pixels,
            "must not be below shortest_edge",
        )?;
        require(
            max_pixels <= LARGEST_MAX_PIXELS,
            "size.longest_edge",
            &max_pixels,
            "must be at most 268435456",
        )?;
        require(self.min_frames >= 1, "min_frames", &self.min_frames, positive)?;
        let max_frames = self.max_frames;
        require(max_frames >= self.min_frames, "max_frames", &max_frames, "must not be below min_frames")?;
        require(max_frames <= LARGEST_MAX_FRAMES, "max_frames", &max_frames, "must be at most 16384")?;
        require(self.fps.is_finite() && self.fps > 0.0, "fps", &self.fps, "must be above 0")
    }
}

/// How many frames of a file are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum SampleRate {
    /// As the checkpoint says.
    #[default]
    Default,
    /// So many a second, within the checkpoint's bounds.
    PerSecond(f64),
    /// So many, or as many as there are.
    Frames(usize),
}

impl VideoFile {
    fn into_config(self, images: &ImageProcessorConfig) -> Result<VideoProcessorConfig, VisionError> {
        let class = self.video_processor_type.as_deref().unwrap_or("Qwen3VLVideoProcessor");
        let rule = "only the video processor of Qwen3-VL is supported";
        require(class.starts_with("Qwen3VLVideoProcessor"), "video_processor_type", &class, rule)?;
        let same = "must be that of the image processor";
        for (name, ours, theirs) in [
            ("patch_size", self.patch_size, images.patch_size),
            ("temporal_patch_size", self.temporal_patch_size, images.temporal_patch_size),
            ("merge_size", self.merge_size, images.merge_size),
        ] {
            let value = ours.unwrap_or(theirs);
            require(value == theirs, name, &value, same)?;
        }
        // The device has one mean and one deviation.
        let differs =
            |values: Option<[f32; 3]>, theirs: [f32; 3]| values.is_some_and(|values| values != theirs);
        require(!differs(self.image_mean, images.image_mean), "image_mean", &"another one for videos", same)?;
        require(!differs(self.image_std, images.image_std), "image_std", &"another one for videos", same)?;
        let size = self.size.unwrap_or_default();
        let config = VideoProcessorConfig {
            min_pixels: size.shortest_edge.unwrap_or(128 * 32 * 32),
            max_pixels: size.longest_edge.unwrap_or(768 * 32 * 32),
            fps: self.fps.unwrap_or(2.0),
            min_frames: self.min_frames.unwrap_or(4),
            max_frames: self.max_frames.unwrap_or(768),
            patch_size: images.patch_size,
            temporal_patch_size: images.temporal_patch_size,
            merge_size: images.merge_size,
        };
        config.check()?;
        Ok(config)
    }
}
