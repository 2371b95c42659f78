//! Configurations of the published models: real shapes without weights, for `--load-format dummy`.

/// Name and `config.json` of each published shape.
pub const PUBLISHED: &[(&str, &str)] = &[
    ("qwen3-vl-235b-a22b", include_str!("../configs/qwen3-vl-235b-a22b.json")),
    ("qwen3-vl-30b-a3b", include_str!("../configs/qwen3-vl-30b-a3b.json")),
    ("qwen3-vl-8b", include_str!("../configs/qwen3-vl-8b.json")),
    ("qwen3-30b-a3b", include_str!("../configs/qwen3-30b-a3b.json")),
];

/// The `config.json` of the published model `name`, for example `qwen3-vl-30b-a3b`.
pub fn published(name: &str) -> Option<&'static str> {
    PUBLISHED.iter().find(|(published, _)| *published == name).map(|(_, config)| *config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;

    #[test]
    fn every_published_config_parses() {
        for (name, text) in PUBLISHED {
            let config = ModelConfig::parse(&serde_json::from_str(text).unwrap(), None).unwrap();
            assert!(!config.specs(true).is_empty(), "{name}");
        }
        assert!(published("qwen3-vl-30b-a3b").is_some());
        assert!(published("no-such-model").is_none());
    }
}
