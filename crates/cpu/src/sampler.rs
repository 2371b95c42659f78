//! From a row of logits to a token, and log-probabilities. One row at a time; the loop over rows is in `state.rs`.
//!
//! Order: logit bias, minimum length, penalties, grammar mask, temperature, min-p, top-k, top-p, draw. The draw is the
//! Gumbel-max trick with one Philox word per (seed, index of the output token, token id), so it needs no order of
//! candidates, and any device or rank that holds a part of the vocabulary can reproduce its part.

use crate::math::exp;
use crate::philox::{philox, unit};
use pulp::Arch;
use spark_backend::{SlotParams, TokenLogprob};
use std::cmp::Ordering;
use std::collections::HashMap;

/// Below this temperature sampling is greedy.
const GREEDY: f32 = 1e-5;

/// How often a token was seen.
#[derive(Default, Clone, Copy)]
struct Seen {
    in_prompt: bool,
    in_output: u32,
}

/// Sampling state of a sequence.
pub(crate) struct Slot {
    pub(crate) params: SlotParams,
    seen: HashMap<u32, Seen>,
    generated: usize,
    /// The last token of the output.
    pub(crate) last: Option<u32>,
}

impl Slot {
    /// The state after `params.output`, whether it was sampled here or before a preemption.
    pub(crate) fn new(mut params: SlotParams) -> Self {
        let mut seen: HashMap<u32, Seen> = HashMap::new();
        for token in std::mem::take(&mut params.prompt) {
            seen.entry(token).or_default().in_prompt = true;
        }
        let output = std::mem::take(&mut params.output);
        let mut slot = Self { params, seen, generated: 0, last: None };
        output.into_iter().for_each(|token| slot.push(token));
        slot
    }

    /// Appends a sampled token to the history.
    pub(crate) fn push(&mut self, token: u32) {
        self.seen.entry(token).or_default().in_output += 1;
        self.generated += 1;
        self.last = Some(token);
    }

    /// The next token for `raw` logits (only real tokens), with the words of a grammar mask.
    pub(crate) fn choose(&self, raw: &[f32], mask: Option<&[u32]>) -> u32 {
        let mut logits: Vec<f32> =
            raw.iter().map(|&logit| if logit.is_nan() { f32::NEG_INFINITY } else { logit }).collect();
        self.adjust(&mut logits);
        apply_mask(&mut logits, mask);
        let (mut token, mut highest) = argmax(&logits);
        if highest == f32::NEG_INFINITY {
            // Bias, minimum length and mask together leave nothing: the mask wins, or the model's own choice.
            logits.copy_from_slice(raw);
            apply_mask(&mut logits, mask);
            (token, highest) = argmax(&logits);
            return if highest == f32::NEG_INFINITY { argmax(raw).0 } else { token };
        }
        if self.params.temperature < GREEDY {
            return token;
        }
        let candidates = self.candidates(&logits, highest);
        self.draw(&candidates).unwrap_or(token)
    }

    /// Logit bias, minimum length, penalties.
    fn adjust(&self, logits: &mut [f32]) {
        let params = &self.params;
        for &(token, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if self.generated < params.min_tokens {
            for &token in &params.stop_token_ids {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let [repetition, presence, frequency] =
            [params.repetition_penalty, params.presence_penalty, params.frequency_penalty];
        if [repetition, presence, frequency] == [1.0, 0.0, 0.0] {
            return;
        }
        for (&token, seen) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            if seen.in_prompt || seen.in_output > 0 {
                *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            }
            if seen.in_output > 0 {
                *logit -= seen.in_output as f32 * frequency + presence;
            }
        }
    }

    /// What temperature, min-p, top-k and top-p leave: scaled logits and tokens, in no particular order.
    fn candidates(&self, logits: &[f32], highest: f32) -> Vec<(f32, u32)> {
        let params = &self.params;
        let highest = highest / params.temperature;
        let floor = if params.min_p > 0.0 { highest + params.min_p.min(1.0).ln() } else { f32::MIN };
        let scaled = logits.iter().map(|&logit| logit / params.temperature);
        let mut candidates: Vec<(f32, u32)> = scaled.zip(0..).filter(|&(logit, _)| logit >= floor).collect();
        let top_k = params.top_k as usize;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, falling);
            candidates.truncate(top_k);
        }
        if params.top_p < 1.0 {
            nucleus(&mut candidates, params.top_p, highest);
        }
        candidates
    }

