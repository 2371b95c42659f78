//! Files that mean harm or are broken: refused by their header, without memory, garbage or panic.

use image::{DynamicImage, GrayImage, ImageFormat};
use proptest::prelude::*;
use spark_vision::{
    Alpha, DecodeOptions, ImageProcessor, ImageProcessorConfig, RgbImage, VisionError, decode, read_size,
};

use crate::support::{encode, fixture, image_files};

fn options() -> DecodeOptions {
    DecodeOptions::new(Alpha::OverWhite)
}

fn processor() -> ImageProcessor {
    let config = ImageProcessorConfig {
        min_pixels: 4096,
        max_pixels: 1 << 20,
        patch_size: 16,
        temporal_patch_size: 2,
        merge_size: 2,
        image_mean: [0.5; 3],
        image_std: [0.5; 3],
    };
    ImageProcessor::new(config, options(), [0; 32])
}

/// A PNG file that claims a size: right checksums, four bytes of data.
fn png_header(width: u32, height: u32, depth: u8, color: u8) -> Vec<u8> {
    let mut ihdr = [width.to_be_bytes(), height.to_be_bytes()].concat();
    ihdr.extend([depth, color, 0, 0, 0]);
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    for (name, data) in [(b"IHDR", ihdr.as_slice()), (b"IDAT", &[0x78, 0x9c, 0, 0]), (b"IEND", &[])] {
        file.extend((data.len() as u32).to_be_bytes());
        let body = [name.as_slice(), data].concat();
        file.extend(&body);
        file.extend(crc32(&body).to_be_bytes());
    }
    file
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// Replaces the bytes at `at`.
fn patched(mut file: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

fn find(file: &[u8], what: &[u8]) -> usize {
    file.windows(what.len()).position(|window| window == what).unwrap()
}

fn jpeg_header(width: u16, height: u16) -> Vec<u8> {
    let file = fixture("decode/baseline.jpg");
    let size_at = find(&file, &[0xff, 0xc0]) + 5;
    patched(file, size_at, &[height.to_be_bytes(), width.to_be_bytes()].concat())
}

/// Largest virtual size that this process ever had, in bytes.
fn peak_virtual_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn bombs_are_refused_by_their_header() {
    let huge = u16::MAX.to_le_bytes();
    let gif = patched(fixture("decode/still.gif"), 6, &[huge, huge].concat());
    let bmp_side = 60_000u32.to_le_bytes();
    let bmp = patched(fixture("decode/rgb.bmp"), 18, &[bmp_side, bmp_side].concat());
    // A lossless WebP has 14 bits of width - 1 and of height - 1 after the signature byte.
    let webp = fixture("decode/lossless.webp");
    let size_at = find(&webp, b"VP8L") + 9;
    let webp = patched(webp, size_at, &[0xfe, 0xbf, 0xff, 0x0f]);
    let bombs = [
        (png_header(50_000, 50_000, 8, 2), 50_000, 50_000),
        (png_header(30_000, 30_000, 1, 0), 30_000, 30_000),
        (png_header(12_000, 12_000, 8, 2), 12_000, 12_000),
        (png_header(1, 0x7fff_ffff, 16, 6), 1, 0x7fff_ffff),
        (png_header(0x7fff_ffff, 1, 16, 6), 0x7fff_ffff, 1),
        (jpeg_header(65_500, 65_500), 65_500, 65_500),
        (gif, 65_535, 65_535),
        (bmp, 60_000, 60_000),
        (webp, 16_383, 16_383),
    ];
    let before = peak_virtual_memory();
    for (file, bomb_width, bomb_height) in bombs {
        for error in [
            read_size(&file, &options()).unwrap_err(),
            decode(&file, &options()).unwrap_err(),
            processor().process(&file).unwrap_err(),
        ] {
            let VisionError::TooLarge { width, height, max_side: 32_768, max_pixels: 67_108_864 } = error
            else {
                panic!("{bomb_width} x {bomb_height}: {error}")
            };
            assert_eq!((width, height), (bomb_width, bomb_height));
        }
    }
    // The smallest bomb decodes to 432 MB.
    let grown = peak_virtual_memory() - before;
    assert!(grown < 300 << 20, "{grown} bytes");
}

#[test]
fn repeated_scans_are_refused() {
    let file = fixture("decode/progressive.jpg");
    let expected = decode(&file, &options()).unwrap();
    let last_scan = file.len()
        - 2
        - file.windows(2).rev().skip(1).position(|pair| pair == [0xff, 0xda]).map(|at| at + 1).unwrap();
    assert_eq!(file[last_scan..last_scan + 2], [0xff, 0xda]);
    let (head, scan) = (&file[..last_scan], &file[last_scan..file.len() - 2]);
    let bomb = [head, &scan.repeat(3000), &[0xff, 0xd9]].concat();
    let error = decode(&bomb, &options()).unwrap_err();
    assert!(matches!(error, VisionError::TooManyScans { max_scans: 64 }), "{error}");

    // The limit is what refuses: the untouched file passes with its own number of scans and not with one less.
    let num_scans = file.windows(2).filter(|pair| *pair == [0xff, 0xda]).count() as u32;
    let with_limit = |max_jpeg_scans| decode(&file, &DecodeOptions { max_jpeg_scans, ..options() });
    assert_eq!(with_limit(num_scans).unwrap(), expected);
    assert!(matches!(with_limit(num_scans - 1), Err(VisionError::TooManyScans { .. })));
}

#[test]
fn a_compressed_profile_bomb_is_harmless() {
    // 64 MiB of zeros as an ICC profile in a 1 x 1 PNG; the decoder may spend 16 MiB on it.
    let mut info = png::Info::with_size(1, 1);
    info.icc_profile = Some(vec![0; 64 << 20].into());
    let mut file = Vec::new();
    let mut writer = png::Encoder::with_info(&mut file, info).unwrap().write_header().unwrap();
    writer.write_image_data(&[7]).unwrap();
    writer.finish().unwrap();
    assert!(file.len() < 1 << 20);
    match decode(&file, &options()) {
        Ok(image) => assert_eq!(image.pixels(), [7; 3]),
        Err(error) => assert!(matches!(error, VisionError::Corrupt { .. }), "{error}"),
    }
}

#[test]
fn extreme_shapes() {
    let gray = |width, height| encode(&DynamicImage::from(GrayImage::new(width, height)), ImageFormat::Png);
    let image = processor().process(&gray(1, 1)).unwrap();
    assert_eq!((image.grid_thw, image.num_tokens), ([1, 4, 4], 4));
    assert_eq!(image.patches.len(), 16 * 3 * 16 * 16);
    assert!(processor().process(&gray(1, 200)).is_ok() && processor().process(&gray(200, 1)).is_ok());
    for (width, height) in [(1, 201), (201, 1), (30_000, 100)] {
        let error = processor().process(&gray(width, height)).unwrap_err();
        let expected = (u64::from(width), u64::from(height));
        assert!(
            matches!(error, VisionError::AspectRatio { width, height, max_ratio: 200 } if (width, height) == expected),
            "{error}"
        );
    }
    for (width, height) in [(1, 100_000), (100_000, 1)] {
        assert!(matches!(processor().process(&gray(width, height)), Err(VisionError::TooLarge { .. })));
    }
    for (width, height) in [(0, 0), (0, 5), (5, 0)] {
        let error = decode(&png_header(width, height, 8, 2), &options()).unwrap_err();
        assert!(matches!(error, VisionError::Empty { .. }), "{error}");
    }
}

#[test]
fn other_formats_are_refused() {
    let files: [&[u8]; 13] = [
        b"",
        b"B",
        b"\xff\xd8",
        b"<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"9\" height=\"9\"></svg>",
        b"<?xml version=\"1.0\"?><svg/>",
        b"II*\0\x08\0\0\0",
        b"MM\0*\0\0\0\x08",
        b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"\xff\x4f\xff\x51\0\x2f",
        b"\0\0\x01\0\x01\0\x10\x10",
        b"RIFF\x24\0\0\0WAVEfmt ",
    ];
    for file in files {
        for error in [read_size(file, &options()).unwrap_err(), decode(file, &options()).unwrap_err()] {
            assert!(matches!(error, VisionError::UnsupportedFormat), "{file:?}: {error}");
        }
    }
}

#[test]
fn the_content_decides_not_what_follows_or_what_it_is_called() {
    let jpeg = fixture("decode/baseline.jpg");
    let expected = decode(&jpeg, &options()).unwrap();
    let png = fixture("decode/rgb.png");
    assert_eq!(decode(&[jpeg.as_slice(), b"PK\x03\x04", &png].concat(), &options()).unwrap(), expected);
    assert!(matches!(decode(&[&png[..8], &jpeg].concat(), &options()), Err(VisionError::Corrupt { .. })));
}

#[test]
fn stray_bytes_between_jpeg_segments_are_forgiven() {
    let file = fixture("decode/baseline.jpg");
    let (head, end) = file.split_at(file.len() - 2);
    let padded = [head, &[0; 5], end].concat();
    assert_eq!(decode(&padded, &options()).unwrap(), decode(&file, &options()).unwrap());
}

/// Decodes and checks that the answer is the whole image or an error without internals.
fn whole_or_refused(file: &[u8], whole: Option<&RgbImage>, what: &str) -> bool {
    let size = read_size(file, &options());
    match (decode(file, &options()), whole) {
        (Ok(image), Some(whole)) => assert!(image == *whole, "{what}: other pixels than the whole file's"),
        (Ok(image), None) => {
            let size = size.unwrap_or_else(|error| panic!("{what}: decoded, but no size: {error}"));
            assert_eq!((size.width, size.height), (image.width(), image.height()), "{what}");
        }
        (Err(error), _) => {
            let text = error.to_string();
            assert!(!text.contains("0x") && !text.contains("panic"), "{what}: {text}");
            return false;
        }
    }
    true
}

#[test]
fn a_truncated_file_is_an_error_or_the_whole_image() {
    for (name, file) in image_files() {
        let whole = decode(&file, &options()).unwrap();
        // Every length of small files; of larger ones the header, the end and a sample between.
        let lengths = (0..file.len()).filter(|len| {
            file.len() < 1500 || *len < 200 || file.len() - len < 100 || len.is_multiple_of(23)
        });
        let mut num_whole = 0;
        for len in lengths {
            num_whole +=
                usize::from(whole_or_refused(&file[..len], Some(&whole), &format!("{name} cut to {len}")));
        }
        // Checksums, end markers and padding after the last pixel may be missing, nothing more.
        assert!(num_whole <= 4, "{name}: {num_whole} lengths decode");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_do_not_panic(
        file_idx in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        near_start in any::<bool>(),
    ) {
        // A damaged header may ask for anything: small limits keep the test fast, and are what is tested.
        let limits = DecodeOptions { max_side: 4096, max_pixels: 1 << 18, ..options() };
        let files = image_files();
        let (name, mut file) = file_idx.get(&files).clone();
        let reach = if near_start { file.len().min(64) } else { file.len() };
        for (at, value) in changes {
            let at = at.index(reach);
            file[at] = value;
        }
        if let Ok(image) = decode(&file, &limits) {
            prop_assert!(image.height() * image.width() <= 1 << 18, "{name}");
        }
        whole_or_refused(&file, None, &name);
    }

    #[test]
    fn bytes_after_a_magic_number_do_not_panic(magic_idx in 0..5usize, rest in prop::collection::vec(any::<u8>(), 0..200)) {
        let magic: [&[u8]; 5] =
            [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\0\0\0WEBP", b"GIF89a", b"BM"];
        whole_or_refused(&[magic[magic_idx], &rest].concat(), None, "random bytes");
    }
}
