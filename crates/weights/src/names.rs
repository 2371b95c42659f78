//! One naming for the dialects in which checkpoints call the same tensor, and the tensors that may stay unused. Not
//! the naming of experts and scales, which `scheme` and `plan` know.

/// Prefixes of the dialects and what they become; the first that fits wins (release, transformers 4 and 5, exporters).
const PREFIXES: &[(&str, &str)] = &[
    ("model.language_model.lm_head.", "lm_head."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model.language_model."),
    ("language_model.model.", "model.language_model."),
    ("model.visual.", "model.visual."),
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
];

/// The internal name of a tensor or module: `model.language_model.X` for the decoder (whichever of
/// `language_model.model.X` and, in text-only files, `model.X` the checkpoint says), `model.visual.X` for the vision
/// tower, `lm_head.X`. Anything else is returned as it is.
pub fn normalise(name: &str) -> String {
    for (from, to) in PREFIXES {
        if let Some(rest) = name.strip_prefix(from) {
            return format!("{to}{rest}");
        }
    }
    match name {
        "language_model.lm_head" => "lm_head".to_owned(),
        _ => name.to_owned(),
    }
}

/// Whether a tensor is of a kind that the mathematics here does not need: activation scales (weights are used weight
/// only), calibrated scales of a quantised KV cache (ours are computed per token), saved rope frequencies. A smoothing
/// factor like `pre_quant_scale` is not among them: leaving it out would change the result.
pub(crate) fn may_be_unused(name: &str) -> bool {
    const LAST: &[&str] = &[
        "input_scale",
        "input_global_scale",
        "k_scale",
        "v_scale",
        "q_scale",
        "prob_scale",
        "output_scale",
        "inv_freq",
    ];
    const FUSED: &[&str] = &["_input_scale", "_input_global_scale"];
    let last = name.rsplit('.').next().unwrap_or(name);
    LAST.contains(&last) || FUSED.iter().any(|suffix| last.ends_with(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_dialects_meet() {
        for name in ["model.language_model.layers.0.x", "language_model.model.layers.0.x", "model.layers.0.x"]
        {
            assert_eq!(normalise(name), "model.language_model.layers.0.x");
        }
        for name in ["model.visual.blocks.1.y", "visual.blocks.1.y"] {
            assert_eq!(normalise(name), "model.visual.blocks.1.y");
        }
        for name in ["lm_head.weight", "language_model.lm_head.weight", "model.language_model.lm_head.weight"]
        {
            assert_eq!(normalise(name), "lm_head.weight");
        }
        assert_eq!(normalise("mtp.fc.weight"), "mtp.fc.weight");
    }

    #[test]
    fn normalising_twice_changes_nothing() {
        for name in ["model.norm.weight", "visual.pos_embed.weight", "language_model.lm_head", "odd"] {
            assert_eq!(normalise(&normalise(name)), normalise(name));
        }
    }

    #[test]
    fn only_scales_of_activations_and_cache_may_be_left() {
        assert!(may_be_unused("model.language_model.layers.0.self_attn.k_proj.k_scale"));
        assert!(may_be_unused("a.experts.gate_up_proj_input_scale"));
        assert!(!may_be_unused("a.weight_scale"));
        assert!(!may_be_unused("a.pre_quant_scale"));
        assert!(!may_be_unused("a.weight_scale_2"));
    }
}
