//! `cargo bench -p spark-text --bench masks -- FOLDER`: what a grammar costs a token, over the tokenizer in FOLDER (by
//! default the demo model's). Every text is written once under its grammar; each mask is timed.
#![expect(clippy::print_stdout, reason = "a benchmark prints its results")]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot be set up has failed")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use spark_api::TokenConstraint;
use spark_text::{
    Grammar, GrammarCompiler, GrammarStart, SchemaOptions, Tokenizer, ToolCalls, ToolFormat, ToolFunction,
    ToolMode,
};

const ROUNDS: usize = 20;
/// Sequences of a batch.
const BATCH: usize = 64;

fn schema(schema: Value) -> Grammar {
    Grammar::JsonSchema { schema, options: SchemaOptions::default() }
}

/// Grammars, each with a text that it lets through.
fn cases() -> Vec<(&'static str, Grammar, String)> {
    let string = json!({"type": "string"});
    let person = json!({"type": "object", "properties": {"name": string, "age": {"type": "integer"}, "email": string,
        "address": {"type": "object", "properties": {"street": string, "city": string}, "required": ["street", "city"]},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "vip"]}}}, "required": ["name", "age", "address", "tags"],
        "additionalProperties": false});
    let document = json!({"name": "Emma Müller", "age": 90, "email": "emma@example.org",
        "address": {"street": "Karl-Liebknecht-Straße 12", "city": "Leipzig"}, "tags": ["old", "vip"]});
    let long = json!({"type": "object", "properties": {"text": {"type": "string", "maxLength": 2000}}, "required": ["text"]});
    let prose = "It was a bright cold day in April, and the clocks were \"striking\" thirteen. ".repeat(4);
    let optional = (0..300)
        .map(|i| (format!("field_{i}"), json!({"type": "integer"})))
        .collect::<serde_json::Map<_, _>>();
    let tools = |mode| {
        let parameters = json!({"type": "object", "properties": {"city": string, "days": {"type": "integer"}}, "required": ["city"]});
        let function =
            ToolFunction { name: "get_weather".into(), parameters, strict: true, place: "tools[0]".into() };
        Grammar::ToolCalls(ToolCalls { format: ToolFormat::Hermes, functions: vec![function], mode })
    };
    let call = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\", \"days\": 3}}\n</tool_call>";
    let tag = json!({"structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f"]});
    vec![
        ("JSON schema", schema(person.clone()), document.to_string()),
        ("JSON schema, spread over lines", schema(person), serde_json::to_string_pretty(&document).unwrap()),
        ("json_object", Grammar::json_object(), document.to_string()),
        ("maxLength 2000", schema(long), json!({"text": prose}).to_string()),
        (
            "300 optional properties",
            schema(json!({"type": "object", "properties": optional, "additionalProperties": false})),
            json!({"field_7": 1, "field_100": 22, "field_299": 333}).to_string(),
        ),
        (
            "regex",
            Grammar::Regex(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(Z|[+-]\d{2}:\d{2})".into()),
            "2026-11-21T08:02+01:00".into(),
        ),
        (
            "choice of 1000",
            Grammar::Choice((0..1000).map(|i| format!("answer number {i}")).collect()),
            "answer number 617".into(),
        ),
        (
            "GBNF",
            Grammar::Ebnf(
                "root ::= sum\nsum ::= num | num \" + \" sum | \"(\" sum \")\"\nnum ::= [0-9]+".into(),
            ),
            "(1 + (22 + 333)) + 4444".replace(") + 4444", ")"),
        ),
        ("tool_choice required", tools(ToolMode::Some), format!("{call}\n{call}")),
        ("strict tools in free text", tools(ToolMode::InText), format!("{prose}{call}")),
        ("structural tag", Grammar::StructuralTag(tag), format!("{prose}<f>12</f> and on")),
    ]
}

fn main() {
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let demo = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/spark-tiny-vl/awq");
    let tokenizer = Arc::new(Tokenizer::from_dir(&folder.map_or_else(demo, PathBuf::from)).unwrap());
    let eos = tokenizer.token_to_id("<|im_end|>").unwrap();
    let start = Instant::now();
    let compiler = GrammarCompiler::new(&tokenizer, &[eos]).unwrap();
    println!("{} tokens, compiler made in {:.0?}", tokenizer.vocab_size(), start.elapsed());
    println!(
        "{:32} {:>10} {:>8} {:>10} {:>10} {:>10} {:>10}",
        "", "compile", "tokens", "median", "p95", "max", "commit"
    );
    for (name, grammar, text) in cases() {
        measure(name, &grammar, &text, &tokenizer, &compiler);
    }
    measure_batch(&tokenizer, &compiler);
}

fn measure(name: &str, grammar: &Grammar, text: &str, tokenizer: &Tokenizer, compiler: &GrammarCompiler) {
    let start = Instant::now();
    let compiled = compiler.compile(grammar).unwrap_or_else(|error| panic!("{name}: {error}"));
    let compile = start.elapsed();
    let tokens = tokenizer.encode_ordinary(text).unwrap();
    let mut mask = vec![0; tokenizer.vocab_size().div_ceil(32)];
    let (mut masks, mut commits) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut constraint = compiled.constraint(GrammarStart::Answer);
        for &token in &tokens {
            mask.fill(u32::MAX);
            let start = Instant::now();
            constraint.mask(&mut mask).unwrap();
            masks.push(start.elapsed());
            assert!(
                mask[token as usize / 32] >> (token % 32) & 1 == 1,
                "{name}: the text is not of the grammar"
            );
            let start = Instant::now();
            constraint.commit(token).unwrap();
            commits.push(start.elapsed());
        }
    }
    let mut at = |share: usize| {
        masks.sort();
        micros(masks[(masks.len() - 1) * share / 100])
    };
    let (median, p95, max) = (at(50), at(95), at(100));
    commits.sort();
    let commit = micros(commits[commits.len() / 2]);
    println!(
        "{name:32} {:>10.1?} {:>8} {median:>10} {p95:>10} {max:>10} {commit:>10}",
        compile,
        tokens.len()
    );
}

/// A batch, as an engine drives it: every sequence learns its token, then every one says what may follow.
fn measure_batch(tokenizer: &Tokenizer, compiler: &GrammarCompiler) {
    let (_, grammar, text) = cases().swap_remove(0);
    let compiled = compiler.compile(&grammar).unwrap();
    let tokens = tokenizer.encode_ordinary(&text).unwrap();
    let mut mask = vec![0; tokenizer.vocab_size().div_ceil(32)];
    let mut constraints: Vec<_> = (0..BATCH).map(|_| compiled.constraint(GrammarStart::Answer)).collect();
    let mut steps = Vec::new();
    for &token in &tokens {
        let start = Instant::now();
        for constraint in &mut constraints {
            mask.fill(u32::MAX);
            constraint.mask(&mut mask).unwrap();
        }
        for constraint in &mut constraints {
            constraint.commit(token).unwrap();
        }
        steps.push(start.elapsed());
    }
    steps.sort();
    let (median, worst) = (steps[steps.len() / 2], steps[steps.len() - 1]);
    println!(
        "{BATCH} sequences of the first: a step takes {} at the median, {} at most",
        micros(median),
        micros(worst)
    );
}

fn micros(duration: Duration) -> String {
    format!("{:.1} us", duration.as_secs_f64() * 1e6)
}
