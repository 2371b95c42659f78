//! Reads GBNF. No Lark is written here.

use std::collections::HashMap;
use std::iter::Peekable;
use std::str::Chars;

use super::{Node, Rule};
use crate::Result;
use crate::grammar::refuse;

/// Deepest nesting of parentheses. Lark's own bound is 30.
const MAX_DEPTH: usize = 24;
/// Most repetitions that can be asked for by a number.
const MAX_REPEAT: u32 = 1_000_000;

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Name(String),
    Defines,
    Text(String),
    Class(String),
    Open,
    Close,
    Or,
    Repeat(u32, Option<u32>),
}

/// All rules; the bodies of those that are mentioned and never defined are missing, which is an error.
pub(super) fn rules(source: &str) -> Result<Vec<Rule>> {
    let tokens = tokens(source)?;
    let mut parser = Parser { tokens: &tokens, position: 0, names: HashMap::new(), bodies: Vec::new() };
    while parser.position < tokens.len() {
        parser.rule()?;
    }
    let Parser { names, bodies, .. } = parser;
    let mut rules: Vec<Rule> =
        bodies.into_iter().map(|body| Rule { name: String::new(), body: body.unwrap_or(NOTHING) }).collect();
    for (name, index) in names {
        rules[index].name = name;
    }
    if let Some(missing) = rules.iter().find(|rule| rule.body == NOTHING) {
        return refuse("the grammar", format!("the rule `{}` is used, but never defined", missing.name));
    }
    match rules.iter().any(|rule| rule.name == "root") {
        true => Ok(rules),
        false => refuse("the grammar", "there is no rule `root`"),
    }
}

/// The body of a rule without a definition; no definition has this one.
const NOTHING: Node = Node::Choice(Vec::new());

struct Parser<'a> {
    tokens: &'a [(Token, usize)],
    position: usize,
    names: HashMap<String, usize>,
    bodies: Vec<Option<Node>>,
}

impl Parser<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.position).map(|(token, _)| token)
    }

    fn fail<T>(&self, rule: &str) -> Result<T> {
        let last = self.tokens.len().saturating_sub(1);
        let line = self.tokens.get(self.position.min(last)).map_or(1, |(_, line)| *line);
        refuse(format!("the grammar at line {line}"), rule)
    }

    fn index(&mut self, name: &str) -> usize {
        if let Some(&index) = self.names.get(name) {
            return index;
        }
        self.names.insert(name.to_owned(), self.bodies.len());
        self.bodies.push(None);
        self.bodies.len() - 1
    }

    fn begins_rule(&self) -> bool {
        let next = |offset: usize| self.tokens.get(self.position + offset).map(|(token, _)| token);
        matches!((next(0), next(1)), (Some(Token::Name(_)), Some(Token::Defines)))
    }

    fn rule(&mut self) -> Result<()> {
        let Some(Token::Name(name)) = self.peek().filter(|_| self.begins_rule()).cloned() else {
            return self.fail("expected a rule: `name ::= ...`");
        };
        let index = self.index(&name);
        if self.bodies[index].is_some() {
            return self.fail(&format!("the rule `{name}` is defined twice"));
        }
        self.position += 2;
        let body = self.choice(0)?;
        self.bodies[index] = Some(body);
        match self.position == self.tokens.len() || self.begins_rule() {
            true => Ok(()),
            false => self.fail("expected the end of the rule"),
        }
    }

    fn choice(&mut self, depth: usize) -> Result<Node> {
        if depth > MAX_DEPTH {
            return self.fail(&format!("parentheses are nested deeper than {MAX_DEPTH} levels"));
        }
        let mut options = vec![self.sequence(depth)?];
        while self.peek() == Some(&Token::Or) {
            self.position += 1;
            options.push(self.sequence(depth)?);
        }
        Ok(if options.len() == 1 { options.swap_remove(0) } else { Node::Choice(options) })
    }

    fn sequence(&mut self, depth: usize) -> Result<Node> {
        let mut items: Vec<Node> = Vec::new();
        while !self.begins_rule() {
            let node = match self.peek().cloned() {
                Some(Token::Name(name)) => Node::Rule(self.index(&name)),
                Some(Token::Text(text)) => Node::Text(text),
                Some(Token::Class(class)) => Node::Class(class),
                Some(Token::Open) => {
                    self.position += 1;
                    let inner = self.choice(depth + 1)?;
                    if self.peek() != Some(&Token::Close) {
                        return self.fail("expected `)`");
                    }
                    inner
                }
                Some(Token::Repeat(min, max)) => match items.pop() {
                    Some(item) => Node::Repeat(Box::new(item), min, max),
                    None => return self.fail("there is nothing to repeat"),
                },
                Some(Token::Close | Token::Or) | None => break,
                Some(Token::Defines) => return self.fail("`::=` needs a name before it"),
            };
            items.push(node);
            self.position += 1;
        }
        match items.len() {
            0 => Ok(Node::Text(String::new())),
            1 => Ok(items.swap_remove(0)),
            _ => Ok(Node::Sequence(items)),
        }
    }
}

