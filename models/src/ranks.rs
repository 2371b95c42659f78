//! Over how many ranks a model can be split, and how they share its experts. Which part a rank holds is said by the shard rules
//! of its parameters.

use std::ops::Range;

use spark_backend::Rank;
use spark_weights::Shard;

use crate::config::{EncoderSplit, ModelConfig, MoeConfig, TextConfig, VisionConfig};
use crate::{Error, Result};

/// How ranks share the experts of a layer; everything else they share alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MoeParallel {
    /// Every rank holds a slice of the intermediate features of every expert: all ranks read the same number of bytes in every
    /// step.
    #[default]
    Tp,
    /// Every rank holds some experts whole: those that a step has chosen may be more on one rank than on another.
    Ep,
}

impl MoeConfig {
    /// The rule by which the parameters of the experts are shared.
    pub(crate) fn shard(&self) -> Shard {
        match self.parallel {
            MoeParallel::Tp => Shard::Experts,
            MoeParallel::Ep => Shard::WholeExperts,
        }
    }

    /// The experts of which `rank` holds anything.
    pub fn experts_of(&self, rank: Rank) -> Range<usize> {
        match self.parallel {
            MoeParallel::Tp => 0..self.num_experts,
            MoeParallel::Ep => rank.range(self.num_experts),
        }
    }

    /// Intermediate features of each of these on one of `world` ranks.
    pub fn features_of(&self, world: usize) -> usize {
        match self.parallel {
            MoeParallel::Tp => self.moe_intermediate_size / world.max(1),
            MoeParallel::Ep => self.moe_intermediate_size,
        }
    }
}

/// A field of the configuration that ranks share, its value, and what its rule asks for.
struct Shared {
    /// What the field is in, in a configuration of both.
    part: &'static str,
    field: &'static str,
    value: usize,
    rule: &'static str,
    fits: fn(usize, usize) -> bool,
}

impl ModelConfig {
    /// Says how ranks share the experts.
    ///
    /// # Errors
    /// Whole experts of a model that has none.
    pub fn share_experts(&mut self, parallel: MoeParallel) -> Result<()> {
        match &mut self.text.moe {
            Some(moe) => moe.parallel = parallel,
            None if parallel == MoeParallel::Tp => {}
            None => {
                let problem = format!("{} has no experts that ranks could share", self.model_type);
                return Err(Error::config("num_experts", problem));
            }
        }
        Ok(())
    }

    /// Whether the model can be split over `world` ranks: query heads and intermediate features evenly, KV heads evenly or
    /// each held by several ranks, at least one row of the vocabulary each; where ranks hold whole experts, these evenly instead
    /// of their features; where the encoder's weights are split, its heads and features evenly.
    ///
    /// # Errors
    /// Names the field that cannot be split, its value, and the numbers of ranks that work.
    pub fn check_ranks(&self, world: usize) -> Result<()> {
        let mut fields = of_decoder(&self.text);
        let num_of_decoder = fields.len();
        fields.extend(self.vision.iter().flat_map(of_encoder));
        let Some(field) = fields.iter().find(|field| !(field.fits)(field.value, world)) else {
            return Ok(());
        };
        let works = |fields: &[Shared]| {
            let works = |world: &usize| fields.iter().all(|field| (field.fits)(field.value, *world));
            let works = (1..=self.text.num_attention_heads).filter(works);
            works.map(|world| world.to_string()).collect::<Vec<_>>().join(", ")
        };
        let mut problem = format!(
            "{} cannot be shared by {world} ranks: {}; this model can be split over {} ranks",
            field.value,
            field.rule,
            works(&fields),
        );
        if fields.len() > num_of_decoder {
            let others = works(&fields[..num_of_decoder]);
            problem += &format!(", and with --mm-encoder-tp-mode data over {others}");
        }
        let part = if self.vision.is_some() { field.part } else { "" };
        Err(Error::config(format!("{part}{}", field.field), problem))
    }
}

fn evenly(value: usize, world: usize) -> bool {
    world > 0 && value.is_multiple_of(world)
}

