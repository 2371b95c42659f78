//! Random walks under a mask: every allowed token is as likely as any other, until it is time to come to an end.

use std::sync::{Arc, LazyLock, OnceLock};

use serde_json::Value;
use spark_api::{ConstraintError, TokenConstraint};
use spark_text::{
    CompiledGrammar, Grammar, GrammarCompiler, GrammarConstraint, GrammarStart, SchemaOptions, TextError,
    Tokenizer,
};

/// End-of-sequence tokens.
pub(crate) static EOS: LazyLock<[u32; 2]> = LazyLock::new(|| {
    ["<|im_end|>", "<|endoftext|>"].map(|text| tokenizer().token_to_id(text).expect("a vocabulary of Qwen"))
});
/// Words of a mask: some more than the vocabulary needs, as in a model with padded rows.
static MASK_WORDS: LazyLock<usize> = LazyLock::new(|| tokenizer().vocab_size() / 32 + 7);
/// Tokens after which a walk gives up.
const MAX_TOKENS: usize = 1_000;

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let demo = || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/spark-tiny-vl/awq");
    let dir = std::env::var_os("SPARK_TOKENIZER").map_or_else(demo, Into::into);
    TOKENIZER.get_or_init(|| Arc::new(Tokenizer::from_dir(&dir).unwrap())).clone()
}

pub(crate) fn compile(grammar: &Grammar) -> Result<CompiledGrammar, TextError> {
    static COMPILER: OnceLock<GrammarCompiler> = OnceLock::new();
    COMPILER.get_or_init(|| GrammarCompiler::new(&tokenizer(), &*EOS).unwrap()).compile(grammar)
}

pub(crate) fn schema(schema: Value) -> Grammar {
    Grammar::JsonSchema { schema, options: SchemaOptions::default() }
}

/// The message of a refusal.
pub(crate) fn refusal(grammar: &Grammar) -> String {
    compile(grammar).map(|_| ()).expect_err(&format!("{grammar:?} is accepted")).to_string()
}

/// One sequence.
pub(crate) struct Walk {
    constraint: GrammarConstraint,
    pub(crate) text: Vec<u8>,
    /// The constraint is complete.
    pub(crate) is_complete: bool,
}

impl Walk {
    pub(crate) fn new(grammar: &CompiledGrammar, start: GrammarStart) -> Self {
        Self { constraint: grammar.constraint(start), text: Vec::new(), is_complete: false }
    }

    /// Tokens that may follow.
    pub(crate) fn allowed(&mut self) -> Vec<u32> {
        self.try_allowed().unwrap()
    }

    fn try_allowed(&mut self) -> Result<Vec<u32>, ConstraintError> {
        let mut mask = vec![u32::MAX; *MASK_WORDS];
        self.constraint.mask(&mut mask)?;
        let is_set = |id: &u32| mask[*id as usize / 32] >> (id % 32) & 1 == 1;
        let ids: Vec<u32> = (0..*MASK_WORDS as u32 * 32).filter(is_set).collect();
        assert!(!ids.is_empty(), "nothing may follow {:?}", String::from_utf8_lossy(&self.text));
        Ok(ids)
    }

    pub(crate) fn commit(&mut self, token: u32) {
        self.try_commit(token).unwrap();
    }

    fn try_commit(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.is_complete = self.constraint.commit(token)?;
        if !EOS.contains(&token) {
            self.text.extend_from_slice(tokenizer().token_bytes(token));
        }
        Ok(())
    }

    /// Takes the tokens of `text` if all are allowed; else says at which byte it fails.
    pub(crate) fn write(&mut self, text: &str) -> Result<(), usize> {
        let before = self.text.len();
        for token in tokens_of(text) {
            if self.is_complete || !self.allowed().contains(&token) {
                return Err(self.text.len() - before);
            }
            self.commit(token);
        }
        Ok(())
    }

    /// Whether the text may end here.
    pub(crate) fn may_end(&mut self) -> bool {
        self.is_complete || self.allowed().iter().any(|token| EOS.contains(token))
    }
}