/// Tokens with the lines on which they begin.
fn tokens(source: &str) -> Result<Vec<(Token, usize)>> {
    let mut found = Vec::new();
    for (i, line) in source.lines().enumerate() {
        let number = i + 1;
        let mut chars = line.chars().peekable();
        while let Some(char) = chars.next() {
            let token = match char {
                ' ' | '\t' | '\r' => continue,
                '#' => break,
                '(' => Ok(Token::Open),
                ')' => Ok(Token::Close),
                '|' => Ok(Token::Or),
                '*' => Ok(Token::Repeat(0, None)),
                '+' => Ok(Token::Repeat(1, None)),
                '?' => Ok(Token::Repeat(0, Some(1))),
                '.' => Ok(Token::Class("^".into())),
                '"' => text(&mut chars).map(Token::Text),
                '[' => class(&mut chars).map(Token::Class),
                '{' => repeat(&mut chars),
                ':' if chars.next() == Some(':') && chars.next() == Some('=') => Ok(Token::Defines),
                char if char.is_alphabetic() || char == '_' => Ok(Token::Name(name(char, &mut chars))),
                _ => Err(format!("`{char}` is not expected here")),
            };
            match token {
                Ok(token) => found.push((token, number)),
                Err(rule) => return refuse(format!("the grammar at line {number}"), rule),
            }
        }
    }
    Ok(found)
}

type Line<'a> = Peekable<Chars<'a>>;

fn name(first: char, chars: &mut Line<'_>) -> String {
    let mut name = String::from(first);
    while let Some(char) = chars.next_if(|char| char.is_alphanumeric() || matches!(char, '_' | '-')) {
        name.push(char);
    }
    name
}

fn text(chars: &mut Line<'_>) -> Result<String, String> {
    let mut text = String::new();
    loop {
        match chars.next() {
            None => return Err("a text has no closing `\"`".into()),
            Some('"') => return Ok(text),
            Some('\\') => text.push(escaped(chars)?),
            Some(char) => text.push(char),
        }
    }
}

/// The character behind a backslash.
fn escaped(chars: &mut Line<'_>) -> Result<char, String> {
    let Some(char) = chars.next() else { return Err("the line ends behind a backslash".into()) };
    let num_digits = match char {
        'n' => return Ok('\n'),
        'r' => return Ok('\r'),
        't' => return Ok('\t'),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        char if char.is_ascii_punctuation() => return Ok(char),
        char => return Err(format!("`\\{char}` is no escape")),
    };
    let digits: String = chars.by_ref().take(num_digits).collect();
    let code = u32::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == num_digits);
    code.and_then(char::from_u32).ok_or_else(|| format!("`\\{char}{digits}` is no character"))
}

/// The set between brackets, in the notation of regular expressions: only code points and ranges of them.
fn class(chars: &mut Line<'_>) -> Result<String, String> {
    let mut set = String::new();
    if chars.next_if_eq(&'^').is_some() {
        set.push('^');
    }
    let mut is_empty = true;
    let code = |char: char| format!("\\u{{{:x}}}", u32::from(char));
    loop {
        let first = match chars.next() {
            None => return Err("a set of characters has no closing `]`".into()),
            Some(']') if is_empty => return Err("a set of characters is empty".into()),
            Some(']') => return Ok(set),
            Some('\\') => escaped(chars)?,
            Some(char) => char,
        };
        is_empty = false;
        set.push_str(&code(first));
        let mut ahead = chars.clone();
        if ahead.next() != Some('-') || matches!(ahead.peek(), None | Some(']')) {
            continue;
        }
        chars.next();
        let last = match chars.next() {
            Some('\\') => escaped(chars)?,
            Some(char) => char,
            None => return Err("a set of characters has no closing `]`".into()),
        };
        if last < first {
            return Err(format!("the range {first:?} to {last:?} is empty"));
        }
        set.push('-');
        set.push_str(&code(last));
    }
}

/// `{m}`, `{m,}`, `{,n}` or `{m,n}`.
fn repeat(chars: &mut Line<'_>) -> Result<Token, String> {
    let inside: String = chars.by_ref().take_while(|&char| char != '}').collect();
    let number = |text: &str| text.trim().parse::<u32>().ok().filter(|&number| number <= MAX_REPEAT);
    let bounds = match inside.split_once(',') {
        None => number(&inside).map(|count| (count, Some(count))),
        Some((min, "")) => number(min).map(|min| (min, None)),
        Some(("", max)) => number(max).map(|max| (0, Some(max))),
        Some((min, max)) => number(min).zip(number(max)).map(|(min, max)| (min, Some(max))),
    };
    match bounds {
        Some((min, max)) if max.is_none_or(|max| max >= min) => Ok(Token::Repeat(min, max)),
        _ => Err(format!("`{{{inside}}}` is no number of repetitions up to {MAX_REPEAT}")),
    }
}
