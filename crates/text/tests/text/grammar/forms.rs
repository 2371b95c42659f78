//! Regular expressions, choices, grammars, structural tags, and thinking before them.

use serde_json::{Value, json};
use spark_text::{Grammar, GrammarStart};

use super::walk::{EOS, Walk, accepts, compile, generate, refusal, schema, tokenizer};

/// Texts that the grammar lets through, and texts that it does not.
fn check(grammar: &Grammar, good: &[&str], bad: &[&str]) {
    let compiled = compile(grammar).unwrap_or_else(|error| panic!("{grammar:?}: {error}"));
    for text in good {
        assert!(accepts(&compiled, text), "{grammar:?} refuses {text:?}");
    }
    for text in bad {
        assert!(!accepts(&compiled, text), "{grammar:?} lets {text:?} through");
    }
}

fn regex(regex: &str) -> Grammar {
    Grammar::Regex(regex.into())
}

fn ebnf(source: &str) -> Grammar {
    Grammar::Ebnf(source.into())
}

#[test]
fn a_regex_matches_the_whole_text() {
    check(&regex(r"\d{3}-\d{4}"), &["555-0199"], &["55-0199", "555-01999", "x555-0199"]);
    check(&regex("^(red|green)$"), &["red", "green"], &["reddish", ""]);
    check(&regex("a/b\\n(?i)c"), &["a/b\nc", "a/b\nC"], &["a/b c"]);
    check(&regex("[äöü]+ß?"), &["äöß", "ü"], &["a"]);
    let grammar = compile(&regex(r"[a-c]{2,5}x")).unwrap();
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..50 {
        let text = generate(&grammar, &mut random, 10).unwrap();
        let body = text.strip_suffix('x').unwrap();
        assert!(
            (2..=5).contains(&body.len()) && body.chars().all(|char| ('a'..='c').contains(&char)),
            "{text}"
        );
    }
}

#[test]
fn a_bad_regex_is_refused_with_its_reason() {
    for (source, message) in [
        ("", "the regex: is empty"),
        ("(a", "unclosed group"),
        ("[", "unclosed character class"),
        ("a{2", "unclosed counted repetition"),
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"\bfoo", "lookarounds"),
        ("a{3,2}", "repetition"),
    ] {
        let found = refusal(&regex(source));
        assert!(found.contains(message) && !found.contains("start:"), "{source}: {found}");
    }
}

#[test]
fn a_choice_is_one_of_its_texts() {
    let texts = ["yes", "no", "n\"o\n", "näh", "yes, but"].map(str::to_owned);
    check(
        &Grammar::Choice(texts.to_vec()),
        &["yes", "no", "n\"o\n", "näh", "yes, but"],
        &["maybe", "ye", "yes,"],
    );
    assert!(refusal(&Grammar::Choice(Vec::new())).contains("has 0 texts"));
    assert!(refusal(&Grammar::Choice(vec!["a".into(), String::new()])).contains("an empty text"));
}

#[test]
fn lark_grammars() {
    let sum = "start: term (\" + \" term)*\nterm: NUMBER | \"(\" start \")\"\nNUMBER: /[0-9]+/\n";
    check(&ebnf(sum), &["1", "1 + 22", "(1 + 2) + 3"], &["1 +", "()", "1+2"]);
    for (source, message) in [
        ("  ", "the grammar: is empty"),
        ("foo: \"a\"", "no start rule"),
        ("start: a", "unknown name: \"a\""),
        ("start: (\"a\"", "Expected token ')'"),
        ("start: <nothing>", "unknown special token"),
        ("start: \"a\"\nstart: \"b\"", "duplicate rule"),
        ("start: a\na[temperature=0.5]: /x+/", "at line 2: temperature= is not supported"),
    ] {
        let found = refusal(&ebnf(source));
        assert!(found.contains(message), "{source}: {found}");
    }
}