fn of_decoder(text: &TextConfig) -> Vec<Shared> {
    let shared = |field, value, rule, fits| Shared { part: "text_config.", field, value, rule, fits };
    let mut fields = vec![
        shared(
            "num_attention_heads",
            text.num_attention_heads,
            "every rank takes as many query heads",
            evenly as fn(usize, usize) -> bool,
        ),
        shared(
            "num_key_value_heads",
            text.num_key_value_heads,
            "every rank takes as many KV heads, or one that it shares with as many others",
            |value, world| world > 0 && (value.is_multiple_of(world) || world.is_multiple_of(value)),
        ),
        shared("vocab_size", text.vocab_size, "every rank takes at least one row", |value, world| {
            world > 0 && value >= world
        }),
    ];
    if let Some(moe) = &text.moe {
        fields.push(match moe.parallel {
            MoeParallel::Tp => {
                let rule = "every rank takes as many features of each expert";
                shared("moe_intermediate_size", moe.moe_intermediate_size, rule, evenly)
            }
            MoeParallel::Ep => {
                shared("num_experts", moe.num_experts, "every rank takes as many whole experts", evenly)
            }
        });
    }
    if (0..text.num_hidden_layers).any(|layer| text.moe_at(layer).is_none()) {
        let rule = "every rank takes as many features";
        fields.push(shared("intermediate_size", text.intermediate_size, rule, evenly));
    }
    fields
}

/// What a merger splits is a multiple of what its heads are.
fn of_encoder(vision: &VisionConfig) -> Vec<Shared> {
    let shared = |field, value, rule| Shared { part: "vision_config.", field, value, rule, fits: evenly };
    match vision.split {
        EncoderSplit::Data => Vec::new(),
        EncoderSplit::Weights => vec![
            shared("num_heads", vision.num_heads, "every rank takes as many heads of the encoder"),
            shared(
                "intermediate_size",
                vision.intermediate_size,
                "every rank takes as many features of the encoder",
            ),
        ],
    }
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
        // Whole experts need not be split, but there must be as many for every rank.
        model.share_experts(MoeParallel::Ep).unwrap();
        for world in [1, 2, 4, 8, 16, 32] {
            model.check_ranks(world).unwrap();
        }
        model.text.moe.as_mut().unwrap().num_experts = 12;
        let message = error(&model, 8);
        assert!(message.contains("num_experts: 12") && message.contains("over 1, 2, 4 ranks"), "{message}");
        model.text.num_key_value_heads = 32;
        model.text.vocab_size = 1;
        let message = error(&model, 2);
        assert!(message.contains("vocab_size: 1") && message.contains("over 1 ranks"), "{message}");
        model.text.num_attention_heads = 12;
        model.text.num_key_value_heads = 3;
        assert!(error(&model, 2).contains("num_key_value_heads: 3"));
    }

    #[test]
    fn whole_experts_are_those_of_a_model_that_has_some() {
        let mut model = model("qwen3-vl-235b-a22b");
        let held = |model: &ModelConfig, index| {
            let moe = model.text.moe.as_ref().unwrap();
            (moe.experts_of(Rank::new(index, 2).unwrap()), moe.features_of(2))
        };
        assert_eq!([held(&model, 0), held(&model, 1)], [(0..128, 768), (0..128, 768)]);
        model.share_experts(MoeParallel::Ep).unwrap();
        assert_eq!([held(&model, 0), held(&model, 1)], [(0..64, 1536), (64..128, 1536)]);
        let mut dense = self::model("qwen3-vl-8b");
        dense.share_experts(MoeParallel::Tp).unwrap();
        let message = dense.share_experts(MoeParallel::Ep).unwrap_err().to_string();
        assert!(message.contains("num_experts") && message.contains("qwen3_vl has no experts"), "{message}");
    }

    #[test]
    fn encoders_split_by_heads_and_features_where_that_is_asked_for() {
        let mut model = model("qwen3-vl-30b-a3b");
        model.vision.as_mut().unwrap().num_heads = 6;
        model.check_ranks(4).unwrap();
        model.vision.as_mut().unwrap().split = EncoderSplit::Weights;
        model.check_ranks(2).unwrap();
        let message = model.check_ranks(4).unwrap_err().to_string();
        for part in [
            "vision_config.num_heads: 6 cannot be shared by 4 ranks",
            "over 1, 2 ranks",
            "--mm-encoder-tp-mode data over 1, 2, 4, 8, 16, 32",
        ] {
            assert!(message.contains(part), "{message}");
        }
        let vision = model.vision.as_mut().unwrap();
        (vision.num_heads, vision.intermediate_size) = (16, 4306);
        let message = model.check_ranks(4).unwrap_err().to_string();
        assert!(message.contains("vision_config.intermediate_size: 4306"), "{message}");
        for (name, _) in crate::PUBLISHED {
            let mut model = super::tests::model(name);
            model.vision.iter_mut().for_each(|vision| vision.split = EncoderSplit::Weights);
            for world in [1, 2, 4, 8] {
                model.check_ranks(world).unwrap();
            }
        }
    }
}
