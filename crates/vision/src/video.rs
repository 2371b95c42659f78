//! The video processor of a checkpoint: decoded frames to groups of patch rows, one group a temporal patch. Which frames
//! are taken is decided in `video_config.rs`; video files are decoded elsewhere, outside this process.

use std::sync::Arc;

use crate::patches::to_patches;
use crate::smart_resize::smart_resize_video;
use crate::{ImageProcessorConfig, RgbImage, VideoProcessorConfig, VisionError, resize_bicubic};

/// The frames of one temporal patch, ready for the vision encoder. To the encoder and to the prompt it is a medium of its
/// own: attention never crosses temporal patches, and a time stands before each.
#[derive(Debug, Clone)]
pub struct FrameGroup {
    /// Patch rows in merge-block order, `[num_patches, 3, temporal_patch_size, patch, patch]` u8, not normalised.
    pub patches: Arc<[u8]>,
    /// Identity: a keyed BLAKE3 over the patches, their grid and the processor's settings.
    pub hash: [u8; 32],
}

/// A video, ready for the vision encoder.
#[derive(Debug, Clone)]
pub struct ProcessedVideo {
    /// In the order of time; at least one.
    pub groups: Vec<FrameGroup>,
    /// Patches of each group: temporal (1), rows, columns.
    pub grid_thw: [usize; 3],
    /// Tokens that each group fills in the prompt.
    pub tokens_per_group: usize,
}

/// Turns frames into [`ProcessedVideo`]s. Cheap to share.
#[derive(Debug, Clone)]
pub struct VideoProcessor {
    config: VideoProcessorConfig,
    mean_std: [[f32; 3]; 2],
    hash_key: [u8; 32],
}

/// What a video of a known size becomes, before any frame is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VideoLayout {
    /// Frames that are looked at.
    pub num_frames: usize,
    /// Height of a frame of the source, in pixels.
    pub height: usize,
    /// Width of a frame of the source.
    pub width: usize,
    /// Height and width after resizing.
    pub resized: (usize, usize),
    /// Temporal patches.
    pub num_groups: usize,
    /// Tokens of each.
    pub tokens_per_group: usize,
}

impl VideoLayout {
    /// Bytes of the patches of all groups.
    pub fn num_patch_bytes(&self, config: &VideoProcessorConfig) -> usize {
        let frame = self.resized.0.saturating_mul(self.resized.1).saturating_mul(3);
        frame.saturating_mul(self.num_groups).saturating_mul(config.temporal_patch_size)
    }
}

impl VideoProcessor {
    /// A processor with these settings. `hash_key` as for an image processor.
    pub fn new(config: VideoProcessorConfig, images: &ImageProcessorConfig, hash_key: [u8; 32]) -> Self {
        Self { config, mean_std: [images.image_mean, images.image_std], hash_key }
    }

    /// The settings.
    pub fn config(&self) -> &VideoProcessorConfig {
        &self.config
    }

    /// The size of everything that `num_frames` frames of `height` x `width` pixels become.
    ///
    /// # Errors
    /// Those of [`crate::smart_resize`], and [`VisionError::NoFrames`].
    pub fn layout(&self, num_frames: usize, height: usize, width: usize) -> Result<VideoLayout, VisionError> {
        if num_frames == 0 {
            return Err(VisionError::NoFrames);
        }
        let resized = smart_resize_video(num_frames, height, width, &self.config)?;
        let side = self.config.factor();
        Ok(VideoLayout {
            num_frames,
            height,
            width,
            resized,
            num_groups: num_frames.div_ceil(self.config.temporal_patch_size),
            tokens_per_group: (resized.0 / side) * (resized.1 / side),
        })
    }

    /// Identity of a source with this processor's settings: equal bytes and `variant` give equal videos.
    pub fn hash(&self, variant: &[u64], sources: &[&[u8]]) -> [u8; 32] {
        let mut hasher = self.hasher(b"spark-vision video file 1");
        hasher.update(&(variant.len() as u64).to_le_bytes());
        for value in variant {
            hasher.update(&value.to_le_bytes());
        }
        for source in sources {
            hasher.update(&(source.len() as u64).to_le_bytes());
            hasher.update(source);
        }
        *hasher.finalize().as_bytes()
    }

