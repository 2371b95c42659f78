//! Patterns in JSON schemas mean what ECMA 262 says, and what the validator says.

use serde_json::{Value, json};

use super::walk::{accepts, compile, generate, is_exact, refusal, schema, try_generate};

/// A pattern with texts that have it, and texts that have not.
type Case = (&'static str, &'static [&'static str], &'static [&'static str]);

const CASES: [Case; 15] = [
    (r"^a\sb$", &["a b", "a\u{feff}b", "a\u{2028}b", "a\u{a0}b", "a\nb"], &["a\u{85}b", "a\u{200b}b", "ab"]),
    (r"^\S$", &["\u{85}", "x"], &["\u{feff}", " ", "\u{3000}", "\u{b}"]),
    (r"^[^\s]$", &["\u{85}", "x"], &["\u{feff}", " "]),
    (r"^[\S\n]$", &["\n", "x"], &[" "]),
    (r"^\d\w$", &["1a", "0_"], &["1ä", "\u{663}a"]),
    (r"^\D\W$", &["aä", "\u{663}-"], &["1-", "ab"]),
    ("^.$", &["a", "\u{85}", "😀"], &["\n", ""]),
    ("b", &["abc", "\nb\n"], &["ac"]),
    ("^a$", &["a"], &["a\n", "\na", "aa"]),
    (r"^\/\-\u0041\x42\cJ$", &["/-AB\n"], &["/-AB"]),
    (r"^[\w\-.]+$", &["a-b.c", "-"], &["a b", ""]),
    (r"^(?<year>\d{4})(?:-|\/)$", &["2026-", "2026/"], &["2026", "26-"]),
    (r"^\p{Lu}\P{Lu}\p{Script=Greek}$", &["Aaα", "Ä1Ω"], &["aaα", "Aaa"]),
    (r"^x|y$", &["xa", "ay", "x"], &["ax", "ya"]),
    (r"^[\[\]{}|&&--~]$", &["[", "]", "{", "&", "-", "~"], &["a"]),
];

#[test]
fn patterns_mean_what_ecma_262_says() {
    for (pattern, good, bad) in CASES {
        let case = json!({"type": "string", "pattern": pattern});
        let validator = jsonschema::validator_for(&case).unwrap();
        let grammar = compile(&schema(case)).unwrap();
        for (text, expected) in
            good.iter().map(|text| (text, true)).chain(bad.iter().map(|text| (text, false)))
        {
            assert_eq!(validator.is_valid(&json!(text)), expected, "the validator: {pattern} {text:?}");
            assert_eq!(accepts(&grammar, &json!(text).to_string()), expected, "{pattern} {text:?}");
        }
    }
    // Here the validator's `.` takes more than ECMA's.
    let grammar = compile(&schema(json!({"type": "string", "pattern": "^.$"}))).unwrap();
    for text in ["\r", "\u{2028}", "\u{2029}"] {
        assert!(!accepts(&grammar, &json!(text).to_string()), "{text:?}");
    }
    // And it has no half surrogate pairs.
    let grammar =
        compile(&schema(json!({"type": "string", "pattern": r"^[^\x00-\x1f\uD800-\uDFFF]+$"}))).unwrap();
    assert!(accepts(&grammar, "\"ä😀\"") && !accepts(&grammar, r#""\u0001""#));
}

#[test]
fn a_name_of_pattern_properties_is_a_pattern() {
    let case = json!({"type": "object", "patternProperties": {r"^a\s": {"type": "integer"}, r"^\d": {"type": "null"}},
        "additionalProperties": {"type": "boolean"}});
    let validator = jsonschema::validator_for(&case).unwrap();
    let grammar = compile(&schema(case)).unwrap();
    for (text, expected) in [
        ("{\"a\u{feff}\": 1}", true),
        ("{\"a\u{feff}\": true}", false),
        ("{\"a\u{85}\": true}", true),
        ("{\"a\u{85}\": 1}", false),
        ("{\"7\": null}", true),
        ("{\"\u{663}\": null}", false),
        ("{\"\u{663}\": false}", true),
    ] {
        assert_eq!(
            validator.is_valid(&serde_json::from_str(text).unwrap()),
            expected,
            "the validator: {text}"
        );
        assert_eq!(accepts(&grammar, text), expected, "{text}");
    }
    let twice = json!({"patternProperties": {r"\d": {}, "[0-9]": {}}});
    assert!(refusal(&schema(twice)).contains("at #/patternProperties/[0-9]: another pattern there"));
}

/// `o47262` of JSONSchemaBench, whose texts had U+0085 for a space, which no space of ECMA 262 is.
#[test]
fn white_space_is_that_of_ecma_262() {
    let case = json!({"type": "string", "pattern": r"^\w+\s\w+\s?\w+?$", "maxLength": 12});
    let validator = jsonschema::validator_for(&case).unwrap();
    let grammar = compile(&schema(case)).unwrap();
    let mut random = fastrand::Rng::with_seed(3);
    for round in 0..200 {
        let Some(text) = generate(&grammar, &mut random, round % 12) else { continue };
        assert!(validator.is_valid(&serde_json::from_str(&text).unwrap()), "{text}");
    }
}

/// A random pattern of `depth` levels.
fn random_pattern(depth: usize, random: &mut fastrand::Rng) -> String {
    const ATOMS: [&str; 22] = [
        "a", "b", " ", ".", r"\s", r"\S", r"\d", r"\D", r"\w", r"\W", "[a-c]", "[^a]", r"[\s\d]", r"[^\w\-]",
        r"\.", "[^]", r"\u0085", r"\ufeff", r"[\b\t]", r"\/", "ä", r"\p{L}",
    ];
    if depth == 0 {
        return random.choice(ATOMS).unwrap_or_default().to_owned();
    }
    let mut inner = || random_pattern(depth - 1, random);
    let (first, second) = (inner(), inner());
    match random.u8(..8) {
        0 => format!("{first}|{second}"),
        1 => format!("(?:{first}){second}"),
        2 => format!("({first})?{second}"),
        3 => format!("(?:{first}|{second}){{1,3}}"),
        4 => format!("^{first}{second}"),
        5 => format!("{first}{second}$"),
        6 => format!("(^{first}|{second})"),
        _ => format!("{first}{second}"),
    }
}

#[test]
fn texts_of_random_patterns_are_valid() {
    let mut random = fastrand::Rng::with_seed(11);
    let (mut num_accepted, mut num_texts, mut num_judged) = (0, 0, 0);
    for i in 0..200 {
        let pattern = random_pattern(1 + i % 3, &mut random);
        let case = json!({"type": "string", "pattern": pattern});
        let Ok(validator) = jsonschema::validator_for(&case) else { continue };
        let Ok(grammar) = compile(&schema(case)) else { continue };
        num_accepted += 1;
        for round in 0..3 {
            let Ok(Some(text)) = try_generate(&grammar, &mut random, round * 4, "") else { continue };
            let value: Value = serde_json::from_str(&text).unwrap();
            assert!(is_exact(&value) && validator.is_valid(&value), "{pattern}: {text}");
            num_texts += 1;
        }
        // Of texts that nobody made for the pattern the grammar takes those that the validator takes.
        for _ in 0..6 {
            let alphabet = ['a', 'b', 'c', ' ', '1', '-', '.', '\u{85}', '\u{feff}', 'ä', '/', '\t'];
            let text: String = (0..random.usize(..5)).filter_map(|_| random.choice(alphabet)).collect();
            assert_eq!(
                accepts(&grammar, &json!(text).to_string()),
                validator.is_valid(&json!(text)),
                "{pattern}: {text:?}"
            );
            num_judged += 1;
        }
    }
    assert!(
        num_accepted > 80 && num_texts > 150 && num_judged > 480,
        "{num_accepted} {num_texts} {num_judged}"
    );
}

#[test]
fn patterns_that_cannot_be_enforced_are_refused_with_their_place() {
    for (case, message) in [
        (
            json!({"properties": {"a": {"pattern": "^(?=b)"}}}),
            "at #/properties/a/pattern: the pattern has look-around, `(?=...)`, at character 2: that is not supported",
        ),
        (
            json!({"patternProperties": {r"a\b": {}}}),
            r"at #/patternProperties/a\b: the pattern has a word boundary",
        ),
        (json!({"pattern": r"(a)\1"}), r"the pattern has a back-reference, `\1`, at character 4"),
        (json!({"pattern": "["}), "a class without its `]`"),
        (json!({"pattern": r"\p{Klingon}"}), "property"),
        // Where a reference leads is a schema too.
        (
            json!({"$ref": "#/components/a%20b", "components": {"a b": {"items": {"pattern": r"\b"}}}}),
            r"at #/components/a b/items/pattern: the pattern has a word boundary",
        ),
        (
            json!({"$ref": "#/enum/0", "enum": [{"pattern": "a"}]}),
            "at #/$ref: there is no schema where this leads to",
        ),
        (
            json!({"items": {"$id": "http://a.b/c", "$ref2": 1, "allOf": [{"$ref": "#/x/y"}], "x": {"y": {}}}}),
            "at #/items/allOf/0/$ref: there is no schema",
        ),
    ] {
        let found = refusal(&schema(case));
        assert!(found.contains(message), "{message}\n{found}");
    }
    let best = spark_text::SchemaOptions { best_effort: true, compact: false };
    let case = json!({"type": "object", "properties": {"a": {"type": "string", "pattern": r"\bx"}}, "required": ["a"],
        "patternProperties": {"(?=b)": {"type": "null"}}, "additionalProperties": false});
    let grammar = compile(&spark_text::Grammar::JsonSchema { schema: case, options: best }).unwrap();
    assert!(accepts(&grammar, "{\"a\": \"y\"}"));
}

#[test]
fn schemas_behind_references_are_translated() {
    let case = json!({"$ref": "#/components/a", "components": {"a": {"type": "object", "properties": {"s": {"$ref": "#/components/b"}},
        "required": ["s"], "additionalProperties": false}, "b": {"type": "string", "pattern": r"^\s$"}}});
    let grammar = compile(&schema(case)).unwrap();
    assert!(accepts(&grammar, "{\"s\": \"\u{feff}\"}") && !accepts(&grammar, "{\"s\": \"\u{85}\"}"));
}
