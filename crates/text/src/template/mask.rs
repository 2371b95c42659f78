//! Keeps a user's text from becoming special tokens on its way through a template.
//!
//! Before rendering, characters of the input without which no special token can be spelled are replaced one by one by
//! private-use characters; afterwards every special token in the rendering is the template's own, and the characters
//! are put back. Lengths, slices and comparisons inside the template are as with the original text. Two pieces of
//! input that only together spell a special token do not become one either.

use std::ops::RangeInclusive;

use serde_json::Value;

use crate::{Result, Segment, TextError};

/// The end of the last private-use plane: sentinels are taken from here, skipping what a request itself contains.
const SENTINELS: RangeInclusive<char> = '\u{10ff00}'..='\u{10fffd}';

/// Characters that special tokens are built with and that templates never look for in a text. Every one in the input
/// is masked. Tokens without such a character (`<s>`) are masked only where they or their beginnings occur.
const BARS: [char; 2] = ['|', '｜'];

pub(super) fn is_sentinel(character: char) -> bool {
    SENTINELS.contains(&character)
}

/// The special tokens of a vocabulary, and how they are kept out of input text.
pub(super) struct SpecialGuard {
    tokens: Vec<String>,
    bars: Vec<char>,
    barless: Vec<String>,
    /// Sentinel characters that the template itself contains.
    taken: Vec<char>,
}

impl SpecialGuard {
    pub(super) fn new<'a>(tokens: &[String], sources: impl Iterator<Item = &'a str>) -> Self {
        let tokens: Vec<String> = tokens.iter().filter(|token| !token.is_empty()).cloned().collect();
        Self {
            bars: BARS.into_iter().filter(|&bar| tokens.iter().any(|token| token.contains(bar))).collect(),
            barless: tokens.iter().filter(|token| !token.contains(BARS)).cloned().collect(),
            taken: sources.flat_map(str::chars).filter(|&character| is_sentinel(character)).collect(),
            tokens,
        }
    }

    /// The mask that `inputs` need, if they need one.
    pub(super) fn mask(&self, inputs: &[&Value]) -> Result<Option<Mask<'_>>> {
        let mut originals = Vec::new();
        let mut taken = self.taken.clone();
        for input in inputs {
            visit_strings(input, &mut |text| {
                self.suspects(text, |at| originals.extend(text[at..].chars().next()));
                taken.extend(text.chars().filter(|&character| is_sentinel(character)));
            });
        }
        originals.sort_unstable();
        originals.dedup();
        if originals.is_empty() {
            return Ok(None);
        }
        let mut free = SENTINELS.filter(|character| !taken.contains(character));
        let pairs: Option<Vec<_>> =
            originals.into_iter().map(|original| Some((original, free.next()?))).collect();
        match pairs {
            Some(pairs) => Ok(Some(Mask { guard: self, pairs })),
            None => Err(TextError::Template { reason: "the text uses up the private-use characters".into() }),
        }
    }

    /// Calls `found` with the position of every character of `text` that must be masked (not in order).
    fn suspects(&self, text: &str, mut found: impl FnMut(usize)) {
        if !self.bars.is_empty() {
            text.match_indices(self.bars.as_slice()).for_each(|(at, _)| found(at));
        }
        for token in &self.barless {
            for (at, _) in text.char_indices() {
                let rest = &text.as_bytes()[at..];
                if rest.starts_with(token.as_bytes()) || token.as_bytes().starts_with(rest) {
                    found(at);
                }
            }
        }
    }
}

/// A replacement of characters for one rendering.
pub(super) struct Mask<'a> {
    guard: &'a SpecialGuard,
    /// Original and sentinel.
    pairs: Vec<(char, char)>,
}