    /// Takes the frames of a video one after the other; none of them is kept at its full size.
    pub fn cutter(&self, layout: VideoLayout) -> VideoCutter<'_> {
        VideoCutter { processor: self, layout, pending: Vec::new(), groups: Vec::new() }
    }

    /// Keyed, and begun with everything that pixels and their normalisation depend on, in fixed widths.
    fn hasher(&self, domain: &[u8; 25]) -> blake3::Hasher {
        let config = &self.config;
        let mut hasher = blake3::Hasher::new_keyed(&self.hash_key);
        hasher.update(domain);
        hasher.update(&config.min_pixels.to_le_bytes());
        hasher.update(&config.max_pixels.to_le_bytes());
        for size in [config.patch_size, config.temporal_patch_size, config.merge_size] {
            hasher.update(&(size as u64).to_le_bytes());
        }
        for value in self.mean_std.iter().flatten() {
            hasher.update(&value.to_le_bytes());
        }
        hasher
    }
}

/// A video on its way from frames to patches.
pub struct VideoCutter<'a> {
    processor: &'a VideoProcessor,
    layout: VideoLayout,
    /// Resized frames that do not fill a temporal patch yet.
    pending: Vec<RgbImage>,
    groups: Vec<FrameGroup>,
}

impl VideoCutter<'_> {
    /// Takes the next frame; frames beyond those of the layout are ignored.
    ///
    /// # Errors
    /// [`VisionError::FrameSize`] for a frame of another size than the layout's.
    pub fn push(&mut self, frame: &RgbImage) -> Result<(), VisionError> {
        let VideoLayout { height, width, resized, num_groups, .. } = self.layout;
        if (frame.height(), frame.width()) != (height, width) {
            let (height, width) = (frame.height(), frame.width());
            return Err(VisionError::FrameSize {
                width,
                height,
                first_width: self.layout.width,
                first_height: self.layout.height,
            });
        }
        if self.groups.len() == num_groups {
            return Ok(());
        }
        self.pending.push(resize_bicubic(frame, resized.0, resized.1));
        if self.pending.len() == self.processor.config.temporal_patch_size {
            self.close_group();
        }
        Ok(())
    }

    /// The video. Where frames are missing, the last one is repeated: at the end of a temporal patch as the reference does,
    /// and for a file that has fewer than its header says.
    ///
    /// # Errors
    /// [`VisionError::NoFrames`] if there was none.
    pub fn finish(mut self) -> Result<ProcessedVideo, VisionError> {
        if self.groups.len() < self.layout.num_groups
            && let Some(last) = self.pending.last().cloned()
        {
            self.pending.resize(self.processor.config.temporal_patch_size, last);
            self.close_group();
        }
        let last = self.groups.last().cloned().ok_or(VisionError::NoFrames)?;
        self.groups.resize(self.layout.num_groups, last);
        let patch = self.processor.config.patch_size;
        let (height, width) = self.layout.resized;
        Ok(ProcessedVideo {
            groups: self.groups,
            grid_thw: [1, height / patch, width / patch],
            tokens_per_group: self.layout.tokens_per_group,
        })
    }

    fn close_group(&mut self) {
        let config = &self.processor.config;
        let frames: Vec<&RgbImage> = self.pending.iter().collect();
        let patches: Arc<[u8]> = to_patches(&frames, config.patch_size, config.merge_size).into();
        let mut hasher = self.processor.hasher(b"spark-vision video part 1");
        for side in [self.layout.resized.0, self.layout.resized.1] {
            hasher.update(&(side as u64).to_le_bytes());
        }
        hasher.update(&patches);
        self.groups.push(FrameGroup { patches, hash: *hasher.finalize().as_bytes() });
        self.pending.clear();
    }
}