/// As llama.cpp's `json.gbnf`, with its names and repetitions.
const JSON_GBNF: &str = r#"
# any JSON value
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::=
  "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,2})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn gbnf_grammars() {
    check(
        &ebnf(JSON_GBNF),
        &["{}", "{\"a\": [1, -2.5e1, null],\n \"b\": {\"c\": \"\\u00e4\"}}"],
        &["[]", "{a: 1}", "{\"a\" 1}"],
    );
    let regular = "root ::= item (\", \" item){1,2}\nitem ::= a-b | \"x\"+\na-b ::= [a-c] [^a-z ,]?";
    check(&ebnf(regular), &["a, xx", "b!, x, c"], &["a", "a, b, c, a", "ab, c"]);
    check(&ebnf("root ::= \"\" \"a\" .  \"\\U0001F600\"? "), &["ab", "ax😀"], &["a", "abc"]);
    let grammar = compile(&ebnf(JSON_GBNF)).unwrap();
    let mut random = fastrand::Rng::with_seed(3);
    for round in 0..100 {
        let text = generate(&grammar, &mut random, round % 20).unwrap();
        serde_json::from_str::<Value>(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    }
    for (source, message) in [
        ("main ::= \"a\"", "there is no rule `root`"),
        ("root ::= thing", "the rule `thing` is used, but never defined"),
        ("root ::= \"a\"\nroot ::= \"b\"", "at line 2: the rule `root` is defined twice"),
        ("root ::= \"a", "at line 1: a text has no closing"),
        ("root ::= (\"a\"", "expected `)`"),
        ("root ::= \"a\")", "expected the end of the rule"),
        ("root ::= * \"a\"", "there is nothing to repeat"),
        ("root ::= [z-a]", "is empty"),
        ("root ::= []", "a set of characters is empty"),
        ("root ::= \"a\"{3,1}", "is no number of repetitions"),
        ("root ::= \"\\q\"", "is no escape"),
        ("root ::= \"\\uD800\"", "is no character"),
        ("\"a\" root ::= \"b\"", "expected a rule"),
        ("root ::= % \"b\"", "at line 1: `%` is not expected here"),
        ("root ::= root \"a\"", "the grammar: "),
    ] {
        let found = refusal(&ebnf(source));
        assert!(found.contains(message), "{source}: {found}");
    }
    let nested = format!("root ::= {}\"a\"{}", "(".repeat(60_000), ")".repeat(60_000));
    assert!(refusal(&ebnf(&nested)).contains("parentheses are nested deeper than"));
}

#[test]
fn structural_tags_in_both_spellings() {
    let city = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": false});
    let old = json!({"type": "structural_tag", "triggers": ["<function="],
        "structures": [{"begin": "<function=weather>", "schema": city, "end": "</function>"}]});
    let new = json!({"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<function="],
        "tags": [{"type": "tag", "begin": "<function=weather>", "end": "</function>",
            "content": {"type": "json_schema", "json_schema": city}}]}});
    for tag in [old, new] {
        check(
            &Grammar::StructuralTag(tag),
            &[
                "",
                "Nothing to call < here.",
                "I call <function=weather>{\"city\": \"Oslo\"}</function> and go on",
                "<function=weather>{\"city\": \"A\"}</function><function=weather>{\"city\": \"B\"}</function>",
            ],
            &[
                "<function=",
                "<function=rain>{}</function>",
                "<function=weather>{}</function>",
                "<function=weather>{\"city\": \"A\"}",
            ],
        );
    }
}

fn format(format: &Value) -> Grammar {
    Grammar::StructuralTag(json!({"type": "structural_tag", "format": format}))
}

#[test]
fn structural_formats() {
    let tag = |begin: &str, content: Value, end: &str| json!({"type": "tag", "begin": begin, "content": content, "end": end});
    let text = json!({"type": "any_text"});
    let digits = json!({"type": "regex", "pattern": "[0-9]+"});
    let sequence = json!({"type": "sequence", "elements": [tag("<t>", text.clone(), "</t>"), {"type": "const_string", "value": "\nA: "}, digits]});
    check(
        &format(&sequence),
        &["<t>a < b </t\n></t>\nA: 12", "<t></t>\nA: 1"],
        &["<t>x</t>\nA: ", "<t>x", "A: 1"],
    );
    let or = json!({"type": "or", "elements": [{"type": "json_schema", "json_schema": {"type": "integer"}}, {"type": "grammar", "grammar": "root ::= \"none\""}]});
    check(&format(&or), &["5", "none"], &["five", "5none"]);
    let item = tag("<i>", digits.clone(), "</i>");
    let list = |more: Value| {
        let mut format = json!({"type": "tags_with_separator", "tags": [item], "separator": ", "});
        more.as_object().unwrap().iter().for_each(|(name, value)| format[name] = value.clone());
        self::format(&format)
    };
    check(
        &list(json!({"at_least_one": true})),
        &["<i>1</i>", "<i>1</i>, <i>22</i>"],
        &["", "<i>1</i>,<i>2</i>", "<i>1</i>, "],
    );
    check(&list(json!({"stop_after_first": true})), &["<i>1</i>"], &["<i>1</i>, <i>2</i>"]);
    let triggered = |at_least_one: bool, stop: bool| {
        format(
            &json!({"type": "triggered_tags", "triggers": ["<i"], "tags": [item], "at_least_one": at_least_one, "stop_after_first": stop}),
        )
    };
    check(&triggered(true, false), &["x <i>1</i> y", "<i>1</i><i>2</i>"], &["x", "<i>"]);
    check(&triggered(true, true), &["x <i>1</i>"], &["x", "x <i>1</i> y"]);
    check(&triggered(false, true), &["x", "x <i>1</i>"], &["x <i>1</i> y", "x <i>y"]);
    let twice = json!({"type": "repeat", "min": 2, "max": 3, "content": item});
    check(&format(&twice), &["<i>1</i><i>2</i>"], &["<i>1</i>", "<i>1</i><i>1</i><i>1</i><i>1</i>"]);
    for (kind, good, bad) in
        [("optional", "", "<i>1</i><i>2</i>"), ("star", "", "<i>"), ("plus", "<i>1</i>", "")]
    {
        let outer = json!({"type": "sequence", "elements": [{"type": kind, "content": item}, {"type": "const_string", "value": "."}]});
        check(&format(&outer), &[&format!("{good}.")], &[&format!("{bad}.")]);
    }
}

