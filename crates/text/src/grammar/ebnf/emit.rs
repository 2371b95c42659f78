//! Writes rules as Lark: regular ones as terminals, recursive ones as rules.

use std::collections::BTreeSet;

use super::{Node, Rule};
use crate::Result;
use crate::grammar::lark::literal;

/// Lark source.
pub(super) fn lark(rules: &[Rule]) -> Result<String> {
    let emitter = Emitter { regular: regular(rules), nullable: nullable(rules) };
    let mut source = String::new();
    for (i, rule) in rules.iter().enumerate() {
        let body = emitter.node(&rule.body, emitter.regular.contains(&i));
        let lines = match (emitter.regular.contains(&i), emitter.nullable.contains(&i)) {
            (false, _) => format!("r{i}: {body}\n"),
            (true, false) => format!("T{i}: {body}\nr{i}: T{i}\n"),
            // A terminal that matches nothing would do so everywhere: what it matches besides is one of its own.
            (true, true) => format!("T{i}: {body}\nN{i}: T{i} & /(?s:.+)/\nr{i}: N{i} | \"\"\n"),
        };
        source.push_str(&lines);
        if rule.name == "root" {
            source.push_str(&format!("start: r{i}\n"));
        }
    }
    Ok(source)
}

struct Emitter {
    regular: BTreeSet<usize>,
    nullable: BTreeSet<usize>,
}

impl Emitter {
    fn node(&self, node: &Node, in_terminal: bool) -> String {
        let all = |nodes: &[Node], between: &str| {
            let texts: Vec<_> = nodes.iter().map(|node| self.node(node, in_terminal)).collect();
            format!("({})", texts.join(between))
        };
        match node {
            Node::Rule(i) if in_terminal => format!("T{i}"),
            Node::Rule(i) => format!("r{i}"),
            Node::Text(text) => literal(text),
            Node::Class(set) if set == "^" => "/(?s:.)/".to_owned(),
            Node::Class(set) => format!("/[{set}]/"),
            Node::Sequence(nodes) => all(nodes, " "),
            Node::Choice(nodes) => all(nodes, " | "),
            Node::Repeat(_, _, Some(0)) => literal(""),
            Node::Repeat(node, min, max) => {
                let max = max.map(|max| max.to_string()).unwrap_or_default();
                format!("({}){{{min},{max}}}", self.node(node, in_terminal))
            }
        }
    }
}

fn references(node: &Node, found: &mut BTreeSet<usize>) {
    match node {
        Node::Rule(i) => drop(found.insert(*i)),
        Node::Text(_) | Node::Class(_) => {}
        Node::Sequence(nodes) | Node::Choice(nodes) => nodes.iter().for_each(|node| references(node, found)),
        Node::Repeat(node, ..) => references(node, found),
    }
}

/// Rules that reach no recursive rule: a rule is regular once all that it refers to are.
fn regular(rules: &[Rule]) -> BTreeSet<usize> {
    let references: Vec<BTreeSet<usize>> = rules
        .iter()
        .map(|rule| {
            let mut found = BTreeSet::new();
            references(&rule.body, &mut found);
            found
        })
        .collect();
    grow(|known, i| references[i].is_subset(known), rules.len())
}

/// Rules that match the empty text.
fn nullable(rules: &[Rule]) -> BTreeSet<usize> {
    fn is_nullable(node: &Node, known: &BTreeSet<usize>) -> bool {
        match node {
            Node::Rule(i) => known.contains(i),
            Node::Text(text) => text.is_empty(),
            Node::Class(_) => false,
            Node::Sequence(nodes) => nodes.iter().all(|node| is_nullable(node, known)),
            Node::Choice(nodes) => nodes.iter().any(|node| is_nullable(node, known)),
            Node::Repeat(node, min, _) => *min == 0 || is_nullable(node, known),
        }
    }
    grow(|known, i| is_nullable(&rules[i].body, known), rules.len())
}

/// The smallest set that holds each index that `belongs` to it.
fn grow(belongs: impl Fn(&BTreeSet<usize>, usize) -> bool, count: usize) -> BTreeSet<usize> {
    let mut known = BTreeSet::new();
    loop {
        let new: Vec<usize> = (0..count).filter(|&i| !known.contains(&i) && belongs(&known, i)).collect();
        if new.is_empty() {
            return known;
        }
        known.extend(new);
    }
}
