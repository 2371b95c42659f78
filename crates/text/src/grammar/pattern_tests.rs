//! Tests of `pattern`: single constructs, refusals with their places.

use super::translate;

fn refusal(pattern: &str) -> String {
    translate(pattern).expect_err(pattern)
}

#[test]
fn constructs_are_written_for_the_engine() {
    for (pattern, expected) in [
        ("", ""),
        ("^abc$", "^abc$"),
        (r"\d\D", "[0-9][^0-9]"),
        (r"\w\W", "[0-9A-Za-z_][^0-9A-Za-z_]"),
        (".", r"[^\n\r\x{2028}\x{2029}]"),
        ("(?s:.).", r"(?:(?s:.))[^\n\r\x{2028}\x{2029}]"),
        ("(?s).", "(?s:.)"),
        ("(?i)a|b", "(?i:a|b)"),
        ("(?i-s:a(?-i:b))", "(?i:a(?-i:b))"),
        ("(?<year>a)(?<stop>b)", "(?:a)(?:b)"),
        (r"\/\-\_\@", r"\x{2f}\-_@"),
        (r"\u0041\x42\u{43}\cJ\0\t", r"ABC\x{a}\x{0}\x{9}"),
        (r"\ud83d\ude00|\u{1F600}", r"\x{1f600}|\x{1f600}"),
        (r"\ud83d", "[a&&b]"),
        (r"\p{Script=Greek}\P{L}", r"\p{Script=Greek}\P{L}"),
        ("a{2}b{2,}c{2,3}?d*?e+?f??", "a{2,2}b{2,}c{2,3}d*e+f?"),
        ("^{a}]{x", r"^\{a\}\]\{x"),
        ("[]", "[a&&b]"),
        ("[^]", "(?s:.)"),
        (r"[\b\d-]", r"[\x{8}[0-9]\-]"),
        (r"[\w-.]", r"[[0-9A-Za-z_]\-\.]"),
        ("[a-f]", "[a-f]"),
        (r"[+--]", r"[\+-\-]"),
        ("[[:a&&b]", r"[\[:a\&\&b]"),
        (
            r"[^\S]",
            r"[^[^\x{9}-\x{d} \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}]]",
        ),
        (r"[\ud800-\udfff]", "[a&&b]"),
        (r"[\u0000-\uffff]", r"[\x{0}-\x{d7ff}\x{e000}-\x{ffff}]"),
        ("(^a|b$)|^$", "(?:^a|b$)|^$"),
        ("ä~", r"ä\~"),
    ] {
        assert_eq!(translate(pattern).as_deref(), Ok(expected), "{pattern}");
    }
}

#[test]
fn what_the_engine_cannot_match_is_refused_with_its_place() {
    for (pattern, message) in [
        ("a(?=b)", "look-around, `(?=...)`, at character 2"),
        ("(?<!b)", "look-around, `(?<!...)`, at character 1"),
        (r"ab\b", r"a word boundary, `\b`, which is look-around, at character 3"),
        (r"(a)\1", r"a back-reference, `\1`, at character 4"),
        (r"(?<a>b)\k<a>", "a back-reference"),
        ("a^", "`^` behind the beginning of the pattern, at character 2"),
        ("(a$|b)c", "`$` before the end of the pattern, at character 3"),
        ("^*", "`*` with nothing to repeat, at character 2"),
        ("(^a)+", "`+` behind a group with `^` or `$`"),
        ("a|?", "`?` with nothing to repeat"),
        ("a++", "`+` behind a repetition"),
        ("a{2}{3}", "`{3}` behind a repetition"),
        ("a{,5}", "`{,5}`; say `{0,5}`, at character 2"),
        ("a{3,2}", "`{3,2}`, which is no count"),
        ("a{99999999999}", "which is no count up to 1000000"),
        (r"\A", r"`\A`, which ECMA 262 has not in this place, at character 1"),
        (r"\x4", r"`\x`"),
        (r"\u{110000}", r"`\u`"),
        (r"\u{000000041}", r"`\u`"),
        (r"\01", r"`\0`"),
        (r"[\1]", r"`\1`, which ECMA 262 has not"),
        (r"\pL", r"`\p` without a property in braces"),
        (r"a\", r"a `\` with nothing behind it, at character 2"),
        ("a)", "a `)` without its group, at character 2"),
        ("(a", "a group without its `)`"),
        ("(?", "a group without its `)`"),
        ("[a", "a class without its `]`, at character 1"),
        ("[a-", "a class without its `]`"),
        ("[z-a]", "a range whose end comes before its beginning"),
        ("a(?i)b", "a group of an unknown kind, `(?)`"),
        ("(?m:^a)", "a group of an unknown kind, `(?m`"),
        ("(?P<a>b)", "a group of an unknown kind, `(?P`"),
        ("(?<a b>c)", "a group with a name that is none"),
    ] {
        let found = refusal(pattern);
        assert!(found.contains(message), "{pattern}: {found}");
    }
    assert!(refusal(&"(".repeat(200)).contains("nested deeper than 100 levels"));
}

#[test]
fn long_patterns_take_little_time() {
    for piece in ["{", "{1,", "[", r"\u{", "(?:a)", "{,1", "a|"] {
        let _ = translate(&piece.repeat(300_000));
    }
}
