//! Rotary positions: inverse frequencies (plain and YaRN) and the interleaved M-RoPE position of every token.
//!
//! Sources: transformers `modeling_rope_utils.py` (YaRN, arXiv 2309.00071) and `get_rope_index` of Qwen3-VL.

use std::f64::consts::PI;

use crate::{Error, Result, fields::Fields};

/// Parameters of the rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// `[head_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin: 1, or YaRN's.
    pub factor: f32,
    /// Frequencies that turn with time, height and width.
    pub mrope_section: [usize; 3],
}

/// Reads `rope_scaling` + `rope_theta` (release form) or `rope_parameters` (re-saved form).
pub(crate) fn parse_rope(f: &Fields<'_>, head_dim: usize) -> Result<RopeConfig> {
    let (rope, theta) = match (f.get("rope_parameters"), f.get("rope_scaling")) {
        (Some(_), _) => {
            let rope = f.child("rope_parameters", "rope_parameters.")?;
            (Some(rope), rope)
        }
        (None, Some(_)) => (Some(f.child("rope_scaling", "rope_scaling.")?), *f),
        (None, None) => (None, *f),
    };
    let theta = match theta.get("rope_theta") {
        Some(_) => f64::from(theta.float("rope_theta")?),
        None => return Err(theta.error("rope_theta", "missing; there is no safe default")),
    };
    if theta <= 0.0 {
        return Err(f.error("rope_theta", "must be above 0"));
    }
    for fields in rope.iter().chain([f]) {
        if fields.float_or("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(fields.error("partial_rotary_factor", "only whole heads can be rotated (1.0)"));
        }
    }
    let half = head_dim / 2;
    let kind = match rope {
        Some(rope) => {
            rope.get("rope_type").or(rope.get("type")).and_then(|v| v.as_str()).unwrap_or("default")
        }
        None => "default",
    };
    let (inv_freq, factor) = match (kind, &rope) {
        ("default" | "mrope", _) => (plain_inv_freq(theta, half), 1.0),
        ("yarn", Some(rope)) => yarn(rope, theta, half, f.size("max_position_embeddings")?)?,
        _ => {
            return Err(f.error(
                "rope_scaling.rope_type",
                format!("{kind:?} is not supported; default and yarn are"),
            ));
        }
    };
    let section = rope.map(|rope| rope.sizes("mrope_section")).transpose()?.unwrap_or_default();
    let mrope_section = match section[..] {
        [] => [half, 0, 0],
        [t, h, w] if t + h + w == half => [t, h, w],
        _ => {
            let problem = format!("{section:?} must be three numbers that add up to head_dim / 2 ({half})");
            return Err(f.error("rope_scaling.mrope_section", problem));
        }
    };
    let interleaved = rope.map_or(Ok(true), |rope| rope.flag("mrope_interleaved", section.is_empty()))?;
    if !interleaved {
        return Err(
            f.error("rope_scaling.mrope_interleaved", "only the interleaved form (true) is supported")
        );
    }
    Ok(RopeConfig { inv_freq, factor, mrope_section })
}

fn plain_inv_freq(theta: f64, half: usize) -> Vec<f32> {
    (0..half).map(|j| theta.powf(-(j as f64) / half as f64) as f32).collect()
}

