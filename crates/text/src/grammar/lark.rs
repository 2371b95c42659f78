//! Pieces of Lark source, and the sub-grammars that they refer to by name.

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::Value;

/// A grammar in the making: Lark source of the start grammar is written last, sub-grammars are collected before.
#[derive(Default)]
pub(super) struct Parts {
    grammars: Vec<GrammarWithLexer>,
}

impl Parts {
    /// Adds a JSON schema that is ready to compile; returns the reference to it.
    pub(super) fn schema(&mut self, schema: Value) -> String {
        self.add(GrammarWithLexer::from_json_schema(schema))
    }

    /// Adds a grammar with rules of its own; returns the reference to it.
    pub(super) fn lark(&mut self, source: String) -> String {
        self.add(GrammarWithLexer::from_lark(source))
    }

    fn add(&mut self, mut grammar: GrammarWithLexer) -> String {
        let name = format!("part_{}", self.grammars.len());
        grammar.name = Some(name.clone());
        self.grammars.push(grammar);
        format!("@{name}")
    }

    /// The whole, which begins with the rule `start` of `source`.
    pub(super) fn finish(self, source: String) -> TopLevelGrammar {
        let mut grammars = vec![GrammarWithLexer::from_lark(source)];
        grammars.extend(self.grammars);
        TopLevelGrammar { grammars, max_tokens: None }
    }
}

/// A text as a Lark string.
pub(super) fn literal(text: &str) -> String {
    // Lark's strings are JSON's, but for one control character.
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// A text inside a regular expression between slashes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '\n' => escaped.push_str("\\n"),
            '\r' => escaped.push_str("\\r"),
            '\t' => escaped.push_str("\\t"),
            _ if r"\.+*?()|[]{}^$#&-~/".contains(char) => escaped.extend(['\\', char]),
            _ => escaped.push(char),
        }
    }
    escaped
}
