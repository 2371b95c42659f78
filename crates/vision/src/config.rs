//! Settings of the image processor, read from a checkpoint folder. Settings that would change the pixels in a way that
//! this crate does not follow are refused by name; everything else in those files is ignored.

use std::path::Path;

use serde::Deserialize;

use crate::VisionError;

/// Largest value of `max_pixels`: a resized image of more than this would be a mistake in a configuration.
const LARGEST_MAX_PIXELS: u64 = 1 << 28;

/// What the processor of a checkpoint does.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessorConfig {
    /// Least pixels after resizing (`size.shortest_edge` in the file, which is a number of pixels, not an edge).
    pub min_pixels: u64,
    /// Most pixels after resizing (`size.longest_edge`).
    pub max_pixels: u64,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Frames in a patch; an image's one frame is repeated to fill them.
    pub temporal_patch_size: usize,
    /// Patches per side of the block that becomes one token.
    pub merge_size: usize,
    /// Mean of each channel, of values from 0 to 1: the device subtracts it.
    pub image_mean: [f32; 3],
    /// Standard deviation of each channel, likewise.
    pub image_std: [f32; 3],
}

/// What a user may change, as JSON: `{"min_pixels": ..., "max_pixels": ..., "size": {...}}`. Unknown keys are errors.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageProcessorOverrides {
    /// Replaces [`ImageProcessorConfig::min_pixels`].
    pub min_pixels: Option<u64>,
    /// Replaces [`ImageProcessorConfig::max_pixels`].
    pub max_pixels: Option<u64>,
    /// The same two under the names of the newer files; `min_pixels` and `max_pixels` win over it.
    pub size: Option<SizeOverride>,
}

/// Pixel counts under their names in `size`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct SizeOverride {
    /// Least pixels.
    pub shortest_edge: Option<u64>,
    /// Most pixels.
    pub longest_edge: Option<u64>,
}

impl ImageProcessorConfig {
    /// Reads `image_processor` of `processor_config.json`, or else `preprocessor_config.json`, from a checkpoint folder:
    /// the order of transformers 5. What the file leaves out has the defaults of `Qwen2VLImageProcessor`.
    ///
    /// # Errors
    /// [`VisionError::NoProcessorConfig`] if there is neither, [`VisionError::ReadConfig`], [`VisionError::ParseConfig`],
    /// and [`VisionError::Setting`] for a value that cannot be followed.
    pub fn from_folder(folder: &Path, overrides: &ImageProcessorOverrides) -> Result<Self, VisionError> {
        let joint: Option<JointFile> = read_json(&folder.join("processor_config.json"))?;
        let file = match joint.and_then(|file| file.image_processor) {
            Some(file) => file,
            None => read_json(&folder.join("preprocessor_config.json"))?
                .ok_or_else(|| VisionError::NoProcessorConfig { folder: folder.to_owned() })?,
        };
        file.into_config(overrides)
    }

    /// Side of the square of pixels that becomes one token: both sides of a resized image are multiples of it.
    pub fn factor(&self) -> usize {
        self.patch_size * self.merge_size
    }
}

/// `processor_config.json`, as far as images are concerned.
#[derive(Deserialize)]
struct JointFile {
    image_processor: Option<ProcessorFile>,
}

/// `preprocessor_config.json`, or the image part of the joint file.
#[derive(Deserialize)]
struct ProcessorFile {
    size: Option<SizeOverride>,
    min_pixels: Option<u64>,
    max_pixels: Option<u64>,
    patch_size: Option<usize>,
    temporal_patch_size: Option<usize>,
    merge_size: Option<usize>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    image_processor_type: Option<String>,
    do_resize: Option<bool>,
    do_rescale: Option<bool>,
    do_normalize: Option<bool>,
    do_convert_rgb: Option<bool>,
    rescale_factor: Option<f64>,
    resample: Option<u32>,
}

