//! Videos against transformers 4.57.1: which frames, their size, their pixels, and configuration files.

use spark_vision::{
    Alpha, DecodeOptions, ImageProcessorConfig, ImageProcessorOverrides, RgbImage, SampleRate,
    VideoProcessor, VideoProcessorConfig, VisionError, decode, smart_resize_video,
};

use safetensors::SafeTensors;

use crate::support::fixtures;

fn image_config() -> ImageProcessorConfig {
    let folder = fixtures().join("models/moe_vl_bf16");
    ImageProcessorConfig::from_folder(&folder, &ImageProcessorOverrides::default()).unwrap()
}

fn config() -> VideoProcessorConfig {
    VideoProcessorConfig::from_folder(&fixtures().join("models/moe_vl_bf16"), &image_config()).unwrap()
}

fn processor() -> VideoProcessor {
    VideoProcessor::new(config(), &image_config(), [7; 32])
}

fn goldens() -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(fixtures().join("video/video.json")).unwrap()).unwrap()
}

fn frame(clip: usize, i: usize) -> RgbImage {
    let bytes = std::fs::read(fixtures().join(format!("video/clip{clip}_{i}.jpg"))).unwrap();
    decode(&bytes, &DecodeOptions::new(Alpha::OverWhite)).unwrap()
}

#[test]
fn the_same_frames_are_sampled() {
    let config = config();
    let rows = goldens()["sampling"].as_array().unwrap().clone();
    for row in &rows {
        let (total, fps) = (row[0].as_u64().unwrap() as usize, row[1].as_f64().unwrap());
        let expected: Vec<usize> = serde_json::from_value(row[2].clone()).unwrap();
        let got = config.sample(total, fps, SampleRate::Default);
        // Long lists are in the file as every 37th of them.
        let got = if got.len() > 40 { got.into_iter().step_by(37).collect() } else { got };
        assert_eq!(got, expected, "{total} frames at {fps}");
    }
    assert!(rows.len() > 100);
    assert_eq!(config.sample(0, 30.0, SampleRate::Default), [0; 0]);
    assert_eq!(config.sample(100, 10.0, SampleRate::PerSecond(1.0)).len(), 10);
    assert_eq!(config.sample(100, 10.0, SampleRate::Frames(3)), [0, 50, 99]);
    assert_eq!(config.sample(2, 10.0, SampleRate::Frames(1000)), [0, 1]);
    // Rates that no camera has; a claim of no end stays within max_frames.
    for (total, fps) in [(usize::MAX, 1e-300), (usize::MAX, 1e300), (1, f64::MAX), (1 << 40, 1.0)] {
        let got = config.sample(total, fps, SampleRate::Default);
        assert!(!got.is_empty() && got.len() <= 768 && got.iter().all(|&i| i < total), "{total} {fps}");
    }
}

#[test]
fn frames_get_the_same_size() {
    let config = config();
    for row in goldens()["sizes"].as_array().unwrap() {
        let [frames, h, w, rh, rw]: [usize; 5] = serde_json::from_value(row.clone()).unwrap();
        assert_eq!(smart_resize_video(frames, h, w, &config).unwrap(), (rh, rw), "{frames} of {h} x {w}");
    }
    assert!(smart_resize_video(2, 0, 5, &config).is_err());
    assert!(smart_resize_video(2, 33, 33 * 201, &config).is_err());
    // Smaller than a token: brought up to one.
    assert_eq!(smart_resize_video(4, 16, 16, &config).unwrap(), (32, 32));
}

