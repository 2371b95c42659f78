//! `config.json` and `preprocessor_config.json` of strangers. What is accepted has parameters that can be listed.

use std::sync::LazyLock;

use serde_json::Value;
use spark_models::ModelConfig;
use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ImageProcessorConfig, ImageProcessorOverrides};
use tempfile::TempDir;

use crate::folder::{scratch, write};

static FOLDER: LazyLock<TempDir> = LazyLock::new(scratch);

/// Byte 0: which file. The rest is the file.
pub fn run(data: &[u8]) {
    let [kind, file @ ..] = data else { return };
    if kind & 1 == 1 {
        return preprocessor(file);
    }
    let Ok(config) = serde_json::from_slice::<Value>(file) else { return };
    let Ok(config) = ModelConfig::parse(&config, Some(&config)) else { return };
    for has_lm_head in [false, true] {
        let specs = config.specs(has_lm_head);
        assert!(!specs.is_empty(), "{config:?}");
    }
}

fn preprocessor(file: &[u8]) {
    write(&FOLDER.path().join("preprocessor_config.json"), file);
    let overrides = ImageProcessorOverrides::default();
    let Ok(config) = ImageProcessorConfig::from_folder(FOLDER.path(), &overrides) else { return };
    let processor = ImageProcessor::new(config, DecodeOptions::new(Alpha::OverWhite), [7; 32]);
    for (width, height) in [(1, 1), (640, 480), (1, 199), (10_000, 10_000)] {
        let _ = processor.num_tokens_for(width, height);
    }
}
