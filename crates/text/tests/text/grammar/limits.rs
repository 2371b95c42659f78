//! Grammars made to hurt: each is refused, or fails while it is applied, or does what it says; none takes long.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use spark_api::{ConstraintError, TokenConstraint};
use spark_text::{CompiledGrammar, Grammar, GrammarStart, ToolCalls, ToolFormat, ToolFunction, ToolMode};

use super::walk::{compile, schema};

/// Longest compilation, and longest mask, of the worst of these. Far above what they take, as test machines are slow.
const MAX_COMPILE: Duration = Duration::from_secs(20);
const MAX_MASK: Duration = Duration::from_secs(2);
/// Words of a mask of the demo model's vocabulary.
const NUM_WORDS: u32 = 42;

fn properties(count: usize, property: &Value) -> Value {
    (0..count).map(|i| (format!("p{i}"), property.clone())).collect::<Map<_, _>>().into()
}

fn hostile_schemas() -> Vec<(&'static str, Value)> {
    let nested = |depth: usize| {
        (0..depth).fold(
            json!({}),
            |inner, _| json!({"type": "object", "properties": {"a": inner}, "required": ["a"]}),
        )
    };
    let integer = json!({"type": "integer"});
    let chain = |count: usize| {
        let next = |i: usize| json!({"anyOf": [{"$ref": format!("#/$defs/d{}", (i + 1) % count)}, {"type": "array", "items": {"$ref": format!("#/$defs/d{}", (i + 1) % count)}}]});
        let table: Map<_, _> = (0..count)
            .map(|i| (format!("d{i}"), if i + 1 == count { json!({"type": "null"}) } else { next(i) }))
            .collect();
        json!({"$ref": "#/$defs/d0", "$defs": table})
    };
    let two_ways: Vec<Value> = (0..18)
        .map(|i| json!({"anyOf": [{"properties": {format!("a{i}"): integer}}, {"properties": {format!("b{i}"): integer}}]}))
        .collect();
    let many: Vec<Value> = (0..2000)
        .map(|i| json!({"type": "object", "properties": {format!("k{i}"): integer}, "required": [format!("k{i}")]}))
        .collect();
    let tree =
        |name: &str| json!({"type": "object", "properties": {"child": {"$ref": format!("#/$defs/{name}")}}});
    vec![
        ("nested to the limit", nested(60)),
        ("nested past it", nested(100)),
        (
            "1000 optional integers",
            json!({"type": "object", "properties": properties(1000, &integer), "additionalProperties": false}),
        ),
        (
            "5000 optional integers",
            json!({"type": "object", "properties": properties(5000, &integer), "additionalProperties": false}),
        ),
        (
            "200 optional strings",
            json!({"type": "object", "properties": properties(200, &json!({"type": "string", "maxLength": 50}))}),
        ),
        (
            "a large enum",
            json!({"enum": (0..50_000).map(|i| format!("value number {i}")).collect::<Vec<_>>()}),
        ),
        ("2000 objects", json!({"anyOf": many})),
        ("two to the 18th", json!({"allOf": two_ways})),
        ("itself", json!({"$ref": "#"})),
        (
            "two trees",
            json!({"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": tree("a"), "b": tree("b")}}),
        ),
        (
            "a million items",
            json!({"type": "array", "items": {}, "minItems": 1_000_000, "maxItems": 2_000_000}),
        ),
        (
            "a million characters",
            json!({"type": "string", "minLength": 1_000_000, "maxLength": 1_000_000_000}),
        ),
        ("nested repeats", json!({"type": "string", "pattern": "((((a{0,100}){0,100}){0,100}){0,100})"})),
        ("look-ahead", json!({"type": "string", "pattern": "(?=a)\\1"})),
        ("a wide range", json!({"type": "integer", "minimum": -1e18, "maximum": 1e18, "multipleOf": 7})),
        ("a small step", json!({"type": "number", "multipleOf": 1e-300})),
        ("a keyword that is not a number", json!({"type": "string", "maxLength": "ä".repeat(200)})),
        ("a chain of definitions", chain(1_000)),
        ("a longer chain of definitions", chain(1_001)),
        ("endless", json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})),
    ]
}