/// Tokens of exactly this text, which a tokenizer may normalise.
fn tokens_of(text: &str) -> Vec<u32> {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode_ordinary(text).unwrap();
    let bytes = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied();
    if bytes.eq(text.bytes()) {
        return ids;
    }
    let all = 0..tokenizer.vocab_size() as u32;
    let token = |byte| all.clone().find(|&id| tokenizer.token_bytes(id) == [byte]);
    text.bytes().map(|byte| token(byte).expect("a byte-level vocabulary has all bytes")).collect()
}

/// Whether the grammar accepts exactly this text.
pub(crate) fn accepts(grammar: &CompiledGrammar, text: &str) -> bool {
    let mut walk = Walk::new(grammar, GrammarStart::Answer);
    walk.write(text).is_ok() && walk.may_end()
}

/// A text of the grammar; `None` if the walk finds no end. After `num_free` tokens it takes what leads to the end.
pub(crate) fn generate(
    grammar: &CompiledGrammar,
    random: &mut fastrand::Rng,
    num_free: usize,
) -> Option<String> {
    try_generate(grammar, random, num_free, "").unwrap()
}

/// The same where `end` ends free text.
pub(crate) fn generate_towards(
    grammar: &CompiledGrammar,
    random: &mut fastrand::Rng,
    num_free: usize,
    end: &str,
) -> Option<String> {
    try_generate(grammar, random, num_free, end).unwrap()
}

/// The same for a grammar that may turn out to be too much.
pub(crate) fn try_generate(
    grammar: &CompiledGrammar,
    random: &mut fastrand::Rng,
    num_free: usize,
    end: &str,
) -> Result<Option<String>, ConstraintError> {
    let mut walk = Walk::new(grammar, GrammarStart::Answer);
    for i in 0..MAX_TOKENS {
        let allowed = walk.try_allowed()?;
        let token = match i < num_free {
            true => random.choice(&allowed).copied(),
            false => towards(end, &walk.text, &allowed).or_else(|| closing(&allowed, random)),
        };
        let token = token.expect("the list is not empty");
        walk.try_commit(token)?;
        if walk.is_complete || EOS.contains(&token) {
            return Ok(Some(String::from_utf8(walk.text).expect("complete texts are UTF-8")));
        }
    }
    Ok(None)
}

/// Whether a validator's numbers, which are 64 bits wide, hold those of the text. They have no integer `-0`: it is read as
/// a float, which is no integer in draft 4.
pub(crate) fn is_exact(value: &Value) -> bool {
    let is_held = |float: f64| float.abs() < 9e15 && !(float == 0.0 && float.is_sign_negative());
    match value {
        Value::Number(number) => number.as_f64().is_some_and(is_held),
        Value::Array(items) => items.iter().all(is_exact),
        Value::Object(fields) => fields.values().all(is_exact),
        _ => true,
    }
}

/// The token of the next byte of `end`, as much of which is there as `text` ends with.
fn towards(end: &str, text: &[u8], allowed: &[u32]) -> Option<u32> {
    if allowed.iter().any(|id| EOS.contains(id)) {
        return None;
    }
    let num_there = (0..end.len()).rev().find(|&k| text.ends_with(&end.as_bytes()[..k]))?;
    let next = &end.as_bytes()[num_there..=num_there];
    allowed.iter().copied().find(|&id| tokenizer().token_bytes(id) == next)
}

/// The allowed token that ends what is open soonest.
pub(crate) fn closing(allowed: &[u32], random: &mut fastrand::Rng) -> Option<u32> {
    let tokenizer = tokenizer();
    let rank = |id: &u32| match tokenizer.token_bytes(*id) {
        _ if EOS.contains(id) => 0,
        b"\"" => 1,
        b"}" | b"]" => 2,
        b"n" | b"0" | b"1" => 3,
        [byte] if byte.is_ascii_alphanumeric() => 4,
        [byte] if !byte.is_ascii_whitespace() && *byte != b'[' && *byte != b'{' => 5,
        [_] => 7,
        _ => 6,
    };
    let best = allowed.iter().map(rank).min()?;
    // At times another way, as the shortest step may lead nowhere: one more digit, and one more.
    let worst = if best > 1 && random.u8(..3) == 0 { best.max(5) } else { best };
    let all: Vec<u32> = allowed.iter().copied().filter(|id| rank(id) <= worst).collect();
    random.choice(&all).copied()
}