impl ProcessorFile {
    fn into_config(self, overrides: &ImageProcessorOverrides) -> Result<ImageProcessorConfig, VisionError> {
        self.check_steps()?;
        let size = self.size.unwrap_or_default();
        let user = overrides.size.unwrap_or_default();
        let config = ImageProcessorConfig {
            min_pixels: (overrides.min_pixels)
                .or(user.shortest_edge)
                .or(self.min_pixels)
                .or(size.shortest_edge)
                .unwrap_or(56 * 56),
            max_pixels: (overrides.max_pixels)
                .or(user.longest_edge)
                .or(self.max_pixels)
                .or(size.longest_edge)
                .unwrap_or(28 * 28 * 1280),
            patch_size: self.patch_size.unwrap_or(14),
            temporal_patch_size: self.temporal_patch_size.unwrap_or(2),
            merge_size: self.merge_size.unwrap_or(2),
            // The means and deviations that CLIP was trained with.
            image_mean: self.image_mean.unwrap_or([0.481_454_66, 0.457_827_5, 0.408_210_73]),
            image_std: self.image_std.unwrap_or([0.268_629_54, 0.261_302_6, 0.275_777_1]),
        };
        config.check()?;
        Ok(config)
    }

    /// The steps of the pipeline must be the ones that this crate and the device carry out.
    fn check_steps(&self) -> Result<(), VisionError> {
        const BICUBIC: u32 = 3;
        // In other families the same keys mean other things: `shortest_edge` is then an edge.
        let class = self.image_processor_type.as_deref().unwrap_or("Qwen2VLImageProcessor");
        let is_known =
            ["Qwen2VLImageProcessor", "Qwen3VLImageProcessor"].iter().any(|name| class.starts_with(name));
        let rule = "only the image processors of Qwen2-VL and Qwen3-VL are supported";
        require(is_known, "image_processor_type", &class, rule)?;
        let steps = [
            ("do_resize", self.do_resize),
            ("do_rescale", self.do_rescale),
            ("do_normalize", self.do_normalize),
            ("do_convert_rgb", self.do_convert_rgb),
        ];
        for (field, value) in steps {
            require(value != Some(false), field, &false, "only true is supported")?;
        }
        let resample = self.resample.unwrap_or(BICUBIC);
        require(resample == BICUBIC, "resample", &resample, "only 3 (bicubic) is supported")?;
        let factor = self.rescale_factor.unwrap_or(1.0 / 255.0);
        require((factor * 255.0 - 1.0).abs() < 1e-6, "rescale_factor", &factor, "only 1/255 is supported")
    }
}

impl ImageProcessorConfig {
    fn check(&self) -> Result<(), VisionError> {
        let positive = "must be from 1 to 256";
        require((1..=256).contains(&self.patch_size), "patch_size", &self.patch_size, positive)?;
        require((1..=256).contains(&self.merge_size), "merge_size", &self.merge_size, positive)?;
        let frames = self.temporal_patch_size;
        require((1..=256).contains(&frames), "temporal_patch_size", &frames, positive)?;
        require(self.min_pixels >= 1, "min_pixels", &self.min_pixels, "must be at least 1")?;
        let max_pixels = self.max_pixels;
        require(max_pixels >= self.min_pixels, "max_pixels", &max_pixels, "must not be below min_pixels")?;
        require(max_pixels <= LARGEST_MAX_PIXELS, "max_pixels", &max_pixels, "must be at most 268435456")?;
        for mean in self.image_mean {
            require(mean.is_finite(), "image_mean", &mean, "must be finite")?;
        }
        for std in self.image_std {
            require(std.is_finite() && std > 0.0, "image_std", &std, "must be finite and above 0")?;
        }
        Ok(())
    }
}

pub(crate) fn require(
    holds: bool,
    field: &'static str,
    value: &dyn std::fmt::Display,
    rule: &'static str,
) -> Result<(), VisionError> {
    if holds { Ok(()) } else { Err(VisionError::Setting { field, value: value.to_string(), rule }) }
}

/// `None` if there is no such file.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, VisionError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(VisionError::ReadConfig { path: path.to_owned(), source }),
    };
    let parsed = serde_json::from_slice(&text);
    parsed.map(Some).map_err(|source| VisionError::ParseConfig { path: path.to_owned(), source })
}
