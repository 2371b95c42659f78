//! Over how many ranks a model can be split. Which part a rank holds is said by the shard rules of its parameters.

use crate::config::{ModelConfig, TextConfig};
use crate::{Error, Result};

/// A field of the configuration that ranks share, its value, and what its rule asks for.
struct Shared {
    field: &'static str,
    value: usize,
    rule: &'static str,
    fits: fn(usize, usize) -> bool,
}

impl ModelConfig {
    /// Whether the model can be split over `world` ranks: query heads and intermediate features evenly, KV heads evenly or
    /// each held by several ranks, at least one row of the vocabulary each.
    ///
    /// # Errors
    /// Names the field that cannot be split, its value, and the numbers of ranks that work.
    pub fn check_ranks(&self, world: usize) -> Result<()> {
        let fields = shared(&self.text);
        let Some(field) = fields.iter().find(|field| !(field.fits)(field.value, world)) else {
            return Ok(());
        };
        let works = |world: &usize| fields.iter().all(|field| (field.fits)(field.value, *world));
        let works: Vec<String> =
            (1..=self.text.num_attention_heads).filter(works).map(|world| world.to_string()).collect();
        let prefix = if self.vision.is_some() { "text_config." } else { "" };
        let problem = format!(
            "{} cannot be shared by {world} ranks: {}; this model can be split over {} ranks",
            field.value,
            field.rule,
            works.join(", ")
        );
        Err(Error::config(format!("{prefix}{}", field.field), problem))
    }
}

fn shared(text: &TextConfig) -> Vec<Shared> {
    let evenly: fn(usize, usize) -> bool = |value, world| world > 0 && value.is_multiple_of(world);
    let mut fields = vec![
        Shared {
            field: "num_attention_heads",
            value: text.num_attention_heads,
            rule: "every rank takes as many query heads",
            fits: evenly,
        },
        Shared {
            field: "num_key_value_heads",
            value: text.num_key_value_heads,
            rule: "every rank takes as many KV heads, or one that it shares with as many others",
            fits: |value, world| world > 0 && (value.is_multiple_of(world) || world.is_multiple_of(value)),
        },
        Shared {
            field: "vocab_size",
            value: text.vocab_size,
            rule: "every rank takes at least one row",
            fits: |value, world| world > 0 && value >= world,
        },
    ];
    if let Some(moe) = &text.moe {
        fields.push(Shared {
            field: "moe_intermediate_size",
            value: moe.moe_intermediate_size,
            rule: "every rank takes as many features of each expert",
            fits: evenly,
        });
    }
    if (0..text.num_hidden_layers).any(|layer| text.moe_at(layer).is_none()) {
        fields.push(Shared {
            field: "intermediate_size",
            value: text.intermediate_size,
            rule: "every rank takes as many features",
            fits: evenly,
        });
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str) -> ModelConfig {
        ModelConfig::published(crate::published(name).unwrap()).unwrap()
    }

    #[test]
    fn published_models_split_over_powers_of_two() {
        for (name, _) in crate::PUBLISHED {
            let model = model(name);
            for world in [1, 2, 4, 8] {
                model.check_ranks(world).unwrap();
            }
            assert!(model.check_ranks(0).is_err() && model.check_ranks(7).is_err(), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_split_is_named_with_what_works() {
        let mut model = model("qwen3-vl-30b-a3b");
        let error = |model: &ModelConfig, world| model.check_ranks(world).unwrap_err().to_string();
        let message = error(&model, 3);
        assert!(
            message.contains("text_config.num_attention_heads: 32") && message.contains("3 ranks"),
            "{message}"
        );
        assert!(message.contains("over 1, 2, 4, 8, 16, 32 ranks"), "{message}");
        model.text.moe.as_mut().unwrap().moe_intermediate_size = 12;
        let message = error(&model, 8);
        assert!(
            message.contains("moe_intermediate_size: 12") && message.contains("over 1, 2, 4 ranks"),
            "{message}"
        );
        model.text.num_key_value_heads = 32;
        model.text.vocab_size = 1;
        let message = error(&model, 2);
        assert!(message.contains("vocab_size: 1") && message.contains("over 1 ranks"), "{message}");
        model.text.num_attention_heads = 12;
        model.text.num_key_value_heads = 3;
        assert!(error(&model, 2).contains("num_key_value_heads: 3"));
    }
}
