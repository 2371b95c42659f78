//! From a [`Grammar`] to a matcher, under limits on size and work. One compiler per tokenizer, shared by all requests.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};

use super::constraint::{GrammarConstraint, GrammarStart, Setup};
use super::environment::environment;
use super::lark::{Parts, literal};
use super::lesson::Template;
use super::marker::Marker;
use super::{Grammar, ebnf, refuse, schema, tags, tools};
use crate::answer::{CALL_OPEN, THINK_CLOSE, THINK_OPEN};
use crate::{Result, TextError, Tokenizer};

/// Most bytes of a grammar as it is written in a request.
const MAX_SOURCE_BYTES: usize = 2 << 20;
/// Most lines of a grammar that may define a rule. A chain of rules costs the compiler's recursion stack for each.
const MAX_RULES: usize = 1_000;
/// Stack of a compilation: reserved, not touched. Enough for a chain of `MAX_RULES` rules or definitions.
const STACK_BYTES: usize = 256 << 20;
/// Longest time that a compilation is waited for.
const MAX_TIME: Duration = Duration::from_secs(10);
/// Most texts of a choice.
const MAX_CHOICES: usize = 50_000;
/// Most characters of a foreign error message.
const MAX_REASON_CHARS: usize = 400;

/// Sets of tokens that a mask has as a whole where a grammar allows all of what they match, so that only the rest of the
/// vocabulary is looked through: letters, text without spaces, and text that needs no escape in JSON, by its length, as
/// strings are bounded. None has white space that `.` or `\S` of a pattern leave out.
fn slices() -> Vec<String> {
    const RARE: &str = r"\x00-\x1F\x7F-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff";
    let text = |counts: &str| format!(r#"[^"\\{RARE}]{{{counts}}}"#);
    vec![
        "[A-Za-z]{1,20}".into(),
        format!(r#"[^ "\\{RARE}]{{1,30}}"#),
        text("1,10"),
        text("1,30"),
        text("1,128"),
    ]
}

/// Bounds on the work of one compilation and of one token. They count work, not time, so that the same grammar is
/// accepted on every machine.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 250_000,
        max_grammar_size: 500_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

/// Compiles grammars for one tokenizer.
pub struct GrammarCompiler {
    factory: Arc<ParserFactory>,
    setup: Arc<Setup>,
    /// Opens a tool call in free text.
    call_open: Arc<Marker>,
}

/// A grammar that is ready to be applied.
pub struct CompiledGrammar {
    pub(super) template: Arc<Template>,
    setup: Arc<Setup>,
    /// Text is free up to this marker; the grammar begins behind it, and ends before the next free text.
    trigger: Option<Arc<Marker>>,
}

/// What a grammar compiles to.
pub(super) struct Plan {
    pub(super) grammar: TopLevelGrammar,
    /// Begins behind each `<tool_call>`; what is outside of calls is free.
    pub(super) after_call_open: bool,
}

impl GrammarCompiler {
    /// A compiler for the vocabulary of `tokenizer`, in which the tokens `eos` end a sequence. Looks through the whole
    /// vocabulary: some hundred milliseconds.
    ///
    /// # Errors
    /// When the vocabulary cannot be taken apart, which is a defect.
    pub fn new(tokenizer: &Arc<Tokenizer>, eos: &[u32]) -> Result<Self> {
        let eos: Vec<u32> =
            eos.iter().copied().filter(|&id| (id as usize) < tokenizer.vocab_size()).collect();
        let environment = environment(tokenizer.clone(), &eos);
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices())
            .map_err(|error| TextError::Grammar {
                place: "the tokenizer".into(),
                rule: format!("its vocabulary cannot be used for grammars: {}", clean(&error.to_string())),
            })?;
        factory.quiet();
        *factory.limits_mut() = limits();
        let is_newline = |&id: &u32| matches!(tokenizer.token_bytes(id), [b'\n'] | [b'\n', b'\n']);
        let setup = Setup {
            think_open: tokenizer.token_to_id(THINK_OPEN),
            think_close: Marker::new(THINK_CLOSE, tokenizer),
            newlines: (0..tokenizer.vocab_size() as u32).filter(is_newline).collect(),
            eos,
            tokenizer: tokenizer.clone(),
        };
        let call_open = Arc::new(Marker::new(CALL_OPEN, tokenizer));
        Ok(Self { factory: Arc::new(factory), setup: Arc::new(setup), call_open })
    }

    /// Compiles, and computes the first mask. Takes a millisecond for usual grammars, seconds for the worst that the
    /// limits let through: not for a thread that others wait for.
    ///
    /// # Errors
    /// Says what in the grammar is wrong, too large, or impossible to enforce.
    pub fn compile(&self, grammar: &Grammar) -> Result<CompiledGrammar> {
        let place = place_of(grammar);
        let Plan { grammar, after_call_open } = plan(grammar)?;
        let factory = self.factory.clone();
        let compiled = on_large_stack(move || {
            let mut matcher = Matcher::new(factory.create_parser(grammar));
            // A grammar without any text shows only here, and so do those that are too large to be applied.
            let first = matcher.compute_mask().map(|_| ());
            first.map(|()| matcher)
        });
        let refuse = |rule: String| refuse(place, rule);
        match compiled {
            Ok(Ok(matcher)) => Ok(CompiledGrammar {
                template: Template::new(matcher),
                setup: self.setup.clone(),
                trigger: after_call_open.then(|| self.call_open.clone()),
            }),
            Ok(Err(error)) => refuse(clean(&error.to_string())),
            Err(RecvTimeoutError::Timeout) => {
                refuse(format!("takes over {} seconds to compile", MAX_TIME.as_secs()))
            }
            Err(RecvTimeoutError::Disconnected) => refuse("cannot be compiled".into()),
        }
    }
}

/// Runs a compilation where its recursion has room, and waits for it. One that takes too long is left to its own end,
/// which the bounds on its work bring about. `Disconnected`: it has panicked, or there is no thread to be had; what the
/// compiler cannot take is a grammar that does not compile, and no more.
fn on_large_stack<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RecvTimeoutError> {
    let (sender, result) = channel();
    let run = move || drop(sender.send(work()));
    // The sender is dropped with the closure if there is no thread.
    let _ = thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES).spawn(run);
    result.recv_timeout(MAX_TIME)
}

