//! Where the fixtures lie, and images made on the spot.

use std::path::PathBuf;

use image::{DynamicImage, ImageFormat};

/// The folder of all fixtures.
pub(crate) fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// A file of the fixtures that were made with transformers, Pillow and torchvision.
pub(crate) fn fixture(name: &str) -> Vec<u8> {
    let path = fixtures().join("vision").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub(crate) fn fixture_json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&fixture(name)).unwrap()
}

/// Every image of the decode fixtures: name and bytes.
pub(crate) fn image_files() -> Vec<(String, Vec<u8>)> {
    let list = fixture_json("decode.json");
    let names = list.as_array().unwrap().iter().map(|entry| entry["file"].as_str().unwrap().to_owned());
    names.map(|name| (name.clone(), fixture(&format!("decode/{name}")))).collect()
}

/// An image in a lossless format.
pub(crate) fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}
