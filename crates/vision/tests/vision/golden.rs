//! Equality with the reference, to the last bit: decoding (Pillow through transformers' `load_image`), resizing
//! (torchvision), sizes and patch rows (transformers' image processor).

use image::{DynamicImage, ImageBuffer, ImageFormat, Luma, LumaA, Rgb, Rgba};
use safetensors::SafeTensors;
use spark_vision::{
    Alpha, DecodeOptions, ImageProcessor, ImageProcessorConfig, RgbImage, VisionError, decode, read_size,
    resize_bicubic, smart_resize,
};

use crate::support::{encode, fixture, fixture_json, image_files};

/// What `load_image` does about transparency.
fn as_load_image() -> DecodeOptions {
    DecodeOptions::new(Alpha::Drop)
}

fn golden_image(tensors: &SafeTensors<'_>, name: &str) -> RgbImage {
    let tensor = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    let [height, width, 3] = *tensor.shape() else { panic!("{name} is not [H, W, 3]") };
    RgbImage::new(height, width, tensor.data().to_vec()).unwrap()
}

#[test]
fn decoded_files_equal_pillow() {
    let bytes = fixture("decode.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let files = image_files();
    assert!(files.len() >= 20, "only {} files", files.len());
    for (name, file) in files {
        let expected = golden_image(&tensors, &name);
        let actual = decode(&file, &as_load_image()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let size = read_size(&file, &as_load_image()).unwrap();
        assert_eq!((actual.height(), actual.width()), (expected.height(), expected.width()), "{name}");
        assert_eq!((size.height, size.width), (expected.height(), expected.width()), "{name}");
        let differing = actual.pixels().iter().zip(expected.pixels()).filter(|(a, b)| a != b).count();
        assert_eq!(differing, 0, "{name}: {differing} of {} values differ", actual.pixels().len());
    }
}

#[test]
fn resized_images_equal_torchvision() {
    let bytes = fixture("resize.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let cases: Vec<&str> = tensors.names().into_iter().filter_map(|name| name.strip_suffix("/in")).collect();
    assert!(cases.len() >= 20, "only {} cases", cases.len());
    for case in cases {
        let input = golden_image(&tensors, &format!("{case}/in"));
        let expected = golden_image(&tensors, &format!("{case}/out"));
        let actual = resize_bicubic(&input, expected.height(), expected.width());
        assert!(actual == expected, "{case} differs");
    }
}

#[test]
fn sizes_equal_the_reference() {
    let tables = fixture_json("smart_resize.json");
    let mut num_sizes = 0;
    for table in tables.as_array().unwrap() {
        let limit = |name: &str| table["limits"][name].as_u64().unwrap();
        for row in table["sizes"].as_array().unwrap() {
            let [h, w, h_bar, w_bar] = [0, 1, 2, 3].map(|column| row[column].as_u64().unwrap() as usize);
            let actual =
                smart_resize(h, w, limit("factor") as usize, limit("min_pixels"), limit("max_pixels"));
            match actual {
                Ok(size) => assert_eq!(size, (h_bar, w_bar), "{h} x {w}"),
                Err(VisionError::AspectRatio { .. }) => assert_eq!((h_bar, w_bar), (0, 0), "{h} x {w}"),
                Err(error) => panic!("{h} x {w}: {error}"),
            }
            num_sizes += 1;
        }
    }
    assert!(num_sizes > 1000, "only {num_sizes} sizes");
}

/// The published settings of Qwen3-VL, with other limits.
fn qwen3_vl(min_pixels: u64, max_pixels: u64) -> ImageProcessorConfig {
    ImageProcessorConfig {
        min_pixels,
        max_pixels,
        patch_size: 16,
        temporal_patch_size: 2,
        merge_size: 2,
        image_mean: [0.5; 3],
        image_std: [0.5; 3],
    }
}

/// `[rows, 3, 1, patch * patch]` to the reference's `[rows, 3, frames, patch * patch]`.
fn repeat_frame(patches: &[u8], config: &ImageProcessorConfig) -> Vec<u8> {
    let frame = config.patch_size * config.patch_size;
    patches.chunks_exact(frame).flat_map(|channel| channel.repeat(config.temporal_patch_size)).collect()
}

#[test]
fn patch_rows_equal_the_image_processor() {
    let bytes = fixture("processor.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let cases = fixture_json("processor.json");
    for case in cases.as_array().unwrap() {
        let (name, file) = (case["case"].as_str().unwrap(), case["file"].as_str().unwrap());
        let limit = |key: &str| case[key].as_u64().unwrap();
        let config = qwen3_vl(limit("min_pixels"), limit("max_pixels"));
        let processor = ImageProcessor::new(config.clone(), as_load_image(), [7; 32]);
        let file = fixture(&format!("decode/{file}"));
        let image = processor.process(&file).unwrap_or_else(|error| panic!("{name}: {error}"));

        let grid: Vec<u64> = image.grid_thw.iter().map(|&n| n as u64).collect();
        assert_eq!(serde_json::json!(grid), case["grid_thw"], "{name}");
        assert_eq!(image.num_tokens, image.grid_thw.iter().product::<usize>() / 4, "{name}");
        assert_eq!(processor.num_tokens_of(&file).unwrap(), image.num_tokens, "{name}");
        assert_eq!(processor.num_tokens_for(image.width, image.height).unwrap(), image.num_tokens, "{name}");
        let levels = tensors.tensor(&format!("{name}/levels")).unwrap();
        assert!(repeat_frame(&image.patches, &config) == levels.data(), "{name}: levels differ");
    }
}

#[test]
fn normalised_levels_are_the_pixel_values() {
    // The device normalises; this states with which formula the reference's floats come out, bit for bit.
    let bytes = fixture("processor.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let config = qwen3_vl(1024, 4096);
    let processor = ImageProcessor::new(config.clone(), as_load_image(), [7; 32]);
    let image = processor.process(&fixture("decode/exact.png")).unwrap();
    let mean = config.image_mean[0] * 255.0;
    let std = config.image_std[0] * 255.0;
    let actual: Vec<u8> = repeat_frame(&image.patches, &config)
        .into_iter()
        .flat_map(|level| ((f32::from(level) - mean) / std).to_le_bytes())
        .collect();
    assert!(actual == tensors.tensor("exact.png@1024/pixel_values").unwrap().data());
}

/// 16-bit samples whose low byte matters.
fn sample16(x: u32, y: u32) -> u16 {
    (x * 9001 + y * 257 + 200) as u16
}

#[test]
fn sixteen_bit_colour_keeps_the_high_byte_and_sixteen_bit_grey_clips() {
    let rgb = ImageBuffer::from_fn(5, 4, |x, y| Rgb([sample16(x, y), 255, 256]));
    let decoded = decode(&encode(&DynamicImage::ImageRgb16(rgb.clone()), ImageFormat::Png), &as_load_image());
    let expected: Vec<u8> = rgb.as_raw().iter().map(|v| (v >> 8) as u8).collect();
    assert_eq!(decoded.unwrap().pixels(), expected);

    let gray = ImageBuffer::from_fn(5, 4, |x, y| Luma([(x * 60 + y) as u16]));
    let decoded =
        decode(&encode(&DynamicImage::ImageLuma16(gray.clone()), ImageFormat::Png), &as_load_image());
    let expected: Vec<u8> = gray.as_raw().iter().flat_map(|&v| [v.min(255) as u8; 3]).collect();
    assert_eq!(decoded.unwrap().pixels(), expected);

    let gray_alpha = ImageBuffer::from_fn(5, 4, |x, y| LumaA([sample16(x, y), 65535]));
    let decoded =
        decode(&encode(&DynamicImage::ImageLumaA16(gray_alpha.clone()), ImageFormat::Png), &as_load_image());
    let expected: Vec<u8> = gray_alpha.pixels().flat_map(|p| [(p.0[0] >> 8) as u8; 3]).collect();
    assert_eq!(decoded.unwrap().pixels(), expected);
}

#[test]
fn transparency_is_dropped_or_shown_on_white() {
    let image = ImageBuffer::from_fn(3, 1, |x, _| Rgba([10, 20, 30, [0, 128, 255][x as usize]]));
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        let file = encode(&DynamicImage::ImageRgba8(image.clone()), format);
        let dropped = decode(&file, &DecodeOptions::new(Alpha::Drop)).unwrap();
        assert_eq!(dropped.pixels()[3..], [10, 20, 30, 10, 20, 30]);
        let white = decode(&file, &DecodeOptions::new(Alpha::OverWhite)).unwrap();
        assert_eq!(white.pixels(), [255, 255, 255, 132, 137, 142, 10, 20, 30]);
    }
}

#[test]
fn a_gif_frame_smaller_than_its_screen_shows_the_background() {
    let gif = |transparent: Option<u8>| {
        let mut bytes = Vec::new();
        let palette = [1, 2, 3, 40, 50, 60, 70, 80, 90, 250, 240, 230];
        let mut encoder = gif::Encoder::new(&mut bytes, 4, 3, &palette).unwrap();
        let frame = gif::Frame {
            left: 1,
            top: 1,
            width: 2,
            height: 1,
            transparent,
            buffer: (&[1, 2][..]).into(),
            ..gif::Frame::default()
        };
        encoder.write_frame(&frame).unwrap();
        drop(encoder);
        bytes
    };
    let check = |file: &[u8], alpha: Alpha, around: [u8; 3], left: [u8; 3], right: [u8; 3]| {
        let image = decode(file, &DecodeOptions::new(alpha)).unwrap();
        let mut expected = [around; 12];
        (expected[5], expected[6]) = (left, right);
        assert_eq!(image.pixels(), expected.concat());
    };
    let opaque = gif(None);
    check(&opaque, Alpha::OverWhite, [1, 2, 3], [40, 50, 60], [70, 80, 90]);
    let transparent = gif(Some(2));
    check(&transparent, Alpha::Drop, [70, 80, 90], [40, 50, 60], [70, 80, 90]);
    check(&transparent, Alpha::OverWhite, [255; 3], [40, 50, 60], [255; 3]);
}

#[test]
fn identity_follows_bytes_settings_and_key() {
    let file = fixture("decode/rgb.png");
    let base = ImageProcessor::new(qwen3_vl(4096, 1 << 20), as_load_image(), [1; 32]);
    assert_eq!(base.hash(&file), base.process(&file).unwrap().hash);
    let mut seen = vec![base.hash(&file)];
    let mut check_new = |hash: [u8; 32]| {
        assert!(!seen.contains(&hash));
        seen.push(hash);
    };
    check_new(base.hash(&fixture("decode/gray.png")));
    check_new(base.hash(&file[..file.len() - 1]));
    let other_limits = ImageProcessor::new(qwen3_vl(4096, 1 << 19), as_load_image(), [1; 32]);
    check_new(other_limits.hash(&file));
    let other_alpha =
        ImageProcessor::new(qwen3_vl(4096, 1 << 20), DecodeOptions::new(Alpha::OverWhite), [1; 32]);
    check_new(other_alpha.hash(&file));
    let other_mean = ImageProcessorConfig { image_mean: [0.4, 0.5, 0.5], ..qwen3_vl(4096, 1 << 20) };
    check_new(ImageProcessor::new(other_mean, as_load_image(), [1; 32]).hash(&file));
    check_new(ImageProcessor::new(qwen3_vl(4096, 1 << 20), as_load_image(), [2; 32]).hash(&file));
}
