//! GBNF (`root ::= ...`), the notation of llama.cpp and xgrammar, as Lark.
//!
//! A rule that does not refer to itself, however indirectly, becomes a terminal: one regular expression, in which every
//! way to divide a text counts. Only recursive rules are left to the parser, whose terminals match as much as they can.

mod emit;
mod parse;

use crate::Result;

/// A grammar as Lark source, with the rule `root` as its start.
///
/// # Errors
/// Names the line that is not GBNF, or the rule that is missing.
pub(super) fn to_lark(source: &str) -> Result<String> {
    emit::lark(&parse::rules(source)?)
}

/// What stands on the right of `::=`.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    /// A reference to the rule of this index.
    Rule(usize),
    /// A text, perhaps empty.
    Text(String),
    /// A set of characters: the inside of a regular expression's brackets, and what it leaves out if it begins with `^`.
    Class(String),
    /// One after the other.
    Sequence(Vec<Node>),
    /// One of them.
    Choice(Vec<Node>),
    /// The node at least and at most so many times.
    Repeat(Box<Node>, u32, Option<u32>),
}

/// A rule. Rules are in the order of their first mention.
#[derive(Debug, Clone, PartialEq)]
struct Rule {
    name: String,
    body: Node,
}