impl Mask<'_> {
    /// A copy of `value` with all its strings and keys masked.
    pub(super) fn apply(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.apply_text(text)),
            Value::Array(items) => items.iter().map(|item| self.apply(item)).collect(),
            Value::Object(entries) => {
                entries.iter().map(|(key, value)| (self.apply_text(key), self.apply(value))).collect()
            }
            _ => value.clone(),
        }
    }

    fn apply_text(&self, text: &str) -> String {
        let mut places = Vec::new();
        self.guard.suspects(text, |at| places.push(at));
        places.sort_unstable();
        places.dedup();
        let mut out = String::with_capacity(text.len() + 3 * places.len());
        let mut done = 0;
        for at in places {
            let sentinel = text[at..].chars().next().and_then(|original| {
                self.pairs.iter().find(|pair| pair.0 == original).map(|pair| (original.len_utf8(), pair.1))
            });
            if let Some((len, sentinel)) = sentinel {
                out.push_str(&text[done..at]);
                out.push(sentinel);
                done = at + len;
            }
        }
        out.push_str(&text[done..]);
        out
    }

    /// `text` with the original characters put back.
    pub(super) fn remove(&self, text: &str) -> String {
        text.chars()
            .map(|character| {
                self.pairs.iter().find(|pair| pair.1 == character).map_or(character, |pair| pair.0)
            })
            .collect()
    }

    /// Cuts a rendering at its special tokens: a run between two of them is ordinary if it was masked anywhere. Runs
    /// stay whole, so that merges inside them are those of the plain text.
    pub(super) fn segments(&self, rendered: &str) -> Vec<Segment> {
        let (mut segments, mut trusted) = (Vec::new(), String::new());
        let mut rest = rendered;
        while !rest.is_empty() {
            let (run_len, token_len) = self.next_special(rest);
            let (run, token) = (&rest[..run_len], &rest[run_len..run_len + token_len]);
            if run.contains(|character| self.pairs.iter().any(|pair| pair.1 == character)) {
                if !trusted.is_empty() {
                    segments.push(Segment::Trusted(std::mem::take(&mut trusted)));
                }
                segments.push(Segment::Ordinary(self.remove(run)));
            } else {
                trusted.push_str(run);
            }
            trusted.push_str(token);
            rest = &rest[run_len + token_len..];
        }
        if !trusted.is_empty() {
            segments.push(Segment::Trusted(trusted));
        }
        segments
    }

    /// Bytes before the first special token, and bytes of the longest one that starts there (0 at the end).
    fn next_special(&self, text: &str) -> (usize, usize) {
        let tokens = &self.guard.tokens;
        for (at, _) in text.char_indices() {
            let rest = &text[at..];
            if let Some(len) = tokens.iter().filter(|token| rest.starts_with(*token)).map(String::len).max() {
                return (at, len);
            }
        }
        (text.len(), 0)
    }
}

fn visit_strings(value: &Value, visit: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| visit_strings(item, visit)),
        Value::Object(entries) => entries.iter().for_each(|(key, value)| {
            visit(key);
            visit_strings(value, visit);
        }),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn guard(tokens: &[&str]) -> SpecialGuard {
        let tokens: Vec<String> = tokens.iter().map(ToString::to_string).collect();
        SpecialGuard::new(&tokens, std::iter::empty())
    }

    #[test]
    fn harmless_text_needs_no_mask() {
        let guard = guard(&["<|a|>", "<s>"]);
        assert!(
            guard.mask(&[&json!({"x": ["a < b > c", "<", 1, null]})]).unwrap().is_some(),
            "`<` may begin <s>"
        );
        assert!(guard.mask(&[&json!({"x": ["a < b > c <b>", 1, null]})]).unwrap().is_none());
    }

    #[test]
    fn tokens_of_the_template_stay_special_and_those_of_the_input_do_not() {
        let guard = guard(&["<|a|>", "<s>"]);
        for (first, second) in
            [("<|a|>", "<s>x"), ("<|a", "|>"), ("<", "s>"), ("<s", ">"), ("x|", "\u{10ff00}")]
        {
            let input = json!([first, second]);
            let mask = guard.mask(&[&input]).unwrap().unwrap();
            let masked = mask.apply(&input);
            let joined = format!("{}{}", masked[0].as_str().unwrap(), masked[1].as_str().unwrap());
            let segments = mask.segments(&format!("<|a|>u {joined}<s>v<|a|>"));
            let expected = [
                Segment::Trusted("<|a|>".into()),
                Segment::Ordinary(format!("u {first}{second}")),
                Segment::Trusted("<s>v<|a|>".into()),
            ];
            assert_eq!(segments, expected);
        }
    }

    #[test]
    fn keys_are_masked_and_all_characters_come_back() {
        let guard = guard(&["<|a|>", "<s>"]);
        let input = json!({"<|a|>": "x <s> y <s"});
        let mask = guard.mask(&[&input]).unwrap().unwrap();
        let masked = mask.apply(&input).to_string();
        assert!(!masked.contains("<|a|>") && !masked.contains("<s"));
        assert_eq!(mask.remove(&masked), input.to_string());
    }

    #[test]
    fn running_out_of_sentinels_is_an_error() {
        let all: String = SENTINELS.chain(['|']).collect();
        assert!(guard(&["<|a|>"]).mask(&[&json!(all)]).is_err());
    }
}
