//! Grammars of requests: each is refused, or gives masks until its text is complete. What a mask allows can be taken.

use std::sync::{Arc, LazyLock};

use serde_json::Value;
use spark_api::TokenConstraint;
use spark_text::{
    Grammar, GrammarCompiler, GrammarConstraint, GrammarStart, SchemaOptions, Tokenizer, ToolCalls,
    ToolFormat, ToolFunction, ToolMode,
};

use crate::folder::model;

static TOKENIZER: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_dir(&model()).expect("the fixture is committed")));
static COMPILER: LazyLock<GrammarCompiler> =
    LazyLock::new(|| GrammarCompiler::new(&TOKENIZER, &EOS).expect("the fixture has a usual vocabulary"));
/// `<|im_end|>` and `<|endoftext|>` of the fixture.
const EOS: [u32; 2] = [258, 256];
/// Most tokens of a text.
const MAX_TOKENS: usize = 48;
/// Longer sources only cost time.
const MAX_BYTES: usize = 4096;

/// Byte 0: what kind of grammar. Byte 1: which text is written. The rest is the grammar.
pub fn run(data: &[u8]) {
    let [kind, seed, source @ ..] = data else { return };
    if source.len() > MAX_BYTES {
        return;
    }
    let Some((grammar, start)) = grammar(*kind, source) else { return };
    let Ok(compiled) = COMPILER.compile(&grammar) else { return };
    let is_json = matches!(grammar, Grammar::JsonSchema { .. });
    let text = write(compiled.constraint(start), u64::from(*seed));
    if let (true, Some(text)) = (is_json, text) {
        // Only its form: numbers may be larger than 64 bits hold.
        let parsed = serde_json::from_slice::<serde::de::IgnoredAny>(&text);
        assert!(parsed.is_ok(), "{parsed:?} {:?}", String::from_utf8_lossy(&text));
    }
}

fn grammar(kind: u8, source: &[u8]) -> Option<(Grammar, GrammarStart)> {
    let text = String::from_utf8_lossy(source).into_owned();
    let json = || serde_json::from_slice::<Value>(source).ok();
    let schema = |schema| Grammar::JsonSchema {
        schema,
        options: SchemaOptions { best_effort: kind & 0x40 != 0, compact: kind & 0x10 != 0 },
    };
    let grammar = match kind & 7 {
        0 | 1 => schema(json()?),
        2 => Grammar::Regex(text),
        3 => Grammar::Choice(text.lines().map(str::to_owned).collect()),
        4 => Grammar::Ebnf(text),
        5 => Grammar::StructuralTag(json()?),
        _ => Grammar::ToolCalls(ToolCalls {
            format: if kind & 8 == 0 { ToolFormat::Hermes } else { ToolFormat::Xml },
            functions: vec![ToolFunction {
                name: "f".into(),
                parameters: json()?,
                strict: kind & 0x40 != 0,
                place: "tools[0].function".into(),
            }],
            mode: match kind >> 4 & 3 {
                0 => ToolMode::One,
                1 => ToolMode::Some,
                2 => ToolMode::InText,
                _ => ToolMode::Or(Box::new(Grammar::json_object())),
            },
        }),
    };
    let start = if kind & 0x80 == 0 { GrammarStart::Answer } else { GrammarStart::Thinking };
    Some((grammar, start))
}

/// A text under the masks; `None` if it has no end, or the grammar has become too much.
fn write(mut constraint: GrammarConstraint, seed: u64) -> Option<Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut text = Vec::new();
    let vocab_size = TOKENIZER.vocab_size() as u32;
    for _ in 0..MAX_TOKENS {
        let mut mask = vec![u32::MAX; TOKENIZER.vocab_size().div_ceil(32)];
        constraint.mask(&mut mask).ok()?;
        let is_set = |id: &u32| mask[*id as usize / 32] >> (id % 32) & 1 == 1;
        let allowed: Vec<u32> = (0..vocab_size).filter(is_set).collect();
        let end = allowed.iter().find(|id| EOS.contains(id)).copied().filter(|_| random.bool());
        let token = end.or_else(|| random.choice(&allowed).copied());
        let token =
            token.unwrap_or_else(|| panic!("nothing may follow {:?}", String::from_utf8_lossy(&text)));
        if !EOS.contains(&token) {
            text.extend_from_slice(TOKENIZER.token_bytes(token));
        }
        // An error of a token that the mask has allowed is only ever one of too much work.
        let is_complete = constraint.commit(token).ok()?;
        if is_complete || EOS.contains(&token) {
            return Some(text);
        }
    }
    None
}
