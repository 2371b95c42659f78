//! Images of strangers. What a header promises is what decoding gives, and nothing is allocated before it is checked.

use std::sync::LazyLock;

use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ImageProcessorOverrides};

use crate::folder::model;

/// Small limits, so that an input takes milliseconds.
static PROCESSOR: LazyLock<ImageProcessor> = LazyLock::new(|| {
    let options = DecodeOptions { max_pixels: 1 << 16, ..DecodeOptions::new(Alpha::OverWhite) };
    let overrides =
        ImageProcessorOverrides { max_pixels: Some(1 << 14), ..ImageProcessorOverrides::default() };
    ImageProcessor::from_folder(&model(), &overrides, options, [7; 32]).expect("the fixture is committed")
});

/// The input is the file.
pub fn run(data: &[u8]) {
    let promised = PROCESSOR.num_tokens_of(data);
    match PROCESSOR.process(data) {
        Ok(image) => {
            assert_eq!(Some(image.num_tokens), promised.ok(), "{}x{}", image.width, image.height);
            let [t, h, w] = image.grid_thw;
            let merge = PROCESSOR.config().merge_size;
            assert_eq!(t * h * w, image.num_tokens * merge * merge);
        }
        Err(error) => assert!(error.to_string().len() < 1000, "{error}"),
    }
}
