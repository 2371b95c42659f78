//! Processor configurations as checkpoints carry them.

use std::path::Path;

use spark_vision::{ImageProcessorConfig, ImageProcessorOverrides, VisionError};

const QWEN3_VL: &str = r#"{"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16,
    "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}"#;

fn load(files: &[(&str, &str)], overrides: &str) -> Result<ImageProcessorConfig, VisionError> {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let overrides: ImageProcessorOverrides = serde_json::from_str(overrides).unwrap();
    ImageProcessorConfig::from_folder(folder.path(), &overrides)
}

fn preprocessor(text: &str) -> Result<ImageProcessorConfig, VisionError> {
    load(&[("preprocessor_config.json", text)], "{}")
}

#[test]
fn the_published_file_is_understood_and_the_joint_file_wins() {
    let published = preprocessor(QWEN3_VL).unwrap();
    assert_eq!((published.min_pixels, published.max_pixels), (65536, 16_777_216));
    assert_eq!((published.patch_size, published.temporal_patch_size, published.merge_size), (16, 2, 2));
    assert_eq!(published.factor(), 32);

    let joint = format!(r#"{{"image_processor": {QWEN3_VL}, "video_processor": {{}}}}"#);
    let other = r#"{"patch_size": 14}"#;
    let both = load(&[("processor_config.json", &joint), ("preprocessor_config.json", other)], "{}").unwrap();
    assert_eq!(both, published);
    let no_image_part = [("processor_config.json", "{}"), ("preprocessor_config.json", QWEN3_VL)];
    assert_eq!(load(&no_image_part, "{}").unwrap(), published);
}

#[test]
fn what_a_file_leaves_out_has_the_defaults_of_its_class() {
    let config = preprocessor(r#"{"min_pixels": 3136, "max_pixels": 12845056}"#).unwrap();
    assert_eq!((config.min_pixels, config.max_pixels), (3136, 12_845_056));
    assert_eq!((config.patch_size, config.factor()), (14, 28));
    assert!(config.image_mean[0] < 0.5 && config.image_std[0] < 0.3);
}

#[test]
fn overrides_replace_the_limits() {
    let with = |overrides: &str| {
        let config = load(&[("preprocessor_config.json", QWEN3_VL)], overrides).unwrap();
        (config.min_pixels, config.max_pixels)
    };
    assert_eq!(with(r#"{"max_pixels": 1000000}"#), (65536, 1_000_000));
    assert_eq!(with(r#"{"size": {"longest_edge": 2000000, "shortest_edge": 4096}}"#), (4096, 2_000_000));
    assert_eq!(with(r#"{"min_pixels": 1024, "size": {"shortest_edge": 4096}}"#), (1024, 16_777_216));
    assert!(serde_json::from_str::<ImageProcessorOverrides>(r#"{"max_pixel": 1}"#).is_err());
}

#[test]
fn settings_that_cannot_be_followed_are_named() {
    let field_of = |text: &str| match preprocessor(text) {
        Err(VisionError::Setting { field, .. }) => field,
        other => panic!("{text}: {other:?}"),
    };
    assert_eq!(field_of(r#"{"image_processor_type": "CLIPImageProcessor"}"#), "image_processor_type");
    assert_eq!(field_of(r#"{"resample": 2}"#), "resample");
    assert_eq!(field_of(r#"{"do_resize": false}"#), "do_resize");
    assert_eq!(field_of(r#"{"rescale_factor": 1.0}"#), "rescale_factor");
    assert_eq!(field_of(r#"{"patch_size": 0}"#), "patch_size");
    assert_eq!(field_of(r#"{"merge_size": 1000}"#), "merge_size");
    assert_eq!(field_of(r#"{"min_pixels": 0}"#), "min_pixels");
    assert_eq!(field_of(r#"{"min_pixels": 5000, "max_pixels": 4999}"#), "max_pixels");
    assert_eq!(field_of(r#"{"max_pixels": 4000000000}"#), "max_pixels");
    assert_eq!(field_of(r#"{"image_std": [0.5, 0, 0.5]}"#), "image_std");
}

#[test]
fn missing_and_broken_files_are_errors_that_name_them() {
    assert!(matches!(load(&[], "{}"), Err(VisionError::NoProcessorConfig { .. })));
    for text in
        ["", "[", "[]", r#"{"patch_size": "16"}"#, r#"{"image_mean": [0.5]}"#, r#"{"min_pixels": -1}"#]
    {
        let error = preprocessor(text).unwrap_err();
        assert!(matches!(error, VisionError::ParseConfig { .. }), "{text}: {error}");
        assert!(error.to_string().contains("preprocessor_config.json"), "{error}");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = ImageProcessorConfig::from_folder(file.path(), &ImageProcessorOverrides::default());
    assert!(matches!(error, Err(VisionError::ReadConfig { .. })), "{error:?}");
    assert!(ImageProcessorConfig::from_folder(Path::new(""), &ImageProcessorOverrides::default()).is_err());
}