fn hostile() -> Vec<(&'static str, Grammar)> {
    let alternatives = (0..1500).map(|i| format!("w{i}")).collect::<Vec<_>>().join("|");
    let regexes = [
        ("60,000 parentheses", format!("{}a{}", "(".repeat(60_000), ")".repeat(60_000))),
        ("nested counts", "((a{0,1000}){0,1000}){0,1000}".into()),
        ("1500 ways under a star", format!("({alternatives})*")),
        ("nested pluses", "(((a+)+)+)+b".into()),
        ("a far look back", ".*a.{200}".into()),
        ("nested classes", r"((\p{L}{0,50}\d{0,50}){0,50}){0,50}".into()),
    ];
    let chain = |first: &str, count: usize, rule: &str| {
        let rules =
            (0..count).map(|i| rule.replace("{i}", &i.to_string()).replace("{n}", &(i + 1).to_string()));
        let last = rule
            .replace("{i}", &count.to_string())
            .split("{n}")
            .next()
            .unwrap()
            .trim_end_matches(|char| "rR".contains(char))
            .to_owned()
            + "\"c\"";
        [first.to_owned()].into_iter().chain(rules).chain([last]).collect::<Vec<_>>().join("\n")
    };
    let grammars = [
        ("ambiguous and left-recursive", "start: e\ne: e e | e \"+\" e | \"a\" | \"\"".into()),
        ("60,000 parentheses in Lark", format!("start: {}\"a\"{}", "(".repeat(60_000), ")".repeat(60_000))),
        ("a chain of rules", chain("start: r0", 998, "r{i}: r{n} \"a\" | \"b\"")),
        ("a longer chain of rules", chain("start: r0", 999, "r{i}: r{n} \"a\" | \"b\"")),
        ("a chain of terminals", chain("start: R0", 998, "R{i}: R{n} \"a\" | \"b\"")),
        ("a chain of GBNF rules", chain("root ::= r0", 998, "r{i} ::= r{n} \"a\" | \"b\"")),
        ("a chain of recursive GBNF rules", chain("root ::= r0", 998, "r{i} ::= r{n} \"a\" | \"b\" root")),
        (
            "doubling",
            (0..40).fold("start: r0\n".into(), |text: String, i| {
                text + &format!("r{i}: r{n} r{n}\n", n = i + 1)
            }) + "r40: \"c\"\n",
        ),
        (
            "doubling terminals",
            (0..40).fold("root ::= r0\n".into(), |text: String, i| {
                text + &format!("r{i} ::= r{n} r{n}\n", n = i + 1)
            }) + "r40 ::= \"c\"\n",
        ),
    ];
    let schemas = hostile_schemas().into_iter().map(|(name, value)| (name, schema(value)));
    let regexes = regexes.into_iter().map(|(name, regex)| (name, Grammar::Regex(regex)));
    schemas
        .chain(regexes)
        .chain(grammars.into_iter().map(|(name, source)| (name, Grammar::Ebnf(source))))
        .collect()
}

#[test]
fn hostile_grammars_cost_little() {
    let mut random = fastrand::Rng::with_seed(5);
    for (name, grammar) in hostile() {
        let start = Instant::now();
        let compiled = compile(&grammar);
        let time = start.elapsed();
        assert!(time < MAX_COMPILE, "{name} takes {time:?} to compile");
        if let Ok(compiled) = compiled {
            let (worst, end) = wander(&compiled, &mut random);
            assert!(worst < MAX_MASK, "{name}: a mask takes {worst:?}; the walk ends with {end:?}");
        }
    }
}