#[test]
fn structural_tags_that_are_refused() {
    let tag = json!({"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"});
    for (value, message) in [
        (json!({}), "needs `format`, or `structures`"),
        (json!({"structures": {}}), "at structures: must be a list"),
        (json!({"format": 1}), "at format: must be an object"),
        (json!({"format": {"type": "token", "token": 1}}), "`token` is not supported in the format"),
        (json!({"format": {"type": "dispatch"}}), "\"dispatch\" is not supported"),
        (json!({"format": {"type": "any_text", "max_tokens": 5}}), "`max_tokens` is not supported"),
        (
            json!({"format": {"type": "sequence", "elements": [{"type": "any_text"}, tag]}}),
            "elements[0]: any_text must be",
        ),
        (json!({"format": {"type": "tag", "begin": "<a>", "end": "</a>"}}), "content is missing"),
        (json!({"format": {"type": "json_schema", "json_schema": {"not": {}}}}), "#/not"),
        (
            json!({"format": {"type": "triggered_tags", "triggers": ["<b"], "tags": [tag]}}),
            "no tag begins with the trigger",
        ),
        (
            json!({"format": {"type": "triggered_tags", "triggers": ["<a", "<a>"], "tags": [tag]}}),
            "exactly one of the triggers",
        ),
        (json!({"format": {"type": "repeat", "min": 3, "max": 2, "content": tag}}), "min and max"),
    ] {
        let found = refusal(&Grammar::StructuralTag(value.clone()));
        assert!(found.contains(message), "{value}: {found}");
    }
    let deep = (0..100).fold(tag, |inner, _| json!({"type": "plus", "content": inner}));
    assert!(refusal(&format(&deep)).contains("nested deeper"));
}

#[test]
fn thinking_is_free_and_reaches_the_answer() {
    let grammar = compile(&schema(json!({"type": "integer", "minimum": 10, "maximum": 99}))).unwrap();
    let close = tokenizer().token_to_id("</think>").unwrap();
    for newlines in ["", "\n\n", "\n"] {
        let mut walk = Walk::new(&grammar, GrammarStart::Thinking);
        walk.write("Some <b>text</b>, and \"quotes\" {").unwrap();
        assert!(!walk.may_end(), "the answer is still to come");
        walk.commit(close);
        walk.write(newlines).unwrap();
        assert_eq!(walk.write("x"), Err(0));
        walk.write("42").unwrap();
        assert!(walk.is_complete);
    }
}

#[test]
fn a_marker_in_letters_ends_thinking_and_is_not_overrun() {
    let grammar = compile(&regex("yes")).unwrap();
    let mut walk = Walk::new(&grammar, GrammarStart::Thinking);
    // Byte by byte: no token of the marker's own.
    let byte = |byte: u8| (0..1296).find(|&id| tokenizer().token_bytes(id) == [byte]).unwrap();
    for &each in b"a</</think" {
        assert!(walk.allowed().contains(&byte(each)));
        walk.commit(byte(each));
    }
    let overruns =
        |id: &u32| tokenizer().token_bytes(*id).starts_with(b">") && tokenizer().token_bytes(*id).len() > 1;
    assert!((0..1296).any(|id| overruns(&id)), "the vocabulary has such a token");
    assert!(!walk.allowed().iter().any(overruns));
    walk.commit(byte(b'>'));
    assert_eq!(walk.write("no"), Err(0));
    walk.write("yes").unwrap();
    assert!(walk.is_complete);
}

#[test]
fn a_model_that_may_think_need_not() {
    let grammar = compile(&regex("yes")).unwrap();
    let [open, close] = ["<think>", "</think>"].map(|marker| tokenizer().token_to_id(marker).unwrap());
    let mut walk = Walk::new(&grammar, GrammarStart::MayThink);
    walk.write("yes").unwrap();
    assert!(walk.is_complete);
    let mut walk = Walk::new(&grammar, GrammarStart::MayThink);
    assert!(walk.allowed().contains(&open));
    walk.commit(open);
    walk.write("Hm. ").unwrap();
    walk.commit(close);
    assert!(!walk.allowed().contains(&open), "there is one block");
    walk.write("yes").unwrap();
    assert!(walk.is_complete);
    assert!(!Walk::new(&grammar, GrammarStart::Answer).allowed().contains(&open));
}

#[test]
fn the_end_is_allowed_where_the_text_may_end() {
    let grammar = compile(&regex("a+")).unwrap();
    let mut walk = Walk::new(&grammar, GrammarStart::Answer);
    assert!(!walk.may_end());
    walk.write("aa").unwrap();
    let allowed = walk.allowed();
    assert!(EOS.iter().all(|token| allowed.contains(token)), "any of the model's ends will do");
    walk.commit(EOS[1]);
    assert!(walk.is_complete);
}
