//! JSON schemas: single keywords, refusals with their places, and random texts against a validator.

use serde_json::{Value, json};
use spark_text::{Grammar, GrammarStart, SchemaOptions};

use super::walk::{Walk, accepts, closing, compile, generate, is_exact, refusal, schema, try_generate};

/// A schema with texts that it lets through, and texts that it does not.
type Case = (Value, &'static [&'static str], &'static [&'static str]);

fn cases() -> Vec<Case> {
    [cases_of_values(), cases_of_containers()].concat()
}

fn cases_of_values() -> Vec<Case> {
    vec![
        (json!({"type": "integer"}), &["0", "-17"], &["1.5", "\"1\"", "01", "true"]),
        (json!({"type": "number"}), &["1.5", "-2e3", "7"], &["1.", "+1", "NaN"]),
        (json!({"type": "integer", "minimum": 3, "maximum": 12}), &["3", "12", "9"], &["2", "13", "130"]),
        (json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1}), &["0.5", "1"], &["0", "1.1", "-1"]),
        (
            json!({"type": "integer", "multipleOf": 7, "maximum": 100_000, "minimum": -100_000}),
            &["0", "49"],
            &["48"],
        ),
        (json!({"type": "boolean"}), &["true", "false"], &["null", "True"]),
        (json!({"type": "null"}), &["null"], &["None", "0"]),
        (json!({"type": ["string", "null"]}), &["\"a\"", "null"], &["1"]),
        (
            json!({"type": "string", "minLength": 2, "maxLength": 3}),
            &["\"ab\"", "\"äöü\""],
            &["\"a\"", "\"abcd\""],
        ),
        (json!({"type": "string", "pattern": "^[A-Z]{2}-\\d+$"}), &["\"AB-12\""], &["\"ab-12\"", "\"AB-\""]),
        (json!({"type": "string", "pattern": "b"}), &["\"abc\""], &["\"ac\""]),
        (json!({"type": "string", "format": "date"}), &["\"2024-02-29\""], &["\"2024-02-30\"", "\"x\""]),
        (
            json!({"type": "string", "format": "uuid"}),
            &["\"123e4567-e89b-12d3-a456-426614174000\""],
            &["\"1\""],
        ),
        (json!({"enum": ["red", 3, null]}), &["\"red\"", "3", "null"], &["\"blue\"", "4"]),
        (json!({"const": "ä"}), &["\"ä\""], &["\"a\u{308}\""]),
        (json!({"const": {"a": [1]}}), &["{\"a\":[1]}", "{ \"a\": [1] }"], &["{\"a\":[2]}", "{}"]),
    ]
}

fn cases_of_containers() -> Vec<Case> {
    vec![
        (
            json!({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}),
            &["[1]", "[1, 2, 3]"],
            &["[]", "[1,2,3,4]", "[\"a\"]"],
        ),
        (
            json!({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": false, "minItems": 2}),
            &["[1, \"a\"]"],
            &["[1]", "[\"a\", 1]", "[1, \"a\", 2]"],
        ),
        (
            json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"],
                "additionalProperties": false}),
            &["{\"a\": 1}", "{\"a\": 1, \"b\": \"x\"}"],
            &["{}", "{\"b\": \"x\"}", "{\"a\": 1, \"c\": 2}", "{\"a\": \"1\"}"],
        ),
        (
            json!({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}}),
            &["{}", "{\"a\": 1, \"z\": true}"],
            &["{\"z\": 1}", "{\"a\": true}"],
        ),
        (
            json!({"type": "object", "patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": false}),
            &["{}", "{\"x-a\": 1}"],
            &["{\"y\": 1}", "{\"x-a\": \"\"}"],
        ),
        (
            json!({"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"k": {"const": "v"}}, "required": ["k"]}]}),
            &["5", "{\"k\": \"v\"}"],
            &["\"5\"", "{\"k\": \"w\"}", "{}"],
        ),
        (
            json!({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"a": {"minimum": 5}}}]}),
            &["{\"a\": 5}"],
            &["{\"a\": 4}", "{}"],
        ),
        (json!({"oneOf": [{"type": "string"}, {"type": "integer"}]}), &["\"a\"", "1"], &["null", "1.5"]),
        (
            json!({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["next"], "additionalProperties": false}}}),
            &["{\"next\": null}", "{\"next\": {\"next\": null}}"],
            &["{}", "{\"next\": 1}"],
        ),
        (json!(true), &["1", "{\"a\": [null]}"], &["{a: 1}", "'x'"]),
        (json!({"type": "string", "x-anything": 1, "title": "t", "nullable": true}), &["\"a\""], &["null"]),
        // Values that ask for nothing.
        (
            json!({"type": "array", "uniqueItems": false, "items": {"type": "object", "propertyNames": {"type": "string"}}}),
            &["[{}]"],
            &["{}"],
        ),
    ]
}