#[test]
fn many_tools_are_bounded() {
    let tools = |count: usize| {
        let parameters = json!({"type": "object", "properties": properties(5, &json!({"type": "string"}))});
        let function = |i: usize| ToolFunction {
            name: format!("function_{i}"),
            parameters: parameters.clone(),
            strict: true,
            place: format!("tools[{i}].function"),
        };
        let functions = (0..count).map(function).collect();
        Grammar::ToolCalls(ToolCalls { format: ToolFormat::Hermes, functions, mode: ToolMode::Some })
    };
    let start = Instant::now();
    let compiled = compile(&tools(512)).unwrap();
    let (worst, end) = wander(&compiled, &mut fastrand::Rng::with_seed(1));
    assert!(start.elapsed() < MAX_COMPILE && worst < MAX_MASK && end.is_none(), "{worst:?} {end:?}");
    let found = compile(&tools(513)).map(|_| ()).unwrap_err().to_string();
    assert!(found.contains("513 functions; the limit is 512"), "{found}");
}

/// Sources that were right once, with pieces cut out, doubled and exchanged: each compiles or is refused.
#[test]
fn mutated_sources_are_refused_or_compile() {
    let sources = [
        "root ::= item (\", \" item){1,2}\nitem ::= a-b | \"x\"+\na-b ::= [a-c] [^a-z ,]? # end",
        "root ::= \"(\" root \")\" | num\nnum ::= [0-9]+ (\".\" [0-9]{1,3})?",
        "start: term (\" + \" term)*\nterm: NUMBER | \"(\" start \")\"\nNUMBER: /[0-9]+/\n%ignore / /",
        "%import common.INT\nstart: \"a\" INT? | x{2,3} | %json {\"type\": \"integer\"}\nx: <|im_start|> | /b/i",
        r"(?i)(\d{3}-|[^a-f\s]+)*\p{L}?$",
        r"^(a|b(c|d){2,5}|[[:alpha:]]|\x41|\u{1F600})+",
    ];
    let alphabet: Vec<char> = sources.concat().chars().collect();
    let mut random = fastrand::Rng::with_seed(17);
    let mut num_compiled = 0;
    for round in 0..1_200 {
        let mut chars: Vec<char> = sources[round % sources.len()].chars().collect();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..chars.len());
            match random.u8(..3) {
                0 => drop(chars.remove(at)),
                1 => chars.insert(at, random.choice(alphabet.iter().copied()).unwrap()),
                _ => chars[at] = random.choice(alphabet.iter().copied()).unwrap(),
            }
        }
        let source: String = chars.into_iter().collect();
        let grammar = if round % sources.len() < 4 { Grammar::Ebnf(source) } else { Grammar::Regex(source) };
        if let Ok(compiled) = compile(&grammar) {
            num_compiled += 1;
            wander(&compiled, &mut random);
        }
    }
    assert!(num_compiled > 100, "{num_compiled}");
}

/// Sixty random tokens: the longest time that one took, and the constraint's failure, if it came to that.
fn wander(grammar: &CompiledGrammar, random: &mut fastrand::Rng) -> (Duration, Option<ConstraintError>) {
    let mut constraint = grammar.constraint(GrammarStart::Answer);
    let mut worst = Duration::ZERO;
    for _ in 0..60 {
        let mut mask = vec![u32::MAX; NUM_WORDS as usize];
        let start = Instant::now();
        let result = constraint.mask(&mut mask);
        worst = worst.max(start.elapsed());
        let is_set = |id: &u32| mask[*id as usize / 32] >> (id % 32) & 1 == 1;
        let allowed: Vec<u32> = (0..NUM_WORDS * 32).filter(is_set).collect();
        let result =
            result.and_then(|()| constraint.commit(random.choice(allowed).expect("something may follow")));
        match result {
            Ok(false) => {}
            Ok(true) => return (worst, None),
            Err(error) => return (worst, Some(error)),
        }
    }
    (worst, None)
}
