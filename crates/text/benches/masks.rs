//! `cargo bench -p spark-text --bench masks -- FOLDER`: what a grammar costs a token, over the tokenizer in FOLDER (by
//! default the demo model's). Every text is written some times under its grammar; each mask is timed.
#![expect(clippy::print_stdout, reason = "a benchmark prints its results")]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot be set up has failed")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use spark_api::TokenConstraint;
use spark_text::{
    CompiledGrammar, Grammar, GrammarCompiler, GrammarConstraint, GrammarStart, SchemaOptions, Tokenizer,
    ToolCalls, ToolFormat, ToolFunction, ToolMode,
};

const ROUNDS: usize = 20;
/// Between a token and the next.
const PAUSE: Duration = Duration::from_micros(500);
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
            "pattern with . and \\s",
            schema(json!({"type": "string", "pattern": r"^\w+(\s.+)?$"})),
            json!("It was a bright cold day in April, and the clocks were striking thirteen.").to_string(),
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

/// A sequence's constraint with the token that was sampled last.
type Order = (GrammarConstraint, Option<u32>);

/// A thread that computes masks, and the queues to it and back: the way that a mask takes in an engine
/// (`crates/runtime/src/masks.rs`).
struct Worker {
    orders: Sender<Order>,
    masks: Receiver<(GrammarConstraint, Vec<u32>, Duration)>,
}

impl Worker {
    fn start(num_words: usize) -> Self {
        let (orders, queue) = channel::<Order>();
        let (done, masks) = channel();
        std::thread::spawn(move || {
            for (mut constraint, token) in queue {
                let start = Instant::now();
                if let Some(token) = token {
                    constraint.commit(token).unwrap();
                }
                let mut mask = vec![u32::MAX; num_words];
                constraint.mask(&mut mask).unwrap();
                if done.send((constraint, mask, start.elapsed())).is_err() {
                    return;
                }
            }
        });
        Self { orders, masks }
    }
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
        "begin: a constraint for a sequence; first: the median of the first sequence of a grammar; then of {ROUNDS} more, in microseconds;"
    );
    println!("mask: on its thread, with the token before it; hop: from the order to the mask's arrival\n");
    println!(
        "{:32} {:>10} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "", "compile", "tokens", "begin", "first", "mask", "p99", "hop", "p99", "most"
    );
    let worker = Worker::start(tokenizer.vocab_size().div_ceil(32));
    for (name, grammar, text) in cases() {
        measure(name, &grammar, &text, &tokenizer, &compiler, &worker);
    }
    measure_batch(&tokenizer, &compiler);
}

fn measure(
    name: &str,
    grammar: &Grammar,
    text: &str,
    tokenizer: &Tokenizer,
    compiler: &GrammarCompiler,
    worker: &Worker,
) {
    let start = Instant::now();
    let compiled = compiler.compile(grammar).unwrap_or_else(|error| panic!("{name}: {error}"));
    let compile = start.elapsed();
    let tokens = tokenizer.encode_ordinary(text).unwrap();
    let mut first = sequence(name, &compiled, &tokens, worker);
    let mut later: Vec<_> = (0..ROUNDS).flat_map(|_| sequence(name, &compiled, &tokens, worker)).collect();
    first.sort();
    later.sort();
    let first = at(&first, 50).0;
    let (mask, mask_p99) = (at(&later, 50).0, at(&later, 99).0);
    later.sort_by_key(|times| times.1);
    let (hop, hop_p99, most) = (at(&later, 50).1, at(&later, 99).1, at(&later, 100).1);
    let start = Instant::now();
    drop(compiled.constraint(GrammarStart::Answer));
    let begin = start.elapsed();
    println!(
        "{name:32} {:>10.1?} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
        compile,
        tokens.len(),
        micros(begin),
        micros(first),
        micros(mask),
        micros(mask_p99),
        micros(hop),
        micros(hop_p99),
        micros(most)
    );
}

/// What every mask of a sequence takes: on its thread, and to whom has ordered it.
fn sequence(
    name: &str,
    compiled: &CompiledGrammar,
    tokens: &[u32],
    worker: &Worker,
) -> Vec<(Duration, Duration)> {
    let mut constraint = compiled.constraint(GrammarStart::Answer);
    let mut last = None;
    let mut times = Vec::new();
    for &token in tokens {
        // The thread is asleep, as it is while a model computes.
        std::thread::sleep(PAUSE);
        let start = Instant::now();
        worker.orders.send((constraint, last)).unwrap();
        let (back, mask, inside) = worker.masks.recv().unwrap();
        times.push((inside, start.elapsed()));
        let is_allowed = mask[token as usize / 32] >> (token % 32) & 1 == 1;
        assert!(is_allowed, "{name}: the text is not of the grammar");
        (constraint, last) = (back, Some(token));
    }
    times
}

fn at(times: &[(Duration, Duration)], share: usize) -> (Duration, Duration) {
    times[(times.len() - 1) * share / 100]
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
        "\n{BATCH} sequences of the first on one thread: a step takes {} at the median, {} at most",
        micros(median),
        micros(worst)
    );
}

fn micros(duration: Duration) -> String {
    format!("{:.1}", duration.as_secs_f64() * 1e6)
}