    /// Gumbel-max: the candidate with the highest `logit - ln(e)`, `e` exponentially distributed. The counter is
    /// `[token / 4, output index (two words), 0]`, the word `token % 4`, the key the seed.
    fn draw(&self, candidates: &[(f32, u32)]) -> Option<u32> {
        let split = |x: u64| [x as u32, (x >> 32) as u32];
        let (key, [low, high]) = (split(self.params.seed), split(self.generated as u64));
        let (mut block, mut words) = (u32::MAX, [0; 4]);
        let mut best: Option<(f32, u32)> = None;
        for &(logit, token) in candidates {
            if token / 4 != block {
                block = token / 4;
                words = philox([block, low, high, 0], key);
            }
            let exponential = -(-unit(words[token as usize % 4])).ln_1p();
            let candidate = (logit - exponential.ln(), token);
            if best.is_none_or(|best| falling(&candidate, &best) == Ordering::Less) {
                best = Some(candidate);
            }
        }
        best.map(|(_, token)| token)
    }
}

/// By falling logit, ties by rising token.
fn falling(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The lowest token with the highest logit.
fn argmax(logits: &[f32]) -> (u32, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    for (&logit, token) in logits.iter().zip(0..) {
        if logit > best.1 {
            best = (token, logit);
        }
    }
    best
}

fn apply_mask(logits: &mut [f32], mask: Option<&[u32]>) {
    if let Some(mask) = mask {
        for (logits, &word) in logits.chunks_mut(32).zip(mask) {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Keeps the most likely candidates until their probability reaches `top_p`; at least one. Sorts only as many as it
/// needs.
fn nucleus(candidates: &mut Vec<(f32, u32)>, top_p: f32, highest: f32) {
    let probability = |logit: f32| f64::from(exp(logit - highest));
    let total: f64 = Arch::new().dispatch(
        #[inline(always)]
        || candidates.iter().map(|&(logit, _)| f64::from(exp(logit - highest))).sum(),
    );
    let target = f64::from(top_p) * total;
    let (mut mass, mut sorted, mut size) = (0.0, 0, 64);
    while sorted < candidates.len() {
        let end = candidates.len().min(size);
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted - 1, falling);
        }
        candidates[sorted..end].sort_unstable_by(falling);
        for i in sorted..end {
            mass += probability(candidates[i].0);
            if mass >= target {
                candidates.truncate(i + 1);
                return;
            }
        }
        (sorted, size) = (end, size * 8);
    }
}

/// Log-probabilities of a row of raw logits. Padding rows of the head count in the sum, as in transformers, though no
/// padding token is ever reported.
pub(crate) struct Logprobs<'a> {
    /// Of the real tokens.
    logits: &'a [f32],
    /// `ln sum exp`.
    normalizer: f32,
}

impl<'a> Logprobs<'a> {
    /// `row` is of the whole head, `[vocab + padding]`.
    pub(crate) fn new(row: &'a [f32], vocab: usize) -> Self {
        let (_, highest) = argmax(row);
        let total: f64 = Arch::new().dispatch(
            #[inline(always)]
            || row.iter().map(|&logit| f64::from(exp(logit - highest))).sum(),
        );
        Self { logits: &row[..vocab], normalizer: (f64::from(highest) + total.ln()) as f32 }
    }

    /// Of one token; `None` when it is not in the vocabulary.
    pub(crate) fn of(&self, token: u32) -> Option<TokenLogprob> {
        let &logit = self.logits.get(token as usize)?;
        let rank = 1 + self.logits.iter().filter(|&&other| other > logit).count();
        Some(TokenLogprob { token, logprob: logit - self.normalizer, rank })
    }

    /// Of one token, without its rank; `None` when it is not in the vocabulary.
    pub(crate) fn value(&self, token: u32) -> Option<f32> {
        self.logits.get(token as usize).map(|logit| logit - self.normalizer)
    }

    /// The `n` most likely tokens, by falling log-probability, then rising token.
    pub(crate) fn top(&self, n: usize) -> Vec<TokenLogprob> {
        let mut order: Vec<(f32, u32)> = self.logits.iter().copied().zip(0..).collect();
        if n == 0 || order.is_empty() {
            return Vec::new();
        }
        if n < order.len() {
            order.select_nth_unstable_by(n - 1, falling);
            order.truncate(n);
        }
        order.sort_unstable_by(falling);
        let mut rank = 1;
        let ranked = order.iter().enumerate().map(|(i, &(logit, token))| {
            if i > 0 && order[i - 1].0 > logit {
                rank = i + 1;
            }
            TokenLogprob { token, logprob: logit - self.normalizer, rank }
        });
        ranked.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close};

    fn params() -> SlotParams {
        SlotParams { seed: 7, ..SlotParams::greedy() }
    }

    fn kept(params: SlotParams, logits: &[f32]) -> Vec<u32> {
        let (_, highest) = argmax(logits);
        let mut tokens: Vec<u32> =
            Slot::new(params).candidates(logits, highest).into_iter().map(|c| c.1).collect();
        tokens.sort_unstable();
        tokens
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_ignores_nan() {
        let slot = Slot::new(params());
        assert_eq!(slot.choose(&[1.0, 3.0, 3.0, f32::NAN], None), 1);
        assert_eq!(slot.choose(&[f32::NAN; 3], None), 0);
        assert_eq!(slot.choose(&[f32::NEG_INFINITY, -5.0], None), 1);
    }

    #[test]
    fn bias_penalties_and_minimum_length_by_hand() {
        let logits = [4.0, 3.9, -1.0, 0.0];
        let biased = SlotParams { logit_bias: vec![(2, 6.0), (99, 1.0)], ..params() };
        assert_eq!(Slot::new(biased).choose(&logits, None), 2);
        let stopped = SlotParams { stop_token_ids: vec![0, 99], min_tokens: 2, ..params() };
        let mut slot = Slot::new(stopped);
        for want in [1, 1, 0] {
            assert_eq!(slot.choose(&logits, None), want);
            slot.push(3);
        }
        let repeated =
            SlotParams { repetition_penalty: 2.0, prompt: vec![0, 2, 99], output: vec![1], ..params() };
        let mut adjusted = logits;
        Slot::new(repeated).adjust(&mut adjusted);
        assert_eq!(adjusted, [2.0, 1.95, -2.0, 0.0]);
        // Presence and frequency count the output alone.
        let counted = SlotParams {
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            prompt: vec![0],
            output: vec![3, 3, 1],
            ..params()
        };
        let mut adjusted = [0.0; 4];
        Slot::new(counted).adjust(&mut adjusted);
        assert_eq!(adjusted, [0.0, -0.75, 0.0, -1.0]);
    }

    #[test]
    fn masks_forbid_and_win_over_the_minimum_length() {
        let slot = Slot::new(params());
        assert_eq!(slot.choose(&[5.0, 4.0, 3.0], Some(&[0b100])), 2);
        let mut logits = vec![0.0; 70];
        (logits[40], logits[69]) = (9.0, 1.0);
        assert_eq!(slot.choose(&logits, Some(&[0, 0, 1 << 5])), 69);
        let conflicting = SlotParams { stop_token_ids: vec![1], min_tokens: 9, ..params() };
        assert_eq!(Slot::new(conflicting).choose(&[5.0, 4.0], Some(&[0b10])), 1);
        assert_eq!(slot.choose(&[1.0, 4.0], Some(&[0])), 1);
        let warm = Slot::new(SlotParams { temperature: 1.0, ..params() });
        for _ in 0..20 {
            assert_eq!(warm.choose(&[5.0, 4.0, 3.0], Some(&[0b100])), 2);
        }
    }

    #[test]
    fn filters_by_hand() {
        // Probabilities 0.5, 0.25, 0.125, 0.125.
        let logits = [0.5f32, 0.25, 0.125, 0.125].map(f32::ln);
        let warm = || SlotParams { temperature: 1.0, ..params() };
        assert_eq!(kept(warm(), &logits), [0, 1, 2, 3]);
        assert_eq!(kept(SlotParams { top_k: 3, ..warm() }, &logits), [0, 1, 2]);
        assert_eq!(kept(SlotParams { top_p: 0.74, ..warm() }, &logits), [0, 1]);
        assert_eq!(kept(SlotParams { top_p: 0.76, ..warm() }, &logits), [0, 1, 2]);
        assert_eq!(kept(SlotParams { top_p: 0.0, ..warm() }, &logits), [0]);
        assert_eq!(kept(SlotParams { min_p: 0.3, ..warm() }, &logits), [0, 1]);
        // Two of top-k hold 2/3 and 1/3.
        assert_eq!(kept(SlotParams { top_k: 2, top_p: 0.6, ..warm() }, &logits), [0]);
        // Temperature comes first: at 2 the probabilities are nearer to each other.
        assert_eq!(kept(SlotParams { temperature: 2.0, min_p: 0.6, ..warm() }, &logits), [0, 1]);
    }

    #[test]
    fn nucleus_equals_a_full_sort_on_flat_distributions() {
        let mut random = Random::new(12);
        let logits: Vec<f32> = random.normal(5000).iter().map(|v| v * 0.3).collect();
        let highest = argmax(&logits).1;
        for top_p in [0.01, 0.3, 0.9, 0.999_9] {
            let mut got: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
            nucleus(&mut got, top_p, highest);
            let mut all: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
            all.sort_by(falling);
            let p: Vec<f64> = all.iter().map(|c| f64::from(c.0 - highest).exp()).collect();
            let target = p.iter().sum::<f64>() * f64::from(top_p);
            let mut mass = 0.0;
            let count = 1 + p
                .iter()
                .take_while(|&p| {
                    mass += p;
                    mass < target
                })
                .count();
            assert_eq!(got, all[..count], "top_p {top_p}");
        }
    }

    #[test]
    fn draws_follow_the_distribution_and_only_seed_and_index_matter() {
        let want = [0.5f64, 0.3, 0.15, 0.05];
        let logits = want.map(|p| p.ln() as f32);
        let warm = SlotParams { temperature: 1.0, ..params() };
        let mut slot = Slot::new(warm.clone());
        let n = 20_000;
        let (mut counts, mut tokens) = ([0usize; 4], Vec::new());
        for _ in 0..n {
            let token = slot.choose(&logits, None);
            counts[token as usize] += 1;
            tokens.push(token);
            slot.push(token);
        }
        // Five standard deviations of a binomial.
        for (count, p) in counts.into_iter().zip(want) {
            let sigma = (f64::from(n) * p * (1.0 - p)).sqrt();
            assert!((count as f64 - f64::from(n) * p).abs() < 5.0 * sigma, "{counts:?}");
        }
        // Resuming after a preemption continues the same sequence.
        let mut resumed = Slot::new(SlotParams { output: tokens[..100].to_vec(), ..warm.clone() });
        for &want in &tokens[100..150] {
            assert_eq!(resumed.choose(&logits, None), want);
            resumed.push(want);
        }
        let mut other = Slot::new(SlotParams { seed: 8, ..warm });
        let different = tokens[..50].iter().filter(|&&token| {
            let drawn = other.choose(&logits, None);
            other.push(drawn);
            drawn != token
        });
        assert!(different.count() > 10);
    }

    #[test]
    fn logprobs_by_hand() {
        let logits = [1.0, 3.0, 2.0, 3.0];
        let logprobs = Logprobs::new(&logits, 4);
        let total = (1f64.exp() + 2f64.exp() + 2.0 * 3f64.exp()).ln();
        let two = logprobs.of(2).unwrap();
        assert_eq!((two.token, two.rank), (2, 3));
        assert_close(&[two.logprob], &[2.0 - total], 1e-6);
        let top = logprobs.top(3);
        assert_eq!(top.iter().map(|t| (t.token, t.rank)).collect::<Vec<_>>(), [(1, 1), (3, 1), (2, 3)]);
        assert!(top.iter().all(|t| Some(*t) == logprobs.of(t.token)));
        assert_eq!(logprobs.top(9).len(), 4);
        assert!(logprobs.top(0).is_empty());
        assert!(logprobs.of(4).is_none());
        assert!((0..4).all(|token| logprobs.value(token) == logprobs.of(token).map(|token| token.logprob)));
        assert!(logprobs.value(4).is_none());
        let padded = [1.0, 3.0, 2.0, 3.0, 3.0];
        let with_padding = Logprobs::new(&padded, 4);
        let total = (1f64.exp() + 2f64.exp() + 3.0 * 3f64.exp()).ln();
        assert_close(&[with_padding.of(2).unwrap().logprob], &[2.0 - total], 1e-6);
        assert!(with_padding.of(4).is_none());
        assert_eq!(with_padding.top(9).len(), 4);
    }
}