impl CompiledGrammar {
    /// A constraint for one sequence whose output starts like this. Clones of the result share what they learn about
    /// the grammar; two results of this method share nothing that changes. What has been learned when a result and its
    /// clones are gone is there for later ones.
    pub fn constraint(&self, start: GrammarStart) -> GrammarConstraint {
        let (matcher, lesson) = self.template.begin();
        GrammarConstraint::new(matcher, lesson, self.setup.clone(), self.trigger.clone(), start)
    }
}

/// What a message calls the grammar.
fn place_of(grammar: &Grammar) -> &'static str {
    match grammar {
        Grammar::JsonSchema { .. } => "the JSON schema",
        Grammar::Regex(_) => "the regex",
        Grammar::Choice(_) => "the choice",
        Grammar::Ebnf(_) => "the grammar",
        Grammar::StructuralTag(_) => "the structural tag",
        Grammar::ToolCalls(_) => "the tools",
    }
}

fn plan(grammar: &Grammar) -> Result<Plan> {
    let mut parts = Parts::default();
    if let Grammar::ToolCalls(calls) = grammar {
        let (source, after_call_open) = tools::lark(calls, &mut parts)?;
        return Ok(Plan { grammar: parts.finish(source), after_call_open });
    }
    let grammar = match grammar {
        Grammar::JsonSchema { schema, options } => {
            TopLevelGrammar::from_json_schema(prepare_schema(schema, *options)?)
        }
        Grammar::Ebnf(source) => TopLevelGrammar::from_lark(lark_of(source)?),
        other => {
            let item = item(other, &mut parts)?;
            parts.finish(format!("start: {item}\n"))
        }
    };
    Ok(Plan { grammar, after_call_open: false })
}