/// YaRN: high frequencies stay, low ones are divided by `factor`, with a linear ramp between.
fn yarn(rope: &Fields<'_>, theta: f64, half: usize, max_positions: usize) -> Result<(Vec<f32>, f32)> {
    let factor = f64::from(rope.float("factor")?);
    if factor < 1.0 {
        return Err(Error::config("rope_scaling.factor", format!("{factor} is below 1")));
    }
    let original = rope.size_or("original_max_position_embeddings", max_positions)? as f64;
    let dim = 2.0 * half as f64;
    // The dimension whose wave turns `rotations` times over the original context.
    let dim_of =
        |rotations: f32| dim * (original / (f64::from(rotations) * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let low = dim_of(rope.float_or("beta_fast", 32.0)?).floor().max(0.0);
    let high = dim_of(rope.float_or("beta_slow", 1.0)?).ceil().min(dim - 1.0);
    let width = if high > low { high - low } else { 0.001 };
    let inv_freq = (0..half).map(|j| {
        let plain = theta.powf(-(j as f64) / half as f64);
        let interpolated_share = ((j as f64 - low) / width).clamp(0.0, 1.0);
        (plain / factor * interpolated_share + plain * (1.0 - interpolated_share)) as f32
    });
    let default_scale = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
    let scale = rope.float_or("attention_factor", default_scale as f32)?;
    Ok((inv_freq.collect(), scale))
}

/// M-RoPE positions of one sequence.
///
/// Text advances all axes together. A medium keeps time at its start (plus the frame), spreads height and width over
/// its merged grid, and moves the next token past the larger of the two.
#[derive(Debug, Clone, Default)]
pub struct RopeIndex {
    /// Per prompt token; empty if the prompt has no media (then all axes are the token's index).
    prompt: Vec<[u32; 3]>,
    /// What to add to the index of a token after the prompt; at most 0.
    delta: i64,
}

impl RopeIndex {
    /// Positions of a prompt of `prompt_len` tokens with media at `(offset, [t, h, w] in patches)`, in order.
    pub fn new(prompt_len: usize, media: &[(usize, [usize; 3])], merge_size: usize) -> Self {
        if media.is_empty() {
            return Self::default();
        }
        let mut prompt: Vec<[u32; 3]> = Vec::with_capacity(prompt_len);
        let mut next = 0u32;
        let text_until = |prompt: &mut Vec<[u32; 3]>, next: &mut u32, end: usize| {
            while prompt.len() < end {
                prompt.push([*next; 3]);
                *next += 1;
            }
        };
        for &(offset, [t, h, w]) in media {
            text_until(&mut prompt, &mut next, offset);
            let (rows, columns) = (h / merge_size, w / merge_size);
            for frame in 0..t {
                for row in 0..rows {
                    prompt.extend(
                        (0..columns).map(|c| [next + frame as u32, next + row as u32, next + c as u32]),
                    );
                }
            }
            next += t.max(rows).max(columns) as u32;
        }
        text_until(&mut prompt, &mut next, prompt_len);
        let delta = i64::from(next) - prompt_len as i64;
        Self { prompt, delta }
    }

    /// Position of the token at `index` of prompt and output together.
    pub fn position(&self, index: usize) -> [u32; 3] {
        match self.prompt.get(index) {
            Some(position) => *position,
            // A prompt token's index is never below -delta: delta counts what media skipped inside the prompt.
            None => [(index as i64 + self.delta) as u32; 3],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_positions_are_indices() {
        let index = RopeIndex::new(3, &[], 2);
        assert_eq!(index.position(0), [0; 3]);
        assert_eq!(index.position(7), [7; 3]);
    }

    #[test]
    fn an_image_spreads_over_its_grid() {
        // Two text tokens, a 4 x 6 image (2 x 3 merged), one text token.
        let index = RopeIndex::new(9, &[(2, [1, 4, 6])], 2);
        assert_eq!(index.position(1), [1; 3]);
        assert_eq!(index.position(2), [2, 2, 2]);
        assert_eq!(index.position(4), [2, 2, 4]);
        assert_eq!(index.position(7), [2, 3, 4]);
        assert_eq!(index.position(8), [5; 3]);
        assert_eq!(index.position(9), [6; 3], "decode goes on from the last position");
    }

    #[test]
    fn yarn_keeps_high_frequencies_and_divides_low_ones() {
        let rope = serde_json::json!({"factor": 4.0, "original_max_position_embeddings": 32768});
        let (inv_freq, scale) = yarn(&Fields { value: &rope, path: "" }, 1e6, 64, 131_072).unwrap();
        let plain = plain_inv_freq(1e6, 64);
        assert_eq!(inv_freq[0], plain[0]);
        assert!((inv_freq[63] / plain[63] - 0.25).abs() < 1e-6);
        assert!((scale - 1.138_629_4).abs() < 1e-6);
    }
}