#[test]
fn pixels_are_those_of_transformers() {
    let processor = processor();
    let bytes = std::fs::read(fixtures().join("video/video.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let mut pixels = Vec::new();
    let first = frame(0, 0);
    let layout = processor.layout(5, first.height(), first.width()).unwrap();
    let mut cutter = processor.cutter(layout);
    (0..5).for_each(|i| cutter.push(&frame(0, i)).unwrap());
    let video = cutter.finish().unwrap();
    assert_eq!((video.groups.len(), video.grid_thw, video.tokens_per_group), (3, [1, 4, 6], 6));
    let hashes: std::collections::BTreeSet<_> = video.groups.iter().map(|group| group.hash).collect();
    assert_eq!(hashes.len(), 3, "groups of different pixels have different identities");
    pixels.extend(video.groups.iter().flat_map(|group| group.patches.iter().copied()));
    let expected = expected.tensor("video/pixels").unwrap();
    assert_eq!(expected.shape(), [72, 1536]);
    let wrong = pixels.iter().zip(expected.data()).position(|(a, b)| a != b);
    assert_eq!((wrong, pixels.len()), (None, expected.data().len()));
}

#[test]
fn times_are_in_the_middle_of_a_patch() {
    let config = config();
    assert_eq!(config.timestamps(&[0, 1, 2, 3, 4], 1.0), [0.5, 2.5, 4.0]);
    assert_eq!(config.timestamps(&[0, 15], 30.0), [0.25]);
    assert_eq!(config.timestamps(&[], 30.0), [0.0; 0]);
}

#[test]
fn missing_frames_are_the_last_one_and_other_sizes_are_refused() {
    let processor = processor();
    let layout = processor.layout(8, 64, 96).unwrap();
    let gray = |level: u8, w: usize| RgbImage::new(64, w, vec![level; 64 * w * 3]).unwrap();
    let mut cutter = processor.cutter(layout);
    for level in [10, 20, 30] {
        cutter.push(&gray(level, 96)).unwrap();
    }
    assert!(matches!(cutter.push(&gray(1, 64)), Err(VisionError::FrameSize { width: 64, .. })));
    let video = cutter.finish().unwrap();
    assert_eq!(video.groups.len(), 4);
    assert_eq!((video.groups[1].patches[0], video.groups[3].patches[0]), (30, 30));
    assert_eq!(video.groups[2].hash, video.groups[3].hash);
    assert!(matches!(processor.cutter(layout).finish(), Err(VisionError::NoFrames)));
    assert!(matches!(processor.layout(0, 64, 96), Err(VisionError::NoFrames)));
    let mut longer = processor.cutter(processor.layout(2, 64, 96).unwrap());
    (0..5).for_each(|level| longer.push(&gray(level, 96)).unwrap());
    assert_eq!(longer.finish().unwrap().groups.len(), 1, "frames beyond the layout are ignored");
}

#[test]
fn settings_come_from_the_folder_and_must_fit_the_images() {
    let images = image_config();
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
        let read = VideoProcessorConfig::from_folder(folder.path(), &images);
        std::fs::remove_file(folder.path().join(name)).unwrap();
        read
    };
    let defaults = VideoProcessorConfig::from_folder(folder.path(), &images).unwrap();
    assert_eq!((defaults.fps, defaults.min_frames, defaults.max_frames), (2.0, 4, 768));
    let joint =
        read("processor_config.json", r#"{"video_processor": {"fps": 1, "size": {"longest_edge": 999999}}}"#);
    assert_eq!((joint.as_ref().unwrap().fps, joint.unwrap().max_pixels), (1.0, 999_999));
    for wrong in [
        r#"{"patch_size": 8}"#,
        r#"{"image_mean": [0.1, 0.2, 0.3]}"#,
        r#"{"fps": 0}"#,
        r#"{"min_frames": 0}"#,
        r#"{"max_frames": 3}"#,
        r#"{"max_frames": 999999999}"#,
        r#"{"size": {"shortest_edge": 10, "longest_edge": 5}}"#,
        r#"{"video_processor_type": "LlavaVideoProcessor"}"#,
        "[",
    ] {
        assert!(read("video_preprocessor_config.json", wrong).is_err(), "{wrong}");
    }
}