/// The Lark expression of a grammar inside another one.
pub(super) fn item(grammar: &Grammar, parts: &mut Parts) -> Result<String> {
    Ok(match grammar {
        Grammar::JsonSchema { schema, options } => {
            let schema = prepare_schema(schema, *options)?;
            parts.schema(schema)
        }
        Grammar::Regex(regex) => regex_item(regex)?,
        Grammar::Choice(texts) => choice_item(texts, parts)?,
        Grammar::Ebnf(source) => {
            let source = lark_of(source)?;
            parts.lark(source)
        }
        Grammar::StructuralTag(tag) => tags::item(tag, parts)?,
        Grammar::ToolCalls(_) => return refuse("the tools", "calls cannot be part of another grammar"),
    })
}

fn prepare_schema(schema: &serde_json::Value, options: schema::SchemaOptions) -> Result<serde_json::Value> {
    schema::prepare(schema, options, "the JSON schema")
}

pub(super) fn check_size(place: &str, num_bytes: usize) -> Result<()> {
    match num_bytes {
        0 => refuse(place, "is empty"),
        1..=MAX_SOURCE_BYTES => Ok(()),
        _ => refuse(place, format!("has {num_bytes} bytes; the limit is {MAX_SOURCE_BYTES}")),
    }
}

pub(super) fn regex_item(regex: &str) -> Result<String> {
    check_size("the regex", regex.len())?;
    Ok(format!("/{}/", llguidance::regex_to_lark(regex, "")))
}

fn choice_item(texts: &[String], parts: &mut Parts) -> Result<String> {
    if texts.is_empty() || texts.len() > MAX_CHOICES {
        return refuse("the choice", format!("has {} texts; 1 to {MAX_CHOICES} are allowed", texts.len()));
    }
    if texts.iter().any(String::is_empty) {
        return refuse("the choice", "has an empty text");
    }
    check_size("the choice", texts.iter().map(String::len).sum())?;
    // One terminal of all: as a rule each text would be a terminal of its own.
    let texts = texts.iter().map(|text| literal(text)).collect::<Vec<_>>().join(" | ");
    Ok(parts.lark(format!("start: CHOICE\nCHOICE: {texts}\n")))
}

fn lark_of(source: &str) -> Result<String> {
    check_size("the grammar", source.trim().len())?;
    let num_rules = source.lines().filter(|line| line.contains(':')).count();
    if num_rules > MAX_RULES {
        return refuse("the grammar", format!("has {num_rules} lines with rules; the limit is {MAX_RULES}"));
    }
    if source.contains("::=") {
        return ebnf::to_lark(source);
    }
    let sets_temperature = |line: &str| {
        let head = line.split(':').next().unwrap_or_default();
        head.contains('[') && head.contains("temperature")
    };
    match source.lines().position(sets_temperature) {
        Some(i) => refuse(
            format!("the grammar at line {}", i + 1),
            "temperature= is not supported: the temperature is the request's",
        ),
        None => Ok(source.to_owned()),
    }
}

/// A message of `llguidance` without its dumps, and bounded.
pub(super) fn clean(message: &str) -> String {
    let message = message.split("\n<").next().unwrap_or_default();
    // Where in our own Lark source a regular expression stands says nothing to its author.
    let message = match message.split_once("(in regex): ") {
        Some((_, reason)) => reason.split("\n   1 | ").next().unwrap_or_default(),
        None => message,
    };
    let text = match message.trim() {
        "NoExtensionBias" | "NoExtension" => "no text satisfies it",
        text if text.starts_with("panic:") => "cannot be compiled",
        text if text.starts_with("oneOf constraints") => {
            "oneOf is supported only where its options visibly exclude each other; use anyOf"
        }
        text => text,
    };
    text.chars().take(MAX_REASON_CHARS).collect()
}
