//! What Python prints, taken from CPython 3.13.

use minijinja::{Environment, context};
use serde_json::json;

use super::*;

fn render(template: &str, value: serde_json::Value) -> Result<String, Error> {
    let mut environment = Environment::new();
    environment.set_formatter(format_output);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", string);
    environment.render_str(template, context! { x => Value::from_serialize(value) })
}

#[test]
fn json_is_that_of_python() {
    let value = json!({"b": [1, 2.0, -0.5, 1e-7, 1e16, 123456789012345.6, true, null], "a": "ü<&>'\"\\/\n\u{1}\u{7f}\u{8}😀", "e": {}, "l": []});
    let plain = "{\"b\": [1, 2.0, -0.5, 1e-07, 1e+16, 123456789012345.6, true, null], \"a\": \"ü<&>'\\\"\\\\/\\n\\u0001\u{7f}\\b😀\", \"e\": {}, \"l\": []}";
    assert_eq!(render("{{ x|tojson }}", value.clone()).unwrap(), plain);
    let ascii = render("{{ x.a|tojson(ensure_ascii=true) }}", value.clone()).unwrap();
    assert_eq!(ascii, "\"\\u00fc<&>'\\\"\\\\/\\n\\u0001\u{7f}\\b\\ud83d\\ude00\"");
    let sorted = render("{{ x|tojson(indent=2, sort_keys=true) }}", json!({"b": [1, {}], "a": []})).unwrap();
    assert_eq!(sorted, "{\n  \"a\": [],\n  \"b\": [\n    1,\n    {}\n  ]\n}");
    let compact = render("{{ x|tojson(separators=(',', ':'), indent=none) }}", json!({"b": [1, 2]})).unwrap();
    assert_eq!(compact, "{\"b\":[1,2]}");
    let floats = render("{{ x|tojson }}", json!([0.0001, 0.00001, 1e15, 1.5e300, -0.0])).unwrap();
    assert_eq!(floats, "[0.0001, 1e-05, 1000000000000000.0, 1.5e+300, -0.0]");
    assert_eq!(render("{{ {1: 2, none: 3}|tojson }}", json!(null)).unwrap(), "{\"1\": 2, \"null\": 3}");
}

#[test]
fn undefined_has_no_json() {
    assert!(render("{{ nothing|tojson }}", json!(null)).is_err());
    assert!(render("{{ x|tojson(unknown=1) }}", json!(null)).is_err());
    assert_eq!(render("[{{ nothing }}]", json!(null)).unwrap(), "[]");
}

#[test]
fn output_is_that_of_python() {
    let value = json!([null, true, 1, 1.0, "it's", "a\"b'c\n", {"k": "v"}]);
    assert_eq!(render("{{ x }}", value).unwrap(), r#"[None, True, 1, 1.0, "it's", 'a"b\'c\n', {'k': 'v'}]"#);
    assert_eq!(render("{{ x }}{{ x|string }}{{ true }}", json!(null)).unwrap(), "NoneNoneTrue");
}