#[test]
fn keywords_let_through_what_they_mean() {
    for (case, good, bad) in cases() {
        let validator = jsonschema::validator_for(&case).unwrap();
        let grammar = compile(&schema(case.clone())).unwrap();
        for text in good {
            assert!(validator.is_valid(&serde_json::from_str(text).unwrap()), "{case} {text}");
            assert!(accepts(&grammar, text), "{case} refuses {text}");
        }
        for text in bad {
            assert!(!accepts(&grammar, text), "{case} lets {text} through");
        }
    }
}

#[test]
fn what_cannot_be_enforced_is_refused_with_its_place() {
    let deep = (0..70).fold(json!({}), |inner, _| json!({"items": inner}));
    for (case, message) in [
        (json!(7), "the JSON schema: a JSON schema must be an object"),
        (json!(false), "the schema `false` accepts nothing"),
        (json!({"not": {}}), "the JSON schema at #/not: the keyword `not` is not supported"),
        (
            json!({"properties": {"a/b": {"items": {"if": {}}}}}),
            "at #/properties/a~1b/items/if: the keyword `if` is not supported",
        ),
        (
            json!({"$defs": {"d": {"uniqueItems": true}}}),
            "at #/$defs/d/uniqueItems: the keyword `uniqueItems`",
        ),
        (json!({"anyOf": [{}, {"contains": {}}]}), "at #/anyOf/1/contains"),
        (json!({"minProperties": 2}), "at #/minProperties: minProperties is 2"),
        (json!({"propertyNames": {"pattern": "a"}}), "#/propertyNames"),
        (json!({"dependentRequired": {"a": ["b"]}}), "#/dependentRequired"),
        (json!({"unevaluatedProperties": false}), "#/unevaluatedProperties"),
        (json!({"x-guidance": {"lenient": true}}), "the keyword `x-guidance` is not supported"),
        (json!({"type": "text"}), "at #/type: a type is one of null, boolean"),
        (json!({"type": []}), "at #/type"),
        (json!({"properties": []}), "at #/properties: must be an object of schemas"),
        (json!({"anyOf": {}}), "at #/anyOf: must be a list of schemas"),
        (json!({"items": 3}), "at #/items: a JSON schema must be an object or a boolean"),
        (
            json!({"$ref": "https://example.org/schema"}),
            "Resource 'https://example.org/schema' is not present",
        ),
        (json!({"$id": "a", "$ref": "#/$defs/b"}), "at #: an $id beside a $ref"),
        (json!({"$ref": "#/$defs/absent"}), "'/$defs/absent' does not exist"),
        (json!({"$ref": "#"}), "no text satisfies it"),
        (json!({"type": "string", "format": "klingon"}), "Unknown format: klingon"),
        (json!({"type": "string", "pattern": "["}), "a class without its `]`"),
        (json!({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (json!({"type": "string", "minLength": -1}), "minLength"),
        (json!({"type": "integer", "minimum": 5, "maximum": 4}), "minimum (5) is greater than maximum (4)"),
        (json!({"enum": []}), "Unsatisfiable"),
        (json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf is supported only where"),
        (deep, "nested deeper than 64 levels"),
    ] {
        let found = refusal(&schema(case.clone()));
        assert!(found.contains(message), "{case}: {found}");
    }
}

#[test]
fn best_effort_leaves_out_what_cannot_be_enforced() {
    let case = json!({"type": "array", "items": {"type": "string", "format": "klingon"}, "uniqueItems": true, "minItems": 1});
    let options = SchemaOptions { best_effort: true, ..SchemaOptions::default() };
    let grammar = compile(&Grammar::JsonSchema { schema: case, options }).unwrap();
    assert!(accepts(&grammar, "[\"a\", \"a\"]"));
    assert!(!accepts(&grammar, "[]") && !accepts(&grammar, "[1]"));
}

#[test]
fn white_space_is_bounded_and_can_be_forbidden() {
    let object = || json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    let grammar = compile(&schema(object())).unwrap();
    assert!(accepts(&grammar, "{\n  \"a\": 1\n}"));
    assert!(!accepts(&grammar, &format!("{{{}\"a\": 1}}", " ".repeat(65))));
    let options = SchemaOptions { compact: true, ..SchemaOptions::default() };
    let grammar = compile(&Grammar::JsonSchema { schema: object(), options }).unwrap();
    assert!(accepts(&grammar, "{\"a\":1}"));
    assert!(!accepts(&grammar, "{\"a\": 1}"));
}

/// Schemas as applications write them.
fn schemas() -> Vec<Value> {
    let text = include_str!("schemas.json");
    serde_json::from_str(text).unwrap()
}

#[test]
fn random_texts_are_what_the_schema_says() {
    let all: Vec<Value> = cases().into_iter().map(|(schema, ..)| schema).chain(schemas()).collect();
    let mut random = fastrand::Rng::with_seed(7);
    let rounds = 2_400_usize.div_ceil(all.len());
    let (mut num_texts, mut num_open) = (0, 0);
    for case in &all {
        let validator = jsonschema::options().should_validate_formats(true).build(case).unwrap();
        let grammar = compile(&schema(case.clone())).unwrap_or_else(|error| panic!("{case}: {error}"));
        for round in 0..rounds {
            let Some(text) = generate(&grammar, &mut random, round % 24) else {
                num_open += 1;
                continue;
            };
            let value: Value = match serde_json::from_str(&text) {
                Ok(value) => value,
                // JSON, but more than the validator's numbers hold.
                Err(error) if error.to_string().contains("number out of range") => continue,
                Err(error) => panic!("{case}: {error}: {text}"),
            };
            if let Err(error) = validator.validate(&value) {
                panic!("{case}: {error}: {text}");
            }
            num_texts += 1;
        }
    }
    assert!(num_texts >= 2_000 && num_open * 50 < num_texts, "{num_texts} texts, {num_open} without an end");
}

/// Several sequences side by side, whose masks are computed ahead on other threads: each gets the text that it gets alone.
#[test]
fn sequences_side_by_side_do_not_disturb_each_other() {
    let grammars: Vec<_> =
        schemas().into_iter().take(8).map(|case| compile(&schema(case)).unwrap()).collect();
    let step = |walk: &mut Walk, random: &mut fastrand::Rng, num_steps: usize| {
        let allowed = walk.allowed();
        let token = if num_steps < 10 { random.choice(&allowed).copied() } else { closing(&allowed, random) };
        walk.commit(token.unwrap());
    };
    let seed = |i: usize| fastrand::Rng::with_seed(100 + i as u64);
    let alone: Vec<Vec<u8>> = (0..32)
        .map(|i| {
            let (mut walk, mut random) = (Walk::new(&grammars[i % 8], GrammarStart::Answer), seed(i));
            (0..60).for_each(|num_steps| {
                if !walk.is_complete {
                    step(&mut walk, &mut random, num_steps);
                }
            });
            walk.text
        })
        .collect();
    let mut all: Vec<(Walk, fastrand::Rng)> =
        (0..32).map(|i| (Walk::new(&grammars[i % 8], GrammarStart::Answer), seed(i))).collect();
    for num_steps in 0..60 {
        for (walk, random) in all.iter_mut().filter(|(walk, _)| !walk.is_complete) {
            step(walk, random, num_steps);
        }
    }
    for ((walk, _), alone) in all.iter().zip(&alone) {
        assert_eq!(String::from_utf8_lossy(&walk.text), String::from_utf8_lossy(alone));
    }
}

/// Replaces, removes or copies a random piece of a schema.
fn mutate(value: &mut Value, pieces: &[Value], random: &mut fastrand::Rng) {
    let size = match value {
        Value::Array(items) => items.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if size == 0 || random.u8(..4) == 0 {
        *value = random.choice(pieces).unwrap().clone();
        return;
    }
    let at = random.usize(..size);
    let remove = random.u8(..6) == 0;
    match value {
        Value::Array(items) if remove => drop(items.remove(at)),
        Value::Array(items) => mutate(&mut items[at], pieces, random),
        Value::Object(fields) => {
            let name = fields.keys().nth(at).unwrap().clone();
            match remove {
                true => drop(fields.remove(&name)),
                false => mutate(&mut fields[&name], pieces, random),
            }
        }
        _ => {}
    }
}

/// All values inside a value, and itself.
fn pieces_of(value: &Value, found: &mut Vec<Value>) {
    found.push(value.clone());
    match value {
        Value::Array(items) => items.iter().for_each(|item| pieces_of(item, found)),
        Value::Object(fields) => fields.values().for_each(|field| pieces_of(field, found)),
        _ => {}
    }
}

/// Schemas that nobody would write: most are refused, and what is accepted means what the validator says.
#[test]
fn mutated_schemas_are_refused_or_right() {
    let all: Vec<Value> = cases().into_iter().map(|(schema, ..)| schema).chain(schemas()).collect();
    let mut pieces =
        vec![json!(-1), json!(1e300), json!(2.5), json!(""), json!([]), json!({}), json!({"$ref": "#"})];
    all.iter().for_each(|schema| pieces_of(schema, &mut pieces));
    let mut random = fastrand::Rng::with_seed(23);
    let (mut num_accepted, mut num_texts) = (0, 0);
    for i in 0..1_000 {
        let mut case = all[i % all.len()].clone();
        (0..1 + i % 3).for_each(|_| mutate(&mut case, &pieces, &mut random));
        let Ok(grammar) = compile(&schema(case.clone())) else { continue };
        num_accepted += 1;
        // The validator refuses some schemas that break the rules of schemas in places without a meaning.
        let options = jsonschema::options().should_validate_formats(true);
        let Ok(validator) = options.build(&case) else { continue };
        for round in 0..3 {
            let Ok(Some(text)) = try_generate(&grammar, &mut random, round * 6, "") else { continue };
            let Ok(value) = serde_json::from_str::<Value>(&text) else { continue };
            assert!(!is_exact(&value) || validator.is_valid(&value), "{case}: {text}");
            num_texts += 1;
        }
    }
    assert!(num_accepted > 300 && num_texts > 600, "{num_accepted} accepted, {num_texts} texts");
}
